//! The options that say which model is loaded, and how.

use std::path::PathBuf;

use anyhow::bail;
use clap::ValueEnum;
use florence_engine::{Cpu, Device, Florence, Kernels, LoadOptions, Precision, model::Shape};

#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// Checkpoint directory; without it the embedded tiny model answers
    #[arg(long)]
    model: Option<PathBuf>,
    /// Made-up weights of a published size instead, to measure speed
    #[arg(long, value_enum, conflicts_with = "model")]
    synthetic: Option<SyntheticShape>,
    /// Numbers that matrix products are computed in; auto takes int16 where the CPU has it
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Instruction set: scalar, avx2, avx512, amx, neon, or candle for candle's own
    /// operations (default: the best one)
    #[arg(long)]
    kernels: Option<String>,
    /// Compute threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Keep no packed weights in a file
    #[arg(long)]
    no_packed_file: bool,
    /// Directory of that file (default: the checkpoint's own)
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "no_packed_file")]
    packed_directory: Option<PathBuf>,
    /// CUDA device to run on, where built with the cuda feature
    #[arg(long)]
    cuda: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum SyntheticShape {
    Base,
    Large,
}

impl ModelArgs {
    pub(crate) fn load(&self) -> anyhow::Result<Florence> {
        self.load_in(self.precision)
    }

    /// The same model in another precision.
    pub(crate) fn load_in(&self, precision: Precision) -> anyhow::Result<Florence> {
        let options = LoadOptions {
            device: self.cuda.map_or(Device::Cpu, Device::Cuda),
            precision,
            kernels: self.kernels()?,
            threads: self.threads,
            nice: 0,
            cpus: Vec::new(),
            keep_packed: !self.no_packed_file,
            packed_directory: self.packed_directory.clone(),
        };
        Ok(match (&self.model, self.synthetic) {
            (Some(directory), _) => Florence::load(directory, &options)?,
            (None, Some(SyntheticShape::Base)) => Florence::synthetic(Shape::Base, &options)?,
            (None, Some(SyntheticShape::Large)) => Florence::synthetic(Shape::Large, &options)?,
            (None, None) => Florence::embedded(&options)?,
        })
    }

    fn kernels(&self) -> anyhow::Result<Kernels> {
        let name = match self.kernels.as_deref() {
            None => return Ok(Kernels::Best),
            Some("candle") => return Ok(Kernels::Candle),
            Some(name) => name,
        };
        let Some(cpu) = Cpu::available().find(|cpu| cpu.name() == name) else {
            let names: Vec<_> = Cpu::available().map(Cpu::name).collect();
            bail!("no kernels '{name}' here; there are {} and candle", names.join(", "))
        };
        Ok(Kernels::On(cpu))
    }
}
