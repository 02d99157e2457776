//! Crashes, replicas, migration, flushes: no job is lost, none is answered twice.

use std::{
    collections::HashMap,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, call, eventually, picture};

type Job = HashMap<String, Option<String>>;

fn finished(server: &Server, key: &str) -> Job {
    let job: Job = server.call(&["FLORENCE.WAIT", key, "60"]);
    assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
    job
}

/// Waits until a job is worked on. Its picture is held back: it stays so until the test goes on.
fn fetching(server: &Server, key: &str) {
    eventually(&format!("{key} is worked on"), || (server.state(key) == "fetching").then_some(()));
}

/// Somebody who waits for a job already.
fn waiter(server: &Server, key: &'static str) -> JoinHandle<Option<Job>> {
    let mut connection = server.connect();
    let waiter =
        thread::spawn(move || call(&mut connection, &["FLORENCE.WAIT", key, "60"]).unwrap());
    eventually("it waits", || (server.stat("waiters") == 1).then_some(()));
    waiter
}

#[test]
fn a_crash_in_mid_job_loses_nothing() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "appendfsync always"];
    let mut server = Server::with(Settings::lines(&lines));
    server.call::<()>(&["FLORENCE.SUBMIT", "held", &pictures.url("held/go/sign.png"), "<OCR>"]);
    for i in 0..10 {
        let url = pictures.url("shapes.png");
        server.call::<()>(&["FLORENCE.SUBMIT", &format!("j{i}"), &url, "<OD>"]);
    }
    fetching(&server, "held");
    server.kill();
    pictures.release("go");
    server.restart();
    for i in 0..10 {
        finished(&server, &format!("j{i}"));
    }
    let held = finished(&server, "held");
    assert_eq!(held["attempts"].as_deref(), Some("2"));
}

#[test]
fn a_job_that_the_server_died_on_twice_is_given_up() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "appendfsync always"];
    let mut server = Server::with(Settings::lines(&lines));
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("held/never/sign.png"), "<OCR>"]);
    for attempt in 1..=2 {
        let attempt = Some(attempt.to_string());
        eventually("an attempt begins", || (server.job("j")["attempts"] == attempt).then_some(()));
        server.kill();
        server.restart();
    }
    let job: Job = server.call(&["FLORENCE.WAIT", "j", "30"]);
    assert!(job["error"].as_deref().unwrap().contains("\"CRASH\""), "{job:?}");
}

#[test]
fn a_job_that_ends_the_server_takes_no_other_along() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "appendfsync always"];
    let mut server = Server::with(Settings::lines(&lines));
    let innocent = pictures.url("held/go/sign.png");
    for key in ["a", "b", "c"] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &innocent, "<OCR>"]);
    }
    let poison = pictures.url("held/never/sign.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "poison", &poison, "<OCR>"]);
    for key in ["a", "b", "c", "poison"] {
        fetching(&server, key);
    }
    server.kill();
    pictures.release("go");
    server.restart();
    eventually("its turn comes again", || {
        (server.job("poison")["attempts"].as_deref() == Some("2")).then_some(())
    });
    assert_eq!(server.stat("jobs_active"), 1);
    server.kill();
    server.restart();
    for key in ["a", "b", "c"] {
        finished(&server, key);
    }
    let job: Job = server.call(&["FLORENCE.WAIT", "poison", "30"]);
    assert!(job["error"].as_deref().unwrap().contains("\"CRASH\""), "{job:?}");
}

#[test]
fn a_promoted_replica_runs_the_pending_jobs() {
    let pictures = Pictures::serve();
    let mut master = Server::with(Settings::lines(&["florence.max-downloads 1"]));
    let replica = Server::start();
    replica.follow(&master);
    master.call::<()>(&["FLORENCE.SUBMIT", "held", &pictures.url("held/go/sign.png"), "<OCR>"]);
    let url = pictures.url("shapes.png");
    for i in 0..5 {
        master.call::<()>(&["FLORENCE.SUBMIT", &format!("j{i}"), &url, "<OD>"]);
    }
    eventually("the replica has them", || (replica.stat("jobs_waiting") >= 5).then_some(()));
    // A replica only watches.
    assert_eq!(replica.stat("jobs_done"), 0);
    let refused = replica.error(&["FLORENCE.SUBMIT", "x", &url, "<OD>"]);
    assert!(refused.starts_with("READONLY"), "{refused}");
    master.kill();
    pictures.release("go");
    replica.call::<()>(&["REPLICAOF", "NO", "ONE"]);
    finished(&replica, "held");
    for i in 0..5 {
        finished(&replica, &format!("j{i}"));
    }
}

#[test]
fn a_master_that_is_terminated_leaves_its_replica_no_suspects() {
    let pictures = Pictures::serve();
    let (mut master, replica) = (Server::start(), Server::start());
    replica.follow(&master);
    let url = pictures.url("held/go/sign.png");
    for key in ["a", "b", "c"] {
        master.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OCR>"]);
        fetching(&master, key);
    }
    // While a replica lags the server pauses all writes, ours too.
    eventually("the replica is in step", || {
        let info: String = master.call(&["INFO", "replication"]);
        let number = |name: &str| {
            let (_, rest) = info.split_once(name)?;
            rest.split([',', '\r']).next()?.parse::<u64>().ok()
        };
        (number(",offset=")? == number("master_repl_offset:")?).then_some(())
    });
    master.terminate();
    replica.call::<()>(&["REPLICAOF", "NO", "ONE"]);
    // Suspects would be one at a time.
    eventually("all are at work again", || (replica.stat("jobs_active") == 3).then_some(()));
    pictures.release("go");
    for key in ["a", "b", "c"] {
        finished(&replica, key);
    }
}

#[test]
fn a_full_synchronisation_replaces_the_jobs_however_it_is_loaded() {
    let pictures = Pictures::serve();
    let url = pictures.url("shapes.png");
    for load in ["disabled", "on-empty-db", "swapdb"] {
        let mut master = Server::start();
        let replica = Server::with(Settings::lines(&[&format!("repl-diskless-load {load}")]));
        for (server, key) in [(&master, "theirs"), (&replica, "own")] {
            server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OD>", "DELAY", "600000"]);
        }
        replica.follow(&master);
        let known = || -> Vec<String> {
            let jobs: Vec<HashMap<String, String>> = replica.call(&["FLORENCE.JOBS"]);
            jobs.into_iter().map(|mut job| job.remove("id").unwrap()).collect()
        };
        assert_eq!(known(), ["theirs"], "{load}");
        master.kill();
        replica.call::<()>(&["REPLICAOF", "NO", "ONE"]);
        assert_eq!(known(), ["theirs"], "{load}");
        assert_eq!(replica.call::<i64>(&["FLORENCE.CANCEL", "theirs", "own"]), 1);
    }
}

#[test]
fn wait_works_on_a_replica() {
    let pictures = Pictures::serve();
    let (master, replica) = (Server::start(), Server::start());
    replica.follow(&master);
    master.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("held/go/sign.png"), "<OCR>"]);
    eventually("the job is there", || (replica.call::<i64>(&["EXISTS", "j"]) == 1).then_some(()));
    let waiter = waiter(&replica, "j");
    pictures.release("go");
    let on_replica = waiter.join().unwrap().unwrap();
    assert_eq!(on_replica["state"].as_deref(), Some("done"), "{on_replica:?}");
    assert_eq!(on_replica["result"], finished(&master, "j")["result"]);
}

#[test]
fn renamed_copied_and_restored_jobs_run() {
    let pictures = Pictures::serve();
    let server = Server::start();
    let submit = |key: &str| {
        let url = pictures.url(&format!("held/{key}/sign.png"));
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OCR>"]);
        fetching(&server, key);
    };
    submit("a");
    server.call::<()>(&["RENAME", "a", "b"]);
    pictures.release("a");
    finished(&server, "b");
    submit("c");
    server.call::<i64>(&["COPY", "c", "d"]);
    pictures.release("c");
    finished(&server, "c");
    finished(&server, "d");
    submit("e");
    let mut connection = server.connect();
    let dump: Vec<u8> = redis::cmd("DUMP").arg("e").query(&mut connection).unwrap();
    let _: () = redis::cmd("RESTORE").arg("f").arg(0).arg(dump).query(&mut connection).unwrap();
    pictures.release("e");
    finished(&server, "f");
}

#[test]
fn a_reload_of_the_data_set_resumes_its_jobs() {
    let pictures = Pictures::serve();
    let server = Server::start();
    for i in 0..5 {
        let url = pictures.url("held/go/sign.png");
        server.call::<()>(&["FLORENCE.SUBMIT", &format!("j{i}"), &url, "<OCR>"]);
    }
    // By as many as there are threads for it; the last one waits.
    eventually("work begins", || (server.stat("jobs_active") == 4).then_some(()));
    server.call::<()>(&["DEBUG", "RELOAD"]);
    pictures.release("go");
    for i in 0..5 {
        finished(&server, &format!("j{i}"));
    }
}

#[test]
fn answers_wait_while_writes_are_paused() {
    let pictures = Pictures::serve();
    let mut server = Server::start();
    server.wait_for_model();
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("held/go/sign.png"), "<OCR>"]);
    fetching(&server, "j");
    server.call::<()>(&["CLIENT", "PAUSE", "60000", "WRITE"]);
    let waiter = waiter(&server, "j");
    pictures.release("go");
    eventually("the model has answered", || (server.stat("cache_misses") == 1).then_some(()));
    // Several looks of the thread that would store the answer.
    thread::sleep(Duration::from_millis(500));
    assert!(server.is_alive());
    assert_eq!(server.state("j"), "fetching");
    server.call::<()>(&["CLIENT", "UNPAUSE"]);
    let job = waiter.join().unwrap().unwrap();
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
}

#[test]
fn a_flush_during_work_drops_the_answers() {
    let pictures = Pictures::serve();
    let mut server = Server::start();
    server.wait_for_model();
    for i in 0..20 {
        // Some are on their way through the model, some are downloaded, some wait.
        let path = if i % 2 == 0 { "shapes.png" } else { "held/go/shapes.png" };
        let url = pictures.url(path);
        server.call::<()>(&["FLORENCE.SUBMIT", &format!("j{i}"), &url, "<OD>", "NOCACHE"]);
    }
    eventually("work begins", || (server.stat("jobs_active") >= 4).then_some(()));
    server.call::<()>(&["FLUSHALL"]);
    pictures.release("go");
    server.until_idle();
    // A job of the same name afterwards is its own.
    server.call::<()>(&["FLORENCE.SUBMIT", "j0", &pictures.url("sign.png"), "<OCR>"]);
    assert_eq!(finished(&server, "j0")["prompt"].as_deref(), Some("<OCR>"));
    assert!(server.is_alive());
}

#[test]
fn an_old_answer_never_lands_in_a_new_job_of_the_same_name() {
    let pictures = Pictures::serve();
    let server = Server::start();
    for round in 0..5 {
        let [old, new] = ["old", "new"].map(|name| format!("{name}-{round}"));
        let (url, asked) = (pictures.url(&format!("held/{old}/sign.png")), pictures.hits());
        server.call::<()>(&["FLORENCE.SUBMIT", "j", &url, "<OCR>"]);
        eventually("it is asked for", || (pictures.hits() > asked).then_some(()));
        server.call::<()>(&["DEL", "j"]);
        let url = pictures.url(&format!("held/{new}/shapes.png"));
        server.call::<()>(&["FLORENCE.SUBMIT", "j", &url, "<OD>"]);
        // The old answer comes while the new job is worked on.
        pictures.release(&old);
        eventually("the old answer is dropped", || {
            (server.stat("answers_dropped") > round).then_some(())
        });
        pictures.release(&new);
        let job = finished(&server, "j");
        assert!(job["result"].as_deref().unwrap().starts_with("{\"<OD>\""), "{job:?}");
        server.call::<()>(&["DEL", "j"]);
    }
}

#[test]
fn jobs_live_in_their_own_database() {
    let server = Server::start();
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut connection = server.connect();
    let _: () = redis::cmd("SELECT").arg(3).query(&mut connection).unwrap();
    let _: () = redis::cmd("FLORENCE.SUBMIT")
        .arg("j")
        .arg("DATA")
        .arg(bytes)
        .arg("<OCR>")
        .query(&mut connection)
        .unwrap();
    let job: Job = redis::cmd("FLORENCE.WAIT").arg("j").arg(30).query(&mut connection).unwrap();
    assert_eq!(job["state"].as_deref(), Some("done"));
    assert_eq!(server.call::<i64>(&["EXISTS", "j"]), 0);
}

#[test]
fn a_clean_shutdown_ends_quickly_with_work_in_progress() {
    let pictures = Pictures::serve();
    let mut server = Server::with(Settings::lines(&["appendonly yes"]));
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("held/go/sign.png"), "<OCR>"]);
    fetching(&server, "j");
    let start = Instant::now();
    server.shut_down(&[]);
    // It does not wait for the download, which would give up after 20 s.
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    pictures.release("go");
    server.restart();
    finished(&server, "j");
}

#[test]
fn saves_swaps_and_moves_during_work_lose_nothing() {
    let pictures = Pictures::serve();
    let mut server = Server::with(Settings::lines(&["appendonly yes", "appendfsync always"]));
    let url = pictures.url("held/go/shapes.png");
    for i in 0..8 {
        server.call::<()>(&["FLORENCE.SUBMIT", &format!("j{i}"), &url, "<OD>", "NOCACHE"]);
    }
    eventually("work begins", || (server.stat("jobs_active") >= 4).then_some(()));
    server.call::<()>(&["BGSAVE"]);
    eventually("the save ends", || {
        server
            .call::<String>(&["INFO", "persistence"])
            .contains("rdb_bgsave_in_progress:0")
            .then_some(())
    });
    server.call::<()>(&["BGREWRITEAOF"]);
    server.call::<()>(&["SWAPDB", "0", "1"]);
    let client = redis::Client::open(format!("redis://127.0.0.1:{}/1", server.port)).unwrap();
    let mut swapped = client.get_connection().unwrap();
    let moved: i64 = redis::cmd("MOVE").arg("j7").arg(0).query(&mut swapped).unwrap();
    assert_eq!(moved, 1);
    pictures.release("go");
    finished(&server, "j7");
    for i in 0..7 {
        let mut wait = redis::cmd("FLORENCE.WAIT");
        let job: Job = wait.arg(format!("j{i}")).arg(60).query(&mut swapped).unwrap();
        assert_eq!(job["state"].as_deref(), Some("done"), "j{i}: {job:?}");
    }
    assert_eq!(server.stat("jobs_done"), 8);
    assert!(server.is_alive());
}

#[test]
fn evicted_jobs_are_cancelled_and_their_waiters_answered() {
    let server = Server::with(Settings::lines(&["maxmemory-policy allkeys-random"]));
    let pictures = Pictures::serve();
    let url = pictures.url("held/never/shapes.png");
    for i in 0..50 {
        let key = format!("j{i}");
        server.call::<()>(&["FLORENCE.SUBMIT", &key, &url, "<OD>", "RETRIES", "0"]);
    }
    let waiter = waiter(&server, "j49");
    server.call::<()>(&["CONFIG", "SET", "maxmemory", "1"]);
    eventually("all are evicted", || (server.call::<i64>(&["DBSIZE"]) == 0).then_some(()));
    assert_eq!(waiter.join().unwrap(), None);
    assert_eq!(server.unfinished(), 0);
}
