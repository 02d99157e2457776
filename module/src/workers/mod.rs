//! The threads: prepare threads fetch and decode, one engine thread computes, one committer stores.
//!
//! ```text
//! scheduler -> prepare (claim, fetch, decode) -> engine (join, step by step) -> committer (store)
//! ```
//!
//! Only claims, state changes and answers take the server's lock, each for a few calls. A panic
//! ends one attempt of one job (or of one batch), never a thread.

mod commit;
mod engine;
mod failure;
mod prepare;

use std::{
    panic::catch_unwind,
    path::Path,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{bounded, unbounded};
use florence_engine::{Florence, LoadOptions, model::Packing};
use redis_module::{Context, ContextFlags, MODULE_CONTEXT};

pub(crate) use failure::Failure;

use crate::{
    celery, config, events, ffi,
    state::{Model, SHARED, schedule},
};

/// How long to pause when the server does not take writes just now.
const WRITE_PAUSE: Duration = Duration::from_millis(50);

/// Starts the threads; on the first turn of the event loop.
pub(crate) fn start(ctx: &Context) {
    ctx.log_notice("florence: starting threads, loading the model");
    let (work, batches) = bounded::<prepare::Work>(config::size(&config::MAX_BATCH));
    let (commits, outbox) = unbounded::<commit::Commit>();
    for i in 0..config::size(&config::PREPARE_THREADS) {
        let (work, commits) = (work.clone(), commits.clone());
        spawn(&format!("fl-prepare-{i}"), move || prepare::run(&work, &commits));
    }
    spawn("fl-engine", move || {
        if let Some(florence) = load_model() {
            engine::run(&florence, &batches, &commits);
        }
    });
    spawn("fl-commit", move || commit::run(&outbox));
    spawn("fl-celery", celery::run);
    events::role_changed(ctx);
}

/// Starts a thread; it is never joined: at shutdown the process ends under it, by design of the
/// job states nothing is lost.
fn spawn(name: &str, f: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(f);
    if let Err(error) = spawned {
        MODULE_CONTEXT.log_warning(&format!("florence: cannot start thread {name}: {error}"));
    }
}

/// The server is going down: no new work, running work stops at its next step.
pub(crate) fn stop() {
    SHARED.is_shutting_down.store(true, Ordering::Relaxed);
    schedule(|scheduler| {
        scheduler.set_enabled(false);
        scheduler.clear(None);
    });
}

fn load_model() -> Option<Arc<Florence>> {
    let directory = config::text(&config::MODEL);
    let threads = match config::size(&config::THREADS) {
        // Redis' main thread keeps a core to itself.
        0 => thread::available_parallelism().map_or(1, |n| (n.get() - 1).max(1)),
        threads => threads,
    };
    let nice = i32::try_from(config::number(&config::NICE)).unwrap_or_default();
    let start = Instant::now();
    let loaded = catch_unwind(|| {
        let precision = config::text(&config::PRECISION).parse()?;
        let keep_packed = config::flag(&config::KEEP_PACKED);
        let cpus = config::cpus().unwrap_or_default();
        let options =
            LoadOptions { threads, nice, cpus, precision, keep_packed, ..LoadOptions::default() };
        if directory.is_empty() {
            Florence::embedded(&options)
        } else {
            Florence::load(Path::new(&directory), &options)
        }
    });
    let problem = match loaded {
        Ok(Ok(florence)) => {
            let florence = Arc::new(florence);
            if let Packing::Failed(problem) = florence.model().packing() {
                MODULE_CONTEXT.log_warning(&format!(
                    "florence: packed weights stay in this process's memory: {problem}"
                ));
            }
            MODULE_CONTEXT.log_notice(&format!(
                "florence: model {} ({}) ready after {} ms, {threads} threads",
                florence.name(),
                florence.arithmetic(),
                start.elapsed().as_millis()
            ));
            *SHARED.model.write() = Model::Ready(Arc::clone(&florence));
            SHARED.work.notify_all();
            return Some(florence);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_panic) => "loading it failed with an internal error".to_owned(),
    };
    MODULE_CONTEXT.log_warning(&format!("florence: cannot load the model: {problem}"));
    *SHARED.model.write() = Model::Failed(problem);
    None
}

/// Whether this server may write now: a master, loaded, not paused.
pub(crate) fn can_write(ctx: &Context) -> bool {
    let flags = ctx.get_flags();
    flags.contains(ContextFlags::MASTER)
        && !flags.contains(ContextFlags::LOADING)
        && !ffi::are_writes_paused()
}

/// Runs `f` under the server's lock.
pub(crate) fn with_server<T>(f: impl FnOnce(&Context) -> T) -> T {
    let guard = MODULE_CONTEXT.lock();
    let result = f(&guard);
    drop(guard);
    // The lock is unfair: without a pause a busy thread could keep the main thread from it.
    thread::sleep(Duration::from_micros(1));
    result
}

fn elapsed_ms(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
