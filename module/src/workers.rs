//! The threads: prepare threads fetch and decode, one engine thread computes, one committer stores.
//!
//! ```text
//! scheduler -> prepare (claim, fetch, decode) -> engine (batch, compute) -> committer (store)
//! ```
//!
//! Only claims, state changes and answers take the server's lock, each for a few calls. A panic
//! ends one attempt of one job (or of one batch), never a thread.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use florence_engine::{
    Answer, Error, Florence, GenerateOptions, Job as EngineJob, LoadOptions, PrepareOptions,
    Prepared,
    fetch::{FetchError, FetchLimits, Fetcher},
    image::DecodeLimits,
};
use redis_module::{Context, ContextFlags, MODULE_CONTEXT, RedisError};

use crate::{
    config, events, ffi,
    job::{self, Fields, Job, State, unix_ms},
    reply,
    scheduler::{Control, JobKey, Next},
    state::{self, Counters, Model, SHARED, is_shutting_down, schedule},
};

/// How long to pause when the server does not take writes just now.
const WRITE_PAUSE: Duration = Duration::from_millis(50);
/// A job whose attempts died with the server this often is not tried again.
const MAX_CRASHES: i64 = 2;

/// Starts the threads; on the first turn of the event loop.
pub(crate) fn start(ctx: &Context) {
    ctx.log_notice("florence: starting threads, loading the model");
    let (work, batches) = bounded::<Work>(config::size(&config::MAX_BATCH));
    let (commits, outbox) = unbounded::<Commit>();
    for i in 0..config::size(&config::PREPARE_THREADS) {
        let (work, commits) = (work.clone(), commits.clone());
        spawn(&format!("fl-prepare-{i}"), move || prepare_loop(&work, &commits));
    }
    spawn("fl-engine", move || {
        if let Some(florence) = load_model() {
            engine_loop(&florence, &batches, &commits);
        }
    });
    spawn("fl-commit", move || commit_loop(&outbox));
    events::role_changed(ctx);
}

/// Starts a thread; it is never joined: at shutdown the process ends under it, by design of the
/// job states nothing is lost.
fn spawn(name: &str, f: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(f);
    if let Err(error) = spawned {
        MODULE_CONTEXT.log_warning(&format!("florence: cannot start thread {name}: {error}"));
    }
}

/// The server is going down: no new work, running work stops at its next step.
pub(crate) fn stop() {
    SHARED.is_shutting_down.store(true, Ordering::Relaxed);
    schedule(|scheduler| {
        scheduler.set_enabled(false);
        scheduler.clear(None);
    });
}

fn load_model() -> Option<Arc<Florence>> {
    let directory = config::text(&config::MODEL);
    let threads = match config::size(&config::THREADS) {
        // Redis' main thread keeps a core to itself.
        0 => thread::available_parallelism().map_or(1, |n| (n.get() - 1).max(1)),
        threads => threads,
    };
    let nice = i32::try_from(config::number(&config::NICE)).unwrap_or_default();
    let options = LoadOptions { threads, nice, ..LoadOptions::default() };
    let start = Instant::now();
    let loaded = catch_unwind(|| {
        if directory.is_empty() {
            Florence::embedded(&options)
        } else {
            Florence::load(Path::new(&directory), &options)
        }
    });
    let problem = match loaded {
        Ok(Ok(florence)) => {
            let florence = Arc::new(florence);
            MODULE_CONTEXT.log_notice(&format!(
                "florence: model {} ready after {} ms, {threads} threads",
                florence.name(),
                start.elapsed().as_millis()
            ));
            *SHARED.model.write() = Model::Ready(Arc::clone(&florence));
            SHARED.work.notify_all();
            return Some(florence);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_panic) => "loading it failed with an internal error".to_owned(),
    };
    MODULE_CONTEXT.log_warning(&format!("florence: cannot load the model: {problem}"));
    *SHARED.model.write() = Model::Failed(problem);
    None
}

// Prepare: claim, fetch, decode.

/// A job that this process has claimed.
struct Claimed {
    key: JobKey,
    control: Arc<Control>,
    attempt: i64,
    prompt: String,
    image: String,
    data: Option<Vec<u8>>,
    options: GenerateOptions,
    deadline: Instant,
}

impl Claimed {
    fn is_over(&self) -> bool {
        self.control.is_stopped() || Instant::now() >= self.deadline
    }
}

/// A claimed job, ready for the model.
struct Work {
    claimed: Claimed,
    prepared: Prepared,
    fetch_ms: u64,
}

fn prepare_loop(work: &Sender<Work>, commits: &Sender<Commit>) {
    let fetcher = Fetcher::new(FetchLimits {
        bytes: config::number(&config::MAX_IMAGE_BYTES),
        total: config::milliseconds(&config::FETCH_TIMEOUT_MS),
        ..FetchLimits::default()
    });
    while let Some((key, control, florence)) = next_job() {
        let claimed = match with_server(|ctx| claim(ctx, &key, &control)) {
            Claim::Taken(claimed) => claimed,
            Claim::Gone => continue,
            Claim::NotNow => {
                schedule(|scheduler| scheduler.put_back(&key, Instant::now() + WRITE_PAUSE));
                continue;
            }
        };
        let start = Instant::now();
        let prepared = catch_unwind(AssertUnwindSafe(|| prepare(&florence, &fetcher, &claimed)));
        let prepared = prepared.unwrap_or_else(|_panic| Err(Failure::internal()));
        let fetch_ms = elapsed_ms(start);
        Counters::add(&SHARED.counters.fetch_ms, fetch_ms);
        let sent = match prepared {
            Ok(prepared) => work.send(Work { claimed, prepared, fetch_ms }).is_ok(),
            Err(failure) => {
                let result = Err(failure);
                commits.send(Commit { claimed, result, fetch_ms, infer_ms: 0 }).is_ok()
            }
        };
        if !sent {
            return;
        }
    }
}

/// Waits for a job and for a model that can answer it; `None` at shutdown.
fn next_job() -> Option<(JobKey, Arc<Control>, Arc<Florence>)> {
    let mut scheduler = SHARED.scheduler.lock();
    loop {
        if is_shutting_down() {
            return None;
        }
        let florence = match &*SHARED.model.read() {
            Model::Ready(florence) => Some(Arc::clone(florence)),
            _ => None,
        };
        let until = match florence {
            None => None,
            Some(florence) => match scheduler.next(Instant::now()) {
                Next::Run(key, control) => return Some((key, control, florence)),
                Next::WaitUntil(until) => Some(until),
                Next::Idle => None,
            },
        };
        let until = until.unwrap_or_else(|| Instant::now() + Duration::from_secs(1));
        SHARED.work.wait_until(&mut scheduler, until);
    }
}

enum Claim {
    Taken(Claimed),
    Gone,
    NotNow,
}

/// Takes a job under the server's lock: the attempt is counted before anything is tried.
fn claim(ctx: &Context, key: &JobKey, control: &Arc<Control>) -> Claim {
    if !can_write(ctx) {
        return Claim::NotNow;
    }
    let Ok(job) = job::open(ctx, key) else { return Claim::Gone };
    if control.is_stopped() || job.state.is_final() {
        return Claim::Gone;
    }
    let crashes = job.number("crashes").unwrap_or_default() + i64::from(job.is_interrupted());
    let attempt = job.number("attempts").unwrap_or_default() + 1;
    let timeout = u64::try_from(job.number("timeout").unwrap_or(300_000)).unwrap_or_default();
    let claimed = Claimed {
        key: key.clone(),
        control: Arc::clone(control),
        attempt,
        prompt: job.text("prompt").unwrap_or_default(),
        image: job.text("image").unwrap_or_default(),
        data: job.bytes("data"),
        options: job.options(),
        deadline: Instant::now() + Duration::from_millis(timeout),
    };
    let ttl = job.number("ttl").unwrap_or_default();
    let queued = unix_ms() - job.number("submitted_at").unwrap_or_default();
    drop(job);
    if crashes >= MAX_CRASHES {
        let failure =
            Failure::permanent("CRASH", "the server died twice while working on this job");
        let _ = job::finish(ctx, &key.name, State::Failed, ttl, failure.fields());
        Counters::add(&SHARED.counters.failed, 1);
        return Claim::Gone;
    }
    let fields: Fields = vec![
        ("attempts", attempt.to_string().into()),
        ("crashes", crashes.to_string().into()),
        ("owner", state::owner().into()),
        ("started_at", unix_ms().to_string().into()),
        ("queue_ms", queued.to_string().into()),
        ("state", State::Fetching.name().into()),
    ];
    match job::write(ctx, &key.name, &fields) {
        Ok(()) => Claim::Taken(claimed),
        Err(_refused) => Claim::NotNow,
    }
}

fn prepare(florence: &Florence, fetcher: &Fetcher, claimed: &Claimed) -> Result<Prepared, Failure> {
    let fetched;
    let bytes = if let Some(data) = &claimed.data {
        data
    } else {
        fetched = source(fetcher, &claimed.image)?;
        &fetched
    };
    let options = PrepareOptions {
        limits: DecodeLimits {
            pixels: config::number(&config::MAX_IMAGE_PIXELS),
            ..DecodeLimits::default()
        },
        ..PrepareOptions::default()
    };
    florence.prepare(bytes, &claimed.prompt, &options).map_err(Failure::from)
}

/// Whether a URI may be fetched at all; asked before a job is stored.
pub(crate) fn check_source(uri: &str) -> Result<(), RedisError> {
    if uri.starts_with("http://") || uri.starts_with("https://") {
        return Ok(());
    }
    let Some(path) = local_path(uri) else {
        let text = "the image must be an http(s) URL, an absolute path, DATA bytes or KEY key";
        return Err(reply::error("ERR", text));
    };
    let is_plain = path.components().all(|part| part != std::path::Component::ParentDir);
    if is_plain && config::file_roots().iter().any(|root| path.starts_with(root)) {
        return Ok(());
    }
    Err(reply::error("DENIED", "the file is not below a directory of florence.file-roots"))
}

fn local_path(uri: &str) -> Option<PathBuf> {
    let path = uri.strip_prefix("file://").unwrap_or(uri);
    path.starts_with('/').then(|| PathBuf::from(path))
}

fn source(fetcher: &Fetcher, uri: &str) -> Result<Vec<u8>, Failure> {
    match local_path(uri) {
        Some(path) => read_file(&path),
        None => fetcher.fetch(uri).map_err(|error| Failure::from(Error::from(error))),
    }
}

/// Reads a file whose real path, symbolic links followed, is below an allowed directory.
fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    let missing = |_error| Failure::permanent("FETCH", "the file cannot be read");
    let real = path.canonicalize().map_err(missing)?;
    let roots = config::file_roots();
    let is_allowed =
        roots.iter().filter_map(|root| root.canonicalize().ok()).any(|root| real.starts_with(root));
    if !is_allowed {
        let text = "the file is not below a directory of florence.file-roots";
        return Err(Failure::permanent("DENIED", text));
    }
    let metadata = real.metadata().map_err(missing)?;
    if !metadata.is_file() || metadata.len() > config::number(&config::MAX_IMAGE_BYTES) {
        return Err(Failure::permanent("FETCH", "not a regular file, or larger than the limit"));
    }
    std::fs::read(&real).map_err(missing)
}

// Engine: form batches late, compute.

fn engine_loop(florence: &Florence, batches: &Receiver<Work>, commits: &Sender<Commit>) {
    while let Ok(first) = batches.recv() {
        let mut batch = vec![first];
        batch.extend(batches.try_iter().take(config::size(&config::MAX_BATCH) - 1));
        with_server(|ctx| mark_running(ctx, &batch));
        let start = Instant::now();
        let results = compute(florence, &batch);
        let infer_ms = elapsed_ms(start);
        Counters::add(&SHARED.counters.batches, 1);
        Counters::add(&SHARED.counters.infer_ms, infer_ms);
        for (Work { claimed, fetch_ms, .. }, result) in batch.into_iter().zip(results) {
            if commits.send(Commit { claimed, result, fetch_ms, infer_ms }).is_err() {
                return;
            }
        }
    }
}

/// Best effort: while writes are paused the jobs stay `fetching`, which loses nothing.
fn mark_running(ctx: &Context, batch: &[Work]) {
    if !can_write(ctx) {
        return;
    }
    for Work { claimed, .. } in batch {
        let is_claimed =
            job::open(ctx, &claimed.key).is_ok_and(|job| job.is_claimed(claimed.attempt));
        if is_claimed {
            let fields = vec![("state", State::Running.name().into())];
            let _ = job::write(ctx, &claimed.key.name, &fields);
        }
    }
}

/// Runs a batch; if it fails as a whole, each of its jobs alone, so that one cannot harm others.
fn compute(florence: &Florence, batch: &[Work]) -> Vec<Result<Answer, Failure>> {
    let run = |batch: &[Work]| {
        let jobs: Vec<EngineJob<'_>> = batch
            .iter()
            .map(|work| EngineJob { prepared: &work.prepared, options: &work.claimed.options })
            .collect();
        let stopped = |i: usize| batch[i].claimed.is_over();
        catch_unwind(AssertUnwindSafe(|| florence.run(&jobs, &stopped))).unwrap_or_else(|_panic| {
            Counters::add(&SHARED.counters.panics, 1);
            Err(Error::Cancelled)
        })
    };
    let explain = |work: &Work, answer: Option<Answer>| {
        answer.ok_or_else(|| {
            if work.claimed.control.is_stopped() {
                return Failure::permanent("CANCELLED", "the job was cancelled");
            }
            Failure {
                is_retryable: true,
                ..Failure::permanent("TIMEOUT", "the attempt took too long")
            }
        })
    };
    match run(batch) {
        Ok(answers) => batch.iter().zip(answers).map(|(work, a)| explain(work, a)).collect(),
        Err(_) if batch.len() > 1 => {
            batch.iter().flat_map(|work| compute(florence, std::slice::from_ref(work))).collect()
        }
        Err(_) => batch.iter().map(|_| Err(Failure::internal())).collect(),
    }
}

// Commit: store answers under the server's lock.

/// The end of an attempt, on its way into the key.
struct Commit {
    claimed: Claimed,
    result: Result<Answer, Failure>,
    fetch_ms: u64,
    infer_ms: u64,
}

/// Why an attempt gave no answer, as the job's `error` shows it.
struct Failure {
    code: &'static str,
    message: String,
    is_retryable: bool,
}

impl Failure {
    fn permanent(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), is_retryable: false }
    }

    fn internal() -> Self {
        Self::permanent("INTERNAL", "internal error")
    }

    fn fields(&self) -> Fields {
        vec![
            ("error_code", self.code.into()),
            ("error", self.message.clone().into()),
            ("error_retryable", i64::from(self.is_retryable).to_string().into()),
        ]
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (code, is_retryable) = match &error {
            Error::Prompt(_) => ("PROMPT", false),
            Error::Image(_) => ("IMAGE", false),
            Error::Fetch(FetchError::BadUrl) => ("DENIED", false),
            Error::Fetch(fetch) => ("FETCH", fetch.is_transient()),
            _ => return Self::internal(),
        };
        Self { code, message: error.to_string(), is_retryable }
    }
}

fn commit_loop(outbox: &Receiver<Commit>) {
    let mut waiting: Vec<Commit> = Vec::new();
    loop {
        let timeout = if waiting.is_empty() { Duration::from_hours(1) } else { WRITE_PAUSE };
        match outbox.recv_timeout(timeout) {
            Ok(commit) => waiting.push(commit),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.extend(outbox.try_iter().take(64));
        if is_shutting_down() {
            return;
        }
        waiting = with_server(|ctx| {
            waiting.into_iter().filter_map(|commit| store(ctx, commit)).collect()
        });
        ffi::wake_event_loop();
    }
}

/// Stores the end of an attempt; gives it back if the server takes no writes just now.
///
/// An answer for a job that was deleted, cancelled, renamed or claimed elsewhere is dropped.
fn store(ctx: &Context, commit: Commit) -> Option<Commit> {
    let flags = ctx.get_flags();
    if ffi::are_writes_paused() && flags.contains(ContextFlags::MASTER) {
        return Some(commit);
    }
    let job = job::open(ctx, &commit.claimed.key).ok();
    let job = job.filter(|job| job.is_claimed(commit.claimed.attempt));
    let Some(job) = job.filter(|_| flags.contains(ContextFlags::MASTER)) else {
        Counters::add(&SHARED.counters.dropped, 1);
        return None;
    };
    match write_end(ctx, &commit, &job) {
        Ok(()) => None,
        Err(_refused) => Some(commit),
    }
}

fn write_end(ctx: &Context, commit: &Commit, job: &Job) -> Result<(), String> {
    let name = &commit.claimed.key.name;
    let ttl = job.number("ttl").unwrap_or_default();
    let mut fields: Fields = vec![
        ("fetch_ms", commit.fetch_ms.to_string().into()),
        ("infer_ms", commit.infer_ms.to_string().into()),
    ];
    match &commit.result {
        Ok(answer) => {
            fields.push(("result", answer.json.to_string().into()));
            fields.push(("text", answer.text.clone().into()));
            fields.push(("tokens", answer.token_ids.len().to_string().into()));
            fields.push(("model", model_name().into()));
            job::finish(ctx, name, State::Done, ttl, fields)?;
            Counters::add(&SHARED.counters.done, 1);
        }
        Err(failure) => {
            fields.extend(failure.fields());
            let retries = job.number("retries").unwrap_or_default();
            if failure.is_retryable && commit.claimed.attempt <= retries {
                let at = unix_ms() + retry_delay_ms(commit.claimed.attempt);
                fields.push(("retry_at", at.to_string().into()));
                fields.push(("state", State::Retrying.name().into()));
                job::write(ctx, name, &fields)?;
                Counters::add(&SHARED.counters.retried, 1);
            } else {
                job::finish(ctx, name, State::Failed, ttl, fields)?;
                Counters::add(&SHARED.counters.failed, 1);
            }
        }
    }
    Ok(())
}

/// Doubles with every attempt, up to a minute, and varies by a quarter so that jobs that failed
/// together do not return together.
fn retry_delay_ms(attempt: i64) -> i64 {
    let base = i64::try_from(config::number(&config::RETRY_DELAY_MS)).unwrap_or(1000);
    let doublings = u32::try_from(attempt - 1).unwrap_or_default().min(16);
    let delay = base.saturating_mul(1 << doublings).min(base.max(60_000));
    let jitter = i64::from(ffi::random()[0]);
    delay - delay / 4 + delay / 2 * jitter / 256
}

fn model_name() -> String {
    match &*SHARED.model.read() {
        Model::Ready(florence) => florence.name().to_owned(),
        _ => String::new(),
    }
}

/// Whether this server may write now: a master, loaded, not paused.
fn can_write(ctx: &Context) -> bool {
    let flags = ctx.get_flags();
    flags.contains(ContextFlags::MASTER)
        && !flags.contains(ContextFlags::LOADING)
        && !ffi::are_writes_paused()
}

/// Runs `f` under the server's lock.
fn with_server<T>(f: impl FnOnce(&Context) -> T) -> T {
    let guard = MODULE_CONTEXT.lock();
    let result = f(&guard);
    drop(guard);
    // The lock is unfair: without a pause a busy thread could keep the main thread from it.
    thread::sleep(Duration::from_micros(1));
    result
}

fn elapsed_ms(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
