//! What a job can be asked for: when it starts, what it answers, who hears of it, how long it stays.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, eventually, picture};
use serde_json::{Value, json};

type Entries = Vec<(String, HashMap<String, String>)>;
type Map = HashMap<String, Option<String>>;

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    let args = [&["FLORENCE.SUBMIT", key, url], rest].concat();
    server.call::<String>(&args);
}

fn wait(server: &Server, key: &str) -> Map {
    server.call(&["FLORENCE.WAIT", key, "30"])
}

fn number(job: &Map, field: &str) -> i64 {
    job[field].as_deref().and_then(|text| text.parse().ok()).unwrap_or(-1)
}

fn one_fetcher(lines: &[&str]) -> Server {
    let mut settings = Settings::lines(lines);
    settings.module_args = ["max-downloads", "1"].map(str::to_owned).into();
    let server = Server::with(settings);
    server.wait_for_model();
    server
}

#[test]
fn several_prompts_take_one_download_and_give_one_result() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let prompts = ["<CAPTION>", "<OD>", "<CAPTION_TO_PHRASE_GROUNDING>a red circle"];
    submit(
        &server,
        "many",
        &pictures.url("shapes.png"),
        &["PROMPTS", "3", prompts[0], prompts[1], prompts[2]],
    );
    let job = wait(&server, "many");
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    assert_eq!(pictures.hits(), 1);
    let result = json(&job, "result");
    assert_eq!(json(&job, "prompt"), serde_json::json!(prompts));
    assert_eq!(json(&job, "text").as_array().unwrap().len(), 3);
    for prompt in prompts {
        submit(&server, prompt, &pictures.url("shapes.png"), &[prompt]);
        let alone = json(&wait(&server, prompt), "result");
        let task = prompt.split_inclusive('>').next().unwrap();
        assert_eq!(result[prompt], alone[task], "{prompt}");
    }
    let twice = &["FLORENCE.SUBMIT", "j", "http://h/x", "PROMPTS", "2", "<OD>", "<OD>"];
    assert_eq!(server.error(twice), "BADPROMPT the prompt <OD> is given twice");
    let none = &["FLORENCE.SUBMIT", "j", "http://h/x", "PROMPTS", "0"];
    assert_eq!(server.error(none), "ERR PROMPTS is not an integer from 1 to 16");
}

fn json(job: &Map, field: &str) -> Value {
    serde_json::from_str(job[field].as_deref().unwrap()).unwrap()
}

#[test]
fn an_answer_has_scores_and_the_pictures_size_wherever_it_is_told() {
    let (server, pictures, replica) = (Server::start(), Pictures::serve(), Server::start());
    replica.follow(&server);
    let mut connection = server.connect();
    let mut subscriber = connection.as_pubsub();
    subscriber.psubscribe("florence:*").unwrap();
    subscriber.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let shown = |job: &Map| (job["scores"].clone(), job["width"].clone(), job["height"].clone());
    let size = image_size("shapes.png");
    for (key, prompt, labels) in [
        ("boxes", "<OD>", Some("labels")),
        ("words", "<OCR_WITH_REGION>", Some("labels")),
        ("polygons", "<REFERRING_EXPRESSION_SEGMENTATION> red circle", Some("labels")),
        ("text", "<CAPTION>", None),
    ] {
        submit(&server, key, &pictures.url("shapes.png"), &[prompt]);
        let job = wait(&server, key);
        let scores: Vec<f64> = serde_json::from_value(json(&job, "scores")).unwrap();
        let result = json(&job, "result");
        let answer = result.as_object().unwrap().values().next().unwrap();
        let count = labels.map_or(1, |labels| answer[labels].as_array().unwrap().len());
        assert_eq!(scores.len(), count, "{job:?}");
        assert!(scores.iter().all(|score| *score > 0.0 && *score <= 1.0), "{job:?}");
        assert_eq!((number(&job, "width"), number(&job, "height")), size);
        let published: String = subscriber.get_message().unwrap().get_payload().unwrap();
        let published: Value = serde_json::from_str(&published).unwrap();
        assert_eq!(published["scores"], json(&job, "scores"));
        assert_eq!((&published["width"], &published["height"]), (&size.0.into(), &size.1.into()));
        // From the cache, on a replica and after a restart it is the same.
        submit(&server, "again", &pictures.url("shapes.png"), &[prompt]);
        let again = wait(&server, "again");
        assert_eq!((again["cache"].as_deref(), shown(&again)), (Some("result"), shown(&job)));
        subscriber.get_message().unwrap();
        server.call::<()>(&["DEL", "again"]);
        let copy = eventually("the replica has it", || {
            let copy: Map = replica.call::<Option<Map>>(&["FLORENCE.GET", key])?;
            (copy["state"].as_deref() == Some("done")).then_some(copy)
        });
        assert_eq!(shown(&copy), shown(&job));
        server.call::<()>(&["DEBUG", "RELOAD"]);
        assert_eq!(shown(&server.job(key)), shown(&job));
    }
    submit(&server, "failed", &pictures.url("status/404"), &["<OD>"]);
    assert_eq!(shown(&wait(&server, "failed")), (None, None, None));
    // A list for each of several prompts.
    let prompts = ["PROMPTS", "3", "<CAPTION>", "<OD>", "<OCR>"];
    submit(&server, "several", &pictures.url("shapes.png"), &prompts);
    let several = json(&wait(&server, "several"), "scores");
    assert_eq!(several[1], json(&server.job("boxes"), "scores"));
    assert_eq!(several[0], json(&server.job("text"), "scores"));
    assert_eq!(several.as_array().unwrap().len(), 3);
}

/// Width and height of a sample, by the header of its PNG.
fn image_size(name: &str) -> (i64, i64) {
    let bytes = std::fs::read(picture(name)).unwrap();
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()).into();
    (number(16), number(20))
}

#[test]
fn coordinates_have_as_many_decimals_as_the_setting_says_now() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let set = |decimals: &str| {
        server.call::<()>(&["CONFIG", "SET", "florence.decimals", decimals]);
    };
    let boxes = |key: &str, prompts: &[&str]| -> (Vec<f64>, Option<String>) {
        submit(&server, key, &pictures.url("shapes.png"), prompts);
        let job = wait(&server, key);
        let boxes = json(&job, "result")["<OD>"]["bboxes"].clone();
        let boxes: Vec<Vec<f64>> = serde_json::from_value(boxes).unwrap();
        (boxes.concat(), job["cache"].clone())
    };
    let (all, cache) = boxes("all", &["<OD>"]);
    assert_eq!(cache.as_deref(), Some("miss"));
    for (decimals, unit) in [("2", 100.0), ("0", 1.0)] {
        set(decimals);
        let rounded: Vec<f64> = all.iter().map(|number| (number * unit).round() / unit).collect();
        assert_ne!(rounded, all);
        let alone = boxes(&format!("alone {decimals}"), &["<OD>"]);
        assert_eq!(alone, (rounded.clone(), Some("result".to_owned())));
        let several = ["PROMPTS", "2", "<OD>", "<CAPTION>"];
        assert_eq!(boxes(&format!("several {decimals}"), &several).0, rounded);
    }
    // An answer that was computed while they were rounded is not rounded for good.
    submit(&server, "sign", &pictures.url("sign.png"), &["<OCR_WITH_REGION>"]);
    let rounded = wait(&server, "sign")["result"].clone();
    set("all");
    submit(&server, "sign again", &pictures.url("sign.png"), &["<OCR_WITH_REGION>"]);
    let again = wait(&server, "sign again");
    assert_eq!(again["cache"].as_deref(), Some("result"));
    assert_ne!(again["result"], rounded);
    assert_eq!(boxes("all again", &["<OD>"]).0, all);
}

#[test]
fn a_delayed_job_starts_when_its_time_has_come() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let start = Instant::now();
    submit(&server, "job", &pictures.url("shapes.png"), &["<CAPTION>", "DELAY", "700"]);
    assert_eq!(wait(&server, "job")["state"].as_deref(), Some("done"));
    assert!(start.elapsed() >= Duration::from_millis(700));
    // A delay survives a restart of the scheduler.
    submit(&server, "later", &pictures.url("shapes.png"), &["<CAPTION>", "DELAY", "60000"]);
    assert_eq!(server.state("later"), "queued");
    server.call::<()>(&["DEBUG", "RELOAD"]);
    submit(&server, "after", &pictures.url("shapes.png"), &["<OCR>"]);
    assert_eq!(wait(&server, "after")["state"].as_deref(), Some("done"));
    assert_eq!(server.state("later"), "queued");
}

#[test]
fn a_job_that_waits_for_its_time_tells_when_that_is() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    let row = |key: &str| -> HashMap<String, String> {
        let rows: Vec<HashMap<String, String>> = server.call(&["FLORENCE.JOBS"]);
        rows.into_iter().find(|row| row["id"] == key).unwrap()
    };
    submit(&server, "later", &url, &["<CAPTION>", "DELAY", "600000"]);
    let job = server.job("later");
    let due = number(&job, "submitted_at") + 600_000;
    assert_eq!(number(&job, "due_at"), due);
    assert_eq!(row("later")["due_at"], due.to_string());
    // Until the next attempt it is the same as for a retry.
    submit(&server, "again", &pictures.url("status/503"), &["<CAPTION>"]);
    let job = eventually("it waits for a retry", || {
        let job = server.job("again");
        (job["state"].as_deref() == Some("retrying")).then_some(job)
    });
    assert_eq!(job["due_at"], job["retry_at"]);
    submit(&server, "now", &pictures.url("held/back/shapes.png"), &["<OD>"]);
    assert_eq!(server.job("now")["due_at"], None);
    assert!(!row("now").contains_key("due_at"));
    submit(&server, "soon", &url, &["<CAPTION>", "DELAY", "10"]);
    assert_eq!(wait(&server, "soon")["due_at"], None);
}

#[test]
fn attempts_that_another_followed_are_told_with_their_errors() {
    let (server, pictures) = (Server::ready(&["florence.retry-delay-ms 1"]), Pictures::serve());
    submit(&server, "thrice", &pictures.url("flaky/2/shapes.png"), &["<OD>"]);
    let job = wait(&server, "thrice");
    assert_eq!(job["state"].as_deref(), Some("done"));
    let told = json(&job, "errors");
    let told = told.as_array().unwrap();
    assert_eq!(told.len(), 2);
    for (error, attempt) in told.iter().zip(1..) {
        assert_eq!((&error["attempt"], &error["code"]), (&attempt.into(), &"FETCH".into()));
        assert!(error["message"].as_str().unwrap().contains("503"), "{error}");
        assert!(error["at"].as_i64().unwrap() >= number(&job, "submitted_at"), "{error}");
    }
    submit(&server, "once", &pictures.url("shapes.png"), &["<OD>"]);
    assert_eq!(wait(&server, "once")["errors"], None);
    // The newest ten; the last error is `error`. RETRY begins anew.
    submit(&server, "never", &pictures.url("status/503"), &["<OD>", "RETRIES", "12"]);
    let job = wait(&server, "never");
    let told = json(&job, "errors");
    let attempts = told.as_array().unwrap().iter().map(|error| error["attempt"].clone()).collect();
    assert_eq!(Value::Array(attempts), json!([3, 4, 5, 6, 7, 8, 9, 10, 11, 12]));
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    server.call::<()>(&["FLORENCE.RETRY", "never"]);
    assert_eq!(server.job("never")["errors"], None);
}

#[test]
fn a_paused_server_starts_nothing_and_does_all_else() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let pause = |value: &str| server.call::<()>(&["CONFIG", "SET", "florence.paused", value]);
    submit(&server, "at work", &pictures.url("held/back/shapes.png"), &["<OD>"]);
    eventually("it is fetched", || (server.state("at work") == "fetching").then_some(()));
    pause("yes");
    let url = pictures.url("shapes.png");
    submit(&server, "url", &url, &["<CAPTION>"]);
    let mut data = redis::cmd("FLORENCE.SUBMIT");
    data.arg("data").arg("DATA").arg(std::fs::read(picture("sign.png")).unwrap()).arg("<OCR>");
    data.exec(&mut server.connect()).unwrap();
    submit(&server, "delayed", &url, &["<OCR>", "DELAY", "1"]);
    submit(&server, "late", &url, &["<OCR>", "EXPIRES", "100"]);
    submit(&server, "unwanted", &url, &["<OCR>"]);
    // What is at work goes on to its end.
    pictures.release("back");
    assert_eq!(wait(&server, "at work")["state"].as_deref(), Some("done"));
    assert_eq!(wait(&server, "late")["state"].as_deref(), Some("expired"));
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "unwanted"]), 1);
    assert_eq!(server.call::<i64>(&["FLORENCE.RETRY", "unwanted"]), 1);
    let waiting = ["url", "data", "delayed", "unwanted"];
    let any = [&["FLORENCE.WAIT"], &waiting[..], &["1"]].concat();
    assert_eq!(server.call::<Option<Map>>(&any), None);
    for key in waiting {
        let job = server.job(key);
        assert_eq!((job["state"].as_deref(), number(&job, "attempts")), (Some("queued"), 0));
        // Nobody knows how long it will be.
        assert_eq!(job["eta_ms"], None);
    }
    assert_eq!(pictures.hits(), 1);
    pause("no");
    for key in waiting {
        assert_eq!(wait(&server, key)["state"].as_deref(), Some("done"), "{key}");
    }
    // From the start, too.
    let server = Server::ready(&["florence.paused yes"]);
    submit(&server, "job", &url, &["<CAPTION>"]);
    assert_eq!(server.call::<Option<Map>>(&["FLORENCE.WAIT", "job", "1"]), None);
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    assert_eq!(wait(&server, "job")["state"].as_deref(), Some("done"));
}

#[test]
fn a_job_that_is_not_started_in_time_expires() {
    let (server, pictures) = (one_fetcher(&[]), Pictures::serve());
    submit(&server, "slow", &pictures.url("held/back/shapes.png"), &["<CAPTION>"]);
    eventually("it is fetched", || (server.state("slow") == "fetching").then_some(()));
    submit(&server, "late", &pictures.url("shapes.png"), &["<CAPTION>", "EXPIRES", "300"]);
    submit(&server, "patient", &pictures.url("shapes.png"), &["<OD>", "EXPIRES", "60000"]);
    let job = wait(&server, "late");
    assert_eq!(job["state"].as_deref(), Some("expired"));
    // It ended before its turn would have come.
    assert_eq!(server.state("slow"), "fetching");
    pictures.release("back");
    assert_eq!(
        server.error(&["FLORENCE.GET", "late", "RESULT"]),
        "EXPIRED the job was not started in time"
    );
    assert_eq!(wait(&server, "patient")["state"].as_deref(), Some("done"));
    assert_eq!(server.stat("jobs_expired"), 1);
    assert!(server.call::<i64>(&["TTL", "late"]) > 0);
}

#[test]
fn retry_queues_again_what_ended_without_an_answer() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    submit(&server, "failed", &pictures.url("status/404"), &["<CAPTION>"]);
    assert_eq!(wait(&server, "failed")["state"].as_deref(), Some("failed"));
    submit(&server, "done", &pictures.url("shapes.png"), &["<CAPTION>"]);
    wait(&server, "done");
    let mut command = redis::cmd("FLORENCE.SUBMIT");
    command.arg("data").arg("DATA").arg(&bytes).arg("<CAPTION>").arg("DELAY").arg(60_000);
    command.query::<String>(&mut server.connect()).unwrap();
    assert_eq!(server.call::<i64>(&["FLORENCE.CANCEL", "data"]), 1);
    assert!(server.call::<i64>(&["TTL", "data"]) > 0);

    let keys = ["FLORENCE.RETRY", "failed", "done", "data", "data", "nothing"];
    assert_eq!(server.call::<i64>(&keys), 2);
    let data = wait(&server, "data");
    assert_eq!((data["state"].as_deref(), data["attempts"].as_deref()), (Some("done"), Some("1")));
    let failed = wait(&server, "failed");
    assert_eq!(failed["state"].as_deref(), Some("failed"));
    assert!(failed["error"].as_deref().unwrap().contains("404"));
    assert_eq!(server.call::<i64>(&["FLORENCE.RETRY", "data"]), 0);

    // What cannot be read as a picture is not kept.
    let mut command = redis::cmd("FLORENCE.SUBMIT");
    command.arg("junk").arg("DATA").arg("no picture").arg("<CAPTION>");
    command.query::<String>(&mut server.connect()).unwrap();
    wait(&server, "junk");
    let error = server.error(&["FLORENCE.RETRY", "junk"]);
    assert_eq!(error, "ERR the picture is gone, submit the job again");
}

#[test]
fn a_waiting_job_knows_its_position_and_a_running_one_its_phase() {
    let (server, pictures) = (one_fetcher(&[]), Pictures::serve());
    submit(&server, "first", &pictures.url("shapes.png"), &["<CAPTION>"]);
    wait(&server, "first");
    submit(&server, "slow", &pictures.url("held/back/shapes.png"), &["<OD>"]);
    eventually("the download begins", || {
        (server.job("slow")["phase"].as_deref() == Some("downloading")).then_some(())
    });
    for (key, prompt, priority) in
        [("a", "<OCR>", "0"), ("b", "<CAPTION>", "0"), ("c", "<OD>", "5")]
    {
        submit(&server, key, &pictures.url("words.png"), &[prompt, "PRIORITY", priority]);
    }
    let positions = ["a", "b", "c"].map(|key| number(&server.job(key), "position"));
    assert_eq!(positions, [1, 2, 0]);
    // The engine tells of its pace after it has given the first answer away.
    let etas = eventually("the pace of the engine is known", || {
        let etas = ["a", "b", "c"].map(|key| number(&server.job(key), "eta_ms"));
        (etas[2] > 0).then_some(etas)
    });
    assert!(etas[0] > etas[2] && etas[1] > etas[0], "{etas:?}");
    pictures.release("back");
    for key in ["a", "b", "c"] {
        let job = wait(&server, key);
        assert_eq!((job["position"].clone(), job["phase"].clone()), (None, None));
    }
}

#[test]
fn the_end_of_a_job_is_published_and_added_to_the_stream() {
    let server = Server::with(Settings::lines(&["florence.stream ended"]));
    let pictures = Pictures::serve();
    let mut connection = server.connect();
    let mut subscriber = connection.as_pubsub();
    subscriber.psubscribe("florence:*").unwrap();
    subscriber.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    submit(&server, "good", &pictures.url("shapes.png"), &["<OD>"]);
    let message = subscriber.get_message().unwrap();
    assert_eq!(message.get_channel_name(), "florence:good");
    let map: Value = serde_json::from_str(&message.get_payload::<String>().unwrap()).unwrap();
    assert_eq!((&map["id"], &map["state"]), (&"good".into(), &"done".into()));
    assert_eq!(map["result"]["<OD>"]["labels"][0], "circle");
    submit(&server, "bad", &pictures.url("status/404"), &["<OD>"]);
    let message = subscriber.get_message().unwrap();
    let map: Value = serde_json::from_str(&message.get_payload::<String>().unwrap()).unwrap();
    assert_eq!((&map["state"], &map["error"]["code"]), (&"failed".into(), &"FETCH".into()));

    let entries: Entries = server.call(&["XRANGE", "ended", "-", "+"]);
    let states: Vec<_> =
        entries.iter().map(|(_, entry)| (entry["id"].as_str(), entry["state"].as_str())).collect();
    assert_eq!(states, [("good", "done"), ("bad", "failed")]);
    assert!(entries[0].1["job"].contains("\"labels\":[\"circle\""));
    // Neither channel nor stream may keep a job from ending.
    server.call::<()>(&["CONFIG", "SET", "florence.stream", "good"]);
    submit(&server, "next", &pictures.url("shapes.png"), &["<OD>"]);
    assert_eq!(wait(&server, "next")["state"].as_deref(), Some("done"));
    assert_eq!(server.stat("jobs_unannounced"), 1);
}

#[test]
fn pictures_that_are_gone_do_not_count_among_ended_jobs() {
    let module_args = ["retain-bytes", "1gb"].map(str::to_owned).into();
    let server = Server::with(Settings { module_args, ..Settings::default() });
    // Larger than the record of the job, and a picture all the same.
    let mut bytes = std::fs::read(picture("shapes.png")).unwrap();
    bytes.resize(1 << 20, 0);
    for i in 0..5 {
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        command.arg(format!("j{i}")).arg("DATA").arg(&bytes).arg("<CAPTION>");
        command.query::<String>(&mut server.connect()).unwrap();
        assert_eq!(wait(&server, &format!("j{i}"))["state"].as_deref(), Some("done"));
    }
    let size = i64::try_from(bytes.len()).unwrap();
    eventually("only the records count", || {
        (1..size).contains(&server.stat("retained_bytes")).then_some(())
    });
}

#[test]
fn the_oldest_finished_jobs_make_room() {
    let module_args = ["retain-bytes", "5000"].map(str::to_owned).into();
    let server = Server::with(Settings { module_args, ..Settings::default() });
    let pictures = Pictures::serve();
    for i in 0..20 {
        submit(&server, &format!("j{i:02}"), &pictures.url("shapes.png"), &["<CAPTION>"]);
        wait(&server, &format!("j{i:02}"));
    }
    eventually("the oldest are gone", || (server.stat("retained_bytes") <= 5000).then_some(()));
    let exists = |key: &str| server.call::<i64>(&["EXISTS", key]) == 1;
    assert!(!exists("j00") && exists("j19"));
    let left = server.call::<i64>(&["DBSIZE"]);
    assert_eq!(server.stat("jobs_trimmed"), 20 - left);
    server.call::<()>(&["DEBUG", "RELOAD"]);
    assert!(server.stat("retained_bytes") > 0);
    server.call::<()>(&["FLUSHALL"]);
    assert_eq!(server.stat("retained_bytes"), 0);
}

#[test]
fn a_job_can_insist_on_a_model() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let model = server.model();
    let name = model["name"].clone().unwrap();
    submit(&server, "job", &pictures.url("shapes.png"), &["<CAPTION>", "MODEL", &name]);
    assert_eq!(wait(&server, "job")["state"].as_deref(), Some("done"));
    let error = server.error(&["FLORENCE.SUBMIT", "j", "http://h/x", "<OD>", "MODEL", "other"]);
    assert_eq!(error, format!("NOMODEL there is no model other; this server has {name}"));
}

#[test]
fn tenants_do_not_see_each_other() {
    let (server, pictures) = (one_fetcher(&[]), Pictures::serve());
    let rules = ["on", "nopass", "~tenant1:*", "&florence:tenant1:*", "+@all", "-@dangerous"];
    server.call::<()>(&[&["ACL", "SETUSER", "one"], &rules[..]].concat());
    server.call::<()>(&["ACL", "SETUSER", "one", ">pass"]);
    server.call::<()>(&["SET", "tenant2:picture", "bytes"]);
    submit(&server, "busy", &pictures.url("held/back/shapes.png"), &["<CAPTION>"]);
    for key in ["tenant1:job", "tenant2:job"] {
        submit(&server, key, &pictures.url("shapes.png"), &["<CAPTION>"]);
    }
    let url = format!("redis://one:pass@127.0.0.1:{}", server.port);
    let mut tenant = redis::Client::open(url).unwrap().get_connection().unwrap();
    let mut call = |args: &[&str]| -> redis::RedisResult<redis::Value> {
        redis::cmd(args[0]).arg(&args[1..]).query(&mut tenant)
    };
    for refused in [
        &["FLORENCE.GET", "tenant2:job"][..],
        &["FLORENCE.WAIT", "tenant2:job", "1"],
        &["FLORENCE.WAIT", "tenant1:job", "tenant2:job", "1"],
        &["FLORENCE.CANCEL", "tenant2:job"],
        &["FLORENCE.RETRY", "tenant1:job", "tenant2:job"],
        &["FLORENCE.SUBMIT", "tenant2:job", "http://h/x", "<OD>"],
        &["FLORENCE.SUBMIT", "*", "http://h/x", "<OD>"],
        &["FLORENCE.SUBMIT", "tenant1:x", "KEY", "tenant2:picture", "<OD>"],
        &["SUBSCRIBE", "florence:tenant2:job"],
        &["INFO", "florence"],
    ] {
        let error = call(refused).expect_err(&format!("{refused:?}"));
        assert_eq!(error.code(), Some("NOPERM"), "{refused:?}: {error}");
    }
    let jobs = format!("{:?}", call(&["FLORENCE.JOBS"]).unwrap());
    assert!(jobs.contains("tenant1:job"), "{jobs}");
    assert!(!jobs.contains("tenant2") && !jobs.contains("busy"), "{jobs}");
    let stats = format!("{:?}", call(&["FLORENCE.STATS"]).unwrap());
    assert!(!stats.contains("tenant") && !stats.contains("127.0.0.1"), "{stats}");
}

#[test]
fn the_same_request_again_is_no_other_job_whatever_has_been_set_meanwhile() {
    let pictures = florence_tests::path("models/tiny/samples").display().to_string();
    let server =
        Server::ready(&["florence.paused yes", &format!("florence.file-roots {pictures}")]);
    let file = format!("{pictures}/sign.png");
    let bytes = std::fs::read(&file).unwrap();
    redis::cmd("SET").arg("picture").arg(bytes).exec(&mut server.connect()).unwrap();
    let requests = [
        &["FLORENCE.SUBMIT", "file", &file, "<OCR>"][..],
        &["FLORENCE.SUBMIT", "key", "KEY", "picture", "<OCR>", "TTL", "60"],
    ];
    for request in requests {
        server.call::<()>(request);
    }
    for (setting, value) in [
        ("default-ttl", "100"),
        ("default-timeout-ms", "1000"),
        ("default-retries", "7"),
        ("file-roots", ""),
    ] {
        server.call::<()>(&["CONFIG", "SET", &format!("florence.{setting}"), value]);
    }
    server.call::<()>(&["DEL", "picture"]);
    for request in requests {
        assert_eq!(server.call::<String>(request), request[1]);
        assert!(server.try_call::<()>(&[request, &["PRIORITY", "1"]].concat()).is_err());
    }
    // Only what is the same: nothing new is taken that the settings refuse.
    assert!(server.error(&["FLORENCE.SUBMIT", "new", &file, "<OCR>"]).starts_with("DENIED"));
    assert_eq!(server.call::<i64>(&["DBSIZE"]), 2);
}

#[test]
fn a_request_of_an_earlier_version_is_known_again() {
    let server = Server::ready(&["florence.paused yes"]);
    let limits = ["TIMEOUT", "1000", "RETRIES", "1", "TTL", "60"];
    let request =
        [&["FLORENCE.SUBMIT", "job", "http://127.0.0.1:1/x", "<OD>"], &limits[..]].concat();
    server.call::<()>(&request);
    server.call::<()>(&["HSET", "job", "request", "JQQkMHx9mwNwNRw+t2tkDw=="]);
    assert_eq!(server.call::<String>(&request), "job");
    server.call::<()>(&["HSET", "job", "request", "JQQkMHx9mwNwNRw+t2tkDg=="]);
    assert!(server.error(&request).starts_with("JOBEXISTS"));
}
