//! A job as a Redis hash: its fields, its states, its life.
//!
//! Any client can write any hash, so every read validates: a hash without the marker is no job, and
//! one that asks for what SUBMIT would refuse fails when it is claimed.
//!
//! - `state`: where a job stands
//! - `record`: the hash, read
//! - `limits`: the ranges of SUBMIT's options
//! - `new`: what a new job is to answer, checked and written
//! - `steps`: what is asked after the first prompt, written and read
//! - `request`: what a claimed job is to answer
//! - `clock`: how long it may still take
//! - `failure`: why an attempt gave no answer
//! - `retry`: how long it waits before it is tried again
//! - `past`: what earlier attempts failed with
//! - `life`: claimed, tried again, ended; and who follows that
//! - `tally`: how many have ended, and how
//! - `view`: a job as clients see it

mod clock;
mod failure;
pub(crate) mod life;
pub(crate) mod limits;
pub(crate) mod new;
mod past;
mod record;
mod request;
mod retry;
mod state;
mod steps;
pub(crate) mod tally;
pub(crate) mod view;

use std::sync::{Arc, LazyLock};

use foldhash::fast::RandomState;
use indexmap::{Equivalent, IndexMap};
use redis_module::Context;

use crate::server::{self, Db};

pub(crate) use failure::{Code, Failure};
#[cfg(test)]
pub(crate) use record::Due;
pub(crate) use record::{Claimed, Content, Job, NoJob, Origin, Seen, Waiting};
pub(crate) use request::Request;
pub(crate) use state::State;

/// A job's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct JobKey {
    pub(crate) db: Db,
    pub(crate) name: Arc<[u8]>,
}

/// Jobs by key. Every event of a hash asks, so it hashes quickly.
pub(crate) type KeyMap<V> = IndexMap<JobKey, V, RandomState>;

/// A job's key, borrowed: maps are asked with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct KeyRef<'a> {
    pub(crate) db: Db,
    pub(crate) name: &'a [u8],
}

impl KeyRef<'_> {
    pub(crate) fn to_key(self) -> JobKey {
        JobKey { db: self.db, name: self.name.into() }
    }
}

impl JobKey {
    pub(crate) fn as_ref(&self) -> KeyRef<'_> {
        KeyRef { db: self.db, name: &self.name }
    }
}

impl Equivalent<JobKey> for KeyRef<'_> {
    fn equivalent(&self, key: &JobKey) -> bool {
        *self == key.as_ref()
    }
}

/// Names one claim of a job: written to its hash, and compared wherever the claim is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl Token {
    /// One that no other claim has.
    pub(crate) fn new() -> Self {
        Self(random_name())
    }

    pub(crate) fn parse(text: String) -> Self {
        Self(text)
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Not from the server, whose random bytes are its main thread's.
fn random_name() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Names this process in the jobs that it works on; another start of the server is another owner.
pub(crate) fn owner() -> &'static str {
    static OWNER: LazyLock<String> =
        LazyLock::new(|| format!("{}-{}", std::process::id(), random_name()));
    &OWNER
}

/// Fields and values to write.
pub(crate) type Fields = Vec<(&'static str, Vec<u8>)>;

/// Sets fields of a job's hash.
fn write(ctx: &Context, key: &[u8], fields: &Fields) -> Result<(), String> {
    let mut args: Vec<&[u8]> = vec![key];
    for (field, value) in fields {
        args.push(field.as_bytes());
        args.push(value);
    }
    server::call(ctx, "HSET", &args)?;
    if drop_remains(ctx, key) { Err("the job has expired".to_owned()) } else { Ok(()) }
}

/// Deletes the hash that was made by writing to a job whose time had passed since it was looked at:
/// Redis 7.0 looks at the clock each time. Whether there was one.
fn drop_remains(ctx: &Context, key: &[u8]) -> bool {
    let is_no_job = Job::look(ctx, &server::string(ctx, key)).err() == Some(NoJob::Foreign);
    if is_no_job {
        let _ = server::call(ctx, "UNLINK", &[key]);
    }
    is_no_job
}

/// Whether the text of a job may go to this stream, as SUBMIT has it.
pub(crate) fn may_tell(ctx: &Context, key: &[u8], stream: &[u8]) -> bool {
    stream.len() <= limits::STREAM_BYTES && stream != key && server::share_slot(ctx, key, stream)
}

/// Opens a job by its key, in its own database, without a trace.
pub(crate) fn open(ctx: &Context, key: &JobKey) -> Result<Job, NoJob> {
    server::select_db(ctx, key.db);
    Job::look(ctx, &server::string(ctx, &key.name))
}
