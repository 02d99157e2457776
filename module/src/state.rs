//! What the module's parts share: scheduler, model, counters.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use florence_engine::Florence;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::{
    cache::Verdict,
    job::{State, unix_ms},
    scheduler::Scheduler,
};

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
    pub(crate) expired: AtomicU64,
    /// Finished jobs that had to make room.
    pub(crate) trimmed: AtomicU64,
    /// Ends of jobs that could not be published or added to the stream.
    pub(crate) unannounced: AtomicU64,
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

    /// Counts the jobs that ended so.
    pub(crate) fn ended(&self, state: State) -> &AtomicU64 {
        match state {
            State::Cancelled => &self.cancelled,
            State::Expired => &self.expired,
            State::Failed => &self.failed,
            _ => &self.done,
        }
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

/// How long the engine takes for a job, lately.
#[derive(Default)]
pub(crate) struct Pace(AtomicU64);

impl Pace {
    /// Tells of `jobs` answers that took so long together; the newest count for a tenth.
    pub(crate) fn record(&self, time: Duration, jobs: usize) {
        let sample = u64::try_from(time.as_micros()).unwrap_or(u64::MAX) / jobs.max(1) as u64;
        let known = self.0.load(Ordering::Relaxed);
        let pace = if known == 0 { sample } else { known - known / 10 + sample / 10 };
        self.0.store(pace.max(1), Ordering::Relaxed);
    }

    /// `None` before the first answer.
    pub(crate) fn micros_a_job(&self) -> Option<i64> {
        i64::try_from(self.0.load(Ordering::Relaxed)).ok().filter(|pace| *pace > 0)
    }
}

pub(crate) struct Shared {
    /// Never held across a call into the server: keyspace events take it too.
    pub(crate) scheduler: Mutex<Scheduler>,
    /// Signalled when a job may have become runnable.
    pub(crate) work: Condvar,
    pub(crate) model: RwLock<Model>,
    pub(crate) counters: Counters,
    pub(crate) pace: Pace,
    pub(crate) is_shutting_down: AtomicBool,
}

pub(crate) static SHARED: LazyLock<Shared> = LazyLock::new(|| Shared {
    scheduler: Mutex::default(),
    work: Condvar::new(),
    model: RwLock::new(Model::Loading),
    counters: Counters::default(),
    pace: Pace::default(),
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
