//! Commands one by one, on a redis-server of its own: `cargo bench -p florence-load`.
//!
//! The engine costs nothing here: answers are cached, or jobs wait. `ping` is what a round trip takes
//! in itself.
#![expect(clippy::unwrap_used, reason = "a benchmark")]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use criterion::{Criterion, criterion_group, criterion_main};
use florence_tests::{Server, Settings, celery_message, picture};
use redis::{Cmd, Connection, cmd};

fn run(connection: &mut Connection, command: &Cmd) {
    command.exec(connection).unwrap();
}

fn asked(words: &[&str]) -> Cmd {
    let mut command = cmd(words[0]);
    command.arg(&words[1..]);
    command
}

fn submit(key: &str, bytes: &[u8], options: &[&str]) -> Cmd {
    let mut command = cmd("FLORENCE.SUBMIT");
    command.arg(key).arg("DATA").arg(bytes).arg("<CAPTION>").arg(options);
    command
}

/// A message of Celery about a picture that comes with it.
fn message(id: &str, bytes: &[u8]) -> String {
    let url = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes));
    celery_message(id, "tasks.inference_task", &[&url, "<CAPTION>"])
}

fn commands(criterion: &mut Criterion) {
    let queues = "florence.celery-queues celery:tasks.inference_task";
    let server = Server::with(Settings::lines(&[queues, "florence.max-queue 10000000"]));
    server.wait_for_model();
    let connection = &mut server.connect();
    let bytes = std::fs::read(picture("shapes.png")).unwrap();
    run(connection, &submit("done", &bytes, &[]));
    run(connection, cmd("FLORENCE.WAIT").arg("done").arg(30));
    run(connection, &submit("later", &bytes, &["DELAY", "86400000"]));

    let mut group = criterion.benchmark_group("commands");
    for (name, command) in [
        ("ping", asked(&["PING"])),
        ("get, a job that has ended", asked(&["FLORENCE.GET", "done"])),
        ("get, its answer only", asked(&["FLORENCE.GET", "done", "RESULT"])),
        ("get, a job that waits", asked(&["FLORENCE.GET", "later"])),
        ("wait, for a job that has ended", asked(&["FLORENCE.WAIT", "done", "30"])),
        ("submit, the same again", submit("later", &bytes, &["DELAY", "86400000"])),
    ] {
        group.bench_function(name, |bencher| bencher.iter(|| run(connection, &command)));
    }
    let mut keys = (0..).map(|i: u64| format!("new:{i}"));
    group.bench_function("submit, a job that waits", |bencher| {
        bencher.iter(|| {
            run(connection, &submit(&keys.next().unwrap(), &bytes, &["DELAY", "86400000"]));
        });
    });
    group.bench_function("submit and wait, cached", |bencher| {
        bencher.iter(|| {
            let key = keys.next().unwrap();
            run(connection, &submit(&key, &bytes, &[]));
            run(connection, cmd("FLORENCE.WAIT").arg(&key).arg(30));
        });
    });
    let mut listener = server.connect();
    let mut listener = listener.as_pubsub();
    listener.psubscribe("celery-task-meta-*").unwrap();
    group.bench_function("a task of Celery, cached", |bencher| {
        bencher.iter(|| {
            run(connection, cmd("LPUSH").arg("celery").arg(message(&keys.next().unwrap(), &bytes)));
            let told: String = listener.get_message().unwrap().get_payload().unwrap();
            assert!(told.contains("SUCCESS"), "{told}");
        });
    });
    group.finish();
    assert_eq!(server.stat("panics"), 0);
}

criterion_group!(benches, commands);
criterion_main!(benches);
