//! Several engines, and devices that are not there.

use std::collections::HashMap;

use florence_tests::{Server, Settings, eventually, picture};

type Job = HashMap<String, Option<String>>;

const PROMPTS: [&str; 4] = ["<CAPTION>", "<OD>", "<DETAILED_CAPTION>", "<OCR_WITH_REGION>"];
const PICTURES: [&str; 3] = ["shapes.png", "sign.png", "poster.jpg"];

/// Answers to so many jobs, all of which wait at once.
fn answers(server: &Server, count: usize) -> Vec<[Option<String>; 2]> {
    let mut all = redis::pipe();
    for i in 0..count {
        let bytes = std::fs::read(picture(PICTURES[i % PICTURES.len()])).unwrap();
        let submit = all.cmd("FLORENCE.SUBMIT").arg(format!("job:{i}")).arg("DATA").arg(bytes);
        submit.arg(PROMPTS[i % PROMPTS.len()]).arg("NOCACHE").ignore();
    }
    all.exec(&mut server.connect()).unwrap();
    let answer = |i: usize| {
        let job: Option<Job> = server.call(&["FLORENCE.WAIT", &format!("job:{i}"), "120"]);
        let mut job = job.unwrap_or_else(|| panic!("job {i} does not end"));
        assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
        ["result", "scores"].map(|field| job.remove(field).unwrap())
    };
    (0..count).map(answer).collect()
}

/// What INFO tells of an engine: `state=ready,answers=3,..`.
fn engine(server: &Server, number: usize) -> HashMap<String, String> {
    let info: String = server.call(&["INFO", "florence"]);
    let name = format!("florence_engine_{number}:");
    let line = info.lines().find_map(|line| line.strip_prefix(&name));
    let line = line.unwrap_or_else(|| panic!("{name} is missing in {info}"));
    let pairs = line.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[test]
fn two_engines_share_the_work_and_answer_as_one() {
    let one = Server::ready(&["florence.threads 2"]);
    let expected = answers(&one, 24);
    assert_eq!(engine(&one, 0)["answers"], "24");
    let weights = one.stat("memory_weights_packed");
    drop(one);

    // A batch of one leaves work for the other.
    let lines = ["florence.engines 2", "florence.threads 2", "florence.max-batch 1"];
    let two = Server::ready(&lines);
    eventually("both have the model", || (two.stat("engines_ready") == 2).then_some(()));
    assert_eq!(answers(&two, 24), expected);
    let counts = [0, 1].map(|number| {
        let engine = engine(&two, number);
        assert_eq!((engine["state"].as_str(), engine["device"].as_str()), ("ready", "cpu"));
        engine["answers"].parse::<u64>().unwrap()
    });
    assert_eq!(counts.iter().sum::<u64>(), 24);
    assert!(counts.iter().all(|count| *count > 2), "{counts:?}");
    assert_eq!(two.stat("memory_weights_packed"), weights, "the weights are shared");
    assert_eq!((two.stat("panics"), two.stat("leases_recovered")), (0, 0));
}

#[test]
fn one_engine_goes_on_where_the_other_has_no_device() {
    let server = Server::ready(&["florence.device \"cuda:7 cpu\""]);
    eventually("the other has failed", || (engine(&server, 0)["state"] == "failed").then_some(()));
    assert_eq!(answers(&server, 4).len(), 4);
    assert_eq!((engine(&server, 0)["answers"].as_str(), server.stat("engines_ready")), ("0", 1));
    let model = server.model();
    assert_eq!(
        (model["state"].as_deref(), model["device"].as_deref()),
        (Some("ready"), Some("cpu"))
    );
}

#[test]
fn a_device_that_is_not_there_is_told_and_the_server_goes_on() {
    let server = Server::with(Settings::lines(&["florence.device cuda"]));
    let problem = eventually("the model fails", || {
        let model = server.model();
        (model["state"].as_deref() == Some("failed")).then(|| model["error"].clone().unwrap())
    });
    assert!(problem.contains("CUDA"), "{problem}");
    assert!(server.log().contains(&problem), "{}", server.log());
    let refused = server.error(&["FLORENCE.SUBMIT", "job", "DATA", "x", "<OD>"]);
    assert!(refused.contains("NOMODEL") && refused.contains("CUDA"), "{refused}");
    assert_eq!((server.call::<String>(&["PING"]), server.stat("panics")), ("PONG".to_owned(), 0));
}

#[test]
fn auto_runs_on_the_cpu_where_there_is_no_device_and_says_so() {
    let server = Server::ready(&["florence.device auto"]);
    let model = server.model();
    assert_eq!(model["device"].as_deref(), Some("cpu"));
    assert!(server.log().contains("the model runs on the CPU: "), "{}", server.log());
    assert_eq!(answers(&server, 2).len(), 2);
}
