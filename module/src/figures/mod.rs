//! Figures of this process, as STATS and INFO show them: they cost a job a few atomic additions.
//!
//! - `asked`: what jobs ask for, as figures tell them apart
//! - `latency`: how long the phases of jobs take

mod asked;
pub(crate) mod latency;

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

pub(crate) use asked::Asked;

/// How long the module has been loaded; from its first call on.
pub(crate) fn uptime() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $static:ident = $name:literal;)*) => {
        $($(#[$doc])* pub(crate) static $static: Counter = Counter::new();)*

        /// Names and counters, in the order of STATS.
        pub(crate) static COUNTERS: &[(&str, &Counter)] = &[$(($name, &$static)),*];
    };
}

counters! {
    SUBMITTED = "jobs_submitted";
    DONE = "jobs_done";
    FAILED = "jobs_failed";
    CANCELLED = "jobs_cancelled";
    EXPIRED = "jobs_expired";
    /// Ended jobs that had to make room.
    TRIMMED = "jobs_trimmed";
    /// Ends of jobs that could not be published or added to the stream.
    UNANNOUNCED = "jobs_unannounced";
    /// Jobs that failed, by the code of their error.
    FAILED_FETCH = "failed_fetch";
    FAILED_DENIED = "failed_denied";
    FAILED_IMAGE = "failed_image";
    FAILED_PROMPT = "failed_prompt";
    FAILED_TIMEOUT = "failed_timeout";
    FAILED_CRASH = "failed_crash";
    FAILED_INTERNAL = "failed_internal";
    FAILED_INVALID = "failed_invalid";
    FAILED_NOMODEL = "failed_nomodel";
    RETRIED = "attempts_retried";
    REFUSED = "submits_refused";
    /// Answers whose job was gone, cancelled, replaced or claimed elsewhere.
    DROPPED = "answers_dropped";
    /// Jobs that counted as worked on although nobody did; 0, unless something is wrong.
    LEASES_RECOVERED = "leases_recovered";
    PANICS = "panics";
    /// Threads that had ended and were started again; 0, unless something is wrong.
    THREADS_RESTARTED = "threads_restarted";
    /// Messages of Celery's that became jobs.
    CELERY_TAKEN = "celery_taken";
    /// Those that stay in their lists.
    CELERY_LEFT = "celery_left";
    /// Those that were answered with an error before they became a job.
    CELERY_REFUSED = "celery_refused";
    /// Those that were moved to the list of rejected ones.
    CELERY_REJECTED = "celery_rejected";
    CACHE_RESULTS = "cache_results";
    CACHE_FEATURES = "cache_features";
    CACHE_MISSES = "cache_misses";
    DECODER_STEPS = "decoder_steps";
    FETCH_MS = "fetch_ms_total";
    INFER_MS = "infer_ms_total";
}
