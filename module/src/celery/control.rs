//! Remote control: `celery inspect`, `revoke`, and what Flower asks a worker.
//!
//! Clients publish to a channel, which a module cannot subscribe to: the server is told to run
//! FLORENCE.CONTROL in the place of such a PUBLISH, with the rights of its client. Replies go to a
//! list that the client reads, whose name the client gives: with the rights of the server, so only to
//! lists that are called after replies.
//!
//! A message may be long, and what it asks for too: a thread does that, and holds the server for a few
//! tasks at a time.

use std::{
    collections::HashSet,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use crossbeam_channel::{Receiver, Sender, unbounded};
use redis_module::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Celery, FIELD, JOB_PREFIX, Task, celery, intake, json, message::text, outgoing::envelope,
};
use crate::{
    job::{
        self, Job, JobKey, State,
        life::{self, Data, End},
    },
    news,
    queue::{queue, sync},
    server::{self, can_write, in_db, with_server},
    settings,
};

/// Lists in replies are no longer than that.
const MOST: usize = 1000;

/// Tasks that are looked at while the server is held.
const SLICE: usize = 32;

/// Bytes of a message, and of those that wait.
const MOST_BYTES: usize = 4 << 20;
const MOST_WAITING: usize = 32 << 20;

/// Where those who ask wait for replies.
const REPLIES: &str = "reply.celery.pidbox";

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

/// Messages that were published and not acted on yet.
static PUBLISHED: LazyLock<(Sender<Published>, Receiver<Published>)> = LazyLock::new(unbounded);

/// Bytes of these.
static BEHIND: AtomicUsize = AtomicUsize::new(0);

/// A message; once it is dropped it was acted on, or made us panic.
struct Published(Box<[u8]>);

impl Drop for Published {
    fn drop(&mut self) {
        BEHIND.fetch_sub(self.0.len(), Ordering::Relaxed);
        intake::wake();
    }
}

/// A message was published, by a client that may.
pub(crate) fn published(ctx: &Context, to: &[u8], bytes: &[u8]) {
    if celery().is_none_or(|celery| to != channel(celery)) || !can_write(ctx) {
        return;
    }
    let behind = BEHIND.load(Ordering::Relaxed);
    if bytes.len() > MOST_BYTES || behind + bytes.len() > MOST_WAITING {
        let text = "a message of remote control is passed over: it is too long, or too many wait";
        return news::warn(text);
    }
    BEHIND.fetch_add(bytes.len(), Ordering::Relaxed);
    // The receiver lives as long as the process.
    let _ = PUBLISHED.0.send(Published(bytes.into()));
}

/// Whether messages wait that were published before whatever the server is asked next.
pub(super) fn is_behind() -> bool {
    BEHIND.load(Ordering::Relaxed) > 0
}

/// The thread of remote control: acts on messages one after the other; returns at once if there is no
/// wire mode.
pub(crate) fn run() {
    let Some(celery) = celery() else { return };
    while let Ok(message) = PUBLISHED.1.recv() {
        celery.act(&message.0);
    }
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
    /// Acts on a message, if it is one of remote control and is meant for this worker.
    fn act(&self, bytes: &[u8]) {
        let Some(request) = request(bytes) else { return };
        let is_meant = match &request.destination {
            Some(names) if !names.is_empty() => names.contains(&self.name),
            // Patterns of names are not supported.
            _ => request.pattern.is_none(),
        };
        let answer = is_meant.then(|| self.answer(&request.method, &request.arguments)).flatten();
        if let (Some(reply_to), Some(answer)) = (&request.reply_to, answer) {
            self.reply(reply_to, request.ticket.as_deref(), answer);
        }
    }

    /// Does something in the broker's database. While the server takes no writes it waits for a
    /// while: a pause ends, and then what was asked is done.
    fn in_broker<T>(&self, mut f: impl FnMut(&Context) -> T) -> Option<T> {
        const LOOK: Duration = Duration::from_millis(50);
        const LOOKS: u32 = 1200;
        (0..LOOKS).find_map(|look| {
            if look > 0 {
                thread::sleep(LOOK);
            }
            with_server(|ctx| can_write(ctx).then(|| in_db(ctx, self.broker_db(), || f(ctx))))
        })
    }

    fn reply(&self, to: &ReplyTo, ticket: Option<&str>, answer: Value) {
        /// For clients that have gone.
        const SECONDS: &[u8] = b"60";
        if to.exchange != REPLIES {
            return;
        }
        let headers = json!({ "ticket": ticket, "clock": self.tick() });
        let mut body = json!({});
        body[&self.name] = answer;
        let message = json::write(&envelope(&headers, &to.exchange, &to.routing_key, &body));
        let list = format!("{}{}.{}", self.prefix, to.routing_key, to.exchange);
        self.in_broker(|ctx| {
            let pushed = server::call(ctx, "LPUSH", &[list.as_bytes(), message.as_bytes()]);
            if pushed.is_ok() {
                let _ = server::call(ctx, "EXPIRE", &[list.as_bytes(), SECONDS]);
            }
        });
    }

    /// What a worker says to a method; nothing to those without an answer.
    fn answer(&self, method: &str, arguments: &Value) -> Option<Value> {
        Some(match method {
            "ping" => ok("pong"),
            "active" | "dump_active" => {
                self.tasks(|state| matches!(state, State::Fetching | State::Running))
            }
            "reserved" | "dump_reserved" => self.tasks(|state| state == State::Queued),
            "scheduled" | "dump_schedule" => self.scheduled(),
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
            "query_task" => self.query(arguments),
            "report" => ok(format!("florence {}", env!("CARGO_PKG_VERSION"))),
            "revoke" => self.revoke(arguments, arguments["terminate"] == true),
            "terminate" => self.revoke(arguments, true),
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

    /// What `told` says of tasks, their jobs and where these stand, the next first.
    fn each<T>(&self, told: impl Fn(&Job, State, &Task) -> Option<T>) -> Vec<T> {
        let is_ours = |key: &JobKey| key.name.starts_with(JOB_PREFIX.as_bytes());
        let keys = queue().keys(self.broker_db(), None, MOST, is_ours);
        let of = |ctx: &Context, key: &JobKey| {
            let job = job::open(ctx, key).ok()?;
            let task = serde_json::from_str(&job.text(FIELD)?).ok()?;
            told(&job, queue().state(key.as_ref(), &job), &task)
        };
        let slice = |keys: &[JobKey]| -> Option<Vec<T>> {
            self.in_broker(|ctx| keys.iter().filter_map(|key| of(ctx, key)).collect())
        };
        keys.chunks(SLICE).map_while(slice).flatten().collect()
    }

    fn tasks(&self, is_wanted: impl Fn(State) -> bool) -> Value {
        let told = |job: &Job, state, task: &Task| {
            (is_wanted(state) && job.starts_in() == 0).then(|| self.info(job, task))
        };
        self.each(told).into()
    }

    fn scheduled(&self) -> Value {
        let told = |job: &Job, state, task: &Task| {
            let shown = || {
                json!({
                    "eta": task.headers.eta,
                    "priority": task.priority,
                    "request": self.info(job, task),
                })
            };
            (state == State::Queued && job.starts_in() > 0).then(shown)
        };
        self.each(told).into()
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

    fn query(&self, arguments: &Value) -> Value {
        let wanted: HashSet<String> = ids(&arguments["ids"]).collect();
        let told = |job: &Job, state, task: &Task| {
            let state = match state {
                State::Fetching | State::Running => "active",
                _ if job.starts_in() > 0 => "scheduled",
                _ => "reserved",
            };
            let told = || (task.id().to_owned(), json!([state, self.info(job, task)]));
            wanted.contains(task.id()).then(told)
        };
        Value::Object(self.each(told).into_iter().collect())
    }

    /// Ends tasks that wait; those at work too if they are to be terminated. Tasks that have not
    /// been taken yet end when they are.
    fn revoke(&self, arguments: &Value, terminates: bool) -> Value {
        let ids: Vec<String> = ids(&arguments["task_id"]).collect();
        for id in &ids {
            self.revoked.lock().insert(id);
        }
        let end = |ctx: &Context, ids: &[String]| {
            for id in ids {
                self.end(ctx, id, terminates);
            }
        };
        let ended = ids.chunks(SLICE).map_while(|ids| self.in_broker(|ctx| end(ctx, ids)));
        ended.for_each(drop);
        let ids = ids.join(", ");
        ok(if terminates {
            format!("terminate: {ids}")
        } else {
            format!("tasks {ids} flagged as revoked")
        })
    }

    fn end(&self, ctx: &Context, id: &str, terminates: bool) {
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
fn ids(value: &Value) -> impl Iterator<Item = String> {
    let ids = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
    ids.iter().filter_map(text)
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
