//! Continuous batching: jobs join and leave the decoder at any step.

use std::{sync::Arc, time::Instant};

use super::{Answer, Florence, GenerateOptions, Question, Reading, Timings, Visual, milliseconds};
use crate::{
    Error,
    generate::{self, Decoding},
    postprocess::Scale,
};

/// Jobs that are decoded together, step by step: a job joins when its picture is encoded and
/// leaves when its answer is complete. Answers do not depend on who else is in the batch.
pub struct Batch<'a, T> {
    florence: &'a Florence,
    running: Vec<Running<T>>,
}

struct Running<T> {
    ticket: T,
    encoded: Encoded,
}

/// A picture and a prompt, encoded: ready to be decoded.
pub struct Encoded {
    decoding: Decoding,
    reading: Reading,
    timings: Timings,
    since: Instant,
}

impl Florence {
    /// Encodes a picture with a prompt.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`].
    pub fn encode(
        &self,
        question: &Question,
        visual: &Visual,
        options: &GenerateOptions,
    ) -> Result<Encoded, Error> {
        let start = Instant::now();
        let encode = || self.model.encode(&visual.tokens, &question.ids);
        let encoded = self.threads.install(encode)?;
        let timings = Timings { encoder: milliseconds(start), ..visual.timings };
        let since = Instant::now();
        let cross = self.threads.install(|| self.model.cross(&encoded))?;
        let scale = Scale { size: visual.size, coordinates: options.coordinates };
        let reading = Reading { name: Arc::clone(&question.name), answer: question.answer, scale };
        let decoding = Decoding::new(&self.model, cross, self.rules(options));
        Ok(Encoded { decoding, reading, timings, since })
    }
}

impl<'a, T> Batch<'a, T> {
    /// An empty batch.
    pub fn new(florence: &'a Florence) -> Self {
        Self { florence, running: Vec::new() }
    }

    /// Takes a job in; `ticket` comes back with its answer.
    pub fn join(&mut self, ticket: T, encoded: Encoded) {
        self.running.push(Running { ticket, encoded });
    }

    /// One token for every job; returns the answers that are complete now.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`]; the jobs are then in no state to go on.
    pub fn step(&mut self) -> Result<Vec<(T, Answer)>, Error> {
        let (florence, running) = (self.florence, &mut self.running);
        let unfinished = running.iter_mut().map(|job| &mut job.encoded.decoding);
        let unfinished: Vec<_> = unfinished.filter(|job| !job.is_finished()).collect();
        if !unfinished.is_empty() {
            florence.threads.install(|| generate::step(&florence.model, unfinished))?;
        }
        let is_finished = |job: &mut Running<T>| job.encoded.decoding.is_finished();
        let finished = running.extract_if(.., is_finished).map(|Running { ticket, encoded }| {
            let Encoded { decoding, reading, timings, since } = encoded;
            let timings = Timings { decoder: milliseconds(since), ..timings };
            (ticket, florence.answer(&reading, decoding.finish(), timings))
        });
        Ok(finished.collect())
    }

    /// Drops the jobs that `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.running.retain(|job| keep(&job.ticket));
    }

    /// Number of jobs that are being decoded.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether there is no job left.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}
