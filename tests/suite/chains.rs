//! Questions that follow from answers: THEN, EACH and CROP.

use std::collections::HashMap;

use florence_tests::{Pictures, Server, Settings, eventually};
use serde_json::{Value, json};

type Job = HashMap<String, Option<String>>;

const OD_THEN_PLACES: [&str; 3] = ["<OD>", "EACH", "<REGION_TO_SEGMENTATION>"];

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url], rest].concat());
}

fn wait(server: &Server, key: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "60"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)))
}

/// The answers of a job that is done.
fn ask(server: &Server, key: &str, url: &str, rest: &[&str]) -> Value {
    submit(server, key, url, rest);
    let job = wait(server, key);
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    serde_json::from_str(job["result"].as_deref().unwrap()).unwrap()
}

/// Left, top, right, bottom as the location tokens that the model would be asked with.
fn place(region: &Value, (width, height): (f64, f64)) -> String {
    let edges = region.as_array().unwrap().iter().zip([width, height, width, height]);
    let place = |(edge, size): (&Value, f64)| {
        format!("<loc_{}>", (edge.as_f64().unwrap() * 1000.0 / size).floor())
    };
    edges.map(place).collect::<Vec<_>>().concat()
}

#[test]
fn a_chain_answers_as_the_same_questions_one_by_one() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    let found = ask(&server, "chain", &url, &OD_THEN_PLACES);
    let single = ask(&server, "od", &url, &["<OD>"]);
    assert_eq!(found["steps"][0], json!({ "prompt": "<OD>", "answer": single }));
    let each = found["steps"][1]["each"].as_array().unwrap();
    assert!(each.len() >= 3, "{found}");
    for (i, one) in each.iter().enumerate() {
        assert_eq!(one["region"], single["<OD>"]["bboxes"][i]);
        assert_eq!(one["label"], single["<OD>"]["labels"][i]);
        let prompt = format!("<REGION_TO_SEGMENTATION>{}", place(&one["region"], (360.0, 280.0)));
        assert_eq!(one["answer"], ask(&server, &format!("seg:{i}"), &url, &[&prompt, "NOCACHE"]));
    }
    assert_eq!(found["steps"][1]["left_out"], 0);
    // With the text in its place.
    let steps = ["<CAPTION>", "THEN", "<CAPTION_TO_PHRASE_GROUNDING> {}"];
    let found = ask(&server, "cascade", &url, &steps);
    let caption = ask(&server, "caption", &url, &["<CAPTION>"])["<CAPTION>"].clone();
    let asked = format!("<CAPTION_TO_PHRASE_GROUNDING> {}", caption.as_str().unwrap());
    assert_eq!(found["steps"][1]["asked"], asked.as_str());
    assert_eq!(found["steps"][1]["answer"], ask(&server, "grounded", &url, &[&asked, "NOCACHE"]));
    let job = wait(&server, "cascade");
    assert_eq!(job["steps"].as_deref(), Some(r#"[{"then":"<CAPTION_TO_PHRASE_GROUNDING> {}"}]"#));
    assert_eq!((job["width"].as_deref(), job["height"].as_deref()), (Some("360"), Some("280")));
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn crops_are_pictures_of_their_own_with_places_in_the_whole() {
    let (server, pictures) = (Server::ready(&["florence.decimals 3"]), Pictures::serve());
    let url = pictures.url("poster.jpg");
    let found =
        ask(&server, "crops", &url, &["<OCR_WITH_REGION>", "CROP", "<OCR>", "CROP", "<OD>"]);
    let crops = found["steps"][1]["crop"].as_array().unwrap();
    assert!(!crops.is_empty(), "{found}");
    // Of texts there are no regions.
    assert_eq!(found["steps"][2], json!({ "prompt": "<OD>", "crop": [], "left_out": 0 }));
    for one in crops {
        assert!(
            one["answer"]["<OCR>"].is_string() && one["region"].as_array().unwrap().len() == 4,
            "{one}"
        );
    }
    // What is found in a part lies where the part lies.
    let found = ask(&server, "nested", &url, &["<OD>", "CROP", "<OD>", "MARGIN", "20"]);
    let crops = found["steps"][1]["crop"].as_array().unwrap();
    assert!(!crops.is_empty(), "{found}");
    for one in crops {
        let edges = |value: &Value| -> Vec<f64> { serde_json::from_value(value.clone()).unwrap() };
        let [left, top, right, bottom] = edges(&one["region"])[..] else { panic!("{one}") };
        let (x, y) = ((right - left) * 0.2 + 1.0, (bottom - top) * 0.2 + 1.0);
        for inner in one["answer"]["<OD>"]["bboxes"].as_array().unwrap() {
            let inner = edges(inner);
            assert!(inner[0] >= left - x && inner[1] >= top - y, "{one}");
            assert!(inner[2] <= right + x && inner[3] <= bottom + y, "{one}");
        }
    }
}

#[test]
fn steps_after_crops_ask_about_the_whole_picture_again() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    let alone = ask(&server, "alone", &url, &["<DETAILED_CAPTION>", "NOCACHE"]);
    let steps = ["<OD>", "CROP", "<OD>", "EACH", "<REGION_TO_CATEGORY>"];
    for (key, rest) in [("fresh", &["NOCACHE"][..]), ("cached", &[]), ("known", &[])] {
        let then = ["THEN", "<DETAILED_CAPTION>"];
        let found = ask(&server, key, &url, &[&steps[..], &then, rest].concat());
        assert_eq!(found["steps"][3]["answer"], alone, "{key}: {found}");
        assert!(found["steps"][2]["each"].as_array().unwrap().len() > 1, "{found}");
    }
}

#[test]
fn a_picture_is_fetched_and_seen_once_for_all_steps() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    ask(&server, "chain", &url, &OD_THEN_PLACES);
    assert_eq!((pictures.hits(), server.stat("cache_misses")), (1, 1));
    // Steps are known to others as single questions, and to other chains.
    ask(&server, "od", &url, &["<OD>"]);
    assert_eq!(wait(&server, "od")["cache"].as_deref(), Some("result"));
    ask(&server, "again", &url, &OD_THEN_PLACES);
    assert_eq!(wait(&server, "again")["cache"].as_deref(), Some("result"));
    ask(&server, "other", &url, &["<OD>", "EACH", "<REGION_TO_CATEGORY>"]);
    assert_eq!(wait(&server, "other")["cache"].as_deref(), Some("features"));
}

#[test]
fn regions_beyond_the_limit_are_left_out_and_counted() {
    let (server, pictures) = (Server::ready(&["florence.max-regions 1"]), Pictures::serve());
    let found = ask(&server, "chain", &pictures.url("shapes.png"), &OD_THEN_PLACES);
    let step = &found["steps"][1];
    let objects = found["steps"][0]["answer"]["<OD>"]["labels"].as_array().unwrap().len();
    assert_eq!(step["each"].as_array().unwrap().len(), 1);
    assert_eq!(step["left_out"], objects - 1);
}

#[test]
fn a_bad_chain_is_refused_and_stores_nothing() {
    let server = Server::ready(&[]);
    let refused = |rest: &[&str]| {
        let args = [&["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x.png"], rest].concat();
        let error = server.error(&args);
        assert_eq!(server.call::<i64>(&["EXISTS", "job"]), 0);
        error
    };
    for (rest, expected) in [
        (
            &["<OD>", "EACH", "<CAPTION>"][..],
            "BADPROMPT EACH asks about regions: <CAPTION> takes none",
        ),
        (&["<OD>", "CROP", "<REGION_TO_OCR>"], "BADPROMPT <REGION_TO_OCR> needs a region"),
        (&["<OD>", "THEN", "hello {}"], "BADPROMPT unknown task 'hello"),
        (&["<OD>", "THEN", "{}"], "BADPROMPT unknown task '{}'"),
        (&["<OD>", "THEN"], "ERR syntax error near 'THEN'"),
        (&["<OD>", "MARGIN", "5"], "ERR MARGIN is for CROP"),
        (&["<OD>", "CROP", "<OCR>", "MARGIN", "101"], "ERR MARGIN is not an integer from 0 to 100"),
        (&["PROMPTS", "2", "<OD>", "<OCR>", "THEN", "<OCR>"], "BADPROMPT steps follow one prompt"),
    ] {
        let error = refused(rest);
        assert!(error.starts_with(expected), "{rest:?}: {error}");
    }
    let four = ["<OD>", "THEN", "<OCR>", "THEN", "<OCR>", "THEN", "<OCR>", "THEN", "<OCR>"];
    assert_eq!(refused(&four), "BADPROMPT a chain has at most 4 steps, this one has 5");
}

#[test]
fn a_chain_is_one_job_for_cancel_retry_and_crashes() {
    let pictures = Pictures::serve();
    let mut server = Server::with(Settings::lines(&[
        "florence.retry-delay-ms 10",
        "appendonly yes",
        "appendfsync always",
    ]));
    server.wait_for_model();
    let steps = ["<OD>", "CROP", "<CAPTION>", "MARGIN", "10"];
    let expected = ask(&server, "plain", &pictures.url("shapes.png"), &steps);
    // An attempt that fails is made again as a whole.
    submit(
        &server,
        "flaky",
        &pictures.url("flaky/3/shapes.png"),
        &[&steps[..], &["NOCACHE"]].concat(),
    );
    let job = wait(&server, "flaky");
    assert_eq!(job["attempts"].as_deref(), Some("3"), "{job:?}");
    assert_eq!(job["result"], wait(&server, "plain")["result"]);
    // A server that dies on it knows the plan afterwards.
    submit(
        &server,
        "held",
        &pictures.url("held/back/shapes.png"),
        &[&steps[..], &["NOCACHE"]].concat(),
    );
    submit(&server, "gone", &pictures.url("held/never/shapes.png"), &steps);
    eventually("it is fetched", || (server.state("held") == "fetching").then_some(()));
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "gone"]), 1);
    server.kill();
    pictures.release("back");
    server.restart();
    let job = wait(&server, "held");
    assert_eq!(serde_json::from_str::<Value>(job["result"].as_deref().unwrap()).unwrap(), expected);
    assert_eq!(server.state("gone"), "cancelled");
    // Another plan is another request.
    let other = [
        "FLORENCE.SUBMIT",
        "plain",
        &pictures.url("shapes.png"),
        "<OD>",
        "EACH",
        "<REGION_TO_CATEGORY>",
    ];
    assert!(server.error(&other).starts_with("JOBEXISTS"));
}

#[test]
fn chains_that_others_write_are_checked_when_they_are_claimed() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    for (i, (steps, margin)) in [
        ("[{}]", "0"),
        ("[{\"after\":\"<OD>\"}]", "0"),
        ("[{\"each\":\"<CAPTION>\"}]", "0"),
        ("[{\"then\":\"<OCR>\"}]", "999"),
        ("x", "0"),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("forged:{i}");
        server.call::<()>(&[
            "HSET",
            &key,
            "florence",
            "1",
            "state",
            "queued",
            "image",
            &url,
            "prompt",
            "<OD>",
            "steps",
            steps,
            "margin",
            margin,
            "submitted_at",
            "1",
        ]);
        let job = eventually("it has ended", || {
            let job = server.job(&key);
            (job["state"].as_deref() == Some("failed")).then_some(job)
        });
        assert!(job["error"].as_deref().unwrap().contains("INVALID"), "{job:?}");
    }
    assert_eq!(server.stat("panics"), 0);
}
