//! Keyspace and server events: they keep the scheduler and the waiters in step with the keys.
//!
//! Nothing is written from here; a write from a keyspace event is not allowed.

use redis_module::{Context, ContextFlags};

use crate::{
    ffi,
    job::{self, NoJob},
    retain,
    scheduler::{JobKey, Seen},
    state::{SHARED, schedule},
    waiters,
};

/// A key of the selected database has changed.
pub(crate) fn keyspace(ctx: &Context, event: &[u8], name: &[u8]) {
    let key = JobKey { db: ffi::selected_db(ctx), name: name.into() };
    match event {
        b"del" | b"expired" | b"evicted" | b"rename_from" | b"move_from" => gone(&key),
        // Events of our own, and of changes that leave the fields alone.
        b"expire" | b"persist" => {}
        _ if event.starts_with(b"florence.") => {}
        _ => refresh(ctx, &key),
    }
}

/// Reads what the key says now.
fn refresh(ctx: &Context, key: &JobKey) {
    match job::open(ctx, key) {
        Ok(job) => {
            // Read before the scheduler is locked: its lock is not held across calls to the server.
            let seen = job.seen();
            schedule(|scheduler| scheduler.observe(key, &seen));
            if job.state.is_final() {
                retain::note(key, &job);
                waiters::signal(ctx, key);
            } else {
                retain::forget(key);
            }
        }
        Err(NoJob::Missing | NoJob::WrongType | NoJob::Foreign) => gone(key),
    }
}

fn gone(key: &JobKey) {
    let was_known = SHARED.scheduler.lock().knows(key);
    if was_known {
        schedule(|scheduler| scheduler.observe(key, &Seen::Nothing));
    }
    retain::forget(key);
    waiters::release(key);
}

/// A database was flushed, or all (`None`).
pub(crate) fn flushed(db: Option<i32>) {
    schedule(|scheduler| scheduler.clear(db));
    retain::clear(db);
    waiters::release_databases(|waiting| db.is_none_or(|db| waiting == db));
}

pub(crate) fn swapped(first: i32, second: i32) {
    schedule(|scheduler| scheduler.swap(first, second));
    retain::swap(first, second);
    waiters::release_databases(|waiting| waiting == first || waiting == second);
}

/// Loading has begun: forget everything, the keys are about to be told again.
pub(crate) fn loading_started() {
    schedule(|scheduler| scheduler.set_enabled(false));
    flushed(None);
}

/// The role may have changed, or loading has ended: jobs run on a master only.
pub(crate) fn role_changed(ctx: &Context) {
    let flags = ctx.get_flags();
    let is_master = flags.contains(ContextFlags::MASTER) && !flags.contains(ContextFlags::LOADING);
    ctx.log_notice(if is_master {
        "florence: master, jobs run here"
    } else {
        "florence: replica or loading, jobs are only watched"
    });
    schedule(|scheduler| scheduler.set_enabled(is_master));
}
