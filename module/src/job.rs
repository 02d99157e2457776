//! A job as a Redis hash: its fields, how they are read, how they are written.
//!
//! Any client can write any hash, so every read validates: a hash without the marker is no job.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use florence_engine::GenerateOptions;
use redis_module::{CallOptions, CallOptionsBuilder, CallResult, Context, KeyType, RedisString};

use crate::{
    config, ffi,
    scheduler::{JobKey, Seen},
    state,
};

/// Field that tells a job from other hashes; its value is the version of the layout.
const MARKER: &str = "florence";
const VERSION: &str = "1";

/// One level of priority is worth this head start: higher ones go first, lower ones never starve.
const PRIORITY_HEAD_START_MS: i64 = 30_000;

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Queued,
    Fetching,
    Running,
    Retrying,
    Done,
    Failed,
    Cancelled,
    Expired,
}

impl State {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Queued, "queued"),
        (Self::Fetching, "fetching"),
        (Self::Running, "running"),
        (Self::Retrying, "retrying"),
        (Self::Done, "done"),
        (Self::Failed, "failed"),
        (Self::Cancelled, "cancelled"),
        (Self::Expired, "expired"),
    ];

    pub(crate) fn parse(name: &[u8]) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| known.as_bytes() == name).map(|(state, _)| *state)
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled | Self::Expired)
    }
}

/// Why a key is no job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoJob {
    Missing,
    WrongType,
    Foreign,
}

/// A job's hash, opened for reading under the server's lock.
pub(crate) struct Job {
    key: redis_module::key::RedisKey,
    pub(crate) state: State,
}

impl Job {
    /// The job under a key.
    pub(crate) fn open(ctx: &Context, key: &RedisString) -> Result<Self, NoJob> {
        let key = ctx.open_key(key);
        match key.key_type() {
            KeyType::Empty => return Err(NoJob::Missing),
            KeyType::Hash => {}
            _ => return Err(NoJob::WrongType),
        }
        let text = |field| key.hash_get(field).ok().flatten();
        if text(MARKER).is_none_or(|version| version.as_slice() != VERSION.as_bytes()) {
            return Err(NoJob::Foreign);
        }
        let state = text("state").and_then(|state| State::parse(state.as_slice()));
        Ok(Self { state: state.ok_or(NoJob::Foreign)?, key })
    }

    /// A field's bytes.
    pub(crate) fn bytes(&self, field: &str) -> Option<Vec<u8>> {
        Some(self.key.hash_get(field).ok()??.as_slice().to_vec())
    }

    /// Bytes of a field.
    pub(crate) fn length(&self, field: &str) -> u64 {
        self.key.hash_get(field).ok().flatten().map_or(0, |value| value.as_slice().len() as u64)
    }

    /// A field as text; what is not UTF-8 is replaced.
    pub(crate) fn text(&self, field: &str) -> Option<String> {
        Some(self.key.hash_get(field).ok()??.to_string_lossy())
    }

    /// A field as a number.
    pub(crate) fn number(&self, field: &str) -> Option<i64> {
        self.text(field)?.parse().ok()
    }

    fn is_ours(&self) -> bool {
        self.text("owner").is_some_and(|owner| owner == state::owner())
    }

    /// The state as others should see it: work that died with another process waits again.
    pub(crate) fn visible_state(&self) -> State {
        match self.state {
            State::Fetching | State::Running if !self.is_ours() => State::Queued,
            state => state,
        }
    }

    /// How often another process was working on it, and died or handed it over.
    pub(crate) fn crashes(&self) -> i64 {
        let is_interrupted =
            matches!(self.state, State::Fetching | State::Running) && !self.is_ours();
        self.number("crashes").unwrap_or_default() + i64::from(is_interrupted)
    }

    /// What the scheduler is to know.
    pub(crate) fn seen(&self) -> Seen {
        let submitted = self.number("submitted_at").unwrap_or_default();
        let priority = self.number("priority").unwrap_or_default().clamp(-9, 9);
        let rank = submitted.saturating_sub(priority * PRIORITY_HEAD_START_MS);
        let expires = self.expires_at().map(moment);
        match self.visible_state() {
            State::Queued if self.crashes() > 0 => Seen::Suspect { rank },
            State::Queued => {
                let starts = self.starts_at();
                let until = (starts > unix_ms()).then(|| moment(starts));
                Seen::Waiting { rank, until, expires }
            }
            State::Retrying => {
                let until = moment(self.number("retry_at").unwrap_or_default());
                Seen::Waiting { rank, until: Some(until), expires }
            }
            State::Fetching | State::Running => Seen::Active { rank },
            State::Done | State::Failed | State::Cancelled | State::Expired => Seen::Nothing,
        }
    }

    /// Before when a new job does not start, in milliseconds since 1970.
    pub(crate) fn starts_at(&self) -> i64 {
        let delay = self.number("delay").unwrap_or_default();
        self.number("submitted_at").unwrap_or_default().saturating_add(delay)
    }

    /// When the job is no longer of use, in milliseconds since 1970; a job that was started once
    /// does not expire.
    fn expires_at(&self) -> Option<i64> {
        let is_new = self.number("attempts").unwrap_or_default() == 0;
        let expires = self.number("expires").filter(|_| is_new)?;
        Some(self.number("submitted_at").unwrap_or_default().saturating_add(expires))
    }

    /// Whether the job waits, and has waited too long.
    pub(crate) fn is_expired(&self) -> bool {
        !self.state.is_final() && self.expires_at().is_some_and(|at| at <= unix_ms())
    }

    /// The prompts: one, or with PROMPTS a JSON list of them.
    pub(crate) fn prompts(&self) -> Vec<String> {
        let prompt = self.text("prompt").unwrap_or_default();
        serde_json::from_str(&prompt).unwrap_or_else(|_one| vec![prompt])
    }

    /// How the answer is to be generated.
    pub(crate) fn options(&self) -> GenerateOptions {
        let size = |field| self.number(field).and_then(|n| usize::try_from(n).ok());
        GenerateOptions {
            beams: size("beams"),
            max_new_tokens: size("maxtokens"),
            coordinates: config::coordinates().unwrap_or_default(),
            ..GenerateOptions::default()
        }
    }

    /// Whether the claim of `attempt` by this process still holds.
    pub(crate) fn is_claimed(&self, attempt: i64) -> bool {
        matches!(self.state, State::Fetching | State::Running)
            && self.is_ours()
            && self.number("attempts") == Some(attempt)
    }
}

/// Fields and values to write.
pub(crate) type Fields = Vec<(&'static str, Vec<u8>)>;

/// The fields of every new job.
pub(crate) fn new_fields() -> Fields {
    vec![(MARKER, VERSION.into()), ("state", State::Queued.name().into())]
}

/// Replicated, as the server's role and state allow it, errors as replies.
fn options() -> CallOptions {
    CallOptionsBuilder::new().script_mode().errors_as_replies().replicate().build()
}

/// Runs a command; its reply.
pub(crate) fn ask<'a>(ctx: &Context, command: &str, args: &[&[u8]]) -> CallResult<'a> {
    ctx.call_ext(command, &options(), args)
}

/// Runs a command; the error is the server's own text.
pub(crate) fn call(ctx: &Context, command: &str, args: &[&[u8]]) -> Result<(), String> {
    let result = ask(ctx, command, args);
    result.map(|_reply| ()).map_err(|error| error.to_utf8_string().unwrap_or_default())
}

/// Sets fields of a job's hash.
pub(crate) fn write(ctx: &Context, key: &[u8], fields: &Fields) -> Result<(), String> {
    let mut args: Vec<&[u8]> = vec![key];
    for (field, value) in fields {
        args.push(field.as_bytes());
        args.push(value);
    }
    call(ctx, "HSET", &args)
}

/// Opens a job by its scheduler key, in its own database.
pub(crate) fn open(ctx: &Context, key: &JobKey) -> Result<Job, NoJob> {
    ffi::select_db(ctx, key.db);
    Job::open(ctx, &ffi::string(ctx, &key.name))
}

/// The moment of a time in milliseconds since 1970; now if it is past.
fn moment(unix: i64) -> Instant {
    Instant::now() + Duration::from_millis(u64::try_from(unix - unix_ms()).unwrap_or_default())
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
