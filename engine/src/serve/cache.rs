//! Answers, and encoded pictures, that may be asked for again.
//!
//! Both are keyed by the picture's bytes, not by where they came from, and by a scope: who asks in
//! one neither gets nor learns of what was asked in another. Models may share one value: their
//! keys tell them apart.

use std::sync::Arc;

use quick_cache::{Weighter, sync::Cache};
use sha2::{Digest, Sha256};

use crate::{
    Answer, GenerateOptions, Question, Visual,
    image::{Area, Orientation},
};

/// A picture: SHA-256 of a scope, of the bytes, and of how they are read.
#[derive(Debug, Clone, Copy)]
pub struct PictureKey([u8; 32]);

impl PictureKey {
    /// Of a picture's bytes in a scope; the empty one is shared by all who name none.
    pub fn new(scope: &str, bytes: &[u8], orientation: Orientation) -> Self {
        let orientation = format!("{orientation:?}");
        Self(digest([scope.as_bytes(), orientation.as_bytes(), bytes]))
    }

    /// Of a part of the picture.
    #[must_use]
    pub fn part(&self, part: Area) -> Self {
        let edges = [part.left, part.top, part.width, part.height].map(usize::to_le_bytes);
        Self(digest([b"part", &self.0, edges.as_flattened()]))
    }
}

/// What an answer depends on.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    picture: [u8; 32],
    /// SHA-256 of the picture's, the options and the question.
    request: [u8; 32],
}

impl Keys {
    /// Of a picture, a question and how the answer is generated.
    pub fn new(picture: PictureKey, question: &Question, options: &GenerateOptions) -> Self {
        let PictureKey(picture) = picture;
        // However the prompt was written: what counts is what the model is asked.
        let (name, ids) = question.identity();
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let options = format!("{options:?}");
        let request = digest([&picture, options.as_bytes(), name.as_bytes(), &ids]);
        Self { picture, request }
    }

    /// Whether both ask about the same picture.
    pub(super) fn is_same_picture(&self, other: &Self) -> bool {
        self.picture == other.picture
    }

    /// Whether both ask the same.
    pub(super) fn is_same_request(&self, other: &Self) -> bool {
        self.request == other.request
    }
}

/// SHA-256 of parts, each after its length: no two lists of parts are the same bytes.
fn digest<const N: usize>(parts: [&[u8]; N]) -> [u8; 32] {
    let mut sha = Sha256::new();
    for part in parts {
        sha.update((part.len() as u64).to_le_bytes());
        sha.update(part);
    }
    sha.finalize().into()
}

/// What a job was spared; the least of it comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Everything: the same request had been answered, or was being answered.
    Result,
    /// The vision tower: the same picture had been encoded.
    Features,
    /// Nothing.
    Miss,
}

impl Verdict {
    /// The verdict's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::Features => "features",
            Self::Miss => "miss",
        }
    }
}

/// What may be asked for again.
pub struct Caches {
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
        let bytes = |text: &str, ids: &[u32]| 8 * text.len() + 8 * ids.len();
        let best = answer.n_best.iter().map(|one| bytes(&one.text, &one.token_ids));
        (bytes(&answer.text, &answer.token_ids) + best.sum::<usize>()) as u64 + ENTRY
    }
}

impl Weighter<[u8; 32], Visual> for Bytes {
    fn weight(&self, _key: &[u8; 32], visual: &Visual) -> u64 {
        visual.bytes() as u64 + ENTRY
    }
}

impl Caches {
    /// Caches with these budgets in bytes; 0 keeps nothing.
    pub fn new(answers: u64, pictures: u64) -> Self {
        Self {
            answers: Cache::with_weighter(10_000, answers, Bytes),
            pictures: Cache::with_weighter(1_000, pictures, Bytes),
        }
    }

    /// The answer to a request.
    pub fn answer(&self, keys: &Keys) -> Option<Arc<Answer>> {
        self.answers.get(&keys.request)
    }

    /// An encoded picture.
    pub fn visual(&self, keys: &Keys) -> Option<Visual> {
        self.pictures.get(&keys.picture).map(|visual| visual.reused())
    }

    pub(super) fn keep_answer(&self, keys: &Keys, answer: &Arc<Answer>) {
        self.answers.insert(keys.request, Arc::clone(answer));
    }

    pub(super) fn keep_visual(&self, keys: &Keys, visual: &Visual) {
        self.pictures.insert(keys.picture, visual.clone());
    }

    /// Lets go of all encoded pictures.
    pub fn forget_pictures(&self) {
        self.pictures.clear();
    }

    /// Bytes of answers and of encoded pictures.
    pub fn bytes(&self) -> (u64, u64) {
        (self.answers.weight(), self.pictures.weight())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_neither_gets_nor_shares_what_another_asked() {
        let (caches, options) = (Caches::new(1 << 20, 1 << 20), GenerateOptions::default());
        let keys = |scope, picture: &str, orientation| {
            let picture = PictureKey::new(scope, picture.as_bytes(), orientation);
            Keys::new(picture, &Question::made_up(1), &options)
        };
        let ours = keys("a", "picture", Orientation::AsStored);
        caches.keep_answer(&ours, &Arc::new(Answer::made_up(1)));
        caches.keep_visual(&ours, &Visual::made_up());
        let again = keys("a", "picture", Orientation::AsStored);
        assert!(caches.answer(&again).is_some() && caches.visual(&again).is_some());
        assert!(ours.is_same_request(&again));
        // The last two are the same bytes in a row.
        for (scope, picture, orientation) in [
            ("", "picture", Orientation::AsStored),
            ("b", "picture", Orientation::AsStored),
            ("a", "picture", Orientation::Exif),
            ("", "apicture", Orientation::AsStored),
            ("ap", "icture", Orientation::AsStored),
        ] {
            let other = keys(scope, picture, orientation);
            assert!(caches.answer(&other).is_none() && caches.visual(&other).is_none());
            assert!(!ours.is_same_request(&other), "{scope} {picture}");
        }
    }
}
