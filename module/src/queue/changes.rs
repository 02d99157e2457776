//! Keys that may have become jobs without a command of ours: written by HSET, restored, renamed.
//!
//! Whoever writes other hashes must not pay for us. So the key of such an event is only noted, and
//! looked at a little later. In a flood of events most are not even noted; then the whole keyspace
//! is searched once, slowly.

use std::{
    hash::{BuildHasher, RandomState},
    sync::LazyLock,
    time::{Duration, Instant},
};

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
/// Places for the digests of noted keys; a power of two.
const PLACES: usize = 1024;

struct Changes {
    noted: Vec<JobKey>,
    /// Digests of keys that need not be noted again, each in a place that it determines.
    digests: Box<[u64; PLACES]>,
    hasher: RandomState,
    /// There were more.
    has_more: bool,
    /// When there were more for the last time.
    flooded: Option<Instant>,
}

static CHANGES: LazyLock<Mutex<Changes>> = LazyLock::new(|| {
    Mutex::new(Changes {
        noted: Vec::new(),
        digests: Box::new([0; PLACES]),
        hasher: RandomState::new(),
        has_more: false,
        flooded: None,
    })
});

impl Changes {
    /// Whether this is the first key since the last look.
    fn note(&mut self, key: KeyRef<'_>) -> bool {
        let digest = self.hasher.hash_one(key);
        let place = usize::try_from(digest % PLACES as u64).unwrap_or_default();
        let is_first = self.noted.is_empty();
        if std::mem::replace(&mut self.digests[place], digest) == digest {
            return false;
        }
        if self.noted.len() < MOST {
            self.noted.push(key.to_key());
        } else if !std::mem::replace(&mut self.has_more, true) {
            self.flooded = Some(Instant::now());
        }
        is_first
    }

    /// What was noted, and whether there was more.
    fn take(&mut self) -> (Vec<JobKey>, bool) {
        self.digests.fill(0);
        (std::mem::take(&mut self.noted), std::mem::take(&mut self.has_more))
    }
}

/// A key may hold a job now.
pub(super) fn note(ctx: &Context, key: KeyRef<'_>) {
    if CHANGES.lock().note(key) {
        server::after(ctx, LATER, look);
    }
}

/// Whether there are more changes just now than can be noted.
pub(crate) fn are_many() -> bool {
    CHANGES.lock().flooded.is_some_and(|at| at.elapsed() < 10 * LATER)
}

fn look(ctx: &Context) {
    let (noted, has_more) = CHANGES.lock().take();
    for key in noted {
        sync::refresh(ctx, &key);
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
    fn a_key_is_noted_once_between_two_looks_and_a_flood_in_part() {
        let mut changes = Changes {
            noted: Vec::new(),
            digests: Box::new([0; PLACES]),
            hasher: RandomState::new(),
            has_more: false,
            flooded: None,
        };
        let key = |name| KeyRef { db: Db(0), name };
        assert!(changes.note(key(b"a")));
        assert!(!changes.note(key(b"a")) && !changes.note(key(b"b")));
        let (noted, has_more) = changes.take();
        assert_eq!(noted, [key(b"a").to_key(), key(b"b").to_key()]);
        assert!(!has_more);
        let names: Vec<String> = (0..10_000).map(|i| i.to_string()).collect();
        for name in &names {
            changes.note(key(name.as_bytes()));
        }
        let (noted, has_more) = changes.take();
        assert_eq!((noted.len(), has_more), (MOST, true));
        assert!(changes.note(key(b"0")));
        assert_eq!(changes.take(), (vec![key(b"0").to_key()], false));
    }
}
