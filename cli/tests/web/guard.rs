//! Whom the page answers and whom it refuses, and what nobody sees.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::{
    act,
    common::{Answer, Page, http},
    failed, ids, list, server,
};

#[test]
fn changes_come_from_this_page_only() {
    let server = server();
    failed(&server, "job");
    let page = Page::about(&[&server], &[]);
    let order = json!({ "action": "delete", "jobs": [{ "server": 0, "id": "job" }] }).to_string();
    let own = format!("http://127.0.0.1:{}", page.port);
    let send = |headers: &[(&str, &str)]| {
        let headers = [&[("Content-Type", "application/json")][..], headers].concat();
        http(page.port, "POST /api/act", &headers, order.as_bytes()).status
    };
    for headers in [
        &[][..],
        &[("Origin", own.as_str())],
        &[("X-Florence", "1"), ("Origin", "http://evil.example")],
        &[("X-Florence", "1"), ("Origin", "null")],
        &[("X-Florence", "1"), ("Origin", "http://127.0.0.1:1")],
        &[("X-Florence", "1"), ("Sec-Fetch-Site", "cross-site")],
        &[("X-Florence", "1"), ("Sec-Fetch-Site", "same-site")],
    ] {
        assert_eq!(send(headers), 403, "{headers:?}");
    }
    assert_eq!(server.state("job"), "failed");
    for host in ["evil.example", "evil.example:8080", "localhost.evil.example"] {
        let asked = http(page.port, "GET /api/info", &[("Host", host)], b"");
        assert_eq!(asked.status, 421, "{host}");
        assert!(!asked.text().contains("6379"));
    }
    let localhost = format!("localhost:{}", page.port);
    assert_eq!(http(page.port, "GET /api/info", &[("Host", &localhost)], b"").status, 200);
    assert_eq!(send(&[("X-Florence", "1"), ("Origin", &own)]), 200);
    assert_eq!(server.state("job"), "");
}

#[test]
fn a_read_only_page_changes_nothing() {
    let server = server();
    failed(&server, "job");
    let page = Page::about(&[&server], &["--read-only"]);
    assert_eq!(page.get("/api/info").json()["is_read_only"], true);
    let jobs = json!([{ "server": 0, "id": "job" }]);
    for (path, body) in [
        ("/api/act", json!({ "action": "delete", "jobs": jobs })),
        ("/api/act", json!({ "action": "retry", "match": {} })),
        ("/api/pause", json!({ "server": 0, "paused": true })),
        ("/api/submit", json!({ "prompts": ["<OD>"], "url": "http://127.0.0.1/x" })),
    ] {
        let answer = page.post(path, &body);
        assert_eq!(answer.status, 403, "{path}");
        assert!(answer.text().contains("--read-only"));
    }
    assert_eq!(server.state("job"), "failed");
    assert_eq!(page.post("/api/rows", &json!({ "jobs": jobs })).status, 200);
}

/// A file with a password, in a directory that lives as long as the test.
fn password_file(directory: &tempfile::TempDir) -> String {
    let path = directory.path().join("password");
    std::fs::write(&path, "correct horse\nnot this line\n").unwrap();
    path.display().to_string()
}

#[test]
fn a_password_is_asked_for_everywhere() {
    let (server, directory) = (server(), tempfile::tempdir().unwrap());
    let page = Page::about(&[&server], &["--password-file", &password_file(&directory)]);
    for path in ["/", "/app.js", "/metrics", "/api/info", "/api/live", "/api/jobs", "/nothing"] {
        assert_eq!(page.get(path).status, 401, "{path}");
    }
    assert!(page.get("/").text().contains("id=\"password\""));
    assert!(page.get("/metrics").header("www-authenticate").unwrap().starts_with("Basic"));
    // A browser would ask by itself, instead of the page.
    assert_eq!(page.get("/api/info").header("www-authenticate"), None);
    assert_eq!(page.get("/healthz").text(), "ok\n");
    let wrong = page.post("/api/login", &json!({ "password": "not this line" }));
    assert_eq!((wrong.status, wrong.header("set-cookie")), (401, None));
    let right = page.post("/api/login", &json!({ "password": "correct horse" }));
    let cookie = right.header("set-cookie").unwrap().to_owned();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    let with = |headers: &[(&str, &str)]| http(page.port, "GET /api/info", headers, b"").status;
    assert_eq!(with(&[("Cookie", cookie)]), 200);
    assert_eq!(with(&[("Cookie", &format!("{cookie}x"))]), 401);
    // A cookie alone changes nothing: other sites' forms would carry it too, but for SameSite.
    let bare = http(page.port, "POST /api/logout", &[("Cookie", cookie)], b"");
    assert_eq!(bare.status, 403);
    let basic =
        |password: &str| format!("Basic {}", BASE64_STANDARD.encode(format!("x:{password}")));
    assert_eq!(with(&[("Authorization", &basic("correct horse"))]), 200);
    assert_eq!(with(&[("Authorization", &basic("wrong"))]), 401);
    let mut live = TcpStream::connect(("127.0.0.1", page.port)).unwrap();
    let (port, line) = (page.port, "GET /api/live HTTP/1.1");
    write!(
        live,
        "{line}\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    live.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert!(live.read(&mut [0; 100]).unwrap() > 0);
    let out = http(page.port, "POST /api/logout", &[("Cookie", cookie), ("X-Florence", "1")], b"");
    assert_eq!(out.status, 200);
    assert_eq!(with(&[("Cookie", cookie)]), 401);
    live.read_to_end(&mut Vec::new()).expect("the stream ends, too");
}

#[test]
fn a_page_for_others_needs_a_password() {
    let refused = |args: &[&str]| {
        let args = [&["web", "--redis", "redis://:hidden@127.0.0.1:1"], args].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_florence")).args(args).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = refused(&["--listen", "0.0.0.0:0"]);
    assert!(error.contains("give --password-file"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "\n").unwrap();
    let error = refused(&["--password-file", &empty.display().to_string()]);
    assert!(error.contains("the first line is to be the password"), "{error}");
    let error = refused(&["--password-file", "/nowhere"]);
    assert!(error.contains("cannot read /nowhere") && !error.contains("hidden"), "{error}");
}

#[test]
fn every_answer_says_what_a_browser_may_do_with_it() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    for path in [
        "/",
        "/app.js",
        "/style.css",
        "/api/info",
        "/metrics",
        "/nothing",
        "/api/job?server=9&id=x",
    ] {
        let answer = page.get(path);
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{path}: {policy}");
        assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"));
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("cross-origin-resource-policy"), Some("same-origin"), "{path}");
        assert!(answer.header("access-control-allow-origin").is_none(), "{path}");
    }
    let kind = |path| page.get(path).header("content-type").map(str::to_owned);
    assert_eq!(kind("/").as_deref(), Some("text/html; charset=utf-8"));
    assert_eq!(kind("/api/info").as_deref(), Some("application/json"));
}

#[test]
fn secrets_are_neither_shown_nor_logged() {
    let server = server();
    server.add_user("web");
    let url = format!("redis://web:pw@127.0.0.1:{}", server.port);
    server.call::<()>(&[
        "FLORENCE.SUBMIT",
        "job",
        "http://me:hush@127.0.0.1:9/x.png?token=hush2",
        "<OD>",
        "RETRIES",
        "0",
    ]);
    server.call::<redis::Value>(&["FLORENCE.WAIT", "job", "30"]);
    let page = Page::start(&["--redis", &url]);
    let told = page.live("", |told| told["servers"][0]["is_up"] == true);
    let mut texts = vec![told.to_string()];
    for path in
        ["/api/info", "/api/job?server=0&id=job", "/api/jobs?state=failed&all=true", "/metrics"]
    {
        texts.push(page.get(path).text());
    }
    texts.push(page.post("/api/rows", &json!({ "jobs": [{ "server": 0, "id": "job" }] })).text());
    for text in &texts {
        assert!(!text.contains("hush") && !text.contains("web:pw"), "{text}");
    }
}

fn documented_user() -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/WEB.md");
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.contains("ACL SETUSER")).unwrap();
    line.trim().split(' ').map(str::to_owned).collect()
}

#[test]
fn the_documented_user_may_do_all_that_the_page_does() {
    let server = server();
    failed(&server, "job");
    let user = documented_user();
    server.call::<()>(&user.iter().map(String::as_str).collect::<Vec<_>>());
    let name = &user[2];
    let password = user.iter().find_map(|word| word.strip_prefix('>')).unwrap();
    let page =
        Page::start(&["--redis", &format!("redis://{name}:{password}@127.0.0.1:{}", server.port)]);
    let told = page.live("", |told| !told["servers"][0]["model"]["state"].is_null());
    assert_eq!(told["servers"][0]["tells_hosts"], true);
    assert_eq!(told["servers"][0]["role"], "master");
    assert_eq!(ids(&list(&page, "?state=failed&all=true")), ["job"]);
    let shown = page.get("/api/job?server=0&id=job").json();
    assert_eq!(shown["options"]["retries"], "0");
    assert!(shown["ttl_ms"].as_f64().is_some());
    let jobs = json!([{ "server": 0, "id": "job" }]);
    for action in ["retry", "cancel", "delete"] {
        let done = act(&page, &json!({ "action": action, "jobs": jobs }));
        assert_eq!(done["refused"], 0, "{action}: {done}");
    }
    let body = b"{\"prompts\":[\"<OD>\"],\"url\":\"http://127.0.0.1:9/x\"}\n";
    assert_eq!(http(page.port, "POST /api/submit", &[("X-Florence", "1")], body).status, 200);
    // No more than that.
    let error = server.connect_as(name, password);
    let mut connection = error;
    for command in
        [&["FLUSHALL"][..], &["GET", "x"], &["SET", "x", "1"], &["ACL", "LIST"], &["KEYS", "*"]]
    {
        let reply: redis::RedisResult<redis::Value> =
            florence_tests::call(&mut connection, command);
        assert_eq!(reply.unwrap_err().code(), Some("NOPERM"), "{command:?}");
    }
}

#[test]
fn a_thousand_requests_at_once_are_bounded() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    let jobs: Vec<Value> =
        (0..1001).map(|i| json!({ "server": 0, "id": format!("{i}") })).collect();
    for path in ["/api/rows", "/api/tasks"] {
        let answer: Answer = page.post(path, &json!({ "jobs": jobs }));
        assert_eq!(answer.json()["error"], "too many jobs", "{path}");
    }
}

#[test]
fn who_never_says_what_he_wants_is_not_waited_for() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    let mut half = TcpStream::connect(("127.0.0.1", page.port)).unwrap();
    half.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc").unwrap();
    half.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
    // It is told so, or not; then the connection ends.
    half.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(page.get("/healthz").status, 200);
}
