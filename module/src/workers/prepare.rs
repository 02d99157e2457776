//! Prepare threads: claim a job, fetch and decode its picture, tokenize its prompt.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;
use florence_engine::{
    Answer, Error, Florence, GenerateOptions, Picture, PrepareOptions, Question, Visual,
    image::DecodeLimits,
};
use redis_module::Context;

use super::{Failure, WRITE_PAUSE, can_write, commit::Commit, elapsed_ms, with_server};
use crate::{
    cache::{CACHES, Keys, Verdict},
    celery, config,
    ending::{self, Data},
    job::{self, Fields, Job, State, unix_ms},
    scheduler::{Control, JobKey, Next, Phase},
    source,
    state::{self, Counters, Model, SHARED, is_shutting_down, schedule},
};

/// A job whose attempts died with the server this often is not tried again.
const MAX_CRASHES: i64 = 2;

/// A job that this process has claimed.
#[derive(Clone)]
pub(super) struct Claimed {
    pub(super) key: JobKey,
    pub(super) control: Arc<Control>,
    pub(super) attempt: i64,
    pub(super) prompts: Vec<String>,
    pub(super) image: String,
    pub(super) data: Option<Arc<[u8]>>,
    pub(super) options: GenerateOptions,
    /// Neither takes nor leaves anything in the caches.
    pub(super) no_cache: bool,
    pub(super) deadline: Instant,
}

impl Claimed {
    pub(super) fn is_over(&self) -> bool {
        self.control.is_stopped() || Instant::now() >= self.deadline
    }

    /// Whether the job under the key is still the one that was claimed, by this claim. The key
    /// may hold a later job of the same name: its event has stopped this claim's control.
    pub(super) fn holds(&self, job: &Job) -> bool {
        !self.control.is_stopped() && job.is_claimed(self.attempt)
    }
}

/// A claimed job, ready for the model.
pub(super) struct Work {
    pub(super) claimed: Claimed,
    /// In the order of the prompts.
    pub(super) parts: Vec<Part>,
    pub(super) input: Input,
    pub(super) fetch_ms: u64,
}

/// One of a job's questions.
pub(super) struct Part {
    pub(super) question: Question,
    pub(super) keys: Keys,
}

/// What the model is to start from.
pub(super) enum Input {
    Picture(Picture),
    Seen(Visual),
}

/// What preparing a job came to.
enum Outcome {
    Ready { parts: Vec<Part>, input: Input },
    Answered(Vec<Arc<Answer>>),
}

pub(super) fn run(work: &Sender<Work>, commits: &Sender<Commit>) {
    while let Some((key, control, florence)) = next_job() {
        let claimed = match with_server(|ctx| claim(ctx, &key, &control)) {
            Claim::Taken(claimed) => claimed,
            Claim::Gone => {
                schedule(|scheduler| scheduler.release(&key, &control));
                continue;
            }
            Claim::NotNow => {
                schedule(|scheduler| scheduler.put_back(&key, Instant::now() + WRITE_PAUSE));
                continue;
            }
        };
        let start = Instant::now();
        let prepared = catch_unwind(AssertUnwindSafe(|| prepare(&florence, &claimed)));
        let prepared = prepared.unwrap_or_else(|_panic| {
            Counters::add(&SHARED.counters.panics, 1);
            Err(Failure::internal())
        });
        let fetch_ms = elapsed_ms(start);
        Counters::add(&SHARED.counters.fetch_ms, fetch_ms);
        let is_late = Instant::now() >= claimed.deadline;
        let prepared = if is_late { Err(Failure::timeout()) } else { prepared };
        let (result, verdict) = match prepared {
            Ok(Outcome::Ready { parts, input }) => {
                claimed.control.enter(Phase::Ready);
                if work.send(Work { claimed, parts, input, fetch_ms }).is_err() {
                    return;
                }
                continue;
            }
            Ok(Outcome::Answered(answers)) => (Ok(answers), Verdict::Result),
            Err(failure) => (Err(failure), Verdict::Miss),
        };
        let sent = commits.send(Commit { claimed, result, verdict, fetch_ms, infer_ms: 0 }).is_ok();
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
    if job.is_expired() {
        drop(job);
        return end(ctx, key, State::Expired, Vec::new());
    }
    let crashes = job.crashes();
    let attempt = job.number("attempts").unwrap_or_default() + 1;
    let timeout = u64::try_from(job.number("timeout").unwrap_or(300_000)).unwrap_or_default();
    let claimed = Claimed {
        key: key.clone(),
        control: Arc::clone(control),
        attempt,
        prompts: job.prompts(),
        image: job.text("image").unwrap_or_default(),
        data: job.bytes("data").map(Into::into),
        options: job.options(),
        no_cache: job.number("nocache") == Some(1),
        deadline: Instant::now() + Duration::from_millis(timeout),
    };
    let wants = job.text("wants").filter(|wants| !is_model(wants));
    let queued = unix_ms() - job.number("submitted_at").unwrap_or_default();
    drop(job);
    let hopeless = if crashes >= MAX_CRASHES {
        Some(Failure::permanent("CRASH", "the server died twice while working on this job"))
    } else {
        wants.map(|_| Failure::permanent("NOMODEL", "this server has another model"))
    };
    if let Some(failure) = hopeless {
        return end(ctx, key, State::Failed, failure.fields());
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
        Ok(()) => {
            celery::started(ctx, &key.name);
            Claim::Taken(claimed)
        }
        Err(_refused) => Claim::NotNow,
    }
}

/// Ends a job in the place of a claim.
fn end(ctx: &Context, key: &JobKey, state: State, fields: Fields) -> Claim {
    match ending::finish(ctx, &key.name, state, Data::Keep, fields) {
        Ok(()) => Claim::Gone,
        Err(_refused) => Claim::NotNow,
    }
}

/// Whether the loaded model has this name.
fn is_model(name: &str) -> bool {
    matches!(&*SHARED.model.read(), Model::Ready(florence) if florence.name() == name)
}

fn prepare(florence: &Florence, claimed: &Claimed) -> Result<Outcome, Failure> {
    let fetched;
    let bytes: &[u8] = if let Some(data) = &claimed.data {
        data
    } else {
        fetched = source::read(&claimed.image, claimed.deadline)?;
        &fetched
    };
    claimed.control.enter(Phase::Decoding);
    let part = |prompt: &String| {
        let question = florence.question(prompt).map_err(Error::from)?;
        Ok(Part { question, keys: Keys::new(bytes, prompt, &claimed.options) })
    };
    let parts = claimed.prompts.iter().map(part).collect::<Result<Vec<_>, Failure>>()?;
    if !claimed.no_cache {
        let known: Vec<_> = parts.iter().map_while(|part| CACHES.answer(&part.keys)).collect();
        if known.len() == parts.len() {
            return Ok(Outcome::Answered(known));
        }
        if let Some(visual) = parts.first().and_then(|part| CACHES.visual(&part.keys)) {
            return Ok(Outcome::Ready { parts, input: Input::Seen(visual) });
        }
    }
    let options = PrepareOptions {
        limits: DecodeLimits {
            pixels: config::number(&config::MAX_IMAGE_PIXELS),
            formats: source::image_formats().unwrap_or_default(),
            ..DecodeLimits::default()
        },
        ..PrepareOptions::default()
    };
    let input = Input::Picture(florence.picture(bytes, &options)?);
    Ok(Outcome::Ready { parts, input })
}
