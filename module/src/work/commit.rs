//! The commit thread: stores what the others have come to, under the server's lock, when the server
//! takes writes; and ends what has waited or been kept too long.

use std::{
    collections::HashSet,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use redis_module::Context;

use super::{
    WRITE_PAUSE, guarded,
    pieces::{Pieces, Texts},
};
use crate::{
    figures,
    job::{
        self, JobKey, Token,
        life::{self, Attempt, Outcome, Stored},
    },
    news,
    queue::{Lease, queue, retained, sync, watch_leases},
    server::{self, Refused, can_write, with_server},
};

/// How often jobs that have waited or been kept too long, or that nobody holds, are looked for.
const TICK: Duration = Duration::from_millis(100);

/// How often keys are looked at that may have been overwritten.
const LOOK: Duration = Duration::from_millis(500);

/// How long ends are stored in one lock section, and how long others then have the server for
/// themselves.
const LONGEST: Duration = Duration::from_millis(5);
const BREATH: Duration = Duration::from_millis(1);

/// News of claimed jobs, on their way into their keys.
pub(super) enum Commit {
    Started {
        key: JobKey,
        token: Token,
    },
    Ended {
        lease: Lease,
        attempt: Box<Attempt>,
        outcome: Outcome,
    },
    /// There is new text for streams.
    Told,
}

impl Commit {
    /// The job's key; none of what there is for several.
    fn key(&self) -> Option<&JobKey> {
        match self {
            Self::Started { key, .. } => Some(key),
            Self::Ended { lease, .. } => Some(lease.key()),
            Self::Told => None,
        }
    }
}

pub(super) fn run(outbox: &Receiver<Commit>, pieces: &Pieces) {
    let (mut waiting, mut texts): (Vec<Commit>, Texts) = Default::default();
    let (mut looked, mut watched) = (Instant::now(), Instant::now());
    // More could be stored, if others did not want the server.
    let mut is_behind = false;
    while !queue().is_shut() {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            look_at_keys();
        }
        // However much there is to store.
        if watched.elapsed() >= TICK {
            watched = Instant::now();
            watch_leases();
            news::tell_rest();
        }
        let has_none = waiting.is_empty() && texts.is_empty();
        if is_behind {
            thread::sleep(BREATH);
        } else {
            match outbox.recv_timeout(if has_none { TICK } else { WRITE_PAUSE }) {
                Ok(commit) => waiting.push(commit),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        waiting.extend(outbox.try_iter().take(64));
        waiting.retain(|commit| !matches!(commit, Commit::Told));
        pieces.take_into(&mut texts);
        let has_none = waiting.is_empty() && texts.is_empty();
        let is_idle = has_none && !queue().has_overdue() && retained::surplus().is_empty();
        if is_idle || queue().is_shut() {
            continue;
        }
        waiting = with_server(|ctx| {
            let mut left = std::mem::take(&mut waiting);
            is_behind = false;
            if texts.write(ctx).is_ok() {
                (left, is_behind) = store_all(ctx, left, &texts.claims());
                is_behind |= !texts.is_empty();
            }
            tidy(ctx);
            // It sees the signalled keys as soon as it gets the lock back.
            server::wake_event_loop();
            left
        });
    }
}

fn look_at_keys() {
    let keys = sync::watched();
    if !keys.is_empty() {
        with_server(|ctx| keys.iter().for_each(|key| sync::look(ctx, key)));
    }
}

/// Stores what can be stored in one lock section, but for ends of claims that have text left: it goes
/// first. Gives the rest back, in its order, and whether only the time was too short for it.
fn store_all(
    ctx: &Context,
    commits: Vec<Commit>,
    telling: &HashSet<String>,
) -> (Vec<Commit>, bool) {
    let (mut left, start) = (Vec::new(), Instant::now());
    let (mut is_refusing, mut is_late) = (false, false);
    let is_told = |commit: &Commit| match commit {
        Commit::Ended { lease, .. } => !telling.contains(lease.claim().token.as_str()),
        Commit::Started { .. } | Commit::Told => true,
    };
    for commit in commits {
        is_late = is_late || start.elapsed() > LONGEST;
        if is_refusing || is_late || !is_told(&commit) {
            left.push(commit);
            continue;
        }
        let Some(key) = commit.key().cloned() else { continue };
        if let Some(Err((commit, refused))) = guarded(ctx, &key, || store(ctx, commit)) {
            is_refusing = refused == Refused::All;
            left.push(commit);
        }
    }
    (left, is_late && !is_refusing)
}

fn store(ctx: &Context, commit: Commit) -> Result<(), (Commit, Refused)> {
    let (lease, attempt, outcome) = match commit {
        Commit::Started { key, token } => {
            life::mark_running(ctx, &key, &token);
            return Ok(());
        }
        Commit::Ended { lease, attempt, outcome } => (lease, attempt, outcome),
        Commit::Told => return Ok(()),
    };
    let stored = if lease.is_stopped() {
        Stored::Dropped
    } else {
        life::store(ctx, lease.key(), &attempt, &outcome)
    };
    match stored {
        Stored::Yes => {
            sync::settled(ctx, lease.key());
            lease.end();
        }
        Stored::Dropped => {
            figures::DROPPED.add(1);
            sync::refresh(ctx, lease.key());
        }
        Stored::Refused(refused) => {
            return Err((Commit::Ended { lease, attempt, outcome }, refused));
        }
    }
    Ok(())
}

/// What nobody asks for, but must be done: each a few at a time.
fn tidy(ctx: &Context) {
    if !can_write(ctx) {
        return;
    }
    // Where one write is refused to all, the next look is early enough.
    let _ = unclaim(ctx).and_then(|()| expire(ctx)).and_then(|()| make_room(ctx));
}

/// Takes claims that nobody holds from their hashes.
fn unclaim(ctx: &Context) -> Result<(), Refused> {
    for (key, has_crashed) in queue().unclaimed() {
        tidy_one(ctx, &key, || life::unclaim(ctx, &key, has_crashed))?;
    }
    Ok(())
}

fn expire(ctx: &Context) -> Result<(), Refused> {
    queue().expired().iter().try_for_each(|key| tidy_one(ctx, key, || life::expire(ctx, key)))
}

/// Drops the oldest ended jobs over the budget.
fn make_room(ctx: &Context) -> Result<(), Refused> {
    for key in retained::surplus() {
        tidy_one(ctx, &key, || {
            if job::open(ctx, &key).is_ok_and(|job| job.state.is_final()) {
                server::call(ctx, "UNLINK", &[&key.name])?;
                figures::TRIMMED.add(1);
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A write that is refused to one key, or panics, is no reason to leave the others.
fn tidy_one(
    ctx: &Context,
    key: &JobKey,
    step: impl FnOnce() -> Result<(), String>,
) -> Result<(), Refused> {
    let done = guarded(ctx, key, step).unwrap_or(Ok(()));
    // No event may have told what is there now.
    sync::refresh(ctx, key);
    match done.map_err(|error| Refused::of(&error)) {
        Err(Refused::All) => Err(Refused::All),
        Ok(()) | Err(Refused::This) => Ok(()),
    }
}
