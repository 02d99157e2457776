//! The lines of `florence label`: an answer about a picture each, as JSON. All that the other formats
//! are written from stands in them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What was answered for a prompt about a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The picture, by the name that it was found under.
    pub(crate) file: String,
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// The key of the answer's JSON, such as `<OD>`.
    pub(crate) task: String,
    pub(crate) prompt: String,
    /// The reference's JSON.
    pub(crate) answer: Value,
    /// What the model has generated.
    #[serde(default)]
    pub(crate) text: String,
    /// Probabilities, where they are known: one for each label, or one for a text.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub(crate) scores: Value,
    #[serde(default)]
    pub(crate) model: String,
    /// Of the picture's bytes; a picture that only a server has read has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
}
