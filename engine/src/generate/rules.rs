//! What a search obeys: its width and length, and the reference's logits processors.

use crate::{
    kernels::{Cpu, log_sum_exp},
    model::GenerationDefaults,
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

    /// Applies the rules to the scores of the tokens that may follow `sequence`.
    pub(super) fn process(&self, sequence: &[u32], scores: &mut [f32]) {
        if let Some(token) = self.forced(sequence.len()) {
            scores.fill(f32::NEG_INFINITY);
            scores[token as usize] = 0.0;
            return;
        }
        let n = self.no_repeat_ngram;
        if n == 0 || sequence.len() < n {
            return;
        }
        let ending = &sequence[sequence.len() + 1 - n..];
        for window in sequence.windows(n) {
            if window[..n - 1] == *ending {
                scores[window[n - 1] as usize] = f32::NEG_INFINITY;
            }
        }
    }

    /// Whether a sequence that ends in `token` and has `length` tokens is complete.
    pub(super) fn ends(&self, token: u32, length: usize) -> bool {
        token == self.eos || length >= self.max_length
    }
}

/// The logarithm of the softmax.
pub(super) fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let log_sum = log_sum_exp(Cpu::detect(), logits);
    logits.iter().map(|x| x - log_sum).collect()
}
