//! Answers that are drawn by chance, and the options of a search.

use std::collections::{HashMap, HashSet};

use florence_tests::{Pictures, Server};

type Job = HashMap<String, Option<String>>;

/// The text of an answer.
fn ask(server: &Server, key: &str, url: &str, options: &[&str]) -> String {
    let submit = ["FLORENCE.SUBMIT", key, url, "<DETAILED_CAPTION>"];
    server.call::<()>(&[&submit, options].concat());
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "60"]);
    let job = job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)));
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    job["text"].clone().unwrap()
}

#[test]
fn a_seed_gives_the_same_answer_whoever_else_is_asked() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    let drawn = |key: &str, seed: &str| {
        let options =
            ["TEMPERATURE", "8", "TOPK", "100", "SEED", seed, "MAXTOKENS", "24", "NOCACHE"];
        ask(&server, key, &url, &options)
    };
    let alone = drawn("alone", "1");
    // Beside others that draw and that search.
    for i in 0..8 {
        let (key, seed) = (format!("other:{i}"), i.to_string());
        let wide = ["TEMPERATURE", "1.5", "TOPK", "0", "SEED", seed.as_str(), "NOCACHE"];
        let options: &[&str] = if i % 2 == 0 { &wide } else { &["BEAMS", "5", "NOCACHE"] };
        let submit = ["FLORENCE.SUBMIT", &key, &url, "<CAPTION>"];
        server.call::<()>(&[&submit, options].concat());
    }
    assert_eq!(drawn("among", "1"), alone);
    let texts: HashSet<String> =
        (2..6).map(|i| drawn(&format!("seed:{i}"), &i.to_string())).collect();
    assert!(texts.len() > 1, "{texts:?}");
    // Without a seed the server chooses one, and keeps it: the same job again is the same answer.
    let options = ["TEMPERATURE", "8", "MAXTOKENS", "24", "NOCACHE"];
    let first = ask(&server, "chosen", &url, &options);
    assert!(server.call::<Option<i64>>(&["HGET", "chosen", "seed"]).is_some());
    let submit = ["FLORENCE.SUBMIT", "chosen", &url, "<DETAILED_CAPTION>"];
    assert_eq!(server.call::<String>(&[&submit[..], &options].concat()), "chosen");
    server.call::<()>(&["HSET", "chosen", "state", "failed"]);
    server.call::<()>(&["FLORENCE.RETRY", "chosen"]);
    let job: Job = server.call(&["FLORENCE.WAIT", "chosen", "60"]);
    assert_eq!(job["text"].as_deref(), Some(first.as_str()));
    // The likeliest token alone is greedy search.
    let greedy = ask(&server, "greedy", &url, &["BEAMS", "1", "NOCACHE"]);
    assert_eq!(ask(&server, "one", &url, &["TOPK", "1", "NOCACHE"]), greedy);
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn options_that_do_not_go_together_are_named() {
    let server = Server::ready(&[]);
    for (options, expected) in [
        (&["TEMPERATURE", "0"][..], "ERR TEMPERATURE is not a number from 0.01 to 100"),
        (&["TEMPERATURE", "nan"], "ERR TEMPERATURE is not a number from 0.01 to 100"),
        (&["TOPP", "1.5"], "ERR TOPP is not a number from 0.01 to 1"),
        (&["TOPK", "-1"], "ERR TOPK is not an integer from 0 to 100000"),
        (&["SEED", "x"], "ERR SEED is not an integer from 0 to 9223372036854775807"),
        (&["LENGTHPENALTY", "11"], "ERR LENGTHPENALTY is not a number from -10 to 10"),
        (&["LENGTHPENALTY"], "ERR syntax error near 'LENGTHPENALTY'"),
        (
            &["SEED", "1", "BEAMS", "3"],
            "ERR TEMPERATURE, TOPK, TOPP and SEED draw tokens: there are no BEAMS then",
        ),
        (&["LENGTHPENALTY", "2", "BEAMS", "1"], "ERR LENGTHPENALTY is for BEAMS"),
        (&["LENGTHPENALTY", "2", "SEED", "1"], "ERR LENGTHPENALTY is for BEAMS"),
    ] {
        let submit = ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x.png", "<CAPTION>"];
        let error = server.error(&[&submit, options].concat());
        assert_eq!(error, expected, "{options:?}");
    }
    assert_eq!(server.call::<i64>(&["EXISTS", "job"]), 0);
}

#[test]
fn repeated_ngrams_and_lengths_are_those_that_are_asked_for() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    // No token twice, but for those that begin and end a text.
    let options = ["BEAMS", "1", "MAXTOKENS", "12"];
    let text = ask(&server, "ngram", &url, &[&options[..], &["NGRAM", "1"]].concat());
    let words = text.split(|c: char| !c.is_alphabetic());
    let words: Vec<&str> = words.filter(|word| word.len() > 1).collect();
    assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len(), "{text}");
    assert_ne!(ask(&server, "plain", &url, &options), text);
    // What favours short texts gives none that is longer.
    let long = ask(&server, "long", &url, &["LENGTHPENALTY", "8"]);
    let short = ask(&server, "short", &url, &["LENGTHPENALTY", "-8"]);
    assert!(short.len() <= long.len(), "{short} {long}");
}
