//! The crate's error: which stage failed, with that stage's own error as the source.

use crate::{fetch::FetchError, image::ImageError, model::LoadError, prompt::PromptError};

/// Why a picture got no answer, or a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The prompt is no task, or has text where none belongs.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The picture's bytes could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The bytes are no picture that can be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The checkpoint directory cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The processor cannot multiply in the precision that was asked for.
    #[error("this processor has no {0} products ({1}): use precision f32 or auto")]
    NoPrecision(&'static str, &'static str),
    /// There is no precision of this name.
    #[error("unknown precision '{0}': f32, int16, int8, bf16 or auto")]
    UnknownPrecision(String),
    /// There is no such choice of tokens.
    #[error("unknown token ids '{0}': checkpoint or tokenizer")]
    UnknownTokenIds(String),
    /// The caller asked for the run to stop.
    #[error("cancelled")]
    Cancelled,
    /// The computation itself failed.
    #[error("the model failed on this picture")]
    Compute(#[from] candle_core::Error),
    /// The device could not compute: it is out of memory, or lost.
    #[error("the device failed")]
    Device(#[source] candle_core::Error),
    /// Its weights are no model's: an answer has no probability.
    #[error("its answers have no probabilities: the weights are not those of a trained model")]
    Unusable,
    /// The thread pool could not be started.
    #[error("cannot start the compute threads")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}
