//! What a search obeys: its width and length, and the reference's logits processors.

use super::Sampling;
use crate::{
    kernels::{Cpu, log_sum_exp},
    model::{GenerationDefaults, Row},
};

/// Rules of one search.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Size of a row of logits.
    pub vocabulary: usize,
    /// Beams; 1 is greedy search.
    pub beams: usize,
    /// Longest sequence, the start token included.
    pub max_length: usize,
    /// No n-gram of this length may occur twice; 0 switches the rule off.
    pub no_repeat_ngram: usize,
    /// Stop as soon as as many hypotheses as beams have ended.
    pub early_stopping: bool,
    /// Exponent of the length by which a hypothesis' log-probability is divided.
    pub length_penalty: f32,
    /// How tokens are drawn, if they are: then there is one beam.
    pub sampling: Option<Sampling>,
    /// The token that begins a sequence.
    pub start: u32,
    /// The token that ends a sequence.
    pub eos: u32,
    /// The first token after the start, if forced.
    pub forced_bos: Option<u32>,
    /// The last token at full length, if forced.
    pub forced_eos: Option<u32>,
}

impl Rules {
    /// A checkpoint's defaults, for sequences of up to `max_new_tokens` after the start token.
    pub(crate) fn new(
        defaults: &GenerationDefaults,
        vocabulary: usize,
        max_new_tokens: usize,
    ) -> Self {
        Self {
            vocabulary,
            beams: defaults.beams,
            max_length: 1 + max_new_tokens,
            no_repeat_ngram: defaults.no_repeat_ngram,
            early_stopping: defaults.early_stopping,
            length_penalty: defaults.length_penalty,
            sampling: None,
            start: defaults.start,
            eos: defaults.eos,
            forced_bos: defaults.forced_bos,
            forced_eos: defaults.forced_eos,
        }
    }

    /// The only token allowed after a sequence of `length` tokens, if there is just one.
    pub(super) fn forced(&self, length: usize) -> Option<u32> {
        if length + 1 == self.max_length && self.forced_eos.is_some() {
            return self.forced_eos;
        }
        self.forced_bos.filter(|_| length == 1)
    }

    /// Tokens that may not follow `sequence`, because an n-gram would occur twice.
    pub(super) fn banned(&self, sequence: &[u32]) -> Vec<u32> {
        let n = self.no_repeat_ngram;
        if n == 0 || sequence.len() < n {
            return Vec::new();
        }
        let ending = &sequence[sequence.len() + 1 - n..];
        let repeated = sequence.windows(n).filter(|window| window[..n - 1] == *ending);
        repeated.map(|window| window[n - 1]).collect()
    }

    /// Whether a sequence that ends in `token` and has `length` tokens is complete.
    pub(super) fn ends(&self, token: u32, length: usize) -> bool {
        token == self.eos || length >= self.max_length
    }
}

/// Scores of the tokens that may follow a sequence, one by one: what a search passes over is never
/// computed.
pub(super) struct Scores {
    forced: Option<u32>,
    banned: Vec<u32>,
    log_sum: f32,
}

impl Scores {
    /// A score is a logit less `log_sum`.
    pub(super) fn new(rules: &Rules, sequence: &[u32], log_sum: f32) -> Self {
        let (forced, banned) = (rules.forced(sequence.len()), rules.banned(sequence));
        Self { forced, banned, log_sum }
    }

    /// Blocks of a row: what no score of a block exceeds, and its tokens with their scores.
    pub(super) fn blocks<'a>(
        &'a self,
        row: Row<'a>,
    ) -> impl Iterator<Item = (f32, impl Iterator<Item = (u32, f32)> + 'a)> + 'a {
        /// Logits that are looked at together.
        const BLOCK: usize = 64;
        (0..).step_by(BLOCK).zip(row.values.chunks(BLOCK)).map(move |(first, block)| {
            let scores = (first..).zip(block).map(move |(index, logit)| {
                let token = row.token(index);
                (token, self.of(token, *logit))
            });
            (self.most(highest(block)), scores)
        })
    }

    /// Of a token with its logit.
    fn of(&self, token: u32, logit: f32) -> f32 {
        match self.forced {
            Some(forced) if token == forced => 0.0,
            Some(_) => f32::NEG_INFINITY,
            None if self.banned.contains(&token) => f32::NEG_INFINITY,
            None => logit - self.log_sum,
        }
    }

    /// No token whose logit is not above this one has a higher score.
    fn most(&self, logit: f32) -> f32 {
        if self.forced.is_some() { 0.0 } else { logit - self.log_sum }
    }
}

/// What makes log-probabilities of logits, when it is taken from them.
pub(super) fn log_sum(row: Row<'_>) -> f32 {
    row.log_sum.unwrap_or_else(|| log_sum_exp(Cpu::detect(), row.values))
}

/// The highest of some logits.
fn highest(logits: &[f32]) -> f32 {
    // Side by side, so that the compiler can take several at once.
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (parts, rest) = logits.as_chunks::<8>();
    for part in parts {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, x| most.max(*x))
}
