//! `FLORENCE.JOBS [STATE state] [COUNT n]`: unfinished jobs in the order of their turn, or ended ones,
//! the newest end first.

use std::time::{Duration, Instant};

use redis_module::{AclPermissions, Context, RedisError, RedisResult, RedisString, RedisValue};

use super::args::Args;
use crate::{
    job::{self, Job, JobKey, State, limits},
    queue::{ended, queue},
    server::{
        self,
        reply::{self, bulk},
    },
};

const DEFAULT_COUNT: i64 = 100;
/// Most jobs that are listed, whatever COUNT says: the main thread looks at each.
const MOST: usize = 1000;
/// So many are looked at, most of which may be hidden from this user, and for so long: who has many
/// patterns of keys takes longer for each.
const LOOKED: usize = 10_000;
const LONGEST: Duration = Duration::from_millis(3);

/// Which jobs are to be listed.
enum Wanted {
    Unfinished(Option<State>),
    Ended(Option<State>),
}

impl Wanted {
    fn parse(name: &[u8]) -> Result<Self, RedisError> {
        if name == b"ended" {
            return Ok(Self::Ended(None));
        }
        let unknown = || {
            let name = server::printable(name);
            reply::error("ERR", format!("unknown state '{name}'"))
        };
        let state = State::parse(name).ok_or_else(unknown)?;
        Ok(if state.is_final() { Self::Ended(Some(state)) } else { Self::Unfinished(Some(state)) })
    }
}

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let (mut wanted, mut count) = (Wanted::Unfinished(None), DEFAULT_COUNT);
    while let Some(option) = args.option() {
        match option.to_string_lossy().to_ascii_uppercase().as_str() {
            "STATE" => wanted = Wanted::parse(&args.value("STATE")?.to_ascii_lowercase())?,
            "COUNT" => count = args.integer("COUNT", 1, 100_000)?,
            _ => return Err(reply::syntax(option.as_slice())),
        }
    }
    let count = usize::try_from(count).unwrap_or_default().min(MOST);
    Ok(RedisValue::Array(match wanted {
        Wanted::Unfinished(state) => unfinished(ctx, state, count),
        Wanted::Ended(state) => ended(ctx, state, count),
    }))
}

fn unfinished(ctx: &Context, state: Option<State>, count: usize) -> Vec<RedisValue> {
    let db = server::selected_db(ctx);
    let visible = Visible::new(ctx);
    let rows = |keys: Vec<JobKey>| -> Vec<RedisValue> {
        let rows = visible.among(keys, count).filter_map(|key| {
            let job = job::open(ctx, &key).ok()?;
            let found = queue().state(key.as_ref(), &job);
            let due = job.due_at().filter(|_| matches!(found, State::Queued | State::Retrying));
            let due = due.map(|at| ("due_at", RedisValue::Integer(at)));
            let more = due.into_iter().chain(stream(&job));
            state.is_none_or(|state| state == found).then(|| row(&key, found, more))
        });
        rows.take(count).collect()
    };
    // A few may be in another state by now.
    let keys = queue().keys(db, state, 2 * count, |_| true);
    let is_all = keys.len() < 2 * count;
    let found = rows(keys);
    if is_all || found.len() == count {
        return found;
    }
    // Most are hidden from this user.
    rows(queue().keys(db, state, LOOKED, |_| true))
}

fn ended(ctx: &Context, state: Option<State>, count: usize) -> Vec<RedisValue> {
    let keys = ended::newest(server::selected_db(ctx), state).take(LOOKED);
    let visible = Visible::new(ctx);
    let rows = visible.among(keys, count).filter_map(|key| {
        let is_meant = |job: &Job| match state {
            Some(state) => job.state == state,
            None => job.state.is_final(),
        };
        let Some(job) = job::open(ctx, &key).ok().filter(is_meant) else {
            // No event has told of what took its place.
            ended::forget(key.as_ref());
            return None;
        };
        let at = job.number("finished_at").map(|at| ("finished_at", RedisValue::Integer(at)));
        let has_failed = job.state == State::Failed;
        let code = has_failed.then(|| short(&job, "error_code", limits::CODE_BYTES)).flatten();
        let code = code.map(|code| ("code", RedisValue::StringBuffer(code)));
        let more = at.into_iter().chain(code);
        Some(row(&key, job.state, more.chain(stream(&job))))
    });
    rows.take(count).collect()
}

/// A field, unless it is longer than any of ours: a list of a thousand such would stall the server.
fn short(job: &Job, field: &str, most: usize) -> Option<Vec<u8>> {
    job.bytes(field, |bytes| (bytes.len() <= most).then(|| bytes.to_vec())).flatten()
}

/// Where the job's text goes while it is generated.
fn stream(job: &Job) -> Option<(&'static str, RedisValue)> {
    short(job, "stream", limits::STREAM_BYTES).map(|key| ("stream", RedisValue::StringBuffer(key)))
}

fn row(
    key: &JobKey,
    state: State,
    more: impl IntoIterator<Item = (&'static str, RedisValue)>,
) -> RedisValue {
    let known =
        [("id", RedisValue::StringBuffer(key.name.to_vec())), ("state", bulk(state.name()))];
    reply::map(known.into_iter().chain(more))
}

/// Keys that the calling user may read: who may not does not learn of them either.
struct Visible<'a> {
    ctx: &'a Context,
    user: Option<RedisString>,
}

impl<'a> Visible<'a> {
    fn new(ctx: &'a Context) -> Self {
        Self { ctx, user: server::user(ctx) }
    }

    /// Those of some keys; after the first `most` of them for a short time only.
    fn among(
        &self,
        keys: impl IntoIterator<Item = JobKey>,
        most: usize,
    ) -> impl Iterator<Item = JobKey> {
        let start = Instant::now();
        let keys = keys.into_iter().enumerate();
        let in_time = keys.take_while(move |(i, _)| *i < most || start.elapsed() < LONGEST);
        in_time.map(|(_, key)| key).filter(|key| self.has(key))
    }

    fn has(&self, key: &JobKey) -> bool {
        let name = server::string(self.ctx, &key.name);
        let may_read =
            |user| self.ctx.acl_check_key_permission(user, &name, &AclPermissions::ACCESS).is_ok();
        self.user.as_ref().is_none_or(may_read)
    }
}
