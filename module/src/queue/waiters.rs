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
    /// Each once.
    keys: HashSet<JobKey>,
    /// Those of its keys under which there is no job now; one may come back.
    gone: HashSet<JobKey>,
    /// The server has been told to let it go.
    is_freed: bool,
}

impl Waiter {
    /// A key of it has gone; the client, if there is no other left.
    fn lose(&mut self, key: KeyRef<'_>) -> Option<server::BlockedClient> {
        self.gone.insert(key.to_key());
        if self.gone.len() == self.keys.len() { self.free() } else { None }
    }

    /// The client, which is to be let go of; once.
    fn free(&mut self) -> Option<server::BlockedClient> {
        (!std::mem::replace(&mut self.is_freed, true)).then_some(self.client)
    }
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

impl Waiters {
    /// What `f` makes of those who wait for a key.
    fn each<T>(&mut self, key: KeyRef<'_>, f: impl Fn(&mut Waiter) -> Option<T>) -> Vec<T> {
        let Self { clients, by_key, .. } = self;
        let ids = by_key.get(&key).into_iter().flatten();
        ids.filter_map(|id| f(clients.get_mut(id)?)).collect()
    }
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
        let keys: HashSet<JobKey> = keys.into_iter().collect();
        for key in &keys {
            waiters.by_key.entry(key.clone()).or_default().insert(id);
        }
        let waiter = Waiter { client, keys, gone: HashSet::new(), is_freed: false };
        waiters.clients.insert(id, waiter);
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

/// How many keys somebody waits for.
pub(super) fn keys() -> usize {
    KEYS.load(Ordering::Relaxed)
}

/// Whether somebody waits for a key.
pub(super) fn has(key: KeyRef<'_>) -> bool {
    keys() > 0 && with(|waiters| waiters.by_key.contains_key(&key))
}

/// Some of the keys that somebody waits for, others at every call.
pub(crate) fn some_keys(most: usize) -> Vec<JobKey> {
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
    if has(key) {
        unblock(with(|waiters| waiters.each(key, |waiter| waiter.lose(key))));
    }
}

/// There is a job under a key: it may have gone before, and some still wait for another.
pub(super) fn came_back(key: KeyRef<'_>) {
    if has(key) {
        let regain = |waiter: &mut Waiter| {
            let has_lost = !waiter.gone.is_empty();
            has_lost.then(|| waiter.gone.remove(&key.to_key()))
        };
        with(|waiters| waiters.each(key, regain));
    }
}

/// As [`release`], for all keys of some databases.
pub(super) fn release_databases(is_gone: impl Fn(Db) -> bool) {
    let freed = with(|waiters| {
        // Each client waits in one database.
        let waits_there = |waiter: &&mut Waiter| waiter.keys.iter().any(|key| is_gone(key.db));
        waiters.clients.values_mut().filter(waits_there).filter_map(Waiter::free).collect()
    });
    unblock(freed);
}

fn unblock(freed: Vec<server::BlockedClient>) {
    freed.into_iter().for_each(server::unblock);
}

/// Blocked clients.
pub(crate) fn count() -> usize {
    with(|waiters| waiters.clients.len())
}
