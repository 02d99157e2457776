//! Jobs that have ended, as JOBS lists them: which, in which order, for whom, and for how long.

use std::collections::HashMap;

use florence_tests::{Pictures, Server, Settings, call, eventually};
use redis::Connection;

type Row = HashMap<String, String>;

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url, "<OCR>"], rest].concat());
}

fn wait(server: &Server, key: &str) {
    let job: Option<HashMap<String, Option<String>>> = server.call(&["FLORENCE.WAIT", key, "30"]);
    assert!(job.is_some(), "{key} does not end: {:?}", server.job(key));
}

/// Ends a job as failed, soon.
fn fail(server: &Server, pictures: &Pictures, key: &str) {
    submit(server, key, &pictures.url("status/404"), &[]);
    wait(server, key);
}

/// Ends a job as cancelled, at once.
fn cancel(server: &Server, key: &str) {
    submit(server, key, "http://127.0.0.1/x.png", &["DELAY", "600000"]);
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", key]), 1);
}

fn rows(connection: &mut Connection, state: &str, rest: &[&str]) -> Vec<Row> {
    call(connection, &[&["FLORENCE.JOBS", "STATE", state], rest].concat()).unwrap()
}

fn ids(server: &Server, state: &str) -> Vec<String> {
    rows(&mut server.connect(), state, &[]).into_iter().map(|row| row["id"].clone()).collect()
}

#[test]
fn ended_jobs_are_listed_with_their_ends_the_newest_first() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    submit(&server, "done", &pictures.url("sign.png"), &[]);
    wait(&server, "done");
    fail(&server, &pictures, "failed");
    cancel(&server, "cancelled");
    submit(&server, "expired", &pictures.url("sign.png"), &["DELAY", "600000", "EXPIRES", "50"]);
    wait(&server, "expired");
    submit(&server, "waiting", &pictures.url("sign.png"), &["DELAY", "600000"]);
    let mut connection = server.connect();
    for state in ["done", "failed", "cancelled", "expired"] {
        let [row] = &rows(&mut connection, state, &[])[..] else {
            panic!("{state}: {:?}", rows(&mut connection, state, &[]))
        };
        assert_eq!((row["id"].as_str(), row["state"].as_str()), (state, state));
        assert_eq!(Some(&row["finished_at"]), server.job(state)["finished_at"].as_ref());
        let code = (state == "failed").then_some("FETCH");
        assert_eq!(row.get("code").map(String::as_str), code, "{row:?}");
    }
    assert_eq!(ids(&server, "ended"), ["expired", "cancelled", "failed", "done"]);
    let two = rows(&mut connection, "ended", &["COUNT", "2"]);
    let two: Vec<&str> = two.iter().map(|row| row["id"].as_str()).collect();
    assert_eq!(two, ["expired", "cancelled"]);
    // Without a state, those that have not ended.
    let unfinished: Vec<Row> = server.call(&["FLORENCE.JOBS"]);
    assert_eq!(unfinished.len(), 1, "{unfinished:?}");
    assert_eq!(unfinished[0]["id"], "waiting");
}

#[test]
fn what_is_gone_or_lives_again_is_not_listed() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let keys = ["deleted", "timed-out", "old-name", "moved", "retried", "text", "foreign", "stays"];
    for key in keys {
        fail(&server, &pictures, key);
    }
    assert_eq!(ids(&server, "failed").len(), keys.len());
    server.call::<()>(&["DEL", "deleted"]);
    server.call::<()>(&["PEXPIRE", "timed-out", "1"]);
    server.call::<()>(&["RENAME", "old-name", "new-name"]);
    server.call::<()>(&["MOVE", "moved", "1"]);
    // It waits while nothing is started.
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    assert_eq!(server.call::<i64>(&["FLORENCE.RETRY", "retried"]), 1);
    server.call::<()>(&["SET", "text", "x"]);
    server.call::<()>(&["HDEL", "foreign", "florence"]);
    eventually("what is there is listed", || {
        let mut listed = ids(&server, "failed");
        listed.sort();
        (listed == ["new-name", "stays"]).then_some(())
    });
    let in_other = || rows(&mut server.connect_to(1), "failed", &[]);
    eventually("the other database has one", || {
        let rows = in_other();
        (rows.len() == 1 && rows[0]["id"] == "moved").then_some(())
    });
    server.call::<()>(&["SWAPDB", "0", "1"]);
    assert_eq!(ids(&server, "failed"), ["moved"]);
    assert_eq!(in_other().len(), 2);
    server.call::<()>(&["FLUSHDB"]);
    assert!(ids(&server, "ended").is_empty());
    assert_eq!(in_other().len(), 2);
    server.call::<()>(&["FLUSHALL"]);
    assert!(in_other().is_empty());
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn ended_jobs_are_found_again_after_a_restart_and_on_replicas() {
    let mut server = Server::ready(&["appendonly yes"]);
    let (replica, pictures) = (Server::start(), Pictures::serve());
    replica.follow(&server);
    let keys = ["one", "two", "three"];
    for key in keys {
        fail(&server, &pictures, key);
    }
    cancel(&server, "cancelled");
    let listed = |server: &Server| {
        let mut rows = rows(&mut server.connect(), "ended", &[]);
        assert!(rows.is_sorted_by(|one, other| one["finished_at"] >= other["finished_at"]));
        // Of those that ended in one millisecond nobody knows the order any more.
        rows.sort_by_key(|row| row["id"].clone());
        rows
    };
    let known = listed(&server);
    assert_eq!(known.len(), 4);
    eventually("the replica lists them", || (listed(&replica) == known).then_some(()));
    let late = Server::start();
    late.follow(&server);
    eventually("a new replica lists them", || (listed(&late) == known).then_some(()));
    server.call::<()>(&["DEBUG", "RELOAD"]);
    eventually("they are found again", || (listed(&server) == known).then_some(()));
    server.shut_down(&[]);
    server.restart();
    eventually("they are found after a restart", || (listed(&server) == known).then_some(()));
}

#[test]
fn as_many_of_each_state_are_kept_as_the_setting_says() {
    let (server, pictures) = (Server::ready(&["florence.ended-jobs 3"]), Pictures::serve());
    fail(&server, &pictures, "failed");
    for i in 0..6 {
        cancel(&server, &i.to_string());
    }
    assert_eq!(ids(&server, "cancelled"), ["5", "4", "3"]);
    // Those that are many do not take the places of those that are few.
    assert_eq!(ids(&server, "failed"), ["failed"]);
    assert_eq!(ids(&server, "ended").len(), 4);
    server.call::<()>(&["CONFIG", "SET", "florence.ended-jobs", "1"]);
    cancel(&server, "last");
    assert_eq!(ids(&server, "cancelled"), ["last"]);
    server.call::<()>(&["CONFIG", "SET", "florence.ended-jobs", "0"]);
    cancel(&server, "unknown");
    assert_eq!(ids(&server, "cancelled"), [""; 0]);
    assert_eq!(server.state("unknown"), "cancelled");
}

#[test]
fn users_see_the_ended_jobs_that_they_may_read_and_no_others() {
    let server = Server::with(Settings::default());
    cancel(&server, "tenant1:old");
    for i in 0..500 {
        cancel(&server, &format!("tenant2:{i}"));
    }
    let rules = ["on", ">pass", "~tenant1:*", "+@all", "-@dangerous"];
    server.call::<()>(&[&["ACL", "SETUSER", "one"], &rules[..]].concat());
    let mut tenant = server.connect_as("one", "pass");
    // However many of others came later.
    for state in ["cancelled", "ended"] {
        let rows = rows(&mut tenant, state, &["COUNT", "10"]);
        let ids: Vec<&str> = rows.iter().map(|row| row["id"].as_str()).collect();
        assert_eq!(ids, ["tenant1:old"], "{state}");
    }
}
