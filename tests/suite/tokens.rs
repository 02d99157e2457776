//! `TOKENS`: the text of an answer in a stream while it is generated.

use std::{collections::HashMap, path::Path};

use florence_tests::{Pictures, Server, Settings, call, eventually, picture};

type Job = HashMap<String, Option<String>>;
/// An entry's id and its fields.
type Entry = (String, HashMap<String, String>);

/// Draws a text that goes on until there is no more room: no end is likely.
const LONG: [&str; 7] = ["<CAPTION>", "TEMPERATURE", "100", "SEED", "7", "TOPK", "0"];

/// Submits a job about a sample whose text goes to the stream `s`, or another one.
fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) {
    let stream: &[&str] = if rest.contains(&"TOKENS") { &[] } else { &["TOKENS", "s"] };
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url], rest, stream].concat());
}

fn wait(server: &Server, key: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "60"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)))
}

fn entries(server: &Server, stream: &str) -> Vec<Entry> {
    server.call(&["XRANGE", stream, "-", "+"])
}

/// The texts of a job's attempt by step and index, each put together from its pieces.
fn texts(entries: &[Entry], key: &str, attempt: i64) -> HashMap<(usize, usize), String> {
    let attempt = attempt.to_string();
    let mut texts: HashMap<(usize, usize), String> = HashMap::new();
    for (_, fields) in entries {
        if fields["job"] == key && fields["attempt"] == attempt && !fields.contains_key("done") {
            let place = (fields["step"].parse().unwrap(), fields["index"].parse().unwrap());
            texts.entry(place).or_default().push_str(&fields["text"]);
        }
    }
    texts
}

/// The one text of a job's attempt.
fn text(entries: &[Entry], key: &str, attempt: i64) -> String {
    let texts = texts(entries, key, attempt);
    assert_eq!(texts.len(), 1, "{key}: {texts:?}");
    texts[&(0, 0)].clone()
}

/// What the entries say of a job's end, which comes after all of its text: state and attempt.
fn end(entries: &[Entry], key: &str) -> String {
    let of_job: Vec<_> = entries.iter().filter(|(_, fields)| fields["job"] == key).collect();
    let ends = of_job.iter().filter(|(_, fields)| fields.contains_key("done")).count();
    assert!(ends < 2, "{of_job:?}");
    let last = of_job.last().and_then(|(_, fields)| Some((fields.get("done")?, fields)));
    last.map(|(state, fields)| format!("{state} {}", fields["attempt"])).unwrap_or_default()
}

#[test]
fn the_pieces_of_a_stream_are_the_answers_text() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    for (key, options, least) in [
        ("greedy", &["BEAMS", "1"][..], 2),
        ("beams", &["BEAMS", "3"], 1),
        ("many-beams", &["BEAMS", "8", "LENGTHPENALTY", "2"], 1),
        ("drawn", &["TEMPERATURE", "1.5", "SEED", "3"], 2),
        ("short", &["BEAMS", "3", "MAXTOKENS", "4"], 1),
    ] {
        for prompt in ["<DENSE_REGION_CAPTION>", "<DETAILED_CAPTION>"] {
            let key = format!("{key}:{prompt}");
            submit(&server, &key, &url, &[&[prompt, "NOCACHE"], options].concat());
            let job = wait(&server, &key);
            let entries = entries(&server, "s");
            assert_eq!(Some(text(&entries, &key, 1)), job["text"], "{key}");
            assert_eq!(end(&entries, &key), "done 1");
            let pieces = entries.iter().filter(|(_, fields)| fields["job"] == key).count() - 1;
            assert!(pieces >= least, "{key}: {pieces} pieces");
            assert_eq!(job["stream"].as_deref(), Some("s"));
        }
    }
    assert_eq!(server.stat("jobs_unannounced") + server.stat("panics"), 0);
}

#[test]
fn each_question_has_a_text_of_its_own() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    for (key, prompts) in [
        ("two", &["PROMPTS", "2", "<OD>", "<CAPTION>"][..]),
        ("chain", &["<OD>", "EACH", "<REGION_TO_SEGMENTATION>"]),
        ("crops", &["<OD>", "CROP", "<CAPTION>", "THEN", "<OCR>"]),
        // Parts of it are known by now.
        ("known", &["<OD>", "CROP", "<CAPTION>", "THEN", "<DETAILED_CAPTION>"]),
        ("all-known", &["PROMPTS", "2", "<CAPTION>", "<OD>"]),
    ] {
        submit(&server, key, &url, prompts);
        let job = wait(&server, key);
        let all: serde_json::Value = serde_json::from_str(job["text"].as_deref().unwrap()).unwrap();
        let mut expected = HashMap::new();
        for (i, one) in all.as_array().unwrap().iter().enumerate() {
            match one {
                serde_json::Value::String(text) if prompts[0] == "PROMPTS" => {
                    expected.insert((0, i), text.clone());
                }
                serde_json::Value::String(text) => {
                    expected.insert((i, 0), text.clone());
                }
                several => {
                    for (j, text) in several.as_array().unwrap().iter().enumerate() {
                        expected.insert((i, j), text.as_str().unwrap().to_owned());
                    }
                }
            }
        }
        let entries = entries(&server, "s");
        assert!(expected.len() >= 2);
        assert_eq!(texts(&entries, key, 1), expected, "{key}");
        assert_eq!(end(&entries, key), "done 1");
    }
}

#[test]
fn what_is_known_comes_at_once() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("sign.png");
    // Two at once share a run; the third finds the answer.
    for key in ["first", "second"] {
        submit(&server, key, &url, &LONG);
    }
    let texts = ["first", "second"].map(|key| wait(&server, key)["text"].clone().unwrap());
    submit(&server, "third", &url, &LONG);
    assert_eq!(wait(&server, "third")["cache"].as_deref(), Some("result"));
    let entries = entries(&server, "s");
    for key in ["first", "second", "third"] {
        assert_eq!(text(&entries, key, 1), texts[0], "{key}");
        assert_eq!(end(&entries, key), "done 1");
    }
    let of_third = entries.iter().filter(|(_, fields)| fields["job"] == "third").count();
    assert_eq!(of_third, 2);
}

/// Waits until a job has a few pieces in the stream `s`.
fn begun(server: &Server, key: &str, attempt: i64) {
    eventually("there is some text", || {
        let texts = texts(&entries(server, "s"), key, attempt);
        texts.get(&(0, 0)).filter(|text| text.len() > 20).map(|_| ())
    });
}

#[test]
fn nothing_follows_the_end_of_a_job_that_is_cancelled_or_deleted() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("sign.png");
    for key in ["cancelled", "deleted"] {
        submit(&server, key, &url, &[&LONG[..], &["NOCACHE"]].concat());
        begun(&server, key, 1);
        let command = if key == "deleted" { "DEL" } else { "FLORENCE.CANCEL" };
        assert_eq!(server.call::<i64>(&[command, key]), 1);
        let length: usize = server.call(&["XLEN", "s"]);
        eventually("it leaves the engine", || (server.stat("jobs_active") == 0).then_some(()));
        // Another job goes all the way.
        submit(&server, &format!("after-{key}"), &url, &["<OCR>", "TOKENS", "other"]);
        wait(&server, &format!("after-{key}"));
        assert_eq!(server.call::<usize>(&["XLEN", "s"]), length);
    }
    let entries = entries(&server, "s");
    assert_eq!(end(&entries, "cancelled"), "cancelled 1");
    assert_eq!(end(&entries, "deleted"), "");
}

#[test]
fn a_failure_ends_the_stream_and_a_retry_begins_another_attempt() {
    let server = Server::ready(&["florence.retry-delay-ms 1"]);
    let pictures = Pictures::serve();
    submit(&server, "missing", &pictures.url("status/404"), &["<OD>"]);
    wait(&server, "missing");
    // The second attempt gets the picture.
    submit(&server, "flaky", &pictures.url("flaky/2/sign.png"), &["<OCR>"]);
    let flaky = wait(&server, "flaky");
    assert_eq!(flaky["attempts"].as_deref(), Some("2"), "{flaky:?}");
    // Each is broken off amid its text.
    let late = [&LONG[..], &["NOCACHE", "TIMEOUT", "200", "RETRIES", "1"]].concat();
    submit(&server, "late", &pictures.url("sign.png"), &late);
    assert_eq!(wait(&server, "late")["state"].as_deref(), Some("failed"));
    let waiting = ["<OD>", "DELAY", "60000", "TOKENS", "s"];
    submit(&server, "waiting", &pictures.url("sign.png"), &waiting);
    server.call::<()>(&["FLORENCE.CANCEL", "waiting"]);
    submit(
        &server,
        "overdue",
        &pictures.url("sign.png"),
        &[&waiting[..], &["EXPIRES", "1"]].concat(),
    );
    wait(&server, "overdue");

    let entries = entries(&server, "s");
    assert_eq!(end(&entries, "missing"), "failed 1");
    assert!(texts(&entries, "missing", 1).is_empty());
    assert_eq!(end(&entries, "flaky"), "done 2");
    assert_eq!(Some(text(&entries, "flaky", 2)), flaky["text"]);
    assert!(texts(&entries, "flaky", 1).is_empty());
    assert_eq!(end(&entries, "late"), "failed 2");
    let [first, second] = [1, 2].map(|attempt| text(&entries, "late", attempt));
    assert!(first.starts_with(&second) || second.starts_with(&first), "{first} {second}");
    assert_eq!(end(&entries, "waiting"), "cancelled 0");
    assert_eq!(end(&entries, "overdue"), "expired 0");
}

#[test]
fn a_crash_begins_another_attempt_and_loses_neither_stream_nor_option() {
    let pictures = Pictures::serve();
    let lines = ["appendonly yes", "appendfsync always"];
    let mut server = Server::with(Settings::lines(&lines));
    server.wait_for_model();
    submit(&server, "job", &pictures.url("sign.png"), &LONG);
    begun(&server, "job", 1);
    server.kill();
    server.restart();
    let job = wait(&server, "job");
    let entries = entries(&server, "s");
    assert_eq!((job["attempts"].as_deref(), job["stream"].as_deref()), (Some("2"), Some("s")));
    let text = text(&entries, "job", 2);
    assert_eq!(Some(&text), job["text"].as_ref());
    assert!(text.starts_with(&texts(&entries, "job", 1)[&(0, 0)]));
    assert_eq!(end(&entries, "job"), "done 2");
    // In the order of the attempts.
    let attempts: Vec<&str> =
        entries.iter().map(|(_, fields)| fields["attempt"].as_str()).collect();
    assert!(attempts.is_sorted(), "{attempts:?}");
}

#[test]
fn a_user_needs_the_right_to_write_the_stream() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("sign.png");
    let user = ["ACL", "SETUSER", "ann", "on", ">pw", "+@all", "~job:*", "~<OD>"];
    server.call::<()>(&[&user[..], &["%W~mine:*", "%R~read:*"]].concat());
    let mut ann = server.connect_as("ann", "pw");
    let mut submit = |rest: &[&str]| -> redis::RedisResult<String> {
        call(&mut ann, &[&["FLORENCE.SUBMIT"], rest].concat())
    };
    submit(&["job:1", &url, "<OCR>", "TOKENS", "mine:s"]).unwrap();
    for stream in ["other", "read:s"] {
        let denied = submit(&["job:2", &url, "<OCR>", "TOKENS", stream]).unwrap_err();
        assert_eq!(denied.code(), Some("NOPERM"), "{stream}: {denied}");
    }
    // The server looks at the first word that may announce a key.
    let hidden = submit(&["job:3", "DATA", "TOKENS", "<OD>", "TOKENS", "other"]).unwrap_err();
    assert_eq!(hidden.code(), Some("NOPERM"));
    assert!(hidden.to_string().contains("this user may not write the stream"), "{hidden}");
    wait(&server, "job:1");
    assert_eq!(end(&entries(&server, "mine:s"), "job:1"), "done 1");
    assert_eq!(server.call::<i64>(&["EXISTS", "job:2", "job:3", "other", "read:s"]), 0);
}

#[test]
fn the_server_knows_the_streams_key() {
    let server = Server::ready(&[]);
    let command = ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x", "<OD>", "TOKENS", "s"];
    let keys: Vec<String> = server.call(&[&["COMMAND", "GETKEYS"], &command[..]].concat());
    assert_eq!(keys, ["job", "s"]);
    let command = ["FLORENCE.SUBMIT", "job", "KEY", "k", "<OD>", "BEAMS", "1", "tokens", "s"];
    let keys: Vec<String> = server.call(&[&["COMMAND", "GETKEYS"], &command[..]].concat());
    assert_eq!(keys, ["job", "k", "s"]);
    let same = ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x", "<OD>", "TOKENS", "job"];
    assert_eq!(server.error(&same), "ERR the job and its stream are the same key");
    let long = "s".repeat(8193);
    let long = ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x", "<OD>", "TOKENS", &long];
    assert_eq!(server.error(&long), "ERR the stream's key has 8193 bytes, more than 8192");
    let nothing = ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x", "<OD>", "TOKENS"];
    assert_eq!(server.error(&nothing), "ERR syntax error near 'TOKENS'");
}

#[test]
fn another_stream_is_another_request() {
    let server = Server::ready(&["florence.paused yes"]);
    let command =
        |stream| ["FLORENCE.SUBMIT", "job", "http://127.0.0.1/x", "<OD>", "TOKENS", stream];
    server.call::<()>(&command("s"));
    server.call::<()>(&command("s"));
    assert!(server.error(&command("t")).starts_with("JOBEXISTS"));
    let jobs: Vec<Job> = server.call(&["FLORENCE.JOBS"]);
    assert_eq!(jobs[0]["stream"].as_deref(), Some("s"));
}

#[test]
fn a_key_of_another_type_costs_the_text_alone_and_a_line_of_the_log() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    server.call::<()>(&["SET", "s", "text"]);
    submit(&server, "job", &pictures.url("shapes.png"), &["<DENSE_REGION_CAPTION>", "BEAMS", "1"]);
    assert_eq!(wait(&server, "job")["state"].as_deref(), Some("done"));
    assert_eq!(server.call::<String>(&["GET", "s"]), "text");
    let line = "the text of job 'job' cannot be added to 's': WRONGTYPE";
    assert_eq!(server.log().matches(line).count(), 1, "{}", server.log());
    assert_eq!(server.stat("jobs_unannounced"), 1);
}

#[test]
fn a_stream_that_is_deleted_is_made_again() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    submit(&server, "job", &pictures.url("sign.png"), &LONG);
    begun(&server, "job", 1);
    server.call::<()>(&["DEL", "s"]);
    let whole = wait(&server, "job")["text"].clone().unwrap();
    let entries = entries(&server, "s");
    assert_eq!(end(&entries, "job"), "done 1");
    let rest = text(&entries, "job", 1);
    assert!(rest.len() < whole.len() && whole.ends_with(&rest), "{rest}");
    assert_eq!(server.call::<i64>(&["TTL", "s"]), -1);
}

#[test]
fn a_reader_goes_on_from_the_last_entry_that_it_has_read() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let mut connection = server.connect_to(3);
    let url = pictures.url("sign.png");
    let command = [&["FLORENCE.SUBMIT", "job", &url], &LONG[..], &["TOKENS", "s"]].concat();
    call::<()>(&mut connection, &command).unwrap();
    let (mut last, mut found, mut reads) = ("0".to_owned(), Vec::new(), 0);
    while end(&found, "job").is_empty() {
        type Read = Option<Vec<(String, Vec<Entry>)>>;
        // A reader that comes back now and then, on connections of its own.
        let mut reader = server.connect_to(3);
        let read = ["XREAD", "COUNT", "5", "BLOCK", "10000", "STREAMS", "s", &last];
        let read: Read = call(&mut reader, &read).unwrap();
        let (_, new) = read.expect("the job goes on").remove(0);
        last.clone_from(&new.last().unwrap().0);
        found.extend(new);
        reads += 1;
    }
    let job: Job = call(&mut connection, &["FLORENCE.GET", "job"]).unwrap();
    assert_eq!(Some(text(&found, "job", 1)), job["text"]);
    assert!(reads > 3, "{reads} reads");
    assert_eq!(server.call::<i64>(&["EXISTS", "s"]), 0, "it is a stream of the job's database");
}

#[test]
fn a_stream_keeps_about_as_many_entries_as_the_setting_says() {
    let server = Server::ready(&["florence.tokens-length 10", "stream-node-max-entries 5"]);
    let pictures = Pictures::serve();
    for i in 0..4 {
        submit(
            &server,
            &format!("j{i}"),
            &pictures.url("sign.png"),
            &[&LONG[..], &["NOCACHE"]].concat(),
        );
    }
    for i in 0..4 {
        wait(&server, &format!("j{i}"));
    }
    let info: HashMap<String, redis::Value> = server.call(&["XINFO", "STREAM", "s"]);
    let added: i64 = redis::from_redis_value(&info["entries-added"]).unwrap();
    let length: i64 = server.call(&["XLEN", "s"]);
    assert!(added > 100 && (10..20).contains(&length), "{added} entries, {length} are left");
}

#[test]
fn sixty_four_streams_are_written_side_by_side() {
    const JOBS: usize = 64;
    let lines = ["appendonly yes", "florence.max-batch 64"];
    let mut server = Server::with(Settings::lines(&lines));
    server.wait_for_model();
    let sample = std::fs::read(picture("sign.png")).unwrap();
    let mut connection = server.connect();
    for i in 0..JOBS {
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        command.arg(format!("j{i}")).arg("DATA").arg(&sample[..]).arg("<CAPTION>");
        command.arg("TEMPERATURE").arg("2").arg("SEED").arg(i).arg("MAXTOKENS").arg(64);
        command.arg("TOKENS").arg(format!("s{}", i % 8)).exec(&mut connection).unwrap();
    }
    for i in 0..JOBS {
        let key = format!("j{i}");
        let job = wait(&server, &key);
        let entries = entries(&server, &format!("s{}", i % 8));
        assert_eq!(Some(text(&entries, &key, 1)), job["text"], "{key}");
        assert_eq!(end(&entries, &key), "done 1");
    }
    // Many at once, in few transactions.
    server.shut_down(&[]);
    let log = commands(server.directory.path());
    let count = |name: &str| log.matches(&format!("\r\n{name}\r\n")).count();
    let (entries, transactions) = (count("XADD"), count("EXEC"));
    assert!(entries > 4 * JOBS, "{entries} entries");
    assert!(transactions < entries / 4, "{transactions} transactions for {entries} entries");
}

/// The append-only file.
fn commands(directory: &Path) -> String {
    let files = std::fs::read_dir(directory.join("appendonlydir")).unwrap();
    let files = files.map(|file| std::fs::read(file.unwrap().path()).unwrap());
    String::from_utf8_lossy(&files.collect::<Vec<_>>().concat()).into_owned()
}
