//! Values without a model behind them, for tests of what only passes them on.

use serde_json::Value;

use super::{Answer, Picture, Question, Timings, Visual};
use crate::{image::PixelValues, model::Kept, task::AnswerKind};

impl Visual {
    pub(crate) fn made_up() -> Self {
        let tokens = candle_core::Tensor::zeros(
            (1, 1, 1),
            candle_core::DType::F32,
            &candle_core::Device::Cpu,
        );
        let tokens = Kept::new(tokens.expect("a small tensor"));
        Self { tokens, size: (1, 1), timings: Timings::default() }
    }
}

impl Picture {
    pub(crate) fn made_up() -> Self {
        let pixels = PixelValues { side: 1, data: vec![0.0; 3] };
        Self { pixels, size: (1, 1), decode_ms: 0.0, preprocess_ms: 0.0 }
    }
}

impl Question {
    pub(crate) fn made_up(id: u32) -> Self {
        Self { name: "<CAPTION>".into(), answer: AnswerKind::Text, is_task: true, ids: vec![id] }
    }

    pub(crate) fn id(&self) -> u32 {
        self.ids[0]
    }
}

impl Answer {
    pub(crate) fn made_up(id: u32) -> Self {
        Self {
            text: id.to_string(),
            token_ids: vec![id],
            json: Value::Null,
            scores: Vec::new(),
            size: (1, 1),
            score: 0.0,
            n_best: Vec::new(),
            timings: Timings::default(),
        }
    }
}
