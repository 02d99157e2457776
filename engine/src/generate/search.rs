//! One job's search: it is given logits and says which rows go on with which tokens.

use super::{
    beam::Beams,
    path::Path,
    rules::{Rules, Scores, log_sum},
    sample::Sampler,
};
use crate::model::Logits;

/// A finished sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Token ids, from the start token to the end token.
    pub ids: Vec<u32>,
    /// Log-probability of every token after the start token; 0 for a forced one.
    pub token_scores: Vec<f32>,
    /// Mean log-probability as beam search ranks it; for greedy search the plain mean.
    pub score: f32,
}

/// Greedy or beam search, by the number of beams, or tokens that are drawn.
pub struct Search {
    rules: Rules,
    state: State,
}

enum State {
    Greedy { path: Path, is_finished: bool },
    Sampled { path: Path, is_finished: bool, sampler: Box<Sampler> },
    Beams(Beams),
}

impl Search {
    /// A search at the start token.
    pub fn new(rules: Rules) -> Self {
        let path = Path::new(rules.start);
        let is_finished = rules.max_length <= 1;
        let state = match &rules.sampling {
            Some(sampling) => {
                State::Sampled { path, is_finished, sampler: Box::new(Sampler::new(sampling)) }
            }
            None if rules.beams <= 1 => State::Greedy { path, is_finished },
            None => State::Beams(Beams::new(rules.beams, &path)),
        };
        Self { rules, state }
    }

    /// Rows of logits that [`Self::advance`] expects.
    pub fn rows(&self) -> usize {
        match &self.state {
            State::Greedy { .. } | State::Sampled { .. } => 1,
            State::Beams(beams) => beams.rows().len(),
        }
    }

    /// The sequence of every row.
    pub fn sequences(&self) -> impl Iterator<Item = &[u32]> {
        let paths = match &self.state {
            State::Greedy { path, .. } | State::Sampled { path, .. } => std::slice::from_ref(path),
            State::Beams(beams) => beams.rows(),
        };
        paths.iter().map(|path| path.ids.as_slice())
    }

    /// The token that each row is about to feed to the network.
    pub(super) fn last_tokens(&self) -> impl Iterator<Item = u32> {
        self.sequences().filter_map(|ids| ids.last().copied())
    }

    /// Whether the next token is the same whatever the logits are.
    pub fn is_forced(&self) -> bool {
        self.sequences().next().is_some_and(|ids| self.rules.forced(ids.len()).is_some())
    }

    /// How many of the highest logits of a row are enough for the next step, whichever are not
    /// allowed.
    pub(super) fn wanted(&self) -> usize {
        let wanted = match &self.state {
            State::Greedy { .. } => 1,
            State::Sampled { sampler, .. } => sampler.wanted(&self.rules),
            State::Beams(beams) => beams.wanted(),
        };
        let banned = self.sequences().map(|ids| self.rules.banned(ids).len());
        wanted + banned.max().unwrap_or_default()
    }

    /// Takes the logits of every row, one after the other; returns, for every row of the next
    /// step, the row that it continues. `None` serves where the next token is forced.
    pub fn advance(&mut self, logits: Option<Logits<'_>>) -> Vec<usize> {
        let zeros;
        let logits = if let Some(logits) = logits.filter(|_| !self.is_forced()) {
            logits
        } else {
            zeros = vec![0.0; self.rows() * self.rules.vocabulary];
            Logits::all(&zeros, self.rules.vocabulary)
        };
        match &mut self.state {
            State::Greedy { path, is_finished } => {
                let token = greedy(&self.rules, path, logits);
                *is_finished = self.rules.ends(token, path.ids.len());
                vec![0]
            }
            State::Sampled { path, is_finished, sampler } => {
                let token = sampler.advance(&self.rules, path, logits);
                *is_finished = self.rules.ends(token, path.ids.len());
                vec![0]
            }
            State::Beams(beams) => beams.advance(&self.rules, logits),
        }
    }

    /// Whether the answer is complete.
    pub fn is_finished(&self) -> bool {
        match &self.state {
            State::Greedy { is_finished, .. } | State::Sampled { is_finished, .. } => *is_finished,
            State::Beams(beams) => beams.is_finished(),
        }
    }

    /// The beginning of the answer that no later step changes.
    pub fn settled(&self) -> &[u32] {
        match &self.state {
            State::Greedy { path, .. } | State::Sampled { path, .. } => &path.ids,
            State::Beams(beams) => beams.settled(),
        }
    }

    /// Up to `most` sequences, best first, and at least one.
    pub fn finish(self, most: usize) -> Vec<Generated> {
        let best = match self.state {
            State::Greedy { path, .. } | State::Sampled { path, .. } => {
                let mean = path.scores.iter().sum::<f32>() / path.scores.len().max(1) as f32;
                vec![(path, mean)]
            }
            State::Beams(beams) => beams.into_best(most),
        };
        let generated = |(path, score): (Path, f32)| Generated {
            ids: path.ids,
            token_scores: path.scores,
            score,
        };
        best.into_iter().map(generated).collect()
    }
}

/// Appends the most likely allowed token, the lowest id among equals.
fn greedy(rules: &Rules, path: &mut Path, logits: Logits<'_>) -> u32 {
    // As the reference, by the logits themselves: log-probabilities may be equal where these are not.
    let scores = Scores::new(rules, &path.ids, 0.0);
    let (mut best, mut most) = (0, f32::NEG_INFINITY);
    let Some(row) = logits.each().next() else { return best };
    for (bound, block) in scores.blocks(row) {
        if bound <= most {
            continue;
        }
        for (token, own) in block {
            if own > most {
                (best, most) = (token, own);
            }
        }
    }
    let score = match rules.forced(path.ids.len()) {
        Some(_) => 0.0,
        None => most - log_sum(row),
    };
    path.push(best, score);
    best
}
