//! The engine thread: forms batches as late as it can, and computes them.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{Answer, Error, Florence, Job as EngineJob};
use redis_module::Context;

use super::{Failure, can_write, commit::Commit, elapsed_ms, prepare::Work, with_server};
use crate::{
    config,
    job::{self, State},
    state::{Counters, SHARED},
};

pub(super) fn run(florence: &Florence, batches: &Receiver<Work>, commits: &Sender<Commit>) {
    while let Ok(first) = batches.recv() {
        let mut batch = vec![first];
        batch.extend(batches.try_iter().take(config::size(&config::MAX_BATCH) - 1));
        with_server(|ctx| mark_running(ctx, &batch));
        let start = Instant::now();
        let results = compute(florence, &batch);
        let infer_ms = elapsed_ms(start);
        Counters::add(&SHARED.counters.batches, 1);
        Counters::add(&SHARED.counters.infer_ms, infer_ms);
        for (Work { claimed, fetch_ms, .. }, result) in batch.into_iter().zip(results) {
            if commits.send(Commit { claimed, result, fetch_ms, infer_ms }).is_err() {
                return;
            }
        }
    }
}

/// Best effort: while writes are paused the jobs stay `fetching`, which loses nothing.
fn mark_running(ctx: &Context, batch: &[Work]) {
    if !can_write(ctx) {
        return;
    }
    for Work { claimed, .. } in batch {
        if job::open(ctx, &claimed.key).is_ok_and(|job| claimed.holds(&job)) {
            let fields = vec![("state", State::Running.name().into())];
            let _ = job::write(ctx, &claimed.key.name, &fields);
        }
    }
}

/// Runs a batch; if it fails as a whole, each of its jobs alone, so that one cannot harm others.
fn compute(florence: &Florence, batch: &[Work]) -> Vec<Result<Answer, Failure>> {
    let run = |batch: &[Work]| {
        let jobs: Vec<EngineJob<'_>> = batch
            .iter()
            .map(|work| EngineJob { prepared: &work.prepared, options: &work.claimed.options })
            .collect();
        let stopped = |i: usize| batch[i].claimed.is_over();
        catch_unwind(AssertUnwindSafe(|| florence.run(&jobs, &stopped))).unwrap_or_else(|_panic| {
            Counters::add(&SHARED.counters.panics, 1);
            Err(Error::Cancelled)
        })
    };
    let explain = |work: &Work, answer: Option<Answer>| {
        answer.ok_or_else(|| {
            if work.claimed.control.is_stopped() {
                return Failure::permanent("CANCELLED", "the job was cancelled");
            }
            Failure {
                is_retryable: true,
                ..Failure::permanent("TIMEOUT", "the attempt took too long")
            }
        })
    };
    match run(batch) {
        Ok(answers) => batch.iter().zip(answers).map(|(work, a)| explain(work, a)).collect(),
        Err(_) if batch.len() > 1 => {
            batch.iter().flat_map(|work| compute(florence, std::slice::from_ref(work))).collect()
        }
        Err(_) => batch.iter().map(|_| Err(Failure::internal())).collect(),
    }
}
