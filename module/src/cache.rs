//! Answers, and encoded pictures, that may be asked for again.
//!
//! Both are keyed by the picture's bytes, not by where they came from; one process has one model.

use std::sync::{Arc, LazyLock};

use florence_engine::{Answer, GenerateOptions, Visual};
use quick_cache::{Weighter, sync::Cache};
use sha2::{Digest, Sha256};

use crate::config;

/// What an answer depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keys {
    /// SHA-256 of the picture's bytes.
    picture: [u8; 32],
    /// SHA-256 of picture, prompt and options.
    request: [u8; 32],
}

impl Keys {
    pub(crate) fn new(picture: &[u8], prompt: &str, options: &GenerateOptions) -> Self {
        let picture: [u8; 32] = Sha256::digest(picture).into();
        let mut request = Sha256::new();
        request.update(picture);
        request.update(format!("{options:?}\n{prompt}"));
        Self { picture, request: request.finalize().into() }
    }

    /// Whether both ask the same.
    pub(crate) fn is_same_request(&self, other: &Self) -> bool {
        self.request == other.request
    }
}

/// What a job was spared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Everything: the same request had been answered, or was being answered.
    Result,
    /// The vision tower: the same picture had been encoded.
    Features,
    /// Nothing.
    Miss,
}

impl Verdict {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::Features => "features",
            Self::Miss => "miss",
        }
    }
}

pub(crate) struct Caches {
    answers: Cache<[u8; 32], Arc<Answer>, Bytes>,
    pictures: Cache<[u8; 32], Visual, Bytes>,
}

/// Counts entries by the bytes that they take.
#[derive(Clone)]
struct Bytes;

/// What the cache itself needs for an entry, roughly.
const ENTRY: u64 = 128;

impl Weighter<[u8; 32], Arc<Answer>> for Bytes {
    fn weight(&self, _key: &[u8; 32], answer: &Arc<Answer>) -> u64 {
        // The JSON tree takes a few times the text that it came from.
        (8 * answer.text.len() + 8 * answer.token_ids.len()) as u64 + ENTRY
    }
}

impl Weighter<[u8; 32], Visual> for Bytes {
    fn weight(&self, _key: &[u8; 32], visual: &Visual) -> u64 {
        visual.bytes() as u64 + ENTRY
    }
}

/// The caches of this process, with the budgets of its start.
pub(crate) static CACHES: LazyLock<Caches> = LazyLock::new(|| {
    let (answers, pictures) =
        (config::number(&config::RESULT_CACHE_BYTES), config::number(&config::FEATURE_CACHE_BYTES));
    Caches {
        answers: Cache::with_weighter(10_000, answers, Bytes),
        pictures: Cache::with_weighter(1_000, pictures, Bytes),
    }
});

impl Caches {
    pub(crate) fn answer(&self, keys: &Keys) -> Option<Arc<Answer>> {
        self.answers.get(&keys.request)
    }

    pub(crate) fn visual(&self, keys: &Keys) -> Option<Visual> {
        self.pictures.get(&keys.picture).map(|visual| visual.reused())
    }

    pub(crate) fn keep_answer(&self, keys: &Keys, answer: &Arc<Answer>) {
        self.answers.insert(keys.request, Arc::clone(answer));
    }

    pub(crate) fn keep_visual(&self, keys: &Keys, visual: &Visual) {
        self.pictures.insert(keys.picture, visual.clone());
    }

    /// Bytes of answers and of encoded pictures.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.answers.weight(), self.pictures.weight())
    }
}
