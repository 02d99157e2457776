//! Where pictures come from, and what is wrong with them.

use std::collections::HashMap;

use florence_tests::{Pictures, Server, Settings, eventually, picture, python};
use serde_json::{Value, json};

type Job = HashMap<String, Option<String>>;

fn error(job: &Job) -> Value {
    serde_json::from_str(job["error"].as_deref().expect("a failed job")).unwrap()
}

fn submit_bytes(server: &Server, key: &str, bytes: &[u8]) -> Job {
    let mut connection = server.connect();
    let _: String = redis::cmd("FLORENCE.SUBMIT")
        .arg(key)
        .arg("DATA")
        .arg(bytes)
        .arg("<OD>")
        .query(&mut connection)
        .unwrap();
    server.call(&["FLORENCE.WAIT", key, "30"])
}

#[test]
fn every_source_gives_the_same_answer() {
    let pictures = Pictures::serve();
    let path = picture("shapes.png");
    let root = path.parent().unwrap().display();
    let server = Server::with(Settings::lines(&[&format!("florence.file-roots {root}")]));
    let bytes = std::fs::read(&path).unwrap();
    let mut connection = server.connect();
    let _: () = redis::cmd("SET").arg("bytes").arg(&bytes[..]).query(&mut connection).unwrap();
    let by_data = submit_bytes(&server, "data", &bytes)["result"].clone().unwrap();
    let path = path.display().to_string();
    for (key, image) in [
        ("path", &[path.as_str()][..]),
        ("file", &[&format!("file://{path}")]),
        ("http", &[&pictures.url("shapes.png")]),
        ("redirect", &[&pictures.url("redirect/shapes.png")]),
        ("key", &["KEY", "bytes"]),
    ] {
        let command = [&["FLORENCE.SUBMIT", key], image, &["<OD>"]].concat();
        server.call::<String>(&command);
        let job: Job = server.call(&["FLORENCE.WAIT", key, "30"]);
        assert_eq!(job["result"].as_ref(), Some(&by_data), "{key}: {job:?}");
    }
}

/// A JPEG file that says how to turn it.
fn with_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let tag = [b"\x01\x12\0\x03\0\0\0\x01\0".as_slice(), &[orientation, 0, 0]].concat();
    let exif = [b"Exif\0\0MM\0*\0\0\0\x08\0\x01", tag.as_slice(), &[0; 4]].concat();
    let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
    [&jpeg[..2], b"\xff\xe1", &length, &exif, &jpeg[2..]].concat()
}

#[test]
fn pictures_are_turned_as_phones_mean_them_only_when_asked() {
    const QUARTER_TURN: u8 = 6;
    let poster = std::fs::read(picture("poster.jpg")).unwrap();
    let phone = with_orientation(&poster, QUARTER_TURN);
    let (server, mut key) = (Server::ready(&[]), 0);
    let mut ask = |bytes: &[u8], options: &[&str]| {
        key += 1;
        let mut submit = redis::cmd("FLORENCE.SUBMIT");
        submit.arg(key).arg("DATA").arg(bytes).arg("<OD>").arg(options);
        submit.exec(&mut server.connect()).unwrap();
        let job: Job = server.call(&["FLORENCE.WAIT", &key.to_string(), "30"]);
        job["result"].clone().unwrap()
    };
    let as_stored = ask(&poster, &[]);
    let turned = ask(&phone, &["EXIF"]);
    assert_ne!(as_stored, turned);
    // The caches keep the two apart.
    assert_eq!(ask(&phone, &[]), as_stored);
    assert_eq!(ask(&phone, &["EXIF"]), turned);
    assert_eq!(ask(&poster, &["EXIF"]), as_stored);
    server.call::<()>(&["CONFIG", "SET", "florence.exif", "yes"]);
    assert_eq!(ask(&phone, &[]), turned);
    assert_eq!(ask(&phone, &["NOEXIF"]), as_stored);
    // Whoever draws answers has to know.
    let told = ["5", "6", "7"].map(|key| server.call::<String>(&["HGET", key, "exif"]));
    assert_eq!(told, ["1", "1", "0"]);
}

#[test]
fn files_outside_the_roots_are_denied_even_through_links() {
    let roots = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    std::fs::copy(picture("shapes.png"), outside.path().join("x.png")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("x.png"), roots.path().join("link.png"))
        .unwrap();
    let root = roots.path().display().to_string();
    let server = Server::with(Settings::lines(&[&format!("florence.file-roots {root}")]));
    let denied = "DENIED the file is not below a directory of florence.file-roots";
    for path in [format!("{root}/../x.png"), format!("{root}x/x.png"), "/etc/passwd".to_owned()] {
        assert_eq!(server.error(&["FLORENCE.SUBMIT", "j", &path, "<OD>"]), denied, "{path}");
    }
    server.call::<()>(&["FLORENCE.SUBMIT", "link", &format!("{root}/link.png"), "<OD>"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "link", "30"]);
    assert_eq!(error(&job)["code"], "DENIED");
}

#[test]
fn damaged_pictures_fail_with_their_format_named() {
    let mut server = Server::start();
    let png = std::fs::read(picture("shapes.png")).unwrap();
    let jpeg = std::fs::read(picture("poster.jpg")).unwrap();
    let unknown = "not a picture in a known format (JPEG, PNG, WebP, GIF or BMP)";
    for (key, bytes, message) in [
        ("text", &b"hello"[..], unknown),
        ("zeros", &[0; 1000], unknown),
        ("png-header", &png[..20], "the PNG picture is corrupt or truncated"),
        ("png-half", &png[..png.len() / 2], "the PNG picture is corrupt or truncated"),
        ("jpeg-header", &jpeg[..10], "the JPEG picture is corrupt or truncated"),
    ] {
        let job = submit_bytes(&server, key, bytes);
        let expected = json!({ "code": "IMAGE", "message": message, "retryable": false });
        assert_eq!(error(&job), expected, "{key}");
        let mut flipped = bytes.to_vec();
        flipped.reverse();
        submit_bytes(&server, &format!("{key}-reversed"), &flipped);
    }
    // Bytes changed in the middle: an answer or an error, but never the end of the server.
    for i in 0..40 {
        for (name, original) in [("png", &png), ("jpeg", &jpeg)] {
            let mut bytes = original.clone();
            let at = (i * 7919 + 13) % bytes.len();
            bytes[at] ^= 1 << (i % 8);
            let job = submit_bytes(&server, &format!("{name}-{i}"), &bytes);
            assert!(matches!(job["state"].as_deref(), Some("done" | "failed")), "{job:?}");
        }
    }
    assert!(server.is_alive());
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn a_huge_picture_is_refused_by_its_header() {
    let server = Server::with(Settings::lines(&["florence.max-image-pixels 1000"]));
    let job = submit_bytes(&server, "big", &std::fs::read(picture("shapes.png")).unwrap());
    let message = error(&job)["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "the picture is 360x280, more than the limit of 1000 pixels");
}

#[test]
fn http_errors_are_told_and_only_transient_ones_are_retried() {
    let pictures = Pictures::serve();
    let lines = ["florence.retry-delay-ms 20", "florence.max-image-bytes 20000"];
    let server = Server::with(Settings::lines(&lines));
    let run = |key: &str, url: &str, retries: &str| -> Job {
        server.call::<()>(&["FLORENCE.SUBMIT", key, url, "<OD>", "RETRIES", retries]);
        server.call(&["FLORENCE.WAIT", key, "30"])
    };
    let missing = run("404", &pictures.url("status/404"), "3");
    let expected =
        json!({ "code": "FETCH", "message": "the server answered 404", "retryable": false });
    assert_eq!((error(&missing), missing["attempts"].as_deref()), (expected, Some("1")));

    let broken = run("500", &pictures.url("status/500"), "2");
    assert_eq!(broken["attempts"].as_deref(), Some("3"));
    assert_eq!(error(&broken)["message"], "the server answered 500");

    let text = run("text", &pictures.url("text"), "3");
    assert_eq!(
        (error(&text)["code"].as_str(), text["attempts"].as_deref()),
        (Some("IMAGE"), Some("1"))
    );

    let large = run("large", &pictures.url("poster.jpg"), "3");
    assert_eq!(error(&large)["message"], "the picture is larger than the limit of 20000 bytes");

    let nobody = run("nobody", "http://127.0.0.1:1/secret?token=abc", "0");
    assert_eq!(error(&nobody)["message"], "the server refused the connection");
}

#[test]
fn a_flaky_server_is_asked_again() {
    let pictures = Pictures::serve();
    let server = Server::with(Settings::lines(&["florence.retry-delay-ms 20"]));
    let url = pictures.url("flaky/2/shapes.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &url, "<OD>"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "30"]);
    assert_eq!((job["state"].as_deref(), job["attempts"].as_deref()), (Some("done"), Some("3")));
    assert_eq!(pictures.hits(), 3);
}

#[test]
fn an_attempt_that_takes_too_long_times_out() {
    let pictures = Pictures::serve();
    let server = Server::start();
    let url = pictures.url("held/back/shapes.png");
    // Also where the answer would be at hand once the bytes are there.
    server.call::<()>(&["FLORENCE.SUBMIT", "known", &pictures.url("shapes.png"), "<OD>"]);
    server.call::<()>(&["FLORENCE.WAIT", "known", "30"]);
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &url, "<OD>", "TIMEOUT", "300", "RETRIES", "0"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "30"]);
    assert_eq!(error(&job)["code"], "TIMEOUT");
    let fetched: u64 = job["fetch_ms"].as_deref().unwrap().parse().unwrap();
    assert!(fetched < 10_000, "the download went on for {fetched} ms");
}

#[test]
fn the_time_of_an_attempt_stands_still_while_the_engine_is_busy() {
    const TIMEOUT_MS: u64 = 1000;
    let server = Server::with(Settings::lines(&["florence.max-batch 1"]));
    let data = std::fs::read(picture("shapes.png")).unwrap();
    let submit = |key: &str, options: &[&str]| {
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        command.arg(key).arg("DATA").arg(&data[..]).arg(options).arg("NOCACHE");
        command.exec(&mut server.connect()).unwrap();
    };
    let prompts = ["PROMPTS", "2", "<CAPTION>", "<OD>"];
    submit("slow", &[&prompts[..], &["BEAMS", "16", "NGRAM", "1", "MAXTOKENS", "1024"]].concat());
    eventually("the engine is busy", || (server.state("slow") == "running").then_some(()));
    submit("j", &["<CAPTION>", "TIMEOUT", &TIMEOUT_MS.to_string(), "RETRIES", "0"]);
    eventually("it is claimed", || (server.state("j") == "fetching").then_some(()));
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "120"]);
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    let at = |field: &str| job[field].as_deref().unwrap().parse::<u64>().unwrap();
    let took = at("finished_at") - at("started_at");
    assert!(took > TIMEOUT_MS, "it waited for {took} ms only, which says nothing");
}

/// Ways to write addresses that pictures may not come from.
const INNER_HOSTS: &[&str] = &[
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0x7f.1",
    "localhost",
    "user:secret@127.0.0.1",
    "0.0.0.0",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "169.254.169.254",
    "10.0.0.1",
    "192.168.0.1",
    "\u{2460}\u{2461}\u{2466}.0.0.1",
    "127\u{3002}0\u{3002}0\u{3002}1",
    "%31%32%37.0.0.1",
    "1.1.1.1@127.0.0.1",
    "127.0.0.1#@1.1.1.1",
    "0",
    "172.16.0.1",
    "100.64.0.1",
    "224.0.0.1",
    "127.0.0.1.",
    "127.0.1",
    "0177.1",
    "017700000001",
    "0x7f.0x0.0x0.0x1",
    "127.255.255.254",
    "127.0.0.01",
    "LOCALHOST",
    "\u{ff11}\u{ff12}\u{ff17}.0.0.1",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::1]",
    "[fe80::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "[2001:db8::1]",
    "[2001::1]",
    "[100::1]",
    "169.254.170.2",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "100.100.100.200",
    "192.0.0.192",
    "172.31.255.255",
    "192.168.1.1",
    "3232235521",
    "198.18.0.1",
    "203.0.113.1",
    "240.0.0.1",
    "255.255.255.255",
    "a:b@[::1]",
];

#[test]
fn addresses_that_are_not_public_are_denied_in_every_spelling() {
    let lines = ["florence.allow-networks \"\"", "florence.default-retries 0"];
    let (server, pictures) = (Server::with(Settings::lines(&lines)), Pictures::serve());
    let port = pictures.url("").rsplit(':').next().unwrap().trim_end_matches('/').to_owned();
    for (i, host) in INNER_HOSTS.iter().enumerate() {
        let key = format!("job:{i}");
        let url = if host.contains('#') {
            format!("http://{}/shapes.png#x", host.replace('#', &format!(":{port}/#")))
        } else {
            format!("http://{host}:{port}/shapes.png")
        };
        server.call::<()>(&["FLORENCE.SUBMIT", &key, &url, "<OD>"]);
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", &key, "30"]);
        assert_eq!(job["state"].as_deref(), Some("failed"), "{url}");
        let error = job["error"].clone().unwrap();
        assert!(error.contains("DENIED"), "{url}: {error}");
        assert!(!error.contains("127") && !error.contains("secret"), "{url}: {error}");
    }
    assert_eq!(pictures.hits(), 0, "a request went out");
}

#[test]
fn a_redirect_is_checked_like_the_first_address() {
    let lines = ["florence.allow-networks 127.0.0.1", "florence.default-retries 0"];
    let (server, pictures) = (Server::with(Settings::lines(&lines)), Pictures::serve());
    for (key, path, code) in [
        ("same", "redirect/shapes.png", None),
        ("other", "away/127.0.0.2/shapes.png", Some("DENIED")),
        ("metadata", "away/169.254.169.254/shapes.png", Some("DENIED")),
        ("file", "away/file:/etc/passwd", Some("DENIED")),
        ("loop", "loop", Some("FETCH")),
    ] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &pictures.url(path), "<OD>"]);
        let job: Job = server.call(&["FLORENCE.WAIT", key, "30"]);
        let found = job["error"].as_ref().map(|_| error(&job)["code"].clone());
        assert_eq!(found, code.map(|code| json!(code)), "{path}: {job:?}");
    }
}

#[test]
fn hosts_and_networks_can_be_denied_and_only_some_allowed() {
    let pictures = Pictures::serve();
    let lines =
        ["florence.allow-hosts 127.0.0.1 *.example.com", "florence.deny-hosts bad.example.com"];
    let server = Server::with(Settings::lines(
        &lines
            .map(|line| {
                let (name, value) = line.split_once(' ').unwrap();
                format!("{name} \"{value}\"")
            })
            .each_ref()
            .map(String::as_str),
    ));
    for host in ["example.com", "bad.example.com", "example.org", "localhost", "[::1]"] {
        let url = format!("http://{host}/x.png");
        let error = server.error(&["FLORENCE.SUBMIT", "j", &url, "<OD>"]);
        let list = if host == "bad.example.com" {
            "is in florence.deny-hosts"
        } else {
            "is not in florence.allow-hosts"
        };
        assert_eq!(error, format!("DENIED the host {list}"), "{host}");
    }
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("away/localhost/x"), "<OD>"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "30"]);
    assert_eq!(
        error(&job)["message"],
        "the host is not in florence.allow-hosts (after a redirect)"
    );
    server.call::<()>(&["FLORENCE.SUBMIT", "good", &pictures.url("shapes.png"), "<OD>"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "good", "30"]);
    assert_eq!(job["state"].as_deref(), Some("done"));
    let hosts: Vec<HashMap<String, String>> = server.call(&["FLORENCE.HOSTS"]);
    let figures = ["host", "downloads", "failures"].map(|name| hosts[0][name].as_str());
    assert_eq!(figures, ["127.0.0.1", "2", "1"]);

    let denied = Server::with(Settings::lines(&["florence.deny-networks 127.0.0.0/9"]));
    denied.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("shapes.png"), "<OD>"]);
    let job: Job = denied.call(&["FLORENCE.WAIT", "j", "30"]);
    assert_eq!(error(&job)["code"], "DENIED");
}

#[test]
fn a_data_url_is_a_picture_and_the_job_does_not_repeat_it() {
    use std::io::Write;
    let server = Server::start();
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let mut child = std::process::Command::new("base64")
        .arg("-w0")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let encoded = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let url = format!("data:image/png;base64,{encoded}");
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &url, "<OD>"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "30"]);
    assert_eq!(
        (job["state"].as_deref(), job["image"].as_deref()),
        (Some("done"), Some("data:image/png"))
    );
    assert_eq!(job["result"], submit_bytes(&server, "same", &bytes)["result"]);
    for (url, problem) in [
        ("data:", "ERR the data URL is malformed"),
        ("data:image/png;base64,!!!!", "ERR the data URL is malformed"),
        ("data:,", "ERR the image is empty"),
    ] {
        assert_eq!(server.error(&["FLORENCE.SUBMIT", "x", url, "<OD>"]), problem, "{url}");
    }
}

#[test]
fn formats_that_are_not_read_are_named() {
    let server = Server::start();
    for (key, bytes, name) in [
        ("heic", &b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], "HEIC"),
        ("avif", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "AVIF"),
        ("avif among others", b"\0\0\0\x18ftypmif1\0\0\0\0miafavif", "AVIF"),
        ("pdf", b"%PDF-1.7 ...", "PDF"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        ("jxl", b"\xff\x0a\0\0", "JPEG XL"),
    ] {
        let message =
            format!("{name} pictures are not supported, convert to JPEG, PNG, WebP, GIF or BMP");
        assert_eq!(error(&submit_bytes(&server, key, bytes))["message"], message);
    }
    // Read, but only where the operator wants it.
    let tiff = b"II*\0\x08\0\0\0\0\0\0\0\0\0";
    let refused = submit_bytes(&server, "tiff", tiff);
    let message = "TIFF pictures are not allowed here, convert to JPEG, PNG, WebP, GIF or BMP";
    assert_eq!(error(&refused)["message"], message);
    let server = Server::with(Settings::lines(&["florence.image-formats \"tiff\""]));
    let corrupt = submit_bytes(&server, "tiff", tiff);
    assert_eq!(error(&corrupt)["message"], "the TIFF picture is corrupt or truncated");
    let png = submit_bytes(&server, "png", &std::fs::read(picture("shapes.png")).unwrap());
    assert_eq!(error(&png)["message"], "PNG pictures are not allowed here, convert to TIFF");
}

#[test]
fn a_pipe_below_a_root_does_not_hold_anything_up() {
    let roots = tempfile::tempdir().unwrap();
    let pipe = roots.path().join("pipe.png");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let root = format!("florence.file-roots {}", roots.path().display());
    let server = Server::with(Settings::lines(&[&root]));
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pipe.display().to_string(), "<OD>"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "10"]);
    assert_eq!(error(&job)["message"], "it is not a regular file");
}

#[test]
fn buckets_are_read_with_credentials_where_the_operator_says_so() {
    use std::{io::BufRead, process};
    let directory = tempfile::tempdir().unwrap();
    let mut clouds = process::Command::new(python())
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/clients/clouds.py"))
        .args([directory.path(), &picture("shapes.png")])
        .stdin(process::Stdio::piped())
        .stdout(process::Stdio::piped())
        .stderr(process::Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(clouds.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (moto, google) = line.trim().split_once(' ').expect("both ports");
    let key_file = directory.path().join("account.json").display().to_string();
    let settings = |lines: &[&str]| Settings {
        env: vec![
            ("AWS_ENDPOINT_URL_S3", format!("http://127.0.0.1:{moto}")),
            ("AWS_ACCESS_KEY_ID", "key".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
            ("STORAGE_EMULATOR_HOST", format!("127.0.0.1:{google}")),
            ("GOOGLE_APPLICATION_CREDENTIALS", key_file.clone()),
        ],
        // What the operator's environment names need not be public.
        ..Settings::lines(
            &[lines, &["florence.allow-networks \"\"", "florence.default-retries 0"]].concat(),
        )
    };
    let ours = Server::with(settings(&["florence.buckets \"s3://private gs://private\""]));
    let theirs = Server::with(settings(&[]));
    // The account of the machine itself, where no key file is named.
    let mut machine = settings(&["florence.buckets \"gs://private\""]);
    machine.env.retain(|(name, _)| *name != "GOOGLE_APPLICATION_CREDENTIALS");
    machine.env.push(("GCE_METADATA_HOST", format!("127.0.0.1:{google}")));
    let machine = Server::with(machine);
    let run = |server: &Server, url: &str| -> Job {
        server.call::<()>(&["FLORENCE.SUBMIT", url, url, "<OD>"]);
        server.call(&["FLORENCE.WAIT", url, "30"])
    };
    for url in [
        "s3://private/folder/a picture.png",
        "gs://private/folder/a picture.png",
        "gs://open/folder/a picture.png",
    ] {
        let job = run(&ours, url);
        assert_eq!(job["state"].as_deref(), Some("done"), "{url}: {job:?}");
    }
    let job = run(&machine, "gs://private/folder/a picture.png");
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    assert_eq!(
        error(&run(&ours, "s3://private/missing.png"))["message"],
        "the server answered 404"
    );
    assert_eq!(
        error(&run(&ours, "gs://private/missing.png"))["message"],
        "the server answered 404"
    );
    assert_eq!(run(&theirs, "gs://open/folder/a picture.png")["state"].as_deref(), Some("done"));
    let refused = run(&theirs, "gs://private/folder/a picture.png");
    assert_eq!(error(&refused)["message"], "the server answered 401");
    assert_eq!(
        error(&run(&theirs, "s3://no_such_name!/x"))["message"],
        "not a URL of a bucket's object"
    );
    drop(clouds.stdin.take());
    let _ = clouds.wait();
}
