//! Celery's messages while the server refuses to write: they stay where they are, the intake does
//! not spin, and they are answered once it may write again.

use florence_tests::{Pictures, Server, Settings, celery_message, eventually};

const MESSAGES: usize = 40;

/// A server whose writes are allowed, and one setting that forbids them.
struct Refusal {
    server: Server,
    forbid: [&'static str; 2],
    allow: &'static str,
}

fn server(lines: &[&str]) -> Server {
    let queues = "florence.celery-queues celery:tasks.inference_task";
    let server = Server::with(Settings::lines(&[&[queues], lines].concat()));
    server.wait_for_model();
    server
}

impl Refusal {
    /// Pushes messages at the very moment from which nothing may be written any more, and looks
    /// what becomes of them.
    fn run(&self) {
        let (server, pictures) = (&self.server, Pictures::serve());
        let url = pictures.url("sign.png");
        let id = |i: usize| format!("task-{i}");
        let [setting, forbidden] = self.forbid;
        let mut transaction = redis::pipe();
        transaction.atomic();
        for i in 0..MESSAGES {
            let message = celery_message(&id(i), "tasks.inference_task", &[&url, "<OCR>"]);
            transaction.cmd("LPUSH").arg("celery").arg(message).ignore();
        }
        transaction.cmd("CONFIG").arg("SET").arg(setting).arg(forbidden).ignore();
        transaction.exec(&mut server.connect()).unwrap();
        let refused = server.error(&["SET", "x", "y"]);
        assert!(refused.starts_with("NOREPLICAS") || refused.starts_with("MISCONF"), "{refused}");

        let share = server.cpu_share();
        assert_eq!(server.call::<usize>(&["LLEN", "celery"]), MESSAGES);
        assert!(share < 0.15, "{:.0} % of a core for nothing", share * 100.0);

        server.call::<()>(&["CONFIG", "SET", setting, self.allow]);
        for i in 0..MESSAGES {
            let key = format!("celery-task-meta-{}", id(i));
            eventually("it is answered", || {
                let meta: Option<String> = server.call(&["GET", &key]);
                let meta: serde_json::Value = serde_json::from_str(&meta?).unwrap();
                (meta["status"] == "SUCCESS").then_some(())
            });
        }
        assert_eq!(server.call::<usize>(&["LLEN", "celery"]), 0);
        assert_eq!(server.stat("jobs_done"), i64::try_from(MESSAGES).unwrap(), "once each");
        assert_eq!(server.stat("panics"), 0);
    }
}

#[test]
fn messages_wait_quietly_for_the_replicas_that_writes_need() {
    Refusal {
        server: server(&["min-replicas-max-lag 10"]),
        forbid: ["min-replicas-to-write", "1"],
        allow: "0",
    }
    .run();
}

#[test]
fn messages_wait_quietly_while_snapshots_fail() {
    let server = server(&["save 3600 1000000", "stop-writes-on-bgsave-error no"]);
    // A snapshot is renamed to this name when it is complete.
    std::fs::create_dir(server.directory.path().join("dump.rdb")).unwrap();
    server.call::<()>(&["BGSAVE"]);
    eventually("it fails", || {
        let info: String = server.call(&["INFO", "persistence"]);
        info.contains("rdb_last_bgsave_status:err").then_some(())
    });
    Refusal { server, forbid: ["stop-writes-on-bgsave-error", "yes"], allow: "no" }.run();
}
