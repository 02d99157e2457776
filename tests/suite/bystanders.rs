//! Keys that are not ours, jobs that others write, and databases that change under many jobs.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, call, eventually, picture};
use redis::{Cmd, Connection};

type Job = HashMap<String, Option<String>>;

/// A job as a client that knows our hashes writes it.
fn foreign(key: &str) -> Cmd {
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut write = redis::cmd("HSET");
    write.arg(key).arg("florence").arg(1).arg("state").arg("queued");
    write.arg("image").arg("DATA").arg("data").arg(bytes).arg("prompt").arg("<OCR>");
    write
}

fn words(text: &str) -> Cmd {
    let mut words = text.split(' ');
    let mut command = redis::cmd(words.next().unwrap());
    command.arg(words.collect::<Vec<_>>());
    command
}

fn in_transaction(connection: &mut Connection, commands: &[Cmd]) {
    let mut transaction = redis::pipe();
    transaction.atomic();
    for command in commands {
        transaction.add_command(command.clone());
    }
    transaction.exec(connection).unwrap();
}

/// Waits for a job without any command of ours, which could bring it to the server's mind.
fn assert_found(server: &Server, db: usize, key: &str) {
    assert_found_in(server, db, key, Duration::from_secs(10));
}

fn assert_found_in(server: &Server, db: usize, key: &str, longest: Duration) {
    let mut connection = server.connect_to(db);
    let start = Instant::now();
    eventually(&format!("{key} is found"), || {
        let state = call::<Option<String>>(&mut connection, &["HGET", key, "state"]).unwrap();
        (state.as_deref() == Some("done")).then_some(())
    });
    let taken = start.elapsed();
    assert!(taken < longest, "{key} was found after {taken:?}");
}

#[test]
fn jobs_that_others_write_are_found_however_they_come() {
    let server = Server::ready(&[]);
    let mut connection = server.connect();
    foreign("alone").exec(&mut connection).unwrap();
    assert_found(&server, 0, "alone");
    in_transaction(&mut connection, &[words("SET x y"), foreign("transaction")]);
    in_transaction(&mut connection, &[foreign("old-name"), words("RENAME old-name new-name")]);
    in_transaction(&mut connection, &[foreign("original"), words("COPY original copy")]);
    in_transaction(&mut connection, &[foreign("original-2"), words("COPY original-2 far DB 2")]);
    in_transaction(&mut connection, &[foreign("moved"), words("MOVE moved 1")]);
    // All its fields one by one, the last of which makes it a job.
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    for (field, value) in [
        ("data", &bytes[..]),
        ("prompt", b"<OCR>"),
        ("image", b"DATA"),
        ("state", b"queued"),
        ("florence", b"1"),
    ] {
        redis::cmd("HSET").arg("slow").arg(field).arg(value).exec(&mut connection).unwrap();
    }
    let script = "redis.call('HSET', KEYS[1], 'florence', 1, 'state', 'queued', 'image', 'DATA', \
                  'data', ARGV[1], 'prompt', '<OCR>')";
    redis::cmd("EVAL").arg(script).arg(1).arg("script").arg(&bytes).exec(&mut connection).unwrap();
    // As bytes of another server, where nobody works on it.
    let plain = Server::with(Settings { plain: true, ..Settings::default() });
    foreign("there").exec(&mut plain.connect()).unwrap();
    let dump: Vec<u8> = plain.call(&["DUMP", "there"]);
    redis::cmd("RESTORE").arg("restored").arg(0).arg(&dump).exec(&mut connection).unwrap();
    redis::cmd("SET").arg("replaced").arg("x").exec(&mut connection).unwrap();
    let mut restore = redis::cmd("RESTORE");
    restore.arg("replaced").arg(0).arg(&dump).arg("REPLACE").exec(&mut connection).unwrap();
    let mut elsewhere = server.connect_to(3);
    redis::cmd("RESTORE").arg("restored").arg(0).arg(&dump).exec(&mut elsewhere).unwrap();
    for key in ["transaction", "new-name", "original", "copy", "original-2", "slow"] {
        assert_found(&server, 0, key);
    }
    for (db, key) in
        [(0, "script"), (0, "restored"), (0, "replaced"), (1, "moved"), (2, "far"), (3, "restored")]
    {
        assert_found(&server, db, key);
    }
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn jobs_that_others_write_are_found_in_a_storm_of_other_keys() {
    const KEYS: usize = 200_000;
    const AT_ONCE: usize = 5000;
    let server = Server::ready(&[]);
    let mut connection = server.connect();
    for start in (0..KEYS).step_by(AT_ONCE) {
        let mut pipe = redis::pipe();
        for i in start..start + AT_ONCE {
            pipe.cmd("HSET").arg(format!("other:{i}")).arg("a").arg("b").ignore();
            if i % 50_000 == 25_000 {
                pipe.add_command(foreign(&format!("job:{}", i / 50_000))).ignore();
            }
        }
        pipe.exec(&mut connection).unwrap();
    }
    for i in 0..4 {
        // Some seconds, on a busy machine.
        assert_found_in(&server, 0, &format!("job:{i}"), Duration::from_secs(30));
    }
    // Many of ours among them: none is left.
    let mut pipe = redis::pipe();
    for i in 0..2000 {
        pipe.add_command(foreign(&format!("many:{i}"))).ignore();
    }
    pipe.exec(&mut connection).unwrap();
    eventually("all are done", || (server.stat("jobs_done") == 2004).then_some(()));
}

/// Long enough for whoever looks at keys to have looked.
const LOOKS: Duration = Duration::from_millis(2500);

/// A hash and a string, as RESTORE takes them.
fn dumps(server: &Server) -> [(&'static str, Vec<u8>); 2] {
    server.call::<()>(&["HSET", "of-hash", "a", "b"]);
    server.call::<()>(&["SET", "of-string", "x"]);
    [("hash", "of-hash"), ("string", "of-string")]
        .map(|(name, key)| (name, server.call::<Vec<u8>>(&["DUMP", key])))
}

#[test]
fn looking_at_keys_does_not_make_them_recent() {
    let server = Server::ready(&["maxmemory-policy allkeys-lru"]);
    let idle = |key: &str| server.call::<i64>(&["OBJECT", "IDLETIME", key]);
    for (name, dump) in dumps(&server) {
        let mut restore = redis::cmd("RESTORE");
        restore.arg(name).arg(0).arg(dump).arg("REPLACE").arg("IDLETIME").arg(1000);
        restore.exec(&mut server.connect()).unwrap();
    }
    server.call::<()>(&["HSET", "written", "a", "b"]);
    assert!(idle("hash") >= 1000 && idle("string") >= 1000);
    thread::sleep(LOOKS);
    for name in ["hash", "string"] {
        assert!(idle(name) >= 1000, "{name}: {}", idle(name));
    }
    eventually("it is as old as its writing", || (idle("written") >= 4).then_some(()));
}

#[test]
fn looking_at_keys_does_not_make_them_frequent() {
    let server = Server::ready(&["maxmemory-policy allkeys-lfu", "lfu-decay-time 0"]);
    let names: Vec<String> = (0..10).map(|i| format!("k{i}")).collect();
    for (kind, dump) in dumps(&server) {
        for (i, name) in names.iter().enumerate() {
            // A low one is raised by every look.
            let frequency = if i == 0 { 100 } else { 2 };
            let mut restore = redis::cmd("RESTORE");
            restore.arg(format!("{kind}:{name}")).arg(0).arg(&dump).arg("FREQ").arg(frequency);
            restore.exec(&mut server.connect()).unwrap();
        }
    }
    thread::sleep(LOOKS);
    for kind in ["hash", "string"] {
        for (i, name) in names.iter().enumerate() {
            let frequency: i64 = server.call(&["OBJECT", "FREQ", &format!("{kind}:{name}")]);
            assert_eq!(frequency, if i == 0 { 100 } else { 2 }, "{kind}:{name}");
        }
    }
}

#[test]
fn looking_at_keys_is_not_counted_and_expires_none() {
    const KEYS: usize = 100;
    let server = Server::ready(&[]);
    server.call::<()>(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]);
    let dumps = dumps(&server);
    server.call::<()>(&["CONFIG", "RESETSTAT"]);
    let mut pipe = redis::pipe();
    pipe.atomic();
    for i in 0..KEYS {
        pipe.cmd("HSET").arg(format!("stays:{i}")).arg("a").arg("b").ignore();
        pipe.cmd("HSET").arg(format!("gone:{i}")).arg("a").arg("b").ignore();
        pipe.cmd("DEL").arg(format!("gone:{i}")).ignore();
        pipe.cmd("HSET").arg(format!("late:{i}")).arg("a").arg("b").ignore();
        pipe.cmd("PEXPIRE").arg(format!("late:{i}")).arg(1).ignore();
        pipe.cmd("RESTORE").arg(format!("restored:{i}")).arg(0).arg(&dumps[i % 2].1).ignore();
        pipe.cmd("RENAME").arg(format!("restored:{i}")).arg(format!("renamed:{i}")).ignore();
        pipe.cmd("COPY").arg(format!("renamed:{i}")).arg(format!("copied:{i}")).ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    let counted = || ["keyspace_hits", "keyspace_misses"].map(|name| server.info(name));
    let before = counted();
    thread::sleep(LOOKS);
    // Each RENAME and COPY is a look of its own, within the transaction.
    assert_eq!(counted(), before);
    let plain = Server::with(Settings { plain: true, ..Settings::default() });
    for (key, dump) in [("of-hash", &dumps[0].1), ("of-string", &dumps[1].1)] {
        redis::cmd("RESTORE").arg(key).arg(0).arg(dump).exec(&mut plain.connect()).unwrap();
    }
    plain.call::<()>(&["CONFIG", "RESETSTAT"]);
    pipe.exec(&mut plain.connect()).unwrap();
    let without = ["keyspace_hits", "keyspace_misses"].map(|name| plain.info(name));
    assert_eq!(before, without, "hits and misses, with the module and without");
    // Redis 7.0 gives modules no way to look at a key that is past its time, and leave it.
    let text: String = server.call(&["INFO", "server"]);
    if !text.contains("redis_version:7.0.") {
        assert_eq!(server.info("expired_keys"), 0);
        assert_eq!(server.call::<usize>(&["DBSIZE"]), 2 + 4 * KEYS);
    }
}

const WAITING: usize = 50_000;
/// What a command on whole databases may take of the server.
const SHORT: Duration = Duration::from_millis(5);

/// A server with very many jobs that wait, and clients who wait for some of them.
fn crowded(pictures: &Pictures) -> (Server, Vec<thread::JoinHandle<Option<Job>>>) {
    const WAITERS: usize = 20;
    let server = Server::ready(&[]);
    let url = pictures.url("held/back/sign.png");
    for start in (0..WAITING).step_by(5000) {
        let mut pipe = redis::pipe();
        for i in start..start + 5000 {
            pipe.cmd("FLORENCE.SUBMIT").arg(format!("j{i}")).arg(&url).arg("<OCR>").ignore();
        }
        pipe.exec(&mut server.connect()).unwrap();
    }
    let waiters = (0..WAITERS).map(|i| {
        let mut connection = server.connect();
        let key = format!("j{}", i * 1000);
        thread::spawn(move || call(&mut connection, &["FLORENCE.WAIT", &key, "0"]).unwrap())
    });
    let waiters = waiters.collect();
    eventually("all wait", || (server.stat("waiters") == 20).then_some(()));
    (server, waiters)
}

/// The least that a command has taken in some tries: nothing else counts on a busy machine.
fn least(server: &Server, tries: usize, command: &[&str]) -> Duration {
    let once = |_| {
        server.call::<()>(&["CONFIG", "RESETSTAT"]);
        server.call::<()>(command);
        server.time_of(command[0])
    };
    (0..tries).map(once).min().unwrap()
}

#[test]
fn swapping_databases_full_of_jobs_takes_no_time() {
    let pictures = Pictures::serve();
    let (server, waiters) = crowded(&pictures);
    let taken = least(&server, 5, &["SWAPDB", "0", "1"]);
    assert!(taken < SHORT, "SWAPDB took {taken:?}");
    eventually("nobody waits for what is gone", || (server.stat("waiters") == 0).then_some(()));
    for waiter in waiters {
        waiter.join().unwrap();
    }
    // An odd number of swaps: the jobs are there now, all of them.
    let mut there = server.connect_to(1);
    assert_eq!(call::<usize>(&mut there, &["DBSIZE"]).unwrap(), WAITING);
    pictures.release("back");
    for key in ["j0", "j1", "j100"] {
        let job: Job = call(&mut there, &["FLORENCE.WAIT", key, "60"]).unwrap();
        assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
    }
    assert_eq!((server.stat("panics"), server.stat("leases_recovered")), (0, 0));
}

fn assert_flush_is_quick(flush: &[&str]) {
    let pictures = Pictures::serve();
    let (server, waiters) = crowded(&pictures);
    let taken = least(&server, 1, flush);
    // Once only: with some room for a busy machine.
    assert!(taken < 3 * SHORT, "{flush:?} took {taken:?}");
    for waiter in waiters {
        assert!(waiter.join().unwrap().is_none());
    }
    server.until_idle();
    foreign("afterwards").exec(&mut server.connect()).unwrap();
    assert_found(&server, 0, "afterwards");
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn flushing_a_database_full_of_jobs_takes_no_time() {
    assert_flush_is_quick(&["FLUSHDB", "ASYNC"]);
}

#[test]
fn flushing_all_databases_full_of_jobs_takes_no_time() {
    assert_flush_is_quick(&["FLUSHALL", "ASYNC"]);
}

#[test]
fn jobs_of_swapped_databases_get_their_own_answers() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let mut databases = [server.connect_to(0), server.connect_to(1)];
    let requests = [("sign.png", "<OCR>"), ("shapes.png", "<OD>")];
    for (connection, (name, prompt)) in databases.iter_mut().zip(requests) {
        let url = pictures.url(&format!("held/back/{name}"));
        call::<()>(connection, &["FLORENCE.SUBMIT", "running", &url, prompt]).unwrap();
        let later = ["FLORENCE.SUBMIT", "later", &pictures.url(name), prompt, "DELAY", "1500"];
        call::<()>(connection, &later).unwrap();
    }
    eventually("both run", || (server.stat("jobs_active") == 2).then_some(()));
    let waiters: Vec<_> = (0..2)
        .flat_map(|db| ["running", "later"].map(|key| (db, key)))
        .map(|(db, key)| {
            let mut connection = server.connect_to(db);
            thread::spawn(move || {
                call::<Option<Job>>(&mut connection, &["FLORENCE.WAIT", key, "60"]).unwrap()
            })
        })
        .collect();
    eventually("all wait", || (server.stat("waiters") == 4).then_some(()));
    server.call::<()>(&["SWAPDB", "0", "1"]);
    pictures.release("back");
    for (connection, (_, prompt)) in databases.iter_mut().rev().zip(requests) {
        for key in ["running", "later"] {
            let job: Job = call(connection, &["FLORENCE.WAIT", key, "30"]).unwrap();
            assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
            assert_eq!(job["prompt"].as_deref(), Some(prompt));
            assert!(job["result"].as_deref().unwrap().starts_with(&format!("{{\"{prompt}\"")));
        }
    }
    // Long before their time.
    eventually("nobody waits", || (server.stat("waiters") == 0).then_some(()));
    for waiter in waiters {
        waiter.join().unwrap();
    }
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn swapping_a_database_with_itself_wakes_nobody() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("held/back/sign.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "job", &url, "<OCR>"]);
    let mut connection = server.connect();
    let waiter = thread::spawn(move || {
        call::<Option<Job>>(&mut connection, &["FLORENCE.WAIT", "job", "30"]).unwrap()
    });
    eventually("somebody waits", || (server.stat("waiters") == 1).then_some(()));
    server.call::<()>(&["SWAPDB", "0", "0"]);
    pictures.release("back");
    assert_eq!(waiter.join().unwrap().unwrap()["state"].as_deref(), Some("done"));
}
