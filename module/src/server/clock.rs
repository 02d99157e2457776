//! Milliseconds since 1970 that never step back while the process lives.
//!
//! When the wall clock is set back, this clock goes on from where it was, at the pace of the
//! monotonic one: what waits for a time waits as long as it was told to.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

/// What the clock said last, and when.
struct Reading {
    unix: Duration,
    at: Instant,
}

impl Reading {
    /// The later of the wall clock and of what this clock has come to.
    fn next(&self, wall: Duration, now: Instant) -> Duration {
        wall.max(self.unix + now.saturating_duration_since(self.at))
    }
}

static LAST: Mutex<Option<Reading>> = Mutex::new(None);

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> i64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = Instant::now();
    let mut last = LAST.lock();
    let unix = last.as_ref().map_or(wall, |last| last.next(wall, now));
    *last = Some(Reading { unix, at: now });
    i64::try_from(unix.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wall_clock_that_steps_back_is_not_followed() {
        let start = Instant::now();
        let seconds = Duration::from_secs;
        let last = Reading { unix: seconds(1000), at: start };
        assert_eq!(last.next(seconds(1003), start + seconds(3)), seconds(1003));
        assert_eq!(last.next(seconds(10), start + seconds(3)), seconds(1003));
        assert_eq!(last.next(seconds(5000), start + seconds(3)), seconds(5000));
    }

    #[test]
    fn the_clock_tells_the_time() {
        let (first, second) = (unix_ms(), unix_ms());
        assert!(first > 1_700_000_000_000 && second >= first);
    }
}
