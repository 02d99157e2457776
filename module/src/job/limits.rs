//! The ranges of SUBMIT's options, which hold for hashes that somebody else has written too.

/// What an option, and the field that keeps it, may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) option: &'static str,
    pub(crate) least: i64,
    pub(crate) most: i64,
}

const fn limit(option: &'static str, least: i64, most: i64) -> Limit {
    Limit { option, least, most }
}

/// A year.
const MOST_MS: i64 = 31_536_000_000;

pub(crate) const PRIORITY: Limit = limit("PRIORITY", 0, 9);
/// Celery's priorities are the other way round.
pub(crate) const ANY_PRIORITY: Limit = limit("PRIORITY", -PRIORITY.most, PRIORITY.most);
pub(crate) const DELAY: Limit = limit("DELAY", 0, MOST_MS);
pub(crate) const EXPIRES: Limit = limit("EXPIRES", 1, MOST_MS);
pub(crate) const TIMEOUT: Limit = limit("TIMEOUT", 1, 86_400_000);
pub(crate) const RETRIES: Limit = limit("RETRIES", 0, 100);
pub(crate) const TTL: Limit = limit("TTL", 0, 315_360_000);
pub(crate) const BEAMS: Limit = limit("BEAMS", 1, 16);
pub(crate) const MAX_TOKENS: Limit = limit("MAXTOKENS", 1, 4096);
pub(crate) const PROMPTS: Limit = limit("PROMPTS", 1, 16);

impl Limit {
    pub(crate) fn holds(self, value: i64) -> bool {
        (self.least..=self.most).contains(&value)
    }

    pub(crate) fn clamp(self, value: i64) -> i64 {
        value.clamp(self.least, self.most)
    }
}
