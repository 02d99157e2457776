//! How far a run is: a bar on a terminal, a line now and then elsewhere.

use std::{
    fmt::Write as _,
    io::{IsTerminal as _, stderr},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(10);

pub(super) struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
    /// When the last line was written.
    told: Mutex<Instant>,
    /// How many pictures there are, 0 if nobody knows.
    total: AtomicU64,
    skipped: AtomicU64,
    answered: AtomicU64,
    repeated: AtomicU64,
    failed: AtomicU64,
}

/// How many pictures came to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// Answered by an earlier run.
    pub(super) skipped: u64,
    /// Copies of others among them.
    pub(super) answered: u64,
    pub(super) repeated: u64,
    pub(super) failed: u64,
}

impl Counts {
    fn all(self) -> u64 {
        self.skipped + self.answered + self.failed
    }
}

impl Progress {
    pub(super) fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::default_spinner());
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        let now = Instant::now();
        Self {
            bar,
            start: now,
            told: Mutex::new(now),
            total: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            skipped: self.skipped.load(Relaxed),
            answered: self.answered.load(Relaxed),
            repeated: self.repeated.load(Relaxed),
            failed: self.failed.load(Relaxed),
        }
    }

    pub(super) fn is_of(&self, total: u64) {
        self.total.store(total, Relaxed);
    }

    pub(super) fn skipped(&self) {
        self.skipped.fetch_add(1, Relaxed);
    }

    pub(super) fn answered(&self) {
        self.answered.fetch_add(1, Relaxed);
        self.tell();
    }

    pub(super) fn repeated(&self) {
        self.repeated.fetch_add(1, Relaxed);
        self.answered();
    }

    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
        self.tell();
    }

    pub(super) fn rate(&self) -> f64 {
        let counts = self.counts();
        (counts.answered + counts.failed) as f64 / self.start.elapsed().as_secs_f64().max(1e-3)
    }

    fn tell(&self) {
        if let Some(bar) = &self.bar {
            bar.set_message(self.line());
        } else {
            let mut told = self.told.lock();
            if told.elapsed() >= PAUSE {
                *told = Instant::now();
                eprintln!("{}", self.line());
            }
        }
    }

    fn line(&self) -> String {
        line(self.counts(), self.total.load(Relaxed), self.rate())
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn line(counts: Counts, total: u64, rate: f64) -> String {
    let all = counts.all();
    let of = if total == 0 { String::new() } else { format!(" of {}", HumanCount(total)) };
    let mut line = format!("{}{of} pictures, {rate:.1} a second", HumanCount(all));
    if counts.failed > 0 {
        let _ = write!(line, ", {} failed", HumanCount(counts.failed));
    }
    let left = total.saturating_sub(all);
    if left > 0 && rate > 0.0 {
        let left = Duration::from_secs_f64((left as f64 / rate).min(1e9));
        let _ = write!(line, ", {} left", HumanDuration(left));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_of_what_is_known() {
        let counts = Counts { skipped: 1000, answered: 200, repeated: 1, failed: 0 };
        assert_eq!(line(counts, 0, 12.34), "1,200 pictures, 12.3 a second");
        let failed = Counts { failed: 34, ..counts };
        let told = "1,234 of 10,000 pictures, 10.0 a second, 34 failed, 15 minutes left";
        assert_eq!(line(failed, 10_000, 10.0), told);
        assert_eq!(line(counts, 1_200, 0.0), "1,200 of 1,200 pictures, 0.0 a second");
    }
}
