//! Keys that may have become jobs without a command of ours: written by HSET, restored, renamed.
//!
//! Whoever writes other hashes must not pay for us. So the key of such an event is only noted, and
//! looked at a little later. In a flood of events most are not even noted; then the whole keyspace
//! is searched once, slowly.

use std::{
    hash::BuildHasher,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use redis_module::Context;

use super::{
    search::{self, Haste},
    sync,
};
use crate::{
    job::{JobKey, KeyRef},
    server,
};

/// How long after the first event the noted keys are looked at.
const LATER: Duration = Duration::from_millis(20);
/// Keys that are noted in that time.
const MOST: usize = 256;
/// Places for the digests of keys.
const PLACES: usize = 1024;

/// Digests of keys that need not be noted again, each in a place that it determines. Touched under
/// the server's lock only.
struct Digests([AtomicU64; PLACES]);

impl Digests {
    /// Whether a key's digest is new.
    fn insert(&self, digest: u64) -> bool {
        let place = &self.0[usize::try_from(digest % PLACES as u64).unwrap_or_default()];
        let is_new = place.load(Ordering::Relaxed) != digest;
        if is_new {
            place.store(digest, Ordering::Relaxed);
        }
        is_new
    }

    fn clear(&self) {
        self.0.iter().for_each(|place| place.store(0, Ordering::Relaxed));
    }
}

#[derive(Default)]
struct Changes {
    noted: Vec<JobKey>,
    /// There were more.
    has_more: bool,
    /// When there were more for the last time.
    flooded: Option<Instant>,
}

static DIGESTS: Digests = Digests([const { AtomicU64::new(0) }; PLACES]);
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::default);
static CHANGES: Mutex<Changes> =
    Mutex::new(Changes { noted: Vec::new(), has_more: false, flooded: None });

impl Changes {
    /// Whether this is the first key since the last look.
    fn note(&mut self, key: KeyRef<'_>) -> bool {
        let is_first = self.noted.is_empty();
        if self.noted.len() < MOST {
            self.noted.push(key.to_key());
        } else if !std::mem::replace(&mut self.has_more, true) {
            self.flooded = Some(Instant::now());
        }
        is_first
    }

    /// What was noted, and whether there was more.
    fn take(&mut self) -> (Vec<JobKey>, bool) {
        (std::mem::take(&mut self.noted), std::mem::take(&mut self.has_more))
    }
}

/// A key may hold a job now.
pub(super) fn note(ctx: &Context, key: KeyRef<'_>) {
    if DIGESTS.insert(HASHER.hash_one(key)) && CHANGES.lock().note(key) {
        server::after(ctx, LATER, look);
    }
}

/// Whether there are more changes just now than can be noted.
pub(crate) fn are_many() -> bool {
    CHANGES.lock().flooded.is_some_and(|at| at.elapsed() < 10 * LATER)
}

fn look(ctx: &Context) {
    DIGESTS.clear();
    let (noted, has_more) = CHANGES.lock().take();
    for key in noted {
        sync::refresh_guarded(ctx, &key);
    }
    if has_more {
        search::want(Haste::Later);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Db;

    #[test]
    fn a_flood_is_noted_in_part() {
        let mut changes = Changes::default();
        let key = |name| KeyRef { db: Db(0), name };
        assert!(changes.note(key(b"a")));
        assert!(!changes.note(key(b"b")));
        assert_eq!(changes.take(), (vec![key(b"a").to_key(), key(b"b").to_key()], false));
        for _ in 0..=MOST {
            changes.note(key(b"c"));
        }
        let (noted, has_more) = changes.take();
        assert_eq!((noted.len(), has_more), (MOST, true));
        assert!(changes.note(key(b"0")));
        assert_eq!(changes.take(), (vec![key(b"0").to_key()], false));
    }

    #[test]
    fn a_digest_is_new_until_it_was_seen_and_after_a_look() {
        let digests = Digests([const { AtomicU64::new(0) }; PLACES]);
        assert!(digests.insert(5) && !digests.insert(5));
        // Another takes its place.
        assert!(digests.insert(5 + PLACES as u64) && digests.insert(5));
        digests.clear();
        assert!(digests.insert(5));
    }
}
