//! Text generation: greedy and beam search over the decoder, several jobs side by side.
//!
//! The search itself ([`Search`]) is pure and sees only logits; this file runs the network for it.
//! Rows of all jobs make one decoder step together, wherever each job stands: a job may join and
//! leave at any step. A job's rows never see another job's.

mod beam;
mod path;
mod rules;
mod sample;
mod search;

use candle_core::Result;
use rayon::prelude::*;

pub use rules::Rules;
pub use sample::Sampling;
pub use search::{Generated, Search};

use crate::model::{Decoding, JobId, Logits, Look, Rows};

/// A search, and the job of the decoder that it goes through.
pub(crate) struct Running {
    job: JobId,
    search: Search,
}

impl Running {
    pub(crate) fn new(job: JobId, rules: Rules) -> Self {
        Self { job, search: Search::new(rules) }
    }

    pub(crate) fn job(&self) -> JobId {
        self.job
    }

    /// Whether the answer is complete.
    pub(crate) fn is_finished(&self) -> bool {
        self.search.is_finished()
    }

    /// The beginning of the answer that no later step changes.
    pub(crate) fn settled(&self) -> &[u32] {
        self.search.settled()
    }

    /// Takes the logits of the job's rows; which rows go on, unless all do as they are.
    fn advance(&mut self, logits: Option<Logits<'_>>) -> Option<Vec<usize>> {
        let parents = self.search.advance(logits);
        let is_unchanged = parents.iter().copied().eq(0..self.search.rows());
        (!is_unchanged && !self.search.is_finished()).then_some(parents)
    }

    pub(crate) fn finish(self, most: usize) -> Vec<Generated> {
        self.search.finish(most)
    }
}

/// One decoder step of all searches together; none of them may be finished.
pub(crate) fn step<'a>(
    decoding: &mut dyn Decoding,
    searches: impl IntoIterator<Item = &'a mut Running>,
) -> Result<()> {
    let mut searches: Vec<&mut Running> = searches.into_iter().collect();
    let is_forced = searches.iter().all(|running| running.search.is_forced());
    let rows = |running: &&mut Running| Rows {
        job: running.job,
        tokens: running.search.last_tokens().collect(),
    };
    let rows: Vec<Rows> = searches.iter().map(rows).collect();
    let mut selected = Vec::new();
    if is_forced {
        decoding.step(&rows, None)?;
        selected = advance(&mut searches, None);
    } else {
        let highest = searches.iter().map(|running| running.search.wanted()).max();
        let mut at = |logits: Logits<'_>| selected = advance(&mut searches, Some(logits));
        decoding.step(&rows, Some(Look { highest: highest.unwrap_or(1), at: &mut at }))?;
    }
    selected.iter().try_for_each(|(job, parents)| decoding.select(*job, parents))
}

/// Hands every search the logits of its rows; the jobs whose rows move, with their parents.
fn advance(searches: &mut [&mut Running], logits: Option<Logits<'_>>) -> Vec<(JobId, Vec<usize>)> {
    let mut first = 0;
    let shares: Vec<_> = searches
        .iter_mut()
        .map(|running| &mut **running)
        .map(|running| {
            let count = running.search.rows();
            first += count;
            (running, logits.map(|all| all.rows(first - count, count)))
        })
        .collect();
    let advance = |(running, logits): (&mut Running, Option<Logits<'_>>)| {
        running.advance(logits).map(|parents| (running.job, parents))
    };
    shares.into_par_iter().filter_map(advance).collect()
}
