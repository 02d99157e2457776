//! Servers that change their role, end in good order, take no writes or get the module late: answers
//! under way are stored once, and nobody is blamed.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, call, eventually, free_port};

use super::{Job, assert_idle, fetching, finished, finished_in, plain, submit};

/// Another master for a while.
enum Master {
    /// Nobody listens there: the replica keeps what it has.
    Nobody,
    /// It has the same data set, and goes on where this server stopped.
    Same,
    /// It has the same keys, but the replica is to load them all anew.
    Anew,
}

/// Makes a server the replica of another, waits until the answers under way have come, and
/// promotes it again.
fn demote_and_promote(server: &Server, master: &Master, meanwhile: impl FnOnce()) {
    let other = match master {
        Master::Nobody => None,
        Master::Same | Master::Anew => {
            let other = Server::with(Settings { plain: true, ..Settings::default() });
            other.follow(server);
            let [written, read] = [server, &other].map(|server| server.call::<i64>(&["DBSIZE"]));
            assert_eq!(written, read);
            other.call::<()>(&["REPLICAOF", "NO", "ONE"]);
            if matches!(master, Master::Anew) {
                other.call::<()>(&["DEBUG", "CHANGE-REPL-ID"]);
            }
            Some(other)
        }
    };
    if let Some(other) = &other {
        server.follow(other);
    } else {
        let port = free_port().to_string();
        server.call::<()>(&["REPLICAOF", "127.0.0.1", &port]);
    }
    meanwhile();
    server.call::<()>(&["REPLICAOF", "NO", "ONE"]);
}

/// Lets the pictures go, so many, and gives the answers some time.
fn serve(pictures: &Pictures, count: usize) {
    pictures.release("go");
    eventually("they are served", || (pictures.answered() >= count).then_some(()));
    thread::sleep(Duration::from_millis(300));
}

/// Three downloads under way, whose answers come while the server follows this master.
fn answer_as_a_replica(master: &Master) {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let keys = ["a", "b", "c"];
    for key in keys {
        submit(&server, key, &pictures.url("held/go/sign.png"), "<OCR>", &[]);
    }
    for key in keys {
        fetching(&server, key);
    }
    eventually("all are asked for", || (pictures.hits() == 3).then_some(()));
    demote_and_promote(&server, master, || serve(&pictures, 3));
    for key in keys {
        finished(&server, key);
    }
    assert_idle(&server);
}

#[test]
fn answers_that_come_while_the_master_cannot_be_reached_are_not_lost() {
    answer_as_a_replica(&Master::Nobody);
}

#[test]
fn answers_that_come_while_another_server_is_followed_are_not_lost() {
    answer_as_a_replica(&Master::Same);
}

#[test]
fn jobs_that_are_loaded_from_another_server_meanwhile_are_answered() {
    answer_as_a_replica(&Master::Anew);
}

#[test]
fn answers_that_come_after_a_short_time_as_a_replica_are_stored_once() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let keys = ["a", "b", "c"];
    for key in keys {
        submit(&server, key, &pictures.url("held/go/sign.png"), "<OCR>", &[]);
    }
    for key in keys {
        fetching(&server, key);
    }
    for _ in 0..3 {
        demote_and_promote(&server, &Master::Nobody, || {});
    }
    pictures.release("go");
    for key in keys {
        finished(&server, key);
    }
    assert_eq!(server.stat("jobs_done"), 3);
    assert_idle(&server);
}

#[test]
fn suspects_of_a_crash_survive_a_time_as_a_replica() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "appendfsync always"];
    let mut server = Server::with(Settings::lines(&lines));
    let keys = ["a", "b", "c"];
    for key in keys {
        submit(&server, key, &pictures.url("held/go/sign.png"), "<OCR>", &[]);
    }
    for key in keys {
        fetching(&server, key);
    }
    eventually("all are asked for", || (pictures.hits() == 3).then_some(()));
    server.kill();
    server.restart();
    eventually("one is tried again", || {
        keys.iter().any(|key| server.state(key) == "fetching").then_some(())
    });
    eventually("its picture is asked for", || (pictures.hits() > 3).then_some(()));
    demote_and_promote(&server, &Master::Nobody, || serve(&pictures, 4));
    for key in keys {
        finished(&server, key);
    }
    assert_idle(&server);
}

/// Ends a server some times during a job, in one way or another, and looks what becomes of it.
fn interrupt_often(lines: &[&str], ends: &[fn(&mut Server)]) {
    let pictures = Pictures::serve();
    let mut server = Server::with(Settings::lines(lines));
    submit(&server, "j", &pictures.url("held/go/sign.png"), "<OCR>", &["RETRIES", "0"]);
    for end in ends {
        fetching(&server, "j");
        end(&mut server);
        server.restart();
    }
    fetching(&server, "j");
    pictures.release("go");
    finished(&server, "j");
    assert_idle(&server);
}

const APPENDED: &[&str] = &["appendonly yes"];
const SAVED: &[&str] = &["save 3600 1"];

#[test]
fn two_shutdowns_during_a_job_are_no_crashes() {
    interrupt_often(APPENDED, &[|server| server.shut_down(&[]), |server| server.shut_down(&[])]);
}

#[test]
fn three_ends_in_good_order_during_a_job_are_no_crashes() {
    let ends: [fn(&mut Server); 3] =
        [Server::terminate, |server| server.shut_down(&["NOSAVE"]), Server::terminate];
    interrupt_often(APPENDED, &ends);
}

#[test]
fn two_shutdowns_that_save_a_snapshot_are_no_crashes() {
    interrupt_often(SAVED, &[|server| server.shut_down(&[]), Server::terminate]);
}

#[test]
fn two_shutdowns_that_are_told_to_save_are_no_crashes() {
    let end: fn(&mut Server) = |server| server.shut_down(&["SAVE"]);
    interrupt_often(&[], &[end, end]);
}

#[test]
fn jobs_that_a_shutdown_interrupted_run_together_afterwards() {
    for lines in [APPENDED, SAVED] {
        let pictures = Pictures::serve();
        let mut server = Server::with(Settings::lines(lines));
        let keys = ["a", "b", "c"];
        for key in keys {
            submit(&server, key, &pictures.url("held/go/sign.png"), "<OCR>", &[]);
        }
        for key in keys {
            fetching(&server, key);
        }
        server.shut_down(&[]);
        server.restart();
        let start = Instant::now();
        eventually("all are at work together", || {
            keys.iter().all(|key| server.state(key) == "fetching").then_some(())
        });
        // Before the first download gives up, and makes room for the next job.
        assert!(start.elapsed() < Duration::from_secs(15), "{lines:?}: one at a time");
        assert_eq!(server.stat("jobs_active"), 3);
        pictures.release("go");
        for key in keys {
            finished(&server, key);
        }
        assert_idle(&server);
    }
}

#[test]
fn an_attempt_that_a_shutdown_interrupts_does_not_count_as_a_retry() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "florence.retry-delay-ms 100"];
    let mut server = Server::with(Settings::lines(&lines));
    // The download that is interrupted, one that fails, and one that does not.
    submit(&server, "j", &pictures.url("held/go/flaky/2/sign.png"), "<OCR>", &["RETRIES", "1"]);
    eventually("it is downloaded", || (pictures.hits() == 1).then_some(()));
    server.shut_down(&[]);
    pictures.release("go");
    server.restart();
    finished(&server, "j");
    assert_eq!(pictures.hits(), 3);
}

/// Two servers, the second one a replica of the first, with a job at work.
fn pair(pictures: &Pictures) -> [Server; 2] {
    let [first, second] = [Server::start(), Server::start()];
    second.follow(&first);
    submit(&first, "j", &pictures.url("held/go/sign.png"), "<OCR>", &["RETRIES", "0"]);
    [first, second]
}

/// Waits until the job is at work on a master, and its replica knows of that.
fn at_work(master: &Server, replica: &Server) {
    fetching(master, "j");
    eventually("the replica knows", || {
        let [theirs, ours]: [HashMap<String, Vec<u8>>; 2] =
            [master, replica].map(|server| server.call(&["HGETALL", "j"]));
        (theirs == ours).then_some(())
    });
}

#[test]
fn two_promotions_while_the_old_master_lives_are_no_crashes() {
    let pictures = Pictures::serve();
    let [first, second] = pair(&pictures);
    for (master, replica) in [(&first, &second), (&second, &first)] {
        at_work(master, replica);
        replica.call::<()>(&["REPLICAOF", "NO", "ONE"]);
        master.follow(replica);
    }
    fetching(&first, "j");
    pictures.release("go");
    finished(&first, "j");
    assert_idle(&first);
    eventually("the replica sees it", || (second.state("j") == "done").then_some(()));
}

#[test]
fn two_failovers_by_command_are_no_crashes() {
    let pictures = Pictures::serve();
    let [first, second] = pair(&pictures);
    for (master, replica) in [(&first, &second), (&second, &first)] {
        at_work(master, replica);
        let port = replica.port.to_string();
        eventually("the failover begins", || {
            master.try_call::<()>(&["FAILOVER", "TO", "127.0.0.1", &port]).ok()
        });
        eventually("the roles have changed", || {
            let [theirs, ours] =
                [master, replica].map(|server| server.call::<String>(&["INFO", "replication"]));
            let is_done = theirs.contains("master_link_status:up") && ours.contains("role:master");
            is_done.then_some(())
        });
    }
    fetching(&first, "j");
    pictures.release("go");
    finished(&first, "j");
    assert_idle(&first);
}

#[test]
fn suspects_that_could_not_be_claimed_still_run_one_at_a_time() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "appendfsync always"];
    let mut server = Server::with(Settings::lines(&lines));
    let keys = ["a", "b", "c", "d"];
    for key in keys {
        submit(&server, key, &pictures.url("held/go/sign.png"), "<OCR>", &[]);
    }
    for key in keys {
        fetching(&server, key);
    }
    server.kill();
    server.settings.lines.push("min-replicas-to-write 1".to_owned());
    server.restart();
    server.wait_for_model();
    let assert_alone_for = |server: &Server, time: u64| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(time) {
            let active = server.stat("jobs_active");
            assert!(active <= 1, "{active} suspects at the same time");
            thread::sleep(Duration::from_millis(5));
        }
    };
    assert_alone_for(&server, 500);
    server.settings.lines.pop();
    server.call::<()>(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    let at_work = || keys.into_iter().filter(|key| server.state(key) == "fetching");
    eventually("one is tried", || at_work().next());
    assert_alone_for(&server, 800);
    let culprit = eventually("one is at work", || at_work().next());
    server.kill();
    pictures.release("go");
    server.restart();
    for key in keys {
        let job: Job = server.call(&["FLORENCE.WAIT", key, "25"]);
        if key == culprit {
            assert!(job["error"].as_deref().unwrap().contains("\"CRASH\""), "{key}: {job:?}");
        } else {
            assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
        }
    }
    assert_idle(&server);
}

#[test]
fn jobs_that_were_given_back_keep_their_places() {
    let pictures = Pictures::serve();
    let server = Server::with(Settings::lines(&["florence.max-downloads 1"]));
    server.wait_for_model();
    // So slowly that most of them still wait when the urgent one is done.
    let url = pictures.url("slow/400/shapes.png");
    let mut pipe = redis::pipe();
    for i in 0..500 {
        pipe.cmd("FLORENCE.SUBMIT").arg(format!("j{i:03}")).arg(&url).arg("<OD>").ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    server.call::<()>(&["CLIENT", "PAUSE", "2000", "WRITE"]);
    // It is let in when the pause is over.
    submit(&server, "urgent", &pictures.url("sign.png"), "<OCR>", &["PRIORITY", "9"]);
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", "urgent", "25"]);
    let job = job.expect("it goes first");
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    let waiting = server.stat("jobs_waiting");
    assert!(waiting > 350, "only {waiting} wait");
    let jobs: Vec<HashMap<String, String>> = server.call(&["FLORENCE.JOBS", "COUNT", "1000"]);
    let turns: Vec<&String> =
        jobs.iter().filter(|job| job["state"] == "queued").map(|job| &job["id"]).collect();
    assert!(turns.len() > 350 && turns.is_sorted(), "{turns:?}");
}

#[test]
fn many_jobs_that_cannot_be_claimed_take_little_time() {
    let pictures = Pictures::serve();
    let server = Server::with(Settings::lines(&["florence.max-downloads 1"]));
    server.wait_for_model();
    let url = pictures.url("slow/500/sign.png");
    let mut connection = server.connect();
    for batch in 0..50 {
        let mut pipe = redis::pipe();
        for i in 0..2000 {
            let key = format!("j{:06}", batch * 2000 + i);
            pipe.cmd("FLORENCE.SUBMIT").arg(key).arg(&url).arg("<OCR>").ignore();
        }
        pipe.exec(&mut connection).unwrap();
    }
    server.call::<()>(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    eventually("the last download ends", || (pictures.answered() == pictures.hits()).then_some(()));
    assert!(server.stat("jobs_waiting") > 90_000);
    let share = server.cpu_share();
    assert!(share < 0.15, "{:.0} % of a core for nothing", share * 100.0);
    let before = pictures.hits();
    server.call::<()>(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    eventually("they go on", || (pictures.hits() > before).then_some(()));
}

/// Leaves unfinished jobs in three databases in a server's files, starts the server without the
/// module, and loads it.
fn load_late(lines: &[&str], end: impl FnOnce(&mut Server)) {
    const DBS: [usize; 3] = [0, 3, 14];
    let pictures = Pictures::serve();
    let mut server = Server::with(Settings::lines(lines));
    for db in DBS {
        let mut connection = server.connect_to(db);
        for (key, url, delay) in [
            ("waits", pictures.url("shapes.png"), "4000"),
            ("runs", pictures.url("held/go/shapes.png"), "0"),
        ] {
            let submit = ["FLORENCE.SUBMIT", key, &url, "<OD>", "DELAY", delay];
            call::<()>(&mut connection, &submit).unwrap();
        }
    }
    end(&mut server);
    server.settings.plain = true;
    server.restart();
    for db in DBS {
        let states = ["waits", "runs"].map(|key| {
            let state = call::<String>(&mut server.connect_to(db), &["HGET", key, "state"]);
            state.unwrap()
        });
        assert!(states.iter().all(|state| state != "done"), "{states:?}");
    }
    pictures.release("go");
    server.load_module(&[]);
    for db in DBS {
        for key in ["waits", "runs"] {
            let job = finished_in(&mut server.connect_to(db), key);
            assert_eq!(job["result"], plain(&server, "shapes.png", "<OD>"), "{key} in {db}");
        }
    }
    assert_idle(&server);
}

#[test]
fn a_module_that_is_loaded_late_runs_the_jobs_of_an_append_only_file() {
    load_late(&["appendonly yes", "appendfsync always"], Server::kill);
}

#[test]
fn a_module_that_is_loaded_late_runs_the_jobs_of_a_snapshot() {
    load_late(&[], |server| server.shut_down(&["SAVE"]));
}

#[test]
fn jobs_that_were_written_without_the_module_run_once_it_is_there() {
    let pictures = Pictures::serve();
    let server = Server::with(Settings { plain: true, ..Settings::default() });
    for db in [0, 7] {
        let url = pictures.url("shapes.png");
        let job =
            ["HSET", "j", "florence", "1", "state", "queued", "image", &url, "prompt", "<OD>"];
        call::<()>(&mut server.connect_to(db), &job).unwrap();
    }
    server.load_module(&["max-downloads", "1"]);
    for db in [0, 7] {
        finished_in(&mut server.connect_to(db), "j");
    }
    assert_idle(&server);
}

#[test]
fn stats_and_info_show_the_same_counters() {
    let server = Server::start();
    let stats: HashMap<String, i64> = server.call(&["FLORENCE.STATS"]);
    assert!(stats.contains_key("leases_recovered"), "{stats:?}");
    let info: String = server.call(&["INFO", "florence"]);
    for name in stats.keys() {
        assert!(info.contains(&format!("\nflorence_{name}:")), "{name} is missing in {info}");
    }
}
