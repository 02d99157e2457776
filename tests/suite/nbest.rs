//! `NBEST`: the best beams with their scores.

use std::collections::HashMap;

use florence_tests::{Pictures, Server, Settings};
use serde_json::{Value, json};

type Job = HashMap<String, Option<String>>;

fn ask(server: &Server, key: &str, url: &str, rest: &[&str]) -> Job {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url], rest].concat());
    let job: Job = server.call(&["FLORENCE.WAIT", key, "60"]);
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    job
}

fn read(job: &Job, field: &str) -> Value {
    serde_json::from_str(job[field].as_deref().unwrap()).unwrap()
}

#[test]
fn the_best_beams_are_told_and_the_first_is_the_answer() {
    let (server, pictures) = (Server::ready(&["florence.decimals 1"]), Pictures::serve());
    let url = pictures.url("shapes.png");
    for (key, prompt, n) in [("one", "<OD>", "1"), ("od", "<OD>", "3"), ("text", "<CAPTION>", "2")]
    {
        let job = ask(&server, key, &url, &[prompt, "BEAMS", "3", "NBEST", n]);
        let best = read(&job, "nbest");
        let best = best[0].as_array().unwrap();
        assert_eq!(best.len().to_string(), n, "{best:?}");
        assert_eq!(best[0]["result"], read(&job, "result"));
        assert_eq!(best[0]["text"].as_str(), job["text"].as_deref());
        let scores: Vec<f64> = best.iter().map(|one| one["score"].as_f64().unwrap()).collect();
        assert!(scores.is_sorted_by(|a, b| a >= b) && scores[0] < 0.0, "{scores:?}");
        let texts: std::collections::HashSet<_> =
            best.iter().map(|one| one["text"].as_str().unwrap()).collect();
        assert_eq!(texts.len(), best.len(), "{texts:?}");
    }
    // Each question has a list of its own, and the checkpoint's beams are three.
    let both = ask(&server, "both", &url, &["PROMPTS", "2", "<OD>", "<CAPTION>", "NBEST", "3"]);
    let (best, result) = (read(&both, "nbest"), read(&both, "result"));
    assert_eq!(best[0].as_array().unwrap().len() + best[1].as_array().unwrap().len(), 6);
    assert_eq!(best[0][0]["result"]["<OD>"], result["<OD>"]);
    assert_eq!(best[1][0]["result"]["<CAPTION>"], result["<CAPTION>"]);
    assert_eq!(best[0], read(&server.job("od"), "nbest")[0], "as asked alone");
    // What was asked without is another request, and has no such list.
    let plain = ask(&server, "plain", &url, &["<OD>", "BEAMS", "3"]);
    assert_eq!((plain["nbest"].clone(), plain["cache"].as_deref()), (None, Some("features")));
    assert_eq!(plain["text"], server.job("od")["text"]);
    let again = ask(&server, "again", &url, &["<OD>", "BEAMS", "3", "NBEST", "3"]);
    assert_eq!(
        (again["nbest"].clone(), again["cache"].as_deref()),
        (server.job("od")["nbest"].clone(), Some("result"),)
    );
}

#[test]
fn what_has_no_beams_or_not_as_many_is_refused() {
    let server = Server::ready(&[]);
    for (options, expected) in [
        (&["NBEST", "0"][..], "ERR NBEST is not an integer from 1 to 16"),
        (&["NBEST"], "ERR syntax error near 'NBEST'"),
        (&["NBEST", "4"], "ERR NBEST 4 is more than there are BEAMS, 3"),
        (&["NBEST", "2", "BEAMS", "1"], "ERR NBEST 2 is more than there are BEAMS, 1"),
        (
            &["NBEST", "1", "SEED", "1"],
            "ERR NBEST is for BEAMS: TEMPERATURE, TOPK, TOPP and SEED draw one text",
        ),
        (
            &["NBEST", "2", "EACH", "<REGION_TO_OCR>"],
            "ERR NBEST is for questions without THEN, EACH and CROP",
        ),
    ] {
        let submit = ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x.png", "<OD>"];
        assert_eq!(server.error(&[&submit, options].concat()), expected);
    }
    assert_eq!(server.call::<i64>(&["EXISTS", "job"]), 0);
}

#[test]
fn a_hash_that_asks_for_more_than_there_are_is_invalid() {
    let (server, pictures) = (Server::ready(&["florence.paused yes"]), Pictures::serve());
    let url = pictures.url("sign.png");
    for (key, n) in [("more", "4"), ("none", "0")] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OCR>", "NBEST", "2"]);
        server.call::<()>(&["HSET", key, "nbest_count", n]);
    }
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    for key in ["more", "none"] {
        let job: Job = server.call(&["FLORENCE.WAIT", key, "60"]);
        let error = read(&job, "error");
        assert_eq!(error["code"], "INVALID", "{job:?}");
    }
    assert!(server.job("more")["error"].as_deref().unwrap().contains("NBEST 4 is more than"));
}

#[test]
fn a_restart_keeps_what_was_asked_for() {
    let pictures = Pictures::serve();
    let mut server = Server::with(Settings::lines(&["appendonly yes", "appendfsync always"]));
    server.wait_for_model();
    let held = pictures.url("held/go/sign.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "job", &held, "<OCR>", "NBEST", "2"]);
    server.kill();
    pictures.release("go");
    server.restart();
    let job: Job = server.call(&["FLORENCE.WAIT", "job", "60"]);
    assert_eq!(read(&job, "nbest")[0].as_array().unwrap().len(), 2, "{job:?}");
    assert_eq!(read(&job, "nbest")[0][0]["result"], json!({ "<OCR>": "EXIT" }));
}
