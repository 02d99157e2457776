//! Results where `AsyncResult` looks for them: `celery-task-meta-<id>`, stored and published in the
//! transaction that changes the job.

use redis_module::Context;
use serde_json::{Value, json};

use super::{Celery, Task, message};
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

/// Fails a task that will not be sent, because an earlier one failed.
pub(super) fn failed_unsent(ctx: &Context, celery: &Celery, id: &str, exception: &Exception) {
    write(ctx, celery, id, &meta(id, "FAILURE", &exception.json()));
}

pub(super) fn store(ctx: &Context, celery: &Celery, task: &Task, status: &str, result: &Value) {
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
    in_db(ctx, celery.backend_db(), || {
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
