//! `FLORENCE.WAIT key [key ...] timeout`: blocks until one of the jobs has ended, like BLPOP.

use redis_module::{Context, ContextFlags, RedisError, RedisResult, RedisString, RedisValue};

use super::{args::Args, get::map};
use crate::{
    job::{Job, JobKey, KeyRef, NoJob},
    queue::{sync, waiters},
    server::{self, reply},
};

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = args.keys(1)?;
    let timeout_ms = milliseconds(&args.next()?)?;
    let mut pending = Vec::new();
    for key in keys {
        match Job::open(ctx, &key) {
            Ok(job) if job.state.is_final() => {
                return Ok(map(ctx, &key, &job));
            }
            Ok(_) => pending.push(key),
            Err(NoJob::Missing) => {}
            Err(reason) => return reason.reply(),
        }
    }
    if pending.is_empty() {
        return Err(reply::error("NOJOB", "none of the keys is a job"));
    }
    if ctx.get_flags().contains(ContextFlags::DENY_BLOCKING) {
        return Ok(RedisValue::Null);
    }
    let db = server::selected_db(ctx);
    for key in &pending {
        sync::meet(ctx, KeyRef { db, name: key.as_slice() });
    }
    let names = pending.iter().map(|key| JobKey { db, name: key.as_slice().into() }).collect();
    let id = waiters::next_id();
    waiters::add(id, server::block(ctx, &pending, timeout_ms, id), names);
    Ok(RedisValue::NoReply)
}

/// Seconds, with decimals, as BLPOP takes them.
fn milliseconds(timeout: &RedisString) -> Result<i64, RedisError> {
    let seconds = timeout.parse_float().ok().filter(|seconds| seconds.is_finite());
    let seconds = seconds.ok_or(RedisError::Str("ERR timeout is not a float or out of range"))?;
    if seconds < 0.0 {
        return Err(RedisError::Str("ERR timeout is negative"));
    }
    if seconds > 1e9 {
        return Err(RedisError::Str("ERR timeout is out of range"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "checked to be at most 1e12")]
    let milliseconds = (seconds * 1e3).ceil() as i64;
    Ok(milliseconds)
}

/// The reply for a waiting client whose key was signalled, or `None` to let it wait on.
pub(crate) fn finished(ctx: &Context, key: &RedisString) -> Option<RedisResult> {
    match Job::open(ctx, key) {
        Ok(job) if job.state.is_final() => Some(Ok(map(ctx, key, &job))),
        _ => None,
    }
}
