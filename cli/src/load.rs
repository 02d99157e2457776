//! The options that say which model is loaded, and how.

use std::{
    iter,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{bail, ensure};
use clap::ValueEnum;
use florence_engine::{
    Cpu, Device, Florence, Kernels, LoadOptions, Precision, TokenIds,
    model::{Int8, Shape},
};

use crate::limits::within;

/// The files of a model.
#[derive(clap::Args)]
pub(crate) struct FilesArgs {
    /// Checkpoint directory; without it the embedded tiny model answers
    #[arg(long)]
    model: Option<PathBuf>,
    /// Directory of a PEFT adapter that is merged into the model's weights
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Directory whose tokenizer is taken instead of the model's
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Which tokens begin and end answers: those of the model's files, or `<s>` and `</s>` of the
    /// tokenizer, where the files are wrong
    #[arg(long, value_name = "checkpoint|tokenizer", default_value = "checkpoint")]
    token_ids: TokenIds,
}

impl FilesArgs {
    /// The model, or the embedded one.
    pub(crate) fn load(&self, options: LoadOptions) -> anyhow::Result<Florence> {
        let Self { model, adapter, tokenizer, token_ids } = self;
        let (adapter, tokenizer) = (adapter.clone(), tokenizer.clone());
        let options = LoadOptions { adapter, tokenizer, token_ids: *token_ids, ..options };
        let florence = match model {
            Some(directory) => Florence::load(directory, &options)?,
            None => Florence::embedded(&options)?,
        };
        for remark in florence.remarks() {
            eprintln!("{}: {remark}", florence.name());
        }
        Ok(florence)
    }
}

#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    files: FilesArgs,
    /// Made-up weights of a published size instead, to measure speed
    #[arg(long, value_enum, conflicts_with_all = ["model", "adapter", "tokenizer"])]
    synthetic: Option<SyntheticShape>,
    /// Numbers that matrix products are computed in; auto takes int16 where the CPU has it;
    /// int8 is that with some products of int8, those of a plan (`florence tune`)
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Instruction set: scalar, avx2, avx512, amx, neon; candle for candle's own operations,
    /// emulated for the CUDA kernels, which takes long (default: the best instruction set)
    #[arg(long)]
    kernels: Option<String>,
    /// Compute threads; 0 for all cores
    #[arg(long, default_value_t = 0, value_parser = within::<usize>(0..=1024))]
    threads: usize,
    /// Keep no packed weights in a file
    #[arg(long)]
    no_packed_file: bool,
    /// Directory of that file (default: the checkpoint's own)
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "no_packed_file")]
    packed_directory: Option<PathBuf>,
    /// What it runs on: cpu, cuda, cuda:N, or auto, a GPU if there is one (built with `make cuda`)
    #[arg(long, default_value = "cpu")]
    device: Device,
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

    /// Whether nothing says which model it is or how it is loaded.
    pub(crate) fn is_as_usual(&self) -> bool {
        let Self { files, synthetic, precision, kernels, threads, .. } = self;
        let Self { no_packed_file, packed_directory, device, .. } = self;
        let FilesArgs { model, adapter, tokenizer, token_ids } = files;
        let directories = [model, adapter, tokenizer, packed_directory];
        directories.iter().all(|it| it.is_none())
            && (synthetic.is_none(), kernels.is_none(), *no_packed_file) == (true, true, false)
            && (*precision, *threads, *device) == (Precision::F32, 0, Device::Cpu)
            && *token_ids == TokenIds::default()
    }

    /// Whether it is the model of a directory.
    pub(crate) fn has_directory(&self) -> bool {
        self.files.model.is_some()
    }

    /// The same model in another precision.
    pub(crate) fn load_in(&self, precision: Precision) -> anyhow::Result<Florence> {
        self.open(LoadOptions { precision, ..self.options()? })
    }

    /// The same model in int8, with products that are chosen otherwise.
    pub(crate) fn load_int8(&self, int8: Int8) -> anyhow::Result<Florence> {
        let precision = Precision::Int8;
        self.open(LoadOptions { precision, int8, keep_packed: false, ..self.options()? })
    }

    /// The same model on another device, with its best kernels.
    pub(crate) fn load_on(&self, device: Device, precision: Precision) -> anyhow::Result<Florence> {
        let kernels = Kernels::Best;
        self.open(LoadOptions { device, precision, kernels, ..self.options()? })
    }

    /// The same model several times, each with an equal share of the compute threads. By default
    /// they have a thread each, which are busier than threads that share a product, up to four:
    /// each needs memory for its batch.
    pub(crate) fn load_several(&self, count: Option<usize>) -> anyhow::Result<Vec<Florence>> {
        const MOST: usize = 4;
        let all = match self.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let alone = if self.device == Device::Cpu { all.min(MOST) } else { 1 };
        let count = count.unwrap_or(alone);
        ensure!(count == 1 || self.device == Device::Cpu, "a GPU has one engine");
        let options = self.options()?;
        let first = self.open(options.share(0, count))?;
        let others = (1..count).map(|i| first.another(&options.share(i, count)));
        let others = others.collect::<Result<Vec<_>, _>>()?;
        Ok(iter::once(first).chain(others).collect())
    }

    /// Another checkpoint in the same way.
    pub(crate) fn load_directory(&self, directory: &Path) -> anyhow::Result<Florence> {
        Ok(Florence::load(directory, &self.options()?)?)
    }

    fn options(&self) -> anyhow::Result<LoadOptions> {
        Ok(LoadOptions {
            device: self.device,
            precision: self.precision,
            kernels: self.kernels()?,
            threads: self.threads,
            nice: 0,
            cpus: Vec::new(),
            keep_packed: !self.no_packed_file,
            packed_directory: self.packed_directory.clone(),
            ..LoadOptions::default()
        })
    }

    fn open(&self, options: LoadOptions) -> anyhow::Result<Florence> {
        let shape = match self.synthetic {
            None => return self.files.load(options),
            Some(SyntheticShape::Base) => Shape::Base,
            Some(SyntheticShape::Large) => Shape::Large,
        };
        Ok(Florence::synthetic(shape, &options)?)
    }

    fn kernels(&self) -> anyhow::Result<Kernels> {
        let name = match self.kernels.as_deref() {
            None => return Ok(Kernels::Best),
            Some("candle") => return Ok(Kernels::Candle),
            Some("emulated") => return Ok(Kernels::Emulated),
            Some(name) => name,
        };
        let Some(cpu) = Cpu::available().find(|cpu| cpu.name() == name) else {
            let names: Vec<_> = Cpu::available().map(Cpu::name).collect();
            bail!("no kernels '{name}' here; there are {}, candle and emulated", names.join(", "))
        };
        Ok(Kernels::On(cpu))
    }
}
