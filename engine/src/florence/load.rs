//! How a value comes to be: from a checkpoint's files, the embedded model, or another value.

use std::{path::Path, sync::Arc};

use quick_cache::sync::Cache;

use super::{
    Florence, LoadOptions, TokenIds,
    files::{CONFIG, Files, GENERATION, PREPROCESSOR, inconsistent},
};
use crate::{
    Error,
    model::{Checkpoint, Model, Shape, Target},
};

/// Prompts that are kept.
const QUESTIONS: usize = 1024;

impl Florence {
    /// Loads a checkpoint directory of either layout.
    ///
    /// # Errors
    ///
    /// [`Error::Load`] names the file or tensor that is missing, damaged or misshapen.
    pub fn load(directory: &Path, options: &LoadOptions) -> Result<Self, Error> {
        Self::from_checkpoint(Checkpoint::Directory(directory), options)
    }

    /// Loads `models/tiny`, which is part of the library and needs no files.
    ///
    /// # Errors
    ///
    /// As [`Self::load`], but only for a lack of memory, threads or the device.
    pub fn embedded(options: &LoadOptions) -> Result<Self, Error> {
        Self::from_checkpoint(Checkpoint::Embedded, options)
    }

    /// A model of a published size with made-up weights, to measure speed without any file.
    ///
    /// # Errors
    ///
    /// As [`Self::embedded`].
    pub fn synthetic(shape: Shape, options: &LoadOptions) -> Result<Self, Error> {
        Self::from_checkpoint(Checkpoint::Synthetic(shape), options)
    }

    fn from_checkpoint(checkpoint: Checkpoint<'_>, options: &LoadOptions) -> Result<Self, Error> {
        checkpoint.check_model()?;
        let (found, _) = options.device.settled();
        let device = found.open()?;
        let compute = options.compute(found)?;
        let threads = options.thread_pool()?;
        let Files { config, generation, preprocessor, text, mut remarks } =
            Files::read(checkpoint, options)?;
        let side = preprocessor.side().ok_or_else(|| {
            inconsistent(checkpoint, PREPROCESSOR, "the picture size must be a square".to_owned())
        })?;
        let adapter = options.adapter.as_deref();
        let target = Target {
            device: &device,
            compute,
            keep_packed: options.keep_packed,
            packed_directory: options.packed_directory.as_deref(),
            adapter,
            int8: &options.int8,
        };
        let load = || Model::load(checkpoint, &config, side, &target);
        let model = Arc::new(compute.here(&threads, load)?);
        if !model.told().is_empty() {
            remarks.push(format!(
                "{CONFIG} has no {}: what the tensors' shapes and Florence-2's own values give is \
                 taken",
                model.told().join(", ")
            ));
        }
        let (ids, rows) = (text.vocabulary(), model.vocabulary());
        // The native tokenizer's last id, `<image>`, is only a placeholder.
        if ids > rows + 1 {
            let problem = format!("the tokenizer has {ids} ids, the model only {rows}");
            return Err(inconsistent(checkpoint, CONFIG, problem).into());
        }
        let mut generation = config.generation(generation);
        if let (Some(bos), Some(eos)) = (text.id("<s>"), text.id("</s>"))
            && let Some(given) = generation.other_ids(bos, eos)
        {
            if options.token_ids == TokenIds::Tokenizer {
                generation.take_ids(bos, eos);
            } else {
                remarks.push(format!(
                    "{given} are given for answers, where the tokenizer has <s> as {bos} and </s> \
                     as {eos}; token-ids tokenizer takes these"
                ));
            }
        }
        if let Some(problem) = generation.problem(rows) {
            let problem =
                format!("of the settings for generation, here or in {GENERATION}, {problem}");
            return Err(inconsistent(checkpoint, CONFIG, problem).into());
        }
        let name = named(checkpoint, adapter);
        let questions = Cache::new(QUESTIONS);
        let is_embedded = matches!(checkpoint, Checkpoint::Embedded);
        Ok(Self {
            name,
            is_embedded,
            remarks,
            model,
            text: Arc::new(text),
            preprocessor,
            generation,
            compute,
            device: found.describe(&device),
            shares_weights: false,
            threads,
            questions,
        })
    }

    /// The same model for another thread, on compute threads of its own: on a processor both share
    /// the weights.
    ///
    /// # Errors
    ///
    /// [`Error::Threads`].
    pub fn another(&self, options: &LoadOptions) -> Result<Self, Error> {
        Ok(Self {
            name: self.name.clone(),
            is_embedded: self.is_embedded,
            remarks: Vec::new(),
            model: Arc::clone(&self.model),
            text: Arc::clone(&self.text),
            preprocessor: self.preprocessor.clone(),
            generation: self.generation.clone(),
            compute: self.compute,
            device: self.device.clone(),
            shares_weights: true,
            threads: options.thread_pool()?,
            questions: Cache::new(QUESTIONS),
        })
    }

    /// The name of a model before it is loaded: as [`Self::name`] tells it afterwards. Without a
    /// directory, that of the embedded one.
    pub fn name_of(directory: Option<&Path>, adapter: Option<&Path>) -> String {
        named(directory.map_or(Checkpoint::Embedded, Checkpoint::Directory), adapter)
    }
}

/// The name of a checkpoint with an adapter.
fn named(checkpoint: Checkpoint<'_>, adapter: Option<&Path>) -> String {
    let adapter = adapter.map(|adapter| format!("+{}", Checkpoint::Directory(adapter).name()));
    checkpoint.name() + &adapter.unwrap_or_default()
}
