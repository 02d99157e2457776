//! How far downloads are ahead of the engine. Each takes a job out of the order of turns, so there
//! are no more than the engine can soon use; but slow ones do not keep others from starting.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::prepare_threads;
use crate::{
    queue::{Kind, queue},
    settings,
};

/// After this time a download counts as slow.
const SLOW: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Count {
    /// When the downloads began that are under way.
    begun: Vec<Instant>,
    /// Pictures that are here, and not with the engine yet.
    here: usize,
}

/// The downloads for one model.
#[derive(Default)]
pub(super) struct Ahead(Mutex<Count>);

impl Ahead {
    /// Whether another download may begin.
    pub(super) fn has_room(&self) -> bool {
        let enough = 4 * prepare_threads() + settings::MAX_BATCH.size();
        let count = self.0.lock();
        let is_quick = |begun: &&Instant| begun.elapsed() < SLOW;
        count.here + count.begun.iter().filter(is_quick).count() < enough
    }
}

/// A download, until its picture is with the engine.
pub(super) struct Download {
    ahead: Arc<Ahead>,
    begun: Instant,
    is_here: bool,
}

impl Download {
    pub(super) fn begin(ahead: &Arc<Ahead>) -> Self {
        let begun = Instant::now();
        ahead.0.lock().begun.push(begun);
        Self { ahead: Arc::clone(ahead), begun, is_here: false }
    }

    /// The picture is here, or there is none.
    pub(super) fn is_here(&mut self) {
        let mut count = self.ahead.0.lock();
        forget(&mut count, self.begun);
        count.here += 1;
        self.is_here = true;
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let mut count = self.ahead.0.lock();
        if self.is_here {
            count.here -= 1;
        } else {
            forget(&mut count, self.begun);
        }
        drop(count);
        queue().wake_one(Kind::Downloader);
    }
}

fn forget(count: &mut Count, begun: Instant) {
    if let Some(index) = count.begun.iter().position(|other| *other == begun) {
        count.begun.swap_remove(index);
    }
}
