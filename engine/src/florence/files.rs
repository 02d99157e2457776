//! A checkpoint's files that are read whole, and what is taken where they are not there.

use super::LoadOptions;
use crate::{
    image::Preprocessor,
    model::{Checkpoint, ConfigFile, GenerationFields, LoadError},
    text::Text,
};

pub(super) const CONFIG: &str = "config.json";
pub(super) const PREPROCESSOR: &str = "preprocessor_config.json";
pub(super) const GENERATION: &str = "generation_config.json";

/// A checkpoint's files, but for the weights.
pub(super) struct Files {
    pub(super) config: ConfigFile,
    pub(super) generation: Option<GenerationFields>,
    pub(super) preprocessor: Preprocessor,
    pub(super) text: Text,
    pub(super) remarks: Vec<String>,
}

impl Files {
    pub(super) fn read(
        checkpoint: Checkpoint<'_>,
        options: &LoadOptions,
    ) -> Result<Self, LoadError> {
        let mut remarks = Vec::new();
        let config = checkpoint.read_json(CONFIG)?;
        let has = |name| checkpoint.has(name);
        let generation = has(GENERATION).then(|| checkpoint.read_json(GENERATION)).transpose()?;
        let tokenizer = options.tokenizer.as_deref().map(Checkpoint::Directory);
        let text = Text::load(tokenizer.unwrap_or(checkpoint))?;
        let preprocessor = match tokenizer.filter(|_| !has(PREPROCESSOR)) {
            None if has(PREPROCESSOR) => checkpoint.read_json(PREPROCESSOR)?,
            Some(other) if other.has(PREPROCESSOR) => {
                remarks.push(format!("{PREPROCESSOR} is the tokenizer's"));
                other.read_json(PREPROCESSOR)?
            }
            _ => {
                remarks.push(format!("there is no {PREPROCESSOR}: Florence-2's own is taken"));
                Preprocessor::default()
            }
        };
        Ok(Self { config, generation, preprocessor, text, remarks })
    }
}

pub(super) fn inconsistent(checkpoint: Checkpoint<'_>, file: &str, problem: String) -> LoadError {
    LoadError::Config { path: checkpoint.path(file), problem }
}
