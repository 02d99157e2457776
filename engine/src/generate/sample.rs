//! Tokens that are drawn by chance, as `transformers` does with `do_sample`: temperature, the highest
//! `top_k`, of these the likeliest that have `top_p` together.

use candle_core::{Device, Result, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Way};

use super::{
    path::Path,
    rules::{Rules, Scores, log_sum},
};
use crate::model::Logits;

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Below 1 likely tokens are drawn more often than the model says, above 1 less often.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are drawn from; all if there is no such number.
    pub top_k: Option<usize>,
    /// Of these, the likeliest that together have this probability.
    pub top_p: Option<f64>,
    /// The same seed draws the same tokens.
    pub seed: u64,
}

impl Sampling {
    /// As the reference has it where only some of them are given: a temperature, the number of the
    /// likeliest tokens (0 for all), their probability, a seed. One is enough to draw tokens.
    pub fn of(
        temperature: Option<f64>,
        top_k: Option<usize>,
        top_p: Option<f64>,
        seed: Option<u64>,
    ) -> Option<Self> {
        const TOP_K: usize = 50;
        let is_wanted = temperature.or(top_p).is_some() || top_k.is_some() || seed.is_some();
        is_wanted.then(|| Self {
            temperature: temperature.unwrap_or(1.0),
            top_k: Some(top_k.unwrap_or(TOP_K)).filter(|k| *k > 0),
            top_p,
            seed: seed.unwrap_or_default(),
        })
    }
}

/// One job's dice.
pub(super) struct Sampler {
    processor: LogitsProcessor,
    top_k: Option<usize>,
    is_top_p: bool,
}

impl Sampler {
    pub(super) fn new(sampling: &Sampling) -> Self {
        let Sampling { temperature, top_k, top_p, seed } = *sampling;
        let way = match top_p {
            Some(p) => Way::TopP { p, temperature },
            None => Way::All { temperature },
        };
        let processor = LogitsProcessor::from_sampling(seed, way);
        Self { processor, top_k, is_top_p: top_p.is_some() }
    }

    /// How many of the highest logits it looks at.
    pub(super) fn wanted(&self, rules: &Rules) -> usize {
        self.top_k.unwrap_or(rules.vocabulary)
    }

    /// Appends a token that is drawn among the allowed ones.
    pub(super) fn advance(&mut self, rules: &Rules, path: &mut Path, logits: Logits<'_>) -> u32 {
        let forced = rules.forced(path.ids.len()).map(|token| (token, 0.0));
        // As every search has it, a row of no use ends the sequence.
        let (token, score) =
            forced.or_else(|| self.draw(rules, path, logits)).unwrap_or((rules.eos, 0.0));
        path.push(token, score);
        token
    }

    fn draw(&mut self, rules: &Rules, path: &Path, logits: Logits<'_>) -> Option<(u32, f32)> {
        let row = logits.each().next()?;
        let scores = Scores::new(rules, &path.ids, log_sum(row));
        let tokens = scores.blocks(row).flat_map(|(_, block)| block);
        let mut tokens: Vec<(u32, f32)> = tokens.filter(|(_, score)| score.is_finite()).collect();
        if tokens.is_empty() {
            return None;
        }
        // In an order of their own: how many others a backend sends along must not matter.
        let likeliest = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = self.top_k.filter(|k| *k < tokens.len()) {
            tokens.select_nth_unstable_by(k, likeliest);
            tokens.truncate(k);
        }
        if self.is_top_p {
            // As the processor, which is not optimised, will sort them.
            tokens.sort_unstable_by(likeliest);
        } else {
            tokens.sort_unstable_by_key(|(token, _)| *token);
        }
        // What cannot be weighed is not drawn from.
        let chosen = self.choose(&tokens).unwrap_or_default();
        tokens.get(chosen).copied()
    }

    /// The place of the one that is drawn.
    fn choose(&mut self, tokens: &[(u32, f32)]) -> Result<usize> {
        let scores: Vec<f32> = tokens.iter().map(|(_, score)| *score).collect();
        let scores = Tensor::from_vec(scores, tokens.len(), &Device::Cpu)?;
        Ok(self.processor.sample(&scores)? as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: [f32; 6] = [0.0, 3.0, 1.0, 2.0, -1.0, 2.5];

    fn rules() -> Rules {
        Rules {
            vocabulary: ROW.len(),
            beams: 1,
            max_length: 400,
            no_repeat_ngram: 0,
            early_stopping: false,
            length_penalty: 1.0,
            sampling: None,
            start: 0,
            eos: 4,
            forced_bos: None,
            forced_eos: None,
        }
    }

    /// How often each token is drawn.
    fn drawn(sampling: &Sampling, draws: usize) -> [usize; 6] {
        let (mut sampler, rules, mut path) = (Sampler::new(sampling), rules(), Path::new(0));
        let mut counts = [0; 6];
        for _ in 0..draws {
            let token = sampler.advance(&rules, &mut path, Logits::all(&ROW, ROW.len()));
            counts[token as usize] += 1;
            path.ids.truncate(1);
        }
        counts
    }

    fn sampling(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Sampling {
        Sampling { temperature, top_k, top_p, seed: 7 }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        const DRAWS: usize = 20_000;
        for temperature in [0.5, 1.0, 2.0] {
            let counts = drawn(&sampling(temperature, None, None), DRAWS);
            let weights = ROW.map(|logit| (f64::from(logit) / temperature).exp());
            let whole: f64 = weights.iter().sum();
            for (count, weight) in counts.into_iter().zip(weights) {
                let (share, expected) = (count as f64 / DRAWS as f64, weight / whole);
                assert!((share - expected).abs() < 0.015, "{temperature}: {counts:?}");
            }
        }
    }

    #[test]
    fn only_the_likeliest_are_drawn_from() {
        let counts = drawn(&sampling(1.0, Some(2), None), 1000);
        assert_eq!(counts.map(|count| count > 0), [false, true, false, false, false, true]);
        assert_eq!(drawn(&sampling(5.0, Some(1), None), 100)[1], 100);
        // The first has 0.47, both 0.75.
        let counts = drawn(&sampling(1.0, None, Some(0.7)), 1000);
        assert_eq!(counts.map(|count| count > 0), [false, true, false, false, false, true]);
    }

    #[test]
    fn a_seed_draws_the_same_however_many_logits_there_are() {
        let rules = rules();
        let sequence = |seed, logits: Logits<'_>| {
            let sampling = Sampling { seed, ..sampling(1.5, Some(3), Some(0.95)) };
            let (mut sampler, mut path) = (Sampler::new(&sampling), Path::new(0));
            for _ in 0..50 {
                sampler.advance(&rules, &mut path, logits);
            }
            path
        };
        let all = Logits::all(&ROW, ROW.len());
        let (values, ids) = ([3.0, 1.0, 2.0, 2.5], [1, 2, 3, 5]);
        let sum = [ROW.iter().map(|logit| logit.exp()).sum::<f32>().ln()];
        let highest = Logits::highest(&values, &ids, &sum, 4);
        assert_eq!(sequence(1, all).ids, sequence(1, highest).ids);
        assert_ne!(sequence(1, all).ids, sequence(2, all).ids);
        // Scores are the model's own probabilities.
        let path = sequence(1, all);
        let score = ROW[path.ids[1] as usize] - sum[0];
        assert!((path.scores[0] - score).abs() < 1e-5);
    }

    #[test]
    fn rules_hold_for_what_is_drawn() {
        let forced = Rules { forced_bos: Some(2), max_length: 3, forced_eos: Some(4), ..rules() };
        let (mut sampler, mut path) = (Sampler::new(&sampling(1.0, None, None)), Path::new(0));
        let logits = || Logits::all(&ROW, ROW.len());
        assert_eq!(sampler.advance(&forced, &mut path, logits()), 2);
        assert_eq!(sampler.advance(&forced, &mut path, logits()), 4);
        let strict = Rules { no_repeat_ngram: 1, ..rules() };
        let mut path = Path::new(0);
        let mut seen: Vec<u32> =
            (0..5).map(|_| sampler.advance(&strict, &mut path, logits())).collect();
        seen.sort_unstable();
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        // A row without a number ends the sequence.
        let nothing = [f32::NAN; 6];
        assert_eq!(sampler.advance(&rules(), &mut path, Logits::all(&nothing, 6)), 4);
    }
}
