//! How long the phases of jobs take, by task: histograms, each a few counters.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use super::Asked;

/// A part of a job's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It waits for its turn.
    Queue,
    /// Its picture is downloaded, or read from a file.
    Fetch,
    /// The picture is decoded and brought to the model's size.
    Prepare,
    /// In the engine, until its first decoder step.
    Encode,
    /// From there to its answers.
    Generate,
    /// From when it might have been started to its answers.
    Total,
}

impl Phase {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Queue, "queue"),
        (Self::Fetch, "fetch"),
        (Self::Prepare, "prepare"),
        (Self::Encode, "encode"),
        (Self::Generate, "generate"),
        (Self::Total, "total"),
    ];
}

/// Upper bounds of the buckets but the last, which has none.
const BOUNDS_MS: [u64; 15] =
    [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000];
const BUCKETS: usize = BOUNDS_MS.len() + 1;

/// Microseconds of a millisecond.
const MS: u64 = 1000;

struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    /// Microseconds.
    sum: AtomicU64,
}

impl Histogram {
    const fn new() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum: AtomicU64::new(0) }
    }

    fn add(&self, time: Duration) {
        let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_MS.iter().position(|bound| time <= bound * MS);
        self.buckets[bucket.unwrap_or(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(time, Ordering::Relaxed);
    }

    /// Cumulative counts, the last one of all.
    fn counts(&self) -> [u64; BUCKETS] {
        let mut total = 0;
        self.buckets.each_ref().map(|bucket| {
            total += bucket.load(Ordering::Relaxed);
            total
        })
    }
}

static HISTOGRAMS: [[Histogram; Asked::COUNT]; Phase::ALL.len()] =
    [const { [const { Histogram::new() }; Asked::COUNT] }; Phase::ALL.len()];

/// A job that asks for this has spent so long in a phase.
pub(crate) fn record(phase: Phase, asked: Asked, time: Duration) {
    HISTOGRAMS[phase as usize][asked.index()].add(time);
}

/// As [`record`], of milliseconds since 1970, which anybody may have written.
pub(crate) fn record_between(phase: Phase, asked: Asked, (from, to): (i64, i64)) {
    /// A year: no job waits as long as that.
    const MOST: i64 = 31_536_000_000;
    let time = to.saturating_sub(from).max(0);
    if time <= MOST {
        record(phase, asked, Duration::from_millis(time.unsigned_abs()));
    }
}

/// A histogram as it is told.
pub(crate) struct Told {
    pub(crate) phase: &'static str,
    pub(crate) asked: Asked,
    pub(crate) sum_ms: u64,
    counts: [u64; BUCKETS],
}

/// The histograms in which there is something.
pub(crate) fn all() -> impl Iterator<Item = Told> {
    let pairs = Phase::ALL.iter().flat_map(|phase| Asked::all().map(move |asked| (phase, asked)));
    pairs.filter_map(|((phase, name), asked)| {
        let histogram = &HISTOGRAMS[*phase as usize][asked.index()];
        let (counts, sum) = (histogram.counts(), histogram.sum.load(Ordering::Relaxed));
        let told = Told { phase: name, asked, sum_ms: sum / MS, counts };
        (told.count() > 0).then_some(told)
    })
}

impl Told {
    pub(crate) fn count(&self) -> u64 {
        self.counts[BUCKETS - 1]
    }

    /// Upper bounds in milliseconds, the last one -1 for none, and how many took no longer.
    pub(crate) fn buckets(&self) -> impl Iterator<Item = (i64, u64)> {
        let bounds = BOUNDS_MS.iter().map(|bound| bound.cast_signed()).chain([-1]);
        bounds.zip(self.counts)
    }

    /// The time in microseconds that a share of them took no longer than, as far as the buckets
    /// tell: evenly spread within each, and no more than the highest bound.
    pub(crate) fn percentile(&self, share: f64) -> f64 {
        let rank = share * self.count() as f64;
        let found = self.counts.iter().position(|count| *count as f64 >= rank);
        let bucket = found.unwrap_or(BUCKETS - 1);
        let bound = |bucket: usize| BOUNDS_MS[bucket.min(BUCKETS - 2)] as f64 * MS as f64;
        let (least, before) = match bucket.checked_sub(1) {
            Some(last) => (bound(last), self.counts[last]),
            None => (0.0, 0),
        };
        let inside = (self.counts[bucket] - before).max(1) as f64;
        least + (bound(bucket) - least) * ((rank - before as f64) / inside).clamp(0.0, 1.0)
    }
}

/// Times the phases of a job, one after the other.
pub(crate) struct Stopwatch {
    asked: Asked,
    since: Cell<Instant>,
}

impl Stopwatch {
    pub(crate) fn start(asked: Asked) -> Self {
        Self { asked, since: Cell::new(Instant::now()) }
    }

    /// What was done until now is in no phase.
    pub(crate) fn restart(&self) {
        self.since.set(Instant::now());
    }

    /// A phase ends, and the next begins.
    pub(crate) fn lap(&self, phase: Phase) {
        let now = Instant::now();
        record(phase, self.asked, now - self.since.replace(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(times_ms: &[u64]) -> Told {
        let histogram = Histogram::new();
        for time in times_ms {
            histogram.add(Duration::from_millis(*time));
        }
        let sum_ms = histogram.sum.load(Ordering::Relaxed) / MS;
        let asked = Asked::of_field(b"<OD>", false);
        Told { phase: "total", asked, sum_ms, counts: histogram.counts() }
    }

    #[test]
    fn a_bound_is_in_its_bucket_and_counts_are_cumulative() {
        let told = told(&[0, 1, 2, 3, 60_000, 60_001]);
        let buckets: Vec<(i64, u64)> = told.buckets().collect();
        assert_eq!(buckets[..4], [(1, 2), (2, 3), (5, 4), (10, 4)]);
        assert_eq!(buckets[BUCKETS - 2..], [(60_000, 5), (-1, 6)]);
        assert_eq!((told.count(), told.sum_ms), (6, 120_007));
    }

    #[test]
    fn percentiles_lie_in_the_bucket_that_reaches_them() {
        let check = |times: &[u64], share, expected: f64| {
            let found = told(times).percentile(share);
            assert!((found - expected).abs() < 0.5, "{times:?} {share}: {found}");
        };
        // Of two in the bucket from 10 to 20 ms, half are in its first half.
        check(&[15, 15], 0.5, 15_000.0);
        check(&[15, 15], 1.0, 20_000.0);
        check(&[0; 4], 0.25, 250.0);
        // Of a hundred, the slowest one counts for p99.9 alone.
        let mut times = vec![0; 99];
        times.push(400);
        check(&times, 0.99, 1000.0);
        check(&times, 0.999, 200_000.0 + 300_000.0 * 0.9);
        check(&[100_000], 0.5, 60_000_000.0);
    }
}
