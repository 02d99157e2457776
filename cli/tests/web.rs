//! `florence web` against real servers: what it tells, what it changes, and whom it refuses.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Answer, Page, http, query};
use florence_tests::{Cluster, Pictures, Server, Settings, celery_message, eventually, picture};
use serde_json::{Value, json};

/// A server with the sample pictures, whose model is loaded.
fn server() -> Server {
    let samples = picture("shapes.png").parent().unwrap().display().to_string();
    Server::ready(&[&format!("florence.file-roots {samples}")])
}

fn sample(name: &str) -> String {
    picture(name).display().to_string()
}

/// An answered job.
fn answered(server: &Server, key: &str, prompt: &str) {
    server.call::<()>(&["FLORENCE.SUBMIT", key, &sample("shapes.png"), prompt]);
    server.call::<redis::Value>(&["FLORENCE.WAIT", key, "60"]);
}

/// A job that fails: its address is of a scheme that is fetched, but of no host.
fn failed(server: &Server, key: &str) {
    server.call::<()>(&[
        "FLORENCE.SUBMIT",
        key,
        "http://127.0.0.1:9/x.png",
        "<OD>",
        "RETRIES",
        "0",
    ]);
    server.call::<redis::Value>(&["FLORENCE.WAIT", key, "60"]);
}

fn ids(list: &Value) -> Vec<String> {
    let rows = list["rows"].as_array().unwrap_or_else(|| panic!("{list}"));
    let mut ids: Vec<String> =
        rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids
}

fn list(page: &Page, query: &str) -> Value {
    let answer = page.get(&format!("/api/jobs{query}"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn act(page: &Page, order: &Value) -> Value {
    let answer = page.post("/api/act", order);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn the_overview_tells_how_servers_do_and_what_has_ended() {
    let server = server();
    answered(&server, "a", "<OD>");
    failed(&server, "b");
    let page = Page::about(&[&server], &[]);
    let told = page.live("", |told| {
        told["stats"]["jobs_done"] == 1.0 && !told["servers"][0]["model"]["state"].is_null()
    });
    let known = &told["servers"][0];
    assert_eq!(known["is_up"], true);
    assert_eq!(known["role"], "master");
    assert_eq!(known["model"]["name"], "tiny");
    assert_eq!(known["model"]["state"], "ready");
    assert!(known["ping_ms"].as_f64().unwrap() > 0.0);
    assert!(known["memory"].as_f64().unwrap() > 1e6);
    let ends = told["ends"].as_array().unwrap();
    let ended = |state: &str, code: &str| {
        ends.iter().any(|end| end["state"] == state && end["code"] == code && end["count"] == 1.0)
    };
    assert!(ended("done", "") && ended("failed", "FETCH"), "{ends:?}");
    let hosts = told["hosts"].as_array().unwrap();
    assert_eq!(hosts[0]["failures"], 1.0, "{hosts:?}");
    let history = eventually("a point is kept", || {
        let history = page.get("/api/history").json();
        (!history["points"].as_array().unwrap().is_empty()).then_some(history)
    });
    let names = history["names"].as_array().unwrap();
    assert_eq!(names.len(), history["points"][0].as_array().unwrap().len());
}

#[test]
fn jobs_are_listed_by_state_and_found_by_what_they_are() {
    let (server, pictures) = (server(), Pictures::serve());
    answered(&server, "done:1", "<OD>");
    answered(&server, "done:2", "<CAPTION>");
    failed(&server, "failed:1");
    server.call::<()>(&["FLORENCE.SUBMIT", "held:1", &pictures.url("held/back/sign.png"), "<OCR>"]);
    server.call::<()>(&[
        "FLORENCE.SUBMIT",
        "late:1",
        &sample("sign.png"),
        "<OCR>",
        "DELAY",
        "3600000",
    ]);
    server.call::<()>(&["HSET", "done:hash", "state", "done"]);
    eventually("it is fetched", || (server.state("held:1") == "fetching").then_some(()));
    let page = Page::about(&[&server], &[]);
    page.live("", |told| told["servers"][0]["is_up"] == true);
    assert_eq!(ids(&list(&page, "")), ["held:1", "late:1"]);
    assert_eq!(ids(&list(&page, "?state=fetching,running")), ["held:1"]);
    assert_eq!(ids(&list(&page, "?state=done")), ["done:1", "done:2"]);
    assert_eq!(ids(&list(&page, "?state=failed")), ["failed:1"]);
    assert_eq!(ids(&list(&page, "?state=done,failed&all=true")), ["done:1", "done:2", "failed:1"]);
    for (search, expected) in [
        ("state=done&q=done:1", "done:1"),
        ("state=done&q=done:&field=prompt", ""),
        ("state=done&q=caption&field=prompt", "done:2"),
        ("state=failed&q=127.0.0&field=host", "failed:1"),
        ("state=failed&q=refused&field=error", "failed:1"),
        ("state=failed&q=FETCH", "failed:1"),
        ("q=la&field=key", "late:1"),
        ("q=*&field=key", ""),
    ] {
        let found = list(&page, &format!("?{search}"));
        assert_eq!(ids(&found).join(" "), expected, "{search}");
        assert_eq!(found["is_complete"], true);
    }
    assert_eq!(page.get("/api/jobs?state=odd").status, 400);
    assert_eq!(page.get("/api/jobs?server=x").json()["error"], "the request cannot be read");
    let rows = page.post("/api/rows", &json!({ "jobs": [
        { "server": 0, "id": "failed:1" }, { "server": 0, "id": "late:1" }, { "server": 0, "id": "gone" },
    ]}));
    let rows = rows.json();
    assert_eq!(rows[0]["error"]["code"], "FETCH");
    assert_eq!(rows[1]["state"], "queued");
    assert_eq!(rows[2], Value::Null);
}

#[test]
fn jobs_are_retried_cancelled_and_deleted_and_other_keys_are_not() {
    let (server, pictures) = (server(), Pictures::serve());
    (0..3).for_each(|i| failed(&server, &format!("failed:{i}")));
    answered(&server, "done", "<OD>");
    server.call::<()>(&["SET", "text", "x"]);
    server.call::<()>(&["HSET", "hash", "state", "failed"]);
    server.call::<()>(&["FLORENCE.SUBMIT", "held", &pictures.url("held/back/sign.png"), "<OCR>"]);
    let page = Page::about(&[&server], &[]);
    let named = |keys: &[&str]| {
        let jobs = keys.iter().map(|key| json!({ "server": 0, "id": key }));
        jobs.collect::<Vec<Value>>()
    };
    let cancelled =
        act(&page, &json!({ "action": "cancel", "jobs": named(&["held", "done", "gone"]) }));
    assert_eq!((&cancelled["changed"], &cancelled["unchanged"]), (&json!(1), &json!(2)));
    assert_eq!(server.state("held"), "cancelled");
    let retried = act(&page, &json!({ "action": "retry", "jobs": named(&["failed:0", "done"]) }));
    assert_eq!((&retried["changed"], &retried["unchanged"]), (&json!(1), &json!(1)));
    let deleted = act(
        &page,
        &json!({ "action": "delete", "jobs": named(&["done", "text", "hash", "gone"]) }),
    );
    assert_eq!(deleted["changed"], 1, "{deleted}");
    assert_eq!((&deleted["unchanged"], &deleted["refused"]), (&json!(1), &json!(2)));
    assert_eq!(server.call::<i64>(&["EXISTS", "done", "text", "hash"]), 2);
    eventually("it has failed again", || (server.state("failed:0") == "failed").then_some(()));
    let matching = json!({ "action": "delete", "match": { "state": "failed", "q": "127.0.0", "field": "host" } });
    assert_eq!(act(&page, &matching)["changed"], 3);
    assert_eq!(server.call::<i64>(&["EXISTS", "failed:0", "failed:1", "failed:2", "hash"]), 1);
    let many = named(&["x"; 1001]);
    assert_eq!(page.post("/api/act", &json!({ "action": "cancel", "jobs": many })).status, 400);
}

#[test]
fn a_job_is_shown_with_what_it_found_and_as_a_picture() {
    let server = server();
    answered(&server, "job", "<OD>");
    let page = Page::about(&[&server], &[]);
    let shown = page.get("/api/job?server=0&id=job").json();
    assert_eq!(shown["job"]["state"], "done");
    assert_eq!(shown["job"]["result"]["<OD>"]["labels"][0], "circle");
    assert_eq!(shown["marks"]["marks"].as_array().unwrap().len(), 3);
    assert_eq!(shown["options"]["retries"], "3");
    assert!(shown["ttl_ms"].as_f64().unwrap() > 8e7);
    assert_eq!(shown["has_thumbnail"], false);
    assert_eq!(page.get("/api/picture?server=0&id=job").status, 404);
    // Without a picture it is drawn on white, of the same size.
    let drawn = page.get("/api/annotated?server=0&id=job");
    assert_eq!(drawn.header("content-type"), Some("image/png"));
    let drawn = image::load_from_memory(&drawn.body).unwrap();
    assert_eq!((drawn.width(), drawn.height()), (360, 280));
    // What the hash keeps as the thumbnail is shown, if it is a picture.
    let picture = std::fs::read(picture("shapes.png")).unwrap();
    let mut connection = server.connect();
    let mut keep = |bytes: &[u8]| {
        redis::cmd("HSET").arg("job").arg("thumbnail").arg(bytes).exec(&mut connection).unwrap();
    };
    keep(&picture);
    let kept = page.get("/api/picture?server=0&id=job");
    assert_eq!((kept.header("content-type"), &kept.body), (Some("image/png"), &picture));
    let drawn = page.get("/api/annotated?server=0&id=job");
    let drawn = image::load_from_memory(&drawn.body).unwrap().into_rgb8();
    let mean = drawn.pixels().map(|pixel| u64::from(pixel.0[0])).sum::<u64>() / (360 * 280);
    assert!(mean < 250, "the picture is under the marks: {mean}");
    for no_picture in [&b"<svg onload=alert(1)>"[..], b"<html><script>alert(1)</script>"] {
        keep(no_picture);
        assert_eq!(page.get("/api/picture?server=0&id=job").status, 404);
    }
    assert_eq!(page.get("/api/job?server=0&id=gone").status, 404);
    assert_eq!(page.get("/api/job?server=7&id=job").status, 400);
}

#[test]
fn a_picture_is_tried_from_the_page() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    let submit = |question: &Value, bytes: &[u8]| {
        let body = [question.to_string().as_bytes(), b"\n", bytes].concat();
        let headers = [("Content-Type", "application/octet-stream"), ("X-Florence", "1")];
        http(page.port, "POST /api/submit", &headers, &body)
    };
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let named = submit(&json!({ "prompts": ["<OD>", "<CAPTION>"] }), &bytes);
    assert_eq!(named.status, 200, "{}", named.text());
    let id = named.json()["id"].as_str().unwrap().to_owned();
    server.call::<redis::Value>(&["FLORENCE.WAIT", &id, "60"]);
    let shown = page.get(&format!("/api/job?server=0&id={}", query(&id))).json();
    assert_eq!(
        shown["marks"]["texts"][0]["text"],
        "a blue circle, a red square and a black triangle"
    );
    assert_eq!(shown["marks"]["prompts"], json!(["<OD>", "<CAPTION>"]));
    let one = submit(&json!({ "prompts": ["<OCR>"], "url": sample("sign.png") }), b"");
    assert_eq!(one.status, 200, "{}", one.text());
    let bad = submit(&json!({ "prompts": ["<ODD>"] }), &bytes);
    assert_eq!(bad.status, 409);
    assert!(bad.json()["error"].as_str().unwrap().starts_with("BADPROMPT"), "{}", bad.text());
    assert_eq!(submit(&json!("x"), b"").status, 400);
    // Refused by its length, before anything of it is read.
    let headers = [("X-Florence", "1"), ("Content-Length", "41943040")];
    let large = http(page.port, "POST /api/submit", &headers, b"");
    assert_eq!((large.status, large.json()), (413, json!({ "error": "the picture is too large" })));
}

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

#[test]
fn prometheus_can_read_the_figures() {
    let server = server();
    answered(&server, "a", "<OD>");
    failed(&server, "b");
    server.call::<()>(&["FLORENCE.SUBMIT", "c", &sample("sign.png"), "<OCR>", "DELAY", "3600000"]);
    let page = Page::about(&[&server], &[]);
    let text = eventually("the figures are there", || {
        let text = page.get("/metrics").text();
        text.contains("florence_model_ready").then_some(text).filter(|it| it.contains("FETCH"))
    });
    let mut typed = std::collections::HashSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(typed.insert(name.to_owned()), "{name} twice");
            assert!(kind != "counter" || name.ends_with("_total"), "{line}");
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
            let name = name.split('{').next().unwrap();
            let of = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            assert!(typed.contains(name) || of.is_some_and(|of| typed.contains(of)), "{line}");
        }
    }
    let named = format!("server=\"127.0.0.1:{}\"", server.port);
    for expected in [
        format!("florence_up{{{named}}} 1"),
        format!("florence_queue_depth{{{named},state=\"waiting\"}} 0"),
        format!("florence_queue_depth{{{named},state=\"delayed\"}} 1"),
    ] {
        assert!(text.contains(&expected), "{expected}: {text}");
    }
    let sum = |state: &str| -> f64 {
        let lines = text.lines().filter(|line| line.starts_with("florence_jobs_total{"));
        let lines = lines.filter(|line| line.contains(&format!("state=\"{state}\"")));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    assert_eq!((sum("done"), sum("failed")), (1.0, 1.0));
}

#[test]
fn a_server_that_was_away_comes_back() {
    let mut server = server();
    let page = Page::about(&[&server], &[]);
    page.live("", |told| told["servers"][0]["model"]["state"] == "ready");
    assert_eq!(page.get("/readyz").status, 200);
    server.shut_down(&["NOSAVE"]);
    let told = page.live("", |told| told["servers"][0]["is_up"] == false);
    assert!(told["servers"][0]["error"].is_string(), "{told}");
    assert_eq!(page.get("/readyz").text(), "0 of 1 servers are ready\n");
    assert_eq!(page.get("/healthz").status, 200);
    let gone = page.get("/api/job?server=0&id=x");
    assert_eq!(gone.status, 502, "{}", gone.text());
    let named = format!("florence_up{{server=\"127.0.0.1:{}\"}} 0", server.port);
    assert!(page.get("/metrics").text().contains(&named));
    server.restart();
    page.live("", |told| told["servers"][0]["model"]["state"] == "ready");
    assert_eq!(page.get("/readyz").status, 200);
}

#[test]
fn a_master_and_its_replica_have_their_jobs_once() {
    let (master, replica) = (server(), server());
    replica.follow(&master);
    answered(&master, "a", "<OD>");
    server_has(&replica, "a");
    let page = Page::about(&[&master, &replica], &[]);
    page.live("", |told| {
        let servers = told["servers"].as_array().unwrap();
        servers.iter().filter(|server| server["role"] == "replica").count() == 1
            && servers.iter().all(|server| server["is_up"] == true)
    });
    assert_eq!(list(&page, "?state=done&all=true")["rows"].as_array().unwrap().len(), 1);
    let own = list(&page, "?state=done&all=true&server=1");
    assert_eq!(own["rows"][0]["server"], 1);
    // What a replica refuses is told in its own words.
    let order = json!({ "action": "delete", "jobs": [{ "server": 1, "id": "a" }] });
    let refused = act(&page, &order);
    assert_eq!(refused["refused"], 1);
    assert!(refused["errors"][0].as_str().unwrap().contains("READONLY"), "{refused}");
}

fn server_has(server: &Server, key: &str) {
    eventually("the job is there", || (server.state(key) == "done").then_some(()));
}

#[test]
fn keys_of_any_bytes_are_listed_and_shown() {
    let server = server();
    let mut connection = server.connect();
    for key in [&b"a b%41\xff<i>"[..], "sch\u{f6}n".as_bytes()] {
        redis::cmd("FLORENCE.SUBMIT")
            .arg(key)
            .arg(sample("sign.png"))
            .arg("<OCR>")
            .exec(&mut connection)
            .unwrap();
        redis::cmd("FLORENCE.WAIT").arg(key).arg(60).exec(&mut connection).unwrap();
    }
    let page = Page::about(&[&server], &[]);
    let found = ids(&list(&page, "?state=done&all=true"));
    assert_eq!(found, ["a b%2541%FF<i>", "sch%C3%B6n"]);
    for id in found {
        let shown = page.get(&format!("/api/job?server=0&id={}", query(&id)));
        assert_eq!(shown.json()["job"]["state"], "done", "{id}");
    }
}

#[test]
fn tasks_of_celery_are_shown_as_flower_shows_them() {
    let samples = picture("shapes.png").parent().unwrap().display().to_string();
    let server = Server::ready(&[
        &format!("florence.file-roots {samples}"),
        "florence.celery-queues celery:tasks.ask",
    ]);
    let message = celery_message("id-1", "tasks.ask", &[&sample("shapes.png"), "<OD>"]);
    server.call::<()>(&["LPUSH", "celery", &message]);
    eventually("it is answered", || {
        (server
            .try_call::<Vec<Option<String>>>(&["HMGET", "florence:celery:id-1", "state"])
            .ok()?[0]
            .as_deref()
            == Some("done"))
        .then_some(())
    });
    answered(&server, "florence:celery:not-a-task", "<OD>");
    let page = Page::about(&[&server], &[]);
    let found = list(&page, "?all=true&field=key&q=florence:celery:&state=done");
    assert_eq!(ids(&found).len(), 2);
    let jobs = json!([{ "server": 0, "id": "florence:celery:id-1" },
        { "server": 0, "id": "florence:celery:not-a-task" }]);
    let tasks = page.post("/api/tasks", &json!({ "jobs": jobs })).json();
    assert_eq!(tasks[0]["id"], "id-1");
    assert_eq!(tasks[0]["name"], "tasks.ask");
    assert_eq!(tasks[0]["state"], "SUCCESS");
    assert_eq!(tasks[0]["args"], json!([sample("shapes.png"), "<OD>"]));
    assert!(tasks[0]["runtime_ms"].as_i64().unwrap() >= 0);
    assert_eq!(tasks[1], Value::Null);
}

/// The line of the documentation that makes the page's own user.
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

#[test]
fn a_server_without_the_module_is_told_of() {
    let plain = Server::with(Settings { plain: true, ..Settings::default() });
    let page = Page::about(&[&plain], &[]);
    let told = page.live("", |told| told["servers"][0]["error"].as_str() != Some("not asked yet"));
    let error = told["servers"][0]["error"].as_str().unwrap();
    assert!(error.contains("unknown command"), "{error}");
}

/// Whether the module tells latencies and ended jobs, keeps thumbnails and can be paused.
fn is_newer(server: &Server) -> bool {
    server.try_call::<redis::Value>(&["FLORENCE.STATS", "LATENCY"]).is_ok()
}

#[test]
fn latencies_are_told_by_phase_and_task_or_their_absence_is() {
    let server = server();
    answered(&server, "a", "<OD>");
    let page = Page::about(&[&server], &[]);
    let told = page.live("", |told| !told["servers"][0]["model"]["state"].is_null());
    let metrics = page.get("/metrics").text();
    let listed = list(&page, "?state=done");
    assert_eq!(ids(&listed), ["a"]);
    if is_newer(&server) {
        let row = |rows: &str, name: &str| {
            let rows = told["latency"][rows].as_array().unwrap();
            rows.iter().find(|row| row["name"] == name).cloned().unwrap()
        };
        for (rows, name) in [("phases", "total"), ("phases", "generate"), ("tasks", "<OD>")] {
            let row = row(rows, name);
            assert_eq!(row["all"]["count"], 1.0, "{row}");
            assert!(row["all"]["p95"].as_f64().unwrap() > 0.0, "{row}");
        }
        let counted = "phase=\"total\",task=\"<OD>\"} 1";
        assert!(metrics.contains(counted), "{metrics}");
        assert!(metrics.contains("state=\"done\",task=\"<OD>\",code=\"\"} 1"), "{metrics}");
        assert_eq!(listed["notes"], json!([]));
        assert_eq!(told["servers"][0]["version"], env!("CARGO_PKG_VERSION"));
    } else {
        assert_eq!(told["latency"], Value::Null);
        assert_eq!(told["servers"][0]["tells_latency"], false);
        assert!(!metrics.contains("florence_phase_seconds_count{"));
        assert!(listed["notes"][0].as_str().unwrap().contains("its module is older"));
    }
}

#[test]
fn a_server_is_paused_and_goes_on() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    let pause = |paused: bool| page.post("/api/pause", &json!({ "server": 0, "paused": paused }));
    let paused = pause(true);
    if is_newer(&server) {
        assert_eq!(paused.json(), json!({ "paused": true }));
        page.live("", |told| told["servers"][0]["paused"] == true);
        assert!(page.get("/metrics").text().contains("florence_paused{"));
        server.call::<()>(&["FLORENCE.SUBMIT", "job", &sample("sign.png"), "<OCR>"]);
        assert_eq!(server.state("job"), "queued");
        assert_eq!(pause(false).status, 200);
        server.call::<redis::Value>(&["FLORENCE.WAIT", "job", "60"]);
        assert_eq!(server.state("job"), "done");
        page.live("", |told| told["servers"][0]["paused"] == false);
    } else {
        assert_eq!(paused.status, 409);
        assert!(paused.json()["error"].as_str().unwrap().contains("florence.paused"));
        page.live("", |told| {
            told["servers"][0]["is_up"] == true && told["servers"][0]["paused"].is_null()
        });
    }
}

#[test]
fn what_is_tried_keeps_a_thumbnail_where_the_server_makes_them() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    let body = json!({ "prompts": ["<OD>"], "url": sample("shapes.png") }).to_string() + "\n";
    let named = http(page.port, "POST /api/submit", &[("X-Florence", "1")], body.as_bytes()).json();
    let id = named["id"].as_str().unwrap();
    server.call::<redis::Value>(&["FLORENCE.WAIT", id, "60"]);
    let shown = page.get(&format!("/api/job?server=0&id={}", query(id))).json();
    assert_eq!(shown["has_thumbnail"], is_newer(&server));
    let kept = page.get(&format!("/api/picture?server=0&id={}", query(id)));
    let expected =
        if is_newer(&server) { (200, Some("image/jpeg")) } else { (404, Some("application/json")) };
    assert_eq!((kept.status, kept.header("content-type")), expected);
}

#[test]
fn a_clusters_nodes_are_one_page() {
    const JOBS: usize = 9;
    let cluster = Cluster::start();
    let nodes: Vec<&Server> = cluster.nodes.iter().collect();
    let mut connection = cluster.connect();
    for i in 0..JOBS {
        let mut submit = redis::cmd("FLORENCE.SUBMIT");
        submit.arg(format!("late:{i}")).arg("http://127.0.0.1:9/x.png").arg("<OD>");
        submit.arg("DELAY").arg(3_600_000).exec(&mut connection).unwrap();
    }
    let page = Page::about(&nodes, &[]);
    let told = page.live("", |told| {
        let servers = told["servers"].as_array().unwrap();
        servers.iter().filter(|server| server["role"] == "replica").count() == 3
            && told["stats"]["jobs_delayed"] == 9.0
    });
    assert_eq!(told["servers"].as_array().unwrap().len(), 6);
    let found = list(&page, "?all=true");
    assert_eq!(ids(&found).len(), JOBS);
    // Each at the master that has it.
    let jobs: Vec<Value> = found["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| json!({ "server": row["server"], "id": row["id"] }))
        .collect();
    let masters: std::collections::HashSet<u64> =
        jobs.iter().map(|job| job["server"].as_u64().unwrap()).collect();
    assert!(masters.len() > 1 && masters.iter().all(|master| *master < 3), "{masters:?}");
    let rows = page.post("/api/rows", &json!({ "jobs": jobs })).json();
    assert!(rows.as_array().unwrap().iter().all(|row| row["state"] == "queued"), "{rows}");
    assert_eq!(act(&page, &json!({ "action": "cancel", "jobs": jobs }))["changed"], JOBS);
    // What is tried goes to the node that has its slot.
    let body = b"{\"prompts\":[\"<OD>\"],\"url\":\"http://127.0.0.1:9/x\"}\n";
    let tried = http(page.port, "POST /api/submit", &[("X-Florence", "1")], body);
    assert_eq!(tried.status, 200, "{}", tried.text());
    let (server, id) = (tried.json()["server"].clone(), tried.json()["id"].clone());
    let shown = page.get(&format!("/api/job?server={server}&id={}", query(id.as_str().unwrap())));
    assert_eq!(shown.status, 200, "{}", shown.text());
}
