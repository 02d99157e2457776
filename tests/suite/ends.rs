//! What is logged and counted when jobs end without an answer, and downloads that are broken off.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, eventually, picture};

type Job = HashMap<String, Option<String>>;

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url, "<OCR>"], rest].concat());
}

fn ended(server: &Server, key: &str, state: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "20"]);
    let job = job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)));
    assert_eq!(job["state"].as_deref(), Some(state), "{key}: {job:?}");
    job
}

/// A hash that claims to be a job.
fn forge(server: &Server, key: &str, changes: &[(&str, &str)]) {
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut write = redis::cmd("HSET");
    write.arg(key).arg("florence").arg(1).arg("state").arg("queued");
    write.arg("image").arg("DATA").arg("data").arg(bytes).arg("prompt").arg("<OCR>");
    for (field, value) in changes {
        write.arg(field).arg(value);
    }
    write.exec(&mut server.connect()).unwrap();
}

/// Lines of the log about the end of a job.
fn about(log: &str, key: &str) -> Vec<String> {
    let start = format!("florence: job '{key}' ");
    log.lines().filter(|line| line.contains(&start)).map(str::to_owned).collect()
}

fn one_fetcher() -> Server {
    Server::ready(&["florence.max-downloads 1"])
}

#[test]
fn every_end_without_an_answer_leaves_one_line() {
    let pictures = Pictures::serve();
    let server = Server::with(Settings::lines(&["florence.retry-delay-ms 50"]));
    server.wait_for_model();
    submit(&server, "gone", &pictures.url("status/404"), &[]);
    submit(&server, "broken", &pictures.url("status/503"), &["RETRIES", "2"]);
    submit(
        &server,
        "late",
        &pictures.url("slow/3000/sign.png"),
        &["TIMEOUT", "200", "RETRIES", "0"],
    );
    submit(&server, "no picture", &pictures.url("text"), &[]);
    submit(&server, "fine", &pictures.url("sign.png"), &[]);
    submit(&server, "cancelled", &pictures.url("sign.png"), &["DELAY", "600000"]);
    submit(&server, "expired", &pictures.url("sign.png"), &["DELAY", "600000", "EXPIRES", "100"]);
    submit(&server, "deleted", &pictures.url("sign.png"), &["DELAY", "600000"]);
    forge(&server, "crashed", &[("crashes", "2")]);
    server.call::<()>(&["FLORENCE.CANCEL", "cancelled"]);
    server.call::<()>(&["FLORENCE.CANCEL", "cancelled"]);
    server.call::<()>(&["DEL", "deleted"]);
    let mut expected = vec![
        ("cancelled", "cancelled (attempts 0)".to_owned()),
        ("expired", "expired (attempts 0)".to_owned()),
    ];
    for key in ["gone", "broken", "late", "no picture", "crashed"] {
        let job = ended(&server, key, "failed");
        let error: serde_json::Value =
            serde_json::from_str(job["error"].as_ref().unwrap()).unwrap();
        let [code, message] = ["code", "message"].map(|name| error[name].as_str().unwrap());
        let attempts = job["attempts"].as_deref().unwrap();
        expected.push((key, format!("failed: {code} {message} (attempts {attempts})")));
    }
    assert!(
        expected.contains(&("gone", "failed: FETCH the server answered 404 (attempts 1)".into()))
    );
    assert!(
        expected.contains(&("broken", "failed: FETCH the server answered 503 (attempts 3)".into()))
    );
    ended(&server, "expired", "expired");
    ended(&server, "fine", "done");
    for (key, text) in &expected {
        let line = format!("florence: job '{key}' {text}");
        eventually(&line, || (!about(&server.log(), key).is_empty()).then_some(()));
        let lines = about(&server.log(), key);
        assert!(lines.len() == 1 && lines[0].ends_with(&line), "{line}: {lines:?}");
    }
    for key in ["fine", "deleted"] {
        assert_eq!(about(&server.log(), key), [""; 0]);
    }
}

#[test]
fn a_key_cannot_write_lines_of_its_own() {
    let server = Server::start();
    server.wait_for_model();
    let key = "a\nflorence: job 'b' failed: INTERNAL internal error (attempts 9)\r\n\u{1b}[31m";
    submit(&server, key, "http://127.0.0.1:1/", &["DELAY", "600000"]);
    let before = server.log().lines().count();
    server.call::<()>(&["FLORENCE.CANCEL", key]);
    submit(&server, "last", "http://127.0.0.1:1/", &["DELAY", "600000"]);
    server.call::<()>(&["FLORENCE.CANCEL", "last"]);
    eventually("both are logged", || (!about(&server.log(), "last").is_empty()).then_some(()));
    let log = server.log();
    let lines: Vec<&str> = log.lines().skip(before).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].ends_with("cancelled (attempts 0)"), "{lines:?}");
    assert!(!log.contains('\u{1b}') && !lines[0].contains('\r'), "{lines:?}");
}

#[test]
fn many_ends_at_once_leave_few_lines_and_their_number() {
    const JOBS: usize = 2000;
    let server = Server::start();
    let keys: Vec<String> = (0..JOBS).map(|i| format!("j{i}")).collect();
    let mut pipe = redis::pipe();
    for key in &keys {
        let submit = pipe.cmd("FLORENCE.SUBMIT").arg(key).arg("http://127.0.0.1:1/").arg("<OCR>");
        submit.arg("DELAY").arg(600_000).ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    let mut cancel = redis::pipe();
    for keys in keys.chunks(1000) {
        cancel.cmd("FLORENCE.CANCEL").arg(keys);
    }
    let cancelled: Vec<usize> = cancel.query(&mut server.connect()).unwrap();
    assert_eq!(cancelled.iter().sum::<usize>(), JOBS);
    let counted = || {
        let log = server.log();
        let shown = log.lines().filter(|line| line.contains("florence: job '")).count();
        // A line such as `florence: 1900 lines about ended jobs were left out`.
        let left_out = log.lines().filter(|line| line.contains("left out")).map(|line| {
            let (_, text) = line.rsplit_once("florence: ").unwrap();
            let number = text.split_whitespace().find_map(|word| word.parse::<usize>().ok());
            number.unwrap_or_else(|| panic!("how many? {line}"))
        });
        (shown, left_out.sum::<usize>())
    };
    eventually("all are told of", || {
        let (shown, left_out) = counted();
        (shown + left_out == JOBS).then_some(())
    });
    let (shown, left_out) = counted();
    assert!((1..500).contains(&shown), "{shown} lines, {left_out} left out");
    // Later ends are told of again.
    eventually("one more is told of", || {
        server.call::<()>(&["DEL", "again"]);
        submit(&server, "again", "http://127.0.0.1:1/", &["DELAY", "600000"]);
        server.call::<()>(&["FLORENCE.CANCEL", "again"]);
        (!about(&server.log(), "again").is_empty()).then_some(())
    });
}

#[test]
fn failures_are_counted_by_their_codes() {
    const CODES: [&str; 9] = [
        "fetch", "denied", "image", "prompt", "timeout", "crash", "internal", "invalid", "nomodel",
    ];
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    submit(&server, "fetch", &pictures.url("status/404"), &[]);
    submit(&server, "fetch-2", &pictures.url("status/410"), &[]);
    submit(&server, "denied", "http://169.254.169.254/", &[]);
    submit(&server, "image", &pictures.url("text"), &[]);
    submit(
        &server,
        "timeout",
        &pictures.url("slow/3000/sign.png"),
        &["TIMEOUT", "200", "RETRIES", "0"],
    );
    forge(&server, "crash", &[("crashes", "2")]);
    forge(&server, "invalid", &[("beams", "abc")]);
    forge(&server, "nomodel", &[("wants", "another")]);
    for key in ["fetch", "fetch-2", "denied", "image", "timeout", "crash", "invalid", "nomodel"] {
        ended(&server, key, "failed");
    }
    let info: String = server.call(&["INFO", "florence"]);
    for code in CODES {
        let expected = match code {
            "fetch" => 2,
            "prompt" | "internal" => 0,
            _ => 1,
        };
        let name = format!("failed_{code}");
        assert_eq!(server.stat(&name), expected, "{name}");
        assert!(info.contains(&format!("\nflorence_{name}:{expected}\r\n")), "{name}: {info}");
    }
    assert_eq!(server.stat("jobs_failed"), 8);
}

#[test]
fn a_download_ends_when_nobody_wants_its_picture_any_more() {
    let (server, pictures) = (one_fetcher(), Pictures::serve());
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let endings: [&[&str]; 6] = [
        &["FLORENCE.CANCEL", "held"],
        &["DEL", "held"],
        &["UNLINK", "held"],
        &["PEXPIRE", "held", "1"],
        &["SET", "held", "x"],
        &["FLUSHALL"],
    ];
    for path in ["slow/60000/shapes.png", "trickle/shapes.png"] {
        for ending in endings {
            server.call::<()>(&["DEL", "held"]);
            let asked = pictures.hits();
            submit(&server, "held", &pictures.url(path), &[]);
            eventually("it is asked for", || (pictures.hits() > asked).then_some(()));
            server.call::<()>(ending);
            let mut next = redis::cmd("FLORENCE.SUBMIT");
            next.arg("next").arg("DATA").arg(&bytes).arg("<OCR>");
            next.exec(&mut server.connect()).unwrap();
            let job: Option<Job> = server.call(&["FLORENCE.WAIT", "next", "5"]);
            let job = job.unwrap_or_else(|| panic!("{path} goes on after {ending:?}"));
            assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
            server.call::<()>(&["DEL", "next"]);
        }
    }
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn a_download_that_trickles_ends_with_the_time_of_its_attempt() {
    let (server, pictures) = (one_fetcher(), Pictures::serve());
    let start = Instant::now();
    let once = ["TIMEOUT", "1000", "RETRIES", "0"];
    submit(&server, "j", &pictures.url("trickle/sign.png"), &once);
    let job = ended(&server, "j", "failed");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(job["error"].as_deref().unwrap().contains("\"TIMEOUT\""), "{job:?}");
}

#[test]
fn a_job_that_expires_while_its_end_is_written_leaves_nothing() {
    let server = Server::ready(&["florence.thumbnails 0"]);
    let mut connection = server.connect();
    // What follows the picture takes its time to be compared, within which the key may expire.
    let sign = [std::fs::read(picture("sign.png")).unwrap(), vec![0; 20 << 20]].concat();
    let mut submit = |key: &str| {
        let mut submit = redis::cmd("FLORENCE.SUBMIT");
        submit.arg(key).arg("DATA").arg(&sign).arg("<OCR>").arg("NOCACHE");
        submit.exec(&mut connection).unwrap();
        Instant::now()
    };
    let takes = |start: Instant| {
        ended(&server, "alone", "done");
        start.elapsed()
    };
    let alone = takes(submit("alone"));
    for i in 0..30_u32 {
        let key = format!("j{i}");
        submit(&key);
        let left = (alone * (70 + 2 * i) / 100).as_millis().max(1);
        server.call::<()>(&["PEXPIRE", &key, &left.to_string()]);
    }
    server.until_idle();
    // Those that ended before are jobs; others are gone, or about to go.
    let keys: Vec<String> = server.call(&["KEYS", "j*"]);
    let is_no_job = |key: &&String| server.call::<i64>(&["HEXISTS", key, "florence"]) == 0;
    let remains =
        keys.iter().filter(|key| is_no_job(key) && server.call::<i64>(&["PTTL", key]) == -1);
    assert_eq!(remains.collect::<Vec<_>>(), Vec::<&String>::new());
}
