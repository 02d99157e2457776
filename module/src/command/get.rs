//! `FLORENCE.GET key [RESULT]`: a job as a map, or only its answer.

use redis_module::{Context, RedisResult, RedisValue};

use super::args::{Args, is_word};
use crate::{
    job::{Job, State},
    reply::{self, bulk},
};

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let key = args.next()?;
    let wants_result = match args.option() {
        Some(option) if is_word(&option, "RESULT") => true,
        Some(_) => return Err(reply::syntax()),
        None => false,
    };
    args.finish()?;
    let job = match Job::open(ctx, &key) {
        Ok(job) => job,
        Err(reason) => return reply::no_job(reason),
    };
    if wants_result {
        return result(&job);
    }
    Ok(as_map(key.as_slice(), &job))
}

fn result(job: &Job) -> RedisResult {
    match job.visible_state() {
        State::Done => Ok(job.text("result").map_or(RedisValue::Null, bulk)),
        State::Failed => {
            let code = job.text("error_code").unwrap_or_default();
            Err(reply::error(&code, job.text("error").unwrap_or_default()))
        }
        State::Cancelled => Err(reply::error("CANCELLED", "the job was cancelled")),
        _ => Ok(RedisValue::Null),
    }
}

/// The job as FLORENCE.GET and FLORENCE.WAIT show it.
pub(super) fn as_map(key: &[u8], job: &Job) -> RedisValue {
    let text = |field| job.text(field).map_or(RedisValue::Null, bulk);
    let number = |field| job.number(field).map_or(RedisValue::Null, RedisValue::Integer);
    let count = |field| RedisValue::Integer(job.number(field).unwrap_or_default());
    let error = match (job.text("error_code"), job.text("error")) {
        (Some(code), Some(message)) => {
            let is_retryable = job.number("error_retryable") == Some(1);
            bulk(
                serde_json::json!({ "code": code, "message": message, "retryable": is_retryable })
                    .to_string(),
            )
        }
        _ => RedisValue::Null,
    };
    reply::map([
        ("id", RedisValue::StringBuffer(key.to_vec())),
        ("state", bulk(job.visible_state().name())),
        ("prompt", text("prompt")),
        ("image", text("image")),
        ("result", text("result")),
        ("text", text("text")),
        ("error", error),
        ("attempts", count("attempts")),
        ("model", text("model")),
        ("submitted_at", number("submitted_at")),
        ("started_at", number("started_at")),
        ("finished_at", number("finished_at")),
        ("queue_ms", number("queue_ms")),
        ("fetch_ms", number("fetch_ms")),
        ("infer_ms", number("infer_ms")),
        ("tokens", number("tokens")),
        ("cache", text("cache")),
    ])
}
