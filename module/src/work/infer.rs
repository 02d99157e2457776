//! The engine thread: runs the model for the jobs that are prepared. It never takes the server's
//! lock: what is to be written goes to the committer.

use std::{
    cell::Cell,
    error::Error as _,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{
    Error,
    chain::Run,
    serve::{self, Asker, Served, Turn, Verdict, Wants, Watch, Work},
};
use serde_json::Value;

use super::{commit::Commit, load::load, milliseconds, next::Picture};
use crate::{
    figures::{
        self,
        latency::{self, Stopwatch},
    },
    job::{
        Failure, Fields,
        life::{Attempt, Outcome},
    },
    model, news,
    queue::{Lease, Phase, queue},
    server, settings,
};

pub(super) fn run(inbox: &Receiver<Work<Claimant>>) {
    // It is there already if this thread was started again.
    let Some(loaded) = model::loaded().or_else(load) else { return };
    serve::serve(&loaded.florence, &loaded.caches, inbox, &Meter::default());
}

/// Keeps the figures of the engine.
#[derive(Default)]
struct Meter {
    /// Time spent since the last answer.
    busy: Cell<Duration>,
}

impl Watch for Meter {
    fn most(&self) -> usize {
        settings::MAX_BATCH.size()
    }

    fn turned(&self, turn: &Turn) {
        figures::DECODER_STEPS.add(turn.has_stepped.into());
        figures::INFER_MS.add(milliseconds(turn.time));
        self.busy.set(self.busy.get() + turn.time);
        if turn.answers > 0 {
            queue().record_pace(self.busy.take(), turn.answers);
        }
    }

    fn stumbled(&self, failure: &serve::Failure) {
        let text = explain(failure);
        news::warn(&format!("the batch failed, its jobs are run one by one: {text}"));
    }
}

/// A claimed job on its way through the engine.
pub(super) struct Claimant {
    pub(super) lease: Lease,
    pub(super) attempt: Box<Attempt>,
    pub(super) fetch_ms: u64,
    /// A small copy of the picture.
    pub(super) thumbnail: Option<Box<[u8]>>,
    pub(super) stopwatch: Stopwatch,
    /// What is answered, and what is to be asked next.
    pub(super) run: Run,
    /// The picture, as long as more may be asked about it.
    pub(super) picture: Option<Picture>,
    is_generating: Cell<bool>,
    verdict: Verdict,
    /// Time in the engine.
    time: Duration,
    ways: Ways,
}

/// Where a claimed job goes on.
#[derive(Clone)]
pub(super) struct Ways {
    pub(super) commits: Sender<Commit>,
    /// To whoever asks the next questions.
    pub(super) next: Sender<Claimant>,
}

impl Claimant {
    pub(super) fn new(lease: Lease, attempt: Box<Attempt>, ways: Ways) -> Self {
        let stopwatch = Stopwatch::start(attempt.asked);
        let run = Run::new(attempt.request.chain.clone(), *settings::PROMPTS.get());
        Self {
            lease,
            attempt,
            fetch_ms: 0,
            thumbnail: None,
            stopwatch,
            run,
            picture: None,
            is_generating: Cell::new(false),
            verdict: Verdict::Result,
            time: Duration::ZERO,
            ways,
        }
    }

    /// Ends the attempt with its answers.
    pub(super) fn answer(self) {
        count(self.verdict);
        let fields = answer_fields(&self.run, self.verdict);
        self.end(Ok(fields));
    }

    /// Hands the end of the attempt to the committer.
    pub(super) fn end(self, result: Result<Fields, Failure>) {
        let Self { lease, attempt, fetch_ms, thumbnail, time, ways, .. } = self;
        let outcome = Outcome { result, thumbnail, fetch_ms, infer_ms: milliseconds(time) };
        // The committer goes only when the process does; a lease that comes back gives itself back.
        let _ = ways.commits.send(Commit::Ended { lease, attempt, outcome });
    }

    /// Why an attempt failed inside is for the log.
    pub(super) fn log(&self, text: &str) {
        let (key, phase) = (server::printable(&self.lease.key().name), self.lease.claim().phase());
        news::warn(&format!("job '{key}' failed while {phase}: {text}"));
    }
}

impl Asker for Claimant {
    fn wants(&self, now: Instant) -> Wants {
        if self.lease.is_stopped() {
            Wants::Nothing
        } else if now >= self.attempt.deadline {
            Wants::TooLate
        } else {
            Wants::Answers
        }
    }

    fn started(&self) {
        self.stopwatch.restart();
        self.lease.claim().enter(Phase::Encoding);
        let (key, token) = (self.lease.key().clone(), self.lease.claim().token.clone());
        let _ = self.ways.commits.send(Commit::Started { key, token });
    }

    fn generated(&self, tokens: u32) {
        if !self.is_generating.replace(true) {
            self.stopwatch.lap(latency::Phase::Encode);
        }
        self.lease.claim().enter(Phase::Generating);
        self.lease.claim().set_tokens(tokens);
    }

    fn answered(mut self, served: Served) {
        if self.is_generating.take() {
            self.stopwatch.lap(latency::Phase::Generate);
        }
        self.time += served.time;
        self.verdict = self.verdict.max(served.verdict);
        let is_of_whole = self.run.asks().first().is_some_and(|asked| asked.area.is_none());
        if let Some(picture) = self.picture.as_mut().filter(|_| is_of_whole) {
            picture.keep(served.input);
        }
        self.run.answered(served.answers);
        if self.run.is_over() {
            return self.answer();
        }
        let next = self.ways.next.clone();
        // As above.
        let _ = next.send(self);
    }

    fn failed(mut self, failure: serve::Failure, time: Duration) {
        self.time += time;
        let words = match &failure {
            serve::Failure::Cancelled => {
                figures::DROPPED.add(1);
                return;
            }
            serve::Failure::Late => Failure::timeout(),
            serve::Failure::Failed(error) => {
                self.log(&explain(&failure));
                Failure::from(&**error)
            }
            serve::Failure::Panicked(_) => {
                figures::PANICS.add(1);
                self.log(&explain(&failure));
                Failure::internal()
            }
        };
        self.end(Err(words));
    }
}

fn explain(failure: &serve::Failure) -> String {
    match failure {
        serve::Failure::Cancelled => "cancelled".to_owned(),
        serve::Failure::Late => "out of time".to_owned(),
        serve::Failure::Failed(error) => chain(error),
        serve::Failure::Panicked(text) => format!("panic: {text}"),
    }
}

/// An error and what it came from.
fn chain(error: &Arc<Error>) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.extend([": ", &error.to_string()]);
        source = error.source();
    }
    text
}

/// The fields of an answered job. Coordinates are rounded here, so that what is cached depends on no
/// setting.
fn answer_fields(run: &Run, verdict: Verdict) -> Fields {
    let told = run.told(*settings::DECIMALS.get());
    let text = match told.text {
        Value::String(text) => text,
        texts => texts.to_string(),
    };
    let model = model::loaded().map(|loaded| loaded.florence.name().to_owned()).unwrap_or_default();
    let (width, height) = told.size;
    vec![
        ("result", told.json.to_string().into()),
        ("text", text.into()),
        ("scores", told.scores.to_string().into()),
        ("width", width.to_string().into()),
        ("height", height.to_string().into()),
        ("tokens", told.tokens.to_string().into()),
        ("model", model.into()),
        ("cache", verdict.name().into()),
    ]
}

fn count(verdict: Verdict) {
    let counter = match verdict {
        Verdict::Result => &figures::CACHE_RESULTS,
        Verdict::Features => &figures::CACHE_FEATURES,
        Verdict::Miss => &figures::CACHE_MISSES,
    };
    counter.add(1);
}
