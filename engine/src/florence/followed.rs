//! How far the model's opinion of an answer goes when some of its products are switched to int8.

use candle_core::Tensor;

use super::{Florence, Prepared};
use crate::Error;

/// A part of the network, in the order of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The vision tower and the projector.
    Vision,
    /// The language model's encoder.
    Encoder,
    /// Its decoder.
    Decoder,
}

impl Part {
    /// The part that a weight belongs to.
    pub fn of(name: &str) -> Self {
        if name.starts_with("text.encoder.") {
            Self::Encoder
        } else if name.starts_with("vision_tower.") || name.starts_with("projector.") {
            Self::Vision
        } else {
            Self::Decoder
        }
    }
}

/// A question, an answer to it, and what the model thought of each of the answer's tokens.
pub struct Followed<'a> {
    florence: &'a Florence,
    prepared: &'a Prepared,
    tokens: &'a [u32],
    visual: Tensor,
    encoded: Tensor,
    /// Log-probabilities of all tokens, after each token of the answer.
    expected: Vec<Vec<f32>>,
}

impl Florence {
    /// Follows an answer's tokens, as the model is now.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`].
    pub fn follow<'a>(
        &'a self,
        prepared: &'a Prepared,
        tokens: &'a [u32],
    ) -> Result<Followed<'a>, Error> {
        let (visual, encoded, expected) = self.compute(|| {
            let visual = self.model.visual_tokens(&[prepared.pixels()], |_| {})?;
            let encoded = self.model.encode(&visual, prepared.prompt_ids())?;
            let expected = self.model.log_probabilities(&encoded, tokens)?;
            Ok((visual, encoded, expected))
        })?;
        Ok(Followed { florence: self, prepared, tokens, visual, encoded, expected })
    }
}

impl Followed<'_> {
    /// The mean divergence (Kullback and Leibler's, in nats) of the next tokens' probabilities from
    /// what they were, when the model has changed from `part` on.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`].
    pub fn divergence(&self, part: Part) -> Result<f64, Error> {
        let model = self.florence.model();
        let found = self.florence.compute(|| {
            let visual = match part {
                Part::Vision => model.visual_tokens(&[self.prepared.pixels()], |_| {})?,
                Part::Encoder | Part::Decoder => self.visual.clone(),
            };
            let encoded = match part {
                Part::Vision | Part::Encoder => {
                    model.encode(&visual, self.prepared.prompt_ids())?
                }
                Part::Decoder => self.encoded.clone(),
            };
            model.log_probabilities(&encoded, self.tokens)
        })?;
        let each = self.expected.iter().zip(&found).map(|(p, q)| divergence(p, q));
        Ok(each.sum::<f64>() / self.expected.len().max(1) as f64)
    }
}

/// Of two distributions, both as logarithms.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    p.iter().zip(q).map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum()
}

#[cfg(test)]
mod tests {
    use super::divergence;

    #[test]
    fn equal_distributions_do_not_diverge_and_others_do() {
        let p = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln()];
        let q = [0.25f32.ln(), 0.5f32.ln(), 0.25f32.ln()];
        assert!(divergence(&p, &p).abs() < 1e-9);
        assert!((divergence(&p, &q) - 0.25 * 2f64.ln()).abs() < 1e-6);
    }
}
