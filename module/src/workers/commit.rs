//! The commit thread: stores answers under the server's lock, when the server takes writes, and
//! ends what has waited or been kept too long.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use florence_engine::Answer;
use redis_module::{Context, ContextFlags};

use super::{Failure, WRITE_PAUSE, can_write, prepare::Claimed, with_server};
use crate::{
    cache::Verdict,
    celery, config,
    ending::{self, Data},
    ffi,
    job::{self, Fields, State, unix_ms},
    retain,
    scheduler::JobKey,
    state::{Counters, Model, SHARED, is_shutting_down},
};

/// How often jobs that have waited or been kept too long are looked for.
const TICK: Duration = Duration::from_millis(100);

/// The end of an attempt, on its way into the key.
pub(super) struct Commit {
    pub(super) claimed: Claimed,
    /// One answer a prompt.
    pub(super) result: Result<Vec<Arc<Answer>>, Failure>,
    pub(super) verdict: Verdict,
    pub(super) fetch_ms: u64,
    pub(super) infer_ms: u64,
}

pub(super) fn run(outbox: &Receiver<Commit>) {
    let mut waiting: Vec<Commit> = Vec::new();
    loop {
        let timeout = if waiting.is_empty() { TICK } else { WRITE_PAUSE };
        match outbox.recv_timeout(timeout) {
            Ok(commit) => waiting.push(commit),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.extend(outbox.try_iter().take(64));
        if is_shutting_down() {
            return;
        }
        let (expired, surplus) =
            (SHARED.scheduler.lock().expired(Instant::now()), retain::surplus());
        if waiting.is_empty() && expired.is_empty() && surplus.is_empty() {
            continue;
        }
        waiting = with_server(|ctx| {
            let left = waiting.into_iter().filter_map(|commit| store(ctx, commit)).collect();
            if can_write(ctx) {
                for key in &expired {
                    expire(ctx, key);
                }
                for key in &surplus {
                    drop_finished(ctx, key);
                }
            }
            // It sees the signalled keys as soon as it gets the lock back.
            ffi::wake_event_loop();
            left
        });
    }
}

/// Ends a job that was not started in time, if its key still says so.
fn expire(ctx: &Context, key: &JobKey) {
    if job::open(ctx, key).is_ok_and(|job| job.is_expired()) {
        let _ = ending::finish(ctx, &key.name, State::Expired, Data::Keep, Vec::new());
    }
}

/// Makes room for younger jobs.
fn drop_finished(ctx: &Context, key: &JobKey) {
    if job::open(ctx, key).is_ok_and(|job| job.state.is_final()) {
        let _ = job::call(ctx, "UNLINK", &[&key.name]);
        Counters::add(&SHARED.counters.trimmed, 1);
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
    let retries = job.number("retries").unwrap_or_default();
    // A key is closed before it is written.
    drop(job);
    match write_end(ctx, &commit, retries) {
        Ok(()) => None,
        Err(_refused) => Some(commit),
    }
}

fn write_end(ctx: &Context, commit: &Commit, retries: i64) -> Result<(), String> {
    let name = &commit.claimed.key.name;
    let mut fields: Fields = vec![
        ("fetch_ms", commit.fetch_ms.to_string().into()),
        ("infer_ms", commit.infer_ms.to_string().into()),
    ];
    match &commit.result {
        Ok(answers) => {
            let (result, text) = written(&commit.claimed.prompts, answers);
            let tokens: usize = answers.iter().map(|answer| answer.token_ids.len()).sum();
            fields.push(("result", result.into()));
            fields.push(("text", text.into()));
            fields.push(("tokens", tokens.to_string().into()));
            fields.push(("model", model_name().into()));
            fields.push(("cache", commit.verdict.name().into()));
            ending::finish(ctx, name, State::Done, Data::Drop, fields)?;
            Counters::add(SHARED.counters.cache(commit.verdict), 1);
        }
        Err(failure) => {
            fields.extend(failure.fields());
            let is_last =
                commit.claimed.attempt > retries || celery::is_last(ctx, name, failure.code);
            if failure.is_retryable && !is_last {
                let at = unix_ms() + retry_delay_ms(commit.claimed.attempt);
                fields.push(("retry_at", at.to_string().into()));
                fields.push(("state", State::Retrying.name().into()));
                job::write(ctx, name, &fields)?;
                celery::retrying(ctx, name, failure.code, &failure.message);
                Counters::add(&SHARED.counters.retried, 1);
            } else {
                // What can be tried again in vain only, is not kept.
                let data = if failure.is_retryable { Data::Keep } else { Data::Drop };
                ending::finish(ctx, name, State::Failed, data, fields)?;
            }
        }
    }
    Ok(())
}

/// Result and text of a job: the reference's for one prompt, by prompt for several.
fn written(prompts: &[String], answers: &[Arc<Answer>]) -> (String, String) {
    if let [answer] = answers {
        return (answer.json.to_string(), answer.text.clone());
    }
    let mut results = serde_json::Map::new();
    for (prompt, answer) in prompts.iter().zip(answers) {
        // The reference's object has one entry, named by the task.
        let value = answer.json.as_object().and_then(|object| object.values().next());
        results.insert(prompt.clone(), value.cloned().unwrap_or_default());
    }
    let texts: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
    (serde_json::Value::from(results).to_string(), serde_json::json!(texts).to_string())
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
