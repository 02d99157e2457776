//! The threads of the engines: each runs a model for the jobs that are prepared. They never take the
//! server's lock: what is to be written goes to the committer.

use std::{
    cell::Cell,
    error::Error as _,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{
    Error,
    serve::{self, Asker, Served, Turn, Verdict, Wants, Watch, Work},
};
use serde_json::Value;

use super::{
    commit::Commit,
    load::{Plan, load, plans},
    milliseconds, spawn,
};
use crate::{
    figures,
    job::{
        Failure, Fields,
        life::{Attempt, Outcome},
    },
    model::{self, Model},
    news,
    queue::{Lease, Phase, queue},
    server, settings,
};

/// Starts the engines.
pub(super) fn start(inbox: &Receiver<Work<Claimant>>) {
    let plans = plans();
    model::begin(plans.len());
    for plan in plans {
        let inbox = inbox.clone();
        spawn(&format!("fl-engine-{}", plan.engine), move || run(&plan, &inbox));
    }
}

/// How long a device that was lost is left alone.
const LOST_PAUSE: Duration = Duration::from_secs(10);

fn run(plan: &Plan, inbox: &Receiver<Work<Claimant>>) {
    let engine = plan.engine;
    let mut was_lost = false;
    loop {
        // It is there already if this thread was started again.
        let Some(loaded) = model::of(engine).or_else(|| load(plan)) else {
            if !was_lost {
                return;
            }
            thread::sleep(LOST_PAUSE);
            continue;
        };
        let meter = Meter { engine, busy: Cell::default() };
        let served = serve::serve(&loaded.florence, &loaded.caches, inbox, &meter);
        let Err(failure) = served else { return };
        let problem = format!("engine {engine} lost its device: {}", explain(&failure));
        news::warn(&format!("{problem}; it will load the model again"));
        model::set(engine, Model::Failed(problem));
        // The device is let go of with the last thing that is stored there.
        loaded.caches.forget_pictures();
        drop(loaded);
        was_lost = true;
        thread::sleep(LOST_PAUSE);
        model::set(engine, Model::Loading);
    }
}

/// Keeps the figures of an engine.
struct Meter {
    engine: usize,
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
        let engines = model::engines();
        if let Some(work) = engines.get(self.engine).map(|engine| &engine.work) {
            work.answers.add(turn.answers as u64);
            work.steps.add(turn.has_stepped.into());
            work.busy_us.add(u64::try_from(turn.time.as_micros()).unwrap_or_default());
        }
        if turn.answers > 0 {
            let at_work = engines.iter().filter(|engine| engine.is_ready()).count().max(1);
            queue().record_pace(self.busy.take(), turn.answers * at_work);
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
    pub(super) commits: Sender<Commit>,
}

impl Claimant {
    /// Ends the attempt with its answers.
    pub(super) fn answer(self, served: &Served) {
        count(served.verdict);
        let fields = answer_fields(&self.attempt.request.prompts, served);
        self.end(Ok(fields), milliseconds(served.time));
    }

    /// Hands the end of the attempt to the committer.
    pub(super) fn end(self, result: Result<Fields, Failure>, infer_ms: u64) {
        let Self { lease, attempt, fetch_ms, commits, .. } = self;
        let outcome = Outcome { result, fetch_ms, infer_ms };
        // The committer goes only when the process does; a lease that comes back gives itself back.
        let _ = commits.send(Commit::Ended { lease, attempt, outcome });
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
        self.lease.claim().enter(Phase::Encoding);
        let (key, token) = (self.lease.key().clone(), self.lease.claim().token.clone());
        let _ = self.commits.send(Commit::Started { key, token });
    }

    fn generated(&self, tokens: u32) {
        self.lease.claim().enter(Phase::Generating);
        self.lease.claim().set_tokens(tokens);
    }

    fn answered(self, served: Served) {
        self.answer(&served);
    }

    fn failed(self, failure: serve::Failure, time: Duration) {
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
        self.end(Err(words), milliseconds(time));
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

/// The fields of an answered job: the reference's result, text and scores for one prompt, by prompt
/// for several. Coordinates are rounded here, so that what is cached depends on no setting.
fn answer_fields(prompts: &[String], served: &Served) -> Fields {
    let Served { answers, verdict, .. } = served;
    let decimals = *settings::DECIMALS.get();
    let scores: Vec<&[f32]> = answers.iter().map(|answer| answer.scores.as_slice()).collect();
    let (result, text, scores) = if let [answer] = answers.as_slice() {
        let result = answer.rounded(decimals).to_string();
        (result, answer.text.clone(), serde_json::to_string(&answer.scores))
    } else {
        let mut results = serde_json::Map::new();
        for (prompt, answer) in prompts.iter().zip(answers) {
            // The reference's object has one entry, named by the task.
            let mut answer = answer.rounded(decimals);
            let value = answer.as_object_mut().and_then(|object| object.values_mut().next());
            results.insert(prompt.clone(), value.map(Value::take).unwrap_or_default());
        }
        let texts: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        let text = serde_json::json!(texts).to_string();
        (Value::from(results).to_string(), text, serde_json::to_string(&scores))
    };
    let tokens: usize = answers.iter().map(|answer| answer.token_ids.len()).sum();
    let model = model::loaded().map(|loaded| loaded.florence.name().to_owned()).unwrap_or_default();
    let (width, height) = answers.first().map(|answer| answer.size).unwrap_or_default();
    vec![
        ("result", result.into()),
        ("text", text.into()),
        ("scores", scores.unwrap_or_default().into()),
        ("width", width.to_string().into()),
        ("height", height.to_string().into()),
        ("tokens", tokens.to_string().into()),
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
