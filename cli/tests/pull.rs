//! `florence pull` against a loopback server that behaves like the hub: redirects, ranges, hashes.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Output},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use tiny_http::{Header, Request, Response, Server};

/// What the hub was asked for: method, path and the interesting headers.
type Log = Arc<Mutex<Vec<String>>>;

const WEIGHTS: &str = "model.safetensors";
const ALL: [&str; 5] =
    ["config.json", "preprocessor_config.json", "tokenizer.json", WEIGHTS, "notes.txt"];

fn content(name: &str) -> Vec<u8> {
    let length = if name == WEIGHTS { 300_000 } else { 500 };
    name.bytes().cycle().take(length).collect()
}

/// Repositories that lack something.
const PARTIAL: [(&str, &[&str]); 5] = [
    ("bare", &["config.json", WEIGHTS]),
    ("adapter", &["README.md", "adapter_config.json", "adapter_model.safetensors"]),
    ("merged", &["adapter_config.json", "config.json", "tokenizer.json", WEIGHTS]),
    ("empty", &["README.md", "config.json"]),
    ("torn", &["adapter_config.json"]),
];

/// A hub whose list gives `sha256` for the weights.
fn hub(sha256: String) -> (String, Log) {
    let server = Server::http("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", server.server_addr().to_ip().unwrap());
    let (log, base) = (Log::default(), endpoint.clone());
    let kept = Arc::clone(&log);
    thread::spawn(move || {
        for request in server.incoming_requests() {
            let header = |name: &'static str| {
                let found = request.headers().iter().find(|h| h.field.equiv(name));
                found.map_or(String::new(), |h| format!(" {name}={}", h.value))
            };
            let line = format!("{}{}{}", request.url(), header("Range"), header("Authorization"));
            log.lock().unwrap().push(line);
            answer(request, &base, &sha256);
        }
    });
    (endpoint, kept)
}

/// What the hub tells of the repository's files.
fn list(sha256: &str) -> String {
    list_of(&ALL, sha256)
}

fn list_of(files: &[&str], sha256: &str) -> String {
    let sibling = |name: &&str| match *name {
        WEIGHTS => serde_json::json!({ "rfilename": name,
            "lfs": { "sha256": sha256, "size": content(name).len() } }),
        _ => serde_json::json!({ "rfilename": name, "size": content(name).len() }),
    };
    let siblings: serde_json::Value = files.iter().map(sibling).collect();
    serde_json::json!({ "sha": "abc", "siblings": siblings }).to_string()
}

fn answer(request: Request, base: &str, sha256: &str) {
    let url = request.url().to_owned();
    let name = url.rsplit('/').next().unwrap();
    let range = request.headers().iter().find(|h| h.field.equiv("Range")).map(|h| {
        let from = h.value.as_str().trim_start_matches("bytes=").trim_end_matches('-');
        from.parse::<usize>().unwrap()
    });
    let response = if url.starts_with("/api/models/org/model/revision/main") {
        Response::from_string(list(sha256))
    } else if let Some((_, files)) =
        PARTIAL.iter().find(|(repo, _)| url.starts_with(&format!("/api/models/org/{repo}/")))
    {
        Response::from_string(list_of(files, sha256))
    } else if url == format!("/org/model/resolve/abc/{WEIGHTS}") {
        let location = Header::from_bytes("Location", format!("{base}/storage/{WEIGHTS}")).unwrap();
        Response::from_string("").with_status_code(302).with_header(location)
    } else if url.contains("/resolve/abc/") || url.starts_with("/storage/") {
        match range {
            Some(from) if from >= content(name).len() => {
                Response::from_string("").with_status_code(416)
            }
            Some(from) => {
                let (content, is_odd) = (content(name), name == "tokenizer.json");
                // One file comes from its beginning, whatever is asked for.
                let from = if is_odd { 0 } else { from };
                let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
                let range = Header::from_bytes("Content-Range", range).unwrap();
                Response::from_data(&content[from..]).with_status_code(206).with_header(range)
            }
            None => Response::from_data(content(name)),
        }
    } else {
        let status = if url.contains("/gated/") { 401 } else { 404 };
        Response::from_string("no").with_status_code(status)
    };
    request.respond(response).unwrap();
}

fn pull(endpoint: &str, to: &Path, repo: &str) -> Output {
    pull_with("secret", endpoint, to, repo)
}

fn pull_with(token: &str, endpoint: &str, to: &Path, repo: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_florence"))
        .args(["pull", repo, "--to"])
        .arg(to)
        .env("HF_ENDPOINT", endpoint)
        .env("HF_TOKEN", token)
        .output()
        .unwrap()
}

fn right_hash() -> String {
    format!("{:x}", Sha256::digest(content(WEIGHTS)))
}

#[test]
fn a_revision_is_one_part_of_the_address() {
    let (endpoint, log) = hub(right_hash());
    let directory = tempfile::tempdir().unwrap();
    for revision in ["refs/pr/1", "v1#x?y", "a b"] {
        let output = Command::new(env!("CARGO_BIN_EXE_florence"))
            .args(["pull", "org/gated", "--revision", revision, "--to"])
            .arg(directory.path())
            .env("HF_ENDPOINT", &endpoint)
            .output()
            .unwrap();
        assert!(!output.status.success());
    }
    let asked = log.lock().unwrap().join("\n");
    for revision in ["refs%2Fpr%2F1", "v1%23x%3Fy", "a%20b"] {
        let address = format!("/api/models/org/gated/revision/{revision}?blobs=true");
        assert!(asked.contains(&address), "{asked}");
    }
}

#[test]
fn a_checkpoint_is_downloaded_through_a_redirect_and_resumed() {
    let (endpoint, log) = hub(right_hash());
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("model.safetensors.part");
    std::fs::write(part, &content(WEIGHTS)[..100_000]).unwrap();
    std::fs::write(directory.path().join("tokenizer.json.part"), "token").unwrap();
    let output = pull(&endpoint, directory.path(), "org/model");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for name in ["config.json", "tokenizer.json", WEIGHTS] {
        assert_eq!(std::fs::read(directory.path().join(name)).unwrap(), content(name), "{name}");
    }
    assert!(!directory.path().join("notes.txt").exists());
    let asked = log.lock().unwrap().clone();
    assert!(
        asked.iter().any(|line| line.starts_with("/storage/") && line.contains("bytes=100000-"))
    );
    assert!(asked[0].contains("Bearer secret"), "{asked:?}");
    // All is there: nothing but the list is asked for.
    log.lock().unwrap().clear();
    assert!(pull(&endpoint, directory.path(), "org/model").status.success());
    assert_eq!(log.lock().unwrap().len(), 1);
}

#[test]
fn fine_tunes_and_adapters_are_pulled_as_they_lie_there() {
    let (endpoint, _) = hub(right_hash());
    let directory = tempfile::tempdir().unwrap();
    let pulled = |repo: &str| {
        let to = directory.path().join(repo);
        let output = pull(&endpoint, &to, &format!("org/{repo}"));
        let files = std::fs::read_dir(&to).into_iter().flatten();
        let mut files: Vec<String> =
            files.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        let told = [output.stdout, output.stderr].concat();
        (output.status.success(), files, String::from_utf8(told).unwrap())
    };
    let (is_pulled, files, told) = pulled("bare");
    assert!(is_pulled && files == ["config.json", WEIGHTS], "{files:?} {told}");
    assert!(told.contains("no tokenizer.json: --tokenizer") && told.contains("768"), "{told}");
    let (is_pulled, files, told) = pulled("adapter");
    let expected = ["adapter_config.json", "adapter_model.safetensors"];
    assert!(is_pulled && files == expected, "{files:?} {told}");
    assert!(told.contains("--adapter") && told.contains("--model"), "{told}");
    // Weights that are whole need no adapter.
    let (is_pulled, files, told) = pulled("merged");
    assert!(is_pulled && files == ["config.json", WEIGHTS, "tokenizer.json"], "{files:?} {told}");
    for (repo, part) in [("empty", "neither weights"), ("torn", "adapter_model.safetensors")] {
        let (is_pulled, files, told) = pulled(repo);
        assert!(!is_pulled && files.is_empty() && told.contains(part), "{files:?} {told}");
    }
}

#[test]
fn a_wrong_hash_and_a_missing_repository_are_errors() {
    let (endpoint, _) = hub("0".repeat(64));
    let directory = tempfile::tempdir().unwrap();
    let output = pull(&endpoint, directory.path(), "org/model");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("has SHA-256"), "{error}");
    assert!(!directory.path().join(WEIGHTS).exists());
    let output = pull(&endpoint, directory.path(), "org/other");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("the hub answers 404"), "{error}");
}

#[test]
fn a_repository_that_needs_a_token_says_so_and_an_empty_token_is_none() {
    let (endpoint, log) = hub(right_hash());
    let directory = tempfile::tempdir().unwrap();
    let output = pull_with("", &endpoint, directory.path(), "org/gated");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("access token is in HF_TOKEN"), "{error}");
    let asked = log.lock().unwrap().clone();
    assert!(asked.iter().all(|line| !line.contains("Authorization")), "{asked:?}");
}

/// A hub of one large file that sends it in pieces: `how` says what becomes of each request.
fn unsteady(how: impl Fn(usize, &mut TcpStream, &[u8]) + Send + 'static) -> (String, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let log = Log::default();
    let noted = Arc::clone(&log);
    thread::spawn(move || {
        let mut requests = 0;
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while !head.ends_with("\r\n\r\n") {
                reader.read_line(&mut head).unwrap();
            }
            let target = head.split(' ').nth(1).unwrap();
            let range = head.lines().find_map(|line| line.strip_prefix("range: bytes="));
            let from = range.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
            log.lock().unwrap().push(format!("{target} {from}"));
            let name = target.rsplit('/').next().unwrap();
            let body = if target.starts_with("/api/") {
                list(&right_hash()).into_bytes()
            } else {
                content(name)[from..].to_vec()
            };
            let length = body.len();
            let status = if from > 0 {
                let (last, all) = (from + length - 1, from + length);
                format!("206 Partial Content\r\nContent-Range: bytes {from}-{last}/{all}")
            } else {
                "200 OK".to_owned()
            };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).unwrap();
            if name == WEIGHTS {
                how(requests, &mut stream, &body);
                requests += 1;
            } else {
                stream.write_all(&body).unwrap();
            }
        }
    });
    (endpoint, noted)
}

#[test]
fn a_download_that_breaks_off_or_stalls_goes_on_by_itself() {
    let (endpoint, log) = unsteady(|request, stream, body| match request {
        0 => stream.write_all(&body[..100_000]).unwrap(),
        // Nothing more comes, and the connection stays.
        1 => {
            stream.write_all(&body[..50_000]).unwrap();
            let stream = stream.try_clone().unwrap();
            thread::spawn(move || {
                thread::sleep(Duration::from_mins(2));
                drop(stream);
            });
        }
        // A byte now and then.
        2 => {
            let mut stream = stream.try_clone().unwrap();
            let body = body.to_vec();
            thread::spawn(move || {
                body.iter().all(|byte| {
                    thread::sleep(Duration::from_millis(100));
                    stream.write_all(&[*byte]).is_ok()
                });
            });
        }
        _ => stream.write_all(body).unwrap(),
    });
    let directory = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let output = pull(&endpoint, directory.path(), "org/model");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(directory.path().join(WEIGHTS)).unwrap(), content(WEIGHTS));
    assert!(start.elapsed() < Duration::from_mins(1), "{:?}", start.elapsed());
    let asked: Vec<String> = log.lock().unwrap().clone();
    let asked: Vec<u64> = asked
        .iter()
        .filter(|line| line.contains(WEIGHTS))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(asked[..3], [0, 100_000, 150_000], "{asked:?}");
    assert!(asked.len() == 4 && (150_001..160_000).contains(&asked[3]), "{asked:?}");
}

#[test]
fn a_download_that_never_gets_on_ends() {
    let (endpoint, log) = unsteady(|_, _, _| {});
    let directory = tempfile::tempdir().unwrap();
    let output = pull(&endpoint, directory.path(), "org/model");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(error.contains("the download broke off before its end"), "{error}");
    assert!(error.contains("run the command again to go on"), "{error}");
    let asked = log.lock().unwrap().iter().filter(|line| line.contains(WEIGHTS)).count();
    assert_eq!(asked, 5);
}

#[test]
fn a_hub_that_is_not_there_is_named_with_what_to_do() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (endpoint, host, why) in [
        (format!("http://{unused}"), unused.to_string(), "the server refused the connection"),
        (
            "http://hub.invalid".to_owned(),
            "hub.invalid".to_owned(),
            "the host's name cannot be resolved",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let output = pull(&endpoint, directory.path(), "org/model");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        for part in [&*host, why, "HF_ENDPOINT", "copy the checkpoint's files"] {
            assert!(error.contains(part), "{error} lacks {part}");
        }
    }
}

#[test]
fn what_is_not_the_file_is_named() {
    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    const PAGE: &str = "<!DOCTYPE html>\n<html><body>Sign in to the network</body></html>";
    for (api, file, expected) in [
        (None, POINTER, "config.json is a Git LFS pointer and not the file itself"),
        (None, PAGE, "config.json is a web page and not the file itself"),
        (Some(PAGE), "", "the list of files is a web page and not the file itself"),
    ] {
        let server = Server::http("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", server.server_addr().to_ip().unwrap());
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let body = if request.url().starts_with("/api/") {
                    api.map_or_else(|| list(&right_hash()), str::to_owned)
                } else {
                    file.to_owned()
                };
                request.respond(Response::from_string(body)).unwrap();
            }
        });
        let directory = tempfile::tempdir().unwrap();
        let output = pull(&endpoint, directory.path(), "org/model");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(expected), "{error}");
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn models_are_named_in_commands() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_florence")).args(args).output().unwrap();
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = run(&["pull"]);
    assert!(error.contains("florence pull microsoft/Florence-2-base-ft"), "{error}");
    let error = run(&["run", "--model", "microsoft/Florence-2-base", "--prompt", "<OD>", "x.png"]);
    assert!(error.contains("`florence pull microsoft/Florence-2-base` downloads it"), "{error}");
}
