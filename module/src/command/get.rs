//! `FLORENCE.GET key [RESULT]`: a job as a map, or only its answer.

use redis_module::{Context, RedisResult, RedisString, RedisValue};

use super::args::{Args, is_word};
use crate::{
    job::{Job, KeyRef, view},
    queue::{queue, sync},
    server::{self, reply},
};

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let key = args.next()?;
    let wants_result = match args.option() {
        Some(option) if is_word(&option, "RESULT") => true,
        Some(option) => return Err(reply::syntax(option.as_slice())),
        None => false,
    };
    args.finish()?;
    let job = match Job::open(ctx, &key) {
        Ok(job) => job,
        Err(reason) => return reason.reply(),
    };
    if wants_result {
        return job.outcome();
    }
    Ok(map(ctx, &key, &job))
}

/// Replies the map of GET and WAIT.
pub(super) fn map(ctx: &Context, key: &RedisString, job: &Job) -> RedisValue {
    let name = KeyRef { db: server::selected_db(ctx), name: key.as_slice() };
    if !job.state.is_final() {
        sync::meet(ctx, name);
    }
    let progress = queue().progress(name, job);
    view::reply(ctx, key.as_slice(), job, &progress);
    RedisValue::NoReply
}
