//! Many jobs, many waiters.

use std::{collections::HashMap, thread};

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
    let start = std::time::Instant::now();
    while server.stat("jobs_done") < 2000 {
        assert_eq!(server.stat("jobs_failed"), 0);
        assert!(start.elapsed().as_secs() < 900, "{} done", server.stat("jobs_done"));
        thread::sleep(std::time::Duration::from_millis(200));
    }
    let first = server.job("j0")["result"].clone();
    assert!(first.is_some());
    for i in 1..2000 {
        assert_eq!(server.job(&format!("j{i}"))["result"], first, "j{i}");
    }
    assert_eq!(server.stat("jobs_waiting") + server.stat("jobs_active"), 0);
}

#[test]
fn two_hundred_clients_wait_for_one_job() {
    let pictures = Pictures::serve();
    let server = Server::start();
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &pictures.url("slow/2500/shapes.png"), "<OD>"]);
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
    let answers: Vec<String> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(server.stat("waiters"), 0);
    assert_eq!(pictures.hits(), 1);
}

#[test]
fn a_full_queue_refuses_at_once() {
    let pictures = Pictures::serve();
    let lines = ["florence.max-queue 3", "florence.prepare-threads 1"];
    let server = Server::with(Settings::lines(&lines));
    let url = pictures.url("slow/2000/shapes.png");
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
    let batches = server.stat("batches");
    assert_eq!(batches, 16);
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
    assert!(server.stat("batches") - batches < 16, "no jobs were batched");
}
