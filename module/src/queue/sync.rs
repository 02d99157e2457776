//! Keyspace and server events: they keep the queue and the waiters in step with the keys.
//!
//! Nothing is written from a keyspace event, where it is not allowed.

use std::sync::atomic::{AtomicBool, Ordering};

use redis_module::{Context, ContextFlags};

use super::{owners, queue, retained, scheduler::Death, waiters};
use crate::{
    job::{self, Job, JobKey, Seen, life},
    server,
};

/// A key of the selected database has changed.
pub(crate) fn key_changed(ctx: &Context, event: &[u8], name: &[u8]) {
    let key = || JobKey { db: server::selected_db(ctx), name: name.into() };
    match event {
        // These leave the fields alone, or are our own.
        b"expire" | b"persist" => {}
        _ if event.starts_with(b"florence.") => {}
        // Inside MULTI, Valkey 9 tells of the client's database, not of the one that is written to.
        b"move_to" | b"copy_to" if ctx.get_flags().contains(ContextFlags::MULTI) => {
            server::in_each_db(ctx, |db| refresh(ctx, &JobKey { db, name: name.into() }));
        }
        _ if may_bring_job(event) => refresh(ctx, &key()),
        _ if is_idle() => {}
        b"del" | b"expired" | b"evicted" | b"rename_from" | b"move_from" => gone(&key()),
        _ => {
            let key = key();
            if is_known(&key) {
                refresh(ctx, &key);
            }
        }
    }
}

/// Whether a key may hold a job after an event that held none before.
fn may_bring_job(event: &[u8]) -> bool {
    event.starts_with(b"h")
        || matches!(event, b"loaded" | b"restore" | b"rename_to" | b"copy_to" | b"move_to")
}

/// Whether there is no key that anybody here cares for.
fn is_idle() -> bool {
    queue().scheduler.lock().is_empty() && waiters::count() == 0 && retained::is_empty()
}

fn is_known(key: &JobKey) -> bool {
    queue().scheduler.lock().knows(key) || waiters::has(key) || retained::has(key)
}

/// Takes over what the key says now.
pub(crate) fn refresh(ctx: &Context, key: &JobKey) {
    let Ok(job) = job::open(ctx, key) else { return gone(key) };
    // Read before the scheduler is locked: its lock is not held across calls to the server.
    let seen = job.seen(|token| queue().scheduler.lock().is_held(key, token));
    let death = match &seen {
        Seen::Claimed(claimed) => death(ctx, &claimed.owner),
        _ => Death::None,
    };
    observe(key, &seen, death);
    if job.state.is_final() {
        ended(ctx, key, &job);
    } else {
        retained::forget(key);
    }
}

fn observe(key: &JobKey, seen: &Seen, death: Death) {
    queue().change(|scheduler| scheduler.observe(key, seen, death));
}

fn ended(ctx: &Context, key: &JobKey, job: &Job) {
    retained::note(key, job);
    waiters::signal(ctx, key);
}

/// What became of the owner of a claim that a hash shows.
fn death(ctx: &Context, owner: &str) -> Death {
    let flags = ctx.get_flags();
    if owner == job::owner() {
        Death::None
    } else if !flags.contains(ContextFlags::MASTER) {
        Death::Unknown
    } else if !flags.contains(ContextFlags::LOADING) {
        // It came here from a server that may well live: migrated, restored, written by hand.
        Death::None
    } else {
        crash_unless_ended_well(owner)
    }
}

fn crash_unless_ended_well(owner: &str) -> Death {
    if owners::ended_well(owner) { Death::None } else { Death::Crash }
}

/// Keys that are looked at from time to time: those that are worked on or waited for may have been
/// overwritten by a value of another type, of which no event tells. Others are found out when they
/// are claimed.
pub(crate) fn watched() -> Vec<JobKey> {
    /// Of the keys that are waited for, at a time.
    const MOST: usize = 256;
    let mut keys = queue().scheduler.lock().active_keys();
    keys.extend(waiters::some_keys(MOST));
    keys
}

/// Finds out whether a key still holds a job.
pub(crate) fn look(ctx: &Context, key: &JobKey) {
    if job::open(ctx, key).is_err() {
        gone(key);
    }
}

fn gone(key: &JobKey) {
    let is_known = queue().scheduler.lock().knows(key);
    if is_known {
        observe(key, &Seen::Nothing, Death::None);
    }
    retained::forget(key);
    waiters::release(key);
}

/// A database was flushed, or all (`None`).
pub(crate) fn flushed(db: Option<i32>) {
    queue().change(|scheduler| scheduler.clear(db));
    retained::clear(db);
    waiters::release_databases(|waiting| db.is_none_or(|db| waiting == db));
}

pub(crate) fn swapped(first: i32, second: i32) {
    queue().change(|scheduler| scheduler.swap(first, second));
    retained::swap(first, second);
    waiters::release_databases(|waiting| waiting == first || waiting == second);
}

/// Loading has begun: forget everything, the keys are about to be told again.
pub(crate) fn loading_started() {
    queue().change(|scheduler| scheduler.set_enabled(false));
    flushed(None);
}

/// Whether the master was lost before this server took its place: then it died, as far as one can
/// tell, and otherwise it gave its place up.
static IS_LINK_LOST: AtomicBool = AtomicBool::new(true);

/// The link to the master came up, or went down.
pub(crate) fn link_changed(ctx: &Context, is_up: bool) {
    if is_up {
        IS_LINK_LOST.store(false, Ordering::Relaxed);
        return;
    }
    // A server that is promoted drops its link in the same turn of the event loop.
    server::on_event_loop(ctx, |ctx| {
        if !ctx.get_flags().contains(ContextFlags::MASTER) {
            IS_LINK_LOST.store(true, Ordering::Relaxed);
        }
    });
}

/// The server has become a master or a replica.
pub(crate) fn role_changed(ctx: &Context) {
    take_role(ctx);
    if !ctx.get_flags().contains(ContextFlags::MASTER) {
        // Until the new link is up.
        IS_LINK_LOST.store(true, Ordering::Relaxed);
    }
}

/// Jobs run on a master only, and only when its data set is loaded.
pub(crate) fn take_role(ctx: &Context) {
    let flags = ctx.get_flags();
    let is_master = flags.contains(ContextFlags::MASTER) && !flags.contains(ContextFlags::LOADING);
    server::tell(if is_master {
        "master, jobs run here"
    } else {
        "replica or loading, jobs are only watched"
    });
    let has_crashed = IS_LINK_LOST.load(Ordering::Relaxed);
    queue().change(|scheduler| {
        scheduler.set_enabled(is_master);
        if is_master {
            scheduler.judge(
                |owner| {
                    if has_crashed { crash_unless_ended_well(owner) } else { Death::None }
                },
            );
        }
    });
}

/// The server ends in an orderly way: nothing is taken any more, and what is at work is no suspect.
///
/// The server's files are written by now, so this start of it leaves its name beside them. Replicas
/// still hear of writes, and are told that nobody works on these jobs, unless writes are paused
/// because a replica lags.
pub(crate) fn shutdown(ctx: &Context) {
    queue().shut();
    let claimed = queue().scheduler.lock().claimed();
    if claimed.is_empty() {
        return;
    }
    owners::end_well();
    for key in claimed.iter().take_while(|_| server::can_write(ctx)) {
        let _ = life::unclaim(ctx, key, false);
    }
}
