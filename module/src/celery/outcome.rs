//! How a job's life looks to clients of Celery: results, events, and what follows a task.

use redis_module::Context;
use serde_json::{Value, json};

use super::{
    Celery, FIELD, Task, canvas, celery, events,
    result::{Exception, Meta, store},
};
use crate::{
    job::{
        Code, Failure, Job, State,
        life::{Ended, Follower},
    },
    server, settings,
};

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
    let job = Job::look(ctx, &server::string(ctx, key)).ok()?;
    let task: Task = serde_json::from_str(&job.text(FIELD)?).ok()?;
    let is_own = key == task.key().as_bytes() && server::selected_db(ctx) == celery.broker_db();
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
            store(ctx, celery, &task, Meta::new("STARTED", &worker));
        }
    }

    fn retrying(&self, ctx: &Context, key: &[u8], failure: &Failure) {
        let Some((celery, task, ())) = task_of(ctx, key, |_| ()) else { return };
        let exception = Exception::of_code(failure.code.name(), &failure.message);
        let fields = json!({ "exception": exception.repr(), "traceback": null });
        events::of_task(ctx, celery, "task-retried", &task, fields);
        store(ctx, celery, &task, Meta::new("RETRY", &exception.json()));
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
                seconds: time("finished_at").saturating_sub(time("started_at")).max(0) as f64
                    / 1000.0,
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
    let children = canvas::follow(ctx, celery, task, result);
    store(ctx, celery, task, Meta { status: "SUCCESS", result, children });
    let fields = json!({ "result": result.to_string(), "runtime": runtime });
    events::ended(ctx, celery, "task-succeeded", task, fields);
}

pub(super) fn failed(ctx: &Context, celery: &Celery, task: &Task, exception: &Exception) {
    store(ctx, celery, task, Meta::new("FAILURE", &exception.json()));
    canvas::abandon(ctx, celery, task, exception);
    let fields = json!({ "exception": exception.repr(), "traceback": null });
    events::ended(ctx, celery, "task-failed", task, fields);
}

/// The task was revoked, or has expired.
pub(super) fn revoked(ctx: &Context, celery: &Celery, task: &Task, reason: &'static str) {
    let exception = Exception::new("celery.exceptions", "TaskRevokedError", reason);
    store(ctx, celery, task, Meta::new("REVOKED", &exception.json()));
    canvas::part_of_chord(ctx, celery, task, "REVOKED", &exception.json());
    let is_expired = reason == "expired";
    let fields = json!({ "terminated": false, "signum": null, "expired": is_expired });
    events::ended(ctx, celery, "task-revoked", task, fields);
}
