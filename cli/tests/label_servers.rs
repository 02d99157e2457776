//! `florence label` with pictures in buckets, and with a server that answers instead of the engine.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod labels;

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use florence_tests::{Pictures, Server, eventually, picture, python};
use labels::{answered, draw_pictures, florence, label, lines, succeeds, text};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

fn url(server: &Server) -> String {
    format!("redis://127.0.0.1:{}", server.port)
}

/// Files in the folder of pictures, made by their numbers.
fn write_pictures(directory: &TempDir, count: usize, bytes: impl Fn(usize) -> Vec<u8>) {
    let folder = directory.path().join("pics");
    std::fs::create_dir(&folder).unwrap();
    for i in 0..count {
        std::fs::write(folder.join(format!("{i}.png")), bytes(i)).unwrap();
    }
}

/// Lines in an order, with scores as the model has them.
fn answers(out: &std::path::Path) -> Vec<Value> {
    let mut lines = lines(out);
    for score in lines.iter_mut().flat_map(|line| line["scores"].as_array_mut().unwrap()) {
        #[expect(clippy::cast_possible_truncation, reason = "they are float32")]
        let float = score.as_f64().unwrap() as f32;
        *score = Value::from(float.to_string());
    }
    lines.sort_by_key(|line| format!("{}{}", line["file"], line["prompt"]));
    lines
}

#[test]
fn a_server_gives_the_answers_of_the_engine_and_keeps_nothing() {
    let server = Server::ready(&[]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 5);
    let folder = directory.path().join("pics");
    std::fs::copy(picture("shapes.png"), folder.join("shapes.png")).unwrap();
    std::fs::copy(picture("shapes.png"), folder.join("again.png")).unwrap();
    std::fs::write(folder.join("broken.png"), "hello").unwrap();
    let (here, there) = (directory.path().join("here.jsonl"), directory.path().join("there.jsonl"));
    for tasks in [&["--task", "<OD>"][..], &["--task", "<OD>", "--task", "<CAPTION>"]] {
        let args = [&["pics", "--overwrite"], tasks].concat();
        let local = label(&directory, &args, &here);
        let remote = label(&directory, &[&args[..], &["--redis", &url(&server)]].concat(), &there);
        for output in [local, remote] {
            let err = text(&output.stderr);
            assert!(err.contains("1 of 8 pictures have no answer"), "{err}");
        }
        assert_eq!(answers(&here), answers(&there));
        let errors = lines(&directory.path().join("errors.jsonl"));
        let error = errors[0]["error"].as_str().unwrap();
        assert!(error.starts_with("not a picture in a known format"), "{error}");
        assert_eq!(server.call::<i64>(&["DBSIZE"]), 0);
    }
}

#[test]
fn a_server_that_is_full_is_given_no_more_than_it_takes() {
    let server = Server::ready(&["florence.max-queue 3", "florence.max-batch 1"]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 40);
    let out = directory.path().join("labels.jsonl");
    succeeds(&label(
        &directory,
        &["pics", "--task", "<CAPTION>", "--beams", "1", "--redis", &url(&server)],
        &out,
    ));
    assert_eq!(answered(&out).len(), 40);
    assert_eq!(server.stat("jobs_done"), 40);
}

#[test]
fn a_run_that_is_killed_and_repeated_lets_the_server_do_nothing_twice() {
    let server = Server::ready(&["florence.shared-cache yes"]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 300);
    let out = directory.path().join("labels.jsonl");
    let address = url(&server);
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--redis", &address, "--resume"];
    let mut child: Child =
        labels::command(&directory, &args, &out).stderr(Stdio::null()).spawn().unwrap();
    eventually("some are answered", || (server.stat("jobs_done") > 60).then_some(()));
    child.kill().unwrap();
    child.wait().unwrap();
    // Those that it was given are done, whoever waits for them.
    eventually("all are done", || {
        (server.stat("jobs_done") == server.stat("jobs_submitted")).then_some(())
    });
    let before = lines(&out).len();
    assert!(before < 300, "{before}");
    succeeds(&label(&directory, &args, &out));
    assert_eq!(answered(&out).len(), 300);
    let mut files = answered(&out);
    files.dedup();
    assert_eq!(files.len(), 300);
    assert_eq!((server.stat("jobs_done"), server.stat("jobs_submitted")), (300, 300));
}

#[test]
fn a_server_fetches_addresses_itself_and_a_lost_job_is_told_of() {
    let server = Server::ready(&[]);
    let (pictures, directory) = (Pictures::serve(), tempdir().unwrap());
    let out = directory.path().join("labels.jsonl");
    let (shapes, missing) = (pictures.url("shapes.png"), pictures.url("status/404"));
    let held = pictures.url("held/gate/sign.png");
    let address = url(&server);
    let args: [&str; 7] = [&shapes, &missing, &held, "--task", "<CAPTION>", "--redis", &address];
    let child = labels::command(&directory, &args, &out).stderr(Stdio::piped()).spawn().unwrap();
    let errors = directory.path().join("errors.jsonl");
    eventually("the others have come to their ends", || {
        let is_there =
            |path: &std::path::Path| std::fs::metadata(path).is_ok_and(|it| it.len() > 0);
        (is_there(&out) && is_there(&errors) && server.call::<i64>(&["DBSIZE"]) == 1).then_some(())
    });
    // It is submitted again, so many times.
    for _ in 0..4 {
        let key: Option<String> =
            eventually("it is there", || server.call::<Option<String>>(&["RANDOMKEY"]).map(Some));
        server.call::<()>(&["DEL", &key.unwrap()]);
    }
    pictures.release("gate");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(answered(&out), [shapes]);
    let mut errors: Vec<String> =
        lines(&errors).iter().map(|it| it["error"].as_str().unwrap().to_owned()).collect();
    errors.sort();
    assert_eq!(errors, ["the job was deleted on the server", "the server answered 404"]);
}

#[test]
fn what_a_server_cannot_be_told_is_refused_and_no_password_is_shown() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("labels.jsonl");
    let server = Server::ready(&[]);
    std::fs::write(directory.path().join("x.png"), "").unwrap();
    let texts: Vec<String> = (0..16).map(|i| format!("<OPEN_VOCABULARY_DETECTION> {i}")).collect();
    let many: Vec<&str> = texts.iter().flat_map(|text| ["--task", text]).collect();
    for (args, told) in [
        (["--redis", "redis://:secret@127.0.0.1:1"].to_vec(), "cannot connect to the server"),
        (["--redis", "secret"].to_vec(), "a --redis URL begins with redis://"),
        (["--redis", &url(&server), "--decimals", "1"].to_vec(), "are settings of the server"),
        ([&["--redis", &url(&server)][..], &many].concat(), "there are more than 16 tasks"),
    ] {
        let output = label(&directory, &[&["x.png", "--task", "<OD>"], &args[..]].concat(), &out);
        let err = text(&output.stderr);
        assert!(err.contains(told) && !err.contains("secret"), "{err}");
        assert!(!out.exists());
    }
}

/// Stand-ins for the clouds, and the environment that names them.
struct Clouds {
    child: Child,
    env: Vec<(&'static str, String)>,
}

impl Clouds {
    fn start(directory: &TempDir) -> Self {
        let mut child = Command::new(python())
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/clients/clouds.py"))
            .args([directory.path(), &picture("shapes.png")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (moto, google) = line.trim().split_once(' ').unwrap();
        let account = directory.path().join("account.json").display().to_string();
        let env = vec![
            ("AWS_ENDPOINT_URL_S3", format!("http://127.0.0.1:{moto}")),
            ("AWS_ACCESS_KEY_ID", "key".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
            ("STORAGE_EMULATOR_HOST", format!("127.0.0.1:{google}")),
            ("GOOGLE_APPLICATION_CREDENTIALS", account),
        ];
        Self { child, env }
    }
}

impl Drop for Clouds {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[test]
fn a_bucket_is_listed_page_by_page_below_a_prefix() {
    let directory = tempdir().unwrap();
    let clouds = Clouds::start(&directory);
    let labelled = |prefix: &str, name: &str| {
        let out = directory.path().join(name);
        let mut command = florence(&["label", prefix, "--task", "<CAPTION>", "--out"]);
        command.arg(&out).envs(clouds.env.clone()).current_dir(&directory);
        let output = command.output().unwrap();
        (answered(&out), text(&output.stderr))
    };
    let (found, err) = labelled("s3://private/folder/", "a.jsonl");
    assert_eq!(found, ["s3://private/folder/a picture.png"], "{err}");
    let (found, err) = labelled("s3://private/folder/a picture.png", "b.jsonl");
    assert_eq!(found, ["s3://private/folder/a picture.png"], "{err}");
    let (found, err) = labelled("s3://private/many/", "c.jsonl");
    assert!(found.is_empty() && err.contains("1001 of 1001 pictures have no answer"), "{err}");
    for bucket in ["private", "open"] {
        let (found, err) = labelled(&format!("gs://{bucket}"), &format!("{bucket}.jsonl"));
        assert_eq!(found, [format!("gs://{bucket}/folder/a picture.png")], "{err}");
        let errors = lines(&directory.path().join("errors.jsonl"));
        let failed: Vec<&str> = errors.iter().map(|it| it["file"].as_str().unwrap()).collect();
        assert!(failed.contains(&&*format!("gs://{bucket}/folder/lost.png")), "{failed:?}");
        assert!(failed.contains(&&*format!("gs://{bucket}/other.png")), "{failed:?}");
    }
    let (found, err) = labelled("s3://nowhere/", "d.jsonl");
    assert!(found.is_empty() && err.contains("1 of 1 pictures have no answer"), "{err}");
    let errors = lines(&directory.path().join("errors.jsonl"));
    assert_eq!(errors.last().unwrap()["error"], "cannot list it: the server answered 404");
}

#[test]
fn a_server_that_stays_away_ends_the_run_which_can_go_on() {
    let mut server = Server::ready(&["appendonly yes", "florence.max-batch 1"]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 300);
    let out = directory.path().join("labels.jsonl");
    let address = url(&server);
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--redis", &address, "--resume"];
    let child = labels::command(&directory, &args, &out)
        .args(["--patience", "2"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("some are answered", || (server.stat("jobs_done") > 20).then_some(()));
    server.kill();
    let output = child.wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("--resume goes on there") && err.contains("does not answer"), "{err}");
    assert!(!directory.path().join("errors.jsonl").exists());
    server.restart();
    succeeds(&label(&directory, &args, &out));
    assert_eq!(answered(&out).len(), 300);
}

#[test]
fn a_server_that_is_short_of_memory_is_waited_for() {
    const MORE: usize = 12 << 20;
    let server = Server::ready(&["florence.max-batch 1"]);
    let limit = usize::try_from(server.info("used_memory")).unwrap() + MORE;
    server.call::<()>(&["CONFIG", "SET", "maxmemory", &limit.to_string()]);
    let directory = tempdir().unwrap();
    let shapes = std::fs::read(picture("shapes.png")).unwrap();
    // What follows a picture's end belongs to its bytes.
    write_pictures(&directory, 60, |i| [&shapes[..], &i.to_le_bytes(), &vec![0; 1 << 20]].concat());
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--redis", &url(&server)];
    succeeds(&label(&directory, &args, &out));
    assert_eq!(answered(&out).len(), 60);
}

#[test]
fn copies_of_a_picture_that_fails_are_each_told_why() {
    const COPIES: usize = 3000;
    let server = Server::ready(&[]);
    let directory = tempdir().unwrap();
    write_pictures(&directory, COPIES, |_| b"hello".to_vec());
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--task", "<CAPTION>", "--redis", &url(&server)];
    assert!(!label(&directory, &args, &out).status.success());
    let errors = lines(&directory.path().join("errors.jsonl"));
    assert_eq!(errors.len(), COPIES);
    for error in errors {
        let told = error["error"].as_str().unwrap();
        assert!(told.starts_with("not a picture in a known format"), "{told}");
    }
    assert_eq!(server.call::<i64>(&["DBSIZE"]), 0);
}

#[test]
fn a_signal_ends_the_run_though_the_server_hangs() {
    let server = Server::ready(&["florence.max-batch 1"]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 200);
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--task", "<CAPTION>", "--redis", &url(&server)];
    let child = labels::command(&directory, &args, &out).stderr(Stdio::piped()).spawn().unwrap();
    eventually("some are answered", || (server.stat("jobs_done") > 20).then_some(()));
    server.signal("STOP");
    let start = std::time::Instant::now();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    server.signal("CONT");
    assert!(!output.status.success());
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn what_lies_where_a_job_should_fails_its_picture_alone() {
    let server = Server::ready(&["florence.paused yes"]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 3);
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--task", "<CAPTION>", "--redis", &url(&server)];
    let child = labels::command(&directory, &args, &out).stderr(Stdio::piped()).spawn().unwrap();
    eventually("they wait", || (server.call::<i64>(&["DBSIZE"]) == 3).then_some(()));
    let keys: Vec<String> = server.call(&["KEYS", "*"]);
    server.call::<()>(&["SET", &keys[0], "something else"]);
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    let output = child.wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert!(err.contains("1 of 3 pictures have no answer"), "{err}");
    assert_eq!(answered(&out).len(), 2);
    let errors = lines(&directory.path().join("errors.jsonl"));
    assert!(errors[0]["error"].as_str().unwrap().starts_with("WRONGTYPE"), "{errors:?}");
    assert_eq!(server.call::<String>(&["GET", &keys[0]]), "something else");
}

#[test]
fn a_server_that_has_just_started_is_waited_for() {
    // It loads a thousand keys, each in four milliseconds, and answers meanwhile.
    let slow = ["key-load-delay 4000", "loading-process-events-interval-bytes 1024"];
    let mut server = Server::ready(&[&slow[..], &["appendonly yes"]].concat());
    server.call::<()>(&["DEBUG", "POPULATE", "1000"]);
    server.call::<()>(&["BGREWRITEAOF"]);
    eventually("it is written", || (server.info("aof_rewrite_in_progress") == 0).then_some(()));
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 1);
    let out = directory.path().join("labels.jsonl");
    server.shut_down(&["NOSAVE"]);
    server.begin_to_restart();
    assert!(server.error(&["GET", "key:0"]).starts_with("LOADING"));
    succeeds(&label(&directory, &["pics", "--task", "<OCR>", "--redis", &url(&server)], &out));
    assert_eq!(answered(&out).len(), 1);
}

#[test]
fn a_server_is_asked_only_where_that_is_meant() {
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 1);
    let out = directory.path().join("labels.jsonl");
    let ask = |named: &str, more: &[&str]| {
        let args = [&["pics", "--task", "<CAPTION>", "--overwrite"], more].concat();
        labels::command(&directory, &args, &out).env("FLORENCE_REDIS", named).output().unwrap()
    };
    let nowhere = "redis://127.0.0.1:1";
    succeeds(&ask(nowhere, &["--precision", "auto"]));
    succeeds(&ask(nowhere, &["--threads", "1"]));
    succeeds(&ask(nowhere, &["--engines", "1"]));
    succeeds(&ask(nowhere, &["--batch", "2"]));
    succeeds(&ask("", &[]));
    for (output, told) in [
        (ask(nowhere, &[]), "the server of FLORENCE_REDIS answers"),
        (ask(&format!("{nowhere} {nowhere}"), &[]), "FLORENCE_REDIS names several servers"),
        (ask("", &["--redis", nowhere, "--model", "x"]), "cannot be used with"),
    ] {
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{err}");
    }
}

#[test]
fn a_prompt_that_the_server_does_not_take_ends_the_run() {
    let server = Server::ready(&[]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 20);
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--prompts", "any", "--task", "What is it?", "--redis", &url(&server)];
    let output = label(&directory, &args, &out);
    let err = text(&output.stderr);
    assert!(!output.status.success() && err.contains("the server refuses: BADPROMPT"), "{err}");
    assert!(!directory.path().join("errors.jsonl").exists());
}

#[test]
fn a_server_is_told_how_the_model_is_asked() {
    let server = Server::ready(&[]);
    let directory = tempdir().unwrap();
    std::fs::create_dir(directory.path().join("pics")).unwrap();
    std::fs::copy(picture("shapes.png"), directory.path().join("pics/a.png")).unwrap();
    let (here, there) = (directory.path().join("here.jsonl"), directory.path().join("there.jsonl"));
    let how = ["--no-repeat-ngram", "2", "--length-penalty", "2.5"];
    let args = [&["pics", "--task", "<DETAILED_CAPTION>"], &how[..]].concat();
    succeeds(&label(&directory, &args, &here));
    succeeds(&label(&directory, &[&args[..], &["--redis", &url(&server)]].concat(), &there));
    assert_eq!(answers(&here), answers(&there));
}

#[test]
fn all_answers_are_of_the_model_that_was_the_default_one_at_first() {
    let tiny = picture("shapes.png").ancestors().nth(2).unwrap().display().to_string();
    let models = format!("florence.models \"one={tiny} two={tiny}\"");
    let server = Server::ready(&["florence.max-batch 1", &models]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 200);
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--redis", &url(&server)];
    let child = labels::command(&directory, &args, &out).stderr(Stdio::piped()).spawn().unwrap();
    eventually("some are answered", || (server.stat("jobs_done") > 5).then_some(()));
    eventually("the other is the default one", || {
        server.try_call::<()>(&["FLORENCE.MODEL", "DEFAULT", "two"]).ok()
    });
    succeeds(&child.wait_with_output().unwrap());
    let lines = lines(&out);
    let is_first = |line: &&Value| line["model"] == "one";
    assert_eq!((lines.len(), lines.iter().filter(is_first).count()), (200, 200));
}

#[test]
fn jobs_that_are_gone_are_submitted_again() {
    let mut server = Server::ready(&["florence.max-batch 1", "save \"\""]);
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 200);
    let out = directory.path().join("labels.jsonl");
    let address = url(&server);
    let args = ["pics", "--task", "<CAPTION>", "--redis", &address];
    let child = labels::command(&directory, &args, &out).stderr(Stdio::piped()).spawn().unwrap();
    eventually("some are answered", || (server.stat("jobs_done") > 20).then_some(()));
    server.kill();
    server.restart();
    // Another run has the same keys, and deletes what has ended.
    let other = directory.path().join("other.jsonl");
    succeeds(&label(&directory, &[&args[..], &["--errors", "others"]].concat(), &other));
    succeeds(&child.wait_with_output().unwrap());
    assert_eq!((answered(&out).len(), answered(&other).len()), (200, 200));
    assert_eq!(server.call::<i64>(&["DBSIZE"]), 0);
}
