//! How much one command may ask for: what is more is refused before any work, and stores nothing.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, Settings, call, eventually, picture};
use redis::{Arg, Cmd, Value};

type Job = HashMap<String, Option<String>>;

const PHRASE: &str = "<CAPTION_TO_PHRASE_GROUNDING>";
const PROMPT_BYTES: usize = 16_384;
const ADDRESS_BYTES: usize = 8192;
const NAME_BYTES: usize = 253;
/// Of the key of a job's stream.
const STREAM_BYTES: usize = 8192;
const KEYS: usize = 1000;

/// A server that nothing leaves: jobs wait for ever.
fn idle() -> Server {
    Server::ready(&[])
}

/// Submits a job that waits for ever.
fn accepted(server: &Server, key: &str, args: &[&str]) {
    let command = [&["FLORENCE.SUBMIT", key], args, &["DELAY", "600000"]].concat();
    assert_eq!(server.call::<String>(&command), key);
}

fn refused(server: &Server, args: &[&str], message: &str) {
    let command = [&["FLORENCE.SUBMIT", "refused"], args].concat();
    assert_eq!(server.error(&command), message);
    assert_eq!(server.call::<i64>(&["EXISTS", "refused"]), 0);
}

/// A host's name of so many bytes, in labels that DNS could have.
fn host(length: usize) -> String {
    let labels: String = std::iter::repeat_n("abcdefghi.", length / 10 + 1).collect();
    labels[..length - 1].to_owned() + "z"
}

#[test]
fn prompts_are_bounded_all_together() {
    let server = idle();
    let prompt = |length: usize| PHRASE.to_owned() + &"a".repeat(length - PHRASE.len());
    let long = prompt(PROMPT_BYTES + 1);
    let url = "http://127.0.0.1:1/x.png";
    let message = "BADPROMPT the prompts have 16385 bytes, more than 16384";
    refused(&server, &[url, &long], message);
    refused(&server, &[url, "PROMPTS", "2", &long[..8000], &prompt(8385)], message);
    let many: Vec<String> = (0..16).map(|i| prompt(1025) + &format!("{i:x}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let message = "BADPROMPT the prompts have 16416 bytes, more than 16384";
    refused(&server, &[&[url, "PROMPTS", "16"], &many[..]].concat(), message);
    // The name of a task counts, and nothing else is refused for its length.
    let exact = server.try_call::<Value>(&["FLORENCE.SUBMIT", "exact", url, &prompt(PROMPT_BYTES)]);
    let is_too_long =
        exact.is_err_and(|error| error.detail().unwrap_or_default().contains("16384"));
    assert!(!is_too_long, "16384 bytes are not more than that");
    accepted(&server, "fine", &[url, "PROMPTS", "2", "<OD>", &prompt(200)]);
}

#[test]
fn addresses_are_bounded() {
    let roots = picture("shapes.png").parent().unwrap().display().to_string();
    let server = Server::with(Settings::lines(&[&format!("florence.file-roots {roots}")]));
    server.wait_for_model();
    let url = |length: usize| {
        let start = "http://127.0.0.1:1/";
        start.to_owned() + &"a".repeat(length - start.len())
    };
    let message = "ERR the image's address has 8193 bytes, more than 8192";
    accepted(&server, "url", &[&url(ADDRESS_BYTES), "<OD>"]);
    refused(&server, &[&url(ADDRESS_BYTES + 1), "<OD>"], message);
    let query = format!("{}?{}", url(100), "q".repeat(ADDRESS_BYTES + 1 - 101));
    refused(&server, &[&query, "<OD>"], message);
    for start in [format!("{roots}/"), format!("file://{roots}/"), "gs://bucket/".to_owned()] {
        let long = start.clone() + &"a".repeat(ADDRESS_BYTES + 1 - start.len());
        refused(&server, &[&long, "<OD>"], message);
    }
    // The bytes of a picture are no address.
    let inline = format!("data:image/png;base64,{}", "AAAA".repeat(20_000));
    accepted(&server, "inline", &[&inline, "<OD>"]);
}

#[test]
fn names_of_hosts_and_models_are_bounded() {
    let server = idle();
    let url = |length| format!("http://{}/x.png", host(length));
    accepted(&server, "host", &[&url(NAME_BYTES), "<OD>"]);
    let message = "ERR the host's name has 254 bytes, more than 253";
    refused(&server, &[&url(NAME_BYTES + 1), "<OD>"], message);
    let port = format!("https://user:secret@{}:8443/x.png", host(NAME_BYTES + 1));
    refused(&server, &[&port, "<OD>"], message);
    let message = "ERR the model's name has 254 bytes, more than 253";
    let name = "m".repeat(NAME_BYTES + 1);
    refused(&server, &["http://127.0.0.1:1/x", "<OD>", "MODEL", &name], message);
    let error =
        server.error(&["FLORENCE.SUBMIT", "j", "http://h/x", "<OD>", "MODEL", &name[..NAME_BYTES]]);
    assert!(error.starts_with("NOMODEL "), "{error}");
}

#[test]
fn hashes_that_exceed_the_limits_of_submit_are_invalid() {
    let server = idle();
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let long_prompt = PHRASE.to_owned() + &"a".repeat(PROMPT_BYTES);
    let prompts: Vec<String> =
        (0..16).map(|i| format!("{PHRASE}{i}{}", "a".repeat(1025))).collect();
    let prompts = serde_json::json!(prompts).to_string();
    let address = format!("http://127.0.0.1:1/{}", "a".repeat(ADDRESS_BYTES));
    let named = format!("http://{}/x.png", host(NAME_BYTES + 1));
    let model = "m".repeat(NAME_BYTES + 1);
    let stream = "s".repeat(STREAM_BYTES + 1);
    let cases: [(&str, &[(&str, &str)]); 6] = [
        ("a long prompt", &[("prompt", &long_prompt)]),
        ("long prompts", &[("prompt", &prompts)]),
        ("a long address", &[("image", &address)]),
        ("a long name of a host", &[("image", &named)]),
        ("a long name of a model", &[("wants", &model)]),
        ("a long name of a stream", &[("stream", &stream)]),
    ];
    for (key, changes) in cases {
        let mut write = redis::cmd("HSET");
        write.arg(key).arg("florence").arg(1).arg("state").arg("queued").arg("retries").arg(0);
        write.arg("prompt").arg("<OD>").arg("image").arg("DATA");
        for (field, value) in changes {
            write.arg(field).arg(value);
        }
        if !changes.iter().any(|(field, _)| *field == "image") {
            write.arg("data").arg(&bytes);
        }
        write.exec(&mut server.connect()).unwrap();
    }
    for (key, _) in cases {
        let job: Job = eventually(key, || {
            let job: Option<Job> = server.try_call(&["FLORENCE.WAIT", key, "20"]).ok()?;
            job.filter(|job| job["state"].as_deref() == Some("failed"))
        });
        let error: serde_json::Value =
            serde_json::from_str(job["error"].as_deref().unwrap()).unwrap();
        assert_eq!(error["code"], "INVALID", "{key}: {error}");
    }
}

#[test]
fn commands_take_a_thousand_keys_and_no_more() {
    let server = idle();
    accepted(&server, "k0", &["http://127.0.0.1:1/x", "<OD>"]);
    let keys: Vec<String> = (0..=KEYS).map(|i| format!("k{i}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let all = |command, keys: &[&str], rest: &[&str]| {
        server.try_call::<Value>(&[&[command], keys, rest].concat())
    };
    for (command, rest) in
        [("FLORENCE.WAIT", &["1"][..]), ("FLORENCE.CANCEL", &[]), ("FLORENCE.RETRY", &[])]
    {
        let error = server.error(&[&[command], &keys[..], rest].concat());
        assert_eq!(error, "ERR too many keys: 1001, more than 1000", "{command}");
        // Nothing was done.
        assert_eq!(server.state("k0"), "queued");
    }
    assert_eq!(all("FLORENCE.CANCEL", &keys[..KEYS], &[]).unwrap(), Value::Int(1));
    assert_eq!(all("FLORENCE.RETRY", &keys[..KEYS], &[]).unwrap(), Value::Int(1));
    server.call::<i64>(&["FLORENCE.CANCEL", "k0"]);
    let job = all("FLORENCE.WAIT", &keys[..KEYS], &["1"]).unwrap();
    assert!(format!("{job:?}").contains("cancelled"), "{job:?}");
}

#[test]
fn jobs_are_listed_a_thousand_at_a_time() {
    let server = idle();
    let mut pipe = redis::pipe();
    for i in 0..=KEYS {
        let submit = pipe.cmd("FLORENCE.SUBMIT").arg(format!("j{i}")).arg("http://127.0.0.1:1/");
        submit.arg("<OD>").arg("DELAY").arg(600_000).ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    let list = |count: &str| -> Vec<Value> { server.call(&["FLORENCE.JOBS", "COUNT", count]) };
    assert_eq!((list("1").len(), list("1000").len()), (1, KEYS));
    // A larger one is allowed, and lists no more.
    assert_eq!(list("100000").len(), KEYS);
    for count in ["0", "100001", "9223372036854775807", "-1"] {
        let error = server.error(&["FLORENCE.JOBS", "COUNT", count]);
        assert_eq!(error, "ERR COUNT is not an integer from 1 to 100000", "{count}");
    }
}

/// Runs a command while somebody else pings: what it answers, and the longest pause between pings.
fn beside_pings(server: &Server, command: &Cmd) -> (redis::RedisResult<Value>, Duration) {
    let is_over = AtomicBool::new(false);
    let (mut pinging, mut connection) = (server.connect(), server.connect());
    thread::scope(|scope| {
        let pings = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !is_over.load(Ordering::SeqCst) {
                let start = Instant::now();
                call::<String>(&mut pinging, &["PING"]).unwrap();
                longest = longest.max(start.elapsed());
            }
            longest
        });
        let reply = command.query(&mut connection);
        is_over.store(true, Ordering::SeqCst);
        (reply, pings.join().unwrap())
    })
}

/// What the server takes for the command itself, beside reading it, when it refuses it.
const REFUSAL: Duration = Duration::from_millis(300);

#[test]
fn what_is_far_too_large_is_refused_without_work() {
    let mut server = idle();
    let submit = |args: &[&[u8]]| {
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        command.arg("j").arg(args);
        command
    };
    let address = b"http://127.0.0.1:1/x.png";
    let prompt = [PHRASE.as_bytes(), &vec![b'a'; 40 << 20]].concat();
    let specials = [PHRASE.as_bytes(), &b"<loc_1>".repeat(6 << 20)].concat();
    let inline = [&b"data:image/png;base64,"[..], &vec![b'A'; 200 << 20]].concat();
    let escaped = [&b"data:image/png,"[..], &b"%41".repeat(66 << 20)].concat();
    let url = [&b"http://127.0.0.1:1/"[..], &vec![b'a'; 40 << 20]].concat();
    let keys: Vec<String> = (0..100_000).map(|i| format!("key:{i}")).collect();
    let with_keys = |name: &str, last: &[&str]| {
        let mut command = redis::cmd(name);
        command.arg(&keys).arg(last);
        command
    };
    let cases = [
        ("a prompt", "BADPROMPT", submit(&[address, &prompt])),
        ("special tokens", "BADPROMPT", submit(&[address, &specials])),
        ("a data: URL", "ERR", submit(&[&inline, b"<OD>"])),
        ("an escaped data: URL", "ERR", submit(&[&escaped, b"<OD>"])),
        ("an address", "ERR", submit(&[&url, b"<OD>"])),
        ("keys to wait for", "ERR", with_keys("FLORENCE.WAIT", &["1"])),
        ("keys to cancel", "ERR", with_keys("FLORENCE.CANCEL", &[])),
        ("keys to retry", "ERR", with_keys("FLORENCE.RETRY", &[])),
    ];
    for (what, code, command) in cases {
        server.call::<()>(&["CONFIG", "RESETSTAT"]);
        let (reply, longest_ping) = beside_pings(&server, &command);
        let error = reply.expect_err(what);
        let named = error.code().unwrap_or("ERR");
        assert_eq!(named, code, "{what}: {error}");
        let Some(Arg::Simple(name)) = command.args_iter().next() else { panic!("{what}") };
        let taken = server.time_of(std::str::from_utf8(name).unwrap());
        assert!(taken < REFUSAL, "{what} took {taken:?}");
        assert!(longest_ping < Duration::from_secs(1), "{what}: a PING took {longest_ping:?}");
    }
    assert_eq!(server.call::<i64>(&["DBSIZE"]), 0);
    assert!(server.is_alive());
}

#[test]
fn retry_queues_all_or_none_by_the_room_that_there_is() {
    let pictures = Pictures::serve();
    let server = Server::busy(&pictures, &["florence.max-queue 3"]);
    let url = pictures.url("held/back/sign.png");
    let failed = ["f0", "f1", "f2", "f3", "f4"];
    for key in failed {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OCR>"]);
        server.call::<()>(&["FLORENCE.CANCEL", key]);
    }
    for key in ["waiting:0", "waiting:1"] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OCR>"]);
    }
    assert_eq!(server.stat("jobs_waiting"), 2);
    let retry = |keys: &[&str]| server.error(&[&["FLORENCE.RETRY"], keys].concat());
    let message = "BUSY queue is full, retry after 1000 ms";
    assert_eq!(retry(&failed), message);
    assert_eq!(retry(&failed[..2]), message);
    assert_eq!(server.stat("jobs_waiting"), 2);
    assert_eq!(failed.map(|key| server.state(key)), ["cancelled"; 5]);
    // Only what would be queued takes room.
    let keys = ["FLORENCE.RETRY", "f0", "f0", "waiting:0", "nothing", "at-work:0"];
    assert_eq!(server.call::<i64>(&keys), 1);
    assert_eq!(retry(&failed[1..2]), message);
    assert_eq!((server.stat("jobs_waiting"), server.state("f0")), (3, "queued".to_owned()));
    pictures.release("back");
    let job: Job = server.call(&["FLORENCE.WAIT", "f0", "30"]);
    assert_eq!(job["state"].as_deref(), Some("done"));
}
