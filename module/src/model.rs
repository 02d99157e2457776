//! The model, as far as it is loaded, and the memory that pictures for it are decoded in.

use std::sync::{Arc, LazyLock};

use florence_engine::{Budget, Florence, serve::Caches};
use parking_lot::RwLock;

use crate::settings;

/// A loaded model, and what was asked of it lately.
pub(crate) struct Loaded {
    pub(crate) florence: Florence,
    pub(crate) caches: Caches,
}

#[derive(Clone)]
pub(crate) enum Model {
    Loading,
    Ready(Arc<Loaded>),
    Failed(String),
}

static MODEL: RwLock<Model> = RwLock::new(Model::Loading);

/// How far loading has come.
pub(crate) fn model() -> Model {
    MODEL.read().clone()
}

/// The model, if it is loaded.
pub(crate) fn loaded() -> Option<Arc<Loaded>> {
    match &*MODEL.read() {
        Model::Ready(loaded) => Some(Arc::clone(loaded)),
        Model::Loading | Model::Failed(_) => None,
    }
}

/// The budget of all who decode pictures, as large as it is set just now.
pub(crate) fn work() -> &'static Budget {
    static WORK: LazyLock<Budget> = LazyLock::new(|| Budget::new(settings::WORK_BYTES.get()));
    if WORK.limit() != settings::WORK_BYTES.get() {
        WORK.set(settings::WORK_BYTES.get());
    }
    &WORK
}

/// What users of the model have to know.
pub(crate) fn note(florence: &Florence) -> Option<String> {
    let note = florence.note()?;
    Some(format!("{note} --to DIRECTORY, then florence.model DIRECTORY"))
}

pub(crate) fn set(model: Model) {
    *MODEL.write() = model;
}
