//! The options that say how the model is asked.

use anyhow::ensure;
use florence_engine::{
    Coordinates, Decimals, GenerateOptions, PrepareOptions, image::Orientation, model::MAX_BEAMS,
    prompt::Prompts,
};

use crate::limits::within;

#[derive(clap::Args)]
pub(crate) struct AskArgs {
    /// Take the fifteen tasks only, or give the model any other text as it is
    #[arg(long, value_name = "tasks|any", default_value = "tasks")]
    pub(crate) prompts: Prompts,
    /// Beams; 1 is greedy search (default: the checkpoint's)
    #[arg(long, value_parser = within::<usize>(1..=MAX_BEAMS))]
    pub(crate) beams: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 1024, value_parser = within::<usize>(1..=4096))]
    pub(crate) max_new_tokens: usize,
    /// No n-gram of this length may occur twice; 0 for no such rule (default: the checkpoint's)
    #[arg(long, value_parser = within::<usize>(0..=4096))]
    pub(crate) no_repeat_ngram: Option<usize>,
    /// Exponent of the length that log-probabilities are divided by (default: the checkpoint's)
    #[arg(long, allow_negative_numbers = true, value_parser = within::<f32>(-10.0..=10.0))]
    pub(crate) length_penalty: Option<f32>,
    /// Coordinates as floats, or truncated as newer transformers give them
    #[arg(long, value_name = "float|int", default_value = "float")]
    pub(crate) coordinates: Coordinates,
    /// Digits after the point of coordinates, 0 to 9; all of them, as the reference has it
    #[arg(long, value_name = "all|N", default_value = "all")]
    pub(crate) decimals: Decimals,
    /// Turn pictures as their EXIF tag says
    #[arg(long)]
    pub(crate) exif: bool,
}

impl AskArgs {
    /// Refuses what would have no effect.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let has_effect = self.beams != Some(1) || self.length_penalty.is_none();
        ensure!(has_effect, "--length-penalty is for several beams, and --beams 1 is none");
        Ok(())
    }

    pub(crate) fn prepare(&self) -> PrepareOptions {
        PrepareOptions {
            prompts: self.prompts,
            orientation: if self.exif { Orientation::Exif } else { Orientation::AsStored },
            ..PrepareOptions::default()
        }
    }

    pub(crate) fn generate(&self) -> GenerateOptions {
        GenerateOptions {
            beams: self.beams,
            max_new_tokens: Some(self.max_new_tokens),
            no_repeat_ngram: self.no_repeat_ngram,
            length_penalty: self.length_penalty,
            n_best: None,
            sampling: None,
            coordinates: self.coordinates,
        }
    }
}
