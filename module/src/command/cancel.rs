//! `FLORENCE.CANCEL key [key ...]` ends jobs that have not ended, `FLORENCE.RETRY key [key ...]`
//! queues jobs again that ended without an answer; both reply how many.
//!
//! A cancelled job stays as a record. Running work notices through the keyspace event, within one
//! decoder step.

use std::collections::{HashMap, HashSet};

use redis_module::{Context, RedisError, RedisResult, RedisString, RedisValue};

use super::args::Args;
use crate::{
    job::{
        Job, JobKey, NoJob, State,
        life::{self, Data, End},
    },
    queue::{queue, sync},
    server::{self, reply},
};

pub(super) fn cancel(ctx: &Context, args: &mut Args) -> RedisResult {
    let keys = jobs(ctx, args, |job| Ok(!job.state.is_final()))?;
    for (_, key) in &keys {
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
    let mut users: HashMap<&str, usize> = HashMap::new();
    for (user, _) in &keys {
        *users.entry(user).or_default() += 1;
    }
    for (user, jobs) in users {
        queue().check_room(user, jobs, keys.len(), false)?;
    }
    for (_, key) in &keys {
        life::requeue(ctx, key.as_slice()).map_err(RedisError::String)?;
        sync::refresh(ctx, &JobKey { db: server::selected_db(ctx), name: key.as_slice().into() });
    }
    Ok(RedisValue::from(keys.len()))
}

/// Users and keys of the jobs that `is_meant` accepts; a key without a job is passed over.
fn jobs(
    ctx: &Context,
    args: &mut Args,
    is_meant: impl Fn(&Job) -> Result<bool, RedisError>,
) -> Result<Vec<(String, RedisString)>, RedisError> {
    let (mut meant, mut seen) = (Vec::new(), HashSet::new());
    for key in args.keys(0)? {
        if !seen.insert(key.as_slice().to_vec()) {
            continue;
        }
        match Job::open(ctx, &key) {
            Ok(job) if is_meant(&job)? => meant.push((job.user(), key)),
            Ok(_) | Err(NoJob::Missing) => {}
            Err(NoJob::WrongType) => return Err(RedisError::WrongType),
            Err(NoJob::Foreign) => return Err(reply::foreign()),
        }
    }
    Ok(meant)
}
