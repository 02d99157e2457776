//! Clients blocked in FLORENCE.WAIT.
//!
//! They are blocked on their keys, so the server itself redirects them when a slot moves and fails
//! them over; this registry lets us wake them for what Redis does not tell: a hash that ends or
//! vanishes. Touched only under the server's lock.

use std::collections::HashMap;

use parking_lot::Mutex;
use redis_module::Context;

use crate::{job::JobKey, server};

#[derive(Default)]
struct Waiters {
    clients: HashMap<u64, (server::BlockedClient, Vec<JobKey>)>,
    /// Which clients wait for a key.
    by_key: HashMap<JobKey, Vec<u64>>,
    ids: u64,
    /// Where the next look at the keys begins.
    turn: usize,
}

static WAITERS: Mutex<Option<Waiters>> = Mutex::new(None);

fn with<T>(f: impl FnOnce(&mut Waiters) -> T) -> T {
    f(WAITERS.lock().get_or_insert_default())
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
        for key in &keys {
            waiters.by_key.entry(key.clone()).or_default().push(id);
        }
        waiters.clients.insert(id, (client, keys));
    });
}

/// The server is done with a client: it was served, timed out, left or was unblocked.
pub(crate) fn remove(id: u64) {
    with(|waiters| {
        let Some((_, keys)) = waiters.clients.remove(&id) else { return };
        for key in keys {
            if let Some(ids) = waiters.by_key.get_mut(&key) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    waiters.by_key.remove(&key);
                }
            }
        }
    });
}

/// Whether somebody waits for a key.
pub(super) fn has(key: &JobKey) -> bool {
    with(|waiters| waiters.by_key.contains_key(key))
}

/// Some of the keys that somebody waits for, others at every call.
pub(super) fn some_keys(most: usize) -> Vec<JobKey> {
    with(|waiters| {
        let start = if waiters.turn < waiters.by_key.len() { waiters.turn } else { 0 };
        waiters.turn = start + most;
        waiters.by_key.keys().skip(start).take(most).cloned().collect()
    })
}

/// A job has ended: the server is to ask its waiters' reply callback.
pub(crate) fn signal(ctx: &Context, key: &JobKey) {
    if has(key) {
        server::signal_key(ctx, &key.name);
    }
}

/// A key has gone: those who wait for nothing else are answered null.
pub(crate) fn release(key: &JobKey) {
    release_all(|waiters| {
        waiters.by_key.get_key_value(key).map(|(key, _)| key.clone()).into_iter().collect()
    });
}

/// As [`release`], for all keys of some databases.
pub(crate) fn release_databases(is_gone: impl Fn(i32) -> bool) {
    release_all(|waiters| waiters.by_key.keys().filter(|key| is_gone(key.db)).cloned().collect());
}

fn release_all(gone: impl FnOnce(&Waiters) -> Vec<JobKey>) {
    let freed = with(|waiters| {
        let gone = gone(waiters);
        let mut freed = Vec::new();
        for key in gone {
            for id in waiters.by_key.remove(&key).unwrap_or_default() {
                if let Some((client, keys)) = waiters.clients.get_mut(&id) {
                    keys.retain(|other| *other != key);
                    if keys.is_empty() {
                        freed.push(*client);
                    }
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
