//! Continuous batching: jobs join and leave the decoder at any step.

use std::time::Instant;

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
    decoding: Decoding,
    reading: Reading,
    timings: Timings,
    joined: Instant,
}

impl<'a, T> Batch<'a, T> {
    /// An empty batch.
    pub fn new(florence: &'a Florence) -> Self {
        Self { florence, running: Vec::new() }
    }

    /// Encodes a picture with a prompt, and takes the job in; `ticket` comes back with the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`].
    pub fn join(
        &mut self,
        ticket: T,
        question: &Question,
        visual: &Visual,
        options: &GenerateOptions,
    ) -> Result<(), Error> {
        let florence = self.florence;
        let start = Instant::now();
        let encode = || florence.model.encode(&visual.tokens, &question.ids);
        let encoded = florence.threads.install(encode)?;
        let timings = Timings { encoder: milliseconds(start), ..visual.timings };
        let joined = Instant::now();
        let cross = florence.threads.install(|| florence.model.cross(&encoded))?;
        let scale = Scale { size: visual.size, coordinates: options.coordinates };
        let reading = Reading { task: question.task, scale };
        let decoding = Decoding::new(&florence.model, cross, florence.rules(options));
        self.running.push(Running { ticket, decoding, reading, timings, joined });
        Ok(())
    }

    /// One token for every job; returns the answers that are complete now.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`]; the jobs are then in no state to go on.
    pub fn step(&mut self) -> Result<Vec<(T, Answer)>, Error> {
        let (florence, running) = (self.florence, &mut self.running);
        let unfinished =
            running.iter_mut().map(|job| &mut job.decoding).filter(|job| !job.is_finished());
        let unfinished: Vec<_> = unfinished.collect();
        if !unfinished.is_empty() {
            florence.threads.install(|| generate::step(&florence.model, unfinished))?;
        }
        let finished = running.extract_if(.., |job| job.decoding.is_finished()).map(|job| {
            let timings = Timings { decoder: milliseconds(job.joined), ..job.timings };
            (job.ticket, florence.answer(job.reading, job.decoding.finish(), timings))
        });
        Ok(finished.collect())
    }

    /// Drops all jobs; returns their tickets.
    pub fn clear(&mut self) -> Vec<T> {
        self.running.drain(..).map(|job| job.ticket).collect()
    }

    /// Drops the jobs that `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.running.retain(|job| keep(&job.ticket));
    }

    /// The jobs that are being decoded.
    pub fn tickets(&self) -> impl Iterator<Item = &T> {
        self.running.iter().map(|job| &job.ticket)
    }

    /// The same, to be changed.
    pub fn tickets_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.running.iter_mut().map(|job| &mut job.ticket)
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
