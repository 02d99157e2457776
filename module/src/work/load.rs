//! Loads the model, on the threads of the engines.

use std::{path::PathBuf, sync::Arc, thread, time::Instant};

use florence_engine::{Device, Error, Florence, LoadOptions, model::Packing};

use super::elapsed_ms;
use crate::{
    model::{self, Hosted, Loaded, Model, Recipe},
    queue::queue,
    server, settings,
};

/// What an engine runs on.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) engine: usize,
    options: LoadOptions,
    /// The engine whose weights it shares.
    shares: Option<usize>,
}

/// The engines of a model.
pub(super) fn plans(recipe: &Recipe) -> Vec<Plan> {
    let settle = |device: &Device| {
        let (device, problem) = device.settled();
        if let Some(problem) = problem {
            server::tell(&format!("the model runs on the CPU: {problem}"));
        }
        device
    };
    let devices: Vec<Device> = settings::DEVICE.get().0.iter().map(settle).collect();
    let threads = match settings::THREADS.size() {
        // Redis keeps a core to itself.
        0 => (cores() - 1).max(1),
        threads => threads,
    };
    let options = LoadOptions {
        threads,
        nice: i32::try_from(settings::NICE.get()).unwrap_or_default(),
        cpus: settings::CPUS.get().0.clone(),
        precision: recipe.precision,
        keep_packed: settings::KEEP_PACKED.get(),
        packed_directory: directory(&settings::PACKED_DIRECTORY.get()),
        adapter: recipe.adapter.clone(),
        ..LoadOptions::default()
    };
    let options = if recipe.is_of_settings {
        let tokenizer = directory(&settings::TOKENIZER.get());
        LoadOptions { tokenizer, token_ids: *settings::TOKEN_IDS.get(), ..options }
    } else {
        options
    };
    planned(&devices, settings::ENGINES.size(), &options)
}

/// A directory, if the setting names one.
pub(super) fn directory(setting: &str) -> Option<PathBuf> {
    (!setting.is_empty()).then(|| PathBuf::from(setting))
}

pub(super) fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// An engine for each device, and several for a processor: these share its threads, CPUs and weights.
fn planned(devices: &[Device], on_cpu: usize, options: &LoadOptions) -> Vec<Plan> {
    let count = |device: &Device| if *device == Device::Cpu { on_cpu } else { 1 };
    let all = devices.iter().flat_map(|device| std::iter::repeat_n(*device, count(device)));
    let all: Vec<Device> = all.collect();
    let parts = all.iter().filter(|device| **device == Device::Cpu).count();
    let mut first = None;
    let mut part = 0;
    let plan = |(engine, device): (usize, &Device)| {
        let mut options = LoadOptions { device: *device, ..options.clone() };
        let mut shares = None;
        if *device == Device::Cpu {
            options = options.share(part, parts);
            (shares, part) = (first, part + 1);
            first = first.or(Some(engine));
        }
        Plan { engine, options, shares }
    };
    all.iter().enumerate().map(plan).collect()
}

/// The model of an engine; its failure is told to all who ask.
pub(super) fn load(model: &Hosted, plan: &Plan) -> Option<Arc<Loaded>> {
    let start = Instant::now();
    let loading = || format!("loading model {}", model.name);
    let problem = match server::catch(loading, || read(model, plan)) {
        Some(Ok(florence)) => return Some(ready(florence, (model, plan), start)),
        Some(Err(problem)) => problem,
        None => "loading it failed with an internal error".to_owned(),
    };
    let (name, engine) = (&model.name, plan.engine);
    server::warn(&format!("engine {engine} cannot load model {name}: {problem}"));
    model.set(engine, Model::Failed(problem));
    None
}

fn read(model: &Hosted, Plan { options, shares, .. }: &Plan) -> Result<Florence, String> {
    let loaded = if let Some(engine) = shares {
        let shared = model.wait_for(*engine);
        shared
            .map_err(|_why| format!("engine {engine} could not load it"))?
            .florence
            .another(options)
    } else {
        match &model.recipe.directory {
            None => Florence::embedded(options),
            Some(directory) => Florence::load(directory, options),
        }
    };
    let loaded = loaded.and_then(|florence| {
        if model.recipe.is_tried && shares.is_none() {
            florence.try_out()?;
        }
        Ok(florence)
    });
    // What follows the first line, a backtrace perhaps, is of no use to clients.
    loaded.map_err(|problem: Error| problem.to_string().lines().take(1).collect())
}

fn ready(
    florence: Florence,
    (model, Plan { engine, options, shares }): (&Hosted, &Plan),
    start: Instant,
) -> Arc<Loaded> {
    if let Packing::Failed(problem) = florence.model().packing() {
        server::warn(&format!(
            "packed weights stay in this process's memory: {problem}; florence.packed-directory \
             names a directory where they can be kept"
        ));
    }
    server::tell(&format!(
        "engine {engine}: model {} ({}) ready on {} after {} ms, {} threads",
        model.name,
        florence.arithmetic(),
        florence.device(),
        elapsed_ms(start),
        options.threads,
    ));
    if shares.is_none() {
        for remark in florence.remarks() {
            server::warn(&format!("model {}: {remark}", model.name));
        }
        if let Some(note) = model::note(&florence) {
            server::warn(&note);
        }
        let held = florence.model().weight_bytes();
        server::tell(&format!(
            "its weights take {} MiB in memory and {} MiB in a mapped file, of which used_memory and \
             maxmemory know nothing: mem_fragmentation_ratio looks high for that reason",
            held.owned >> 20,
            held.mapped >> 20,
        ));
    }
    let loaded = Arc::new(Loaded { florence, caches: Arc::clone(model::caches()) });
    model.set(*engine, Model::Ready(Arc::clone(&loaded)));
    queue().wake();
    loaded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_of_a_processor_share_threads_cpus_and_weights() {
        let options =
            LoadOptions { threads: 7, cpus: vec![1, 2, 3, 8, 9], ..LoadOptions::default() };
        let plans = planned(&[Device::Cpu], 3, &options);
        let threads: Vec<usize> = plans.iter().map(|plan| plan.options.threads).collect();
        assert_eq!(threads, [2, 2, 3]);
        let cpus: Vec<&[usize]> = plans.iter().map(|plan| plan.options.cpus.as_slice()).collect();
        assert_eq!(cpus, [&[1][..], &[2, 3], &[8, 9]]);
        let shares: Vec<Option<usize>> = plans.iter().map(|plan| plan.shares).collect();
        assert_eq!(shares, [None, Some(0), Some(0)]);
    }

    #[test]
    fn each_gpu_has_an_engine_with_weights_of_its_own() {
        let options = LoadOptions { threads: 4, ..LoadOptions::default() };
        let plans = planned(&[Device::Cuda(0), Device::Cpu, Device::Cuda(1)], 2, &options);
        let seen: Vec<_> = plans
            .iter()
            .map(|plan| (plan.engine, plan.options.device, plan.options.threads, plan.shares))
            .collect();
        let expected = [
            (0, Device::Cuda(0), 4, None),
            (1, Device::Cpu, 2, None),
            (2, Device::Cpu, 2, Some(1)),
            (3, Device::Cuda(1), 4, None),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn where_there_are_more_engines_than_threads_or_cpus_each_has_one() {
        let options = LoadOptions { threads: 1, cpus: vec![5], ..LoadOptions::default() };
        for plan in planned(&[Device::Cpu], 3, &options) {
            assert_eq!((plan.options.threads, plan.options.cpus), (1, vec![5]));
        }
    }
}
