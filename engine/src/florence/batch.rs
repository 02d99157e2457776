//! Continuous batching: jobs join and leave the decoder at any step.

use std::{sync::Arc, time::Instant};

use super::{Answer, Florence, GenerateOptions, Question, Reading, Timings, Visual, milliseconds};
use crate::{
    Error,
    generate::{self, Running},
    model::Decoding,
    postprocess::Scale,
};

/// Jobs that are decoded together, step by step: a job joins when its picture is encoded and
/// leaves when its answer is complete. Answers do not depend on who else is in the batch.
pub struct Batch<'a, T> {
    florence: &'a Florence,
    decoding: Box<dyn Decoding + 'a>,
    members: Vec<Member<T>>,
}

struct Member<T> {
    ticket: T,
    running: Running,
    /// How many of the best texts are told.
    n_best: Option<usize>,
    reading: Reading,
    timings: Timings,
    since: Instant,
    /// Ids whose text was told.
    told: usize,
}

impl<'a, T> Batch<'a, T> {
    /// An empty batch.
    pub fn new(florence: &'a Florence) -> Self {
        Self { florence, decoding: florence.model.decoding(), members: Vec::new() }
    }

    /// Encodes a picture with a prompt and takes the job in; `ticket` comes back with its answer.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`]; the job is not in the batch then.
    pub fn join(
        &mut self,
        ticket: T,
        question: &Question,
        visual: &Visual,
        options: &GenerateOptions,
    ) -> Result<(), Error> {
        let Self { florence, decoding, members } = self;
        let start = Instant::now();
        let encode = || {
            let model = &florence.model;
            model.encode(&visual.tokens.on(model)?, &question.ids)?.squeeze(0)
        };
        let encoded = florence.compute(encode)?;
        let timings = Timings { encoder: milliseconds(start), ..visual.timings };
        let since = Instant::now();
        let add = || decoding.add(&encoded, &[encoded.dim(0)?]);
        let job = florence.compute(add)?[0];
        let scale = Scale { size: visual.size, coordinates: options.coordinates };
        let name = Arc::clone(&question.name);
        let reading = Reading { name, answer: question.answer, scale };
        let running = Running::new(job, florence.rules(options));
        let n_best = options.n_best;
        members.push(Member { ticket, running, n_best, reading, timings, since, told: 0 });
        Ok(())
    }

    /// One token for every job; returns the answers that are complete now.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`]; the jobs are then in no state to go on.
    pub fn step(&mut self) -> Result<Vec<(T, Answer)>, Error> {
        let Self { florence, decoding, members } = self;
        let unfinished = members.iter_mut().map(|member| &mut member.running);
        let unfinished: Vec<_> = unfinished.filter(|running| !running.is_finished()).collect();
        if !unfinished.is_empty() {
            let decoding = &mut **decoding;
            florence.compute(|| generate::step(decoding, unfinished))?;
        }
        let is_finished = |member: &mut Member<T>| member.running.is_finished();
        let finished = members.extract_if(.., is_finished).map(|member| {
            let Member { ticket, running, n_best, reading, timings, since, .. } = member;
            decoding.remove(running.job());
            let timings = Timings { decoder: milliseconds(since), ..timings };
            let best = running.finish(n_best.unwrap_or(1));
            (ticket, florence.answer(&reading, (best, n_best.is_some()), timings))
        });
        Ok(finished.collect())
    }

    /// Tells more of the texts of jobs that are `wanted`: what no later step changes, from where it
    /// was told last, in whole characters. With the answer's rest it is the answer's text.
    pub fn tell(&mut self, wanted: impl Fn(&T) -> bool, mut tell: impl FnMut(&T, &str)) {
        for member in self.members.iter_mut().filter(|member| wanted(&member.ticket)) {
            let settled = member.running.settled();
            let more = settled.get(member.told..).and_then(|ids| self.florence.text.piece(ids));
            if let Some(more) = more {
                member.told = settled.len();
                tell(&member.ticket, &more);
            }
        }
    }

    /// Drops the jobs that `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for dropped in self.members.extract_if(.., |member| !keep(&member.ticket)) {
            self.decoding.remove(dropped.running.job());
        }
    }

    /// Number of jobs that are being decoded.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is no job left.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}
