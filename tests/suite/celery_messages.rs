//! Celery's messages that are not as its clients write them, and those of others: each is run,
//! answered with an error, or stays where it is; and that is told and counted.

use florence_tests::{Pictures, Server, Settings, celery_message, eventually};
use serde_json::{Value, json};

const TASK: &str = "tasks.inference_task";

fn server(lines: &[&str]) -> Server {
    let queues = "florence.celery-queues celery:tasks.inference_task";
    Server::ready(&[&[queues], lines].concat())
}

fn push(server: &Server, message: &[u8]) {
    redis::cmd("LPUSH").arg("celery").arg(message).exec(&mut server.connect()).unwrap();
}

fn result(server: &Server, id: &str) -> Value {
    let key = format!("celery-task-meta-{id}");
    let meta: String = eventually(id, || server.call(&["GET", &key]));
    serde_json::from_str(&meta).unwrap()
}

/// A task's message with a header changed, as JSON text.
fn with_header(id: &str, args: &[&str], name: &str, value: &str) -> String {
    let mut message: Value = serde_json::from_str(&celery_message(id, TASK, args)).unwrap();
    message["headers"][name] = "HERE".into();
    message.to_string().replace("\"HERE\"", value)
}

fn lines_with(server: &Server, text: &str) -> usize {
    server.log().lines().filter(|line| line.contains(text)).count()
}

#[test]
fn times_without_a_zone_are_kept() {
    let (server, pictures) = (server(&[]), Pictures::serve());
    let url = pictures.url("sign.png");
    let args = [url.as_str(), "<OCR>"];
    for (id, name, time) in [
        ("late", "eta", "2100-01-01T00:00:00"),
        ("late-day", "eta", "2100-01-01"),
        ("gone", "expires", "2000-01-01T00:00:00.5"),
        ("gone-day", "expires", "2000-01-01 00:00"),
    ] {
        push(&server, with_header(id, &args, name, &json!(time).to_string()).as_bytes());
    }
    assert_eq!(result(&server, "gone")["status"], "REVOKED");
    assert_eq!(result(&server, "gone-day")["status"], "REVOKED");
    for id in ["late", "late-day"] {
        let key = format!("florence:celery:{id}");
        eventually("it is taken", || (server.call::<i64>(&["EXISTS", &key]) == 1).then_some(()));
        assert_eq!(server.state(&key), "queued");
        assert_eq!(server.call::<i64>(&["HEXISTS", &key, "delay"]), 1, "{id}");
    }
    eventually("what does not become a job is told", || {
        (lines_with(&server, "'gone' does not become a job: expired") == 1).then_some(())
    });
}

#[test]
fn what_a_worker_refuses_is_answered_told_and_counted() {
    let server = server(&["florence.celery-events no"]);
    let args = ["/etc/passwd", "<OCR>"];
    let refused = [
        ("a", "eta", "\"soon\"", "InvalidTaskError"),
        ("b", "eta", "5", "InvalidTaskError"),
        ("c", "expires", "\"\"", "InvalidTaskError"),
        ("d", "timelimit", "[1]", "InvalidTaskError"),
        ("e", "compression", "\"zlib\"", "ContentDisallowed"),
        ("f", "retries", "0.0", "PermissionError"),
    ];
    for (id, name, value, _) in refused {
        push(&server, with_header(id, &args, name, value).as_bytes());
    }
    for (id, _, _, kind) in refused {
        let meta = result(&server, id);
        assert_eq!(
            (&meta["status"], &meta["result"]["exc_type"]),
            (&json!("FAILURE"), &json!(kind))
        );
        assert_eq!(lines_with(&server, &format!("task '{id}' is refused: {kind}(")), 1);
    }
    // Nobody reads a result of this one; the log has it all the same.
    push(&server, with_header("silent", &args, "ignore_result", "true").as_bytes());
    eventually("it is told", || {
        (lines_with(&server, "task 'silent' is refused: PermissionError(") == 1).then_some(())
    });
    assert_eq!(server.stat("celery_refused"), 7);
    assert_eq!(server.call::<i64>(&["LLEN", "celery"]), 0);
    assert_eq!(server.call::<i64>(&["EXISTS", "celery-task-meta-silent"]), 0);
}

#[test]
fn what_stays_in_a_list_is_told_and_counted() {
    let (server, pictures) = (server(&[]), Pictures::serve());
    for i in 0..20 {
        for task in ["app.one", "app.two"] {
            push(&server, celery_message(&i.to_string(), task, &[]).as_bytes());
        }
    }
    let no_tasks: [(&[u8], &str); 4] = [
        (b"no message", "it is no JSON: "),
        (b"{\"headers\": {\"task\": \"tasks.inference_task\"}}", "no id"),
        (b"{\"body\": \"e30=\", \"properties\": {}}", "name no task"),
        (b"{\"headers\": {\"id\": \"\xff\"}}", "name no task"),
    ];
    for (message, _) in no_tasks {
        push(&server, message);
    }
    push(&server, celery_message("ours", TASK, &[&pictures.url("sign.png"), "<OCR>"]).as_bytes());
    assert_eq!(result(&server, "ours")["status"], "SUCCESS");

    assert_eq!(server.call::<i64>(&["LLEN", "celery"]), 44);
    assert_eq!(server.stat("celery_left"), 44);
    for task in ["app.one", "app.two"] {
        assert_eq!(lines_with(&server, &format!("'{task}'")), 1, "{}", server.log());
    }
    for (_, why) in no_tasks {
        let lines = server.log();
        let of_list = |line: &&str| line.contains("stays in list 'celery'");
        assert!(lines.lines().filter(of_list).any(|line| line.contains(why)), "{why}: {lines}");
    }
    assert_eq!(server.log().matches("stays in list").count(), no_tasks.len());
}

#[test]
fn endless_names_of_other_tasks_are_not_all_logged() {
    let server = server(&[]);
    let mut messages = redis::pipe();
    for i in 0..3000 {
        let message = celery_message("x", &format!("app.n{i}"), &[]);
        messages.cmd("LPUSH").arg("celery").arg(message).ignore();
    }
    messages.exec(&mut server.connect()).unwrap();
    eventually("all are looked at", || (server.stat("celery_left") == 3000).then_some(()));
    assert_eq!(lines_with(&server, "stay in list 'celery'"), 1000);
}

#[test]
fn what_is_set_aside_is_told_and_counted() {
    let server = server(&["florence.celery-reject-unknown yes"]);
    push(&server, b"no message");
    push(&server, celery_message("x", "app.other", &["\u{e9}"]).as_bytes());
    assert_eq!(result(&server, "x")["result"]["exc_type"], "NotRegistered");
    assert_eq!((server.stat("celery_rejected"), server.stat("celery_refused")), (1, 1));
    assert_eq!(lines_with(&server, "is in florence:celery-rejected: it is no JSON: "), 1);
    assert_eq!(server.stat("celery_left"), 0);
}

#[test]
fn arguments_have_the_names_of_the_setting() {
    let pictures = Pictures::serve();
    let server = server(&["florence.celery-arguments \"(image_url, prompt=<OCR>)\""]);
    push(&server, celery_message("one", TASK, &[&pictures.url("sign.png")]).as_bytes());
    assert_eq!(result(&server, "one")["status"], "SUCCESS");
    push(&server, celery_message("two", TASK, &[]).as_bytes());
    let text = "inference_task() missing 1 required positional argument: 'image_url'";
    assert_eq!(result(&server, "two")["result"]["exc_message"][0], text);
    let log = Server::refused(Settings::lines(&["florence.celery-arguments url"]));
    assert!(log.contains("florence.celery-arguments: 'url' is not signatures"), "{log}");
}
