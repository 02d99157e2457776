//! The threads of the engines: each runs a model for the jobs that are prepared. They never take the
//! server's lock: what is to be written goes to the committer.

use std::{
    cell::Cell,
    error::Error as _,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{RecvTimeoutError, Sender};
use florence_engine::{
    Answer, Budget, Error,
    chain::Run,
    serve::{self, Asker, Inbox as _, Served, Turn, Verdict, Wants, Watch, Work},
};
use parking_lot::FairMutex;
use serde_json::Value;

use super::{
    commit::Commit,
    lanes::{self, Coming, Lane},
    load::{Plan, load},
    milliseconds,
    next::Picture,
    ordered::OrderedReceiver,
    pieces::{Listener, Pieces},
};
use crate::{
    figures::{
        self,
        latency::{self, Stopwatch},
    },
    job::{
        Failure, Fields,
        life::{Attempt, Outcome},
    },
    model::{self, Hosted, Model},
    news,
    queue::{Lease, Phase, queue},
    server, settings,
};

/// How long a device that was lost is left alone.
const LOST_PAUSE: Duration = Duration::from_secs(10);

/// Loads a model and answers what comes through `inbox`, until its lane ends.
pub(super) fn run(
    model: &Arc<Hosted>,
    plan: &Plan,
    inbox: &OrderedReceiver<Work<Claimant>>,
    ways: &Ways,
) {
    let engine = plan.engine;
    let mut was_lost = false;
    loop {
        // It is there already if this thread was started again.
        let Some(loaded) = model.of(engine).or_else(|| load(model, plan)) else {
            if !was_lost || !pause(model, inbox) {
                return;
            }
            continue;
        };
        let (work, turns) = (model.work(engine).unwrap_or_default(), lanes::turns(engine));
        let meter = Meter { model: Arc::clone(model), work, turns, busy: Cell::default(), ways };
        let served = serve::serve(&loaded.florence, &loaded.caches, inbox, &meter);
        let Err(failure) = served else {
            // Nobody will ask any more.
            return model.set(engine, Model::Failed("it was unloaded".to_owned()));
        };
        let problem = format!("engine {engine} lost its device: {}", explain(&failure));
        news::warn(&format!("{problem}; it will load the model again"));
        model.set(engine, Model::Failed(problem));
        // The device is let go of with the last thing that is stored there.
        loaded.caches.forget_pictures();
        drop(loaded);
        was_lost = true;
        if !pause(model, inbox) {
            return;
        }
        model.set(engine, Model::Loading);
    }
}

/// Leaves a lost device alone for a while. Jobs that nobody else answers give themselves back; false if
/// none will come any more.
fn pause(model: &Hosted, inbox: &OrderedReceiver<Work<Claimant>>) -> bool {
    const LOOK: Duration = Duration::from_millis(100);
    let until = Instant::now() + LOST_PAUSE;
    while Instant::now() < until {
        if model.loaded().is_some() {
            thread::sleep(LOOK);
        } else if matches!(inbox.wait(LOOK), Err(RecvTimeoutError::Disconnected)) {
            return false;
        }
    }
    true
}

/// Keeps the figures of an engine.
struct Meter<'a> {
    model: Arc<Hosted>,
    work: Arc<model::Work>,
    /// Where it takes turns with the engines of other models.
    turns: Arc<FairMutex<()>>,
    /// Time spent since the last answer.
    busy: Cell<Duration>,
    ways: &'a Ways,
}

impl Watch for Meter<'_> {
    fn most(&self) -> usize {
        settings::MAX_BATCH.size()
    }

    fn kv_cache(&self) -> &Budget {
        model::kv_cache()
    }

    fn take(&self, turn: &mut dyn FnMut(Duration)) {
        let asked = Instant::now();
        let of_us = self.turns.lock();
        turn(asked.elapsed());
        drop(of_us);
        self.ways.tell();
    }

    fn turned(&self, turn: &Turn) {
        figures::DECODER_STEPS.add(turn.has_stepped.into());
        figures::INFER_MS.add(milliseconds(turn.time));
        self.busy.set(self.busy.get() + turn.time);
        self.work.answers.add(turn.answers as u64);
        self.work.steps.add(turn.has_stepped.into());
        self.work.busy_us.add(u64::try_from(turn.time.as_micros()).unwrap_or_default());
        if turn.answers > 0 {
            let engines = self.model.engines();
            let at_work = engines.iter().filter(|engine| engine.is_ready()).count().max(1);
            queue().record_pace(self.busy.take(), turn.answers * at_work);
        }
    }

    fn stumbled(&self, failure: &serve::Failure) {
        let text = explain(failure);
        news::warn(&format!(
            "jobs that were run together failed, so they are run one by one: {text}"
        ));
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
    /// Whose model answers.
    pub(super) lane: Arc<Lane>,
    /// Keeps room in its channel.
    pub(super) coming: Option<Coming>,
    ways: Ways,
    /// Where the text goes while it is generated.
    listener: Option<Arc<Listener>>,
}

/// Where a claimed job goes on.
#[derive(Clone)]
pub(super) struct Ways {
    pub(super) commits: Sender<Commit>,
    pub(super) pieces: Arc<Pieces>,
}

impl Ways {
    /// Tells the committer if there is new text.
    pub(super) fn tell(&self) {
        self.pieces.tell(&self.commits);
    }
}

impl Claimant {
    pub(super) fn new(lease: Lease, attempt: Box<Attempt>, lane: Arc<Lane>, ways: Ways) -> Self {
        let stopwatch = Stopwatch::start(attempt.asked);
        let run = Run::new(attempt.request.chain.clone(), *settings::PROMPTS.get());
        let stream = attempt.request.stream.clone();
        let listener = stream.map(|key| Arc::new(Listener::new(&lease, attempt.number, key)));
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
            lane,
            coming: None,
            ways,
            listener,
        }
    }

    /// Tells of what the caches have answered.
    pub(super) fn knows(&self, answers: &[Arc<Answer>]) {
        for (question, answer) in answers.iter().enumerate() {
            self.told(question, &answer.text);
        }
        self.ways.tell();
    }

    /// Ends the attempt with its answers.
    pub(super) fn answer(self) {
        count(self.verdict);
        let fields = answer_fields(&self.run, &self.lane.model.name, self.verdict);
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
        } else if self.attempt.clock.is_over(now) {
            Wants::TooLate
        } else {
            Wants::Answers
        }
    }

    fn started(&self) {
        self.attempt.clock.go_on();
        self.stopwatch.restart();
        self.lease.claim().enter(Phase::Encoding);
        let (key, token) = (self.lease.key().clone(), self.lease.claim().token.clone());
        let _ = self.ways.commits.send(Commit::Started { key, token });
        lanes::wake();
    }

    fn waited(&self, time: Duration) {
        self.attempt.clock.add(time);
    }

    fn generated(&self, tokens: u32) {
        if !self.is_generating.replace(true) {
            self.stopwatch.lap(latency::Phase::Encode);
        }
        self.lease.claim().enter(Phase::Generating);
        self.lease.claim().set_tokens(tokens);
    }

    fn listens(&self) -> bool {
        self.listener.is_some()
    }

    fn told(&self, question: usize, piece: &str) {
        if let Some(listener) = &self.listener {
            let (step, first) = self.run.place();
            self.ways.pieces.add(listener, (step, first + question), piece);
        }
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
        let mut answers = served.answers;
        if self.run.is_in_last_step() {
            self.run.answered(std::mem::take(&mut answers));
            if self.run.is_over() {
                return self.answer();
            }
        }
        self.attempt.clock.stand_still();
        let next = self.lane.next.clone();
        // That thread ends with the lane only, which this job holds.
        let _ = next.send((self, answers));
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
fn answer_fields(run: &Run, model: &str, verdict: Verdict) -> Fields {
    let told = run.told(*settings::DECIMALS.get());
    let text = match told.text {
        Value::String(text) => text,
        texts => texts.to_string(),
    };
    let (width, height) = told.size;
    let n_best = told.n_best.map(|best| ("nbest", best.to_string().into()));
    let known = [
        ("result", told.json.to_string().into()),
        ("text", text.into()),
        ("scores", told.scores.to_string().into()),
        ("width", width.to_string().into()),
        ("height", height.to_string().into()),
        ("tokens", told.tokens.to_string().into()),
        ("model", model.into()),
        ("cache", verdict.name().into()),
    ];
    known.into_iter().chain(n_best).collect()
}

fn count(verdict: Verdict) {
    let counter = match verdict {
        Verdict::Result => &figures::CACHE_RESULTS,
        Verdict::Features => &figures::CACHE_FEATURES,
        Verdict::Miss => &figures::CACHE_MISSES,
    };
    counter.add(1);
}
