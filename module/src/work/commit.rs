//! The commit thread: stores what the others have come to, under the server's lock, when the server
//! takes writes; and ends what has waited or been kept too long.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use redis_module::Context;

use super::WRITE_PAUSE;
use crate::{
    figures,
    job::{
        self, JobKey, Token,
        life::{self, Attempt, Outcome, Stored},
    },
    queue::{Lease, queue, retained, sync, watch_leases},
    server::{self, can_write, with_server},
};

/// How often jobs that have waited or been kept too long, or that nobody holds, are looked for.
const TICK: Duration = Duration::from_millis(100);

/// News of a claimed job, on their way into its key.
pub(super) enum Commit {
    Started { key: JobKey, token: Token },
    Ended { lease: Lease, attempt: Box<Attempt>, outcome: Outcome },
}

pub(super) fn run(outbox: &Receiver<Commit>) {
    let mut waiting: Vec<Commit> = Vec::new();
    while !queue().is_shut() {
        let timeout = if waiting.is_empty() { TICK } else { WRITE_PAUSE };
        match outbox.recv_timeout(timeout) {
            Ok(commit) => waiting.push(commit),
            Err(RecvTimeoutError::Timeout) => watch_leases(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.extend(outbox.try_iter().take(64));
        let is_idle = waiting.is_empty()
            && queue().expired().is_empty()
            && queue().unclaimed().is_empty()
            && retained::surplus().is_empty();
        if is_idle || queue().is_shut() {
            continue;
        }
        waiting = with_server(|ctx| {
            let left = store_all(ctx, std::mem::take(&mut waiting));
            tidy(ctx);
            // It sees the signalled keys as soon as it gets the lock back.
            server::wake_event_loop();
            left
        });
    }
}

/// Stores what can be stored; gives the rest back, in its order.
fn store_all(ctx: &Context, commits: Vec<Commit>) -> Vec<Commit> {
    let mut left = Vec::new();
    for commit in commits {
        // A server that has refused one refuses the next.
        if left.is_empty() {
            left.extend(store(ctx, commit));
        } else {
            left.push(commit);
        }
    }
    left
}

fn store(ctx: &Context, commit: Commit) -> Option<Commit> {
    let (lease, attempt, outcome) = match commit {
        Commit::Started { key, token } => {
            life::mark_running(ctx, &key, &token);
            return None;
        }
        Commit::Ended { lease, attempt, outcome } => (lease, attempt, outcome),
    };
    let stored = if lease.is_stopped() {
        Stored::Dropped
    } else {
        life::store(ctx, lease.key(), &attempt, &outcome)
    };
    match stored {
        Stored::Yes => lease.end(),
        Stored::Dropped => {
            figures::DROPPED.add(1);
            sync::refresh(ctx, lease.key());
        }
        Stored::Refused => return Some(Commit::Ended { lease, attempt, outcome }),
    }
    None
}

/// What nobody asks for, but must be done: each a few at a time, and not where one is refused.
fn tidy(ctx: &Context) {
    if !can_write(ctx) {
        return;
    }
    for (key, has_crashed) in queue().unclaimed() {
        if life::unclaim(ctx, &key, has_crashed).is_err() {
            return;
        }
        sync::refresh(ctx, &key);
    }
    for key in queue().expired() {
        if life::expire(ctx, &key).is_err() {
            return;
        }
    }
    for key in retained::surplus() {
        if job::open(ctx, &key).is_ok_and(|job| job.state.is_final()) {
            if server::call(ctx, "UNLINK", &[&key.name]).is_err() {
                return;
            }
            figures::TRIMMED.add(1);
        }
    }
}
