//! Clients blocked in FLORENCE.WAIT.
//!
//! They are blocked on their keys, so the server itself redirects them when a slot moves and fails
//! them over; this registry lets us wake them for what Redis does not tell: a hash that ends or
//! vanishes. Touched only under the server's lock.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use redis_module::Context;

use crate::{
    job::{JobKey, KeyMap, KeyRef},
    server::{self, Db},
};

struct Waiter {
    client: server::BlockedClient,
    keys: Vec<JobKey>,
    /// Those of its keys that are still there.
    left: usize,
}

#[derive(Default)]
struct Waiters {
    clients: HashMap<u64, Waiter>,
    /// Which clients wait for a key.
    by_key: KeyMap<HashSet<u64>>,
    ids: u64,
    /// Where the next look at the keys begins.
    turn: usize,
}

static WAITERS: Mutex<Option<Waiters>> = Mutex::new(None);

/// Keys that somebody waits for; who only asks whether there are any takes no lock.
static KEYS: AtomicUsize = AtomicUsize::new(0);

fn with<T>(f: impl FnOnce(&mut Waiters) -> T) -> T {
    let mut waiters = WAITERS.lock();
    let waiters = waiters.get_or_insert_default();
    let result = f(waiters);
    KEYS.store(waiters.by_key.len(), Ordering::Relaxed);
    result
}

/// A number for a client that is about to be blocked.
pub(crate) fn next_id() -> u64 {
    with(|waiters| {
        waiters.ids += 1;
        waiters.ids
    })
}

/// Remembers a blocked client.
pub(crate) fn add(id: u64, client: server::BlockedClient, keys: Vec<JobKey>) {
    with(|waiters| {
        let is_new = |key: &&JobKey| waiters.by_key.entry((*key).clone()).or_default().insert(id);
        let left = keys.iter().filter(is_new).count();
        waiters.clients.insert(id, Waiter { client, keys, left });
    });
}

/// The server is done with a client: it was served, timed out, left or was unblocked.
pub(crate) fn remove(id: u64) {
    with(|waiters| {
        let Some(waiter) = waiters.clients.remove(&id) else { return };
        for key in waiter.keys {
            if let Some(ids) = waiters.by_key.get_mut(&key) {
                ids.remove(&id);
                if ids.is_empty() {
                    waiters.by_key.swap_remove(&key);
                }
            }
        }
    });
}

/// Whether somebody waits for a key.
pub(super) fn has(key: KeyRef<'_>) -> bool {
    KEYS.load(Ordering::Relaxed) > 0 && with(|waiters| waiters.by_key.contains_key(&key))
}

/// Some of the keys that somebody waits for, others at every call.
pub(super) fn some_keys(most: usize) -> Vec<JobKey> {
    with(|waiters| {
        let start = if waiters.turn < waiters.by_key.len() { waiters.turn } else { 0 };
        waiters.turn = start + most;
        let some = start..waiters.turn.min(waiters.by_key.len());
        some.filter_map(|i| waiters.by_key.get_index(i).map(|(key, _)| key.clone())).collect()
    })
}

/// A job has ended: the server is to ask its waiters' reply callback.
pub(super) fn signal(ctx: &Context, key: KeyRef<'_>) {
    if has(key) {
        server::signal_key(ctx, key.name);
    }
}

/// A key has gone: those who wait for nothing else are answered null.
pub(super) fn release(key: KeyRef<'_>) {
    release_all(|waiters| waiters.by_key.swap_remove(&key).into_iter().collect());
}

/// As [`release`], for all keys of some databases.
pub(super) fn release_databases(is_gone: impl Fn(Db) -> bool) {
    release_all(|waiters| {
        let (gone, left): (KeyMap<_>, KeyMap<_>) =
            std::mem::take(&mut waiters.by_key).into_iter().partition(|(key, _)| is_gone(key.db));
        waiters.by_key = left;
        gone.into_values().collect()
    });
}

/// Frees the clients that have no key left, when those of `gone` have one less.
fn release_all(gone: impl FnOnce(&mut Waiters) -> Vec<HashSet<u64>>) {
    let freed = with(|waiters| {
        let mut freed = Vec::new();
        for id in gone(waiters).into_iter().flatten() {
            if let Some(waiter) = waiters.clients.get_mut(&id) {
                waiter.left -= 1;
                if waiter.left == 0 {
                    freed.push(waiter.client);
                }
            }
        }
        freed
    });
    for client in freed {
        server::unblock(client);
    }
}

/// Blocked clients.
pub(crate) fn count() -> usize {
    with(|waiters| waiters.clients.len())
}
