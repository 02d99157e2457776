//! `FLORENCE.CANCEL key [key ...]` ends jobs that have not ended, `FLORENCE.RETRY key [key ...]`
//! queues jobs again that ended without an answer; both reply how many.
//!
//! A cancelled job stays as a record. Running work notices through the keyspace event, within one
//! decoder step.

use redis_module::{Context, RedisError, RedisResult, RedisString, RedisValue};

use super::args::Args;
use crate::{
    job::{
        Job, NoJob, State,
        life::{self, Data, End},
    },
    queue::queue,
    server::reply,
};

pub(super) fn cancel(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = jobs(ctx, args, |job| Ok(!job.state.is_final()))?;
    for key in &keys {
        life::finish(ctx, key.as_slice(), End::cancelled(Data::Keep))
            .map_err(RedisError::String)?;
    }
    Ok(RedisValue::from(keys.len()))
}

pub(super) fn retry(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = jobs(ctx, args, |job| match job.state {
        State::Failed | State::Cancelled | State::Expired if job.has_lost_picture() => {
            Err(reply::error("ERR", "the picture is gone, submit the job again"))
        }
        state => Ok(matches!(state, State::Failed | State::Cancelled | State::Expired)),
    })?;
    if !keys.is_empty() {
        queue().check_room()?;
    }
    for key in &keys {
        life::requeue(ctx, key.as_slice()).map_err(RedisError::String)?;
    }
    Ok(RedisValue::from(keys.len()))
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
