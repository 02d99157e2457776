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
    queue::{Lease, queue, retained, sync, waiters, watch_leases},
    server::{self, Refused, can_write, with_server},
};

/// How often jobs that have waited or been kept too long, or that nobody holds, are looked for.
const TICK: Duration = Duration::from_millis(100);

/// How long one lock section may be, and how long others then have the server for themselves.
const LONGEST: Duration = Duration::from_millis(5);
const BREATH: Duration = Duration::from_millis(1);

/// When a lock section is to end.
#[derive(Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    fn after(time: Duration) -> Self {
        Self(Instant::now() + time)
    }

    pub(super) fn is_past(self) -> bool {
        Instant::now() > self.0
    }
}

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
    let mut watched = Instant::now();
    // More could be stored, if others did not want the server.
    let mut is_behind = false;
    while !queue().is_shut() {
        // However much there is to store.
        if watched.elapsed() >= TICK {
            watched = Instant::now();
            look_at_keys();
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
            let deadline = Deadline::after(LONGEST);
            let mut left = std::mem::take(&mut waiting);
            is_behind = false;
            // However many texts there are, some ends are stored.
            if texts.write(ctx, Deadline::after(LONGEST / 2)).is_ok() {
                (left, is_behind) = store_all(ctx, left, &texts.claims(), deadline);
                is_behind |= !texts.is_empty();
            }
            is_behind |= tidy(ctx, deadline);
            // It sees the signalled keys as soon as it gets the lock back.
            server::wake_event_loop();
            left
        });
    }
}

/// Looks whether keys have been overwritten that are worked on, and some of those that are waited
/// for: as many as there is time for, others at every call.
fn look_at_keys() {
    const SOME: usize = 256;
    let (active, waited) = sync::watched();
    if active.is_empty() && waited == 0 {
        return;
    }
    with_server(|ctx| {
        let deadline = Deadline::after(LONGEST);
        for key in &active {
            sync::look(ctx, key);
        }
        for _ in 0..waited.div_ceil(SOME) {
            for key in waiters::some_keys(SOME) {
                sync::look(ctx, &key);
            }
            if deadline.is_past() {
                return;
            }
        }
    });
}

/// Stores what can be stored in one lock section, but for ends of claims that have text left: it goes
/// first. Gives the rest back, in its order, and whether only the time was too short for it.
fn store_all(
    ctx: &Context,
    commits: Vec<Commit>,
    telling: &HashSet<String>,
    deadline: Deadline,
) -> (Vec<Commit>, bool) {
    let mut left = Vec::new();
    let (mut is_refusing, mut is_late) = (false, false);
    let is_told = |commit: &Commit| match commit {
        Commit::Ended { lease, .. } => !telling.contains(lease.claim().token.as_str()),
        Commit::Started { .. } | Commit::Told => true,
    };
    for commit in commits {
        is_late = is_late || deadline.is_past();
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
        life::store(ctx, lease.key(), &attempt, &outcome, lease.claim().is_touched())
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

/// What nobody asks for, but must be done: of each a few, at least one; whether only the time was
/// too short for more.
fn tidy(ctx: &Context, deadline: Deadline) -> bool {
    if !can_write(ctx) {
        return false;
    }
    let all = || -> Result<bool, Refused> {
        // Claims that nobody holds are taken from their hashes.
        let mut is_late = tidy_some(&queue().unclaimed(), deadline, |(key, has_crashed)| {
            tidy_one(ctx, key, || life::unclaim(ctx, key, *has_crashed))
        })?;
        is_late |= tidy_some(&queue().expired(), deadline, |key| {
            tidy_one(ctx, key, || life::expire(ctx, key))
        })?;
        is_late |= tidy_some(&retained::surplus(), deadline, |key| {
            tidy_one(ctx, key, || drop_ended(ctx, key))
        })?;
        Ok(is_late)
    };
    // Where one write is refused to all, the next look is early enough.
    all().unwrap_or_default()
}

/// Whether some were left because of the time.
fn tidy_some<T>(
    some: &[T],
    deadline: Deadline,
    tidy: impl Fn(&T) -> Result<(), Refused>,
) -> Result<bool, Refused> {
    for (i, one) in some.iter().enumerate() {
        if i > 0 && deadline.is_past() {
            return Ok(true);
        }
        tidy(one)?;
    }
    Ok(false)
}

/// Drops an ended job that is over the budget.
fn drop_ended(ctx: &Context, key: &JobKey) -> Result<(), String> {
    if job::open(ctx, key).is_ok_and(|job| job.state.is_final()) {
        server::call(ctx, "UNLINK", &[&key.name])?;
        figures::TRIMMED.add(1);
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
