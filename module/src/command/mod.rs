//! The commands, one file each, behind a guard that turns a panic into an error reply.

mod args;
mod cancel;
mod control;
mod get;
mod info;
mod inspect;
mod submit;
mod wait;

use redis_module::{Context, RedisError, RedisResult, RedisString};

pub(crate) use info::add as add_info;
pub(crate) use wait::finished;

use crate::server::{self, CommandInfo, KeyBegin, KeySpec, reply};
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
    jobs => inspect::jobs;
    hosts => inspect::hosts;
    stats => inspect::stats;
    model => inspect::model;
    control => control::run;
    help => inspect::help;
}

const fn info(
    name: &'static str,
    arity: i32,
    complexity: &'static str,
    summary: &'static str,
) -> CommandInfo {
    CommandInfo { name, summary, complexity, arity, keys: &[] }
}

const INFOS: [CommandInfo; 11] = [
    CommandInfo {
        keys: &[
            KeySpec { begin: KeyBegin::Position(1), flags: KeySpec::WRITE },
            KeySpec { begin: KeyBegin::After(c"KEY"), flags: KeySpec::READ },
        ],
        ..info(
            "florence.submit",
            -4,
            "O(1)",
            "Creates a job that asks Florence-2 about a picture; replies its key.",
        )
    },
    info("florence.get", -2, "O(1)", "A job as a map, or with RESULT only its answer's JSON."),
    info(
        "florence.wait",
        -3,
        "O(N) with N keys",
        "Waits for the first of several jobs to end; replies that job as a map.",
    ),
    info("florence.cancel", -2, "O(N) with N keys", "Cancels jobs that have not ended."),
    info(
        "florence.retry",
        -2,
        "O(N) with N keys",
        "Queues jobs again that failed, expired or were cancelled.",
    ),
    info("florence.jobs", -1, "O(N) with N unfinished jobs", "Lists the unfinished jobs."),
    info("florence.hosts", 1, "O(N) with N hosts", "Downloads by host, the busiest first."),
    info("florence.stats", 1, "O(1)", "Counters of the module."),
    info("florence.model", 1, "O(1)", "Which model is loaded, and whether it is ready."),
    info(
        "florence.control",
        3,
        "O(N) with N unfinished tasks",
        "What PUBLISH to Celery's channel of remote control becomes.",
    ),
    info("florence.help", 1, "O(1)", "The commands in short."),
];

/// Tells the server what COMMAND DOCS shows.
pub(crate) fn describe(ctx: &Context) -> Result<(), String> {
    INFOS.iter().try_for_each(|info| server::describe(ctx, info))
}
