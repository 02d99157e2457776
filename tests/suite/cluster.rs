//! Three masters with replicas: routing, moving slots, failover.

use std::{collections::HashMap, thread};

use florence_tests::{Cluster, Pictures, eventually, picture, python, run_client};
use redis::cluster::ClusterConnection;

type Job = HashMap<String, Option<String>>;

fn ask<T: redis::FromRedisValue>(client: &mut ClusterConnection, args: &[&str]) -> T {
    let reply = redis::cmd(args[0]).arg(&args[1..]).query(client);
    reply.unwrap_or_else(|error| panic!("{args:?}: {error}"))
}

/// Submits jobs that cannot be answered from a cache.
fn submit(client: &mut ClusterConnection, keys: &[String], url: &str) {
    for key in keys {
        ask::<()>(client, &["FLORENCE.SUBMIT", key, url, "<CAPTION>", "NOCACHE"]);
    }
}

/// Waits for a job wherever it is; a node that dies or hands over answers with an error.
fn finish(cluster: &Cluster, client: &mut ClusterConnection, key: &str) -> Job {
    eventually(&format!("{key} ends"), || {
        let job: redis::RedisResult<Option<Job>> =
            redis::cmd("FLORENCE.WAIT").arg(key).arg("5").query(client);
        if job.is_err() {
            *client = cluster.connect();
        }
        job.ok().flatten()
    })
}

#[test]
fn a_cluster_routes_jobs_and_refuses_what_crosses_slots() {
    let (cluster, pictures) = (Cluster::start(), Pictures::serve());
    let mut client = cluster.connect();
    let url = pictures.url("shapes.png");
    let key: String = ask(&mut client, &["FLORENCE.SUBMIT", "*", &url, "<OD>"]);
    let home = cluster.slot("*");
    let owner = (0..3).find(|i| cluster.slots(*i).contains(&home)).unwrap();
    assert!(cluster.slots(owner).contains(&cluster.slot(&key)), "{key}");
    assert_eq!(finish(&cluster, &mut client, &key)["state"].as_deref(), Some("done"));

    let node = &cluster.nodes[usize::from(owner)];
    let mut foreign = (0..).map(|i| format!("k{i}"));
    let foreign = foreign.find(|key| !cluster.slots(owner).contains(&cluster.slot(key))).unwrap();
    let moved = node.error(&["FLORENCE.SUBMIT", &foreign, &url, "<OD>"]);
    assert!(moved.starts_with("MOVED"), "{moved}");
    let moved = node.error(&["FLORENCE.SUBMIT", &key, "KEY", &foreign, "<OD>"]);
    assert!(moved.starts_with("CROSSSLOT"), "{moved}");
    let moved = node.error(&["FLORENCE.SUBMIT", &key, &url, "<OD>", "TOKENS", &foreign]);
    assert!(moved.starts_with("CROSSSLOT"), "{moved}");
    node.call::<()>(&["FLORENCE.SUBMIT", "{*}told", &url, "<OCR>", "TOKENS", "{*}stream"]);
    eventually("the text is told", || {
        let entries: redis::Value = node.call(&["XREVRANGE", "{*}stream", "+", "-", "COUNT", "1"]);
        format!("{entries:?}").contains("done").then_some(())
    });
    // Nor is it told to a slot that a job's hash names, though the node has that one too.
    let same = (0..100_000).map(|i| format!("s{i}")).find(|key| {
        let slot = cluster.slot(key);
        slot != home && cluster.slots(owner).contains(&slot)
    });
    let same = same.unwrap();
    node.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    node.call::<()>(&["FLORENCE.SUBMIT", "{*}forged", &url, "<OCR>"]);
    node.call::<()>(&["HSET", "{*}forged", "stream", &same]);
    node.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    assert_eq!(finish(&cluster, &mut client, "{*}forged")["state"].as_deref(), Some("failed"));
    assert_eq!(node.call::<i64>(&["EXISTS", &same]), 0);
    let crossing = node.error(&["FLORENCE.WAIT", &key, &foreign, "1"]);
    assert!(crossing.starts_with("CROSSSLOT"), "{crossing}");

    // A shard channel of the key's slot hears of the end.
    let mut listener = node.connect();
    let subscribe = redis::cmd("SSUBSCRIBE").arg("florence:{*}mine").get_packed_command();
    listener.send_packed_command(&subscribe).unwrap();
    listener.recv_response().unwrap();
    node.call::<()>(&["FLORENCE.SUBMIT", "{*}mine", &url, "<OD>"]);
    let message = format!("{:?}", listener.recv_response().unwrap());
    assert!(message.contains("smessage") && message.contains("done"), "{message}");
    assert_eq!(node.stat("jobs_unannounced"), 0);
}

#[test]
fn cluster_clients_of_other_languages_need_no_help() {
    let cluster = Cluster::start();
    let shapes = picture("shapes.png").display().to_string();
    for library in ["redis", "valkey"] {
        let port = cluster.nodes[1].port.to_string();
        run_client(&python(), "cluster.py", [library, &port, &shapes]).unwrap();
    }
}

#[test]
fn moving_a_slot_moves_its_jobs() {
    let (mut cluster, pictures) = (Cluster::start(), Pictures::serve());
    let mut client = cluster.connect();
    let keys: Vec<String> = (0..24).map(|i| format!("{{moved}}:{i}")).collect();
    let slot = cluster.slot(&keys[0]);
    let from = (0..3).find(|i| cluster.slots(*i).contains(&slot)).unwrap();
    let (from, to) = (usize::from(from), (usize::from(from) + 1) % 3);
    submit(&mut client, &keys[..16], &pictures.url("slow/300/shapes.png"));
    // However long the move takes, these are not done before it.
    submit(&mut client, &keys[16..], &pictures.url("held/back/shapes.png"));
    // A client that is blocked on the node which the job leaves is sent after it.
    let waiter = {
        let (mut connection, key) = (cluster.nodes[from].connect(), keys[23].clone());
        thread::spawn(move || {
            redis::cmd("FLORENCE.WAIT").arg(key).arg("60").query::<redis::Value>(&mut connection)
        })
    };
    eventually("a client waits, and work has begun", || {
        let node = &cluster.nodes[from];
        (node.stat("waiters") == 1 && node.stat("jobs_done") > 0).then_some(())
    });
    let (source, target) = (&cluster.nodes[from], &cluster.nodes[to]);
    let id = |node: usize| cluster.nodes[node].call::<String>(&["CLUSTER", "MYID"]);
    let (source_id, target_id, text) = (id(from), id(to), slot.to_string());
    target.call::<()>(&["CLUSTER", "SETSLOT", &text, "IMPORTING", &source_id]);
    source.call::<()>(&["CLUSTER", "SETSLOT", &text, "MIGRATING", &target_id]);
    loop {
        let batch: Vec<String> = source.call(&["CLUSTER", "GETKEYSINSLOT", &text, "5"]);
        if batch.is_empty() {
            break;
        }
        let port = target.port.to_string();
        let mut args = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
        args.extend(batch.iter().map(String::as_str));
        source.call::<()>(&args);
    }
    for node in [target, source, &cluster.nodes[3 - from - to]] {
        node.call::<()>(&["CLUSTER", "SETSLOT", &text, "NODE", &target_id]);
    }
    pictures.release("back");
    for key in &keys {
        let job = finish(&cluster, &mut client, key);
        assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
    }
    let sent_away = waiter.join().unwrap();
    let code = sent_away.as_ref().err().and_then(redis::RedisError::code);
    assert!(
        matches!(code, Some("MOVED" | "ASK")) || sent_away == Ok(redis::Value::Nil),
        "{sent_away:?}"
    );
    assert!(cluster.nodes[to].stat("jobs_done") >= 8, "the held ones were not moved");
    // Each was finished once, on one node or the other.
    assert_eq!(cluster.stat("jobs_done"), 24);
}

#[test]
fn a_failover_loses_no_job() {
    let (mut cluster, pictures) = (Cluster::start(), Pictures::serve());
    let mut client = cluster.connect();
    let keys: Vec<String> = (0..24).map(|i| format!("job:{i}")).collect();
    submit(&mut client, &keys, &pictures.url("slow/300/shapes.png"));
    for node in &cluster.nodes[..3] {
        assert_eq!(node.call::<i64>(&["WAIT", "1", "5000"]), 1);
    }
    cluster.nodes[0].kill();
    let replica = &cluster.nodes[3];
    eventually("the replica is promoted", || {
        replica.call::<String>(&["INFO", "replication"]).contains("role:master").then_some(())
    });
    for key in &keys {
        let job = finish(&cluster, &mut client, key);
        assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
    }
}
