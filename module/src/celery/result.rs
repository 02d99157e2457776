//! Results where `AsyncResult` looks for them: `celery-task-meta-<id>`, stored and published in the
//! transaction that changes the job.

use redis_module::Context;
use serde_json::{Value, json};

use super::{Celery, Task, json, time};
use crate::{
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
    pub(super) fn of_code(code: &str, text: &str) -> Self {
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

/// What is stored of a task.
pub(super) struct Meta<'a> {
    pub(super) status: &'a str,
    pub(super) result: &'a Value,
    /// What followed it, as [`canvas`](super::canvas) lists it.
    pub(super) children: Vec<Value>,
}

impl<'a> Meta<'a> {
    /// That of a task that nothing followed.
    pub(super) fn new(status: &'a str, result: &'a Value) -> Self {
        Self { status, result, children: Vec::new() }
    }

    /// As `AsyncResult` reads it.
    fn json(self, id: &str) -> Value {
        let is_over = matches!(self.status, "SUCCESS" | "FAILURE" | "REVOKED");
        json!({
            "status": self.status,
            "result": self.result,
            "traceback": null,
            "children": self.children,
            "date_done": is_over.then(time::now),
            "task_id": id,
        })
    }
}

/// Fails a task that will not be sent, because an earlier one failed.
pub(super) fn failed_unsent(ctx: &Context, celery: &Celery, id: &str, exception: &Exception) {
    let result = exception.json();
    write(ctx, celery, id, &Meta::new("FAILURE", &result).json(id));
}

pub(super) fn store(ctx: &Context, celery: &Celery, task: &Task, meta: Meta<'_>) {
    if task.headers.ignore_result == Some(true) {
        return;
    }
    let mut meta = meta.json(task.id());
    if let Some(id) = &task.headers.odd_id {
        meta["task_id"] = id.clone();
    }
    for (name, value) in [("group_id", &task.headers.group), ("parent_id", &task.headers.parent_id)]
    {
        if let Some(value) = value {
            meta[name] = value.as_str().into();
        }
    }
    write(ctx, celery, task.id(), &meta);
}

fn write(ctx: &Context, celery: &Celery, id: &str, meta: &Value) {
    let key = format!("{}celery-task-meta-{id}", celery.result_prefix);
    let (key, json) = (key.as_bytes(), json::write(meta));
    in_db(ctx, celery.backend_db(), || {
        // Celery's rule: a success is never written over.
        let known = bytes(ctx, "GET", &[key]);
        let known: Option<Value> =
            known.and_then(|known| json::read(std::str::from_utf8(&known).ok()?).ok());
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
            let id = server::printable(id.as_bytes());
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
        let done = Meta::new("SUCCESS", &json!({"<CAPTION>": "a cat"})).json("id");
        let names: Vec<_> = done.as_object().unwrap().keys().cloned().collect();
        let expected = ["status", "result", "traceback", "children", "date_done", "task_id"];
        assert_eq!(names, expected);
        assert!(done["date_done"].is_string());
        assert!(Meta::new("STARTED", &Value::Null).json("id")["date_done"].is_null());
    }
}
