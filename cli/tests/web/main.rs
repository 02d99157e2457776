//! `florence web` against real servers: what it tells and what it changes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]

#[path = "../common/mod.rs"]
mod common;
mod guard;

use common::{Page, http, query};
use florence_tests::{
    Cluster, Pictures, Server, Settings, celery_message, eventually, free_port, picture,
};
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
    // One that was listed in another state has been asked again since.
    let stale = json!([{ "server": 0, "id": "done", "state": "failed" }]);
    assert_eq!(act(&page, &json!({ "action": "delete", "jobs": stale }))["unchanged"], 1);
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
fn a_server_that_is_away_leaves_what_is_tried_to_the_next() {
    let server = server();
    answered(&server, "a", "<OD>");
    let away = format!("redis://127.0.0.1:{}", free_port());
    let there = format!("redis://127.0.0.1:{}", server.port);
    let page = Page::start(&["--redis", &away, "--redis", &there]);
    let submit = |question: &Value| {
        let body = [question.to_string().as_bytes(), b"\n"].concat();
        http(page.port, "POST /api/submit", &[("X-Florence", "1")], &body)
    };
    let mut question = json!({ "prompts": ["<OD>"], "url": sample("sign.png") });
    let named = submit(&question);
    assert_eq!((named.status, &named.json()["server"]), (200, &json!(1)), "{}", named.text());
    // Who has chosen it hears of it.
    question["server"] = json!(0);
    assert_eq!(submit(&question).status, 502);
    // Nor has it been looked at.
    page.live("", |told| told["servers"][1]["is_up"] == true);
    let found = list(&page, "?state=done");
    assert!(ids(&found).contains(&"a".to_owned()), "{found}");
    let notes: Vec<&str> =
        found["notes"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(matches!(notes[..], [note] if note.contains("refused")), "{notes:?}");
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
fn figures_that_add_up_are_told_once() {
    let (master, replica) = (server(), server());
    replica.follow(&master);
    let late = ["FLORENCE.SUBMIT", "late", &sample("sign.png"), "<OCR>", "DELAY", "3600000"];
    master.call::<()>(&late);
    eventually("the replica has it", || (replica.stat("jobs_delayed") == 1).then_some(()));
    let url = |server: &Server, rest: &str| format!("redis://127.0.0.1:{}{rest}", server.port);
    // The same process under two names, and INFO as the newer protocol has it.
    let urls = [url(&master, ""), url(&master, "/1"), url(&replica, "?protocol=resp3")];
    let urls: Vec<&str> = urls.iter().flat_map(|url| ["--redis", url]).collect();
    let page = Page::start(&urls);
    let text = eventually("all are told of", || {
        let text = page.get("/metrics").text();
        let are_up = text.lines().filter(|line| line.starts_with("florence_up{"));
        (are_up.filter(|line| line.ends_with(" 1")).count() == 3).then_some(text)
    });
    let samples = |start: &str| {
        let lines = text.lines().filter(|line| line.starts_with(start));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let (master, replica) =
        (format!("127.0.0.1:{}", master.port), format!("127.0.0.1:{}", replica.port));
    assert_eq!(
        samples("florence_server_info"),
        [(&master, "master"), (&replica, "replica")].map(|(name, role)| format!(
            "florence_server_info{{server=\"{name}\",role=\"{role}\"}} 1"
        ))
    );
    let depth = format!("florence_queue_depth{{server=\"{master}\",state=\"delayed\"}} 1");
    let depths = samples("florence_queue_depth{");
    assert!(depths.len() == 3 && depths.contains(&depth), "{depths:?}");
    assert_eq!(samples("florence_jobs_submitted_total{").len(), 2);
}

#[test]
fn as_many_jobs_as_can_be_named_fit_a_request() {
    let server = server();
    let page = Page::about(&[&server], &[]);
    let key = "%FF".repeat(8188);
    let jobs: Vec<Value> =
        (0..1000).map(|i| json!({ "server": 0, "id": format!("{key}{i:04}") })).collect();
    let done = act(&page, &json!({ "action": "cancel", "jobs": jobs }));
    assert_eq!((&done["changed"], &done["unchanged"]), (&json!(0), &json!(1000)), "{done}");
    let large = page.post("/api/pause", &json!("x".repeat(2 << 20)));
    assert_eq!((large.status, large.json()), (413, json!({ "error": "the request is too large" })));
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
    // Those that the server lists by itself are found without a look at all keys.
    answered(&server, "other", "<OD>");
    page.live("", |told| told["servers"][0]["is_up"] == true);
    for (all, is_search) in [("", !is_newer(&server)), ("&all=true", true)] {
        let found = list(&page, &format!("?state=all&prefix=florence:celery:{all}"));
        assert_eq!((ids(&found).len(), &found["is_search"]), (2, &json!(is_search)), "{found}");
    }
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
