//! A job's life: claimed, marked as running, tried again, ended, queued again.
//!
//! Each step is one lock section, which the append-only file and the replicas see as one
//! transaction, with all that followers add to it.

use std::{sync::OnceLock, time::Duration};

use redis_module::{Context, RedisString};

use super::{
    Code, Failure, Fields, Job, JobKey, Request, State, Token, clock::Clock, drop_remains, limits,
    may_tell, open, owner, past, record::Content, retry::pause_ms, tally, write,
};
use crate::{
    figures::{
        self, Asked, Counter,
        latency::{self, Phase},
    },
    model,
    server::{self, Refused, Value, can_write, unix_ms},
};

/// The fields of a claim.
const CLAIM: [&str; 2] = ["owner", "claim"];

/// The fields that tell why an attempt failed.
const ERROR: [&str; 3] = ["error_code", "error", "error_retryable"];

/// A job during which the server died this often is not tried again.
const MOST_CRASHES: i64 = 2;

/// Whoever is told how jobs fare, and may add to the transactions.
pub(crate) trait Follower: Sync {
    /// An attempt begins.
    fn started(&self, _ctx: &Context, _key: &[u8]) {}

    /// An attempt has failed, and another will be made.
    fn retrying(&self, _ctx: &Context, _key: &[u8], _failure: &Failure) {}

    /// The job has ended; its hash says how.
    fn ended(&self, ctx: &Context, key: &[u8], end: &Ended<'_>);

    /// Whether a failure that may pass ends the job all the same.
    fn is_last(&self, _ctx: &Context, _key: &[u8], _failure: &Failure) -> bool {
        false
    }
}

/// How a job has ended.
pub(crate) struct Ended<'a> {
    pub(crate) state: State,
    pub(crate) failure: Option<&'a Failure>,
    pub(crate) attempts: i64,
}

static FOLLOWERS: OnceLock<&[&dyn Follower]> = OnceLock::new();

/// Says who follows, in the order in which they are told.
pub(crate) fn follow(followers: &'static [&'static dyn Follower]) {
    FOLLOWERS.get_or_init(|| followers);
}

fn followers() -> impl Iterator<Item = &'static dyn Follower> {
    FOLLOWERS.get().copied().unwrap_or_default().iter().copied()
}

/// What came of the wish to work on a job.
pub(crate) enum Claim {
    Taken(Box<Attempt>),
    /// There is nothing to work on, or the job has ended in the claim's place.
    Over,
    Refused(Refused),
}

/// A claimed job.
pub(crate) struct Attempt {
    token: Token,
    /// How many there were, with this one.
    pub(crate) number: i64,
    content: Content,
    /// The picture, as long as it is the server's copy.
    picture: Option<Value>,
    pub(crate) request: Request,
    pub(crate) asked: Asked,
    pub(crate) clock: Clock,
}

impl Attempt {
    /// Copies the picture into our own memory, which takes a while: not under the server's lock.
    pub(crate) fn take_picture(&mut self) {
        self.request.data = self.picture.take().map(|picture| picture.as_slice().into());
    }
}

/// Takes a job: the attempt is counted before anything is tried.
pub(crate) fn claim(ctx: &Context, key: &JobKey, token: &Token, is_expired: bool) -> Claim {
    if !can_write(ctx) {
        return Claim::Refused(Refused::All);
    }
    let job = match open(ctx, key) {
        Ok(job) if !job.state.is_final() && !job.state.is_claimed() => job,
        _ => return Claim::Over,
    };
    let name = &key.name;
    let instead = |end: End<'_>| match finish(ctx, name, end) {
        Ok(()) => Claim::Over,
        Err(error) => Claim::Refused(Refused::of(&error)),
    };
    if is_expired {
        drop(job);
        return instead(End::new(State::Expired));
    }
    let number = job.number("attempts").unwrap_or_default().max(0).saturating_add(1);
    let queued = unix_ms().saturating_sub(job.submitted_at());
    let waits_since = job.waits_since();
    let (crashes, content, request) = (job.crashes(), job.content(), Request::read(&job));
    // A key is closed before it is written.
    drop(job);
    let request = request.and_then(|request| {
        let wants = request.wants.as_deref();
        if crashes >= MOST_CRASHES {
            let text = "the server died twice while working on this job";
            Err(Failure::permanent(Code::Crash, text))
        } else if request.stream.as_ref().is_some_and(|stream| !may_tell(ctx, name, stream)) {
            Err(Failure::permanent(Code::Invalid, "the job's text cannot go to its stream"))
        } else if wants.is_some() && model::find(wants).is_none() {
            let text = format!("this server's models are {}", model::names());
            Err(Failure::permanent(Code::NoModel, text))
        } else {
            Ok(request)
        }
    });
    let request = match request {
        Ok(request) => request,
        Err(failure) => return instead(End::failed(&failure, Data::Keep)),
    };
    let fields: Fields = vec![
        ("attempts", number.to_string().into()),
        ("owner", owner().into()),
        ("claim", token.as_str().into()),
        ("started_at", unix_ms().to_string().into()),
        ("queue_ms", queued.max(0).to_string().into()),
        ("state", State::Fetching.name().into()),
    ];
    if let Err(error) = write(ctx, name, &fields) {
        return Claim::Refused(Refused::of(&error));
    }
    let asked = Asked::of(&request.chain);
    if let Some(since) = waits_since {
        latency::record_between(Phase::Queue, asked, (since, unix_ms()));
    }
    for follower in followers() {
        follower.started(ctx, name);
    }
    // Only now, since it may be large, and a claim may be refused again and again.
    let read = open(ctx, key).map(|job| request.read_picture(&job));
    let picture = match read {
        Ok(Ok(picture)) => picture,
        Ok(Err(failure)) => return instead(End::failed(&failure, Data::Keep)),
        Err(_gone) => return Claim::Over,
    };
    let clock = Clock::start(request.timeout);
    let token = token.clone();
    Claim::Taken(Box::new(Attempt { token, number, content, picture, request, asked, clock }))
}

/// Whether a job is still worked on under this claim.
pub(crate) fn is_claimed(ctx: &Context, key: &JobKey, token: &Token) -> bool {
    open(ctx, key).is_ok_and(|job| job.is_claimed_by(token))
}

/// The model works on a claimed job. Best effort: where it is not written, the job stays `fetching`,
/// which loses nothing.
pub(crate) fn mark_running(ctx: &Context, key: &JobKey, token: &Token) {
    let is_fetching = |job: &Job| job.state == State::Fetching && job.is_claimed_by(token);
    if can_write(ctx) && open(ctx, key).is_ok_and(|job| is_fetching(&job)) {
        let _ = write(ctx, &key.name, &vec![("state", State::Running.name().into())]);
    }
}

/// How an attempt has ended.
pub(crate) struct Outcome {
    /// The fields of an answer.
    pub(crate) result: Result<Fields, Failure>,
    /// A small copy of the picture.
    pub(crate) thumbnail: Option<Box<[u8]>>,
    pub(crate) fetch_ms: u64,
    pub(crate) infer_ms: u64,
}

/// What became of the end of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    Yes,
    /// The key holds something else than what was claimed.
    Dropped,
    Refused(Refused),
}

/// Stores the end of an attempt, if the key still holds what was claimed, under this claim.
pub(crate) fn store(
    ctx: &Context,
    key: &JobKey,
    attempt: &Attempt,
    outcome: &Outcome,
    is_touched: bool,
) -> Stored {
    let holds = |job: &Job| {
        job.is_claimed_by(&attempt.token)
            && job.content() == attempt.content
            // To look at a large picture is to copy it.
            && (!is_touched || job.has("data", attempt.request.data.as_deref()))
    };
    let Some(job) = open(ctx, key).ok().filter(holds) else { return Stored::Dropped };
    if !can_write(ctx) {
        return Stored::Refused(Refused::All);
    }
    let retries = job.limited("retries", limits::RETRIES).unwrap_or_default();
    let retried = job.number("retried").unwrap_or_default().max(0);
    let failed = |failure| past::and(&job, failure, unix_ms());
    let errors = outcome.result.as_ref().err().map(failed);
    drop(job);
    let name = &key.name;
    let mut fields: Fields = vec![
        ("fetch_ms", outcome.fetch_ms.to_string().into()),
        ("infer_ms", outcome.infer_ms.to_string().into()),
    ];
    let is_over = |failure: &Failure| {
        retried >= retries || followers().any(|follower| follower.is_last(ctx, name, failure))
    };
    let written = match &outcome.result {
        Ok(answer) => {
            fields.extend(answer.iter().cloned());
            let thumbnail = outcome.thumbnail.as_deref();
            let end = End { data: Data::Drop, fields, thumbnail, ..End::new(State::Done) };
            finish(ctx, name, end)
        }
        Err(failure) if failure.is_retryable && !is_over(failure) => {
            fields.extend(errors);
            retry_later(ctx, name, failure, (retried, fields))
        }
        Err(failure) => {
            // What will fail again needs its picture no more.
            let data = if failure.is_retryable { Data::Keep } else { Data::Drop };
            let thumbnail = outcome.thumbnail.as_deref();
            finish(ctx, name, End { fields, thumbnail, ..End::failed(failure, data) })
        }
    };
    written.map_or_else(|error| Stored::Refused(Refused::of(&error)), |()| Stored::Yes)
}

/// Lets a job wait for its next attempt.
fn retry_later(
    ctx: &Context,
    key: &[u8],
    failure: &Failure,
    (retried, mut fields): (i64, Fields),
) -> Result<(), String> {
    fields.extend(failure.fields());
    fields.push(("retried", (retried + 1).to_string().into()));
    let at = unix_ms().saturating_add(pause_ms(retried));
    fields.push(("retry_at", at.to_string().into()));
    fields.push(("state", State::Retrying.name().into()));
    write(ctx, key, &fields)?;
    server::remove_fields(ctx, &server::string(ctx, key), &CLAIM);
    for follower in followers() {
        follower.retrying(ctx, key, failure);
    }
    figures::RETRIED.add(1);
    Ok(())
}

/// Whether FLORENCE.RETRY may need a submitted picture again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    Keep,
    Drop,
}

/// The end of a job.
pub(crate) struct End<'a> {
    state: State,
    failure: Option<&'a Failure>,
    data: Data,
    fields: Fields,
    thumbnail: Option<&'a [u8]>,
}

impl<'a> End<'a> {
    fn new(state: State) -> Self {
        Self { state, failure: None, data: Data::Keep, fields: Vec::new(), thumbnail: None }
    }

    fn failed(failure: &'a Failure, data: Data) -> Self {
        Self { failure: Some(failure), data, ..Self::new(State::Failed) }
    }

    /// Somebody does not want the job any more.
    pub(crate) fn cancelled(data: Data) -> Self {
        Self { data, ..Self::new(State::Cancelled) }
    }
}

/// Ends a job: writes the fields, drops the claim, starts the time to live, tells the followers.
pub(crate) fn finish(ctx: &Context, key: &[u8], end: End<'_>) -> Result<(), String> {
    let End { state, failure, data, mut fields, thumbnail } = end;
    let name = server::string(ctx, key);
    let Ending { attempts, ttl, asked, wanted_at } = Ending::of(ctx, &name);
    let now = unix_ms();
    if let Some(failure) = failure {
        fields.extend(failure.fields());
    }
    fields.push(("finished_at", now.to_string().into()));
    fields.push(("state", state.name().into()));
    // The state goes first: to take the claim from unfinished work would stop it.
    write(ctx, key, &fields)?;
    let mut gone = vec!["owner", "claim", "retry_at"];
    if data == Data::Drop {
        gone.push("data");
    }
    if state == State::Done {
        // Of earlier attempts.
        gone.extend(ERROR);
        if !fields.iter().any(|(name, _)| *name == "nbest") {
            gone.push("nbest");
        }
    }
    match thumbnail {
        // A command would show it to MONITOR.
        Some(bytes) => {
            server::set_fields(ctx, &name, &[server::field(ctx, "thumbnail", bytes)]);
            drop_remains(ctx, key);
        }
        // Of an earlier picture.
        None if state == State::Done => gone.push("thumbnail"),
        None => {}
    }
    server::remove_fields(ctx, &name, &gone);
    if ttl > 0 {
        server::expire_in(ctx, &name, Duration::from_secs(ttl.unsigned_abs()));
    }
    counter(state).add(1);
    if let Some(failure) = failure {
        failure.code.counter().add(1);
    }
    tally::count(state, failure.map(|failure| failure.code), asked);
    if let Some(wanted_at) = wanted_at.filter(|_| state == State::Done) {
        latency::record_between(Phase::Total, asked, (wanted_at, now));
    }
    let ended = Ended { state, failure, attempts };
    for follower in followers() {
        follower.ended(ctx, key, &ended);
    }
    Ok(())
}

/// What is to be known of a job that ends.
struct Ending {
    attempts: i64,
    /// Seconds.
    ttl: i64,
    asked: Asked,
    wanted_at: Option<i64>,
}

impl Ending {
    fn of(ctx: &Context, name: &RedisString) -> Self {
        let Ok(job) = Job::look(ctx, name) else {
            return Self {
                attempts: 0,
                ttl: 0,
                asked: Asked::of_field(b"", false),
                wanted_at: None,
            };
        };
        Self {
            attempts: job.number("attempts").unwrap_or_default(),
            ttl: job.limited("ttl", limits::TTL).unwrap_or_default(),
            asked: tally::asked(&job),
            wanted_at: job.wanted_at(),
        }
    }
}

/// Ends a job that our own fault keeps from going on.
pub(crate) fn give_up(ctx: &Context, key: &JobKey) -> Result<(), String> {
    if !can_write(ctx) {
        return Ok(());
    }
    let failure = Failure::internal();
    end_if(ctx, key, |state| !state.is_final(), End::failed(&failure, Data::Keep))
}

/// Ends a job that was not started in time.
pub(crate) fn expire(ctx: &Context, key: &JobKey) -> Result<(), String> {
    let is_waiting = |state: State| !state.is_final() && !state.is_claimed();
    end_if(ctx, key, is_waiting, End::new(State::Expired))
}

fn end_if(
    ctx: &Context,
    key: &JobKey,
    is_meant: impl Fn(State) -> bool,
    end: End<'_>,
) -> Result<(), String> {
    // The job is closed again before it is written.
    let state = open(ctx, key).map(|job| job.state);
    if state.is_ok_and(is_meant) { finish(ctx, &key.name, end) } else { Ok(()) }
}

/// Counts the jobs that ended so.
fn counter(state: State) -> &'static Counter {
    match state {
        State::Cancelled => &figures::CANCELLED,
        State::Expired => &figures::EXPIRED,
        State::Failed => &figures::FAILED,
        _ => &figures::DONE,
    }
}

/// Queues a job again whose claim nobody holds any more; `has_crashed` if the server died on it.
pub(crate) fn unclaim(ctx: &Context, key: &JobKey, has_crashed: bool) -> Result<(), String> {
    let mut fields: Fields = Vec::new();
    match open(ctx, key) {
        Ok(job) if job.state.is_claimed() && has_crashed => {
            let failure = Failure::permanent(Code::Crash, "the server died during the attempt");
            let crashes = job.crashes().saturating_add(1);
            fields.push(("crashes", crashes.to_string().into()));
            fields.push(past::and(&job, &failure, unix_ms()));
        }
        Ok(job) if job.state.is_claimed() => {}
        _ => return Ok(()),
    }
    fields.push(("state", State::Queued.name().into()));
    write(ctx, &key.name, &fields)?;
    server::remove_fields(ctx, &server::string(ctx, &key.name), &CLAIM);
    Ok(())
}

/// The job as it was when it was submitted, but now, and without its delay. Only in a command, for
/// which the server has found out that it takes writes; no event tells the queue.
pub(crate) fn requeue(ctx: &Context, key: &[u8]) -> Result<(), String> {
    let mut gone =
        vec!["finished_at", "started_at", "crashes", "attempts", "retried", "delay", "queue_ms"];
    gone.extend(ERROR);
    gone.push(past::FIELD);
    let fields = [
        server::field(ctx, "submitted_at", unix_ms().to_string().as_bytes()),
        server::field(ctx, "state", State::Queued.name().as_bytes()),
    ];
    let name = server::string(ctx, key);
    server::set_fields(ctx, &name, &fields);
    server::remove_fields(ctx, &name, &gone);
    server::call(ctx, "PERSIST", &[key])
}
