//! Events of the worker and its tasks, as Flower and `celery events` read them.

use std::{
    sync::atomic::Ordering,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use redis_module::Context;
use serde_json::{Value, json};

use super::{Celery, Task, json, outgoing::envelope};
use crate::{
    queue::queue,
    server::{self, can_write},
    settings, source,
};

pub(super) const HEARTBEAT: Duration = Duration::from_secs(2);

/// Tells that the worker is there.
pub(super) fn heartbeat(ctx: &Context, celery: &Celery) {
    if can_write(ctx) {
        let is_first = celery.clock.load(Ordering::Relaxed) == 1;
        let kind = if is_first { "worker-online" } else { "worker-heartbeat" };
        let fields = json!({
            "freq": HEARTBEAT.as_secs_f64(),
            "active": queue().counts().1,
            "processed": celery.ended.load(Ordering::Relaxed),
            "loadavg": load_average(),
            "sw_ident": "florence",
            "sw_ver": env!("CARGO_PKG_VERSION"),
            "sw_sys": "Linux",
        });
        send(ctx, celery, kind, fields);
    }
}

fn load_average() -> Vec<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).filter_map(|load| load.parse().ok()).collect()
}

/// A task was taken from its list.
pub(super) fn received(ctx: &Context, celery: &Celery, task: &Task) {
    let (headers, zero) = (&task.headers, json!(0));
    let fields = json!({
        "name": headers.task,
        "args": headers.argsrepr.as_deref().map(without_secrets),
        "kwargs": headers.kwargsrepr.as_deref().map(without_secrets),
        "root_id": headers.root_id,
        "parent_id": headers.parent_id,
        "retries": if headers.retries.is_null() { &zero } else { &headers.retries },
        "eta": headers.eta,
        "expires": headers.expires,
    });
    of_task(ctx, celery, "task-received", task, fields);
}

/// Arguments as Python writes them, without what is secret about the addresses in them.
fn without_secrets(repr: &str) -> String {
    const QUOTES: [char; 2] = ['\'', '"'];
    let part = |part: &str| {
        let text = part.trim_end_matches(QUOTES);
        source::without_secrets_within(text).into_owned() + &part[text.len()..]
    };
    repr.split_inclusive(QUOTES).map(part).collect()
}

/// A task has ended.
pub(super) fn ended(ctx: &Context, celery: &Celery, kind: &str, task: &Task, fields: Value) {
    celery.ended.fetch_add(1, Ordering::Relaxed);
    of_task(ctx, celery, kind, task, fields);
}

pub(super) fn of_task(ctx: &Context, celery: &Celery, kind: &str, task: &Task, mut fields: Value) {
    fields["uuid"] = task.id().into();
    send(ctx, celery, kind, fields);
}

/// Best effort, as Celery's own are.
fn send(ctx: &Context, celery: &Celery, kind: &str, mut fields: Value) {
    if !settings::CELERY_EVENTS.get() {
        return;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let routing_key = kind.replace('-', ".");
    fields["type"] = kind.into();
    fields["hostname"] = celery.name.as_str().into();
    fields["utcoffset"] = 0.into();
    fields["pid"] = std::process::id().into();
    fields["clock"] = celery.tick().into();
    fields["timestamp"] = since.as_secs_f64().into();
    let headers = json!({ "hostname": celery.name });
    let message = json::write(&envelope(&headers, "celeryev", &routing_key, &fields));
    let channel = format!("{}/{}.celeryev/{routing_key}", celery.prefix, celery.db);
    let _ = server::call(ctx, "PUBLISH", &[channel.as_bytes(), message.as_bytes()]);
}
