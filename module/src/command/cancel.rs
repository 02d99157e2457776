//! `FLORENCE.CANCEL key [key ...]`: ends jobs that have not ended; replies how many.
//!
//! The record stays, as `cancelled`. Running work notices through the keyspace event, within one
//! decoder step.

use redis_module::{Context, RedisError, RedisResult, RedisValue};

use super::args::Args;
use crate::{
    job::{self, Job, NoJob, State},
    reply,
    state::{Counters, SHARED},
};

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = args.rest();
    if keys.is_empty() {
        return Err(RedisError::WrongArity);
    }
    let mut unfinished = Vec::new();
    for key in keys {
        match Job::open(ctx, &key) {
            Ok(job) if !job.state.is_final() => {
                unfinished.push((key, job.number("ttl").unwrap_or_default()));
            }
            Ok(_) | Err(NoJob::Missing) => {}
            Err(reason) => return reply::no_job(reason),
        }
    }
    let mut cancelled = 0;
    for (key, ttl) in unfinished {
        job::finish(ctx, key.as_slice(), State::Cancelled, ttl, Vec::new())
            .map_err(RedisError::String)?;
        Counters::add(&SHARED.counters.cancelled, 1);
        cancelled += 1;
    }
    Ok(RedisValue::Integer(cancelled))
}
