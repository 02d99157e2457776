//! Answers by the engine of this process: its serving loop takes pictures as they are read, so that
//! reading, decoding, encoding and decoding of tokens overlap and the batch is full.

use std::{
    error::Error as _,
    iter,
    sync::Arc,
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
use crossbeam_channel::{Sender, bounded};
use florence_engine::{
    Decimals, Florence, GenerateOptions, PrepareOptions, Question, Stop, catch_panic,
    serve::{
        self, Asker, Caches, Failure, Input, Keys, PictureKey, Served, Turn, Wants, Watch, Work,
    },
};

use super::flow::{Answers, End, Flow, Part, Ticket};
use crate::ask::AskArgs;

/// Pictures that are ready before the engine has room for them.
const READY: usize = 4;

pub(super) struct Local {
    florence: Florence,
    /// The same model again, for more batches at once.
    others: Vec<Florence>,
    questions: Vec<(String, Question)>,
    prepare: PrepareOptions,
    generate: GenerateOptions,
    decimals: Decimals,
    batch: usize,
}

impl Local {
    pub(super) fn new(
        engines: Vec<Florence>,
        prompts: &[String],
        ask: &AskArgs,
        batch: usize,
    ) -> anyhow::Result<Self> {
        let mut others = engines;
        let florence = others.pop().context("there must be an engine")?;
        let question =
            |prompt: &String| Ok((prompt.clone(), florence.question(prompt, ask.prompts)?));
        let questions = prompts.iter().map(question).collect::<anyhow::Result<_>>()?;
        let (prepare, generate) = (ask.prepare(), ask.generate());
        let decimals = ask.decimals;
        Ok(Self { florence, others, questions, prepare, generate, decimals, batch })
    }

    pub(super) fn model(&self) -> &str {
        self.florence.name()
    }

    fn engines(&self) -> impl Iterator<Item = &Florence> {
        iter::once(&self.florence).chain(&self.others)
    }

    /// How many pictures may be on their way: as many as are read, ready and answered at once.
    pub(super) fn most(&self, readers: usize) -> usize {
        2 * readers + READY + 2 * self.batch * self.engines().count()
    }

    /// Answers what `flow` reads, until there is no more.
    pub(super) fn run(&self, flow: &Flow<'_>, readers: usize) {
        let (work, inbox) = bounded(READY);
        thread::scope(|scope| {
            let serve = |florence| {
                let inbox = inbox.clone();
                let watch = Batches { most: self.batch };
                move || serve::serve(florence, &Caches::new(0, 0), &inbox, &watch)
            };
            let engines: Vec<_> = self.engines().map(|it| scope.spawn(serve(it))).collect();
            for _ in 0..readers {
                let work = work.clone();
                scope.spawn(move || {
                    flow.read(&mut |ticket, bytes| {
                        self.prepare(flow, &work, ticket, &bytes.unwrap_or_default());
                    });
                });
            }
            drop(work);
            let failure = |engine: ScopedJoinHandle<'_, Result<(), Failure>>| match engine.join() {
                Ok(served) => served.err(),
                Err(_panic) => Some(Failure::Panicked("its engine has ended".to_owned())),
            };
            // All of them have ended before anything else is done.
            let failures: Vec<Option<Failure>> = engines.into_iter().map(failure).collect();
            // Where one is left, it has answered all that there was.
            if failures.iter().all(Option::is_some)
                && let Some(Some(failure)) = failures.last()
            {
                flow.end(End::Lost(words(failure)));
            }
            // Readers have more until they hear that there is no engine for it.
            for Work { asker, .. } in inbox {
                asker.failed(Failure::Cancelled, Duration::ZERO);
            }
        });
    }

    fn prepare(&self, flow: &Flow<'_>, work: &Sender<Work<Asking>>, ticket: Ticket, bytes: &[u8]) {
        let picture = match catch_panic(|| self.florence.picture(bytes, &self.prepare)) {
            Ok(Ok(picture)) => picture,
            Ok(Err(error)) => return flow.end(End::Failed(ticket, error.to_string())),
            Err(panic) => {
                return flow.end(End::Failed(ticket, format!("it cannot be decoded: {panic}")));
            }
        };
        let sha256 = ticket.sha256.unwrap_or_default();
        let key = PictureKey::new("", &sha256, self.prepare.orientation);
        let part = |(_, question): &(String, Question)| serve::Part {
            picture: 0,
            question: question.clone(),
            keys: Keys::new(key, question, &self.generate),
        };
        let asked = ticket.prompts;
        let parts = self.questions.iter().enumerate().filter(|(i, _)| asked >> i & 1 == 1);
        let parts = parts.map(|(_, question)| part(question)).collect();
        let asker = Asking {
            ticket,
            ends: flow.ends.clone(),
            stop: flow.stop.clone(),
            model: self.florence.name().into(),
            decimals: self.decimals,
        };
        let options = self.generate.clone();
        let input = Input::Picture(picture);
        // The engines go only when all readers have gone, or are heard of.
        let _ = work.send(Work { asker, parts, inputs: vec![input], options, is_shared: false });
    }
}

/// A picture in the engine.
struct Asking {
    ticket: Ticket,
    ends: Sender<End>,
    stop: Stop,
    model: Arc<str>,
    decimals: Decimals,
}

impl Asker for Asking {
    fn wants(&self, _now: Instant) -> Wants {
        if self.stop.is_stopped() { Wants::Nothing } else { Wants::Answers }
    }

    fn started(&self) {}

    fn generated(&self, _tokens: u32) {}

    fn answered(self, served: Served) {
        let size = served.answers.first().map(|answer| answer.size).unwrap_or_default();
        let part = |answer: &Arc<florence_engine::Answer>| Part {
            answer: answer.rounded(self.decimals),
            text: answer.text.clone(),
            scores: serde_json::json!(answer.scores),
        };
        let parts = served.answers.iter().map(part).collect();
        let answers = Answers { size, model: self.model.to_string(), parts };
        let _ = self.ends.send(End::Answered(self.ticket, answers));
    }

    fn failed(self, failure: Failure, _time: Duration) {
        // Nobody waits for it in this run.
        if !matches!(failure, Failure::Cancelled | Failure::Late) {
            let _ = self.ends.send(End::Failed(self.ticket, words(&failure)));
        }
    }
}

fn words(failure: &Failure) -> String {
    match failure {
        Failure::Cancelled | Failure::Late => "nobody waits for it".to_owned(),
        Failure::Failed(error) => match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
        Failure::Panicked(text) => format!("the model has failed: {text}"),
    }
}

/// How full the batch may be.
struct Batches {
    most: usize,
}

impl Watch for Batches {
    fn most(&self) -> usize {
        self.most
    }

    fn turned(&self, _turn: &Turn) {}

    fn stumbled(&self, _failure: &Failure) {}
}
