//! What a caller may choose: how a checkpoint is loaded, a picture read, an answer generated.

use std::{ops::Range, path::PathBuf, str::FromStr, thread};

use candle_core::DType;
use rustix::thread::CpuSet;

use crate::{
    Coordinates, Error, child,
    generate::Sampling,
    image::{DecodeLimits, Orientation},
    kernels::{self, Cpu},
    model::{self, Compute, Int8, LoadError},
    prompt::Prompts,
};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A CUDA device by its ordinal; needs the `cuda` feature.
    Cuda(usize),
    /// The first CUDA device, or where there is none the processor.
    Auto,
}

impl Device {
    /// Opens it.
    pub(super) fn open(self) -> Result<candle_core::Device, LoadError> {
        match self.settled().0 {
            Self::Cuda(n) => match model::open(n) {
                Ok(device) => Ok(device),
                Err(_) if !cfg!(feature = "cuda") => Err(LoadError::NotForCuda),
                Err(problem) => Err(LoadError::NoDevice(n, problem)),
            },
            Self::Cpu | Self::Auto => Ok(candle_core::Device::Cpu),
        }
    }

    /// What it is where `Auto` has been decided; and if that took the processor, why.
    pub fn settled(self) -> (Self, Option<String>) {
        if self != Self::Auto {
            return (self, None);
        }
        match Self::Cuda(0).open() {
            Ok(_) => (Self::Cuda(0), None),
            Err(problem) => (Self::Cpu, Some(problem.to_string())),
        }
    }
}

impl Device {
    /// What it is, once it is open.
    pub(super) fn describe(self, device: &candle_core::Device) -> String {
        match self {
            Self::Cuda(n) => format!("cuda:{n}{}", model::describe(device)),
            Self::Cpu | Self::Auto => "cpu".to_owned(),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    /// `cpu`, `cuda`, `cuda:N` or `auto`.
    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            "auto" => return Ok(Self::Auto),
            _ => {}
        }
        let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        ordinal.map(Self::Cuda).ok_or_else(|| format!("{name} is not cpu, cuda, cuda:N or auto"))
    }
}

/// In what numbers the model computes on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// float32 throughout: the reference's answers.
    #[default]
    F32,
    /// Matrix products of bfloat16, summed in float32; needs AVX512-BF16.
    Bf16,
    /// Matrix products of int16, each row of weights and of inputs in units of its own; about ten
    /// times nearer to float32 than bfloat16. Needs AVX2; VNNI is faster, AMX gives its bits.
    Int16,
    /// The same with products of int8 where the checkpoint's plan has them ([`LoadOptions::int8`]).
    Int8,
    /// The fastest that the processor has and that agrees with float32 (docs/SPEED.md).
    Auto,
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "int16" => Ok(Self::Int16),
            "int8" => Ok(Self::Int8),
            "auto" => Ok(Self::Auto),
            _ => Err(Error::UnknownPrecision(name.to_owned())),
        }
    }
}

/// Which code computes on the CPU.
#[derive(Debug, Clone, Copy, Default)]
pub enum Kernels {
    /// This project's, on the best instruction set of the processor.
    #[default]
    Best,
    /// This project's, on a given instruction set.
    On(Cpu),
    /// candle's operations: slow, and what the others are held against.
    Candle,
    /// Those for CUDA devices, emulated; for tests.
    Emulated,
}

/// Which tokens begin and end answers, where a checkpoint's files contradict each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenIds {
    /// As `config.json` or `generation_config.json` has them: the reference's answers.
    #[default]
    Checkpoint,
    /// `<s>` and `</s>` of the tokenizer.
    Tokenizer,
}

impl FromStr for TokenIds {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "checkpoint" => Ok(Self::Checkpoint),
            "tokenizer" => Ok(Self::Tokenizer),
            _ => Err(Error::UnknownTokenIds(name.to_owned())),
        }
    }
}

/// How a checkpoint is loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: Device,
    /// In what numbers it computes.
    pub precision: Precision,
    /// Which code computes on the CPU.
    pub kernels: Kernels,
    /// Compute threads; 0 takes as many as the machine has cores.
    pub threads: usize,
    /// Niceness of the compute threads, 0 to 19.
    pub nice: i32,
    /// The CPUs that the compute threads are pinned to, one each, in turns; none leaves them free.
    pub cpus: Vec<usize>,
    /// Whether packed weights are kept in a file: the next start maps them, and all processes of
    /// the host share their pages.
    pub keep_packed: bool,
    /// The directory of that file; by default the checkpoint's own.
    pub packed_directory: Option<PathBuf>,
    /// Directory of a PEFT adapter that is merged into the weights.
    pub adapter: Option<PathBuf>,
    /// Directory whose tokenizer is taken instead of the checkpoint's.
    pub tokenizer: Option<PathBuf>,
    /// Which tokens begin and end answers.
    pub token_ids: TokenIds,
    /// Which matrices are int8, in that precision.
    pub int8: Int8,
}

/// One of `parts` equal parts of `all`.
fn range(all: usize, part: usize, parts: usize) -> Range<usize> {
    all * part / parts..all * (part + 1) / parts
}

/// How a picture and a prompt are read.
#[derive(Debug, Clone, Default)]
pub struct PrepareOptions {
    /// Which prompts are taken.
    pub prompts: Prompts,
    /// What the decoder may use.
    pub limits: DecodeLimits,
    /// Whether the EXIF orientation is applied.
    pub orientation: Orientation,
}

/// Whether compute threads can be pinned to a CPU.
pub fn has_cpu(cpu: usize) -> bool {
    // Asked of a child, since the answer is given by doing it.
    cpu < CpuSet::MAX_CPU && child::succeeds(&mut || pin_to(cpu).is_ok())
}

/// Pins the calling thread.
fn pin_to(cpu: usize) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
}

/// How an answer is generated; `None` takes the checkpoint's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerateOptions {
    /// Beams; 1 is greedy search.
    pub beams: Option<usize>,
    /// Most tokens of an answer (default 1024, or what the model has positions for).
    pub max_new_tokens: Option<usize>,
    /// No n-gram of this length may occur twice; 0 switches the rule off.
    pub no_repeat_ngram: Option<usize>,
    /// Exponent of the length by which a hypothesis' log-probability is divided.
    pub length_penalty: Option<f32>,
    /// How many of the best beams' texts are told beside the answer, which is the best of them.
    pub n_best: Option<usize>,
    /// How tokens are drawn, instead of a search; then there are no beams.
    pub sampling: Option<Sampling>,
    /// How coordinates are written.
    pub coordinates: Coordinates,
}

impl LoadOptions {
    /// The same for one of `parts` engines that share the compute threads and their CPUs equally;
    /// each has at least one.
    #[must_use]
    pub fn share(&self, part: usize, parts: usize) -> Self {
        let threads = match self.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let cpus = match self.cpus.get(range(self.cpus.len(), part, parts)) {
            Some([]) | None => self.cpus.iter().cycle().skip(part).take(1).copied().collect(),
            Some(cpus) => cpus.to_vec(),
        };
        let threads = range(threads, part, parts).len().max(1);
        Self { threads, cpus, ..self.clone() }
    }

    /// What a model on a device is to compute with.
    pub(super) fn compute(&self, device: Device) -> Result<Compute, Error> {
        let cpu = match (device, self.kernels) {
            (_, Kernels::Candle) => return Ok(Compute::Reference),
            (Device::Cuda(_), _) | (_, Kernels::Emulated) => {
                return match self.precision {
                    Precision::F32 => Ok(Compute::Device(DType::F32)),
                    Precision::Bf16 | Precision::Auto => Ok(Compute::Device(DType::BF16)),
                    Precision::Int16 => Err(Error::NoPrecision("int16", "a processor")),
                    Precision::Int8 => Err(Error::NoPrecision("int8", "a processor")),
                };
            }
            (_, Kernels::Best) => Cpu::detect(),
            (_, Kernels::On(cpu)) => cpu,
        };
        let precision = match self.precision {
            Precision::Bf16 if cpu.has_bf16() => kernels::Precision::Bf16,
            Precision::Int16 | Precision::Auto if cpu.has_int16() => kernels::Precision::Int16,
            Precision::Int8 if cpu.has_int8() => kernels::Precision::Int8,
            Precision::F32 | Precision::Auto => kernels::Precision::F32,
            Precision::Bf16 => return Err(Error::NoPrecision("bf16", "AVX512-BF16")),
            Precision::Int16 => return Err(Error::NoPrecision("int16", "AVX2")),
            Precision::Int8 => return Err(Error::NoPrecision("int8", "AVX2")),
        };
        let uses_tiles = matches!(precision, kernels::Precision::Int16 | kernels::Precision::Int8);
        Ok(Compute::Kernels(if uses_tiles { cpu } else { cpu.without_tiles() }, precision))
    }

    /// The threads that it computes on.
    pub(super) fn thread_pool(&self) -> Result<rayon::ThreadPool, Error> {
        // Best effort: without the permission the threads just run at normal priority, and on any
        // CPU. Who lacks it may be ended for the attempt, hence the child.
        let be_nice = |nice| rustix::process::setpriority_process(None, nice).is_ok();
        let nice = Some(self.nice).filter(|nice| child::succeeds(&mut || be_nice(*nice)));
        let cpus: Vec<usize> = self.cpus.iter().copied().filter(|cpu| has_cpu(*cpu)).collect();
        let started = move |i: usize| {
            nice.map(be_nice);
            if let Some(cpu) = cpus.get(i % cpus.len().max(1)) {
                let _ = pin_to(*cpu);
            }
        };
        Ok(rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .thread_name(|i| format!("florence-{i}"))
            .start_handler(started)
            .build()?)
    }
}
