//! FLORENCE.* commands: Florence-2 inside redis-server.
//!
//! A job is a Redis hash. Commands write it on the main thread; threads of our own fetch, prepare
//! and compute; one committer thread stores the answers under the server's lock.
//!
//! # Layout
//!
//! - `command`: one file per command, all behind a panic guard
//! - `request`: what a new job is to answer
//! - `job`: the hash's fields, read and written
//! - `ending`: how a job ends, and who is told
//! - `view`: a job as clients see it
//! - `retain`: the budget for finished jobs
//! - `events`: keyspace and server events keep the scheduler in step with the keys
//! - `scheduler`: which job is next (pure)
//! - `source`: where pictures may come from
//! - `workers`: the threads
//! - `cache`: answers and encoded pictures that may be asked for again
//! - `celery`: jobs of Celery clients
//! - `waiters`: clients blocked in FLORENCE.WAIT
//! - `config`, `info`, `reply`: settings, counters, errors
//! - `ffi`: the only hand-written unsafe code

mod cache;
mod celery;
mod command;
mod config;
mod ending;
mod events;
mod ffi;
mod info;
mod job;
mod reply;
mod request;
mod retain;
mod scheduler;
mod source;
mod state;
mod view;
mod waiters;
mod workers;

use redis_module::{Context, RedisString, Status};

fn init(ctx: &Context, args: &[RedisString]) -> Status {
    match start(ctx, args) {
        Ok(()) => Status::Ok,
        Err(problem) => {
            ctx.log_warning(&format!("florence: {problem}"));
            Status::Err
        }
    }
}

fn start(ctx: &Context, args: &[RedisString]) -> Result<(), String> {
    ffi::check_server()?;
    ffi::limit_candle();
    config::check_arguments(args)?;
    source::check_settings()?;
    config::cpus()?;
    config::coordinates()?;
    ffi::set_module_options(ctx);
    ffi::subscribe(ctx)?;
    command::describe(ctx)?;
    celery::start(ctx)?;
    // Threads start on the first turn of the event loop: by then the data set is loaded, and a
    // bad line in redis.conf has already ended the server.
    ffi::on_event_loop(ctx, workers::start);
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
    use redis_module::{InfoContext, RedisResult, configuration::ConfigurationFlags, redis_module};

    use crate::{command as c, config as v, deinit, init};

    fn add_info(ctx: &InfoContext, for_crash_report: bool) {
        crate::info::add(ctx, for_crash_report);
    }

    redis_module! {
        name: "florence",
        version: 1,
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
            ["florence.control", c::control, "fast pubsub may-replicate", 0, 0, 0, ""],
            ["florence.help", c::help, "readonly fast allow-stale allow-loading", 0, 0, 0, ""],
        ],
        configurations: [
            i64: [
                ["threads", &v::THREADS, 0, 0, 1024, ConfigurationFlags::IMMUTABLE, None],
                ["nice", &v::NICE, 5, 0, 19, ConfigurationFlags::IMMUTABLE, None],
                ["prepare-threads", &v::PREPARE_THREADS, 4, 1, 256, ConfigurationFlags::IMMUTABLE, None],
                ["max-batch", &v::MAX_BATCH, 16, 1, 64, ConfigurationFlags::DEFAULT, None],
                ["max-queue", &v::MAX_QUEUE, 100_000, 1, 10_000_000, ConfigurationFlags::DEFAULT, None],
                ["max-image-bytes", &v::MAX_IMAGE_BYTES, 33_554_432, 1024, 536_870_912, ConfigurationFlags::DEFAULT, None],
                ["max-image-pixels", &v::MAX_IMAGE_PIXELS, 100_000_000, 1, 1_000_000_000, ConfigurationFlags::DEFAULT, None],
                ["fetch-timeout-ms", &v::FETCH_TIMEOUT_MS, 30_000, 1, 3_600_000, ConfigurationFlags::DEFAULT, None],
                ["retry-delay-ms", &v::RETRY_DELAY_MS, 1_000, 1, 3_600_000, ConfigurationFlags::DEFAULT, None],
                ["default-timeout-ms", &v::DEFAULT_TIMEOUT_MS, 300_000, 1, 86_400_000, ConfigurationFlags::DEFAULT, None],
                ["default-retries", &v::DEFAULT_RETRIES, 3, 0, 100, ConfigurationFlags::DEFAULT, None],
                ["default-ttl", &v::DEFAULT_TTL, 86_400, 0, 315_360_000, ConfigurationFlags::DEFAULT, None],
                ["result-cache-bytes", &v::RESULT_CACHE_BYTES, 67_108_864, 0, 1_099_511_627_776, ConfigurationFlags::IMMUTABLE, None],
                ["retain-bytes", &v::RETAIN_BYTES, 0, 0, 1_099_511_627_776, ConfigurationFlags::IMMUTABLE, None],
                ["stream-length", &v::STREAM_LENGTH, 10_000, 1, 1_000_000_000, ConfigurationFlags::DEFAULT, None],
                ["celery-db", &v::CELERY_DB, 0, 0, 1_000_000, ConfigurationFlags::IMMUTABLE, None],
                ["celery-result-db", &v::CELERY_RESULT_DB, 0, 0, 1_000_000, ConfigurationFlags::IMMUTABLE, None],
                ["celery-result-expires", &v::CELERY_RESULT_EXPIRES, 86_400, 0, 315_360_000, ConfigurationFlags::DEFAULT, None],
                ["feature-cache-bytes", &v::FEATURE_CACHE_BYTES, 268_435_456, 0, 1_099_511_627_776, ConfigurationFlags::IMMUTABLE, None],
            ],
            string: [
                ["model", &*v::MODEL, "", ConfigurationFlags::IMMUTABLE, None],
                ["cpus", &*v::CPUS, "", ConfigurationFlags::IMMUTABLE, None],
                ["precision", &*v::PRECISION, "f32", ConfigurationFlags::IMMUTABLE, None],
                ["coordinates", &*v::COORDINATES, "float", ConfigurationFlags::IMMUTABLE, None],
                ["allow-networks", &*v::ALLOW_NETWORKS, "", ConfigurationFlags::IMMUTABLE, None],
                ["deny-networks", &*v::DENY_NETWORKS, "", ConfigurationFlags::IMMUTABLE, None],
                ["allow-hosts", &*v::ALLOW_HOSTS, "", ConfigurationFlags::IMMUTABLE, None],
                ["deny-hosts", &*v::DENY_HOSTS, "", ConfigurationFlags::IMMUTABLE, None],
                ["image-formats", &*v::IMAGE_FORMATS, "jpeg png webp gif bmp", ConfigurationFlags::IMMUTABLE, None],
                ["buckets", &*v::BUCKETS, "", ConfigurationFlags::IMMUTABLE, None],
                ["stream", &*v::STREAM, "", ConfigurationFlags::DEFAULT, None],
                ["celery-queues", &*v::CELERY_QUEUES, "", ConfigurationFlags::IMMUTABLE, None],
                ["celery-prefix", &*v::CELERY_PREFIX, "", ConfigurationFlags::IMMUTABLE, None],
                ["celery-priority-steps", &*v::CELERY_PRIORITY_STEPS, "0 3 6 9", ConfigurationFlags::IMMUTABLE, None],
                ["celery-separator", &*v::CELERY_SEPARATOR, "\x06\x16", ConfigurationFlags::IMMUTABLE, None],
                ["celery-result-prefix", &*v::CELERY_RESULT_PREFIX, "", ConfigurationFlags::IMMUTABLE, None],
                ["celery-name", &*v::CELERY_NAME, "florence@%h", ConfigurationFlags::IMMUTABLE, None],
                ["file-roots", &*v::FILE_ROOTS, "", ConfigurationFlags::DEFAULT, None],
            ],
            bool: [
                ["publish", &v::PUBLISH, true, ConfigurationFlags::DEFAULT, None],
                ["celery-track-started", &v::CELERY_TRACK_STARTED, false, ConfigurationFlags::DEFAULT, None],
                ["celery-events", &v::CELERY_EVENTS, true, ConfigurationFlags::DEFAULT, None],
                ["celery-reject-unknown", &v::CELERY_REJECT_UNKNOWN, false, ConfigurationFlags::IMMUTABLE, None],
                ["keep-packed", &v::KEEP_PACKED, true, ConfigurationFlags::IMMUTABLE, None],
            ],
            enum: [],
            module_args_as_configuration: true,
        ]
    }
}
