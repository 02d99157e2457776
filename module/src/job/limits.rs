//! The ranges of SUBMIT's options, which hold for hashes that somebody else has written too.

use florence_engine::model::MAX_BEAMS;
use redis_module::RedisError;

use crate::server::reply;
pub(crate) use crate::settings::MODEL_BYTES;

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

/// The same of a number that need not be whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) option: &'static str,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

const fn range(option: &'static str, least: f64, most: f64) -> Range {
    Range { option, least, most }
}

pub(crate) const TEMPERATURE: Range = range("TEMPERATURE", 0.01, 100.0);
pub(crate) const TOP_P: Range = range("TOPP", 0.01, 1.0);
pub(crate) const LENGTH_PENALTY: Range = range("LENGTHPENALTY", -10.0, 10.0);

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
#[expect(clippy::cast_possible_wrap, reason = "a small number")]
pub(crate) const BEAMS: Limit = limit("BEAMS", 1, MAX_BEAMS as i64);
pub(crate) const N_BEST: Limit = limit("NBEST", 1, BEAMS.most);
pub(crate) const MAX_TOKENS: Limit = limit("MAXTOKENS", 1, 4096);
pub(crate) const TOP_K: Limit = limit("TOPK", 0, 100_000);
pub(crate) const SEED: Limit = limit("SEED", 0, i64::MAX);
pub(crate) const NGRAM: Limit = limit("NGRAM", 0, 4096);
pub(crate) const EXIF: Limit = limit("EXIF", 0, 1);
pub(crate) const THUMBNAIL: Limit = limit("THUMBNAIL", 0, 1024);
pub(crate) const MARGIN: Limit = limit("MARGIN", 0, 100);
pub(crate) const PROMPTS: Limit = limit("PROMPTS", 1, 16);

/// Bytes of all prompts of a job together.
pub(crate) const PROMPT_BYTES: usize = florence_engine::prompt::MAX_PROMPT;
/// Bytes of a job's key: all that tells of the job repeats it.
pub(crate) const KEY_BYTES: usize = 8192;
/// Bytes of the key of a job's stream.
pub(crate) const STREAM_BYTES: usize = 8192;
/// Bytes of a failure's code.
pub(crate) const CODE_BYTES: usize = 32;
/// Keys of one command.
pub(crate) const KEYS: usize = 1000;

/// Refuses a key that is too long for a job.
pub(crate) fn check_key_bytes(bytes: usize) -> Result<(), RedisError> {
    if bytes <= KEY_BYTES {
        return Ok(());
    }
    Err(reply::error("ERR", format_args!("a job's key has at most {KEY_BYTES} bytes")))
}

/// Refuses prompts that have too many bytes together.
pub(crate) fn check_prompt_bytes(bytes: usize) -> Result<(), RedisError> {
    if bytes <= PROMPT_BYTES {
        return Ok(());
    }
    let text = format!("the prompts have {bytes} bytes, more than {PROMPT_BYTES}");
    Err(reply::error("BADPROMPT", text))
}

impl Range {
    pub(crate) fn holds(self, value: f64) -> bool {
        (self.least..=self.most).contains(&value)
    }
}

impl Limit {
    pub(crate) fn holds(self, value: i64) -> bool {
        (self.least..=self.most).contains(&value)
    }

    pub(crate) fn clamp(self, value: i64) -> i64 {
        value.clamp(self.least, self.most)
    }
}
