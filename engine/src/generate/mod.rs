//! Text generation: greedy and beam search over the decoder, several jobs side by side.
//!
//! The search itself ([`Search`]) is pure and sees only logits; this file runs the network for it.
//! Rows of all jobs make one decoder step together, wherever each job stands: a job may join and
//! leave at any step. A job's rows never see another job's.

mod beam;
mod path;
mod rules;
mod search;

use candle_core::Result;
use rayon::prelude::*;

pub use rules::Rules;
pub use search::{Generated, Search};

use crate::model::{CrossCache, Model, SelfCache, StepRows};

/// A job that is being decoded.
pub(crate) struct Decoding {
    cross: CrossCache,
    cache: SelfCache,
    search: Search,
    /// Steps so far.
    position: usize,
}

impl Decoding {
    pub(crate) fn new(model: &Model, cross: CrossCache, rules: Rules) -> Self {
        Self { cross, cache: model.cache(), search: Search::new(rules), position: 0 }
    }

    /// Whether the answer is complete.
    pub(crate) fn is_finished(&self) -> bool {
        self.search.is_finished()
    }

    /// Takes the logits of the job's rows.
    fn advance(&mut self, logits: Option<&[f32]>) -> Result<()> {
        let parents = self.search.advance(logits);
        self.position += 1;
        let is_unchanged = parents.iter().copied().eq(0..self.search.rows());
        if is_unchanged || self.search.is_finished() {
            return Ok(());
        }
        self.cache.select(&parents)
    }

    pub(crate) fn finish(self) -> Generated {
        self.search.finish()
    }
}

/// One decoder step of all jobs together; none of them may be finished.
pub(crate) fn step<'a>(
    model: &Model,
    jobs: impl IntoIterator<Item = &'a mut Decoding>,
) -> Result<()> {
    let mut jobs: Vec<&mut Decoding> = jobs.into_iter().collect();
    let tokens: Vec<u32> = jobs.iter().flat_map(|job| job.search.last_tokens()).collect();
    let is_forced = jobs.iter().all(|job| job.search.is_forced());
    let mut rows: Vec<StepRows<'_>> = jobs
        .iter_mut()
        .map(|job| StepRows {
            position: job.position,
            rows: job.search.rows(),
            cross: &job.cross,
            cache: &mut job.cache,
        })
        .collect();
    let hidden = model.decode_step(&tokens, &mut rows)?;
    if is_forced {
        return advance(jobs, model.vocabulary(), None);
    }
    model.logits(&hidden, |logits| advance(jobs, model.vocabulary(), Some(logits)))?
}

/// Hands every job the logits of its rows.
fn advance(jobs: Vec<&mut Decoding>, vocabulary: usize, logits: Option<&[f32]>) -> Result<()> {
    let mut first = 0;
    let shares: Vec<_> = jobs
        .into_iter()
        .map(|job| {
            let count = job.search.rows() * vocabulary;
            first += count;
            (job, logits.map(|all| &all[first - count..first]))
        })
        .collect();
    shares.into_par_iter().try_for_each(|(job, logits)| job.advance(logits))
}
