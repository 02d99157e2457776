//! Jobs that came from a queue of Celery, as Flower shows tasks.

use redis::cmd;
use serde_json::json;

use super::{
    jobs::{Named, about_each, rows},
    routes::Refusal,
};
use crate::servers::{server::text, watch::Watch};

/// The tasks of these jobs; null where there is none.
///
/// Arguments are the job's picture and prompt: the message's own may hold passwords and signatures.
pub(super) async fn tasks(
    watch: &Watch,
    jobs: &[Named],
) -> Result<Vec<serde_json::Value>, Refusal> {
    let mut tasks = rows(watch, jobs).await?;
    let read = |job: &Named| {
        let mut read = cmd("HGET");
        read.arg(job.id.bytes()).arg("celery");
        read
    };
    for (task, message) in tasks.iter_mut().zip(about_each(watch, jobs, read).await?) {
        let message: serde_json::Value = serde_json::from_str(&text(&message)).unwrap_or_default();
        *task = if message.is_object() && task.is_object() {
            shown(task, &message)
        } else {
            serde_json::Value::Null
        };
    }
    Ok(tasks)
}

fn shown(job: &serde_json::Value, message: &serde_json::Value) -> serde_json::Value {
    let headers = &message["headers"];
    let state = match job["state"].as_str().unwrap_or_default() {
        "fetching" | "running" => "STARTED",
        "retrying" => "RETRY",
        "done" => "SUCCESS",
        "failed" => "FAILURE",
        "cancelled" | "expired" => "REVOKED",
        _ => "RECEIVED",
    };
    let time = |name: &str| job[name].as_i64();
    let runtime = time("finished_at").zip(time("started_at")).map(|(end, start)| end - start);
    json!({
        "id": headers["id"],
        "name": headers["task"],
        "queue": message["queue"],
        "state": state,
        "args": [job["image"], job["prompt"]],
        "attempts": job["attempts"],
        "submitted_at": job["submitted_at"],
        "started_at": job["started_at"],
        "finished_at": job["finished_at"],
        "runtime_ms": runtime,
        "eta": headers["eta"],
        "expires": headers["expires"],
        "parent": headers["parent_id"],
        "error": job["error"],
    })
}
