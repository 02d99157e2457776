//! The model, as far as it is loaded.

use std::sync::Arc;

use florence_engine::{Florence, serve::Caches};
use parking_lot::RwLock;

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

pub(crate) fn set(model: Model) {
    *MODEL.write() = model;
}
