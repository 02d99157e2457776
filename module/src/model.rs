//! The model, as far as each engine has loaded it, and the memory that pictures for it are decoded in.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicUsize, Ordering},
};

use florence_engine::{Budget, Florence, serve::Caches};
use parking_lot::{Condvar, Mutex};

use crate::{figures::Counter, settings};

/// A loaded model, and what was asked lately, of it or of another engine's.
pub(crate) struct Loaded {
    pub(crate) florence: Florence,
    pub(crate) caches: Arc<Caches>,
}

#[derive(Clone)]
pub(crate) enum Model {
    Loading,
    Ready(Arc<Loaded>),
    Failed(String),
}

/// What an engine has done.
#[derive(Default)]
pub(crate) struct Work {
    pub(crate) answers: Counter,
    pub(crate) steps: Counter,
    pub(crate) busy_us: Counter,
}

/// One of the threads that answer.
#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) model: Model,
    pub(crate) work: Arc<Work>,
}

impl Engine {
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.model, Model::Ready(_))
    }
}

static ENGINES: Mutex<Vec<Engine>> = Mutex::new(Vec::new());
/// Told when an engine has loaded its model, or cannot.
static CHANGED: Condvar = Condvar::new();

/// So many engines begin to load the model.
pub(crate) fn begin(count: usize) {
    let new = || Engine { model: Model::Loading, work: Arc::default() };
    ENGINES.lock().resize_with(count, new);
}

/// All engines; none before it is known what there is to run on.
pub(crate) fn engines() -> Vec<Engine> {
    ENGINES.lock().clone()
}

/// How far loading has come: one engine that is ready is enough.
pub(crate) fn model() -> Model {
    if let Some(loaded) = loaded() {
        return Model::Ready(loaded);
    }
    let engines = ENGINES.lock();
    let failed = engines.iter().map(|engine| match &engine.model {
        Model::Failed(problem) => Some(problem),
        Model::Loading | Model::Ready(_) => None,
    });
    match failed.collect::<Option<Vec<_>>>().as_deref() {
        Some([problem, ..]) => Model::Failed((*problem).clone()),
        _ => Model::Loading,
    }
}

/// The model, if it is loaded; the engines that have it take turns.
pub(crate) fn loaded() -> Option<Arc<Loaded>> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let engines = ENGINES.lock();
    let first = TURN.fetch_add(1, Ordering::Relaxed) % engines.len().max(1);
    let (before, after) = engines.split_at(first);
    after.iter().chain(before).find_map(|engine| ready(&engine.model))
}

/// An engine's model, if it is loaded.
pub(crate) fn of(engine: usize) -> Option<Arc<Loaded>> {
    ENGINES.lock().get(engine).and_then(|engine| ready(&engine.model))
}

/// An engine's model once it is loaded; none if it cannot be.
pub(crate) fn wait_for(engine: usize) -> Option<Arc<Loaded>> {
    let mut engines = ENGINES.lock();
    loop {
        match &engines.get(engine)?.model {
            Model::Loading => CHANGED.wait(&mut engines),
            Model::Ready(loaded) => return Some(Arc::clone(loaded)),
            Model::Failed(_) => return None,
        }
    }
}

fn ready(model: &Model) -> Option<Arc<Loaded>> {
    match model {
        Model::Ready(loaded) => Some(Arc::clone(loaded)),
        Model::Loading | Model::Failed(_) => None,
    }
}

/// The caches of all engines.
pub(crate) fn caches() -> &'static Arc<Caches> {
    static CACHES: LazyLock<Arc<Caches>> = LazyLock::new(|| {
        let (answers, pictures) =
            (settings::RESULT_CACHE_BYTES.get(), settings::FEATURE_CACHE_BYTES.get());
        Arc::new(Caches::new(answers, pictures))
    });
    &CACHES
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

pub(crate) fn set(engine: usize, model: Model) {
    if let Some(engine) = ENGINES.lock().get_mut(engine) {
        engine.model = model;
    }
    CHANGED.notify_all();
}
