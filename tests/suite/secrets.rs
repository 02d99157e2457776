//! What nobody who watches may see: the bytes of pictures, and what opens them. And what everybody
//! sees of a new job all the same: events, replicas, files.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    thread::{self, JoinHandle},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_tests::{Pictures, Server, Settings, blank_png, call, eventually};
use redis::Value;

type Job = HashMap<String, Option<String>>;
type Hash = HashMap<Vec<u8>, Vec<u8>>;

/// A client that writes down what MONITOR tells.
struct Monitor {
    lines: JoinHandle<String>,
}

const LAST_WORD: &str = "the-last-that-is-written-down";

impl Monitor {
    fn of(server: &Server) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.write_all(b"MONITOR\r\n").unwrap();
        let mut lines = BufReader::new(stream);
        let mut seen = String::new();
        lines.read_line(&mut seen).unwrap();
        assert_eq!(seen, "+OK\r\n");
        let read_on = move || {
            while !seen.contains(LAST_WORD) {
                assert!(lines.read_line(&mut seen).unwrap() > 0, "the server is gone");
            }
            seen
        };
        Self { lines: thread::spawn(read_on) }
    }

    fn end(self, server: &Server) -> String {
        server.call::<()>(&["ECHO", LAST_WORD]);
        self.lines.join().unwrap()
    }
}

fn wait(server: &Server, key: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "30"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)))
}

/// A text that stands early in the picture's file: SLOWLOG shows the beginning of each argument.
const IN_PICTURE: &str = "text-of-the-picture";

/// The same bytes in each way that SUBMIT takes them, and a URL that opens by what it says.
struct Secrets {
    bytes: Vec<u8>,
    inline: String,
    url: String,
    words: Vec<String>,
}

impl Secrets {
    fn new(pictures: &Pictures) -> Self {
        let bytes = blank_png(64, IN_PICTURE);
        let base64 = BASE64_STANDARD.encode(&bytes);
        let url = pictures
            .url("sign.png?X-Amz-Signature=word-of-signature&token=word-of-token")
            .replace("http://", "http://name-of-user:word-of-pass@");
        let words = ["name-of-user", "word-of-pass", "word-of-signature", "word-of-token"];
        let mut words: Vec<String> = words.map(str::to_owned).into();
        words.extend([IN_PICTURE.to_owned(), base64[60..100].to_owned()]);
        Self { bytes, inline: format!("data:image/png;base64,{base64}"), url, words }
    }

    /// SUBMIT with each of them.
    fn submits(&self) -> [(&'static str, Vec<&[u8]>); 4] {
        [
            ("data", vec![b"DATA", &self.bytes]),
            ("inline", vec![self.inline.as_bytes()]),
            ("key", vec![b"KEY", b"page"]),
            ("url", vec![self.url.as_bytes()]),
        ]
    }

    fn assert_none_in(&self, what: &str, text: &str) {
        for word in &self.words {
            let line = text.lines().find(|line| line.contains(word));
            assert!(line.is_none(), "{what} shows {word}: {}", line.unwrap_or_default());
        }
    }
}

#[test]
fn nobody_who_watches_sees_pictures_or_what_opens_them() {
    let lines = [
        "slowlog-log-slower-than 0",
        "slowlog-max-len 100000",
        "loglevel debug",
        "florence.thumbnails 64",
    ];
    let (server, pictures) = (Server::with(Settings::lines(&lines)), Pictures::serve());
    server.wait_for_model();
    let secrets = Secrets::new(&pictures);
    let mut connection = server.connect();
    redis::cmd("SET").arg("page").arg(&secrets.bytes).exec(&mut connection).unwrap();
    server.call::<()>(&["SLOWLOG", "RESET"]);
    let monitor = Monitor::of(&server);
    for (key, image) in secrets.submits() {
        let submit = |key: &str| {
            let mut submit = redis::cmd("FLORENCE.SUBMIT");
            submit.arg(key).arg(&image).arg("<OCR>");
            submit
        };
        submit(key).exec(&mut connection).unwrap();
        assert_eq!(wait(&server, key)["state"].as_deref(), Some("done"), "{key}");
        // Refused: by an option, and by the job that is there.
        for option in ["NONSENSE", "NOCACHE"] {
            submit(key).arg(option).exec(&mut connection).unwrap_err();
        }
        // In a transaction; ended, and queued again.
        let later = format!("later:{key}");
        let mut transaction = redis::pipe();
        transaction.atomic().add_command(submit(&later).arg("DELAY").arg(600_000).to_owned());
        transaction.exec(&mut connection).unwrap();
        call::<i64>(&mut connection, &["FLORENCE.CANCEL", &later]).unwrap();
        call::<i64>(&mut connection, &["FLORENCE.RETRY", &later]).unwrap();
        assert_eq!(wait(&server, &later)["state"].as_deref(), Some("done"), "{later}");
    }
    let seen = monitor.end(&server);
    assert!(seen.contains("\"FLORENCE.RETRY\" \"later:url\""), "{seen}");
    secrets.assert_none_in("MONITOR", &seen);
    // The small copies of the pictures are JPEG files, and begin with that word.
    let copy: Vec<u8> = server.call(&["HGET", "data", "thumbnail"]);
    assert!(String::from_utf8_lossy(&copy).contains("JFIF") && !seen.contains("JFIF"), "{seen}");
    let slow: Value = server.call(&["SLOWLOG", "GET", "-1"]);
    let slow = format!("{slow:#?}");
    assert!(slow.contains("later:url"), "{slow}");
    secrets.assert_none_in("SLOWLOG", &slow);
    secrets.assert_none_in("the log", &server.log());
}

/// Parameters that open what they are sent to, as they may be spelt.
const OPENING: [&str; 20] = [
    "X-Amz-Signature",
    "x-amz-signature",
    "X-Amz-Credential",
    "X-Amz-Security-Token",
    "X-AMZ-SECURITY-TOKEN",
    "X-Goog-Signature",
    "X-Goog-Credential",
    "x-goog-credential",
    "Signature",
    "signature",
    "sig",
    "Sig",
    "token",
    "TOKEN",
    "access_token",
    "api_key",
    "key",
    "password",
    "Secret",
    "secret",
];

/// Parameters that look like them, and others.
const HARMLESS: [&str; 9] = [
    "width",
    "X-Amz-Date",
    "X-Amz-Expires",
    "X-Goog-Algorithm",
    "keys",
    "monkey",
    "tokens",
    "signed",
    "design",
];

#[test]
fn urls_are_shown_without_what_opens_them() {
    let server = Server::with(Settings::lines(&["florence.stream ended"]));
    let pictures = Pictures::serve();
    let mut connection = server.connect();
    let mut subscriber = connection.as_pubsub();
    subscriber.psubscribe("florence:*").unwrap();
    subscriber.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut query = Vec::new();
    let mut shown = Vec::new();
    for (i, name) in OPENING.iter().enumerate() {
        query.push(format!("{name}=word-{i}"));
        shown.push(format!("{name}=REDACTED"));
        let harmless = HARMLESS[i % HARMLESS.len()];
        query.push(format!("{harmless}=plain%20{i}"));
        shown.push(format!("{harmless}=plain%20{i}"));
    }
    let (query, shown) = (query.join("&"), shown.join("&"));
    let url = pictures.url(&format!("sign.png?{query}")).replace("://", "://user:pass-word@");
    let expected = pictures.url(&format!("sign.png?{shown}"));
    server.call::<()>(&["FLORENCE.SUBMIT", "j", &url, "<OCR>"]);
    assert_eq!(server.job("j")["image"].as_ref(), Some(&expected));
    let job = wait(&server, "j");
    assert_eq!((job["state"].as_deref(), job["image"].as_ref()), (Some("done"), Some(&expected)));
    let message: String = subscriber.get_message().unwrap().get_payload().unwrap();
    let entries: Vec<(String, HashMap<String, String>)> =
        server.call(&["XRANGE", "ended", "-", "+"]);
    for text in [&message, &entries[0].1["job"]] {
        let map: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(map["image"], expected);
        assert!(!text.contains("word-") && !text.contains("pass-word"), "{text}");
    }
    // The job itself keeps what it needs, and uses it.
    assert_eq!(server.call::<String>(&["HGET", "j", "image"]), url);
    let asked = &pictures.asked()[0];
    assert_eq!(asked.url, format!("/sign.png?{query}"));
    let basic = format!("Basic {}", BASE64_STANDARD.encode("user:pass-word"));
    assert_eq!(asked.authorization.as_ref(), Some(&basic));
}

#[test]
fn images_without_secrets_are_shown_as_they_are() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    let urls = [
        pictures.url("sign.png"),
        pictures.url("sign.png?"),
        pictures.url("sign.png?a=1&b=%2F&&c&=d#fragment"),
        pictures.url("token=x/key=y?width=token"),
        "gs://bucket/token=x/key=y".to_owned(),
    ];
    for url in &urls {
        server.call::<()>(&["FLORENCE.SUBMIT", url, url, "<OCR>", "DELAY", "600000"]);
        assert_eq!(server.job(url)["image"].as_ref(), Some(url));
    }
    // A name alone is hidden too, and a parameter that is there twice.
    for (url, shown) in [
        ("http://name@127.0.0.1:1/x.png", "http://127.0.0.1:1/x.png"),
        ("https://:pass@127.0.0.1:1/x.png?a=1", "https://127.0.0.1:1/x.png?a=1"),
        (
            "http://127.0.0.1:1/x?token=a&b=c&token=d&sig=",
            "http://127.0.0.1:1/x?token=REDACTED&b=c&token=REDACTED&sig=REDACTED",
        ),
    ] {
        server.call::<()>(&["FLORENCE.SUBMIT", url, url, "<OCR>", "DELAY", "600000"]);
        assert_eq!(server.job(url)["image"].as_deref(), Some(shown));
    }
}

/// A job that nobody will touch.
fn submit_later(server: &Server, key: &str, bytes: &[u8]) {
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(key).arg("DATA").arg(bytes).arg("<OCR>").arg("DELAY").arg(600_000);
    submit.exec(&mut server.connect()).unwrap();
}

#[test]
fn a_new_job_is_one_event() {
    let server = Server::with(Settings::lines(&["notify-keyspace-events KEA"]));
    server.wait_for_model();
    let mut connection = server.connect();
    let mut subscriber = connection.as_pubsub();
    subscriber.psubscribe("__key*@0__:*").unwrap();
    subscriber.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    submit_later(&server, "j", b"bytes");
    let script =
        "return redis.call('FLORENCE.SUBMIT', KEYS[1], 'DATA', 'x', '<OCR>', 'DELAY', 600000)";
    server.call::<()>(&["EVAL", script, "1", "script"]);
    server.call::<()>(&["SET", "last", "x"]);
    let mut seen = Vec::new();
    while !seen.contains(&("__keyevent@0__:set".to_owned(), "last".to_owned())) {
        let message = subscriber.get_message().unwrap();
        seen.push((message.get_channel_name().to_owned(), message.get_payload().unwrap()));
    }
    for key in ["j", "script"] {
        let about = seen.iter().filter(|(channel, payload)| {
            payload == key || channel.strip_prefix("__keyspace@0__:") == Some(key)
        });
        let about: Vec<(&str, &str)> =
            about.map(|(channel, payload)| (channel.as_str(), payload.as_str())).collect();
        let of_key = format!("__keyspace@0__:{key}");
        let hset = [(of_key.as_str(), "hset"), ("__keyevent@0__:hset", key)];
        // That the key is new may be told too.
        let about: Vec<_> = about
            .into_iter()
            .filter(|(channel, text)| *text != "new" && !channel.ends_with(":new"))
            .collect();
        assert_eq!(about, hset);
    }
}

#[test]
fn replicas_and_files_get_new_jobs() {
    let mut server = Server::with(Settings::lines(&["appendonly yes", "appendfsync always"]));
    let replica = Server::start();
    server.wait_for_model();
    replica.follow(&server);
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let mut connection = server.connect();
    let submit = |key: &str| {
        let mut submit = redis::cmd("FLORENCE.SUBMIT");
        submit.arg(key).arg("DATA").arg(&bytes).arg("<OCR>").arg("DELAY").arg(600_000);
        submit
    };
    submit("alone").exec(&mut connection).unwrap();
    let mut transaction = redis::pipe();
    transaction.atomic().cmd("SET").arg("beside").arg("x").add_command(submit("transaction"));
    transaction.exec(&mut connection).unwrap();
    let script = "redis.call('SET', 'beside', 'y') \
                  return redis.call('FLORENCE.SUBMIT', KEYS[1], 'DATA', ARGV[1], '<OCR>', 'DELAY', '600000')";
    let mut eval = redis::cmd("EVAL");
    eval.arg(script).arg(1).arg("script").arg(&bytes).exec(&mut connection).unwrap();
    // On the connection that wrote it: WAIT counts who has that.
    assert_eq!(call::<i64>(&mut connection, &["WAIT", "1", "30000"]).unwrap(), 1);
    let hash = |server: &Server, key: &str| -> Hash { server.call(&["HGETALL", key]) };
    let keys = ["alone", "transaction", "script"];
    let written = keys.map(|key| hash(&server, key));
    for (key, here) in keys.iter().zip(&written) {
        assert_eq!(here[&b"data"[..]], bytes, "{key}");
        assert_eq!(&hash(&replica, key), here, "{key} on the replica");
    }
    server.kill();
    server.restart();
    for (key, here) in keys.iter().zip(&written) {
        assert_eq!(&hash(&server, key), here, "{key} from the file");
        assert_eq!(server.state(key), "queued");
    }
}

#[test]
fn a_new_job_is_a_change_that_is_saved() {
    let mut server = Server::with(Settings::lines(&["save 1 1"]));
    server.wait_for_model();
    let file = server.directory.path().join("dump.rdb");
    assert!(!file.exists());
    submit_later(&server, "j", b"bytes");
    eventually("a snapshot is taken", || file.exists().then_some(()));
    server.kill();
    server.restart();
    assert_eq!(server.state("j"), "queued");

    let server = Server::start();
    server.wait_for_model();
    let before = server.info("rdb_changes_since_last_save");
    for i in 0..5 {
        submit_later(&server, &format!("j{i}"), b"bytes");
    }
    let after = server.info("rdb_changes_since_last_save");
    assert!(after >= before + 5, "{before} changes, then {after}");
    // The same again changes nothing.
    submit_later(&server, "j0", b"bytes");
    assert_eq!(server.info("rdb_changes_since_last_save"), after);
}

#[test]
fn a_new_job_ends_the_transactions_of_those_who_watch_its_key() {
    let server = Server::start();
    let mut watching = server.connect();
    call::<()>(&mut watching, &["WATCH", "j"]).unwrap();
    submit_later(&server, "j", b"bytes");
    call::<()>(&mut watching, &["MULTI"]).unwrap();
    call::<()>(&mut watching, &["PING"]).unwrap();
    assert_eq!(call::<Value>(&mut watching, &["EXEC"]).unwrap(), Value::Nil);
}
