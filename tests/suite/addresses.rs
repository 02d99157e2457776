//! Addresses as clients write them, and how failures of what they lead to are told apart.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_tests::{Authority, Pictures, Server, Settings, Validity, picture};
use serde_json::Value;

type Job = HashMap<String, Option<String>>;

fn run(server: &Server, key: &str, image: &str) -> Job {
    server.call::<()>(&["FLORENCE.SUBMIT", key, image, "<OD>", "NOCACHE"]);
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "30"]);
    job.unwrap_or_else(|| panic!("{image:?} does not end"))
}

fn error(job: &Job) -> Value {
    serde_json::from_str(job["error"].as_deref().expect("a failed job")).unwrap()
}

fn message(server: &Server, key: &str, image: &str) -> String {
    error(&run(server, key, image))["message"].as_str().unwrap().to_owned()
}

#[test]
fn every_spelling_of_an_address_is_the_same_address() {
    let roots = tempfile::tempdir().unwrap();
    let file = roots.path().join("a picture #1 100%.png");
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    std::fs::write(&file, &bytes).unwrap();
    let path = file.display().to_string();
    let encoded = path.replace('%', "%25").replace(' ', "%20").replace('#', "%23");
    let root = format!("florence.file-roots {}", roots.path().display());
    let (server, pictures) = (Server::ready(&[&root]), Pictures::serve());
    let expected = run(&server, "expected", &pictures.url("shapes.png"))["result"].clone();
    let url = pictures.url("shapes.png");
    let rest = url.strip_prefix("http").unwrap();
    for (i, image) in [
        format!("HTTP{rest}"),
        format!("Http{rest}"),
        format!("  {url}"),
        format!("\n{url}"),
        path.clone(),
        format!(" {path}"),
        format!("file://{encoded}"),
        format!("FILE://{encoded}"),
        format!("file://localhost{encoded}"),
        format!("File://LOCALHOST{encoded}"),
        format!("file:{encoded}"),
        format!("DATA:image/png;base64,{}", BASE64_STANDARD.encode(&bytes)),
        format!(" data:image/png;base64,{}", BASE64_STANDARD.encode(&bytes)),
    ]
    .iter()
    .enumerate()
    {
        let job = run(&server, &format!("j{i}"), image);
        assert_eq!(job["result"], expected, "{image:.100?}: {job:?}");
    }
    // All of one host; and nobody else's name is looked at.
    let hosts: Vec<HashMap<String, String>> = server.call(&["FLORENCE.HOSTS"]);
    let hosts: Vec<_> = hosts.iter().map(|row| (&*row["host"], &*row["downloads"])).collect();
    assert_eq!(hosts, [("127.0.0.1", "5")]);
    let refused = server.error(&["FLORENCE.SUBMIT", "x", &format!("file://other{path}"), "<OD>"]);
    assert!(refused.starts_with("ERR the image must be"), "{refused}");
}

#[test]
fn rules_and_secrets_hold_in_every_spelling() {
    let pictures = tempfile::tempdir().unwrap();
    let root = pictures.path().display();
    let roots = format!("florence.file-roots {root}");
    let server = Server::ready(&["florence.deny-hosts \"bad.example\"", &roots]);
    for scheme in ["http", "HTTP", " Http", "\nhttps", "HTTPS"] {
        let image = format!("{scheme}://BAD.example/x.png");
        let refused = server.error(&["FLORENCE.SUBMIT", "x", &image, "<OD>"]);
        assert_eq!(refused, "DENIED the host is in florence.deny-hosts", "{image:?}");
    }
    let paths =
        ["/etc/passwd", &format!("{root}%2F..%2F..%2Fetc/passwd"), &format!("{root}/%2e%2e/x")];
    for path in paths {
        for start in ["file://", "FILE://", " file://localhost"] {
            let image = format!("{start}{path}");
            let refused = server.error(&["FLORENCE.SUBMIT", "x", &image, "<OD>"]);
            let expected = "DENIED the file is not below a directory of florence.file-roots";
            assert_eq!(refused, expected, "{image:?}");
        }
    }
    let image = " HTTP://user:pass-word@a.example/x.png?TOKEN=secret";
    server.call::<()>(&["FLORENCE.SUBMIT", "j", image, "<OD>", "DELAY", "600000"]);
    let shown = "http://a.example/x.png?TOKEN=REDACTED";
    assert_eq!(server.job("j")["image"].as_deref(), Some(shown));
    let long = format!("HTTP://{}.example/", "a".repeat(300));
    let refused = server.error(&["FLORENCE.SUBMIT", "x", &long, "<OD>"]);
    assert!(refused.starts_with("ERR the host's name has"), "{refused}");
}

#[test]
fn links_that_stay_below_a_root_are_followed() {
    use std::os::unix::fs::symlink;
    let roots = tempfile::tempdir().unwrap();
    let root = roots.path();
    std::fs::copy(picture("shapes.png"), root.join("real.png")).unwrap();
    symlink("real.png", root.join("relative.png")).unwrap();
    symlink(root.join("real.png"), root.join("absolute.png")).unwrap();
    symlink("/etc/hostname", root.join("out.png")).unwrap();
    symlink("/etc/no-such-file", root.join("out-nowhere.png")).unwrap();
    let server =
        Server::with(Settings::lines(&[&format!("florence.file-roots {}", root.display())]));
    let at = |name: &str| root.join(name).display().to_string();
    for name in ["real.png", "relative.png", "absolute.png"] {
        assert_eq!(run(&server, name, &at(name))["state"].as_deref(), Some("done"), "{name}");
    }
    for name in ["out.png", "out-nowhere.png"] {
        assert_eq!(error(&run(&server, name, &at(name)))["code"], "DENIED", "{name}");
    }
    assert_eq!(message(&server, "missing", &at("missing.png")), "there is no such file");
}

/// A server that answers each of its connections with other bytes, and closes it; the last for good.
fn canned(answers: Vec<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x.png", listener.local_addr().unwrap());
    thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            // One read: what comes with TLS never ends as a request does.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&answers[i.min(answers.len() - 1)]);
        }
    });
    url
}

/// Reads a request; whether there was one.
fn skip_head(stream: &mut TcpStream) -> bool {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return false,
        }
    }
    true
}

fn whole(bytes: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
    [head.as_bytes(), bytes].concat()
}

#[test]
fn what_breaks_off_is_fetched_again_and_never_a_picture() {
    let server = Server::ready(&["florence.retry-delay-ms 20"]);
    // A JPEG of which half is there would be read as a picture.
    let bytes = std::fs::read(picture("poster.jpg")).unwrap();
    let answer = whole(&bytes);
    let half = answer[..answer.len() / 2].to_vec();
    let job = run(&server, "half", &canned(vec![half.clone(), answer.clone()]));
    assert_eq!((job["state"].as_deref(), job["attempts"].as_deref()), (Some("done"), Some("2")));
    let chunk = format!("{:x}\r\n", bytes.len());
    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunked = [head, chunk.as_bytes(), &bytes[..], b"\r\n"].concat();
    let job = run(&server, "chunk", &canned(vec![chunked, answer]));
    assert_eq!((job["state"].as_deref(), job["attempts"].as_deref()), (Some("done"), Some("2")));
    let broken = message(&server, "broken", &canned(vec![half]));
    assert_eq!(broken, "the download broke off before its end");
}

#[test]
fn a_connection_that_went_stale_costs_no_attempt() {
    let server = Server::ready(&[]);
    let answer = whole(&std::fs::read(picture("shapes.png")).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x.png", listener.local_addr().unwrap());
    let serving = thread::spawn(move || {
        // Each connection is closed at its second request.
        let mut second_requests = 0;
        for stream in listener.incoming().take(3) {
            let mut stream = stream.unwrap();
            assert!(skip_head(&mut stream));
            stream.write_all(&answer).unwrap();
            second_requests += usize::from(skip_head(&mut stream));
        }
        second_requests
    });
    for key in ["first", "second", "third"] {
        let job = run(&server, key, &url);
        assert_eq!(
            (job["state"].as_deref(), job["attempts"].as_deref()),
            (Some("done"), Some("1"))
        );
    }
    drop(server);
    assert_eq!(serving.join().unwrap(), 2);
}

#[test]
fn failures_of_downloads_are_told_apart() {
    let server = Server::ready(&["florence.default-retries 0", "florence.fetch-timeout-ms 1000"]);
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_url = format!("http://{}/?token=abc", silent.local_addr().unwrap());
    let silent_tls = silent_url.replace("http:", "https:");
    let started = Pictures::serve().url("trickle/shapes.png");
    for (key, image, expected) in [
        ("no-name", "http://no-such-host.invalid/", "the host's name cannot be resolved"),
        ("refused", &*format!("http://{unused}/"), "the server refused the connection"),
        ("silent", &*silent_url, "the server did not answer in time"),
        ("silent-tls", &*silent_tls, "there was no connection to the server in time"),
        ("trickle", &*started, "the server did not send everything in time"),
        (
            "closed",
            &*canned(vec![Vec::new()]),
            "the server closed the connection without an answer",
        ),
        (
            "ssh",
            &*canned(vec![b"SSH-2.0-OpenSSH\r\n".to_vec()]),
            "the server's answer cannot be read as HTTP",
        ),
        (
            "no-tls",
            &*canned(vec![b"HTTP/1.1 400 Bad\r\n\r\n".to_vec()]).replace("http:", "https:"),
            "the server does not speak TLS",
        ),
        ("404", &*canned(vec![b"HTTP/1.1 404 No\r\n\r\n".to_vec()]), "the server answered 404"),
        (
            "302",
            &*canned(vec![b"HTTP/1.1 302 No\r\nContent-Length: 0\r\n\r\n".to_vec()]),
            "the server answered 302",
        ),
        (
            "ftp",
            &*canned(vec![b"HTTP/1.1 302 No\r\nLocation: ftp://x/\r\n\r\n".to_vec()]),
            "the server redirects to what is not an http or https URL",
        ),
    ] {
        assert_eq!(message(&server, key, image), expected, "{key}");
    }
}

#[test]
fn a_denial_names_the_setting_that_decides() {
    let pictures = Pictures::serve();
    let url = pictures.url("shapes.png");
    for (line, image, expected) in [
        (
            "florence.allow-networks \"\"",
            &*url,
            "the host's address is neither public nor in florence.allow-networks",
        ),
        (
            "florence.deny-networks 127.0.0.0/8",
            &*url,
            "the host's address is in florence.deny-networks",
        ),
        (
            "florence.deny-hosts localhost",
            &*pictures.url("away/localhost/x"),
            "the host is in florence.deny-hosts (after a redirect)",
        ),
        (
            "florence.allow-hosts 127.0.0.1",
            &*pictures.url("away/localhost/x"),
            "the host is not in florence.allow-hosts (after a redirect)",
        ),
    ] {
        let server = Server::with(Settings::lines(&[line]));
        let error = error(&run(&server, "j", image));
        assert_eq!(
            (error["code"].as_str(), error["message"].as_str()),
            (Some("DENIED"), Some(expected))
        );
    }
    let server = Server::with(Settings::lines(&["florence.allow-hosts example.com"]));
    let refused = server.error(&["FLORENCE.SUBMIT", "j", &url, "<OD>"]);
    assert_eq!(refused, "DENIED the host is not in florence.allow-hosts");
}

#[test]
fn authorities_of_ca_file_are_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, others) = (Authority::new(), Authority::new());
    let file = directory.path().join("authorities.pem");
    std::fs::write(&file, ours.pem()).unwrap();
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let good = ours.serve(Validity::Now, bytes.clone());
    let line = format!("florence.ca-file {}", file.display());
    let server = Server::ready(&[&line]);
    assert_eq!(run(&server, "good", &good)["state"].as_deref(), Some("done"));
    assert_eq!(
        run(&server, "upper", &good.replace("https", "HTTPS"))["state"].as_deref(),
        Some("done")
    );
    let unknown = "the server's certificate is from an unknown authority; florence.ca-file can name others to trust";
    for (key, url, expected) in [
        (
            "expired",
            ours.serve(Validity::Over, bytes.clone()),
            "the server's certificate has expired",
        ),
        (
            "name",
            good.replace("127.0.0.1", "localhost"),
            "the server's certificate is for another host name",
        ),
    ] {
        let error = error(&run(&server, key, &url));
        assert_eq!(
            (error["message"].as_str(), error["retryable"].as_bool()),
            (Some(expected), Some(false))
        );
    }
    // One of the same name, and of another key.
    let error = message(&server, "others", &others.serve(Validity::Now, bytes));
    assert!(error.starts_with("the server's certificate"), "{error}");
    let server = Server::ready(&[]);
    assert_eq!(message(&server, "unknown", &good), unknown);
}
