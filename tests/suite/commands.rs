//! What each command answers, and what it refuses.

use std::{collections::HashMap, time::Instant};

use florence_tests::{Pictures, Server, Settings, eventually, picture};
use redis::Value;

fn with_samples() -> Server {
    let roots = picture("shapes.png").parent().unwrap().display().to_string();
    Server::with(Settings::lines(&[&format!("florence.file-roots {roots}")]))
}

fn shapes() -> String {
    picture("shapes.png").display().to_string()
}

#[test]
fn a_submitted_picture_is_answered() {
    let server = with_samples();
    assert_eq!(server.call::<String>(&["FLORENCE.SUBMIT", "job", &shapes(), "<OD>"]), "job");
    let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", "job", "30"]);
    assert_eq!(job["state"].as_deref(), Some("done"));
    assert_eq!(job["attempts"].as_deref(), Some("1"));
    assert_eq!(job["prompt"].as_deref(), Some("<OD>"));
    let result: serde_json::Value =
        serde_json::from_str(job["result"].as_deref().unwrap()).unwrap();
    assert_eq!(result["<OD>"]["labels"], serde_json::json!(["circle", "square", "triangle"]));
    let alone: String = server.call(&["FLORENCE.GET", "job", "RESULT"]);
    assert_eq!(Some(alone), job["result"]);
    // The finished job leaves by itself one day.
    let ttl: i64 = server.call(&["TTL", "job"]);
    assert!((86_390..=86_400).contains(&ttl), "{ttl}");
    assert_eq!(server.call::<i64>(&["HEXISTS", "job", "data"]), 0);
}

#[test]
fn the_server_chooses_a_key_for_a_star() {
    let server = with_samples();
    let submit = || server.call::<String>(&["FLORENCE.SUBMIT", "*", &shapes(), "<CAPTION>"]);
    let (first, second) = (submit(), submit());
    assert!(first.starts_with("florence:") && first.len() == 9 + 26, "{first}");
    assert_ne!(first, second);
}

#[test]
fn submitting_again_is_a_no_op_and_another_request_is_refused() {
    let server = with_samples();
    for _ in 0..3 {
        server.call::<String>(&["FLORENCE.SUBMIT", "job", &shapes(), "<OD>"]);
    }
    assert_eq!(server.stat("jobs_submitted"), 1);
    let other = server.error(&["FLORENCE.SUBMIT", "job", &shapes(), "<OCR>"]);
    assert_eq!(other, "JOBEXISTS another job lives under this key");
}

#[test]
fn an_error_is_one_line_whatever_is_in_it() {
    // The last one is a character whose low byte is zero.
    const ODD: [&[u8]; 5] = [b"a\0b", b"a\r\n+b", b"\0", b"\x1b[31m\xff", "\u{100}".as_bytes()];
    let mut server = with_samples();
    server.wait_for_model();
    let mut connection = server.connect();
    let mut refused = |arguments: &[&[u8]]| {
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        match command.arg(arguments).query::<String>(&mut connection) {
            Ok(key) => server.call::<()>(&["DEL", &key]),
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains(char::is_control), "{text:?}");
            }
        }
    };
    for odd in ODD {
        refused(&[b"k", b"http://a.example/", odd]);
        refused(&[b"k", b"http://a.example/", &[b"<OD>", odd].concat()]);
        refused(&[b"k", b"http://a.example/", b"<OD>", odd]);
        refused(&[b"k", b"http://a.example/", b"<OD>", b"MODEL", odd]);
        refused(&[b"k", odd, b"<OD>"]);
        refused(&[b"k", &[b"file:///", odd].concat(), b"<OD>"]);
        refused(&[b"k", &[b"data:image/png;base64,", odd].concat(), b"<OD>"]);
        refused(&[b"k", b"KEY", odd, b"<OD>"]);
    }
    let mut connection = server.connect();
    for name in ["GET", "WAIT", "JOBS", "STATS", "MODEL", "HELP", "HOSTS"] {
        for odd in ODD {
            let mut command = redis::cmd(&format!("FLORENCE.{name}"));
            let _ = command.arg("STATE").arg(odd).arg(odd).query::<Value>(&mut connection);
        }
    }
    // A hash that somebody else has written says why its job failed.
    for odd in ODD {
        let fields =
            [("florence", &b"1"[..]), ("state", b"failed"), ("error_code", odd), ("error", odd)];
        redis::cmd("HSET").arg("forged").arg(&fields).exec(&mut connection).unwrap();
        let mut get = redis::cmd("FLORENCE.GET");
        let error = get.arg("forged").arg("RESULT").query::<Value>(&mut connection).unwrap_err();
        let error = error.to_string();
        assert!(!error.contains(char::is_control), "{error:?}");
        redis::cmd("FLORENCE.WAIT").arg("forged").arg(1).exec(&mut connection).unwrap();
    }
    assert!(server.is_alive());
}

#[test]
fn bad_arguments_are_refused_and_store_nothing() {
    let server = with_samples();
    server.wait_for_model();
    let shapes = shapes();
    let wrong_arity = "ERR wrong number of arguments for 'florence.submit' command";
    server.call::<()>(&["SET", "text", "x"]);
    server.call::<()>(&["HSET", "hash", "a", "b"]);
    let (image, long) = (shapes.as_str(), "x".repeat(8193));
    let cases: &[(&[&str], &str)] = &[
        (&["j"], wrong_arity),
        (&["j", image], wrong_arity),
        (&["j", image, "<OD>", "NOSUCH", "1"], "ERR syntax error near 'NOSUCH'"),
        (&["j", image, "<OD>", "TTL", "1", "a\r\nb"], "ERR syntax error near 'a\\r\\nb'"),
        (&["j", image, "<OD>", "BEAMS"], "ERR syntax error near 'BEAMS'"),
        (&["j", image, "<OD>", "MODEL"], "ERR syntax error near 'MODEL'"),
        (&["j", image, "PROMPTS"], "ERR syntax error near 'PROMPTS'"),
        (&["j", image, "PROMPTS", "2", "<OD>"], "ERR PROMPTS 2 is followed by 1 prompts"),
        (&["j", image, "<OD>", "BEAMS", "0"], "ERR BEAMS is not an integer from 1 to 16"),
        (&["j", image, "<OD>", "PRIORITY", "x"], "ERR PRIORITY is not an integer from 0 to 9"),
        (&["j", image, "<OD>", "TTL", "-1"], "ERR TTL is not an integer from 0 to 315360000"),
        (
            &["j", "ftp://host/x.png", "<OD>"],
            "ERR the image must be an http(s), gs, s3 or data URL, an absolute path, DATA bytes or KEY key",
        ),
        (&["j", "DATA", "", "<OD>"], "ERR the image is empty"),
        (&["j", "KEY", "nokey", "<OD>"], "ERR the image key does not exist"),
        (
            &["j", "KEY", "hash", "<OD>"],
            "WRONGTYPE Operation against a key holding the wrong kind of value",
        ),
        (
            &["j", "/etc/passwd", "<OD>"],
            "DENIED the file is not below a directory of florence.file-roots",
        ),
        (&[&long, image, "<OD>"], "ERR a job's key has at most 8192 bytes"),
        (&["text", image, "<OD>"], "WRONGTYPE Key '"),
        (&["hash", image, "<OD>"], "WRONGTYPE Key '"),
    ];
    for (args, expected) in cases {
        let command: Vec<&str> = ["FLORENCE.SUBMIT"].iter().chain(*args).copied().collect();
        let found = server.error(&command);
        // The crate's and the server's WRONGTYPE texts differ: the code is what counts.
        let same = if expected.starts_with("WRONGTYPE") {
            found.starts_with("WRONGTYPE")
        } else {
            found == *expected
        };
        assert!(same, "{args:?}: {found}");
    }
    assert_eq!(server.call::<i64>(&["DBSIZE"]), 2);
}

#[test]
fn commands_that_only_look_name_what_they_refuse() {
    let server = Server::start();
    server.call::<()>(&["HSET", "hash", "a", "b"]);
    for (command, expected) in [
        (&["FLORENCE.GET"][..], "ERR wrong number of arguments for 'florence.get' command"),
        (&["FLORENCE.GET", "hash"], "NOTAJOB the hash under this key is not a job"),
        (&["FLORENCE.GET", "j", "x"], "ERR syntax error near 'x'"),
        (&["FLORENCE.GET", "j", "RESULT", "y"], "ERR syntax error near 'y'"),
        (&["FLORENCE.JOBS", "z"], "ERR syntax error near 'z'"),
        (&["FLORENCE.JOBS", "STATE"], "ERR syntax error near 'STATE'"),
        (&["FLORENCE.JOBS", "COUNT"], "ERR syntax error near 'COUNT'"),
        (&["FLORENCE.JOBS", "COUNT", "x"], "ERR COUNT is not an integer from 1 to 100000"),
        (&["FLORENCE.WAIT", "j"], "ERR wrong number of arguments for 'florence.wait' command"),
        (&["FLORENCE.WAIT", "j", "1"], "NOJOB none of the keys is a job"),
        (&["FLORENCE.WAIT", "hash", "1"], "NOTAJOB the hash under this key is not a job"),
        (&["FLORENCE.WAIT", "j", "-1"], "ERR timeout is negative"),
        (&["FLORENCE.WAIT", "j", "nan"], "ERR timeout is not a float or out of range"),
        (&["FLORENCE.JOBS", "STATE", "odd"], "ERR unknown state 'odd'"),
        (&["FLORENCE.STATS", "x"], "ERR syntax error near 'x'"),
        (&["FLORENCE.STATS", "LATENCY", "x"], "ERR syntax error near 'x'"),
        (&["FLORENCE.HOSTS", "x"], "ERR wrong number of arguments for 'florence.hosts' command"),
    ] {
        let found = server.error(command);
        assert_eq!(found, expected, "{command:?}");
    }
    assert_eq!(server.call::<Option<String>>(&["FLORENCE.GET", "missing"]), None);
}

#[test]
fn wait_times_out_with_null_and_a_disconnect_leaves_nothing() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let url = pictures.url("held/back/shapes.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "slow", &url, "<OD>"]);
    let start = Instant::now();
    assert_eq!(server.call::<Option<Value>>(&["FLORENCE.WAIT", "slow", "0.2"]), None);
    assert!(start.elapsed().as_millis() >= 150);
    assert_eq!(server.stat("waiters"), 0);
    // A client that leaves while it waits.
    let mut leaving = server.connect();
    let wait = redis::cmd("FLORENCE.WAIT").arg("slow").arg(0).get_packed_command();
    leaving.send_packed_command(&wait).unwrap();
    eventually("the client waits", || (server.stat("waiters") == 1).then_some(()));
    drop(leaving);
    eventually("the waiter is forgotten", || (server.stat("waiters") == 0).then_some(()));
}

#[test]
fn wait_answers_for_the_first_of_several_jobs() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.call::<()>(&["FLORENCE.SUBMIT", "slow", &pictures.url("held/back/shapes.png"), "<OD>"]);
    server.call::<()>(&["FLORENCE.SUBMIT", "fast", &pictures.url("shapes.png"), "<OCR>"]);
    let first: HashMap<String, Option<String>> =
        server.call(&["FLORENCE.WAIT", "slow", "fast", "nosuchjob", "30"]);
    assert_eq!(first["id"].as_deref(), Some("fast"));
}

#[test]
fn a_key_that_went_and_came_back_is_still_waited_for() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("shapes.png");
    let delayed = |key: &str, ms: &str| {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OD>", "DELAY", ms]);
    };
    delayed("later", "100000");
    let rename = || {
        server.call::<()>(&["RENAME", "renamed", "away"]);
        server.call::<()>(&["RENAME", "away", "renamed"]);
    };
    let submit_again = || {
        server.call::<()>(&["DEL", "deleted"]);
        delayed("deleted", "1");
    };
    for (key, change) in [("renamed", &rename as &dyn Fn()), ("deleted", &submit_again)] {
        delayed(key, "1500");
        let mut connection = server.connect();
        let waiter = std::thread::spawn(move || {
            let wait = redis::cmd("FLORENCE.WAIT").arg(key).arg("later").arg(60).to_owned();
            wait.query::<Option<HashMap<String, Option<String>>>>(&mut connection).unwrap()
        });
        eventually("the client waits", || (server.stat("waiters") == 1).then_some(()));
        change();
        let job = waiter.join().unwrap().unwrap_or_else(|| panic!("{key} was not told"));
        assert_eq!(job["id"].as_deref(), Some(key));
    }
}

#[test]
fn cancel_delete_expire_and_flush_wake_the_waiters() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let url = pictures.url("held/back/shapes.png");
    for (key, ending) in [
        ("cancelled", &["FLORENCE.CANCEL", "cancelled"][..]),
        ("deleted", &["DEL", "deleted"]),
        ("expired", &["PEXPIRE", "expired", "1"]),
        ("flushed", &["FLUSHALL"]),
    ] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &url, "<OD>"]);
        let mut connection = server.connect();
        let waiter = std::thread::spawn(move || {
            let reply: Option<HashMap<String, Option<String>>> =
                redis::cmd("FLORENCE.WAIT").arg(key).arg(60).query(&mut connection).unwrap();
            reply.and_then(|job| job["state"].clone())
        });
        eventually("the client waits", || (server.stat("waiters") == 1).then_some(()));
        let start = Instant::now();
        server.call::<Value>(ending);
        let expected = (key == "cancelled").then(|| "cancelled".to_owned());
        assert_eq!(waiter.join().unwrap(), expected, "{key}");
        assert!(start.elapsed().as_secs() < 30, "{key} took {:?}", start.elapsed());
        eventually("no work is left", || (server.stat("jobs_active") == 0).then_some(()));
        eventually("nobody waits", || (server.stat("waiters") == 0).then_some(()));
    }
}

#[test]
fn inside_transactions_and_scripts_nothing_blocks() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let url = pictures.url("held/back/shapes.png");
    let mut connection = server.connect();
    let replies: (String, HashMap<String, Option<String>>, Option<Value>) = redis::pipe()
        .atomic()
        .cmd("FLORENCE.SUBMIT")
        .arg("a")
        .arg(&url)
        .arg("<OD>")
        .cmd("FLORENCE.GET")
        .arg("a")
        .cmd("FLORENCE.WAIT")
        .arg("a")
        .arg(0)
        .query(&mut connection)
        .unwrap();
    assert_eq!((replies.0.as_str(), replies.2), ("a", None));
    assert_eq!(replies.1["state"].as_deref(), Some("queued"));
    let script = "redis.call('FLORENCE.SUBMIT', KEYS[1], ARGV[1], '<OD>') \
                  return redis.call('FLORENCE.WAIT', KEYS[1], 0)";
    let reply: Option<Value> = server.call(&["EVAL", script, "1", "b", &url]);
    assert_eq!(reply, None);
    pictures.release("back");
    for key in ["a", "b"] {
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", key, "30"]);
        assert_eq!(job["state"].as_deref(), Some("done"));
    }
}

#[test]
fn higher_priorities_go_first() {
    let (server, pictures) = (
        Server::with(Settings::lines(&["florence.max-downloads 1", "florence.max-batch 1"])),
        Pictures::serve(),
    );
    // The first job keeps the only thread busy while the others queue up.
    server.call::<()>(&[
        "FLORENCE.SUBMIT",
        "first",
        &pictures.url("held/back/shapes.png"),
        "<OCR>",
    ]);
    eventually("it is fetched", || (server.state("first") == "fetching").then_some(()));
    // Slow enough for the starts to differ by a millisecond.
    let url = pictures.url("slow/50/sign.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "low", &url, "<OCR>"]);
    server.call::<()>(&["FLORENCE.SUBMIT", "high", &url, "<OCR>", "PRIORITY", "9"]);
    let waiting: Vec<HashMap<String, String>> = server.call(&["FLORENCE.JOBS", "STATE", "queued"]);
    let order: Vec<&str> = waiting.iter().map(|job| job["id"].as_str()).collect();
    assert_eq!(order, ["high", "low"]);
    pictures.release("back");
    for key in ["high", "low"] {
        server.call::<Value>(&["FLORENCE.WAIT", key, "30"]);
    }
    let started = |key| server.job(key)["started_at"].clone().unwrap().parse::<i64>().unwrap();
    assert!(started("high") < started("low"));
}

#[test]
fn resp3_clients_get_maps() {
    let server = with_samples();
    let mut connection = server.connect_resp3();
    let _: String = redis::cmd("FLORENCE.SUBMIT")
        .arg("j")
        .arg(shapes())
        .arg("<OCR>")
        .query(&mut connection)
        .unwrap();
    let job: Value = redis::cmd("FLORENCE.WAIT").arg("j").arg(30).query(&mut connection).unwrap();
    assert!(matches!(job, Value::Map(_)), "{job:?}");
}

#[test]
fn clients_and_servers_find_the_keys_of_commands() {
    let server = Server::start();
    let keys =
        |args: &[&str]| server.call::<Vec<String>>(&[&["COMMAND", "GETKEYS"], args].concat());
    assert_eq!(keys(&["FLORENCE.SUBMIT", "job", "http://a/b.png", "<OD>"]), ["job"]);
    assert_eq!(
        keys(&["FLORENCE.SUBMIT", "job", "key", "photo", "<OD>", "TTL", "9"]),
        ["job", "photo"]
    );
    assert_eq!(keys(&["FLORENCE.WAIT", "a", "b", "0"]), ["a", "b"]);
    assert_eq!(keys(&["FLORENCE.CANCEL", "a", "b"]), ["a", "b"]);
}
