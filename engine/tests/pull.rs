//! `florence pull` against a loopback server that behaves like the hub: redirects, ranges, hashes.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::{
    path::Path,
    process::{Command, Output},
    sync::{Arc, Mutex},
    thread,
};

use sha2::{Digest, Sha256};
use tiny_http::{Header, Request, Response, Server};

/// What the hub was asked for: method, path and the interesting headers.
type Log = Arc<Mutex<Vec<String>>>;

const WEIGHTS: &str = "model.safetensors";

fn content(name: &str) -> Vec<u8> {
    let length = if name == WEIGHTS { 300_000 } else { 500 };
    name.bytes().cycle().take(length).collect()
}

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

fn answer(request: Request, base: &str, sha256: &str) {
    let url = request.url().to_owned();
    let name = url.rsplit('/').next().unwrap();
    let range = request.headers().iter().find(|h| h.field.equiv("Range")).map(|h| {
        let from = h.value.as_str().trim_start_matches("bytes=").trim_end_matches('-');
        from.parse::<usize>().unwrap()
    });
    let files = ["config.json", "preprocessor_config.json", "tokenizer.json", WEIGHTS, "notes.txt"];
    let response = if url.starts_with("/api/models/org/model/revision/main") {
        let siblings: Vec<_> = files
            .iter()
            .map(|name| match *name {
                WEIGHTS => serde_json::json!({ "rfilename": name,
                    "lfs": { "sha256": sha256, "size": content(name).len() } }),
                _ => serde_json::json!({ "rfilename": name, "size": content(name).len() }),
            })
            .collect();
        Response::from_string(serde_json::json!({ "sha": "abc", "siblings": siblings }).to_string())
    } else if url == format!("/org/model/resolve/abc/{WEIGHTS}") {
        let location = Header::from_bytes("Location", format!("{base}/storage/{WEIGHTS}")).unwrap();
        Response::from_string("").with_status_code(302).with_header(location)
    } else if url.starts_with("/org/model/resolve/abc/") || url.starts_with("/storage/") {
        match range {
            Some(from) if from >= content(name).len() => {
                Response::from_string("").with_status_code(416)
            }
            Some(from) => Response::from_data(&content(name)[from..]).with_status_code(206),
            None => Response::from_data(content(name)),
        }
    } else {
        Response::from_string("no").with_status_code(404)
    };
    request.respond(response).unwrap();
}

fn pull(endpoint: &str, to: &Path, repo: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_florence"))
        .args(["pull", repo, "--to"])
        .arg(to)
        .env("HF_ENDPOINT", endpoint)
        .env("HF_TOKEN", "secret")
        .output()
        .unwrap()
}

fn right_hash() -> String {
    format!("{:x}", Sha256::digest(content(WEIGHTS)))
}

#[test]
fn a_checkpoint_is_downloaded_through_a_redirect_and_resumed() {
    let (endpoint, log) = hub(right_hash());
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("model.safetensors.part");
    std::fs::write(part, &content(WEIGHTS)[..100_000]).unwrap();
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
