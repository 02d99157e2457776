//! Many jobs through one model, as they come.
//!
//! A job's questions join a batch as soon as the job is prepared and there is room; who asks what is
//! just being answered shares that answer. The loop knows nothing of where jobs come from: each is
//! an [`Asker`], which hears how it fares and is consumed by its end. A dropped asker was neither
//! answered nor failed.
//!
//! - `admission`: when another picture is taken in (pure)
//! - `cache`: what may be asked for again
//! - `machine`: what the loop drives
//! - `serving`: the loop

mod admission;
mod cache;
mod machine;
mod serving;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::{Answer, Batch, Budget, Error, Florence, GenerateOptions, Picture, Question, Visual};

pub use cache::{Caches, Keys, PictureKey, Verdict};
use machine::Decoder;
use serving::Serving;

/// Whoever waits for a job's answers. Nothing here may block: it is called between decoder steps.
pub trait Asker {
    /// Whether the answers are still wanted; asked before every step.
    fn wants(&self, now: Instant) -> Wants;

    /// The job is in the engine.
    fn started(&self);

    /// It waited for so long while others were worked for.
    fn waited(&self, _time: Duration) {}

    /// So many tokens of an answer are there.
    fn generated(&self, tokens: u32);

    /// Whether it is told the texts of its answers as they grow.
    fn listens(&self) -> bool {
        false
    }

    /// What follows in the text of the answer to one of its questions: all pieces together are the
    /// text, the last of which comes before the answer.
    fn told(&self, _question: usize, _piece: &str) {}

    /// All answers are there.
    fn answered(self, served: Served);

    /// There will be no answers.
    fn failed(self, failure: Failure, time: Duration);
}

/// Whether an asker still waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// It does.
    Answers,
    /// It has cancelled.
    Nothing,
    /// They would come too late.
    TooLate,
}

/// A job's answers.
pub struct Served {
    /// One for each part.
    pub answers: Vec<Arc<Answer>>,
    /// The first picture, for what may be asked about it next.
    pub input: Option<Input>,
    /// What the job was spared.
    pub verdict: Verdict,
    /// Time in the engine.
    pub time: Duration,
}

/// Why a job has no answers.
#[derive(Debug, Clone)]
pub enum Failure {
    /// The asker has cancelled.
    Cancelled,
    /// The asker's time is over.
    Late,
    /// The model's error.
    Failed(Arc<Error>),
    /// The text of a panic.
    Panicked(String),
}

/// A prepared job.
pub struct Work<A> {
    /// Who waits for it.
    pub asker: A,
    /// Its questions.
    pub parts: Vec<Part>,
    /// The pictures that they are about.
    pub inputs: Vec<Input>,
    /// How the answers are generated.
    pub options: GenerateOptions,
    /// Whether it takes from the caches, leaves in them, and shares answers.
    pub is_shared: bool,
}

/// One of a job's questions.
pub struct Part {
    /// The question.
    pub question: Question,
    /// Which of the job's pictures it is about.
    pub picture: usize,
    /// What its answer depends on.
    pub keys: Keys,
}

/// What the model is to start from.
pub enum Input {
    /// A decoded picture.
    Picture(Picture),
    /// An encoded one.
    Seen(Visual),
}

/// Where prepared jobs come from. Several loops may share one.
pub trait Inbox<A> {
    /// The next job, which is waited for.
    ///
    /// # Errors
    ///
    /// None came in time, or none will come any more.
    fn wait(&self, most: Duration) -> Result<Work<A>, RecvTimeoutError>;

    /// The next job, if there is one now.
    fn next(&self) -> Option<Work<A>>;
}

/// In the order in which they were sent.
impl<A> Inbox<A> for Receiver<Work<A>> {
    fn wait(&self, most: Duration) -> Result<Work<A>, RecvTimeoutError> {
        self.recv_timeout(most)
    }

    fn next(&self) -> Option<Work<A>> {
        self.try_recv().ok()
    }
}

/// Looks on: what is to be known of the loop as a whole.
pub trait Watch {
    /// Most requests that are decoded together, from now on.
    fn most(&self) -> usize;

    /// What the keys and values of all that is decoded together may take; loops may share it. A loop
    /// that decodes nothing else takes in a request that is larger. By default there is no limit.
    fn kv_cache(&self) -> &Budget {
        static UNLIMITED: LazyLock<Budget> = LazyLock::new(|| Budget::new(u64::MAX));
        &UNLIMITED
    }

    /// Takes a turn of the loop, and tells it how long it has waited for that: whoever shares a device
    /// with other loops lets them have theirs.
    fn take(&self, turn: &mut dyn FnMut(Duration)) {
        turn(Duration::ZERO);
    }

    /// A turn's work is done; its answers are told after this.
    fn turned(&self, turn: &Turn);

    /// What was done together has failed: each of the requests is run again, alone.
    fn stumbled(&self, failure: &Failure);
}

/// A turn of the loop: some requests taken in, then a decoder step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Turn {
    /// How long it took.
    pub time: Duration,
    /// Whether there was a step.
    pub has_stepped: bool,
    /// Answers that it gave.
    pub answers: usize,
}

/// How often a loop without work looks whether its device still works: one that is lost through another
/// model comes back only when all have let go of it.
const LOOK: Duration = Duration::from_secs(10);

/// Serves what comes through `inbox`, until nothing will come any more.
///
/// # Errors
///
/// The model can do no more, for this reason; whoever it was working for has heard of it.
pub fn serve<A: Asker>(
    florence: &Florence,
    caches: &Caches,
    inbox: &impl Inbox<A>,
    watch: &dyn Watch,
) -> Result<(), Failure> {
    let machine = Decoder { florence, batch: Batch::new(florence) };
    let mut serving = Serving::new(machine, caches, watch);
    loop {
        if serving.is_idle() {
            match inbox.wait(LOOK) {
                Ok(work) => serving.admit(work),
                Err(RecvTimeoutError::Timeout) => serving.check(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
        watch.take(&mut |waited| {
            serving.wait(waited);
            serving.turn(&mut || inbox.next());
        });
        if let Some(failure) = serving.take_lost() {
            return Err(failure);
        }
    }
}
