//! Why a checkpoint cannot be used.

use std::path::PathBuf;

use super::StandIn;

/// Why a checkpoint directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A CUDA device is wanted of a build that knows none.
    #[error("this build is for the CPU; one for CUDA devices is made with `make cuda`")]
    NotForCuda,
    /// There is no such device, or it cannot be used.
    #[error("the CUDA device {0} cannot be used: {1}")]
    NoDevice(usize, #[source] candle_core::Error),
    /// There is no such directory.
    #[error("there is no directory {0}")]
    NoDirectory(PathBuf),
    /// There is no such directory, but its name is one that the hub may know.
    #[error(
        "there is no directory {0}; if it is a name of the Hugging Face hub, \
         `florence pull {0}` downloads it"
    )]
    HubName(PathBuf),
    /// An adapter where a model should be.
    #[error(
        "{0} holds an adapter, which needs the model that it was trained on: that one is the \
         model, this the adapter"
    )]
    IsAdapter(PathBuf),
    /// Something else stands where a file should be.
    #[error("{path} is {found}")]
    StandIn {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: StandIn,
    },
    /// A file is missing or cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file or directory cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is malformed or lacks a field.
    #[error("{path} is not what Florence-2 needs: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The values of a JSON file contradict each other, or what goes with it.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// `tokenizer.json` is malformed.
    #[error("cannot load {path}: {source}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: tokenizers::Error,
    },
    /// There is no tokenizer.
    #[error(
        "{0} has no tokenizer.json; that of the model which this one was made from will do: \
         florence.tokenizer or --tokenizer names its directory"
    )]
    NoTokenizer(PathBuf),
    /// A weight file is damaged.
    #[error("{path} is damaged or not a weight file: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: candle_core::Error,
    },
    /// There is no weight file at all.
    #[error("{0} holds neither model.safetensors nor pytorch_model.bin")]
    NoWeights(PathBuf),
    /// A tensor is missing.
    #[error("tensor {name} is missing, expected shape {expected:?}")]
    Missing {
        /// Canonical name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name in the file.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The device cannot be used.
    #[error("cannot use the device: {0}")]
    Device(#[source] candle_core::Error),
}
