//! The network: DaViT, projector and BART, on candle tensors, written once over a backend.
//!
//! - `backend`: the seam; `cpu`, `device` and `reference` are behind it
//! - `launch`: how `device` runs CUDA kernels; `gpu`: which devices there are, how one is opened
//! - `davit`, `projector`, `bart`: which parts there are, and in which order they work
//! - `logits`: what a decoder step says of the next tokens
//! - `network`: all of it over one backend, and how the engine sees it whatever the backend is
//! - `checkpoint`, `weights`, `names`, `scope`, `packed`, `config`: where weights come from
//! - `adapter`, `lora`: what a PEFT adapter makes of them
//! - `plan`: which matrices are int8
//! - `merge`: both as a checkpoint
//!
//! Letters of shapes: `B` batch, `C` channels, `H, W` grid, `N` visual tokens (576 at 768 px),
//! `S` source length, `T` target length, `D` d_model, `A` heads, `K` head size, `V` vocabulary.
//! Names are those of the reference, `transformers/models/florence2/modeling_florence2.py`.

mod adapter;
mod backend;
mod bart;
mod checkpoint;
mod config;
mod cpu;
mod davit;
mod device;
mod error;
mod gpu;
mod launch;
mod logits;
mod lora;
mod merge;
mod names;
mod network;
mod packed;
mod plan;
mod projector;
mod reference;
mod scope;
mod stand_in;
mod weights;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};

pub use checkpoint::Shape;
pub(crate) use checkpoint::{Checkpoint, embedded};
use config::Config;
pub(crate) use config::{ConfigFile, GenerationFields};
pub use config::{GenerationDefaults, MAX_BEAMS};
pub use error::LoadError;
pub use gpu::devices as cuda_devices;
pub(crate) use gpu::{describe, open};
pub use logits::Logits;
pub(crate) use logits::Row;
pub use merge::merge;
pub(crate) use network::{Decoding, JobId, Look, Rows};
pub use plan::{Int8, Plan, PlanFormat, PlanPlace, Trial};
pub use stand_in::StandIn;
pub use weights::WeightBytes;

use crate::{
    image::PixelValues,
    kernels::{Cpu, Precision, log_sum_exp},
};
use backend::Backend;
use cpu::OnCpu;
use device::OnDevice;
use network::{Net, Network};
use reference::Reference;
use weights::Weights;

/// What computes the network.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Compute {
    /// This project's kernels.
    Kernels(Cpu, Precision),
    /// Our CUDA kernels, with products in these numbers.
    Device(DType),
    /// candle's operations.
    Reference,
}

impl Compute {
    /// Runs work of the network: in the compute threads, or for a device in the calling thread, so
    /// that one thread drives it.
    pub(crate) fn here<T: Send>(
        self,
        threads: &rayon::ThreadPool,
        f: impl FnOnce() -> T + Send,
    ) -> T {
        match self {
            Self::Device(_) => f(),
            Self::Kernels(..) | Self::Reference => threads.install(f),
        }
    }
}

/// Florence-2's weights; immutable, shared by all requests.
pub struct Model {
    network: Box<dyn Network>,
    /// Number of ids that the language model knows.
    vocabulary: usize,
    /// Visual tokens of a picture, the pooled one included.
    visual_length: usize,
    device: Device,
    packing: Packing,
    bytes: WeightBytes,
    told: Vec<&'static str>,
    plan: Option<PlanPlace>,
}

/// What a model is loaded for.
pub(crate) struct Target<'a> {
    pub(crate) device: &'a Device,
    pub(crate) compute: Compute,
    /// Whether packed matrices are kept in a file.
    pub(crate) keep_packed: bool,
    /// Where, if not beside the checkpoint's files.
    pub(crate) packed_directory: Option<&'a Path>,
    /// The directory of an adapter to merge in.
    pub(crate) adapter: Option<&'a Path>,
    /// Which matrices are int8, in that precision.
    pub(crate) int8: &'a Int8,
}

/// Where a model's packed matrices are.
#[derive(Debug)]
pub enum Packing {
    /// In this process's own memory.
    InMemory,
    /// In a file, which all processes of the checkpoint share.
    Mapped,
    /// In memory: the file could not be made.
    Failed(std::io::Error),
}

impl Model {
    /// Loads a checkpoint whose pictures have `side` pixels.
    pub(crate) fn load(
        checkpoint: Checkpoint<'_>,
        config: &ConfigFile,
        side: usize,
        target: &Target<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let mut weights = Weights::open(checkpoint, target.device)?;
        target.adapter.map_or(Ok(()), |adapter| weights.adapt(adapter))?;
        let (config, told) = config.complete(|name| weights.shape(name).map(<[usize]>::to_vec));
        if let Some(problem) = config.problem() {
            return Err(LoadError::Config { path: checkpoint.path("config.json"), problem });
        }
        let mut loading = Loading { weights, config: &config, told, side, device: target.device };
        match (target.compute, checkpoint) {
            (Compute::Reference, _) => loading.load(&Reference),
            (Compute::Device(kind), _) => {
                let device = OnDevice::new(target.device, kind).map_err(LoadError::Device)?;
                loading.load(&device)
            }
            (Compute::Kernels(cpu, precision), _) => {
                let (directory, to) = (checkpoint.directory(), target.packed_directory);
                let plan = match precision {
                    Precision::Int8 => loading.weights.plan(directory, to, target.int8)?,
                    _ => None,
                };
                let problem = directory.filter(|_| target.keep_packed).and_then(|directory| {
                    loading.weights.keep_packed(directory, to, precision).err()
                });
                let mut model = loading.load(&OnCpu(cpu, precision))?;
                if let Some(problem) = problem {
                    model.packing = Packing::Failed(problem);
                }
                model.plan = plan;
                Ok(model)
            }
        }
    }

    /// Where a plan of this model's products in int8 is looked for, if it was.
    pub fn plan_place(&self) -> Option<&PlanPlace> {
        self.plan.as_ref()
    }

    /// What the packed matrices and the table of tokens take; the rest is small.
    pub fn weight_bytes(&self) -> WeightBytes {
        self.bytes
    }

    /// Where the packed matrices are.
    pub fn packing(&self) -> &Packing {
        &self.packing
    }

    /// The fields that `config.json` lacks, which the tensors told.
    pub(crate) fn told(&self) -> &[&'static str] {
        &self.told
    }

    /// Number of ids that the language model knows.
    pub(crate) fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    pub(crate) fn visual_length(&self) -> usize {
        self.visual_length
    }

    /// Bytes of the keys and values of so many tokens.
    pub(crate) fn kept_bytes(&self, tokens: usize) -> usize {
        self.network.kept_bytes(tokens)
    }

    /// Longest sequence of visual tokens and prompt.
    pub(crate) fn source_limit(&self) -> usize {
        self.network.source_limit()
    }

    /// Most tokens that can be generated.
    pub(crate) fn target_limit(&self) -> usize {
        self.network.target_limit()
    }

    /// Pictures that are best encoded together.
    pub(crate) fn pictures_at_once(&self) -> usize {
        self.network.pictures_at_once()
    }

    /// Whether the device still works.
    pub(crate) fn check(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// Where its tensors are.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Visual tokens of pictures, `[B, 1 + N, D]`; `seen` is shown the input and every stage.
    pub fn visual_tokens(
        &self,
        pictures: &[&PixelValues],
        mut seen: impl FnMut(&Tensor),
    ) -> Result<Tensor> {
        let pixels = pictures.iter().map(|PixelValues { side, data }| {
            Tensor::from_slice(data.as_slice(), (3, *side, *side), &self.device)
        });
        let pixels = Tensor::stack(&pixels.collect::<Result<Vec<_>>>()?, 0)?;
        self.network.visual_tokens(&pixels, &mut seen)
    }

    /// Visual tokens and prompt through the encoder: `[1, 1 + N + T, D]`.
    pub fn encode(&self, visual: &Tensor, prompt: &[u32]) -> Result<Tensor> {
        self.network.encode(&[(&visual.squeeze(0)?, prompt)])?.unsqueeze(0)
    }

    /// A decoder without jobs.
    pub(crate) fn decoding(&self) -> Box<dyn Decoding + '_> {
        self.network.decoding()
    }

    /// The logits after a given start of an answer, `[V]`; for tests and tools.
    pub fn logits_after(&self, encoded: &Tensor, tokens: &[u32]) -> Result<Tensor> {
        let mut last = Vec::new();
        self.follow(encoded, tokens, |row| last = row.values.to_vec())?;
        Tensor::from_vec(last, self.vocabulary, &Device::Cpu)
    }

    /// The logarithms of all tokens' probabilities after each token of an answer, `[T][V]`.
    pub(crate) fn log_probabilities(
        &self,
        encoded: &Tensor,
        tokens: &[u32],
    ) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::with_capacity(tokens.len());
        self.follow(encoded, tokens, |row| {
            let sum = log_sum_exp(Cpu::detect(), row.values);
            all.push(row.values.iter().map(|x| x - sum).collect());
        })?;
        Ok(all)
    }

    /// Shows the logits after each token of an answer.
    fn follow(
        &self,
        encoded: &Tensor,
        tokens: &[u32],
        mut seen: impl FnMut(Row<'_>),
    ) -> Result<()> {
        let encoded = encoded.squeeze(0)?;
        let mut decoding = self.decoding();
        let job = decoding.add(&encoded, &[encoded.dim(0)?])?[0];
        for token in tokens {
            let rows = Rows { job, tokens: vec![*token] };
            let mut look = |all: Logits<'_>| all.each().for_each(&mut seen);
            decoding.step(&[rows], Some(Look { highest: self.vocabulary, at: &mut look }))?;
        }
        Ok(())
    }
}

impl Drop for Model {
    /// Whoever drops a model last may be any thread.
    fn drop(&mut self) {
        gpu::bind(&self.device);
    }
}

/// A tensor that any thread may drop.
#[derive(Debug, Clone)]
pub(crate) struct Kept(Tensor);

impl Kept {
    pub(crate) fn new(tensor: Tensor) -> Self {
        Self(tensor)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.elem_count() * self.0.dtype().size_in_bytes()
    }

    /// The tensor where a model has its own.
    pub(crate) fn on(&self, model: &Model) -> Result<Tensor> {
        self.0.to_device(model.device())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        gpu::bind(self.0.device());
    }
}

/// A checkpoint that is being loaded.
struct Loading<'a> {
    weights: Weights,
    config: &'a Config,
    told: Vec<&'static str>,
    side: usize,
    device: &'a Device,
}

impl Loading<'_> {
    fn load<B: Backend>(&mut self, backend: &B) -> std::result::Result<Model, LoadError> {
        let mut model = self.build(backend.clone())?;
        let problem = match self.weights.finish_packed() {
            // All of it is one map from now on, whose checksums are right.
            Ok(true) => {
                drop(model);
                model = self.build(backend.clone())?;
                None
            }
            Ok(false) => None,
            Err(error) => Some(error),
        };
        model.packing = match problem {
            Some(problem) => Packing::Failed(problem),
            None if self.weights.has_packed() => Packing::Mapped,
            None => Packing::InMemory,
        };
        Ok(model)
    }

    fn build<B: Backend>(&self, backend: B) -> std::result::Result<Model, LoadError> {
        let grid = last_grid(self.config, self.side);
        let network = Net::load(backend, &self.weights, self.config, grid)?;
        let bytes = self.weights.take_bytes();
        let of = |table: &Tensor| table.elem_count() * table.dtype().size_in_bytes();
        let table: usize = network.tables().map(of).sum();
        Ok(Model {
            vocabulary: network.vocabulary(),
            visual_length: 1 + grid * grid,
            device: self.device.clone(),
            packing: Packing::InMemory,
            bytes: WeightBytes { owned: bytes.owned + table as u64, ..bytes },
            told: self.told.clone(),
            plan: None,
            network: Box::new(network),
        })
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
