//! A job's hash, opened for reading under the server's lock.

use std::{
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use redis_module::{Context, RedisError, RedisResult, RedisString, RedisValue};
use sha2::{Digest, Sha256};

use super::{
    Fields, State, Token,
    limits::{self, Limit},
    owner,
    request::is_sent_along,
    retry,
};
use crate::{
    server::{Hash, Look, NAME_BYTES, NoHash, Value, reply, unix_ms},
    source,
};

/// Field that tells a job from other hashes; its value is the version of the layout.
const MARKER: &str = "florence";
const VERSION: &str = "1";

/// One level of priority is worth this head start: higher ones go first, lower ones never starve.
const PRIORITY_HEAD_START_MS: i64 = 30_000;

/// The fields that the answer depends on.
pub(super) const CONTENT: [&str; 15] = [
    "image",
    "prompt",
    "steps",
    "margin",
    "beams",
    "nbest_count",
    "maxtokens",
    "ngram",
    "length_penalty",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "exif",
    "wants",
];

/// Why a key is no job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoJob {
    Missing,
    WrongType,
    Foreign,
}

impl NoJob {
    /// What a command answers that asks for one job.
    pub(crate) fn reply(self) -> RedisResult {
        match self {
            Self::Missing => Ok(RedisValue::Null),
            Self::WrongType => Err(RedisError::WrongType),
            Self::Foreign => Err(reply::foreign()),
        }
    }
}

/// A moment that the hash tells in milliseconds since 1970.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Due {
    unix: i64,
    pub(crate) at: Instant,
}

/// Two are equal if the hash says the same: the same time read twice is not the same instant.
impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.unix == other.unix
    }
}

impl Eq for Due {}

impl Due {
    /// The moment `wait` after `since`, or after now, but no later than `wait` from now: clocks of other
    /// servers, and of other times, may be ahead.
    fn after(since: Option<i64>, wait: i64) -> Self {
        // What begins now is the same however often it is read.
        let Some(since) = since else {
            let wait_ms = Duration::from_millis(wait.max(0).unsigned_abs());
            return Self { unix: wait, at: Instant::now() + wait_ms };
        };
        let unix = since.saturating_add(wait);
        let left = unix.saturating_sub(unix_ms()).clamp(0, wait.max(0));
        Self { unix, at: Instant::now() + Duration::from_millis(left.unsigned_abs()) }
    }

    #[cfg(test)]
    pub(crate) fn at(at: Instant, unix: i64) -> Self {
        Self { unix, at }
    }
}

/// How a job waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// When it was submitted, as far as its hash tells.
    pub(crate) submitted: Option<i64>,
    /// What its priority is worth, in milliseconds.
    pub(crate) head_start: i64,
    /// Not before.
    pub(crate) until: Option<Due>,
    /// Of no use after.
    pub(crate) expires: Option<Due>,
    /// The server died while it was worked on.
    pub(crate) is_suspect: bool,
    /// It has been tried before.
    pub(crate) is_retry: bool,
    pub(crate) origin: Origin,
}

impl Waiting {
    /// Lower ones go first.
    pub(crate) fn rank(&self) -> i64 {
        self.submitted.unwrap_or_else(unix_ms).saturating_sub(self.head_start)
    }
}

/// Whose job it is, where its picture is, and who is to answer: what its turn depends on beside its
/// rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) user: Arc<str>,
    /// Host and port that the picture is downloaded from; nothing if it is at hand.
    pub(crate) host: Option<Arc<str>>,
    /// The model that it asks for; empty for whichever is the default.
    pub(crate) model: Arc<str>,
}

/// What a job's key says, as far as the queue cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    /// There is no unfinished job under the key.
    Nothing,
    Waiting(Waiting),
    /// Somebody works on it, or did.
    Claimed(Claimed),
}

/// A claim as the hash tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claimed {
    pub(crate) owner: String,
    pub(crate) token: Token,
    pub(crate) content: Content,
}

/// Digest of what a job's answer depends on, but for a picture that came with it: its bytes are
/// compared when the answer is stored.
pub(crate) type Content = [u8; 16];

/// Where a job's fields are read from.
pub(crate) trait ReadField {
    /// What `look` finds in a field's bytes, if there is such a field.
    fn read<T>(&self, field: &str, look: impl FnOnce(&[u8]) -> T) -> Option<T>;

    fn has(&self, field: &str) -> bool;
}

impl ReadField for Hash {
    fn read<T>(&self, field: &str, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.get(field, look)
    }

    fn has(&self, field: &str) -> bool {
        Self::has(self, field)
    }
}

/// Fields that are about to be written.
impl ReadField for &Fields {
    fn read<T>(&self, field: &str, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.iter().find(|(name, _)| *name == field).map(|(_, value)| look(value))
    }

    fn has(&self, field: &str) -> bool {
        self.iter().any(|(name, _)| *name == field)
    }
}

pub(crate) struct Job<F = Hash> {
    fields: F,
    pub(crate) state: State,
}

impl Job {
    /// The job under a key, as a client's command reads it.
    pub(crate) fn open(ctx: &Context, key: &RedisString) -> Result<Self, NoJob> {
        Self::at(ctx, key, Look::AsClient)
    }

    /// The job under a key, for ourselves.
    pub(crate) fn look(ctx: &Context, key: &RedisString) -> Result<Self, NoJob> {
        Self::at(ctx, key, Look::Unseen)
    }

    fn at(ctx: &Context, key: &RedisString, look: Look) -> Result<Self, NoJob> {
        let hash = Hash::open(ctx, key, look).map_err(|reason| match reason {
            NoHash::Missing => NoJob::Missing,
            NoHash::WrongType => NoJob::WrongType,
        })?;
        let is_marked = hash.get(MARKER, |version| version == VERSION.as_bytes()) == Some(true);
        if !is_marked || key.as_slice().len() > limits::KEY_BYTES {
            return Err(NoJob::Foreign);
        }
        let state = hash.get("state", State::parse).flatten();
        Ok(Self { state: state.ok_or(NoJob::Foreign)?, fields: hash })
    }

    /// The picture that came with the job.
    pub(super) fn data(&self) -> Option<Value> {
        self.fields.take("data")
    }

    /// Whether the picture came with the job, and is gone.
    pub(crate) fn has_lost_picture(&self) -> bool {
        self.text("image").is_some_and(|image| is_sent_along(&image)) && !self.fields.has("data")
    }
}

impl<'a> Job<&'a Fields> {
    /// The job that these fields make of a hash.
    pub(super) fn new(fields: &'a Fields) -> Self {
        Self { fields, state: State::Queued }
    }
}

impl<F: ReadField> Job<F> {
    /// What `look` finds in a field's bytes, if there is such a field.
    pub(crate) fn bytes<T>(&self, field: &str, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.fields.read(field, look)
    }

    /// Whether a field has these bytes; without any it is missing or empty.
    pub(crate) fn has(&self, field: &str, bytes: Option<&[u8]>) -> bool {
        let bytes = bytes.unwrap_or_default();
        self.bytes(field, |found| found == bytes).unwrap_or(bytes.is_empty())
    }

    /// Bytes of a field.
    pub(crate) fn length(&self, field: &str) -> u64 {
        self.bytes(field, <[u8]>::len).unwrap_or_default() as u64
    }

    /// A field as text; what is not UTF-8 is replaced.
    pub(crate) fn text(&self, field: &str) -> Option<String> {
        self.bytes(field, |bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// A field as a number.
    pub(crate) fn number(&self, field: &str) -> Option<i64> {
        // No number is longer.
        const MOST: usize = 20;
        self.parsed(field, MOST)
    }

    /// A field as what its text stands for, unless it is longer than that can be: then it is not read.
    pub(super) fn parsed<T: FromStr>(&self, field: &str, most: usize) -> Option<T> {
        let parse = |bytes: &[u8]| {
            let bytes = Some(bytes).filter(|bytes| bytes.len() <= most)?;
            std::str::from_utf8(bytes).ok()?.parse().ok()
        };
        self.bytes(field, parse).flatten()
    }

    /// A field as a number, brought into an option's range.
    pub(crate) fn limited(&self, field: &str, limit: Limit) -> Option<i64> {
        self.number(field).map(|number| limit.clamp(number))
    }

    /// How often a process died while it worked on the job.
    pub(crate) fn crashes(&self) -> i64 {
        self.number("crashes").unwrap_or_default().max(0)
    }

    /// What the queue is to know.
    ///
    /// What a claim's content is, is only looked at if `is_held` here: it may be long.
    pub(crate) fn seen(&self, is_held: impl FnOnce(&Token) -> bool) -> Seen {
        let submitted = self.told_submission();
        let priority = self.limited("priority", limits::ANY_PRIORITY).unwrap_or_default();
        let until = match self.state {
            State::Queued => self.delay().map(|delay| Due::after(submitted, delay)),
            State::Retrying => self.retry_at(),
            State::Fetching | State::Running => {
                let token = Token::parse(self.name("claim"));
                let content = if is_held(&token) { self.content() } else { Content::default() };
                return Seen::Claimed(Claimed { owner: self.name("owner"), token, content });
            }
            State::Done | State::Failed | State::Cancelled | State::Expired => {
                return Seen::Nothing;
            }
        };
        // A job that was started once does not expire.
        let is_meant = |wait: &i64| limits::EXPIRES.holds(*wait) && self.is_new();
        let expires = self.number("expires").filter(is_meant);
        let expires = expires.map(|wait| Due::after(submitted, wait));
        Seen::Waiting(Waiting {
            submitted,
            head_start: priority * PRIORITY_HEAD_START_MS,
            until,
            expires,
            is_suspect: self.crashes() > 0,
            is_retry: self.state == State::Retrying,
            origin: self.origin(),
        })
    }

    fn origin(&self) -> Origin {
        let host = self.bytes("image", |image| source::host_and_port(image).map(Arc::from));
        // What came with the job is not downloaded, whatever its address says.
        let host = host.flatten().filter(|_| !self.fields.has("data"));
        Origin { user: self.user().into(), host, model: self.name("wants").into() }
    }

    /// The user who asked; nobody, if the job did not come from a client's command.
    pub(crate) fn user(&self) -> String {
        self.name("user")
    }

    /// Where the picture comes from, without what is secret about it.
    pub(crate) fn shown_image(&self) -> Option<String> {
        self.text("image").map(|image| source::without_secrets(&image).into_owned())
    }

    /// A name of ours or of a user; nothing if it is longer than one can be.
    fn name(&self, field: &str) -> String {
        let name = |bytes: &[u8]| {
            let name = Some(bytes).filter(|name| name.len() <= NAME_BYTES);
            String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
        };
        self.bytes(field, name).unwrap_or_default()
    }

    /// When a job that waits for a moment may start, in milliseconds since 1970.
    pub(crate) fn due_at(&self) -> Option<i64> {
        self.moment().filter(|at| *at > unix_ms())
    }

    /// The moment that it waits for, or waited for.
    fn moment(&self) -> Option<i64> {
        match self.state {
            State::Queued if self.is_new() => self.delay().and_then(|_| self.wanted_at()),
            State::Retrying => self.number("retry_at"),
            _ => None,
        }
    }

    /// When it was submitted, if its hash says something that can be. Clocks of other servers, and of
    /// other times, may be ahead.
    fn told_submission(&self) -> Option<i64> {
        const TEN_YEARS_MS: i64 = 315_360_000_000;
        let now = unix_ms();
        let told = self.number("submitted_at").map(|at| at.min(now));
        told.filter(|at| *at > 0 && now - *at < TEN_YEARS_MS)
    }

    /// When it was submitted; now, if its hash does not say.
    pub(super) fn submitted_at(&self) -> i64 {
        self.told_submission().unwrap_or_else(unix_ms)
    }

    /// From when on the answer was wanted: the submission, or the end of the delay.
    pub(super) fn wanted_at(&self) -> Option<i64> {
        Some(self.told_submission()?.saturating_add(self.delay().unwrap_or_default()))
    }

    /// Since when a job has waited for its turn; not known of one whose attempt was broken off.
    pub(super) fn waits_since(&self) -> Option<i64> {
        self.moment().or_else(|| self.wanted_at().filter(|_| self.is_new()))
    }

    /// Whether it was never started.
    fn is_new(&self) -> bool {
        self.number("attempts").unwrap_or_default() == 0
    }

    fn delay(&self) -> Option<i64> {
        // One that SUBMIT would refuse is found when the job is claimed.
        self.number("delay").filter(|delay| *delay > 0 && limits::DELAY.holds(*delay))
    }

    /// When a retry is due. No pause is longer than this retry's longest, whatever the hash says.
    fn retry_at(&self) -> Option<Due> {
        let unix = self.number("retry_at")?;
        let most = retry::longest_ms(self.number("retried").unwrap_or_default());
        let left = unix.saturating_sub(unix_ms()).clamp(0, most);
        Some(Due { unix, at: Instant::now() + Duration::from_millis(left.unsigned_abs()) })
    }

    /// Milliseconds until a new job may start.
    pub(crate) fn starts_in(&self) -> i64 {
        let left = self.wanted_at().unwrap_or_default().saturating_sub(unix_ms());
        self.delay().map_or(0, |delay| left.clamp(0, delay))
    }

    /// What the answer depends on.
    pub(crate) fn content(&self) -> Content {
        /// More than a field of a job that may run has: of a longer one the length tells enough.
        const MOST: usize = 1 << 17;
        let mut digest = Sha256::new();
        for field in CONTENT {
            self.bytes(field, |value| {
                digest.update((value.len() as u64).to_le_bytes());
                digest.update(&value[..value.len().min(MOST)]);
            });
            digest.update(b"\n");
        }
        let mut content = Content::default();
        content.copy_from_slice(&digest.finalize()[..16]);
        content
    }

    /// Whether a claim of this process still holds.
    pub(super) fn is_claimed_by(&self, token: &Token) -> bool {
        self.state.is_claimed()
            && self.has("owner", Some(owner().as_bytes()))
            && self.has("claim", Some(token.as_str().as_bytes()))
    }

    /// The answer alone, or why there is none.
    pub(crate) fn outcome(&self) -> RedisResult {
        match self.state {
            State::Done => Ok(self.text("result").map_or(RedisValue::Null, reply::bulk)),
            State::Failed => {
                let code = self.text("error_code").unwrap_or_default();
                Err(reply::error(&code, self.text("error").unwrap_or_default()))
            }
            State::Cancelled => Err(reply::error("CANCELLED", "the job was cancelled")),
            State::Expired => Err(reply::error("EXPIRED", "the job was not started in time")),
            _ => Ok(RedisValue::Null),
        }
    }
}

/// The fields that make a hash a new job.
pub(super) fn new_fields() -> Fields {
    vec![(MARKER, VERSION.into()), ("state", State::Queued.name().into())]
}
