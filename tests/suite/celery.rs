//! Celery's wire mode: its own clients and Flower, and what must hold whoever sends the messages.

use std::path::{Path, PathBuf};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_tests::{
    Pictures, Server, Settings, celery_message, eventually, oldest_celery, python, run_client,
};
use serde_json::{Value, json};

const QUEUES: &str = "florence.celery-queues celery:tasks.inference_task";

fn server(lines: &[&str]) -> Server {
    Server::with(Settings::lines(&[&[QUEUES], lines].concat()))
}

fn ask(id: &str, url: &str) -> String {
    celery_message(id, "tasks.inference_task", &[url, "<OCR>"])
}

fn status(server: &Server, id: &str) -> Option<String> {
    let meta: Option<String> = server.call(&["GET", &format!("celery-task-meta-{id}")]);
    let meta: Value = serde_json::from_str(&meta?).unwrap();
    Some(meta["status"].as_str().unwrap().to_owned())
}

fn wait_for(server: &Server, id: &str, wanted: &str) {
    eventually(&format!("{id} is {wanted}"), || (status(server, id)? == wanted).then_some(()));
}

fn run(program: &Path, script: &str, server: &Server) {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures");
    let fixture = |name: &str| fixtures.join(name).display().to_string();
    let pictures = Pictures::serve();
    let mut args = vec![format!("redis://127.0.0.1:{}/0", server.port), pictures.url("")];
    if script.starts_with("celery") {
        args.extend(["tiny.json", "pictures"].map(fixture));
    }
    let ran = run_client(program, script, args);
    assert!(ran.is_ok(), "{}{}", ran.unwrap_err(), server.log());
    assert_eq!(server.stat("panics"), 0);
}

/// As a project on transformers' native code sees it.
const CLIENT: [&str; 5] = [
    "florence.celery-queues \"celery:tasks.inference_task celery:tasks.ask\"",
    "florence.celery-arguments \"tasks.ask(question:prompt, image_url:picture, user)\"",
    "florence.celery-track-started yes",
    "florence.coordinates int",
    "florence.retry-delay-ms 5000",
];

#[test]
fn current_celery_needs_no_change() {
    run(&python(), "celery_client.py", &Server::with(Settings::lines(&CLIENT)));
}

#[test]
fn the_oldest_celery_5_needs_no_change() {
    run(&oldest_celery(), "celery_client.py", &Server::with(Settings::lines(&CLIENT)));
}

#[test]
fn flower_shows_the_worker_and_its_tasks() {
    run(&python(), "flower_client.py", &server(&[]));
}

#[test]
fn crashes_lose_no_task() {
    let pictures = Pictures::serve();
    let mut server = server(&["appendonly yes", "appendfsync always"]);
    let ids: Vec<String> = (0..120).map(|i| format!("task-{i}")).collect();
    for (i, id) in ids.iter().enumerate() {
        server.call::<()>(&["LPUSH", "celery", &ask(id, &pictures.url("slow/20/sign.png"))]);
        if i % 40 == 39 {
            // What was at work when the server died twice would be given up.
            ids[..i - 20].iter().for_each(|id| wait_for(&server, id, "SUCCESS"));
            server.kill();
            server.restart();
        }
    }
    for id in &ids {
        wait_for(&server, id, "SUCCESS");
    }
    assert_eq!(server.call::<i64>(&["LLEN", "celery"]), 0);
}

#[test]
fn a_message_becomes_a_job_and_a_job_a_result_in_one_transaction() {
    let pictures = Pictures::serve();
    let server = server(&["appendonly yes", "appendfsync always", "aof-use-rdb-preamble no"]);
    server.call::<()>(&["LPUSH", "celery", &ask("one", &pictures.url("sign.png"))]);
    wait_for(&server, "one", "SUCCESS");
    let directory = server.directory.path().join("appendonlydir");
    let file = std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().path());
    let file = file.into_iter().find(|path| path.to_string_lossy().contains(".incr.")).unwrap();
    let log = String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned();
    let transactions: Vec<&str> =
        log.split("MULTI\r\n").skip(1).map(|rest| rest.split("EXEC\r\n").next().unwrap()).collect();
    let together = |words: &[&str]| {
        transactions.iter().any(|transaction| words.iter().all(|word| transaction.contains(word)))
    };
    assert!(together(&["LREM\r\n", "HSET\r\n", "queued"]), "{log}");
    assert!(together(&["HSET\r\n", "done\r\n", "celery-task-meta-one", "SUCCESS"]), "{log}");
}

#[test]
fn a_full_queue_leaves_messages_in_their_lists() {
    let pictures = Pictures::serve();
    let server = server(&["florence.max-queue 5", "florence.max-downloads 1"]);
    let push = |list: &str, i: i64| {
        let message = ask(&i.to_string(), &pictures.url("held/back/sign.png"));
        server.call::<()>(&["LPUSH", list, &message]);
    };
    (0..30).for_each(|i| push("celery\x06\x169", i));
    eventually("the queue is full", || {
        (server.stats(["jobs_waiting", "jobs_active"]) == [5, 1]).then_some(())
    });
    (30..40).for_each(|i| push("celery", i));
    assert_eq!(server.call::<i64>(&["LLEN", "celery\x06\x169"]), 24);
    assert_eq!(server.call::<i64>(&["LLEN", "celery"]), 10);
    pictures.release("back");
    for i in 0..40 {
        wait_for(&server, &i.to_string(), "SUCCESS");
    }
    // The list of the most urgent is emptied first: the rest of the other became jobs later.
    let came = |i: i64| -> i64 {
        let job = server.job(&format!("florence:celery:{i}"));
        job["submitted_at"].as_deref().unwrap().parse().unwrap()
    };
    let last = (30..40).map(came).max().unwrap();
    assert!((6..30).all(|i| came(i) >= last));
}

#[test]
fn databases_and_prefixes_are_those_of_the_settings() {
    let pictures = Pictures::serve();
    let server = server(&[
        "florence.celery-db 1",
        "florence.celery-result-db 2",
        "florence.celery-prefix app:",
        "florence.celery-result-prefix res",
        "florence.celery-result-expires 0",
        "florence.celery-priority-steps \"0 1 2 3 4 5 6 7 8 9\"",
        "florence.celery-separator :",
    ]);
    let mut connection = server.connect();
    let message = ask("one", &pictures.url("sign.png"));
    for db in [0, 1] {
        let list = if db == 1 { "app:celery:7" } else { "celery" };
        redis::cmd("SELECT").arg(db).exec(&mut connection).unwrap();
        redis::cmd("LPUSH").arg(list).arg(&message).exec(&mut connection).unwrap();
    }
    redis::cmd("SELECT").arg(2).exec(&mut connection).unwrap();
    let key = "res_celery-task-meta-one";
    eventually("there is a result", || {
        redis::cmd("GET").arg(key).query::<Option<String>>(&mut connection).unwrap()
    });
    assert_eq!(redis::cmd("TTL").arg(key).query::<i64>(&mut connection).unwrap(), -1);
    assert_eq!(server.call::<i64>(&["LLEN", "celery"]), 1);
}

#[test]
fn other_messages_are_answered_where_the_operator_says_so() {
    let server = server(&["florence.celery-reject-unknown yes"]);
    server.call::<()>(&["LPUSH", "celery", "no message", &celery_message("x", "app.other", &[])]);
    wait_for(&server, "x", "FAILURE");
    let meta: String = server.call(&["GET", "celery-task-meta-x"]);
    assert!(meta.contains("\"exc_type\":\"NotRegistered\""), "{meta}");
    eventually("the other is set aside", || {
        let kept: Vec<String> = server.call(&["LRANGE", "florence:celery-rejected", "0", "-1"]);
        (kept == ["no message"]).then_some(())
    });
    assert_eq!(server.call::<i64>(&["LLEN", "celery"]), 0);
}

#[test]
fn a_task_that_is_sent_twice_runs_once_and_a_success_stays() {
    let pictures = Pictures::serve();
    let server = server(&[]);
    let slow = ask("one", &pictures.url("slow/300/sign.png"));
    server.call::<()>(&["LPUSH", "celery", &slow, &slow]);
    wait_for(&server, "one", "SUCCESS");
    assert_eq!(pictures.hits(), 1);
    server.call::<()>(&["LPUSH", "celery", &ask("one", &pictures.url("text"))]);
    eventually("it has failed", || (server.state("florence:celery:one") == "failed").then_some(()));
    assert_eq!(status(&server, "one").unwrap(), "SUCCESS");
}

#[test]
fn a_hash_that_claims_to_be_a_task_sends_nothing() {
    let pictures = Pictures::serve();
    let server = server(&[]);
    let url = pictures.url("held/back/sign.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "alice:1", &url, "<OCR>"]);
    let embed = json!({"callbacks": [{"task": "x", "options": {"queue": "victim"}}]});
    let task = json!({"queue": "victim", "priority": 0, "embed": embed,
        "headers": {"id": "evil", "task": "tasks.inference_task"}});
    server.call::<()>(&["HSET", "alice:1", "celery", &task.to_string()]);
    pictures.release("back");
    server.call::<()>(&["FLORENCE.WAIT", "alice:1", "30"]);
    assert_eq!(server.state("alice:1"), "done");
    assert_eq!(server.call::<i64>(&["EXISTS", "victim", "celery-task-meta-evil"]), 0);
}

#[test]
fn a_replica_leaves_the_lists_alone_until_it_is_promoted() {
    let pictures = Pictures::serve();
    let (master, replica) = (Server::start(), server(&["replica-read-only no"]));
    replica.follow(&master);
    master.call::<()>(&["LPUSH", "celery", &ask("one", &pictures.url("sign.png"))]);
    eventually("the message arrives", || {
        (replica.call::<i64>(&["LLEN", "celery"]) == 1).then_some(())
    });
    std::thread::sleep(std::time::Duration::from_millis(400));
    assert_eq!(replica.call::<i64>(&["LLEN", "celery"]), 1);
    replica.call::<()>(&["REPLICAOF", "NO", "ONE"]);
    wait_for(&replica, "one", "SUCCESS");
}

const CHANNEL: &str = "/0.celery.pidbox";

/// A message of remote control; the reply goes to an exchange.
fn remote(method: &str, arguments: &Value, exchange: Option<&str>) -> String {
    let reply_to = exchange.map(|it| json!({ "exchange": it, "routing_key": "key" }));
    let body = json!({"method": method, "arguments": arguments, "reply_to": reply_to});
    let body = BASE64_STANDARD.encode(body.to_string());
    json!({"body": body, "headers": {"expires": 0}, "properties": {}}).to_string()
}

#[test]
fn replies_of_remote_control_go_to_lists_for_replies_only() {
    let server = server(&[]);
    server.call::<()>(&["LPUSH", "key.mine", "kept"]);
    for exchange in ["mine", "reply.celery.pidbox"] {
        let message = remote("ping", &json!({}), Some(exchange));
        server.call::<()>(&["PUBLISH", CHANNEL, &message]);
    }
    // They are acted on in their order.
    eventually("the reply comes", || {
        (server.call::<i64>(&["LLEN", "key.reply.celery.pidbox"]) == 1).then_some(())
    });
    assert_eq!(server.call::<Vec<String>>(&["LRANGE", "key.mine", "0", "-1"]), ["kept"]);
    assert_eq!(server.call::<i64>(&["TTL", "key.mine"]), -1);
}

#[test]
fn long_messages_of_remote_control_hold_nobody_up() {
    const TASKS: usize = 3000;
    let server = server(&["florence.paused yes", "latency-monitor-threshold 1"]);
    let ids: Vec<String> = (0..TASKS).map(|id| format!("task-{id}")).collect();
    let tasks: Vec<String> = ids.iter().map(|id| ask(id, "data:image/png;base64,AAAA")).collect();
    let mut push = redis::cmd("LPUSH");
    push.arg("celery").arg(&tasks).exec(&mut server.connect()).unwrap();
    eventually("all are jobs", || (server.stat("jobs_waiting") == 3000).then_some(()));
    server.call::<()>(&["CONFIG", "RESETSTAT"]);
    // For another worker, too long, and what is meant.
    let values = json!({ "task_id": vec!["x"; 200_000] });
    for message in [
        remote("revoke", &values, None).replace("properties", &"p".repeat(4 << 20)),
        remote("query_task", &json!({ "ids": vec!["x"; 100_000] }), Some("reply.celery.pidbox")),
        remote("revoke", &json!({ "task_id": ids }), None),
    ] {
        server.call::<()>(&["PUBLISH", CHANNEL, &message]);
    }
    eventually("all are revoked", || (server.stat("jobs_cancelled") == 3000).then_some(()));
    let stats: String = server.call(&["INFO", "commandstats"]);
    let control = stats.lines().find(|line| line.starts_with("cmdstat_florence.control")).unwrap();
    let usec: u64 =
        control.split("usec=").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!(usec < 100_000, "{control}");
}

#[test]
fn remote_control_needs_the_rights_that_publishing_needs() {
    let server = server(&[]);
    let revoke = |id: &str| remote("revoke", &json!({ "task_id": id }), None);
    let channel = CHANNEL;
    server.call::<()>(&["ACL", "SETUSER", "poor", "on", "nopass", "+@all", "resetchannels"]);
    server.call::<()>(&["ACL", "SETUSER", "reader", "on", "nopass", "+publish", "allchannels"]);
    for user in ["poor", "reader"] {
        let mut connection = server.connect();
        redis::cmd("AUTH").arg(user).arg("x").exec(&mut connection).unwrap();
        let reply: redis::RedisResult<i64> =
            redis::cmd("PUBLISH").arg(channel).arg(revoke("one")).query(&mut connection);
        let error = reply.unwrap_err().to_string();
        assert!(error.contains("NOPERM") || error.contains("permission"), "{user}: {error}");
    }
    server.call::<()>(&["FLORENCE.CONTROL", "elsewhere", &revoke("one")]);
    server.call::<()>(&["PUBLISH", channel, "no message at all"]);
    server.call::<()>(&["PUBLISH", channel, "{\"body\": 1}"]);
    let pictures = Pictures::serve();
    server.call::<()>(&["LPUSH", "celery", &ask("one", &pictures.url("sign.png"))]);
    wait_for(&server, "one", "SUCCESS");

    let mut subscriber = server.connect();
    let mut subscriber = subscriber.as_pubsub();
    subscriber.subscribe(channel).unwrap();
    let mut transaction = redis::pipe();
    transaction.atomic().cmd("PUBLISH").arg(channel).arg(revoke("two"));
    let receivers: Vec<i64> = transaction.query(&mut server.connect()).unwrap();
    assert_eq!(receivers, [1]);
    assert_eq!(subscriber.get_message().unwrap().get_payload::<String>().unwrap(), revoke("two"));
    server.call::<()>(&["LPUSH", "celery", &ask("two", &pictures.url("sign.png"))]);
    wait_for(&server, "two", "REVOKED");
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn bad_settings_and_clusters_are_refused_at_load() {
    for (lines, text) in [
        (vec!["florence.celery-queues celery"], "is not queue:task"),
        (vec![QUEUES, "cluster-enabled yes"], "Redis Cluster"),
        (vec![QUEUES, "florence.celery-priority-steps 12"], "is not numbers from 0 to 9"),
        (vec![QUEUES, "florence.celery-db 16"], "celery-db: the server has no database 16"),
        (
            vec![QUEUES, "databases 1", "florence.celery-result-db 1"],
            "celery-result-db: the server",
        ),
        (vec!["florence.coordinates both"], "is not float or int"),
    ] {
        let log = Server::refused(Settings::lines(&lines));
        assert!(log.contains(text), "{lines:?}: {log}");
    }
}

#[test]
fn mutated_messages_do_not_end_the_server() {
    let server = server(&["florence.max-queue 1000000"]);
    let good = ask("id", "data:image/png;base64,AAAA");
    let mut connection = server.connect();
    let mut seed = 7_u64;
    let mut below = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    for _ in 0..3000 {
        let mut bytes = good.clone().into_bytes();
        for _ in 0..=below(3) {
            let at = below(bytes.len());
            match below(3) {
                0 => bytes[at] = below(256).to_le_bytes()[0],
                1 => bytes.truncate(at.max(1)),
                _ => {
                    bytes.remove(at);
                }
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        redis::cmd("LPUSH").arg("celery").arg(&bytes).exec(&mut connection).unwrap();
    }
    server.call::<()>(&["LPUSH", "celery", &ask("last", "data:image/png;base64,AAAA")]);
    wait_for(&server, "last", "FAILURE");
    assert_eq!(server.stat("panics"), 0);
}

/// Pushes so many messages of a task that others take.
fn push_foreign(server: &Server, count: usize) {
    let mut connection = server.connect();
    for first in (0..count).step_by(1000) {
        let mut push = redis::cmd("LPUSH");
        push.arg("celery");
        for i in first..count.min(first + 1000) {
            push.arg(celery_message(&format!("foreign-{i}"), "app.other", &["x"]));
        }
        push.exec(&mut connection).unwrap();
    }
}

fn until_left(server: &Server, count: usize) {
    eventually("all is looked at", || {
        (server.stat("celery_left") == i64::try_from(count).unwrap()).then_some(())
    });
}

#[test]
fn messages_of_others_cost_the_server_no_command_and_hide_none_of_ours() {
    const OTHERS: usize = 20_000;
    let pictures = Pictures::serve();
    let server = server(&[]);
    let ours = |id: &str| ask(id, &pictures.url("sign.png"));
    push_foreign(&server, OTHERS / 2);
    let middle: Vec<String> = (0..20).map(|i| format!("middle-{i}")).collect();
    for id in &middle {
        server.call::<()>(&["LPUSH", "celery", &ours(id)]);
    }
    push_foreign(&server, OTHERS / 2);
    for id in &middle {
        wait_for(&server, id, "SUCCESS");
    }
    until_left(&server, OTHERS);
    let commands: String = server.call(&["INFO", "commandstats"]);
    for command in ["lpos", "lindex", "lrange"] {
        assert!(!commands.contains(&format!("cmdstat_{command}:")), "{command}: {commands}");
    }
    // Behind all of them, in their midst again, and where workers give back what they took.
    server.call::<()>(&["LPUSH", "celery", &ours("behind")]);
    wait_for(&server, "behind", "SUCCESS");
    server.call::<()>(&["RPUSH", "celery", &ours("given-back")]);
    wait_for(&server, "given-back", "SUCCESS");
    server.call::<()>(&["RPOP", "celery", "100"]);
    server.call::<()>(&["LPUSH", "celery", &ours("later")]);
    wait_for(&server, "later", "SUCCESS");
    assert_eq!(server.call::<usize>(&["LLEN", "celery"]), OTHERS - 100);
    until_left(&server, OTHERS);
    let all: Vec<String> = server.call(&["LRANGE", "celery", "0", "-1"]);
    assert!(all.iter().all(|message| message.contains("app.other")));
}
