//! Downloads: how many at a time, from whom, and who waits for them.

use std::{
    collections::{HashMap, HashSet},
    net::TcpListener,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, call, eventually, picture};

type Job = HashMap<String, Option<String>>;

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url, "<OCR>"], rest].concat());
}

fn submit_bytes(server: &Server, key: &str) {
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(key).arg("DATA").arg(std::fs::read(picture("sign.png")).unwrap()).arg("<OCR>");
    submit.exec(&mut server.connect()).unwrap();
}

fn assert_ends(server: &Server, key: &str, state: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "20"]);
    let job = job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)));
    assert_eq!(job["state"].as_deref(), Some(state), "{key}: {job:?}");
    job
}

/// How many of these jobs are in a state.
fn count(server: &Server, keys: &[String], state: &str) -> usize {
    keys.iter().filter(|key| server.state(key) == state).count()
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{prefix}:{i}")).collect()
}

fn set(server: &Server, name: &str, value: &str) {
    server.call::<()>(&["CONFIG", "SET", &format!("florence.{name}"), value]);
}

#[test]
fn slow_hosts_do_not_hold_up_pictures_that_are_there() {
    let (server, pictures) = (Server::ready(&["florence.prepare-threads 1"]), Pictures::serve());
    let others = [Pictures::serve(), Pictures::serve()];
    for (i, key) in names("slow", 30).iter().enumerate() {
        let host = [&pictures, &others[0], &others[1]][i % 3];
        submit(&server, key, &host.url("trickle/shapes.png"), &["TIMEOUT", "600000"]);
    }
    eventually("they are asked for", || (pictures.hits() > 0).then_some(()));
    for key in names("bytes", 5) {
        submit_bytes(&server, &key);
        assert_ends(&server, &key, "done");
    }
    assert_eq!(count(&server, &names("slow", 30), "done"), 0);
    assert_eq!(
        server.call::<i64>(&[&["FLORENCE.CANCEL"], &as_strs(&names("slow", 30))[..]].concat()),
        30
    );
    eventually("they are broken off", || (server.stat("jobs_active") == 0).then_some(()));
}

fn as_strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

#[test]
fn one_host_gets_few_downloads_at_a_time() {
    let server = Server::ready(&["florence.max-downloads-per-host 2"]);
    let (slow, other) = (Pictures::serve(), Pictures::serve());
    let keys = names("j", 8);
    for key in &keys {
        submit(&server, key, &slow.url("held/back/sign.png"), &["NOCACHE"]);
    }
    eventually("two are asked for", || (slow.at_once() == 2).then_some(()));
    // Another port is another host; and bytes wait for nobody's.
    submit(&server, "other", &other.url("sign.png"), &[]);
    assert_ends(&server, "other", "done");
    submit_bytes(&server, "bytes");
    assert_ends(&server, "bytes", "done");
    assert_eq!(["fetching", "queued"].map(|state| count(&server, &keys, state)), [2, 6]);
    let attempts: Vec<_> = keys.iter().map(|key| server.job(key)["attempts"].clone()).collect();
    assert_eq!(attempts.iter().filter(|tried| tried.as_deref() == Some("0")).count(), 6);
    slow.release("back");
    for key in &keys {
        assert_ends(&server, key, "done");
    }
    assert_eq!(slow.most_at_once(), 2);
}

#[test]
fn a_higher_limit_of_hosts_counts_at_once() {
    let server = Server::ready(&["florence.max-downloads-per-host 1"]);
    let pictures = Pictures::serve();
    let keys = names("j", 10);
    for key in &keys {
        submit(&server, key, &pictures.url("held/back/sign.png"), &[]);
    }
    eventually("one is asked for", || (pictures.at_once() == 1).then_some(()));
    set(&server, "max-downloads-per-host", "4");
    eventually("three more are asked for", || (pictures.at_once() == 4).then_some(()));
    // Jobs that are there keep their place when there is less room.
    set(&server, "max-downloads-per-host", "1");
    submit_bytes(&server, "bytes");
    assert_ends(&server, "bytes", "done");
    assert_eq!(pictures.most_at_once(), 4);
    assert_eq!(count(&server, &keys, "fetching"), 4);
    pictures.release("back");
    for key in &keys {
        assert_ends(&server, key, "done");
    }
}

#[test]
fn jobs_that_wait_for_a_host_keep_their_order_and_know_it() {
    let server = Server::ready(&["florence.max-downloads-per-host 1", "florence.max-batch 1"]);
    let pictures = Pictures::serve();
    submit(&server, "warm", &pictures.url("sign.png"), &[]);
    assert_ends(&server, "warm", "done");
    submit(&server, "first", &pictures.url("held/back/sign.png"), &[]);
    eventually("it is fetched", || (server.state("first") == "fetching").then_some(()));
    let waiting = [("low", "0"), ("lowest", "0"), ("high", "9"), ("middle", "5")];
    for (key, priority) in waiting {
        // Slow enough for the starts to differ by milliseconds.
        let url = pictures.url("slow/50/sign.png");
        submit(&server, key, &url, &["PRIORITY", priority]);
    }
    let order = ["high", "middle", "low", "lowest"];
    let number = |key: &str, field: &str| -> i64 {
        server.job(key)[field].as_deref().map_or(-1, |text| text.parse().unwrap())
    };
    assert_eq!(order.map(|key| number(key, "position")), [0, 1, 2, 3]);
    let etas = order.map(|key| number(key, "eta_ms"));
    assert!(etas[0] > 0 && etas[0] < etas[3] && etas.is_sorted(), "{etas:?}");
    let listed: Vec<HashMap<String, String>> = server.call(&["FLORENCE.JOBS", "STATE", "queued"]);
    let listed: Vec<&str> = listed.iter().map(|job| job["id"].as_str()).collect();
    assert_eq!(listed, order);
    pictures.release("back");
    for key in order {
        assert_ends(&server, key, "done");
    }
    let started = order.map(|key| number(key, "started_at"));
    assert!(started.windows(2).all(|pair| pair[0] < pair[1]), "{started:?}");
}

#[test]
fn jobs_that_wait_for_a_host_can_end_and_change_there() {
    let server = Server::ready(&["florence.max-downloads-per-host 1"]);
    let (pictures, other) = (Pictures::serve(), Pictures::serve());
    let url = pictures.url("held/back/sign.png");
    submit(&server, "first", &url, &[]);
    eventually("it is asked for", || (pictures.at_once() == 1).then_some(()));
    for key in ["cancelled", "deleted", "renamed", "moved", "last"] {
        submit(&server, key, &url, &[]);
    }
    submit(&server, "expired", &url, &["EXPIRES", "300"]);
    // The time of an attempt does not begin before it.
    submit(&server, "patient", &url, &["TIMEOUT", "2000", "RETRIES", "0"]);
    assert_ends(&server, "expired", "expired");
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "cancelled"]), 1);
    server.call::<()>(&["DEL", "deleted"]);
    server.call::<()>(&["RENAME", "renamed", "new-name"]);
    // A picture from somewhere else need not wait for this host any more.
    server.call::<()>(&["HSET", "moved", "image", &other.url("sign.png")]);
    assert_ends(&server, "moved", "done");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(["new-name", "last", "patient"].map(|key| server.state(key)), ["queued"; 3]);
    pictures.release("back");
    for key in ["first", "new-name", "last", "patient"] {
        assert_ends(&server, key, "done");
    }
    assert_eq!(pictures.most_at_once(), 1);
    // Each asked once: neither the cancelled nor the deleted one did.
    assert_eq!((pictures.hits(), other.hits()), (4, 1));
}

#[test]
fn a_failed_download_gives_its_place_to_the_next() {
    let lines = ["florence.max-downloads-per-host 1", "florence.retry-delay-ms 600000"];
    let (server, pictures) = (Server::ready(&lines), Pictures::serve());
    submit(&server, "later", &pictures.url("status/503"), &[]);
    submit(&server, "never", &pictures.url("status/404"), &[]);
    submit(&server, "late", &pictures.url("slow/60000/x"), &["TIMEOUT", "300", "RETRIES", "0"]);
    submit(&server, "next", &pictures.url("sign.png"), &[]);
    assert_ends(&server, "next", "done");
    for key in ["never", "late"] {
        assert_ends(&server, key, "failed");
    }
    assert_eq!(server.state("later"), "retrying");
    assert_eq!(pictures.hits(), 4);
}

#[test]
fn one_user_gets_few_downloads_at_a_time() {
    let server = Server::ready(&["florence.max-downloads-per-user 2"]);
    let hosts: Vec<Pictures> = (0..5).map(|_| Pictures::serve()).collect();
    for user in ["alice", "bob"] {
        server.add_user(user);
    }
    let keys = names("alice", hosts.len());
    let mut alice = server.connect_as("alice", "pw");
    for (key, host) in keys.iter().zip(&hosts) {
        let url = host.url("held/back/sign.png");
        call::<()>(&mut alice, &["FLORENCE.SUBMIT", key, &url, "<OCR>"]).unwrap();
    }
    let at_once = || hosts.iter().map(Pictures::at_once).sum::<usize>();
    eventually("two are asked for", || (at_once() == 2).then_some(()));
    let url = hosts[0].url("sign.png");
    let mut bob = server.connect_as("bob", "pw");
    call::<()>(&mut bob, &["FLORENCE.SUBMIT", "bob", &url, "<OCR>"]).unwrap();
    assert_ends(&server, "bob", "done");
    assert_eq!((at_once(), count(&server, &keys, "queued")), (2, 3));
    set(&server, "max-downloads-per-user", "4");
    eventually("two more are asked for", || (at_once() == 4).then_some(()));
    submit_bytes(&server, "bytes");
    assert_ends(&server, "bytes", "done");
    assert_eq!((at_once(), count(&server, &keys, "queued")), (4, 1));
    for host in &hosts {
        host.release("back");
    }
    for key in &keys {
        assert_ends(&server, key, "done");
    }
}

#[test]
fn all_hosts_together_get_as_many_downloads_as_there_are_threads() {
    let server = Server::ready(&["florence.max-downloads 3"]);
    let hosts: Vec<Pictures> = (0..6).map(|_| Pictures::serve()).collect();
    let keys = names("j", hosts.len());
    for (key, host) in keys.iter().zip(&hosts) {
        submit(&server, key, &host.url("held/back/sign.png"), &[]);
    }
    let at_once = || hosts.iter().map(Pictures::at_once).sum::<usize>();
    eventually("three are asked for", || (at_once() == 3).then_some(()));
    submit_bytes(&server, "bytes");
    assert_ends(&server, "bytes", "done");
    assert_eq!((at_once(), count(&server, &keys, "queued")), (3, 3));
    for host in &hosts {
        host.release("back");
    }
    for key in &keys {
        assert_ends(&server, key, "done");
    }
    let error = server.error(&["CONFIG", "SET", "florence.max-downloads", "5"]);
    assert!(error.contains("immutable"), "{error}");
}

#[test]
fn downloads_have_limits_by_default() {
    let server = Server::ready(&[]);
    for (name, value) in [
        ("max-downloads", "64"),
        ("max-downloads-per-host", "16"),
        ("max-downloads-per-user", "48"),
    ] {
        let name = format!("florence.{name}");
        let reply: HashMap<String, String> = server.call(&["CONFIG", "GET", &name]);
        assert_eq!(reply.get(&name).map(String::as_str), Some(value), "{name}");
    }
    let hosts: Vec<Pictures> = (0..4).map(|_| Pictures::serve()).collect();
    let keys = names("j", 80);
    for (i, key) in keys.iter().enumerate() {
        submit(&server, key, &hosts[i % 4].url("held/back/sign.png"), &[]);
    }
    // Not as the hosts count: a busy one may take a connection long after it was made.
    eventually("all that one user may is asked for, and no more", || {
        let counts = ["fetching", "queued"].map(|state| count(&server, &keys, state));
        (counts == [48, 32]).then_some(())
    });
    assert!(hosts.iter().all(|host| host.most_at_once() <= 16));
    submit_bytes(&server, "bytes");
    assert_ends(&server, "bytes", "done");
}

/// Asks many hosts where nobody listens, or that are refused; the jobs are gone then.
fn ask_each(server: &Server, numbers: std::ops::Range<usize>, url: impl Fn(usize) -> String) {
    let (failed, count) = (server.stat("jobs_failed"), i64::try_from(numbers.len()).unwrap());
    let mut pipe = redis::pipe();
    for i in numbers.clone() {
        let submit = pipe.cmd("FLORENCE.SUBMIT").arg(i).arg(url(i)).arg("<OCR>");
        submit.arg("RETRIES").arg(0).ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    eventually("all have failed", || (server.stat("jobs_failed") == failed + count).then_some(()));
    redis::cmd("DEL").arg(numbers.collect::<Vec<_>>()).exec(&mut server.connect()).unwrap();
}

#[test]
fn a_thousand_hosts_are_remembered_and_not_those_that_are_refused() {
    /// What the allocator may keep, in KiB.
    const NOISE: u64 = 12 << 10;
    let server = Server::ready(&["florence.publish no"]);
    let hosts = || server.call::<Vec<HashMap<String, redis::Value>>>(&["FLORENCE.HOSTS"]);
    let nobody = |i: usize| format!("http://127.1.{}.{}:1/x.png", i / 250, i % 250 + 1);
    let inner = |i: usize| format!("http://10.1.{}.{}:1/x.png", i / 250, i % 250 + 1);
    ask_each(&server, 0..100, inner);
    assert!(hosts().is_empty(), "refused hosts are kept: {:?}", hosts());
    ask_each(&server, 0..500, nobody);
    assert_eq!(hosts().len(), 500);
    ask_each(&server, 500..1500, nobody);
    let before = server.usage()[0];
    for i in 1..5 {
        ask_each(&server, i * 1000 + 500..i * 1000 + 1500, nobody);
        ask_each(&server, i * 1000 + 500..i * 1000 + 1500, inner);
    }
    let rows = hosts().len();
    assert!((1..=1000).contains(&rows), "{rows} hosts");
    let grown = server.usage()[0].saturating_sub(before);
    assert!(grown < NOISE, "the server has grown by {grown} KiB");
    // A host that is new is found among them.
    let pictures = Pictures::serve();
    for i in 0..5 {
        let key = format!("last:{i}");
        submit(&server, &key, &pictures.url("sign.png"), &["NOCACHE"]);
        assert_ends(&server, &key, "done");
    }
    assert!(format!("{:?}", hosts()).contains("127.0.0.1"), "the last host is missing");
}

/// A server whose machine has a metadata server that takes connections and says nothing.
fn with_silent_metadata(lines: &[&str]) -> (Server, TcpListener) {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let lines = [lines, &["florence.buckets gs://b", "florence.prepare-threads 1"]].concat();
    let mut settings = Settings::lines(&lines);
    settings.env.push(("GCE_METADATA_HOST", silent.local_addr().unwrap().to_string()));
    let server = Server::with(settings);
    server.wait_for_model();
    (server, silent)
}

#[test]
fn a_silent_metadata_server_ends_in_time() {
    let (server, silent) = with_silent_metadata(&["florence.fetch-timeout-ms 1000"]);
    let start = Instant::now();
    submit(&server, "once", "gs://b/x.png", &["RETRIES", "0"]);
    let connection = silent.accept().unwrap();
    assert_ends(&server, "once", "failed");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    drop(connection);
    submit(&server, "again", "gs://b/x.png", &["RETRIES", "1"]);
    let job = assert_ends(&server, "again", "failed");
    assert_eq!(job["attempts"].as_deref(), Some("2"), "{job:?}");
}

#[test]
fn a_silent_metadata_server_holds_nobody_up() {
    let (server, silent) = with_silent_metadata(&["florence.fetch-timeout-ms 600000"]);
    let pictures = Pictures::serve();
    let keys = names("held", 5);
    for key in &keys {
        submit(&server, key, "gs://b/x.png", &[]);
    }
    // Its time is shorter than that of a download.
    submit(&server, "short", "gs://b/y.png", &["TIMEOUT", "1000", "RETRIES", "0"]);
    let connection = silent.accept().unwrap();
    submit_bytes(&server, "bytes");
    assert_ends(&server, "bytes", "done");
    submit(&server, "url", &pictures.url("sign.png"), &[]);
    assert_ends(&server, "url", "done");
    let short = assert_ends(&server, "short", "failed");
    assert!(short["error"].as_deref().unwrap().contains("TIMEOUT"), "{short:?}");
    let working: HashSet<String> = keys.iter().map(|key| server.state(key)).collect();
    assert_eq!(working, HashSet::from(["fetching".to_owned()]));
    let cancel = [&["FLORENCE.CANCEL"], &as_strs(&keys)[..]].concat();
    assert_eq!(server.call::<i64>(&cancel), 5);
    let start = Instant::now();
    eventually("nobody works on them", || (server.stat("jobs_active") == 0).then_some(()));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(connection);
}
