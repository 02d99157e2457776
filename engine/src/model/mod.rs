//! The network: DaViT, projector and BART, on candle tensors, one definition for CPU and CUDA.
//!
//! Letters of shapes: `B` batch, `C` channels, `H, W` grid, `N` visual tokens (576 at 768 px),
//! `S` source length, `T` target length, `D` d_model, `A` heads, `K` head size, `V` vocabulary.
//! Names are those of the reference, `transformers/models/florence2/modeling_florence2.py`.

mod bart;
mod checkpoint;
mod compute;
mod config;
mod davit;
mod error;
mod layers;
mod names;
mod packed;
mod projector;
mod scope;
mod stand_in;
mod weights;

use candle_core::{Device, Result, Tensor};

pub(crate) use bart::{CrossCache, SelfCache, StepRows};
pub use checkpoint::Shape;
pub(crate) use checkpoint::{Checkpoint, embedded};
pub(crate) use compute::Compute;
pub(crate) use config::GenerationFields;
pub use config::{Config, GenerationDefaults};
pub use error::LoadError;

use crate::image::PixelValues;
use bart::{Decoder, Encoder, embed};
use davit::DaVit;
use layers::Linear;
use projector::Projector;
use scope::{Scope, Source};
pub use stand_in::StandIn;
pub use weights::WeightBytes;
use weights::Weights;

/// Florence-2's weights; immutable, shared by all requests.
pub struct Model {
    vision: DaVit,
    projector: Projector,
    /// Token embeddings, `[V, D]`, in the numbers of the file.
    shared: Tensor,
    encoder: Encoder,
    decoder: Decoder,
    lm_head: Linear,
    /// Visual tokens of a picture, the pooled one included.
    visual_length: usize,
    device: Device,
    packing: Packing,
    bytes: WeightBytes,
}

/// What a model is loaded for.
pub(crate) struct Target<'a> {
    pub(crate) device: &'a Device,
    pub(crate) compute: Compute,
    /// Whether packed matrices are kept beside the checkpoint's files.
    pub(crate) keep_packed: bool,
}

/// Where a model's packed matrices are.
#[derive(Debug)]
pub enum Packing {
    /// In this process's own memory.
    InMemory,
    /// In a file beside the checkpoint, which all its processes share.
    Mapped,
    /// In memory: the file could not be made.
    Failed(std::io::Error),
}

impl Model {
    /// Loads a checkpoint whose pictures have `side` pixels.
    pub(crate) fn load(
        checkpoint: Checkpoint<'_>,
        config: &Config,
        side: usize,
        target: &Target<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let mut weights = Weights::open(checkpoint, target.device, target.compute)?;
        let mut problem = None;
        if let Checkpoint::Directory(directory) = checkpoint
            && target.keep_packed
        {
            problem = weights.keep_packed(directory).err();
        }
        let mut model = Self::build(&weights, config, side)?;
        model.bytes = weights.take_bytes();
        match weights.finish_packed() {
            // What was packed in memory makes room for what all processes share.
            Ok(true) => {
                model = Self::build(&weights, config, side)?;
                model.bytes = weights.take_bytes();
            }
            Ok(false) => {}
            Err(error) => problem = Some(error),
        }
        model.packing = match problem {
            Some(problem) => Packing::Failed(problem),
            None if weights.has_packed() => Packing::Mapped,
            None => Packing::InMemory,
        };
        Ok(model)
    }

    fn build(
        weights: &Weights,
        config: &Config,
        side: usize,
    ) -> std::result::Result<Self, LoadError> {
        let (vision, text) = (&config.vision, &config.text);
        let d = text.d_model;
        // Exports differ in which of the three tied tables survives.
        let tables = ["text.shared", "text.encoder.embed_tokens", "text.decoder.embed_tokens"];
        let shape = |scope: &str| weights.shape(&format!("{scope}.weight"));
        let table = tables.into_iter().find(|table| shape(table).is_some()).unwrap_or(tables[0]);
        let vocabulary = shape(table).map_or(0, |shape| shape[0]);
        let shared = weights.get_stored(&format!("{table}.weight"), &[vocabulary, d])?;
        // A fine-tuned checkpoint may carry a head of its own: then that one counts.
        let head = if shape("lm_head").is_some() { "lm_head" } else { table };
        let bias = match weights.shape("final_logits_bias") {
            Some(_) => Some(weights.get("final_logits_bias", &[1, vocabulary])?),
            None => None,
        };
        let bias = bias.map(|bias| bias.squeeze(0)).transpose().map_err(LoadError::Device)?;
        let head_shape = [vocabulary, d];
        let head_weight = Source::plain("weight", &head_shape);
        let channels = vision.dim_embed.last().copied().unwrap_or_default();
        let grid = last_grid(config, side);
        Ok(Self {
            vision: DaVit::load(&Scope::new(weights, "vision_tower"), vision)?,
            projector: Projector::load(&Scope::new(weights, "projector"), channels, d, grid)?,
            device: shared.device().clone(),
            shared,
            encoder: Encoder::load(&Scope::new(weights, "text.encoder"), text)?,
            decoder: Decoder::load(&Scope::new(weights, "text.decoder"), text)?,
            lm_head: Linear::of(&Scope::new(weights, head), &head_weight, bias)?,
            visual_length: 1 + grid * grid,
            packing: Packing::InMemory,
            bytes: WeightBytes::default(),
        })
    }

    /// What the packed matrices and the table of tokens take; the rest is small.
    pub fn weight_bytes(&self) -> WeightBytes {
        let shared = self.shared.elem_count() * self.shared.dtype().size_in_bytes();
        WeightBytes { owned: self.bytes.owned + shared as u64, ..self.bytes }
    }

    /// Where the packed matrices are.
    pub fn packing(&self) -> &Packing {
        &self.packing
    }

    /// Number of ids that the language model knows.
    pub(crate) fn vocabulary(&self) -> usize {
        self.shared.dims()[0]
    }

    pub(crate) fn visual_length(&self) -> usize {
        self.visual_length
    }

    /// Longest sequence of visual tokens and prompt.
    pub(crate) fn source_limit(&self) -> usize {
        self.encoder.limit()
    }

    /// Most tokens that can be generated.
    pub(crate) fn target_limit(&self) -> usize {
        self.decoder.limit()
    }

    /// A picture's visual tokens, `[1, 1 + N, D]`; `seen` is shown the input and every stage.
    pub fn visual_tokens(
        &self,
        pixels: &PixelValues,
        mut seen: impl FnMut(&Tensor),
    ) -> Result<Tensor> {
        let (side, data) = (pixels.side, pixels.data.as_slice());
        let pixels = Tensor::from_slice(data, (1, 3, side, side), &self.device)?;
        seen(&pixels);
        self.projector.forward(&self.vision.forward(&pixels, seen)?)
    }

    /// Visual tokens and prompt through the encoder: `[1, 1 + N + T, D]`.
    pub fn encode(&self, visual: &Tensor, prompt: &[u32]) -> Result<Tensor> {
        let prompt = embed(&self.shared, prompt)?.unsqueeze(0)?;
        self.encoder.forward(&Tensor::cat(&[visual, &prompt], 1)?)
    }

    pub(crate) fn cross(&self, encoded: &Tensor) -> Result<CrossCache> {
        self.decoder.cross(encoded)
    }

    /// An empty cache for a job's rows.
    pub(crate) fn cache(&self) -> SelfCache {
        self.decoder.cache()
    }

    /// One decoder step, one token a row: `[rows, D]`, the rows of all jobs in order.
    pub(crate) fn decode_step(&self, tokens: &[u32], jobs: &mut [StepRows<'_>]) -> Result<Tensor> {
        self.decoder.step(&embed(&self.shared, tokens)?, jobs)
    }

    /// Lends the logits of hidden states, `[rows, D] -> [rows, V]`.
    pub(crate) fn logits<R>(&self, hidden: &Tensor, look: impl FnOnce(&[f32]) -> R) -> Result<R> {
        self.lm_head.forward_lent(hidden, look)
    }

    /// The logits after a given start of an answer, `[V]`; for tests and tools.
    pub fn logits_after(&self, encoded: &Tensor, tokens: &[u32]) -> Result<Tensor> {
        let (cross, mut cache) = (self.cross(encoded)?, self.cache());
        let mut hidden = None;
        for (position, token) in tokens.iter().enumerate() {
            let (cross, cache) = (&cross, &mut cache);
            let rows = StepRows { position, rows: 1, cross, cache };
            hidden = Some(self.decode_step(&[*token], &mut [rows])?);
        }
        let hidden = hidden.ok_or_else(|| candle_core::Error::Msg("no tokens given".to_owned()))?;
        self.lm_head.forward(&hidden)?.get(0)
    }
}

/// Height and width of the last stage's grid for a square picture.
fn last_grid(config: &Config, side: usize) -> usize {
    let vision = &config.vision;
    let steps = vision.patch_size.iter().zip(vision.patch_stride.iter().zip(&vision.patch_padding));
    steps.fold(side, |side, (size, (stride, padding))| {
        (side + 2 * padding).saturating_sub(*size) / stride + 1
    })
}
