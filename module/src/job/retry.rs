//! How long a job waits before it is tried again.

use crate::{server, settings};

/// Doubles with every retry, up to a minute.
fn plain_ms(retried: i64) -> i64 {
    const MOST: i64 = 60_000;
    let base = settings::RETRY_DELAY_MS.signed();
    let doublings = u32::try_from(retried).unwrap_or_default().min(16);
    base.saturating_mul(1 << doublings).min(base.max(MOST))
}

/// The pause after so many retries: varies by a quarter, so that jobs that failed together do not
/// return together.
pub(super) fn pause_ms(retried: i64) -> i64 {
    let (pause, [jitter]) = (plain_ms(retried), server::random::<1>());
    pause - pause / 4 + pause / 2 * i64::from(jitter) / 256
}

/// The longest pause before the latest of so many retries.
pub(super) fn longest_ms(retried: i64) -> i64 {
    let pause = plain_ms(retried.saturating_sub(1));
    pause + pause / 4
}
