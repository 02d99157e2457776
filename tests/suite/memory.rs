//! How much memory pictures take while they are read, and what is told of it.

use std::collections::HashMap;

use florence_tests::{Server, Settings, blank_png, eventually, picture};

type Job = HashMap<String, Option<String>>;

const MIB: u64 = 1 << 20;

fn submit(server: &Server, key: &str, bytes: &[u8]) {
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(key).arg("DATA").arg(bytes).arg("<CAPTION>").arg("NOCACHE");
    submit.exec(&mut server.connect()).unwrap();
}

fn assert_done(server: &Server, key: &str) {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "120"]);
    let job = job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)));
    assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
}

#[test]
fn huge_pictures_at_once_take_turns() {
    const SIDE: u32 = 9000;
    let server =
        Server::with(Settings::lines(&["florence.work-bytes 300mb", "florence.prepare-threads 8"]));
    server.wait_for_model();
    submit(&server, "warm", &std::fs::read(picture("shapes.png")).unwrap());
    assert_done(&server, "warm");
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mut all = redis::pipe();
    for key in keys {
        let submit = all.cmd("FLORENCE.SUBMIT").arg(key).arg("DATA").arg(blank_png(SIDE, key));
        submit.arg("<CAPTION>").arg("NOCACHE").ignore();
    }
    let before = server.peak() << 10;
    all.exec(&mut server.connect()).unwrap();
    // Small ones are not starved by them.
    submit(&server, "small", &std::fs::read(picture("sign.png")).unwrap());
    for key in keys {
        assert_done(&server, key);
    }
    assert_done(&server, "small");
    let grown = (server.peak() << 10) - before;
    assert!(grown < 1200 * MIB, "the server took {} MiB more", grown / MIB);
    let peak = u64::try_from(server.stat("memory_work_peak")).unwrap() / MIB;
    assert!((100..800).contains(&peak), "{peak} MiB of work at most");
    eventually("all is given back", || (server.stat("memory_work") == 0).then_some(()));
}

#[test]
fn keys_and_values_of_jobs_take_turns() {
    let server = Server::ready(&["florence.max-batch 8", "florence.kv-cache-bytes 1mb"]);
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let submit = |key: &str| {
        let mut submit = redis::cmd("FLORENCE.SUBMIT");
        submit.arg(key).arg("DATA").arg(&bytes).arg("<MORE_DETAILED_CAPTION>").arg("NOCACHE");
        submit.arg(&["BEAMS", "16", "MAXTOKENS", "1024"]).exec(&mut server.connect()).unwrap();
    };
    let all = |keys: [&str; 4]| {
        for key in keys {
            submit(key);
        }
        for key in keys {
            assert_done(&server, key);
        }
        eventually("the room is given back", || {
            (server.stat("memory_kv_cache") == 0).then_some(())
        });
        server.stat("memory_kv_cache_peak")
    };
    // One alone is larger than that.
    submit("one");
    assert_done(&server, "one");
    let one = server.stat("memory_kv_cache_peak");
    assert!(one > 1 << 20, "{one} bytes of keys and values");
    assert_eq!(all(["a", "b", "c", "d"]), one);
    server.call::<()>(&["CONFIG", "SET", "florence.kv-cache-bytes", "1gb"]);
    assert!(all(["e", "f", "g", "h"]) > one);
}

#[test]
fn memory_is_told_by_what_it_is_for() {
    let server = Server::start();
    server.wait_for_model();
    let names =
        ["weights_mapped", "weights_packed", "caches", "work", "work_peak", "kv_cache_peak"];
    let memory = || {
        names.map(|name| {
            let (stat, info) = (format!("memory_{name}"), format!("florence_memory_{name}"));
            (server.stat(&stat), server.info(&info))
        })
    };
    let at_first = memory();
    for (name, (stat, info)) in names.iter().zip(at_first) {
        assert!(stat >= 0 && stat == info, "{name}: {stat} in STATS, {info} in INFO");
    }
    let [mapped, packed, empty, work, ..] = at_first.map(|(stat, _)| stat);
    assert!(mapped + packed > 0, "a model without weights");
    assert_eq!(work, 0);
    let mut ask = redis::cmd("FLORENCE.SUBMIT");
    ask.arg("j").arg("DATA").arg(std::fs::read(picture("shapes.png")).unwrap()).arg("<CAPTION>");
    ask.exec(&mut server.connect()).unwrap();
    assert_done(&server, "j");
    eventually("the work is given back", || (server.stat("memory_work") == 0).then_some(()));
    let [_, packed, caches, _, peak, _] = memory().map(|(stat, _)| stat);
    assert!(caches > empty && peak > 0, "caches {empty}, then {caches}, work {peak} at most");
    let cached = server.stat("cache_feature_bytes") + server.stat("cache_result_bytes");
    assert!(caches >= cached, "{caches} of caches, with {cached} in them");
    let resident = i64::try_from(server.usage()[0] << 10).unwrap();
    // What is mapped need not be resident.
    assert!(packed + caches <= resident, "{packed} + {caches} > {resident}");
}
