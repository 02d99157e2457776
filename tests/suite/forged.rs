//! Hashes that claim to be jobs, and hold what SUBMIT would never write: each ends, soon, and
//! harms nobody.

use std::{
    collections::HashMap,
    thread::sleep,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, picture};

type Job = HashMap<String, Option<String>>;
type Fields = Vec<(&'static str, Vec<u8>)>;

/// A job as SUBMIT writes it.
fn honest() -> Fields {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis();
    vec![
        ("florence", "1".into()),
        ("state", "queued".into()),
        ("image", "DATA".into()),
        ("data", std::fs::read(picture("shapes.png")).unwrap()),
        ("prompt", "<OD>".into()),
        ("priority", "0".into()),
        ("timeout", "300000".into()),
        ("retries", "3".into()),
        ("ttl", "86400".into()),
        ("submitted_at", now.to_string().into()),
    ]
}

/// What must become of a hash.
#[derive(Debug, Clone, Copy)]
enum End {
    /// It is answered.
    Done,
    /// It is refused, with one of these codes.
    Failed(&'static [&'static str]),
    /// Whichever: a value that is out of range may be brought into it.
    Either(&'static [&'static str]),
}

/// The code of what cannot be brought into SUBMIT's range.
const INVALID: &[&str] = &["INVALID"];
const REFUSED: End = End::Failed(INVALID);
const CLAMPED: End = End::Either(INVALID);

impl End {
    fn is(self, job: &Job) -> bool {
        let (is_done_fine, codes) = match self {
            Self::Done => (true, &[][..]),
            Self::Failed(codes) => (false, codes),
            Self::Either(codes) => (true, codes),
        };
        let code = |error: &String| {
            let error: serde_json::Value = serde_json::from_str(error).unwrap();
            error["code"].as_str().unwrap().to_owned()
        };
        match job["state"].as_deref() {
            Some("done") => is_done_fine,
            Some("failed") => {
                job["error"].as_ref().map(code).is_some_and(|code| codes.contains(&code.as_str()))
            }
            _ => false,
        }
    }
}

/// An honest job with other fields, or without some of them.
struct Forgery {
    name: String,
    fields: Fields,
    end: End,
}

fn forged(name: impl Into<String>, changes: &[(&'static str, &[u8])], end: End) -> Forgery {
    let mut fields = honest();
    for (field, value) in changes {
        fields.retain(|(known, _)| known != field);
        fields.push((field, value.to_vec()));
    }
    Forgery { name: name.into(), fields, end }
}

fn without(names: &[&str], changes: &[(&'static str, &[u8])], end: End) -> Forgery {
    let changed: Vec<_> = changes.iter().map(|(field, _)| field).collect();
    let mut forgery = forged(format!("no {names:?}, other {changed:?}"), changes, end);
    forgery.fields.retain(|(field, _)| !names.contains(field));
    forgery
}

/// How long a hash may take to end.
const LONGEST: Duration = Duration::from_secs(12);
/// How much the server may grow meanwhile, in KiB.
const GROWTH: u64 = 300 << 10;

/// Writes the hashes all at once and honest jobs beside them, and looks how each ends.
fn assert_harmless(lines: &[&str], forgeries: &[Forgery]) {
    let mut server = Server::with(Settings::lines(lines));
    server.wait_for_model();
    let mut connection = server.connect();
    let before = server.usage()[0];
    let mut pipe = redis::pipe();
    pipe.atomic();
    for forgery in forgeries {
        let write = pipe.cmd("HSET").arg(&forgery.name);
        for (field, value) in &forgery.fields {
            write.arg(field).arg(value);
        }
        write.ignore();
    }
    pipe.exec(&mut connection).unwrap();
    let start = Instant::now();
    submit_honest(&server, "beside");
    let mut beside = None;
    let mut left: Vec<&Forgery> = forgeries.iter().collect();
    let mut wrong = Vec::new();
    while (!left.is_empty() || beside.is_none()) && start.elapsed() < LONGEST && server.is_alive() {
        left.retain(|forgery| {
            let job: Job = server.job(&forgery.name);
            let has_ended = ENDED.contains(&job["state"].as_deref().unwrap());
            if has_ended && !forgery.end.is(&job) {
                wrong.push(format!("{}: {:?}, not {:?}", forgery.name, shown(&job), forgery.end));
            }
            !has_ended
        });
        if beside.is_none() && server.state("beside") == "done" {
            beside = Some(start.elapsed());
        }
        let grown = server.usage()[0].saturating_sub(before);
        assert!(grown < GROWTH, "the server has grown by {grown} KiB");
        sleep(Duration::from_millis(20));
    }
    assert!(server.is_alive(), "{}", server.log());
    wrong.extend(left.iter().map(|forgery| {
        format!("{}: does not end, {:?}", forgery.name, shown(&server.job(&forgery.name)))
    }));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(beside.is_some_and(|time| time < Duration::from_secs(10)), "beside them: {beside:?}");
    submit_honest(&server, "afterwards");
    let afterwards: Option<Job> = server.call(&["FLORENCE.WAIT", "afterwards", "10"]);
    assert_eq!(afterwards.unwrap()["state"].as_deref(), Some("done"));
    server.until_idle();
    assert_eq!(server.stat("panics"), 0, "{}", server.log());
}

const ENDED: [&str; 4] = ["done", "failed", "expired", "cancelled"];

fn submit_honest(server: &Server, key: &str) {
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(key).arg("DATA").arg(bytes).arg("<OCR>").arg("PRIORITY").arg(9).arg("NOCACHE");
    submit.exec(&mut server.connect()).unwrap();
}

fn shown(job: &Job) -> [Option<&str>; 2] {
    ["state", "error"].map(|field| job[field].as_deref())
}

#[test]
fn prompts_that_submit_would_refuse() {
    const BAD: End = End::Failed(&["INVALID", "PROMPT"]);
    let several = |prompts: &[String]| serde_json::json!(prompts).to_string().into_bytes();
    let phrase = |i: usize| format!("<CAPTION_TO_PHRASE_GROUNDING>a red circle {i}");
    let many = several(&(0..5000).map(phrase).collect::<Vec<_>>());
    let seventeen = several(&(0..17).map(phrase).collect::<Vec<_>>());
    let twice = several(&["<OD>".to_owned(), "<CAPTION>".to_owned(), "<OD>".to_owned()]);
    let prompt = |name: &str, prompt: &[u8], end| {
        forged(name, &[("prompt", prompt), ("nocache", b"1")], end)
    };
    assert_harmless(
        &[],
        &[
            prompt("an empty list", b"[]", BAD),
            forged("an empty list that may be cached", &[("prompt", b"[]")], BAD),
            prompt("an empty prompt", b"", BAD),
            prompt("a list of an empty prompt", b"[\"\"]", BAD),
            prompt("no task", b"hello", BAD),
            prompt("a list of numbers", b"[1]", BAD),
            prompt("no text", b"<OD>\xff\xfe", BAD),
            prompt("5,000 prompts", &many, REFUSED),
            prompt("17 prompts", &seventeen, REFUSED),
            prompt("the same prompt twice", &twice, REFUSED),
            without(&["prompt"], &[], BAD),
        ],
    );
}

/// What is no number, or one that nobody means.
const ODD: [&str; 8] = [
    "-9223372036854775808",
    "9223372036854775807",
    "9223372036854775808",
    "-99999999999999999999999",
    "1000000000000",
    "-1",
    "abc",
    "",
];

fn each_alone(fields: &[&'static str], end: impl Fn(&str, &str) -> End) -> Vec<Forgery> {
    let alone = |field: &&'static str, value: &&str| {
        let name = format!("{field} = '{value}'");
        forged(name, &[(field, value.as_bytes()), ("nocache", b"1")], end(field, value))
    };
    fields.iter().flat_map(|field| ODD.iter().map(move |value| alone(field, value))).collect()
}

/// A number may be brought into SUBMIT's range; what is none cannot.
fn option(value: &str) -> End {
    if value.parse::<f64>().is_ok() { CLAMPED } else { REFUSED }
}

#[test]
fn beams_tokens_and_thumbnails_that_nobody_can_compute() {
    assert_harmless(
        &[],
        &each_alone(
            &["beams", "maxtokens", "thumbnail_px", "margin", "top_k", "seed", "ngram"],
            |_, value| option(value),
        ),
    );
}

#[test]
fn limits_of_a_job_at_the_ends_of_the_numbers() {
    let fields = ["timeout", "retries", "priority", "ttl"];
    assert_harmless(&[], &each_alone(&fields, |_, value| option(value)));
}

#[test]
fn times_at_the_ends_of_the_numbers() {
    let end = |field: &str, value: &str| match (field, value) {
        // What the server itself notes may be anything.
        ("submitted_at", _) => CLAMPED,
        // Longer than the longest DELAY: brought into range, it would still wait for a year.
        ("delay", "9223372036854775807" | "9223372036854775808" | "1000000000000") => REFUSED,
        _ => option(value),
    };
    assert_harmless(&[], &each_alone(&["submitted_at", "delay", "expires"], end));
}

#[test]
fn what_does_not_go_together_is_refused_as_submit_does() {
    assert_harmless(
        &[],
        &[
            forged("margin", &[("margin", b"5")], REFUSED),
            forged("penalty", &[("beams", b"1"), ("length_penalty", b"2")], REFUSED),
            forged("best", &[("temperature", b"1"), ("nbest_count", b"1")], REFUSED),
            forged("beams", &[("beams", b"2"), ("seed", b"1")], REFUSED),
        ],
    );
}

#[test]
fn a_job_that_does_not_say_when_it_came_has_come_now() {
    let forgeries: Vec<Forgery> = ["", "0", "-1", "soon"]
        .into_iter()
        .map(|at| {
            let mut forgery = forged(format!("at {at}"), &[("expires", b"60000")], End::Done);
            forgery.fields.retain(|(field, _)| *field != "submitted_at");
            if !at.is_empty() {
                forgery.fields.push(("submitted_at", at.into()));
            }
            forgery
        })
        .collect();
    assert_harmless(&[], &forgeries);
    // A job that waits goes before it.
    let server = Server::ready(&["florence.paused yes"]);
    submit_honest(&server, "honest");
    let mut write = redis::cmd("HSET");
    write.arg("forged");
    for (field, value) in &forgeries[0].fields {
        write.arg(field).arg(value);
    }
    write.exec(&mut server.connect()).unwrap();
    let position = |key: &str| server.job(key)["position"].clone().unwrap();
    assert_eq!((position("honest"), position("forged")), ("0".to_owned(), "1".to_owned()));
}

#[test]
fn a_stream_of_somebody_else_keeps_its_entries() {
    let server = Server::ready(&["florence.tokens-length 10", "stream-node-max-entries 5"]);
    for i in 0..50 {
        server.call::<()>(&["XADD", "audit", "*", "entry", &i.to_string()]);
    }
    let job = forged("job", &[("stream", b"audit")], End::Done);
    let mut write = redis::cmd("HSET");
    write.arg("job");
    for (field, value) in &job.fields {
        write.arg(field).arg(value);
    }
    write.exec(&mut server.connect()).unwrap();
    let ended: Option<Job> = server.call(&["FLORENCE.WAIT", "job", "30"]);
    assert_eq!(ended.unwrap()["state"].as_deref(), Some("done"));
    let first: Vec<(String, HashMap<String, String>)> =
        server.call(&["XRANGE", "audit", "-", "+", "COUNT", "1"]);
    assert_eq!(first[0].1["entry"], "0");
    assert!(server.call::<i64>(&["XLEN", "audit"]) > 50);
}

#[test]
fn records_of_attempts_at_the_ends_of_the_numbers() {
    // Whoever says that the server died often is believed.
    const CRASHED: End = End::Either(&["INVALID", "CRASH"]);
    let mut forgeries = each_alone(&["attempts"], |_, _| CLAMPED);
    forgeries.extend(each_alone(&["crashes"], |_, _| CRASHED));
    for mut forgery in each_alone(&["retry_at"], |_, _| CLAMPED) {
        forgery.fields.retain(|(field, _)| *field != "state");
        forgery.fields.push(("state", "retrying".into()));
        forgeries.push(forgery);
    }
    assert_harmless(&[], &forgeries);
}

#[test]
fn retries_of_a_failing_download_at_the_ends_of_the_numbers() {
    const FAILS: End = End::Failed(&["INVALID", "FETCH"]);
    let pictures = Pictures::serve();
    let url = pictures.url("status/503");
    let mut forgeries = each_alone(&["attempts", "retries"], |_, _| FAILS);
    // As often as SUBMIT's largest RETRIES would be too often for a test.
    forgeries.retain(|forgery| {
        !["'9223372036854775807'", "'9223372036854775808'", "'1000000000000'"]
            .iter()
            .any(|value| forgery.name == format!("retries = {value}"))
    });
    for forgery in &mut forgeries {
        forgery.fields.retain(|(field, _)| !["image", "data"].contains(field));
        forgery.fields.push(("image", url.clone().into()));
    }
    assert_harmless(&["florence.retry-delay-ms 20"], &forgeries);
}

#[test]
fn states_that_nobody_is_in() {
    let strange: &[u8] = b"nobody-\xff\x00-1";
    let own = |state: &'static [u8]| {
        forged(
            format!("{} by a stranger", String::from_utf8_lossy(state)),
            &[("state", state), ("owner", strange), ("attempts", b"1")],
            End::Done,
        )
    };
    let nobodys = |state: &'static [u8]| {
        let name = format!("{} by nobody", String::from_utf8_lossy(state));
        forged(name, &[("state", state)], End::Done)
    };
    assert_harmless(
        &[],
        &[
            forged("retrying at no time", &[("state", b"retrying")], End::Done),
            own(b"fetching"),
            own(b"running"),
            nobodys(b"fetching"),
            nobodys(b"running"),
        ],
    );
}

#[test]
fn pictures_that_are_not_there_or_too_large() {
    let large = vec![b'x'; 5000];
    let key: &[u8] = b"KEY page";
    assert_harmless(
        &["florence.max-image-bytes 4096"],
        &[
            without(&["image", "data"], &[], REFUSED),
            without(&["data"], &[], REFUSED),
            without(&["data"], &[("image", key)], REFUSED),
            forged("an empty picture", &[("data", b"")], REFUSED),
            forged("a large picture", &[("data", &large)], REFUSED),
            forged("an empty image", &[("image", b"")], End::Either(INVALID)),
            forged("an image of no text", &[("image", b"\xff\xfe")], End::Either(INVALID)),
        ],
    );
}

#[test]
fn fields_of_many_bytes_are_neither_copied_nor_listed() {
    let server = Server::ready(&["florence.paused yes"]);
    let (long, fields) = (vec![b'7'; 32 << 20], ["prompt", "beams", "length_penalty", "timeout"]);
    for field in fields {
        submit_honest(&server, field);
        let mut set = redis::cmd("HSET");
        set.arg(field).arg(field).arg(&long).exec(&mut server.connect()).unwrap();
    }
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    for field in fields {
        let job: Job = server.call(&["FLORENCE.WAIT", field, "30"]);
        assert!(End::is(REFUSED, &job), "{field}: {:?}", job["error"]);
    }
    for (state, field) in [("failed", "error_code"), ("queued", "stream")] {
        server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
        submit_honest(&server, "listed");
        let mut set = redis::cmd("HSET");
        set.arg("listed").arg(&[("state", state)]);
        set.arg(field).arg(&long).exec(&mut server.connect()).unwrap();
        let rows: redis::Value = server.call(&["FLORENCE.JOBS", "STATE", state]);
        let told = format!("{rows:?}");
        assert!(told.contains("listed") && told.len() < 10_000, "{} bytes", told.len());
        server.call::<()>(&["DEL", "listed"]);
    }
}

#[test]
fn a_stream_that_submit_would_refuse_is_not_written_to() {
    let server = Server::ready(&["florence.paused yes"]);
    let long = "s".repeat(70_000);
    for (key, stream) in [("long", long.as_str()), ("itself", "itself")] {
        submit_honest(&server, key);
        server.call::<()>(&["HSET", key, "stream", stream]);
    }
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    for key in ["long", "itself"] {
        let job: Job = server.call(&["FLORENCE.WAIT", key, "30"]);
        assert!(End::is(REFUSED, &job), "{key}: {job:?}");
    }
    assert_eq!(server.call::<i64>(&["EXISTS", &long]), 0);
}
