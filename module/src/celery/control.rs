//! Remote control: `celery inspect`, `revoke`, and what Flower asks a worker.
//!
//! Clients publish to a channel, which a module cannot subscribe to: the server is told to run
//! FLORENCE.CONTROL in the place of such a PUBLISH, with the rights of its client. Replies go to a
//! list that the client reads.

use std::{
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use redis_module::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Celery, FIELD, JOB_PREFIX, Task, celery, json,
    message::{envelope, text},
};
use crate::{
    job::{
        self, Job, JobKey, State,
        life::{self, Data, End},
    },
    queue::{queue, sync},
    server::{self, can_write, in_db},
    settings,
};

/// Lists in replies are no longer than that.
const MOST: usize = 1000;

/// The channel of remote control.
pub(super) fn channel(celery: &Celery) -> Vec<u8> {
    format!("{}/{}.celery.pidbox", celery.prefix, celery.db).into_bytes()
}

#[derive(Deserialize)]
struct Request {
    method: String,
    #[serde(default)]
    arguments: Value,
    destination: Option<Vec<String>>,
    pattern: Option<String>,
    ticket: Option<String>,
    reply_to: Option<ReplyTo>,
}

#[derive(Deserialize)]
struct ReplyTo {
    exchange: String,
    routing_key: String,
}

/// Acts on a published message, if it is one of remote control and is meant for this worker.
pub(crate) fn control(ctx: &Context, to: &[u8], bytes: &[u8]) {
    let (Some(celery), true) = (celery(), can_write(ctx)) else { return };
    if to != channel(celery) {
        return;
    }
    let Some(request) = request(bytes) else { return };
    let is_meant = match &request.destination {
        Some(names) if !names.is_empty() => names.contains(&celery.name),
        // Patterns of names are not supported.
        _ => request.pattern.is_none(),
    };
    if !is_meant {
        return;
    }
    in_db(ctx, celery.broker_db(), || {
        let answer = celery.answer(ctx, &request.method, &request.arguments);
        if let (Some(reply_to), Some(answer)) = (&request.reply_to, answer) {
            celery.reply(ctx, reply_to, request.ticket.as_deref(), answer);
        }
    });
}

fn request(bytes: &[u8]) -> Option<Request> {
    let read = |bytes| json::read(&String::from_utf8_lossy(bytes)).ok();
    let message: Value = read(bytes)?;
    let expires = message["headers"]["expires"].as_f64().unwrap_or_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    if expires > 0.0 && expires < now {
        return None;
    }
    let body = BASE64_STANDARD.decode(message["body"].as_str()?).ok()?;
    serde_json::from_value(read(&body)?).ok()
}

fn ok(text: impl Into<String>) -> Value {
    json!({ "ok": text.into() })
}

impl Celery {
    fn reply(&self, ctx: &Context, to: &ReplyTo, ticket: Option<&str>, answer: Value) {
        /// For clients that have gone.
        const SECONDS: &[u8] = b"60";
        let headers = json!({ "ticket": ticket, "clock": self.tick() });
        let mut body = json!({});
        body[&self.name] = answer;
        let message = json::write(&envelope(&headers, &to.exchange, &to.routing_key, &body));
        let list = format!("{}{}.{}", self.prefix, to.routing_key, to.exchange);
        let pushed = server::call(ctx, "LPUSH", &[list.as_bytes(), message.as_bytes()]);
        if pushed.is_ok() {
            let _ = server::call(ctx, "EXPIRE", &[list.as_bytes(), SECONDS]);
        }
    }

    /// What a worker says to a method; nothing to those without an answer.
    fn answer(&self, ctx: &Context, method: &str, arguments: &Value) -> Option<Value> {
        Some(match method {
            "ping" => ok("pong"),
            "active" | "dump_active" => {
                self.tasks(ctx, |state| matches!(state, State::Fetching | State::Running))
            }
            "reserved" | "dump_reserved" => self.tasks(ctx, |state| state == State::Queued),
            "scheduled" | "dump_schedule" => self.scheduled(ctx),
            "revoked" | "dump_revoked" => {
                json!(self.revoked.lock().order.iter().rev().take(MOST).collect::<Vec<_>>())
            }
            "registered" | "dump_tasks" => {
                let mut tasks: Vec<_> = self.queues.values().flatten().collect();
                tasks.sort();
                tasks.dedup();
                json!(tasks)
            }
            "active_queues" => self.queues.keys().map(|name| describe(name)).collect(),
            "stats" => self.stats(),
            "conf" | "dump_conf" => json!({
                "result_expires": settings::CELERY_RESULT_EXPIRES.get(),
                "task_track_started": settings::CELERY_TRACK_STARTED.get(),
                "worker_send_task_events": settings::CELERY_EVENTS.get(),
                "accept_content": ["json"],
                "timezone": "UTC",
            }),
            "clock" => json!({ "clock": self.clock.load(Ordering::Relaxed) }),
            "query_task" => self.query(ctx, arguments),
            "report" => ok(format!("florence {}", env!("CARGO_PKG_VERSION"))),
            "revoke" => self.revoke(ctx, arguments, arguments["terminate"] == true),
            "terminate" => self.revoke(ctx, arguments, true),
            "enable_events" => {
                let is_on = settings::CELERY_EVENTS.swap(true);
                ok(if is_on { "task events already enabled" } else { "task events enabled" })
            }
            "disable_events" => {
                let was_on = settings::CELERY_EVENTS.swap(false);
                ok(if was_on { "task events disabled" } else { "task events already disabled" })
            }
            // Between workers only.
            "hello" | "election" | "heartbeat" => return None,
            _ => json!({ "error": format!("florence does not know {method}") }),
        })
    }

    /// Tasks with their jobs and where these stand, the next first.
    fn each(&self, ctx: &Context) -> impl Iterator<Item = (Job, State, Task)> {
        let is_ours = |key: &JobKey| key.name.starts_with(JOB_PREFIX.as_bytes());
        let keys = queue().keys(self.broker_db(), None, MOST, is_ours);
        keys.into_iter().filter_map(move |key| {
            let job = job::open(ctx, &key).ok()?;
            let task = serde_json::from_str(&job.text(FIELD)?).ok()?;
            let state = queue().state(key.as_ref(), &job);
            Some((job, state, task))
        })
    }

    fn tasks(&self, ctx: &Context, is_wanted: impl Fn(State) -> bool) -> Value {
        self.each(ctx)
            .filter(|(job, state, _)| is_wanted(*state) && job.starts_in() == 0)
            .map(|(job, _, task)| self.info(&job, &task))
            .collect()
    }

    fn scheduled(&self, ctx: &Context) -> Value {
        self.each(ctx)
            .filter(|(job, state, _)| *state == State::Queued && job.starts_in() > 0)
            .map(|(job, _, task)| {
                json!({
                    "eta": task.headers.eta,
                    "priority": task.priority,
                    "request": self.info(&job, &task),
                })
            })
            .collect()
    }

    /// A task as `celery inspect` shows it.
    fn info(&self, job: &Job, task: &Task) -> Value {
        let started = job.number("started_at").map(|at| at as f64 / 1000.0);
        json!({
            "id": task.id(),
            "name": task.headers.task,
            "args": [job.shown_image(), job.text("prompt")],
            "kwargs": {},
            "type": task.headers.task,
            "hostname": self.name,
            "time_start": started,
            "acknowledged": true,
            "delivery_info": {
                "exchange": "",
                "routing_key": task.queue,
                "priority": task.priority,
                "redelivered": false,
            },
            "worker_pid": std::process::id(),
        })
    }

    fn query(&self, ctx: &Context, arguments: &Value) -> Value {
        let wanted = ids(&arguments["ids"]);
        let found = self.each(ctx).filter(|(_, _, task)| wanted.iter().any(|id| id == task.id()));
        let described = found.map(|(job, state, task)| {
            let state = match state {
                State::Fetching | State::Running => "active",
                _ if job.starts_in() > 0 => "scheduled",
                _ => "reserved",
            };
            (task.id().to_owned(), json!([state, self.info(&job, &task)]))
        });
        Value::Object(described.collect())
    }

    /// Ends tasks that wait; those at work too if they are to be terminated. Tasks that have not
    /// been taken yet end when they are.
    fn revoke(&self, ctx: &Context, arguments: &Value, terminates: bool) -> Value {
        let ids = ids(&arguments["task_id"]);
        for id in &ids {
            self.revoked.lock().insert(id);
            let key = format!("{JOB_PREFIX}{id}");
            let key = JobKey { db: self.broker_db(), name: key.as_bytes().into() };
            let is_to_end =
                job::open(ctx, &key).is_ok_and(|job| match queue().state(key.as_ref(), &job) {
                    State::Queued | State::Retrying => true,
                    State::Fetching | State::Running => terminates,
                    _ => false,
                });
            if is_to_end {
                let _ = life::finish(ctx, &key.name, End::cancelled(Data::Drop));
                sync::settled(ctx, &key);
            }
        }
        let ids = ids.join(", ");
        ok(if terminates {
            format!("terminate: {ids}")
        } else {
            format!("tasks {ids} flagged as revoked")
        })
    }

    fn stats(&self) -> Value {
        json!({
            "total": *self.taken.lock(),
            "pid": std::process::id(),
            "clock": self.clock.load(Ordering::Relaxed).to_string(),
            "uptime": self.since.elapsed().as_secs(),
            "prefetch_count": settings::MAX_QUEUE.get(),
            "pool": {
                "implementation": "florence",
                "max-concurrency": settings::MAX_BATCH.get(),
                "processes": [std::process::id()],
            },
            "broker": {
                "transport": "redis",
                "virtual_host": self.db.to_string(),
                "hostname": "in this process",
            },
            "rusage": {},
        })
    }
}

/// One id, or a list of them.
fn ids(value: &Value) -> Vec<String> {
    match value {
        Value::Array(ids) => ids.iter().filter_map(text).collect(),
        id => text(id).into_iter().collect(),
    }
}

/// A queue as kombu describes it.
fn describe(name: &str) -> Value {
    json!({
        "name": name,
        "exchange": {
            "name": name, "type": "direct", "arguments": null, "durable": true, "passive": false,
            "auto_delete": false, "delivery_mode": null, "no_declare": false,
        },
        "routing_key": name,
        "queue_arguments": null,
        "binding_arguments": null,
        "consumer_arguments": null,
        "durable": true,
        "exclusive": false,
        "auto_delete": false,
        "no_ack": false,
        "alias": null,
        "bindings": [],
        "no_declare": null,
        "expires": null,
        "message_ttl": null,
        "max_length": null,
        "max_length_bytes": null,
        "max_priority": null,
    })
}
