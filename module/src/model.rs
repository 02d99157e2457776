//! The models that jobs can ask for by name, each as far as its engines have loaded it, and the
//! memory that pictures for them are decoded in.

use std::{
    path::PathBuf,
    sync::{
        Arc, LazyLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use florence_engine::{Budget, Florence, Precision, serve::Caches};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::{figures::Counter, settings};

/// A loaded model, and what was asked lately, of it or of another.
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

impl Model {
    /// The name of its state.
    pub(crate) fn state(&self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready(_) => "ready",
            Self::Failed(_) => "failed",
        }
    }
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

/// What a model is loaded from.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    /// The checkpoint; without one, the embedded model.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) adapter: Option<PathBuf>,
    pub(crate) precision: Precision,
    /// Whether `florence.tokenizer` and `florence.token-ids` are about it.
    pub(crate) is_of_settings: bool,
    /// Whether it has to answer once before anybody else may ask it.
    pub(crate) is_tried: bool,
}

/// A model that is served. What jobs began with they end with, whatever its name means meanwhile.
pub(crate) struct Hosted {
    pub(crate) name: String,
    pub(crate) recipe: Recipe,
    /// That of no other, also of none before it.
    pub(crate) id: u64,
    engines: Mutex<Vec<Engine>>,
    /// Told when an engine has loaded the model, or cannot.
    changed: Condvar,
}

impl Hosted {
    /// A model that so many engines begin to load.
    pub(crate) fn new(name: String, recipe: Recipe, engines: usize) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let engine = || Engine { model: Model::Loading, work: Arc::default() };
        let served = Arc::new(Self {
            name,
            recipe,
            id: IDS.fetch_add(1, Ordering::Relaxed),
            engines: Mutex::new(std::iter::repeat_with(engine).take(engines).collect()),
            changed: Condvar::new(),
        });
        MODELS.write().alive.push(Arc::downgrade(&served));
        served
    }

    pub(crate) fn engines(&self) -> Vec<Engine> {
        self.engines.lock().clone()
    }

    /// How far loading has come: one engine that is ready is enough.
    pub(crate) fn model(&self) -> Model {
        if let Some(loaded) = self.loaded() {
            return Model::Ready(loaded);
        }
        let engines = self.engines.lock();
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
    pub(crate) fn loaded(&self) -> Option<Arc<Loaded>> {
        static TURN: AtomicUsize = AtomicUsize::new(0);
        let engines = self.engines.lock();
        let first = TURN.fetch_add(1, Ordering::Relaxed) % engines.len().max(1);
        let (before, after) = engines.split_at(first);
        after.iter().chain(before).find_map(|engine| ready(&engine.model))
    }

    /// An engine's model, if it is loaded.
    pub(crate) fn of(&self, engine: usize) -> Option<Arc<Loaded>> {
        self.engines.lock().get(engine).and_then(|engine| ready(&engine.model))
    }

    /// What an engine has done.
    pub(crate) fn work(&self, engine: usize) -> Option<Arc<Work>> {
        self.engines.lock().get(engine).map(|engine| Arc::clone(&engine.work))
    }

    /// An engine's model once it is loaded, or why it cannot be.
    pub(crate) fn wait_for(&self, engine: usize) -> Result<Arc<Loaded>, String> {
        let mut engines = self.engines.lock();
        loop {
            match engines.get(engine).map(|engine| &engine.model) {
                Some(Model::Loading) => self.changed.wait(&mut engines),
                Some(Model::Ready(loaded)) => return Ok(Arc::clone(loaded)),
                Some(Model::Failed(problem)) => return Err(problem.clone()),
                None => return Err(format!("there is no engine {engine}")),
            }
        }
    }

    pub(crate) fn set(&self, engine: usize, model: Model) {
        if let Some(engine) = self.engines.lock().get_mut(engine) {
            engine.model = model;
        }
        self.changed.notify_all();
    }
}

fn ready(model: &Model) -> Option<Arc<Loaded>> {
    match model {
        Model::Ready(loaded) => Some(Arc::clone(loaded)),
        Model::Loading | Model::Failed(_) => None,
    }
}

/// What names mean now.
struct Models {
    named: Vec<Arc<Hosted>>,
    /// The name of the one for jobs that ask for none.
    default: String,
    /// All that there are, also those that no name means any more, as long as they have jobs.
    alive: Vec<Weak<Hosted>>,
}

static MODELS: RwLock<Models> =
    RwLock::new(Models { named: Vec::new(), default: String::new(), alive: Vec::new() });

/// All models that have names; none before it is known which.
pub(crate) fn named() -> Vec<Arc<Hosted>> {
    MODELS.read().named.clone()
}

/// Whether the models of the settings have their names: until then a name that is not there may come.
static ARE_KNOWN: AtomicBool = AtomicBool::new(false);

pub(crate) fn are_known() -> bool {
    ARE_KNOWN.load(Ordering::Acquire)
}

pub(crate) fn all_are_known() {
    ARE_KNOWN.store(true, Ordering::Release);
}

/// Whether its name means this model.
pub(crate) fn has_name(model: &Arc<Hosted>) -> bool {
    MODELS.read().named.iter().any(|named| Arc::ptr_eq(named, model))
}

/// All that there are, also those without a name.
pub(crate) fn alive() -> Vec<Arc<Hosted>> {
    MODELS.read().alive.iter().filter_map(Weak::upgrade).collect()
}

/// Those that are there without a name, until their last jobs have ended.
pub(crate) fn leaving() -> usize {
    let mut models = MODELS.write();
    models.alive.retain(|model| model.strong_count() > 0);
    models.alive.len().saturating_sub(models.named.len())
}

/// The model of a name, or the default one.
pub(crate) fn find(name: Option<&str>) -> Option<Arc<Hosted>> {
    let models = MODELS.read();
    let name = name.unwrap_or(&models.default);
    models.named.iter().find(|model| model.name == name).cloned()
}

/// Whether jobs that ask for no model get this one.
pub(crate) fn is_default(model: &Hosted) -> bool {
    MODELS.read().default == model.name
}

/// Gives a model its name; the one that had it.
pub(crate) fn give_name(model: &Arc<Hosted>) -> Option<Arc<Hosted>> {
    let mut models = MODELS.write();
    if let Some(known) = models.named.iter_mut().find(|known| known.name == model.name) {
        return Some(std::mem::replace(known, Arc::clone(model)));
    }
    models.named.push(Arc::clone(model));
    None
}

/// Takes its name from a model, if it is still the one that has it.
pub(crate) fn forget(model: &Arc<Hosted>) {
    MODELS.write().named.retain(|known| !Arc::ptr_eq(known, model));
}

/// Makes a model the one for jobs that ask for none.
pub(crate) fn make_default(name: &str) {
    name.clone_into(&mut MODELS.write().default);
}

/// How far loading of the default model has come.
pub(crate) fn model() -> Model {
    find(None).map_or(Model::Loading, |model| model.model())
}

/// The names that jobs can ask for, for messages.
pub(crate) fn names() -> String {
    let names: Vec<String> = named().iter().map(|model| model.name.clone()).collect();
    names.join(", ")
}

/// The caches of all models.
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
    static WORK: LazyLock<Budget> = LazyLock::new(|| Budget::new(0));
    sized(&WORK, settings::WORK_BYTES.get())
}

/// The budget of keys and values of all engines, as large as it is set just now.
pub(crate) fn kv_cache() -> &'static Budget {
    static KV_CACHE: LazyLock<Budget> = LazyLock::new(|| Budget::new(0));
    sized(&KV_CACHE, settings::KV_CACHE_BYTES.get())
}

fn sized(budget: &'static Budget, bytes: u64) -> &'static Budget {
    if budget.limit() != bytes {
        budget.set(bytes);
    }
    budget
}

/// What users of the model have to know.
pub(crate) fn note(florence: &Florence) -> Option<String> {
    let note = florence.note()?;
    Some(format!("{note} --to DIRECTORY, then florence.model DIRECTORY"))
}
