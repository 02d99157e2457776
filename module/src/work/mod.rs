//! The threads: prepare threads fetch and decode, engines compute, one committer stores.
//!
//! ```text
//! queue -> prepare (claim, fetch, decode) -> infer (join, step by step) -> commit (store)
//! ```
//!
//! - `prepare`, `infer`, `commit`: as above
//! - `next`: what is asked about a picture, first and after answers
//! - `pieces`: texts that go to streams while they are generated
//! - `ahead`: how far downloads are ahead of the engine
//! - `ordered`: a channel and permits that keep the queue's order
//! - `lanes`: a lane for each model, from its name to its engines
//! - `load`: which engines there are; the model, when they begin
//! - `adopt`: jobs of which no event told
//!
//! Only claims, state changes and answers take the server's lock, each for a few calls. A job is
//! passed on with its lease: whatever is dropped on the way is given back. A panic ends one attempt
//! of one job; a thread that ends all the same is started again.

mod adopt;
mod ahead;
mod commit;
mod infer;
mod lanes;
mod load;
mod next;
mod ordered;
mod pieces;
mod prepare;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::unbounded;
use florence_engine::catch_panic;
use redis_module::Context;

use infer::Ways;
use ordered::Permits;
use pieces::Pieces;

use crate::{
    celery, figures,
    job::{JobKey, life},
    queue::sync,
    server, settings,
};

pub(crate) use adopt::look as look_for_keys;
pub(crate) use lanes::{
    load as load_model, make_default as make_default_model, unload as unload_model,
};

/// How long to pause when the server does not take writes just now.
const WRITE_PAUSE: Duration = Duration::from_millis(50);

/// Starts the threads; on the first turn of the event loop.
pub(crate) fn start(ctx: &Context) {
    server::tell("starting threads, loading models");
    let (commits, outbox) = unbounded();
    let pieces = Arc::<Pieces>::default();
    let ways = Ways { commits, pieces: Arc::clone(&pieces) };
    for i in 0..prepare_threads() {
        let ways = ways.clone();
        spawn(&format!("fl-prepare-{i}"), move || prepare::read(&ways));
    }
    let permits = Arc::new(Permits::new(prepare_threads()));
    for i in 0..settings::MAX_DOWNLOADS.get() {
        let (permits, ways) = (Arc::clone(&permits), ways.clone());
        spawn(&format!("fl-fetch-{i}"), move || prepare::download(&permits, &ways));
    }
    // Devices are opened there, which takes its time.
    spawn("fl-engines", move || lanes::start(&ways));
    spawn("fl-commit", move || commit::run(&outbox, &pieces));
    spawn("fl-celery", celery::run);
    spawn("fl-control", celery::run_control);
    spawn("fl-adopt", adopt::run);
    sync::take_role(ctx);
}

/// How many threads decode pictures at hand.
fn prepare_threads() -> usize {
    match settings::PREPARE_THREADS.size() {
        0 => (load::cores() / 2).clamp(4, 256),
        threads => threads,
    }
}

/// Starts a thread, and again if it panics: what it held is given back. It is never joined: at
/// shutdown the process ends under it, and the states of jobs are such that nothing is lost. Whether
/// there is such a thread.
fn spawn(name: &str, f: impl Fn() + Send + 'static) -> bool {
    let thread = name.to_owned();
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(move || {
        supervise(&f, |text| {
            figures::PANICS.add(1);
            figures::THREADS_RESTARTED.add(1);
            server::warn(&format!("thread {thread} panicked and is started again: {text}"));
        });
    });
    if let Err(error) = &spawned {
        server::warn(&format!("cannot start thread {name}: {error}"));
    }
    spawned.is_ok()
}

/// Runs `f` until it returns.
fn supervise(f: &impl Fn(), panicked: impl Fn(&str)) {
    /// A thread that panics at once must not fill the log.
    const PAUSE: Duration = Duration::from_millis(100);
    while let Err(text) = catch_panic(f) {
        panicked(&text);
        thread::sleep(PAUSE);
    }
}

/// Takes a step of a job's life under the server's lock; a job that makes it panic ends, and nobody
/// else does. `None` after a panic: what was lent to `step` has been given back.
fn guarded<T>(ctx: &Context, key: &JobKey, step: impl FnOnce() -> T) -> Option<T> {
    let who = || format!("under the server's lock, job '{}'", server::printable(&key.name));
    let done = server::catch(who, step);
    if done.is_none() {
        // It may panic again: then it stays as it is.
        let _ = catch_panic(|| life::give_up(ctx, key));
    }
    done
}

fn elapsed_ms(start: Instant) -> u64 {
    milliseconds(start.elapsed())
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[test]
    fn a_thread_that_panics_is_started_again() {
        let (runs, told) = (Cell::new(0), RefCell::new(Vec::new()));
        let body = || {
            runs.set(runs.get() + 1);
            assert!(runs.get() > 2, "run {}", runs.get());
        };
        supervise(&body, |text| told.borrow_mut().push(text.to_owned()));
        assert_eq!(runs.get(), 3);
        assert_eq!(*told.borrow(), ["run 1", "run 2"]);
    }
}
