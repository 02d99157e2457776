//! The commands, one file each, behind a guard that turns a panic into an error reply.

mod args;
mod cancel;
mod control;
mod docs;
mod get;
mod hosts;
mod info;
mod jobs;
mod model;
mod stats;
mod submit;
mod wait;

use redis_module::{Context, RedisError, RedisResult, RedisString};

pub(crate) use docs::describe;
pub(crate) use info::add as add_info;
pub(crate) use wait::finished;

use crate::server::{self, reply};
use args::Args;

type Handler = fn(&Context, &mut Args) -> RedisResult;

fn guarded(name: &str, ctx: &Context, args: Vec<RedisString>, handler: Handler) -> RedisResult {
    let mut args = Args::new(args);
    let failed = || Err(RedisError::Str("ERR florence internal error"));
    let reply = server::catch(|| format!("command {name}"), || handler(ctx, &mut args));
    reply::send_error(ctx, reply.unwrap_or_else(failed))
}

macro_rules! handlers {
    ($($name:ident => $handler:expr;)*) => {
        $(pub(crate) fn $name(ctx: &Context, args: Vec<RedisString>) -> RedisResult {
            guarded(stringify!($name), ctx, args, $handler)
        })*
    };
}

handlers! {
    submit => submit::run;
    get => get::run;
    wait => wait::run;
    cancel => cancel::cancel;
    retry => cancel::retry;
    jobs => jobs::run;
    hosts => hosts::run;
    stats => stats::run;
    model => model::run;
    change_model => model::change;
    control => control::run;
    help => docs::help;
}
