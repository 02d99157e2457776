//! What servers tell of their work: histograms of latencies, jobs by how they ended. Those of several
//! servers add up; those of an earlier moment are subtracted.

use std::collections::BTreeMap;

use redis::Value;
use serde::Serialize;

use super::server::{entries, number, text};

/// The phases in the order in which a job goes through them.
pub(crate) const PHASES: [&str; 6] = ["queue", "fetch", "prepare", "encode", "generate", "total"];

/// How long something took, as `FLORENCE.STATS LATENCY` counts it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Histogram {
    pub(crate) count: f64,
    pub(crate) sum_ms: f64,
    /// Upper bound in ms, the last one infinite, and how many took no longer.
    pub(crate) buckets: Vec<(f64, f64)>,
}

/// Phase and task.
pub(crate) type Latencies = BTreeMap<(String, String), Histogram>;

/// State, task and code of the error, and how many jobs ended so.
pub(crate) type Ends = BTreeMap<(String, String, String), f64>;

/// Percentiles, in ms; none where nothing was counted.
#[derive(Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) count: f64,
    mean: Option<f64>,
    p50: Option<f64>,
    p95: Option<f64>,
    p99: Option<f64>,
}

impl Histogram {
    /// How many took no longer than a bound, as far as the buckets tell.
    fn up_to(&self, bound: f64) -> f64 {
        let bucket = self.buckets.iter().take_while(|(upper, _)| *upper <= bound).last();
        bucket.map_or(0.0, |(_, count)| *count)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        if self.buckets.is_empty() {
            self.buckets = other.buckets.iter().map(|(bound, _)| (*bound, 0.0)).collect();
        }
        for (bound, count) in &mut self.buckets {
            *count += other.up_to(*bound);
        }
        self.count += other.count;
        self.sum_ms += other.sum_ms;
    }

    /// What was counted since an earlier moment; all of it, if the server has started since.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        if earlier.count > self.count {
            return self.clone();
        }
        let buckets = self.buckets.iter();
        let buckets = buckets.map(|(bound, n)| (*bound, (n - earlier.up_to(*bound)).max(0.0)));
        Self {
            count: self.count - earlier.count,
            sum_ms: (self.sum_ms - earlier.sum_ms).max(0.0),
            buckets: buckets.collect(),
        }
    }

    /// As Prometheus' `histogram_quantile`: within a bucket all values are equally likely, and what
    /// has no bound is the last bound.
    fn quantile(&self, q: f64) -> Option<f64> {
        let rank = q * self.count;
        let mut below = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *count >= rank && *count > below.1 {
                let share = (rank - below.1) / (count - below.1);
                let is_bounded = bound.is_finite();
                return Some(if is_bounded {
                    below.0 + (bound - below.0) * share
                } else {
                    below.0
                });
            }
            below = (if bound.is_finite() { *bound } else { below.0 }, *count);
        }
        None
    }

    /// The median, and what 95 and 99 of a hundred do not exceed.
    pub(crate) fn quantiles(&self) -> [Option<f64>; 3] {
        [0.5, 0.95, 0.99].map(|q| self.quantile(q).filter(|_| self.count > 0.0))
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        let [p50, p95, p99] = self.quantiles();
        let mean = (self.count > 0.0).then(|| self.sum_ms / self.count);
        Percentiles { count: self.count, mean, p50, p95, p99 }
    }
}

/// The reply of `FLORENCE.STATS LATENCY`.
pub(crate) fn latencies(reply: Value) -> Latencies {
    let mut found = Latencies::new();
    for row in rows(reply) {
        let (mut phase, mut task) = (String::new(), String::new());
        let mut histogram = Histogram::default();
        for (name, value) in row {
            match name.as_str() {
                "phase" => phase = text(&value),
                "task" => task = text(&value),
                "count" => histogram.count = number(&value),
                "sum_ms" => histogram.sum_ms = number(&value),
                "buckets" => histogram.buckets = buckets(value),
                _ => {}
            }
        }
        found.entry((phase, task)).or_default().add(&histogram);
    }
    found
}

fn buckets(value: Value) -> Vec<(f64, f64)> {
    let bucket = |pair: Value| match pair {
        Value::Array(pair) => match &pair[..] {
            [bound, count] => {
                let bound = number(bound);
                Some((if bound < 0.0 { f64::INFINITY } else { bound }, number(count)))
            }
            _ => None,
        },
        _ => None,
    };
    match value {
        Value::Array(pairs) => pairs.into_iter().filter_map(bucket).collect(),
        _ => Vec::new(),
    }
}

/// The reply of `FLORENCE.STATS JOBS`.
pub(crate) fn ends(reply: Value) -> Ends {
    let mut found = Ends::new();
    for row in rows(reply) {
        let (mut key, mut count) = (<(String, String, String)>::default(), 0.0);
        for (name, value) in row {
            match name.as_str() {
                "state" => key.0 = text(&value),
                "task" => key.1 = text(&value),
                "code" => key.2 = text(&value),
                "count" => count = number(&value),
                _ => {}
            }
        }
        *found.entry(key).or_default() += count;
    }
    found
}

fn rows(reply: Value) -> Vec<Vec<(String, Value)>> {
    match reply {
        Value::Array(rows) => rows.into_iter().map(entries).collect(),
        _ => Vec::new(),
    }
}

/// All tasks' histograms of one phase together.
pub(crate) fn of_phase(latencies: &Latencies, phase: &str) -> Histogram {
    let mut whole = Histogram::default();
    latencies.iter().filter(|((name, _), _)| name == phase).for_each(|(_, it)| whole.add(it));
    whole
}

/// Adds what another server tells.
pub(crate) fn add(to: &mut Latencies, other: &Latencies) {
    for (key, histogram) in other {
        to.entry(key.clone()).or_default().add(histogram);
    }
}

/// What was counted since an earlier moment.
pub(crate) fn since(now: &Latencies, earlier: &Latencies) -> Latencies {
    let new = |(key, histogram): (&(String, String), &Histogram)| {
        let new = earlier.get(key).map_or_else(|| histogram.clone(), |it| histogram.since(it));
        (key.clone(), new)
    };
    now.iter().map(new).collect()
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "counts")]
mod tests {
    use super::*;

    fn histogram(counts: &[f64]) -> Histogram {
        let bounds = [1.0, 10.0, 100.0, f64::INFINITY];
        let buckets: Vec<_> = bounds.into_iter().zip(counts.iter().copied()).collect();
        Histogram { count: counts[3], sum_ms: 10.0 * counts[3], buckets }
    }

    #[test]
    fn percentiles_lie_within_their_bucket() {
        let found = histogram(&[0.0, 50.0, 100.0, 100.0]).percentiles();
        assert_eq!((found.p50, found.p95), (Some(10.0), Some(91.0)));
        assert_eq!(found.mean, Some(10.0));
        let none = histogram(&[0.0; 4]).percentiles();
        assert_eq!((none.p50, none.mean), (None, None));
        // What has no bound is told as the last one.
        assert_eq!(histogram(&[0.0, 0.0, 0.0, 4.0]).percentiles().p50, Some(100.0));
        assert_eq!(histogram(&[4.0; 4]).percentiles().p50, Some(0.5));
    }

    #[test]
    fn servers_add_up_and_a_restart_counts_from_zero() {
        let mut whole = histogram(&[1.0, 2.0, 3.0, 4.0]);
        whole.add(&histogram(&[1.0, 1.0, 1.0, 1.0]));
        assert_eq!(whole.buckets[2], (100.0, 4.0));
        assert_eq!(whole.count, 5.0);
        let new = whole.since(&histogram(&[1.0, 1.0, 1.0, 1.0]));
        assert_eq!(new.buckets.iter().map(|(_, n)| *n).collect::<Vec<_>>(), [1.0, 2.0, 3.0, 4.0]);
        let restarted = histogram(&[0.0, 0.0, 1.0, 1.0]);
        assert_eq!(restarted.since(&whole), restarted);
    }

    #[test]
    fn replies_are_read_in_both_protocols() {
        let bulk = |text: &str| Value::BulkString(text.into());
        let pair = |bound, count| Value::Array(vec![Value::Int(bound), Value::Int(count)]);
        let fields = [
            (bulk("phase"), bulk("total")),
            (bulk("task"), bulk("<OD>")),
            (bulk("count"), Value::Int(3)),
            (bulk("sum_ms"), Value::Int(12)),
            (bulk("buckets"), Value::Array(vec![pair(5, 2), pair(-1, 3)])),
        ];
        let flat = fields.iter().flat_map(|(name, value)| [name.clone(), value.clone()]).collect();
        for row in [Value::Array(flat), Value::Map(fields.to_vec())] {
            let found = latencies(Value::Array(vec![row]));
            let histogram = &found[&("total".to_owned(), "<OD>".to_owned())];
            assert_eq!(histogram.buckets, [(5.0, 2.0), (f64::INFINITY, 3.0)]);
            assert_eq!((histogram.count, histogram.sum_ms), (3.0, 12.0));
        }
    }
}
