//! Loads the model, on the engine thread.

use std::{path::PathBuf, sync::Arc, thread, time::Instant};

use florence_engine::{Error, Florence, LoadOptions, model::Packing, serve::Caches};

use super::elapsed_ms;
use crate::{
    model::{self, Loaded, Model},
    queue::queue,
    server, settings,
};

/// The model of the settings; its failure is told to all who ask.
pub(super) fn load() -> Option<Arc<Loaded>> {
    let start = Instant::now();
    let options = options();
    let problem = match server::catch(|| "loading the model".to_owned(), || from_settings(&options))
    {
        Some(Ok(florence)) => return Some(ready(florence, &options, start)),
        Some(Err(error)) => error.to_string(),
        None => "loading it failed with an internal error".to_owned(),
    };
    server::warn(&format!("cannot load the model: {problem}"));
    model::set(Model::Failed(problem));
    None
}

fn options() -> LoadOptions {
    let threads = match settings::THREADS.size() {
        // Redis keeps a core to itself.
        0 => thread::available_parallelism().map_or(1, |n| (n.get() - 1).max(1)),
        threads => threads,
    };
    LoadOptions {
        threads,
        nice: i32::try_from(settings::NICE.get()).unwrap_or_default(),
        cpus: settings::CPUS.get().0.clone(),
        precision: *settings::PRECISION.get(),
        keep_packed: settings::KEEP_PACKED.get(),
        packed_directory: directory(&settings::PACKED_DIRECTORY.get()),
        adapter: directory(&settings::ADAPTER.get()),
        tokenizer: directory(&settings::TOKENIZER.get()),
        token_ids: *settings::TOKEN_IDS.get(),
        ..LoadOptions::default()
    }
}

/// A directory, if the setting names one.
fn directory(setting: &str) -> Option<PathBuf> {
    (!setting.is_empty()).then(|| PathBuf::from(setting))
}

fn from_settings(options: &LoadOptions) -> Result<Florence, Error> {
    match directory(&settings::MODEL.get()) {
        None => Florence::embedded(options),
        Some(directory) => Florence::load(&directory, options),
    }
}

fn ready(florence: Florence, options: &LoadOptions, start: Instant) -> Arc<Loaded> {
    if let Packing::Failed(problem) = florence.model().packing() {
        server::warn(&format!(
            "packed weights stay in this process's memory: {problem}; florence.packed-directory \
             names a directory where they can be kept"
        ));
    }
    server::tell(&format!(
        "model {} ({}) ready after {} ms, {} threads",
        florence.name(),
        florence.arithmetic(),
        elapsed_ms(start),
        options.threads,
    ));
    for remark in florence.remarks() {
        server::warn(&format!("model {}: {remark}", florence.name()));
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
    let (answers, pictures) =
        (settings::RESULT_CACHE_BYTES.get(), settings::FEATURE_CACHE_BYTES.get());
    let loaded = Arc::new(Loaded { florence, caches: Caches::new(answers, pictures) });
    model::set(Model::Ready(Arc::clone(&loaded)));
    queue().wake();
    loaded
}
