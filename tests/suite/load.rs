//! Many jobs, many waiters.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, eventually, picture};

#[test]
fn two_thousand_jobs_submitted_at_once_are_all_answered() {
    let server = Server::start();
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut pipe = redis::pipe();
    for i in 0..2000 {
        pipe.cmd("FLORENCE.SUBMIT")
            .arg(format!("j{i}"))
            .arg("DATA")
            .arg(&bytes)
            .arg("<REGION_TO_CATEGORY><loc_100><loc_100><loc_500><loc_500>")
            .arg("BEAMS")
            .arg(1)
            .ignore();
    }
    let _: () = pipe.query(&mut server.connect()).unwrap();
    let start = Instant::now();
    while server.stat("jobs_done") < 2000 {
        assert_eq!(server.stat("jobs_failed"), 0);
        assert!(start.elapsed().as_secs() < 900, "{} done", server.stat("jobs_done"));
        thread::sleep(Duration::from_millis(200));
    }
    let first = server.job("j0")["result"].clone();
    assert!(first.is_some());
    for i in 1..2000 {
        assert_eq!(server.job(&format!("j{i}"))["result"], first, "j{i}");
    }
    assert_eq!(server.unfinished(), 0);
}

#[test]
fn two_hundred_clients_wait_for_one_job() {
    let pictures = Pictures::serve();
    let server = Server::start();
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("held/back/shapes.png"), "<OD>"]);
    let clients: Vec<_> = (0..200)
        .map(|_| {
            let mut connection = server.connect();
            thread::spawn(move || {
                let job: HashMap<String, Option<String>> =
                    redis::cmd("FLORENCE.WAIT").arg("j").arg(60).query(&mut connection).unwrap();
                job["result"].clone().unwrap()
            })
        })
        .collect();
    eventually("all wait", || (server.stat("waiters") == 200).then_some(()));
    pictures.release("back");
    let answers: Vec<String> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    eventually("nobody waits", || (server.stat("waiters") == 0).then_some(()));
    assert_eq!(pictures.hits(), 1);
}

#[test]
fn a_full_queue_refuses_at_once() {
    let pictures = Pictures::serve();
    let lines = ["florence.max-queue 3", "florence.max-downloads 1"];
    let server = Server::with(Settings::lines(&lines));
    let url = pictures.url("held/back/shapes.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "first", &url, "<OD>"]);
    eventually("it is worked on", || (server.state("first") == "fetching").then_some(()));
    for key in ["a", "b", "c"] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OD>"]);
    }
    let refused = server.error(&["FLORENCE.SUBMIT", "d", &url, "<OD>"]);
    assert_eq!(refused, "BUSY queue is full, retry after 1000 ms");
    assert_eq!(server.call::<i64>(&["EXISTS", "d"]), 0);
    assert_eq!(server.stat("submits_refused"), 1);
}

#[test]
fn batches_give_the_answers_of_single_runs() {
    let server = Server::with(Settings::lines(&["florence.max-batch 8"]));
    let pictures = ["shapes.png", "sign.png", "poster.jpg", "tall.png"];
    let prompts = ["<OD>", "<CAPTION>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>"];
    let mut connection = server.connect();
    let mut submit = |key: String, name: &str, prompt: &str| {
        let bytes = std::fs::read(picture(name)).unwrap();
        redis::cmd("FLORENCE.SUBMIT")
            .arg(key)
            .arg("DATA")
            .arg(bytes)
            .arg(prompt)
            .arg("NOCACHE")
            .exec(&mut connection)
            .unwrap();
    };
    for name in pictures {
        for prompt in prompts {
            submit(format!("single:{name}:{prompt}"), name, prompt);
            let key = format!("single:{name}:{prompt}");
            server.call::<HashMap<String, Option<String>>>(&["FLORENCE.WAIT", &key, "60"]);
        }
    }
    let steps = server.stat("decoder_steps");
    for name in pictures {
        for prompt in prompts {
            submit(format!("batch:{name}:{prompt}"), name, prompt);
        }
    }
    for name in pictures {
        for prompt in prompts {
            let key = format!("batch:{name}:{prompt}");
            let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", &key, "60"]);
            let alone = server.job(&format!("single:{name}:{prompt}"));
            assert_eq!(job["text"], alone["text"], "{key}");
        }
    }
    assert!(server.stat("decoder_steps") - steps < steps, "no steps were joined");
}

#[test]
fn an_urgent_job_goes_before_those_that_are_prepared() {
    let server = Server::ready(&["florence.max-batch 8"]);
    let pictures = Pictures::serve();
    let shapes = std::fs::read(picture("shapes.png")).unwrap();
    let address = pictures.url("shapes.png");
    for source in [&[&b"DATA"[..], &shapes][..], &[address.as_bytes()]] {
        let mut connection = server.connect();
        let mut submit = |key: &str, priority: &str| {
            let mut command = redis::cmd("FLORENCE.SUBMIT");
            command.arg(key).arg(source).arg("<OD>").arg(&["BEAMS", "8", "NOCACHE"]);
            command.arg("PRIORITY").arg(priority).exec(&mut connection).unwrap();
        };
        let others: Vec<String> = (0..60).map(|i| format!("other:{i}")).collect();
        for key in &others {
            submit(key, "0");
        }
        let done = server.stat("jobs_done");
        eventually("some are done", || (server.stat("jobs_done") > done + 5).then_some(()));
        submit("urgent", "9");
        let urgent: HashMap<String, Option<String>> =
            server.call(&["FLORENCE.WAIT", "urgent", "60"]);
        let at = |job: &HashMap<String, Option<String>>, field: &str| -> i64 {
            job[field].as_deref().map_or(i64::MAX, |text| text.parse().unwrap())
        };
        let (begin, end) = (at(&urgent, "submitted_at"), at(&urgent, "finished_at"));
        server.until_idle();
        let ends = others.iter().map(|key| at(&server.job(key), "finished_at"));
        let before = ends.filter(|at| (begin..end).contains(at)).count();
        // Those in the batch, and a few that came to it meanwhile.
        assert!(before <= 15, "{before} jobs ended while the urgent one waited");
        server.call::<()>(&["FLUSHALL"]);
    }
}

#[test]
fn what_was_asked_before_is_not_computed_again() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let ask = |key: &str, prompt: &str, options: &[&str]| {
        let url = pictures.url("shapes.png");
        server.call::<()>(&[&["FLORENCE.SUBMIT", key, &url, prompt], options].concat());
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", key, "30"]);
        assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
        (job["cache"].clone().unwrap(), job["result"].clone().unwrap())
    };
    let (verdict, answer) = ask("first", "<OD>", &[]);
    assert_eq!(verdict, "miss");
    assert_eq!(ask("again", "<OD>", &[]), ("result".to_owned(), answer.clone()));
    let (verdict, other) = ask("other", "<OCR>", &[]);
    assert_eq!(verdict, "features");
    // Another option is another request; NOCACHE leaves the caches alone.
    assert_eq!(ask("greedy", "<OD>", &["BEAMS", "1"]).0, "features");
    assert_eq!(ask("fresh", "<OD>", &["NOCACHE"]), ("miss".to_owned(), answer));
    assert_eq!(ask("fresh-other", "<OCR>", &["NOCACHE"]), ("miss".to_owned(), other));
    let stats = ["cache_results", "cache_features", "cache_misses"].map(|name| server.stat(name));
    assert_eq!(stats, [1, 2, 3]);
    assert!(server.stat("cache_feature_bytes") > 0 && server.stat("cache_result_bytes") > 0);
}

#[test]
fn the_same_request_in_flight_runs_once() {
    // The only compute thread is busy with a long answer while the others come in.
    let lines = ["florence.threads 1", "florence.result-cache-bytes 0"];
    let (server, pictures) = (Server::with(Settings::lines(&lines)), Pictures::serve());
    let url = pictures.url("poster.jpg");
    let keys: Vec<String> = (0..20).map(|i| format!("same:{i}")).collect();
    let mut pipe = redis::pipe();
    for key in &keys {
        pipe.cmd("FLORENCE.SUBMIT").arg(key).arg(&url).arg("<DENSE_REGION_CAPTION>").ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    let mut texts = std::collections::HashSet::new();
    for key in &keys {
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", key, "60"]);
        assert_eq!(job["state"].as_deref(), Some("done"));
        texts.insert(job["text"].clone());
    }
    assert_eq!(texts.len(), 1);
    assert!(server.stat("cache_results") > 0, "no job shared the answer of another");
    assert_eq!(
        server.stat("cache_results") + server.stat("cache_features") + server.stat("cache_misses"),
        20
    );
}

#[test]
fn cancelling_one_of_several_askers_leaves_the_others_their_answer() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let url = pictures.url("held/back/poster.jpg");
    for key in ["a", "b", "c"] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<DENSE_REGION_CAPTION>"]);
    }
    eventually("all are fetched", || (server.stat("jobs_active") == 3).then_some(()));
    server.call::<()>(&["FLORENCE.CANCEL", "a"]);
    pictures.release("back");
    for (key, state) in [("a", "cancelled"), ("b", "done"), ("c", "done")] {
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", key, "30"]);
        assert_eq!(job["state"].as_deref(), Some(state), "{key}");
    }
}

/// `make soak` lets it run for an hour.
/// The thread that computes never waits for the server's lock.
#[test]
fn the_model_goes_on_while_the_server_sleeps() {
    let server = Server::start();
    server.wait_for_model();
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut connection = server.connect();
    let mut round = 0;
    eventually("jobs are answered during the sleep", || {
        round += 1;
        let mut pipe = redis::pipe();
        for i in 0..16 {
            let submit = pipe.cmd("FLORENCE.SUBMIT").arg(format!("{round}:{i}"));
            submit.arg("DATA").arg(&bytes).arg("<OCR>").arg("NOCACHE").ignore();
        }
        pipe.exec(&mut connection).unwrap();
        eventually("some are prepared", || (server.stat("jobs_active") >= 8).then_some(()));
        let mut pipe = redis::pipe();
        pipe.cmd("FLORENCE.STATS").cmd("DEBUG").arg("SLEEP").arg(1).ignore().cmd("FLORENCE.STATS");
        let [before, after]: [HashMap<String, i64>; 2] = pipe.query(&mut connection).unwrap();
        eventually("the rest ends", || (server.stat("jobs_active") == 0).then_some(()));
        (after["cache_misses"] >= before["cache_misses"] + 4).then_some(())
    });
}

#[test]
fn soak_a_server_at_full_load_does_not_grow() {
    let seconds = std::env::var("FLORENCE_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(20, |seconds| seconds.parse().expect("a number of seconds"));
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let (mut connection, start, mut jobs) = (server.connect(), Instant::now(), 0);
    let mut warm = None;
    while start.elapsed() < Duration::from_secs(seconds) {
        let keys: Vec<String> = (jobs..jobs + 24).map(|i| format!("job:{}", i % 240)).collect();
        let mut pipe = redis::pipe();
        for (i, key) in keys.iter().enumerate() {
            let url = pictures.url(["shapes.png", "sign.png", "poster.jpg"][i % 3]);
            pipe.cmd("DEL").arg(key).ignore();
            let submit = pipe.cmd("FLORENCE.SUBMIT").arg(key).arg(url).arg("<CAPTION>");
            submit.arg("NOCACHE").arg("RETRIES").arg(0).ignore();
        }
        pipe.query::<()>(&mut connection).unwrap();
        for key in &keys {
            let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", key, "60"]);
            assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
        }
        jobs += keys.len();
        // By then every key has been used, and all buffers have found their size.
        if warm.is_none() && (jobs >= 240 || start.elapsed().as_secs() * 2 > seconds) {
            warm = Some(server.usage());
        }
    }
    let (warm, end) = (warm.expect("a warm server"), server.usage());
    println!("soak: {jobs} jobs in {seconds} s; KiB, threads, descriptors: {warm:?}, then {end:?}");
    assert!(end[0] < warm[0] + (100 << 10), "memory grew: {warm:?} {end:?}");
    assert_eq!(end[1], warm[1]);
    assert!(end[2] <= warm[2] + 8, "descriptors grew: {warm:?} {end:?}");
}
