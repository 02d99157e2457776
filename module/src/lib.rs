//! FLORENCE.* commands: Florence-2 inside redis-server.
//!
//! A job is a Redis hash. Commands write it on the main thread; threads of our own fetch, prepare
//! and compute; one committer thread stores the answers under the server's lock.
//!
//! # Layout
//!
//! Each layer may use those below it; `tests/layers.rs` holds the order.
//!
//! - `entry`: what the server calls, beside commands
//! - `command`: one file per command, all behind a panic guard
//! - `work`: the threads
//! - `celery`: jobs of Celery clients
//! - `news`: who hears of a job's end
//! - `queue`: unfinished jobs, their order, and who works on them
//! - `job`: the hash's fields, its states, its life
//! - `source`: where pictures may come from
//! - `model`: the models, as far as they are loaded
//! - `server`: the module API; the only hand-written unsafe code
//! - `figures`: counters and latencies
//! - `settings`: one table of what can be set

mod celery;
mod command;
mod entry;
mod figures;
mod job;
mod model;
mod news;
mod queue;
mod server;
mod settings;
mod source;
mod work;

use redis_module::{Context, RedisString, Status};

/// As MODULE LIST shows it: 0.1.2 is 102.
const VERSION: i32 = number(env!("CARGO_PKG_VERSION_MAJOR")) * 10_000
    + number(env!("CARGO_PKG_VERSION_MINOR")) * 100
    + number(env!("CARGO_PKG_VERSION_PATCH"));

const fn number(digits: &str) -> i32 {
    match i32::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => 0,
    }
}

fn init(ctx: &Context, args: &[RedisString]) -> Status {
    match start(ctx, args) {
        Ok(()) => Status::Ok,
        Err(problem) => {
            if let Some(problem) = problem {
                server::warn(&problem);
            }
            Status::Err
        }
    }
}

/// The error is a line for the log, unless the server has written one.
fn start(ctx: &Context, args: &[RedisString]) -> Result<(), Option<String>> {
    figures::uptime();
    server::check()?;
    server::check_commands(ctx)?;
    server::limit_candle();
    server::set_options(ctx);
    server::register_settings(ctx, args)?;
    server::install(entry::handlers());
    job::life::follow(&[&celery::Tasks, &news::News]);
    server::subscribe(ctx)?;
    command::describe(ctx)?;
    celery::start(ctx)?;
    work::look_for_keys(ctx);
    // Threads start on the first turn of the event loop: by then the data set is loaded, and a
    // bad line in redis.conf has already ended the server.
    server::on_event_loop(ctx, work::start);
    Ok(())
}

/// Unloading is refused: threads of ours may be computing, and their code must stay mapped.
/// Valkey calls this at shutdown too, where the answer does not matter.
fn deinit(_ctx: &Context) -> Status {
    Status::Err
}

#[allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    unreachable_pub,
    unused_qualifications,
    elided_lifetimes_in_paths,
    clippy::allow_attributes,
    reason = "what the redis_module! macro expands to; not all fire in every version of it"
)]
mod module {
    use redis_module::{InfoContext, RedisResult, redis_module};

    use crate::{VERSION, command as c, deinit, init};

    fn add_info(ctx: &InfoContext, for_crash_report: bool) {
        c::add_info(ctx, for_crash_report);
    }

    redis_module! {
        name: "florence",
        version: VERSION,
        allocator: (std::alloc::System, std::alloc::System),
        data_types: [],
        init: init,
        deinit: deinit,
        info: add_info,
        commands: [
            ["florence.submit", c::submit, "write deny-oom no-monitor no-slowlog", 1, 1, 1, ""],
            ["florence.get", c::get, "readonly fast", 1, 1, 1, ""],
            ["florence.wait", c::wait, "readonly blocking", 1, -2, 1, ""],
            ["florence.cancel", c::cancel, "write fast", 1, -1, 1, ""],
            ["florence.retry", c::retry, "write deny-oom", 1, -1, 1, ""],
            ["florence.jobs", c::jobs, "readonly", 0, 0, 0, ""],
            ["florence.hosts", c::hosts, "readonly admin", 0, 0, 0, ""],
            ["florence.stats", c::stats, "readonly fast allow-stale allow-loading", 0, 0, 0, ""],
            ["florence.model", c::model, "readonly fast allow-stale allow-loading", 0, 0, 0, ""],
            ["florence.model.change", c::change_model, "admin allow-stale", 0, 0, 0, ""],
            ["florence.control", c::control, "fast pubsub may-replicate", 0, 0, 0, ""],
            ["florence.help", c::help, "readonly fast allow-stale allow-loading", 0, 0, 0, ""],
        ],
    }
}
