//! Keyspace and server events: they keep the queue and the waiters in step with the keys.
//!
//! Nothing is written from a keyspace event, where it is not allowed.

use std::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use redis_module::{Context, ContextFlags};

use super::{
    changes, ended, owners, queue, retained,
    scheduler::Death,
    search::{self, Haste, Search},
    waiters,
};
use crate::{
    job::{self, JobKey, KeyRef, Seen, life},
    server::{self, Aside, Db},
};

/// Which data a server has just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Data {
    Ready,
    /// They are being loaded: their jobs are looked for when all are there, which keeps the load
    /// quick.
    Loading,
    /// They are there, and not all of their jobs are known yet.
    Adopting,
    /// New data are being loaded beside the old ones, which still answer.
    LoadingAside,
}

static DATA: AtomicU8 = AtomicU8::new(Data::Ready as u8);

fn is_now(data: Data) -> bool {
    DATA.load(Ordering::Relaxed) == data as u8
}

fn set_data(data: Data) {
    DATA.store(data as u8, Ordering::Relaxed);
}

/// A hash of the selected database has been written.
pub(crate) fn hash_changed(ctx: &Context, name: &[u8]) {
    if is_now(Data::Loading) {
        return;
    }
    let key = KeyRef { db: server::selected_db(ctx), name };
    if is_known(key) {
        refresh(ctx, &key.to_key());
    } else {
        changes::note(ctx, key);
    }
}

/// Something else has happened to a key of the selected database.
pub(crate) fn key_changed(ctx: &Context, event: &[u8], name: &[u8]) {
    match event {
        // These leave the fields alone, or are our own.
        b"expire" | b"persist" => return,
        _ if event.starts_with(b"florence.") || is_now(Data::Loading) => return,
        // Inside MULTI, Valkey 9 tells of the client's database, not of the one that is written to.
        b"move_to" | b"copy_to" if ctx.get_flags().contains(ContextFlags::MULTI) => {
            return server::in_each_db(ctx, |db| changed(ctx, event, KeyRef { db, name }));
        }
        _ => {}
    }
    changed(ctx, event, KeyRef { db: server::selected_db(ctx), name });
}

fn changed(ctx: &Context, event: &[u8], key: KeyRef<'_>) {
    match (is_known(key), takes_key(event)) {
        (true, true) => gone(key),
        (true, false) => refresh(ctx, &key.to_key()),
        (false, true) => ended::forget(key),
        (false, false) if may_bring_job(event) => changes::note(ctx, key),
        (false, false) => {}
    }
}

/// Whether there is nothing under a key after an event.
fn takes_key(event: &[u8]) -> bool {
    matches!(event, b"del" | b"expired" | b"evicted" | b"rename_from" | b"move_from")
}

/// Whether a key may hold a job after an event that held none before.
fn may_bring_job(event: &[u8]) -> bool {
    matches!(event, b"restore" | b"rename_to" | b"copy_to" | b"move_to")
}

/// Whether anybody here cares for a key.
pub(crate) fn is_known(key: KeyRef<'_>) -> bool {
    queue().knows(key) || waiters::has(key) || retained::has(key)
}

/// Takes over a key that a command has come across, unless it is known.
pub(crate) fn meet(ctx: &Context, key: KeyRef<'_>) {
    if !is_known(key) {
        refresh(ctx, &key.to_key());
    }
}

/// As [`refresh`]; a key that makes it panic keeps nobody from the next.
pub(super) fn refresh_guarded(ctx: &Context, key: &JobKey) {
    let who = || format!("a look at key '{}'", server::printable(&key.name));
    let _ = server::catch(who, || refresh(ctx, key));
}

/// Takes over what the key says now.
pub(crate) fn refresh(ctx: &Context, key: &JobKey) {
    let Ok(job) = job::open(ctx, key) else { return gone(key.as_ref()) };
    // Read before the scheduler is locked: its lock is not held across calls to the server.
    let seen = job.seen(|token| queue().scheduler.lock().is_held(key, token));
    let death = match &seen {
        Seen::Claimed(claimed) => death(ctx, &claimed.owner),
        _ => Death::None,
    };
    observe(key, &seen, death);
    waiters::came_back(key.as_ref());
    if job.state.is_final() {
        retained::note(ctx, key, &job);
        ended::note(key, &job);
        waiters::signal(ctx, key.as_ref());
    } else {
        retained::forget(key.as_ref());
        ended::forget(key.as_ref());
    }
}

/// Takes over a job that has just been written.
pub(crate) fn created(key: &JobKey, seen: &Seen) {
    observe(key, seen, Death::None);
}

fn observe(key: &JobKey, seen: &Seen, death: Death) {
    queue().change(|scheduler| scheduler.observe(key, seen, death));
}

/// What became of the owner of a claim that a hash shows.
fn death(ctx: &Context, owner: &str) -> Death {
    let flags = ctx.get_flags();
    if owner == job::owner() {
        Death::None
    } else if !flags.contains(ContextFlags::MASTER) {
        Death::Unknown
    } else if !is_now(Data::Adopting) || !IS_LINK_LOST.load(Ordering::Relaxed) {
        // It came here from a server that may well live: migrated, restored, written by hand.
        Death::None
    } else {
        crash_unless_ended_well(owner)
    }
}

fn crash_unless_ended_well(owner: &str) -> Death {
    if owners::ended_well(owner) { Death::None } else { Death::Crash }
}

/// Keys that are looked at from time to time: those that are worked on, and how many there are that
/// are waited for ([`waiters::some_keys`]). They may have been overwritten by a value of another type, of which no event tells. Others
/// are found out when they are claimed.
pub(crate) fn watched() -> (Vec<JobKey>, usize) {
    (queue().scheduler.lock().active_keys(), waiters::keys())
}

/// A job has ended, and what it needs no more was taken from its hash, of which no event tells us:
/// it takes less of the budget for ended jobs.
pub(crate) fn settled(ctx: &Context, key: &JobKey) {
    if retained::has(key.as_ref()) {
        refresh(ctx, key);
    }
}

/// Finds out whether a key still holds a job.
pub(crate) fn look(ctx: &Context, key: &JobKey) {
    if job::open(ctx, key).is_err() {
        gone(key.as_ref());
    }
}

fn gone(key: KeyRef<'_>) {
    let is_known = queue().scheduler.lock().knows(key);
    if is_known {
        observe(&key.to_key(), &Seen::Nothing, Death::None);
    }
    retained::forget(key);
    ended::forget(key);
    waiters::release(key);
}

/// A database was flushed, or all (`None`).
pub(crate) fn flushed(db: Option<Db>) {
    /// To free a million of them takes longer than the main thread has.
    const MANY: usize = 1000;
    let jobs = queue().change(|scheduler| scheduler.clear(db));
    let (retained, ended) = (retained::clear(db), ended::clear(db));
    waiters::release_databases(|waiting| db.is_none_or(|db| waiting == db));
    let listed: usize = ended.iter().map(ended::Ended::len).sum();
    if jobs.waiting() + retained.len() + listed > MANY {
        let freed = thread::Builder::new().spawn(move || drop((jobs, retained, ended)));
        // Where there is no thread, they were freed here.
        drop(freed);
    }
}

/// Other numbers lead to two databases: their clients wait for other keys than they asked for.
pub(crate) fn swapped(first: Db, second: Db) {
    // A database with itself: nothing has changed.
    if first == second {
        return;
    }
    waiters::release_databases(|waiting| waiting == first || waiting == second);
}

/// Loading has begun: forget everything.
pub(crate) fn loading_started() {
    if is_now(Data::LoadingAside) {
        return;
    }
    set_data(Data::Loading);
    queue().change(|scheduler| scheduler.set_enabled(false));
    flushed(None);
}

/// On the first turn of the event loop after loading.
pub(crate) fn loading_ended(ctx: &Context) {
    if is_now(Data::Loading) {
        adopt(ctx);
    }
}

/// Takes over the jobs of a data set. Those of a small one are known before the first client asks.
fn adopt(ctx: &Context) {
    const AT_ONCE: Duration = Duration::from_millis(50);
    set_data(Data::Adopting);
    LOADS.fetch_add(1, Ordering::Relaxed);
    take_role(ctx);
    if Search::new(ctx).run_for(ctx, AT_ONCE) {
        search::want(Haste::Now);
    } else {
        adopted(loads());
    }
}

/// Data sets that were loaded.
static LOADS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn loads() -> u64 {
    LOADS.load(Ordering::Relaxed)
}

/// All jobs of the data set are known, if it is still the one that was loaded then.
pub(crate) fn adopted(load: u64) {
    if is_now(Data::Adopting) && load == loads() {
        set_data(Data::Ready);
    }
}

/// A replica loads new data beside the old ones.
pub(crate) fn loading_aside(ctx: &Context, step: Aside) {
    match step {
        Aside::Started => set_data(Data::LoadingAside),
        Aside::Aborted => set_data(Data::Ready),
        Aside::Completed => {
            flushed(None);
            adopt(ctx);
        }
    }
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
