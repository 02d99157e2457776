//! Jobs of which no event told: those of a data set that was loaded, those that were there before the
//! module, those in a flood of other events. All keys are looked at, slice by slice.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use redis_module::Context;

use super::sync;
use crate::{
    job::JobKey,
    server::{self, Db, Scan},
};

/// A walk over all keys.
pub(crate) struct Search {
    /// The databases that are yet to come.
    left: Vec<Db>,
    /// The one that is looked at.
    scan: Option<(Db, Scan)>,
}

impl Search {
    pub(crate) fn new(ctx: &Context) -> Self {
        let mut left = Vec::new();
        server::in_each_db(ctx, |db| left.push(db));
        left.reverse();
        Self { left, scan: None }
    }

    /// Looks at the next keys; whether there may be more.
    pub(crate) fn step(&mut self, ctx: &Context) -> bool {
        /// About so many keys.
        const SLICE: usize = 50;
        if self.scan.is_none() {
            let Some(db) = self.left.pop() else { return false };
            self.scan = Some((db, Scan::new(db)));
        }
        let Some((db, scan)) = &mut self.scan else { return false };
        match scan.next(ctx, SLICE) {
            Some(names) => {
                for name in names {
                    sync::refresh_guarded(ctx, &JobKey { db: *db, name: name.into() });
                }
            }
            None => self.scan = None,
        }
        true
    }

    /// Looks at keys for some time; whether there may be more.
    pub(super) fn run_for(&mut self, ctx: &Context, time: Duration) -> bool {
        let start = Instant::now();
        while self.step(ctx) {
            if start.elapsed() > time {
                return true;
            }
        }
        false
    }
}

/// How much of the server's time a search may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Haste {
    /// A few hundredths, as long as others write much.
    Later,
    /// A third: jobs are known to be there.
    Now,
}

static WANTED: Mutex<Option<Haste>> = Mutex::new(None);
static CHANGED: Condvar = Condvar::new();

/// All keys are to be looked at, by the thread that waits for that.
pub(crate) fn want(haste: Haste) {
    let mut wanted = WANTED.lock();
    *wanted = (*wanted).max(Some(haste));
    CHANGED.notify_all();
}

/// Waits until a search is wanted.
pub(crate) fn next() -> Haste {
    let mut wanted = WANTED.lock();
    loop {
        match wanted.take() {
            Some(haste) => return haste,
            None => CHANGED.wait(&mut wanted),
        }
    }
}
