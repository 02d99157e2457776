//! From what a search has found to what is told of a picture.

use std::{ops::Range, sync::Arc, time::Instant};

use serde_json::Value;

use super::{Florence, milliseconds};
use crate::{
    generate::Generated,
    postprocess::{Decimals, Parsed, Scale, Scored, post_process},
    task::AnswerKind,
};

/// What the model says of a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The generated text, special tokens included.
    pub text: String,
    /// The generated ids, start and end token included.
    pub token_ids: Vec<u32>,
    /// The reference's JSON: `{"<OD>": {"bboxes": .., "labels": ..}}`.
    pub json: Value,
    /// One score a label (a box without one counts as labelled), or one for a text: the geometric
    /// mean of the probabilities of its location tokens, or of all the text's tokens.
    pub scores: Vec<f32>,
    /// Width and height of the picture, to which coordinates refer.
    pub size: (usize, usize),
    /// Mean log-probability of the tokens, as the search ranks it.
    pub score: f32,
    /// The best texts that the search has found, this one first, where they were asked for.
    pub n_best: Vec<Ranked>,
    /// Where the time went.
    pub timings: Timings,
}

/// One of several texts that a search has found.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// As an answer's.
    pub score: f32,
    /// As an answer's.
    pub text: String,
    /// As an answer's.
    pub token_ids: Vec<u32>,
    /// As an answer's.
    pub json: Value,
}

impl Ranked {
    /// The JSON with coordinates of so many decimals.
    pub fn rounded(&self, decimals: Decimals) -> Value {
        decimals.round(&self.json)
    }

    /// As one entry of the list of the best: `score`, `text`, and the JSON as `result`.
    pub fn told(&self, decimals: Decimals) -> Value {
        let result = self.rounded(decimals);
        serde_json::json!({ "score": self.score, "text": self.text, "result": result })
    }
}

impl Answer {
    /// The JSON with coordinates of so many decimals.
    pub fn rounded(&self, decimals: Decimals) -> Value {
        decimals.round(&self.json)
    }
}

/// Milliseconds per stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Timings {
    pub decode: f64,
    pub preprocess: f64,
    pub vision: f64,
    pub encoder: f64,
    pub decoder: f64,
    pub postprocess: f64,
}

/// How the answer's text is to be read.
pub(super) struct Reading {
    pub(super) name: Arc<str>,
    pub(super) answer: AnswerKind,
    pub(super) scale: Scale,
}

impl Florence {
    /// The answer is the first of the best; all of them are told if they are `wanted`.
    pub(super) fn answer(
        &self,
        reading: &Reading,
        (best, wanted): (Vec<Generated>, bool),
        timings: Timings,
    ) -> Answer {
        let start = Instant::now();
        let mut scores = Vec::new();
        let ranked = |(i, generated): (usize, Generated)| {
            let text = self.text.decode(&generated.ids);
            let Parsed { json, scored } = post_process(reading.answer, &text, reading.scale);
            if i == 0 {
                scores = self.scores(&generated, &scored);
            }
            let json = serde_json::json!({ &*reading.name: json });
            Ranked { score: generated.score, text, token_ids: generated.ids, json }
        };
        let mut best: Vec<Ranked> = best.into_iter().enumerate().map(ranked).collect();
        let n_best = if wanted { best.clone() } else { Vec::new() };
        let Ranked { score, text, token_ids, json } = best.swap_remove(0);
        Answer {
            text,
            json,
            scores,
            size: reading.scale.size,
            score,
            token_ids,
            n_best,
            timings: Timings { postprocess: milliseconds(start), ..timings },
        }
    }

    /// The geometric means of the probabilities of tokens.
    fn scores(&self, generated: &Generated, scored: &Scored) -> Vec<f32> {
        let all = &generated.token_scores;
        match scored {
            Scored::Text => vec![mean(all)],
            Scored::Locations(ranges) => {
                let tokens = generated.ids[1..].iter().zip(all);
                let is_location = |(id, _): &(&u32, &f32)| self.text.is_location(**id);
                let locations: Vec<f32> = tokens.filter(is_location).map(|(_, s)| *s).collect();
                let score = |range: &Range<usize>| locations.get(range.clone()).map_or(0.0, mean);
                ranges.iter().map(score).collect()
            }
        }
    }
}

/// `exp` of the mean of log-probabilities; nothing has no probability.
fn mean(scores: &[f32]) -> f32 {
    if scores.is_empty() {
        return 0.0;
    }
    (scores.iter().sum::<f32>() / scores.len() as f32).exp()
}
