//! What the module's parts share: scheduler, model, counters.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use florence_engine::Florence;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::{cache::Verdict, job::unix_ms, scheduler::Scheduler};

/// The model, as far as it is loaded.
#[derive(Clone)]
pub(crate) enum Model {
    Loading,
    Ready(Arc<Florence>),
    Failed(String),
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) submitted: AtomicU64,
    pub(crate) done: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) refused: AtomicU64,
    /// Answers whose job was gone, cancelled or claimed elsewhere.
    pub(crate) dropped: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) decoder_steps: AtomicU64,
    pub(crate) cache_results: AtomicU64,
    pub(crate) cache_features: AtomicU64,
    pub(crate) cache_misses: AtomicU64,
    pub(crate) fetch_ms: AtomicU64,
    pub(crate) infer_ms: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// Counts the jobs of a verdict.
    pub(crate) fn cache(&self, verdict: Verdict) -> &AtomicU64 {
        match verdict {
            Verdict::Result => &self.cache_results,
            Verdict::Features => &self.cache_features,
            Verdict::Miss => &self.cache_misses,
        }
    }
}

pub(crate) struct Shared {
    /// Never held across a call into the server: keyspace events take it too.
    pub(crate) scheduler: Mutex<Scheduler>,
    /// Signalled when a job may have become runnable.
    pub(crate) work: Condvar,
    pub(crate) model: RwLock<Model>,
    pub(crate) counters: Counters,
    pub(crate) is_shutting_down: AtomicBool,
}

pub(crate) static SHARED: LazyLock<Shared> = LazyLock::new(|| Shared {
    scheduler: Mutex::default(),
    work: Condvar::new(),
    model: RwLock::new(Model::Loading),
    counters: Counters::default(),
    is_shutting_down: AtomicBool::new(false),
});

/// Changes the scheduler and wakes who waits for work.
pub(crate) fn schedule(change: impl FnOnce(&mut Scheduler)) {
    change(&mut SHARED.scheduler.lock());
    SHARED.work.notify_all();
}

pub(crate) fn is_shutting_down() -> bool {
    SHARED.is_shutting_down.load(Ordering::Relaxed)
}

/// Names this process in the jobs it works on; another start of the server is another owner.
pub(crate) fn owner() -> &'static str {
    static OWNER: LazyLock<String> =
        LazyLock::new(|| format!("{}-{}", std::process::id(), unix_ms()));
    &OWNER
}
