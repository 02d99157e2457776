//! The wall clock is set back by an hour: nothing waits for it to come round again.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use florence_tests::{Clock, Pictures, Server, Settings, eventually};

type Job = HashMap<String, Option<String>>;

const HOUR: i64 = 3600;

/// A server that goes by this clock.
fn server(clock: &Clock, lines: &[&str]) -> Server {
    let settings = Settings::lines(&[&["appendonly yes"], lines].concat());
    let server = Server::with(Settings { env: clock.env(), ..settings });
    server.wait_for_model();
    // Otherwise nothing is tested.
    let before = seconds(&server);
    clock.set(-HOUR);
    eventually("the server goes by the clock", || {
        (before - seconds(&server) > HOUR / 2).then_some(())
    });
    clock.set(0);
    eventually("it is right again", || (seconds(&server) >= before).then_some(()));
    server
}

fn seconds(server: &Server) -> i64 {
    let time: [String; 2] = server.call(&["TIME"]);
    time[0].parse().unwrap()
}

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url, "<OCR>"], rest].concat());
}

/// Waits for a job, far less than an hour; none of its durations may be negative, or longer than
/// the test.
fn ended(server: &Server, key: &str, state: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "30"]);
    let job = job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)));
    assert_eq!(job["state"].as_deref(), Some(state), "{key}: {job:?}");
    for field in ["queue_ms", "fetch_ms", "infer_ms"] {
        if let Some(duration) = &job[field] {
            let duration: i64 = duration.parse().unwrap();
            assert!((0..60_000).contains(&duration), "{key}: {field} is {duration}");
        }
    }
    job
}

#[test]
fn jobs_that_wait_when_the_clock_is_set_back_expire_in_time() {
    let (clock, pictures) = (Clock::new(), Pictures::serve());
    let server = server(&clock, &["florence.max-downloads 1"]);
    submit(&server, "busy", &pictures.url("held/go/sign.png"), &[]);
    eventually("it is worked on", || (server.state("busy") == "fetching").then_some(()));
    let url = pictures.url("sign.png");
    submit(&server, "ready", &url, &["EXPIRES", "1500"]);
    submit(&server, "delayed", &url, &["EXPIRES", "1500", "DELAY", "600000"]);
    clock.set(-HOUR);
    submit(&server, "later", &url, &["EXPIRES", "1500", "DELAY", "600000"]);
    let start = Instant::now();
    for key in ["ready", "delayed", "later"] {
        ended(&server, key, "expired");
    }
    // Before the download gives up, which makes room for the others.
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    pictures.release("go");
    ended(&server, "busy", "done");
    assert_eq!(pictures.hits(), 1);
}

#[test]
fn jobs_from_before_and_after_the_step_run_at_once() {
    let (clock, pictures) = (Clock::new(), Pictures::serve());
    let server = server(&clock, &["florence.max-downloads 1"]);
    let url = pictures.url("sign.png");
    submit(&server, "busy", &pictures.url("held/go/sign.png"), &[]);
    eventually("it is worked on", || (server.state("busy") == "fetching").then_some(()));
    for key in ["before", "renamed", "prepared"] {
        submit(&server, key, &url, &[]);
    }
    server.call::<()>(&["COPY", "prepared", "copy"]);
    clock.set(-HOUR);
    // The keys are read anew, with times that are yet to come.
    server.call::<()>(&["RENAME", "renamed", "new-name"]);
    server.call::<()>(&["COPY", "prepared", "copy", "REPLACE"]);
    submit(&server, "after", &url, &[]);
    pictures.release("go");
    for key in ["busy", "before", "new-name", "prepared", "copy", "after"] {
        ended(&server, key, "done");
    }
}

#[test]
fn jobs_from_before_the_step_run_at_once_after_a_restart() {
    let (clock, pictures) = (Clock::new(), Pictures::serve());
    let mut server = server(&clock, &["appendfsync always", "florence.max-downloads 1"]);
    let url = pictures.url("sign.png");
    submit(&server, "busy", &pictures.url("held/go/sign.png"), &[]);
    eventually("it is worked on", || (server.state("busy") == "fetching").then_some(()));
    submit(&server, "waiting", &url, &[]);
    submit(&server, "expiring", &url, &["EXPIRES", "2000", "DELAY", "600000"]);
    server.kill();
    clock.set(-HOUR);
    pictures.release("go");
    server.restart();
    for key in ["busy", "waiting"] {
        ended(&server, key, "done");
    }
    ended(&server, "expiring", "expired");
}

#[test]
fn retries_happen_in_time_though_the_clock_was_set_back() {
    let (clock, pictures) = (Clock::new(), Pictures::serve());
    let mut server = server(&clock, &["appendfsync always", "florence.retry-delay-ms 4000"]);
    let url = pictures.url("flaky/3/sign.png");
    for key in ["stays", "renamed", "restarted"] {
        submit(&server, key, &url, &[]);
    }
    for key in ["stays", "renamed", "restarted"] {
        eventually("it is to be tried again", || (server.state(key) == "retrying").then_some(()));
    }
    clock.set(-HOUR);
    server.call::<()>(&["RENAME", "renamed", "new-name"]);
    ended(&server, "stays", "done");
    ended(&server, "new-name", "done");
    ended(&server, "restarted", "done");

    let url = pictures.url("status/503");
    submit(&server, "last", &url, &["RETRIES", "1"]);
    eventually("it is to be tried again", || (server.state("last") == "retrying").then_some(()));
    server.kill();
    clock.set(-2 * HOUR);
    server.restart();
    ended(&server, "last", "failed");
}
