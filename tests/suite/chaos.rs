//! Servers that are killed every few seconds while jobs come in: none is lost, each ends once. Some
//! are chains, some tell their texts to a stream, some ask a model that is exchanged meanwhile.
//!
//! `make chaos` runs 10,200 jobs in all; `FLORENCE_CHAOS_JOBS` says how many.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, eventually, path};
use redis::{Client, Connection};

/// How often a server is killed.
const PERIOD: Duration = Duration::from_millis(2500);
/// Submits a second, so that a run sees many kills.
const RATE: f64 = 80.0;

/// Jobs of one test.
pub(crate) fn jobs() -> usize {
    let wanted = std::env::var("FLORENCE_CHAOS_JOBS").ok();
    wanted.map_or(600, |wanted| wanted.parse().expect("a number of jobs")) / 3
}

fn connect(port: &AtomicU16) -> Option<Connection> {
    let url = format!("redis://127.0.0.1:{}", port.load(Ordering::SeqCst));
    Client::open(url).unwrap().get_connection_with_timeout(Duration::from_millis(500)).ok()
}

/// What a run is checked by.
#[derive(Default)]
struct Tally {
    accepted: AtomicUsize,
    has_ended: AtomicBool,
}

/// Submits `count` jobs, each until it is accepted; a lost reply is asked for again.
fn submit(port: &AtomicU16, url: &str, count: usize, replicas: usize, tally: &Tally) {
    let mut connection = None;
    let start = Instant::now();
    for i in 0..count {
        let due = start + Duration::from_secs_f64(i as f64 / RATE);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        loop {
            if connection.is_none() {
                connection = connect(port);
            }
            let accepted = connection.as_mut().is_some_and(|connection| {
                let mut command = redis::cmd("FLORENCE.SUBMIT");
                // A few hundred different requests: some are computed, most come from the cache.
                let tokens = 4 + i % 200;
                command.arg(format!("job:{i}")).arg(url).arg("<OD>").arg(kind(i));
                command.arg("MAXTOKENS").arg(tokens).arg("RETRIES").arg(20);
                let is_stored = command.query::<String>(connection).is_ok();
                if !is_stored || replicas == 0 {
                    return is_stored;
                }
                let mut wait = redis::cmd("WAIT");
                let confirmed = wait.arg(replicas).arg(1000).query::<usize>(connection);
                confirmed.is_ok_and(|confirmed| confirmed >= replicas)
            });
            if accepted {
                tally.accepted.fetch_add(1, Ordering::SeqCst);
                break;
            }
            connection = None;
            thread::sleep(Duration::from_millis(20));
        }
    }
    tally.has_ended.store(true, Ordering::SeqCst);
}

/// What is special about the job of a number.
fn kind(job: usize) -> &'static [&'static str] {
    match job % 4 {
        0 => &[],
        1 => &["EACH", "<REGION_TO_CATEGORY>"],
        2 => &["TOKENS", "texts"],
        _ => &["MODEL", "other"],
    }
}

/// The embedded model's files.
fn tiny() -> String {
    path("models/tiny").display().to_string()
}

/// Puts another model of the same name in the place of one, under its jobs.
fn exchange(server: &Server) {
    server.call::<()>(&["FLORENCE.MODEL", "LOAD", "other", &tiny()]);
}

/// The unfinished jobs that were tried. What a server dies on twice is given up, as it should be: the
/// next kill waits for their ends.
fn tried(server: &Server) -> Vec<String> {
    let jobs: Vec<HashMap<String, String>> = server.call(&["FLORENCE.JOBS", "COUNT", "100000"]);
    let keys = jobs.into_iter().map(|mut job| job.remove("id").unwrap());
    keys.filter(|key| server.job(key)["attempts"].as_deref() != Some("0")).collect()
}

fn wait_for_ends(server: &Server, keys: &[String]) {
    for key in keys {
        eventually("what was tried ends", || {
            ["done", "failed"].contains(&server.state(key).as_str()).then_some(())
        });
    }
}

/// Every accepted job has ended, and the stream has heard of each end once.
fn check(name: &str, server: &Server, count: usize, kills: usize, time: Duration) {
    let mut states: HashMap<String, usize> = HashMap::new();
    for i in 0..count {
        let key = format!("job:{i}");
        let state = eventually("the job ends", || {
            let state = server.job(&key).remove("state").flatten().unwrap_or("lost".to_owned());
            ["done", "failed", "lost"].contains(&state.as_str()).then_some(state)
        });
        *states.entry(state).or_default() += 1;
    }
    let entries: Vec<(String, HashMap<String, String>)> =
        server.call(&["XRANGE", "ended", "-", "+"]);
    let mut ends: HashMap<&str, usize> = HashMap::new();
    for (_, entry) in &entries {
        *ends.entry(entry["id"].as_str()).or_default() += 1;
    }
    let twice = ends.values().filter(|ends| **ends > 1).count();
    println!(
        "chaos, {name}: {count} jobs, {kills} kills in {:.0} s: {states:?}, {twice} ended twice",
        time.as_secs_f64()
    );
    assert_eq!(states, HashMap::from([("done".to_owned(), count)]), "{name}");
    assert_eq!((ends.len(), twice), (count, 0), "{name}");
    check_texts(server, count);
}

/// Of each job that tells its text, the last attempt has told all of it, and its end once.
fn check_texts(server: &Server, count: usize) {
    let entries: Vec<(String, HashMap<String, String>)> =
        server.call(&["XRANGE", "texts", "-", "+"]);
    let mut told: HashMap<&str, (HashMap<&str, String>, Vec<&str>)> = HashMap::new();
    for (_, entry) in &entries {
        let (pieces, ends) = told.entry(&entry["job"]).or_default();
        match entry.get("text") {
            Some(text) => *pieces.entry(&entry["attempt"]).or_default() += text,
            None => ends.push(&entry["attempt"]),
        }
    }
    for i in (0..count).filter(|i| kind(*i).contains(&"TOKENS")) {
        let key = format!("job:{i}");
        let (job, (pieces, ends)) = (server.job(&key), &told[key.as_str()]);
        assert_eq!(ends.len(), 1, "{key}: {ends:?}");
        assert_eq!(pieces.get(ends[0]), job["text"].as_ref(), "{key}: {job:?}");
    }
}

fn settings(lines: &[&str]) -> Settings {
    let models = [
        format!("florence.model {}", tiny()),
        format!("florence.models other={}", tiny()),
        format!("florence.model-roots {}", tiny()),
    ];
    let all = [
        "florence.stream ended",
        "florence.stream-length 1000000",
        "florence.tokens-length 1000000",
        "florence.keep-packed no",
    ];
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    Settings::lines(&[lines, &all, &models].concat())
}

/// Kills a server with an append-only file again and again.
fn with_appendfsync(policy: &str) {
    let (count, pictures) = (jobs(), Pictures::serve());
    let line = format!("appendfsync {policy}");
    let mut server = Server::with(settings(&["appendonly yes", &line]));
    let (port, tally) = (Arc::new(AtomicU16::new(server.port)), Arc::new(Tally::default()));
    let client = {
        let (port, tally, url) =
            (Arc::clone(&port), Arc::clone(&tally), pictures.url("shapes.png"));
        thread::spawn(move || submit(&port, &url, count, 0, &tally))
    };
    let (start, mut kills, mut hit) = (Instant::now(), 0, Vec::new());
    while !tally.has_ended.load(Ordering::SeqCst) {
        thread::sleep(PERIOD);
        wait_for_ends(&server, &hit);
        exchange(&server);
        server.kill();
        kills += 1;
        server.restart();
        hit = tried(&server);
    }
    client.join().unwrap();
    assert_eq!(tally.accepted.load(Ordering::SeqCst), count);
    check(&format!("appendfsync {policy}"), &server, count, kills, start.elapsed());
}

#[test]
fn kills_lose_nothing_with_appendfsync_always() {
    with_appendfsync("always");
}

#[test]
fn kills_lose_nothing_that_reached_the_kernel_with_appendfsync_everysec() {
    with_appendfsync("everysec");
}

#[test]
fn failovers_lose_nothing_that_a_replica_has_confirmed() {
    let (count, pictures) = (jobs(), Pictures::serve());
    let (mut master, mut replica) = (Server::with(settings(&[])), Server::with(settings(&[])));
    replica.follow(&master);
    let (port, tally) = (Arc::new(AtomicU16::new(master.port)), Arc::new(Tally::default()));
    let client = {
        let (port, tally, url) =
            (Arc::clone(&port), Arc::clone(&tally), pictures.url("shapes.png"));
        thread::spawn(move || submit(&port, &url, count, 1, &tally))
    };
    let (start, mut kills, mut hit) = (Instant::now(), 0, Vec::new());
    while !tally.has_ended.load(Ordering::SeqCst) {
        thread::sleep(PERIOD);
        wait_for_ends(&master, &hit);
        exchange(&master);
        master.kill();
        kills += 1;
        replica.call::<()>(&["REPLICAOF", "NO", "ONE"]);
        hit = tried(&replica);
        port.store(replica.port, Ordering::SeqCst);
        std::mem::swap(&mut master, &mut replica);
        // The dead one comes back empty, as the new master's replica.
        replica.restart();
        replica.follow(&master);
    }
    client.join().unwrap();
    check("replica promoted", &master, count, kills, start.elapsed());
}
