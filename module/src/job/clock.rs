//! How long an attempt may still take.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// The time of an attempt. It stands still while the job waits for others: what they take is no
/// fault of its own.
pub(crate) struct Clock {
    ends: Cell<Instant>,
    stands_since: Cell<Option<Instant>>,
}

impl Clock {
    pub(super) fn start(time: Duration) -> Self {
        Self { ends: Cell::new(Instant::now() + time), stands_since: Cell::new(None) }
    }

    /// When the time is over, if it runs on.
    pub(crate) fn ends(&self) -> Instant {
        self.ends.get()
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        self.stands_since.get().is_none() && self.ends() <= now
    }

    pub(crate) fn stand_still(&self) {
        let since = self.stands_since.get().unwrap_or_else(Instant::now);
        self.stands_since.set(Some(since));
    }

    /// More time, for what others took.
    pub(crate) fn add(&self, time: Duration) {
        self.ends.set(self.ends() + time);
    }

    pub(crate) fn go_on(&self) {
        if let Some(since) = self.stands_since.take() {
            self.ends.set(self.ends() + since.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_take_is_not_counted() {
        let clock = Clock::start(Duration::from_mins(1));
        let (start, later) = (clock.ends(), clock.ends() + Duration::from_secs(1));
        assert!(!clock.is_over(Instant::now()) && clock.is_over(later));
        clock.stand_still();
        assert!(!clock.is_over(later));
        std::thread::sleep(Duration::from_millis(5));
        clock.go_on();
        assert!(clock.ends() >= start + Duration::from_millis(5));
        assert!(clock.is_over(clock.ends()));
        clock.add(Duration::from_secs(2));
        assert!(!clock.is_over(later));
    }
}
