//! Keys that change while they are worked on: what is answered is what the key holds.

mod interruptions;

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Server, call, eventually, picture};
use redis::Connection;

type Job = HashMap<String, Option<String>>;

/// How a test sends the same commands.
#[derive(Debug, Clone, Copy)]
enum Way {
    Alone,
    Transaction,
    Script,
}

const WAYS: [Way; 3] = [Way::Alone, Way::Transaction, Way::Script];

/// Sends commands one by one, as a transaction, or from a script; all must succeed.
fn send(connection: &mut Connection, way: Way, commands: &[Vec<Vec<u8>>]) {
    let mut pipe = redis::pipe();
    match way {
        Way::Alone | Way::Transaction => {
            for command in commands {
                let queued = pipe.cmd(std::str::from_utf8(&command[0]).unwrap());
                queued.arg(&command[1..]).ignore();
            }
            if matches!(way, Way::Transaction) {
                pipe.atomic();
            }
        }
        Way::Script => {
            // Each command is preceded by the number of its words.
            let script = "local i = 1 while i <= #ARGV do \
                local n = tonumber(ARGV[i]) redis.call(unpack(ARGV, i + 1, i + n)) i = i + n + 1 end";
            let eval = pipe.cmd("EVAL").arg(script).arg(0);
            for command in commands {
                eval.arg(command.len()).arg(command);
            }
            eval.ignore();
        }
    }
    pipe.exec(connection).unwrap();
}

/// A command of words without spaces.
fn words(command: &str) -> Vec<Vec<u8>> {
    command.split(' ').map(|word| word.as_bytes().to_vec()).collect()
}

fn dump(connection: &mut Connection, key: &str) -> Vec<u8> {
    redis::cmd("DUMP").arg(key).query(connection).unwrap()
}

fn submit(server: &Server, key: &str, url: &str, prompt: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url, prompt], rest].concat());
}

/// Waits until a job's picture is downloaded by this process.
fn fetching(server: &Server, key: &str) {
    eventually(&format!("{key} is worked on"), || {
        let job = server.job(key);
        assert_ne!(job["state"].as_deref(), Some("failed"), "{key}: {job:?}");
        (job["state"].as_deref() == Some("fetching")).then_some(())
    });
}

fn finished_in(connection: &mut Connection, key: &str) -> Job {
    let job: Option<Job> = call(connection, &["FLORENCE.WAIT", key, "25"]).unwrap();
    let job = job.unwrap_or_else(|| panic!("{key} does not end"));
    assert_eq!(job["state"].as_deref(), Some("done"), "{key}: {job:?}");
    job
}

fn finished(server: &Server, key: &str) -> Job {
    finished_in(&mut server.connect(), key)
}

/// What a job is answered that nothing happens to.
fn plain(server: &Server, name: &str, prompt: &str) -> Option<String> {
    let bytes = std::fs::read(picture(name)).unwrap();
    let key = format!("plain:{name}:{prompt}");
    let mut connection = server.connect_to(15);
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(&key).arg("DATA").arg(bytes).arg(prompt).arg("NOCACHE");
    submit.exec(&mut connection).unwrap();
    finished_in(&mut connection, &key)["result"].clone()
}

/// Waits for jobs, and compares each with the picture and the prompt that its key shows now.
fn assert_answered_as_shown(server: &Server, jobs: &[(usize, String)]) {
    let ended: Vec<Job> =
        jobs.iter().map(|(db, key)| finished_in(&mut server.connect_to(*db), key)).collect();
    let mut wrong = Vec::new();
    for ((db, key), job) in jobs.iter().zip(ended) {
        let (image, prompt) = (job["image"].clone().unwrap(), job["prompt"].clone().unwrap());
        let expected = plain(server, image.rsplit('/').next().unwrap(), &prompt);
        if job["result"] != expected {
            wrong.push(format!("{key} in {db} ({image} {prompt}): {:?}", job["result"]));
        }
    }
    assert!(wrong.is_empty(), "answers of something else:\n{}", wrong.join("\n"));
}

/// Nothing is left to do, and nothing had to be found again by a safety net.
fn assert_idle(server: &Server) {
    server.until_idle();
    assert_eq!(server.stat("panics"), 0);
    assert_eq!(server.stat("leases_recovered"), 0);
}

fn many_fetchers() -> Server {
    Server::ready(&["florence.prepare-threads 40", "florence.max-downloads-per-host 64"])
}

#[test]
fn a_job_that_replaces_a_running_one_is_answered_as_itself() {
    let (server, pictures) = (many_fetchers(), Pictures::serve());
    let mut connection = server.connect();
    let mut cases = Vec::new();
    for way in WAYS {
        for command in ["rename", "copy", "restore"] {
            let name = format!("{command}:{way:?}");
            let (from, to) = (format!("{name}:from"), format!("{name}:to"));
            submit(&server, &to, &pictures.url("held/go/sign.png"), "<OCR>", &[]);
            submit(&server, &from, &pictures.url("held/go/shapes.png"), "<OD>", &[]);
            cases.push((way, command, from, to));
        }
    }
    for (_, _, from, to) in &cases {
        fetching(&server, from);
        fetching(&server, to);
    }
    let mut jobs = Vec::new();
    for (way, command, from, to) in cases {
        let commands = match command {
            "rename" => vec![words(&format!("RENAME {from} {to}"))],
            "copy" => vec![words(&format!("COPY {from} {to} REPLACE"))],
            _ => {
                let mut restore = words(&format!("RESTORE {to} 0"));
                restore.extend([dump(&mut connection, &from), b"REPLACE".to_vec()]);
                vec![restore]
            }
        };
        send(&mut connection, way, &commands);
        jobs.push((0, to));
        if command != "rename" {
            jobs.push((0, from));
        }
    }
    pictures.release("go");
    for (_, key) in &jobs {
        let job = finished(&server, key);
        assert_eq!(job["prompt"].as_deref(), Some("<OD>"), "{key}");
    }
    assert_eq!(server.stat("jobs_done"), i64::try_from(jobs.len()).unwrap(), "once each");
    assert_answered_as_shown(&server, &jobs);
    assert_idle(&server);
}

#[test]
fn a_running_job_whose_fields_change_is_answered_as_they_say() {
    let (server, pictures) = (many_fetchers(), Pictures::serve());
    let mut connection = server.connect();
    let (url, other) = (pictures.url("held/go/sign.png"), pictures.url("shapes.png"));
    let mut cases = Vec::new();
    for way in WAYS {
        let key = |what: &str| format!("{what}:{way:?}");
        let (image, prompt, both, back) = (key("image"), key("prompt"), key("both"), key("back"));
        let changes = [
            (&image, vec![format!("HSET {image} image {other}")]),
            (&prompt, vec![format!("HSET {prompt} prompt <CAPTION>")]),
            (&both, vec![format!("HSET {both} image {other}"), format!("HSET {both} prompt <OD>")]),
            (
                &back,
                vec![
                    format!("COPY {back} {back}:copy"),
                    format!("HSET {back}:copy image {other}"),
                    format!("COPY {back}:copy {back} REPLACE"),
                ],
            ),
        ];
        for (key, commands) in changes {
            submit(&server, key, &url, "<OCR>", &[]);
            cases.push((way, key.clone(), commands));
        }
    }
    for (_, key, _) in &cases {
        fetching(&server, key);
    }
    let mut jobs = Vec::new();
    for (way, key, commands) in cases {
        let commands: Vec<_> = commands.iter().map(|command| words(command)).collect();
        send(&mut connection, way, &commands);
        if key.starts_with("back") {
            jobs.push((0, format!("{key}:copy")));
        }
        jobs.push((0, key));
    }
    pictures.release("go");
    assert_answered_as_shown(&server, &jobs);
    assert_idle(&server);
}

#[test]
fn a_running_job_that_gets_other_bytes_is_answered_for_these() {
    let (server, pictures) = (many_fetchers(), Pictures::serve());
    submit(&server, "j", &pictures.url("held/go/sign.png"), "<OD>", &[]);
    fetching(&server, "j");
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let mut set = redis::cmd("HSET");
    set.arg("j").arg("image").arg("DATA").arg("data").arg(bytes);
    set.exec(&mut server.connect()).unwrap();
    pictures.release("go");
    assert_eq!(finished(&server, "j")["result"], plain(&server, "shapes.png", "<OD>"));
    assert_idle(&server);
}

#[test]
fn a_prompt_that_changes_at_any_moment_of_a_run_is_the_one_that_is_answered() {
    let server = Server::start();
    server.wait_for_model();
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    let expected = plain(&server, "shapes.png", "<DETAILED_CAPTION>");
    assert_ne!(expected, plain(&server, "shapes.png", "<OD>"));
    let change = "if redis.call('HGET', KEYS[1], 'state') == 'done' then return 0 end \
        redis.call('HSET', KEYS[1], 'prompt', '<DETAILED_CAPTION>') return 1";
    let (mut connection, mut changed) = (server.connect(), 0);
    for round in 0..60_u64 {
        let key = format!("j{round}");
        let mut submit = redis::cmd("FLORENCE.SUBMIT");
        submit.arg(&key).arg("DATA").arg(&bytes).arg("<OD>").arg("NOCACHE");
        submit.exec(&mut connection).unwrap();
        // Not to wait for anything: so that the change meets every phase of a run.
        thread::sleep(Duration::from_millis(round % 12 * 2));
        let is_changed: bool =
            redis::cmd("EVAL").arg(change).arg(1).arg(&key).query(&mut connection).unwrap();
        let job = finished_in(&mut connection, &key);
        if is_changed {
            assert_eq!(job["result"], expected, "round {round}: {job:?}");
            changed += 1;
        }
    }
    assert!(changed > 0, "no run was met");
    assert_idle(&server);
}

#[test]
fn running_jobs_that_are_moved_away_and_back_or_swapped_are_answered_once() {
    let (server, pictures) = (many_fetchers(), Pictures::serve());
    let (sign, shapes) = (pictures.url("held/go/sign.png"), pictures.url("held/go/shapes.png"));
    let (mut here, mut there) = (server.connect(), server.connect_to(1));
    let start = |db: usize, key: &str, url: &str, prompt: &str| {
        let mut connection = server.connect_to(db);
        call::<()>(&mut connection, &["FLORENCE.SUBMIT", key, url, prompt]).unwrap();
        eventually("it is worked on", || {
            let job: Job = call(&mut connection, &["FLORENCE.GET", key]).unwrap();
            (job["state"].as_deref() == Some("fetching")).then_some(())
        });
    };
    for key in ["moved", "replaced", "renamed"] {
        start(0, key, &sign, "<OCR>");
    }
    // In two databases each, different jobs of the same name.
    for (first, second) in [(2, 3), (4, 5)] {
        start(first, "swapped", &sign, "<OCR>");
        start(second, "swapped", &shapes, "<OD>");
    }
    send(&mut here, Way::Alone, &[words("MOVE moved 1"), words("MOVE replaced 1")]);
    send(&mut there, Way::Alone, &[words("MOVE moved 0")]);
    submit(&server, "replaced", &shapes, "<OD>", &[]);
    send(&mut here, Way::Transaction, &[words("RENAME renamed x"), words("RENAME x renamed")]);
    send(&mut here, Way::Alone, &[words("SWAPDB 2 3")]);
    send(&mut here, Way::Transaction, &[words("SWAPDB 4 5"), words("SWAPDB 5 4")]);
    pictures.release("go");
    let jobs = [(0, "moved"), (0, "replaced"), (1, "replaced"), (0, "renamed")];
    let swapped = (2..=5).map(|db| (db, "swapped"));
    let jobs: Vec<_> =
        jobs.into_iter().chain(swapped).map(|(db, key)| (db, key.to_owned())).collect();
    for (db, key) in &jobs {
        finished_in(&mut server.connect_to(*db), key);
    }
    assert_eq!(server.stat("jobs_done"), 8, "once each");
    for (db, prompt) in [(2, "<OD>"), (3, "<OCR>"), (4, "<OCR>"), (5, "<OD>")] {
        let job = finished_in(&mut server.connect_to(db), "swapped");
        assert_eq!(job["prompt"].as_deref(), Some(prompt), "database {db}");
    }
    assert_answered_as_shown(&server, &jobs);
    assert_idle(&server);
}

/// What makes a key something other than a job, with the type that it has then.
const OVERWRITES: [(&[&str], &str); 9] = [
    (&["SUNIONSTORE KEY a-set"], "set"),
    (&["SDIFFSTORE KEY a-set no-set"], "set"),
    (&["ZUNIONSTORE KEY 1 a-zset"], "zset"),
    (&["GEOSEARCHSTORE KEY places FROMLONLAT 1 1 BYRADIUS 9 km"], "zset"),
    (&["SORT a-list ALPHA STORE KEY"], "list"),
    (&["SET KEY x"], "string"),
    (&["DEL KEY", "LPUSH KEY x"], "list"),
    (&["DEL KEY", "XADD KEY * a b"], "stream"),
    (&["RENAME spare-KEY KEY"], "string"),
];

#[test]
fn waiters_on_a_key_that_is_no_longer_a_job_are_answered_null() {
    let (server, pictures) = (many_fetchers(), Pictures::serve());
    let mut connection = server.connect();
    for command in ["SADD a-set x", "ZADD a-zset 1 x", "LPUSH a-list x", "GEOADD places 1 1 x"] {
        send(&mut connection, Way::Alone, &[words(command)]);
    }
    let mut cases = Vec::new();
    for (i, (commands, kind)) in OVERWRITES.into_iter().enumerate() {
        for (way, running) in [
            (Way::Alone, true),
            (Way::Alone, false),
            (Way::Transaction, true),
            (Way::Transaction, false),
        ] {
            let key = format!("{i}:{way:?}:{running}");
            send(&mut connection, Way::Alone, &[words(&format!("SET spare-{key} x"))]);
            let delay: &[&str] = if running { &[] } else { &["DELAY", "600000"] };
            submit(&server, &key, &pictures.url("held/never/sign.png"), "<OCR>", delay);
            cases.push((key, way, running, commands, kind));
        }
    }
    for (key, _, running, _, _) in &cases {
        if *running {
            fetching(&server, key);
        }
    }
    let waiters: Vec<_> = cases
        .iter()
        .map(|(key, ..)| {
            let (key, mut connection) = (key.clone(), server.connect());
            thread::spawn(move || -> (Option<Job>, Instant) {
                let reply = call(&mut connection, &["FLORENCE.WAIT", &key, "20"]).unwrap();
                (reply, Instant::now())
            })
        })
        .collect();
    let all = i64::try_from(cases.len()).unwrap();
    eventually("all wait", || (server.stat("waiters") == all).then_some(()));
    let start = Instant::now();
    for (key, way, _, commands, kind) in &cases {
        let commands: Vec<_> =
            commands.iter().map(|command| words(&command.replace("KEY", key))).collect();
        send(&mut connection, *way, &commands);
        assert_eq!(server.call::<String>(&["TYPE", key]), *kind, "{commands:?}");
    }
    let mut late = Vec::new();
    for ((key, way, _, commands, _), waiter) in cases.iter().zip(waiters) {
        let (reply, at) = waiter.join().unwrap();
        if reply.is_some() || at.duration_since(start) > Duration::from_secs(8) {
            late.push(format!("{key} {way:?} {commands:?}: {:?}", at.duration_since(start)));
        }
    }
    assert!(late.is_empty(), "not answered null at once:\n{}", late.join("\n"));
    assert_eq!(server.stat("waiters"), 0);
    assert_idle(&server);
}
