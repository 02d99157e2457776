//! Lines of the server's log about jobs: one for each end that is no answer, and for what went wrong
//! inside; and not more than anyone can read.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    job::{State, life::Ended},
    server,
};

/// So many lines at once, and one more each [`PAUSE`].
const BURST: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// What may be logged now. Pure.
struct Budget {
    /// Lines that may be written at once.
    left: u32,
    since: Instant,
    /// Lines that were left out since the last one.
    left_out: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: BURST, since: now, left_out: 0 }
    }

    /// Whether there is room for one more line: if so, how many were left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let pauses = now.saturating_duration_since(self.since).as_millis() / PAUSE.as_millis();
        if pauses > 0 {
            let pauses = u32::try_from(pauses).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(pauses).min(BURST);
            self.since = now;
        }
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.left_out))
    }

    /// How many were left out, once there is room for their number.
    fn take_rest(&mut self, now: Instant) -> Option<u64> {
        if self.left_out == 0 {
            return None;
        }
        let left_out = self.left_out;
        // Not counted as one more that was left out.
        let rest = self.take(now);
        self.left_out = if rest.is_some() { 0 } else { left_out };
        rest
    }
}

static BUDGET: LazyLock<Mutex<Budget>> = LazyLock::new(|| Mutex::new(Budget::new(Instant::now())));

/// A job has ended.
pub(super) fn ended(key: &[u8], end: &Ended<'_>) {
    if end.state == State::Done {
        return;
    }
    let (key, attempts) = (server::printable(key), end.attempts);
    if let Some(failure) = end.failure {
        let (code, message) = (failure.code.name(), &failure.message);
        warn(&format!("job '{key}' failed: {code} {message} (attempts {attempts})"));
    } else {
        tell(&format!("job '{key}' {} (attempts {attempts})", end.state.name()));
    }
}

/// A line about a job that went wrong, if there is one left.
pub(crate) fn warn(text: &str) {
    if has_line() {
        server::warn(text);
    }
}

/// As [`warn`], for what somebody has asked for.
pub(crate) fn tell(text: &str) {
    if has_line() {
        server::tell(text);
    }
}

/// Takes a line, after that which tells how many were left out.
fn has_line() -> bool {
    let left_out = BUDGET.lock().take(Instant::now());
    tell_left_out(left_out.unwrap_or_default());
    left_out.is_some()
}

/// Tells how many lines were left out, as soon as there is a line for it.
pub(crate) fn tell_rest() {
    let left_out = BUDGET.lock().take_rest(Instant::now());
    tell_left_out(left_out.unwrap_or_default());
}

fn tell_left_out(left_out: u64) {
    if left_out > 0 {
        server::tell(&format!("{left_out} lines about ended jobs were left out"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_ends_leaves_a_few_lines_and_their_number() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let lines = (0..1000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(lines, BURST as usize);
        assert_eq!(budget.take(start + PAUSE), Some(1000 - u64::from(BURST)));
        assert_eq!(budget.take(start + PAUSE), None);
        assert_eq!(budget.take(start + 3 * PAUSE), Some(1));
        assert_eq!(budget.take_rest(start + 3 * PAUSE), None);
        assert_eq!(budget.take(start + 3 * PAUSE), Some(0));
        assert_eq!(budget.take(start + 3 * PAUSE), None);
        assert_eq!(budget.take_rest(start + 3 * PAUSE), None);
        assert_eq!(budget.take_rest(start + 4 * PAUSE), Some(1));
        assert_eq!(budget.take_rest(start + 5 * PAUSE), None);
    }
}
