//! A flag that tells work to end early.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Tells a download, a decoder or a run to end early; clones share the flag.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ends the work, for good.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the work is to end.
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
