//! How far downloads are ahead of the engine. Each takes a job out of the order of turns, so there
//! are no more than the engine can soon use; but slow ones do not keep others from starting.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::prepare_threads;
use crate::{
    queue::{Kind, queue},
    settings,
};

/// After this time a download counts as slow.
const SLOW: Duration = Duration::from_secs(1);

struct Ahead {
    /// When the downloads began that are under way.
    begun: Vec<Instant>,
    /// Pictures that are here, and not with the engine yet.
    here: usize,
}

static AHEAD: Mutex<Ahead> = Mutex::new(Ahead { begun: Vec::new(), here: 0 });

/// Whether another download may begin.
pub(super) fn has_room() -> bool {
    let enough = 4 * prepare_threads() + settings::MAX_BATCH.size();
    let ahead = AHEAD.lock();
    let is_quick = |begun: &&Instant| begun.elapsed() < SLOW;
    ahead.here + ahead.begun.iter().filter(is_quick).count() < enough
}

/// A download, until its picture is with the engine.
pub(super) struct Download {
    begun: Instant,
    is_here: bool,
}

impl Download {
    pub(super) fn begin() -> Self {
        let begun = Instant::now();
        AHEAD.lock().begun.push(begun);
        Self { begun, is_here: false }
    }

    /// The picture is here, or there is none.
    pub(super) fn is_here(&mut self) {
        let mut ahead = AHEAD.lock();
        forget(&mut ahead, self.begun);
        ahead.here += 1;
        self.is_here = true;
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let mut ahead = AHEAD.lock();
        if self.is_here {
            ahead.here -= 1;
        } else {
            forget(&mut ahead, self.begun);
        }
        drop(ahead);
        queue().wake_one(Kind::Downloader);
    }
}

fn forget(ahead: &mut Ahead, begun: Instant) {
    if let Some(index) = ahead.begun.iter().position(|other| *other == begun) {
        ahead.begun.swap_remove(index);
    }
}
