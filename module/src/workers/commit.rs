//! The commit thread: stores answers under the server's lock, when the server takes writes.

use std::{sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use florence_engine::Answer;
use redis_module::{Context, ContextFlags};

use super::{Failure, WRITE_PAUSE, prepare::Claimed, with_server};
use crate::{
    cache::Verdict,
    config, ffi,
    job::{self, Fields, Job, State, unix_ms},
    state::{Counters, Model, SHARED, is_shutting_down},
};

/// The end of an attempt, on its way into the key.
pub(super) struct Commit {
    pub(super) claimed: Claimed,
    pub(super) result: Result<Arc<Answer>, Failure>,
    pub(super) verdict: Verdict,
    pub(super) fetch_ms: u64,
    pub(super) infer_ms: u64,
}

pub(super) fn run(outbox: &Receiver<Commit>) {
    let mut waiting: Vec<Commit> = Vec::new();
    loop {
        let timeout = if waiting.is_empty() { Duration::from_hours(1) } else { WRITE_PAUSE };
        match outbox.recv_timeout(timeout) {
            Ok(commit) => waiting.push(commit),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.extend(outbox.try_iter().take(64));
        if is_shutting_down() {
            return;
        }
        waiting = with_server(|ctx| {
            let left = waiting.into_iter().filter_map(|commit| store(ctx, commit)).collect();
            // It sees the signalled keys as soon as it gets the lock back.
            ffi::wake_event_loop();
            left
        });
    }
}

/// Stores the end of an attempt; gives it back if the server takes no writes just now.
///
/// An answer for a job that was deleted, cancelled, renamed or claimed elsewhere is dropped.
fn store(ctx: &Context, commit: Commit) -> Option<Commit> {
    let flags = ctx.get_flags();
    if ffi::are_writes_paused() && flags.contains(ContextFlags::MASTER) {
        return Some(commit);
    }
    let job = job::open(ctx, &commit.claimed.key).ok();
    let job = job.filter(|job| commit.claimed.holds(job));
    let Some(job) = job.filter(|_| flags.contains(ContextFlags::MASTER)) else {
        Counters::add(&SHARED.counters.dropped, 1);
        return None;
    };
    match write_end(ctx, &commit, &job) {
        Ok(()) => None,
        Err(_refused) => Some(commit),
    }
}

fn write_end(ctx: &Context, commit: &Commit, job: &Job) -> Result<(), String> {
    let name = &commit.claimed.key.name;
    let ttl = job.number("ttl").unwrap_or_default();
    let mut fields: Fields = vec![
        ("fetch_ms", commit.fetch_ms.to_string().into()),
        ("infer_ms", commit.infer_ms.to_string().into()),
    ];
    match &commit.result {
        Ok(answer) => {
            fields.push(("result", answer.json.to_string().into()));
            fields.push(("text", answer.text.clone().into()));
            fields.push(("tokens", answer.token_ids.len().to_string().into()));
            fields.push(("model", model_name().into()));
            fields.push(("cache", commit.verdict.name().into()));
            job::finish(ctx, name, State::Done, ttl, fields)?;
            Counters::add(&SHARED.counters.done, 1);
            Counters::add(SHARED.counters.cache(commit.verdict), 1);
        }
        Err(failure) => {
            fields.extend(failure.fields());
            let retries = job.number("retries").unwrap_or_default();
            if failure.is_retryable && commit.claimed.attempt <= retries {
                let at = unix_ms() + retry_delay_ms(commit.claimed.attempt);
                fields.push(("retry_at", at.to_string().into()));
                fields.push(("state", State::Retrying.name().into()));
                job::write(ctx, name, &fields)?;
                Counters::add(&SHARED.counters.retried, 1);
            } else {
                job::finish(ctx, name, State::Failed, ttl, fields)?;
                Counters::add(&SHARED.counters.failed, 1);
            }
        }
    }
    Ok(())
}

/// Doubles with every attempt, up to a minute, and varies by a quarter so that jobs that failed
/// together do not return together.
fn retry_delay_ms(attempt: i64) -> i64 {
    let base = i64::try_from(config::number(&config::RETRY_DELAY_MS)).unwrap_or(1000);
    let doublings = u32::try_from(attempt - 1).unwrap_or_default().min(16);
    let delay = base.saturating_mul(1 << doublings).min(base.max(60_000));
    let jitter = i64::from(ffi::random()[0]);
    delay - delay / 4 + delay / 2 * jitter / 256
}

fn model_name() -> String {
    match &*SHARED.model.read() {
        Model::Ready(florence) => florence.name().to_owned(),
        _ => String::new(),
    }
}
