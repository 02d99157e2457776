//! How a task fares, written where `AsyncResult` looks for it: `celery-task-meta-<id>`, stored and
//! published in the transaction that changes the job.

use redis_module::Context;
use serde_json::{Value, json};

use super::{Celery, FIELD, Task, canvas, celery, events, message};
use crate::{
    job::{
        Code, Failure, Job, State,
        life::{Ended, Follower},
    },
    server::{self, bytes, in_db},
    settings,
};

/// An exception as Celery's clients raise it.
#[derive(Debug, Clone)]
pub(super) struct Exception {
    module: &'static str,
    kind: &'static str,
    message: String,
}

impl Exception {
    pub(super) fn new(
        module: &'static str,
        kind: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self { module, kind, message: message.into() }
    }

    /// That of a job's `error`: what Python code would raise for it, its text after our code.
    fn of_code(code: &str, text: &str) -> Self {
        let (module, kind) = match code {
            "FETCH" => ("builtins", "ConnectionError"),
            "DENIED" => ("builtins", "PermissionError"),
            "TIMEOUT" => ("billiard.exceptions", "TimeLimitExceeded"),
            "CRASH" => ("billiard.exceptions", "WorkerLostError"),
            "NOMODEL" | "INTERNAL" => ("builtins", "RuntimeError"),
            _ => ("builtins", "ValueError"),
        };
        Self::new(module, kind, format!("{code} {text}"))
    }

    /// That of an error reply, whose first word is the code.
    pub(super) fn of_reply(reply: &str) -> Self {
        let (code, text) = reply.split_once(' ').unwrap_or((reply, ""));
        Self::of_code(code, text)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "exc_type": self.kind,
            "exc_message": [self.message],
            "exc_module": self.module,
        })
    }

    /// As Python's `repr` shows it.
    pub(super) fn repr(&self) -> String {
        format!("{}({})", self.kind, Value::from(self.message.as_str()))
    }
}

/// The task of a job that came from a queue of Celery, and what `look` finds in the job. The job's
/// key is closed again: what is done next writes.
///
/// Only under the task's own key: whoever may write other hashes must not thereby send messages.
fn task_of<T>(
    ctx: &Context,
    key: &[u8],
    look: impl FnOnce(&Job) -> T,
) -> Option<(&'static Celery, Task, T)> {
    let celery = celery()?;
    let job = Job::open(ctx, &server::string(ctx, key)).ok()?;
    let task: Task = serde_json::from_str(&job.text(FIELD)?).ok()?;
    let is_own = key == task.key().as_bytes() && server::selected_db(ctx) == celery.db;
    is_own.then(|| (celery, task, look(&job)))
}

/// Tells clients of Celery how their tasks fare.
pub(crate) struct Tasks;

impl Follower for Tasks {
    fn started(&self, ctx: &Context, key: &[u8]) {
        let Some((celery, task, ())) = task_of(ctx, key, |_| ()) else { return };
        events::of_task(ctx, celery, "task-started", &task, json!({}));
        if settings::CELERY_TRACK_STARTED.get() {
            let worker = json!({ "pid": std::process::id(), "hostname": celery.name });
            store(ctx, celery, &task, "STARTED", &worker);
        }
    }

    fn retrying(&self, ctx: &Context, key: &[u8], failure: &Failure) {
        let Some((celery, task, ())) = task_of(ctx, key, |_| ()) else { return };
        let exception = Exception::of_code(failure.code.name(), &failure.message);
        let fields = json!({ "exception": exception.repr(), "traceback": null });
        events::of_task(ctx, celery, "task-retried", &task, fields);
        store(ctx, celery, &task, "RETRY", &exception.json());
    }

    fn ended(&self, ctx: &Context, key: &[u8], _end: &Ended<'_>) {
        let Some((celery, task, end)) = task_of(ctx, key, End::of) else { return };
        match end {
            End::Result { json, seconds } => {
                let result = json.and_then(|json| serde_json::from_str(&json).ok());
                succeeded(ctx, celery, &task, &result.unwrap_or_default(), seconds);
            }
            End::Error(exception) => failed(ctx, celery, &task, &exception),
            End::Revoked(reason) => revoked(ctx, celery, &task, reason),
            End::None => {}
        }
    }

    /// A time limit of Celery's is one of the task, not of an attempt.
    fn is_last(&self, ctx: &Context, key: &[u8], failure: &Failure) -> bool {
        let has_limit = |(_, task, ()): (_, Task, ())| task.headers.timelimit().is_some();
        failure.code == Code::Timeout && task_of(ctx, key, |_| ()).is_some_and(has_limit)
    }
}

/// How a job has ended.
enum End {
    Result {
        json: Option<String>,
        seconds: f64,
    },
    Error(Exception),
    Revoked(&'static str),
    /// It has not.
    None,
}

impl End {
    fn of(job: &Job) -> Self {
        let text = |field| job.text(field).unwrap_or_default();
        let time = |field| job.number(field).unwrap_or_default();
        match job.state {
            State::Done => Self::Result {
                json: job.text("result"),
                seconds: (time("finished_at") - time("started_at")).max(0) as f64 / 1000.0,
            },
            State::Failed => Self::Error(Exception::of_code(&text("error_code"), &text("error"))),
            State::Cancelled => Self::Revoked("revoked"),
            State::Expired => Self::Revoked("expired"),
            State::Queued | State::Fetching | State::Running | State::Retrying => Self::None,
        }
    }
}

fn succeeded(ctx: &Context, celery: &Celery, task: &Task, result: &Value, runtime: f64) {
    // Before the result is there, as a worker does.
    canvas::follow(ctx, celery, task, result);
    store(ctx, celery, task, "SUCCESS", result);
    let fields = json!({ "result": result.to_string(), "runtime": runtime });
    events::ended(ctx, celery, "task-succeeded", task, fields);
}

pub(super) fn failed(ctx: &Context, celery: &Celery, task: &Task, exception: &Exception) {
    store(ctx, celery, task, "FAILURE", &exception.json());
    canvas::abandon(ctx, celery, task, exception);
    let fields = json!({ "exception": exception.repr(), "traceback": null });
    events::ended(ctx, celery, "task-failed", task, fields);
}

/// The task was revoked, or has expired.
pub(super) fn revoked(ctx: &Context, celery: &Celery, task: &Task, reason: &'static str) {
    let exception = Exception::new("celery.exceptions", "TaskRevokedError", reason);
    store(ctx, celery, task, "REVOKED", &exception.json());
    canvas::part_of_chord(ctx, celery, task, "REVOKED", &exception.json());
    let is_expired = reason == "expired";
    let fields = json!({ "terminated": false, "signum": null, "expired": is_expired });
    events::ended(ctx, celery, "task-revoked", task, fields);
}

/// Fails a task that will not be sent, because an earlier one failed.
pub(super) fn failed_unsent(ctx: &Context, celery: &Celery, id: &str, exception: &Exception) {
    write(ctx, celery, id, &meta(id, "FAILURE", &exception.json()));
}

fn store(ctx: &Context, celery: &Celery, task: &Task, status: &str, result: &Value) {
    if task.headers.ignore_result == Some(true) {
        return;
    }
    let mut meta = meta(task.id(), status, result);
    for (name, value) in [("group_id", &task.headers.group), ("parent_id", &task.headers.parent_id)]
    {
        if let Some(value) = value {
            meta[name] = value.as_str().into();
        }
    }
    write(ctx, celery, task.id(), &meta);
}

fn meta(id: &str, status: &str, result: &Value) -> Value {
    let is_over = matches!(status, "SUCCESS" | "FAILURE" | "REVOKED");
    json!({
        "status": status,
        "result": result,
        "traceback": null,
        "children": [],
        "date_done": is_over.then(message::now),
        "task_id": id,
    })
}

fn write(ctx: &Context, celery: &Celery, id: &str, meta: &Value) {
    let key = format!("{}celery-task-meta-{id}", celery.result_prefix);
    let (key, json) = (key.as_bytes(), meta.to_string());
    in_db(ctx, celery.result_db, || {
        // Celery's rule: a success is never written over.
        let known = bytes(ctx, "GET", &[key]);
        let known: Option<Value> = known.and_then(|known| serde_json::from_slice(&known).ok());
        if known.is_some_and(|known| known["status"] == "SUCCESS") {
            return;
        }
        let expires = settings::CELERY_RESULT_EXPIRES.get();
        let stored = if expires == 0 {
            server::call(ctx, "SET", &[key, json.as_bytes()])
        } else {
            server::call(ctx, "SETEX", &[key, expires.to_string().as_bytes(), json.as_bytes()])
        };
        let told = stored.and_then(|()| server::call(ctx, "PUBLISH", &[key, json.as_bytes()]));
        if let Err(problem) = told {
            server::warn(&format!("the result of task {id} is not stored: {problem}"));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_become_the_exceptions_of_python() {
        let exception = Exception::of_reply("DENIED the host is not allowed").json();
        assert_eq!(exception["exc_type"], "PermissionError");
        assert_eq!(exception["exc_message"], json!(["DENIED the host is not allowed"]));
        assert_eq!(Exception::of_code("CRASH", "x").module, "billiard.exceptions");
        assert_eq!(Exception::of_code("IMAGE", "x").repr(), "ValueError(\"IMAGE x\")");
    }

    #[test]
    fn a_meta_has_what_async_result_reads() {
        let done = meta("id", "SUCCESS", &json!({"<CAPTION>": "a cat"}));
        let names: Vec<_> = done.as_object().unwrap().keys().cloned().collect();
        let expected = ["status", "result", "traceback", "children", "date_done", "task_id"];
        assert_eq!(names, expected);
        assert!(done["date_done"].is_string());
        assert!(meta("id", "STARTED", &Value::Null)["date_done"].is_null());
    }
}
