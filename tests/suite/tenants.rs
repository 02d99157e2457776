//! Several users of one server: whose jobs are whose, what they share, how much room each has.

use std::collections::HashMap;

use florence_tests::{Pictures, Server, call, eventually, picture};
use redis::{Connection, RedisResult};

type Job = HashMap<String, Option<String>>;

fn with_users<const N: usize>(server: &Server, names: [&str; N]) -> [Connection; N] {
    names.map(|user| {
        server.add_user(user);
        server.connect_as(user, "pw")
    })
}

fn submit(user: &mut Connection, key: &str, url: &str, rest: &[&str]) -> RedisResult<()> {
    call(user, &[&["FLORENCE.SUBMIT", key, url, "<OCR>"], rest].concat())
}

fn wait(server: &Server, key: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "30"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)))
}

fn submit_bytes(user: &mut Connection, key: &str, prompt: &str) {
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(key).arg("DATA").arg(std::fs::read(picture("shapes.png")).unwrap()).arg(prompt);
    submit.exec(user).unwrap();
}

/// What a job was spared, and its answer.
fn ask(server: &Server, user: &mut Connection, prompt: &str) -> (String, String) {
    let key: String = server.call::<i64>(&["INCR", "last-job"]).to_string();
    submit_bytes(user, &key, prompt);
    let job = wait(server, &key);
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    (job["cache"].clone().unwrap(), job["text"].clone().unwrap())
}

fn refusal(reply: RedisResult<()>) -> String {
    let error = reply.expect_err("a refusal");
    format!("{} {}", error.code().unwrap_or("ERR"), error.detail().unwrap_or_default())
}

#[test]
fn a_job_knows_its_user() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let [mut alice] = with_users(&server, ["alice"]);
    submit(&mut alice, "hers", &pictures.url("sign.png"), &[]).unwrap();
    submit(&mut server.connect(), "ours", &pictures.url("sign.png"), &[]).unwrap();
    let script = "return redis.call('FLORENCE.SUBMIT', KEYS[1], ARGV[1], '<OCR>')";
    call::<()>(&mut alice, &["EVAL", script, "1", "script", &pictures.url("sign.png")]).unwrap();
    for (key, user) in [("hers", "alice"), ("ours", "default"), ("script", "alice")] {
        let name = |key| server.call::<Option<String>>(&["HGET", key, "user"]);
        assert_eq!(name(key).as_deref(), Some(user), "{key}");
        assert_eq!(wait(&server, key)["state"].as_deref(), Some("done"));
        assert_eq!(name(key).as_deref(), Some(user), "{key}, done");
    }
}

#[test]
fn users_do_not_see_by_the_cache_what_others_ask() {
    let server = Server::ready(&[]);
    let [mut alice, mut bob, mut carol, mut dave] =
        with_users(&server, ["alice", "bob", "carol", "dave"]);
    let (verdict, text) = ask(&server, &mut alice, "<OD>");
    assert_eq!(verdict, "miss");
    // Of others: neither the answer nor the encoded picture.
    assert_eq!(ask(&server, &mut bob, "<OD>"), ("miss".to_owned(), text.clone()));
    assert_eq!(ask(&server, &mut carol, "<CAPTION>").0, "miss");
    // Of one's own: both.
    for user in [&mut alice, &mut bob] {
        assert_eq!(ask(&server, user, "<OD>"), ("result".to_owned(), text.clone()));
        assert_eq!(ask(&server, user, "<OCR>").0, "features");
    }
    server.call::<()>(&["CONFIG", "SET", "florence.shared-cache", "yes"]);
    assert_eq!(ask(&server, &mut dave, "<DENSE_REGION_CAPTION>").0, "miss");
    assert_eq!(ask(&server, &mut carol, "<DENSE_REGION_CAPTION>").0, "result");
    assert_eq!(ask(&server, &mut carol, "<OCR_WITH_REGION>").0, "features");
    server.call::<()>(&["CONFIG", "SET", "florence.shared-cache", "no"]);
    assert_eq!(ask(&server, &mut alice, "<DENSE_REGION_CAPTION>").0, "features");
    assert_eq!(ask(&server, &mut bob, "<OD>").0, "result");
}

#[test]
fn a_shared_cache_serves_every_user() {
    let server = Server::ready(&["florence.shared-cache yes"]);
    let [mut alice, mut bob, mut carol] = with_users(&server, ["alice", "bob", "carol"]);
    let (verdict, text) = ask(&server, &mut alice, "<OD>");
    assert_eq!(verdict, "miss");
    assert_eq!(ask(&server, &mut bob, "<OD>"), ("result".to_owned(), text));
    assert_eq!(ask(&server, &mut carol, "<OCR>").0, "features");
}

#[test]
fn requests_of_different_users_in_flight_are_not_joined() {
    // The only compute thread is busy with a long answer while the others come in.
    let lines =
        ["florence.threads 1", "florence.result-cache-bytes 0", "florence.prepare-threads 8"];
    let (server, pictures) = (Server::ready(&lines), Pictures::serve());
    let mut users = with_users(&server, ["alice", "bob"]);
    let keys: Vec<[String; 2]> =
        (0..10).map(|i| ["alice", "bob"].map(|user| format!("{user}:{i}"))).collect();
    let url = pictures.url("poster.jpg");
    for pair in &keys {
        for (user, key) in users.iter_mut().zip(pair) {
            call::<()>(user, &["FLORENCE.SUBMIT", key, &url, "<DENSE_REGION_CAPTION>"]).unwrap();
        }
    }
    let mut verdicts: [Vec<String>; 2] = Default::default();
    for pair in &keys {
        for (seen, key) in verdicts.iter_mut().zip(pair) {
            let job = wait(&server, key);
            assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
            seen.push(job["cache"].clone().unwrap());
        }
    }
    for seen in &verdicts {
        assert!(seen.iter().any(|verdict| verdict == "miss"), "by another's work: {verdicts:?}");
    }
    // One's own are.
    assert!(verdicts.concat().iter().any(|verdict| verdict == "result"), "{verdicts:?}");
}

#[test]
fn long_names_and_such_that_are_no_text_are_users_too() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let long = ["a", "b"].map(|last| format!("{}{last}", "u".repeat(300)));
    let [mut one, mut other] = with_users(&server, [&long[0], &long[1]]);
    assert_eq!(ask(&server, &mut one, "<CAPTION>").0, "miss");
    assert_eq!(ask(&server, &mut other, "<CAPTION>").0, "miss", "of another user");
    assert_eq!(ask(&server, &mut one, "<CAPTION>").0, "result", "of the same user");
    server.call::<()>(&["CONFIG", "SET", "florence.max-queue-per-user", "1"]);
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    let url = pictures.url("sign.png");
    submit(&mut one, "waiting", &url, &[]).unwrap();
    assert!(refusal(submit(&mut one, "refused", &url, &[])).starts_with("BUSY too many jobs of"));
    submit(&mut other, "others", &url, &[]).unwrap();
    let bytes = [b"u\xfe", b"u\xff"].map(|name| {
        let mut connection = server.connect();
        let set = redis::cmd("ACL")
            .arg("SETUSER")
            .arg(name)
            .arg(&["on", ">pw", "~*", "+@all"])
            .to_owned();
        set.exec(&mut connection).unwrap();
        redis::cmd("AUTH").arg(name).arg("pw").exec(&mut connection).unwrap();
        connection
    });
    for (i, mut user) in bytes.into_iter().enumerate() {
        submit(&mut user, &format!("bytes:{i}"), &url, &[]).unwrap();
    }
    let user = |key: &str| server.call::<String>(&["HGET", key, "user"]);
    assert!(user("bytes:0").starts_with("sha256:") && user("bytes:0") != user("bytes:1"));
}

#[test]
fn one_user_cannot_fill_the_queue() {
    let pictures = Pictures::serve();
    let server = Server::busy(&pictures, &[]);
    let [mut alice, mut bob] = with_users(&server, ["alice", "bob"]);
    let url = pictures.url("held/back/sign.png");
    let full = "BUSY too many jobs of this user wait, retry after 1000 ms";
    // By default there is no such bound.
    for i in 0..20 {
        submit(&mut alice, &format!("alice:{i}"), &url, &[]).unwrap();
    }
    server.call::<()>(&["CONFIG", "SET", "florence.max-queue-per-user", "21"]);
    submit(&mut alice, "alice:20", &url, &[]).unwrap();
    assert_eq!(refusal(submit(&mut alice, "refused", &url, &[])), full);
    assert_eq!(server.call::<i64>(&["EXISTS", "refused"]), 0);
    submit(&mut bob, "bob", &url, &[]).unwrap();
    submit(&mut server.connect(), "ours", &url, &[]).unwrap();
    // What ends leaves room.
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "alice:3"]), 1);
    submit(&mut alice, "alice:21", &url, &[]).unwrap();
    assert_eq!(refusal(submit(&mut alice, "refused", &url, &[])), full);
    server.call::<()>(&["DEL", "alice:4"]);
    submit(&mut alice, "alice:22", &url, &[]).unwrap();
    server.call::<()>(&["CONFIG", "SET", "florence.max-queue-per-user", "0"]);
    submit(&mut alice, "alice:23", &url, &[]).unwrap();
    pictures.release("back");
    for key in ["alice:0", "alice:22", "alice:23", "bob", "ours"] {
        assert_eq!(wait(&server, key)["state"].as_deref(), Some("done"), "{key}");
    }
}

#[test]
fn delayed_jobs_take_no_room_in_the_queue() {
    let pictures = Pictures::serve();
    let server = Server::busy(&pictures, &["florence.max-queue 3"]);
    let mut us = server.connect();
    let url = pictures.url("held/back/sign.png");
    for i in 0..10 {
        submit(&mut us, &format!("later:{i}"), &url, &["DELAY", "600000"]).unwrap();
    }
    for i in 0..3 {
        submit(&mut us, &format!("now:{i}"), &url, &[]).unwrap();
    }
    let full = "BUSY queue is full, retry after 1000 ms";
    assert_eq!(refusal(submit(&mut us, "refused", &url, &[])), full);
    submit(&mut us, "later:10", &url, &["DELAY", "600000"]).unwrap();
    pictures.release("back");
    for i in 0..3 {
        assert_eq!(wait(&server, &format!("now:{i}"))["state"].as_deref(), Some("done"));
    }
    assert_eq!(server.state("later:10"), "queued");
}

#[test]
fn delayed_jobs_have_a_bound_of_their_own() {
    let pictures = Pictures::serve();
    let server = Server::ready(&["florence.max-delayed 3"]);
    let mut us = server.connect();
    let url = pictures.url("sign.png");
    let later = ["DELAY", "600000"];
    let full = "BUSY too many delayed jobs, retry after 1000 ms";
    for key in ["a", "b", "c"] {
        submit(&mut us, key, &url, &later).unwrap();
    }
    assert_eq!(refusal(submit(&mut us, "refused", &url, &later)), full);
    assert_eq!(server.call::<i64>(&["EXISTS", "refused"]), 0);
    // The same request again is none.
    submit(&mut us, "a", &url, &later).unwrap();
    submit(&mut us, "now", &url, &[]).unwrap();
    assert_eq!(wait(&server, "now")["state"].as_deref(), Some("done"));
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "a"]), 1);
    submit(&mut us, "d", &url, &later).unwrap();
    assert_eq!(refusal(submit(&mut us, "refused", &url, &later)), full);
    server.call::<()>(&["CONFIG", "SET", "florence.max-delayed", "4"]);
    // Whose time has come is no delayed job any more.
    submit(&mut us, "soon", &url, &["DELAY", "200"]).unwrap();
    assert_eq!(wait(&server, "soon")["state"].as_deref(), Some("done"));
    submit(&mut us, "e", &url, &later).unwrap();
    assert_eq!(refusal(submit(&mut us, "refused", &url, &later)), full);
    // They are counted again when the keys are read again.
    server.call::<()>(&["DEBUG", "RELOAD"]);
    assert_eq!(refusal(submit(&mut us, "refused", &url, &later)), full);
    server.call::<()>(&["DEL", "b"]);
    eventually("there is room", || submit(&mut us, "f", &url, &later).ok());
}

#[test]
fn jobs_that_are_to_be_tried_again_fill_the_queue_and_delay_nobody() {
    let pictures = Pictures::serve();
    let lines =
        ["florence.max-queue 3", "florence.max-delayed 1", "florence.retry-delay-ms 600000"];
    let server = Server::ready(&lines);
    let mut us = server.connect();
    for key in ["a", "b", "c"] {
        submit(&mut us, key, &pictures.url("status/503"), &[]).unwrap();
        eventually("it is to be tried again", || (server.state(key) == "retrying").then_some(()));
    }
    let url = pictures.url("sign.png");
    let refused = refusal(submit(&mut us, "refused", &url, &[]));
    assert!(refused.starts_with("BUSY queue is full"), "{refused}");
    submit(&mut us, "later", &url, &["DELAY", "600000"]).unwrap();
    let refused = refusal(submit(&mut us, "refused", &url, &["DELAY", "600000"]));
    assert!(refused.starts_with("BUSY too many delayed jobs"), "{refused}");
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "a"]), 1);
    submit(&mut us, "now", &url, &[]).unwrap();
    assert_eq!(wait(&server, "now")["state"].as_deref(), Some("done"));
}

#[test]
fn delayed_jobs_run_at_their_time_although_the_queue_is_full() {
    let pictures = Pictures::serve();
    let server = Server::busy(&pictures, &["florence.max-queue 3"]);
    let mut us = server.connect();
    let mut delayed = redis::cmd("FLORENCE.SUBMIT");
    delayed.arg("delayed").arg("DATA").arg(std::fs::read(picture("sign.png")).unwrap());
    delayed.arg("<OCR>").arg("DELAY").arg(1500).exec(&mut us).unwrap();
    let url = pictures.url("held/back/sign.png");
    for i in 0..3 {
        submit(&mut us, &format!("now:{i}"), &url, &[]).unwrap();
    }
    let full = "BUSY queue is full, retry after 1000 ms";
    assert_eq!(refusal(submit(&mut us, "refused", &url, &[])), full);
    assert_eq!(server.state("delayed"), "queued");
    assert_eq!(wait(&server, "delayed")["state"].as_deref(), Some("done"));
    assert_eq!(refusal(submit(&mut us, "refused", &url, &[])), full);
}

#[test]
fn a_user_finds_his_jobs_behind_many_of_others() {
    let server = Server::ready(&["florence.paused yes"]);
    let mut connection = server.connect();
    for key in (0..250).map(|i| format!("other:{i}")).chain((0..5).map(|i| format!("mine:{i}"))) {
        submit_bytes(&mut connection, &key, "<OCR>");
    }
    server.call::<()>(&["ACL", "SETUSER", "me", "on", ">pw", "~mine:*", "+@all"]);
    let mut me = server.connect_as("me", "pw");
    for options in [&[][..], &["STATE", "queued"], &["COUNT", "5"]] {
        let rows: Vec<HashMap<String, String>> =
            call(&mut me, &[&["FLORENCE.JOBS"], options].concat()).unwrap();
        let ids: Vec<&str> = rows.iter().map(|row| row["id"].as_str()).collect();
        assert_eq!(ids, ["mine:0", "mine:1", "mine:2", "mine:3", "mine:4"], "{options:?}");
    }
}
