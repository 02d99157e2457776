//! `FLORENCE.CANCEL key [key ...]` ends jobs that have not ended, `FLORENCE.RETRY key [key ...]`
//! queues jobs again that ended without an answer; both reply how many.
//!
//! A cancelled job stays as a record. Running work notices through the keyspace event, within one
//! decoder step.

use redis_module::{Context, RedisError, RedisResult, RedisString, RedisValue};

use super::args::Args;
use crate::{
    ending::{self, Data},
    job::{self, Fields, Job, NoJob, State},
    reply, request,
};

pub(super) fn cancel(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = jobs(ctx, args, |job| Ok(!job.state.is_final()))?;
    for key in &keys {
        ending::finish(ctx, key.as_slice(), State::Cancelled, Data::Keep, Vec::new())
            .map_err(RedisError::String)?;
    }
    Ok(RedisValue::from(keys.len()))
}

pub(super) fn retry(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = jobs(ctx, args, |job| {
        let is_lost = is_sent_along(job) && job.length("data") == 0;
        match job.state {
            State::Failed | State::Cancelled | State::Expired if is_lost => {
                Err(reply::error("ERR", "the picture is gone, submit the job again"))
            }
            state => Ok(matches!(state, State::Failed | State::Cancelled | State::Expired)),
        }
    })?;
    if !keys.is_empty() {
        request::check_queue()?;
    }
    for key in &keys {
        requeue(ctx, key.as_slice()).map_err(RedisError::String)?;
    }
    Ok(RedisValue::from(keys.len()))
}

/// Whether the picture came with the job: nothing else tells where to find it.
fn is_sent_along(job: &Job) -> bool {
    let is_sent =
        |image: &String| image == "DATA" || image.starts_with("KEY ") || image.starts_with("data:");
    job.text("image").as_ref().is_some_and(is_sent)
}

/// The job as it was when it was submitted, but now, and without its delay.
fn requeue(ctx: &Context, key: &[u8]) -> Result<(), String> {
    let gone: [&[u8]; 10] = [
        key,
        b"error_code",
        b"error",
        b"error_retryable",
        b"finished_at",
        b"started_at",
        b"crashes",
        b"attempts",
        b"delay",
        b"queue_ms",
    ];
    job::call(ctx, "HDEL", &gone)?;
    let fields: Fields = vec![
        ("submitted_at", job::unix_ms().to_string().into()),
        ("state", State::Queued.name().into()),
    ];
    job::write(ctx, key, &fields)?;
    job::call(ctx, "PERSIST", &[key])
}

/// The keys of the jobs that `is_meant` accepts; a key without a job is passed over.
fn jobs(
    ctx: &Context,
    args: &mut Args,
    is_meant: impl Fn(&Job) -> Result<bool, RedisError>,
) -> Result<Vec<RedisString>, RedisError> {
    let keys = args.rest();
    if keys.is_empty() {
        return Err(RedisError::WrongArity);
    }
    let mut meant: Vec<RedisString> = Vec::new();
    for key in keys {
        match Job::open(ctx, &key) {
            Ok(job) if is_meant(&job)? => {
                if !meant.iter().any(|other| other.as_slice() == key.as_slice()) {
                    meant.push(key);
                }
            }
            Ok(_) | Err(NoJob::Missing) => {}
            Err(NoJob::WrongType) => return Err(RedisError::WrongType),
            Err(NoJob::Foreign) => return Err(reply::foreign()),
        }
    }
    Ok(meant)
}
