//! `FLORENCE.GET key [RESULT]`: a job as a map, or only its answer.

use redis_module::{Context, RedisResult};

use super::args::{Args, is_word};
use crate::{ffi, job::Job, reply, view};

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
        return job.outcome();
    }
    Ok(view::map(ffi::selected_db(ctx), key.as_slice(), &job))
}
