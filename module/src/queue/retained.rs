//! The budget for ended jobs: over `florence.retain-bytes` the oldest ones go first.
//!
//! A cache of the keyspace like the scheduler, and kept only where a budget is set.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use redis_module::Context;

use crate::{
    job::{Job, JobKey, KeyMap, KeyRef},
    server::{self, Db},
    settings,
};

#[derive(Default)]
pub(super) struct Retained {
    /// When a job ended and what it takes.
    jobs: KeyMap<(i64, u64)>,
    by_age: BTreeSet<(i64, JobKey)>,
    bytes: u64,
}

static RETAINED: Mutex<Option<Retained>> = Mutex::new(None);

/// What a hash takes besides its fields' own bytes, roughly.
const HASH_BYTES: u64 = 400;

impl Retained {
    /// Ended jobs that are known.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    fn forget(&mut self, key: KeyRef<'_>) {
        if let Some((key, (ended, bytes))) = self.jobs.swap_remove_entry(&key) {
            self.by_age.remove(&(ended, key));
            self.bytes -= bytes;
        }
    }

    fn note(&mut self, key: &JobKey, ended: i64, bytes: u64) {
        self.forget(key.as_ref());
        self.jobs.insert(key.clone(), (ended, bytes));
        self.by_age.insert((ended, key.clone()));
        self.bytes += bytes;
    }

    fn surplus(&self, budget: u64, most: usize) -> Vec<JobKey> {
        let mut left = self.bytes;
        let oldest = self.by_age.iter().take_while(|(_, key)| {
            let is_over = left > budget;
            left -= self.jobs.get(key).map_or(0, |(_, bytes)| *bytes);
            is_over
        });
        oldest.take(most).map(|(_, key)| key.clone()).collect()
    }
}

fn with<T: Default>(f: impl FnOnce(&mut Retained, u64) -> T) -> T {
    match settings::RETAIN_BYTES.get() {
        0 => T::default(),
        budget => f(RETAINED.lock().get_or_insert_default(), budget),
    }
}

/// A job has ended, or changed after that.
pub(super) fn note(ctx: &Context, key: &JobKey, job: &Job) {
    if settings::RETAIN_BYTES.get() == 0 {
        return;
    }
    let ended = job.number("finished_at").unwrap_or_default();
    let fields = ["result", "text", "image", "prompt", "error"];
    let bytes = fields.iter().map(|field| job.length(field)).sum::<u64>();
    // To read a picture is to copy it.
    let picture = |field: &str| {
        let length = server::integer(ctx, "HSTRLEN", &[&key.name, field.as_bytes()]);
        length.ok().flatten().map_or(0, i64::unsigned_abs)
    };
    let bytes = bytes + picture("data") + picture("thumbnail");
    with(|retained, _| retained.note(key, ended, bytes + key.name.len() as u64 + HASH_BYTES));
}

/// A key holds no ended job any more.
pub(super) fn forget(key: KeyRef<'_>) {
    with(|retained, _| retained.forget(key));
}

/// A database was flushed, or all (`None`): what is forgotten.
pub(super) fn clear(db: Option<Db>) -> Retained {
    with(|retained, _| {
        let Some(db) = db else { return std::mem::take(retained) };
        let goes = |key: &&JobKey| key.db == db;
        // Each that is looked up takes time: those that go are, or those that stay.
        if 2 * retained.jobs.keys().filter(goes).count() <= retained.len() {
            for key in retained.jobs.keys().filter(goes).cloned().collect::<Vec<_>>() {
                retained.forget(key.as_ref());
            }
            return Retained::default();
        }
        let gone = std::mem::take(retained);
        for (key, (ended, bytes)) in gone.jobs.iter().filter(|(key, _)| !goes(key)) {
            retained.note(key, *ended, *bytes);
        }
        gone
    })
}

/// Some of the oldest ended jobs, as long as there are too many.
pub(crate) fn surplus() -> Vec<JobKey> {
    with(|retained, budget| retained.surplus(budget, 256))
}

/// Whether a key is known to hold an ended job.
pub(super) fn has(key: KeyRef<'_>) -> bool {
    with(|retained, _| retained.jobs.contains_key(&key))
}

/// What the ended jobs take; 0 without a budget.
pub(crate) fn bytes() -> u64 {
    with(|retained, _| retained.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_until_the_rest_fits() {
        let mut retained = Retained::default();
        let key = |name: &str| JobKey { db: Db(0), name: name.as_bytes().into() };
        for (name, ended, bytes) in [("new", 3, 10), ("old", 1, 10), ("middle", 2, 10)] {
            retained.note(&key(name), ended, bytes);
        }
        assert!(retained.surplus(30, 9).is_empty());
        assert_eq!(retained.surplus(20, 9), [key("old")]);
        assert_eq!(retained.surplus(15, 9), [key("old"), key("middle")]);
        assert_eq!(retained.surplus(0, 2).len(), 2);
        retained.forget(key("old").as_ref());
        retained.note(&key("new"), 3, 1);
        assert_eq!(retained.bytes, 11);
    }
}
