//! A lane for each model: the channel that its engines take prepared jobs from, and a thread that
//! asks what follows in its chains.
//!
//! A lane ends with the last job that holds it, and the model goes with it. Lanes of one processor or
//! GPU take turns there, so that a slow one does not starve another.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use crossbeam_channel::{Sender, unbounded};
use florence_engine::{Florence, serve::Work};
use parking_lot::{FairMutex, Mutex, RwLock};

use super::{
    ahead::Ahead,
    infer::{self, Claimant, Ways},
    load::{directory, plans},
    next::{self, Answered},
    ordered::{self, OrderedSender},
    spawn,
};
use crate::{
    model::{self, Hosted, Model, Recipe},
    queue::{Kind, queue},
    server, settings,
};

pub(super) struct Lane {
    pub(super) model: Arc<Hosted>,
    pub(super) ahead: Arc<Ahead>,
    /// Jobs that have been started and are not in the channel yet.
    coming: AtomicUsize,
    pub(super) work: Arc<OrderedSender<Work<Claimant>>>,
    /// To whoever asks the next questions.
    pub(super) next: Sender<Answered>,
}

/// Those of the models that have names.
static LANES: RwLock<Vec<Arc<Lane>>> = RwLock::new(Vec::new());

/// Where the jobs of all lanes go on.
static WAYS: OnceLock<Ways> = OnceLock::new();

/// Begins to load the models of the settings.
pub(super) fn start(ways: &Ways) {
    WAYS.get_or_init(|| ways.clone());
    for (name, recipe) in of_settings() {
        if model::find(Some(&name)).is_some() {
            server::warn(&format!("florence.models: another model is called {name} already"));
            continue;
        }
        if model::named().is_empty() {
            model::make_default(&name);
        }
        open(&begin(name, recipe, ways));
    }
    model::all_are_known();
    queue().wake();
}

/// The models of the settings, the default one first.
fn of_settings() -> Vec<(String, Recipe)> {
    let (model, adapter) = (settings::MODEL.get(), settings::ADAPTER.get());
    let (model, adapter) = (directory(&model), directory(&adapter));
    let recipe = |directory, adapter, is_of_settings| {
        let precision = *settings::PRECISION.get();
        Recipe { directory, adapter, precision, is_of_settings, is_tried: false }
    };
    let named = settings::MODELS.get();
    let mut all = Vec::new();
    if model.is_some() || named.0.is_empty() {
        let name = Florence::name_of(model.as_deref(), adapter.as_deref());
        all.push((name, recipe(model, adapter, true)));
    }
    all.extend(named.0.iter().map(|named| {
        (named.name.clone(), recipe(Some(named.directory.clone()), named.adapter.clone(), false))
    }));
    all
}

/// A lane for a model that its engines begin to load.
fn begin(name: String, recipe: Recipe, ways: &Ways) -> Arc<Lane> {
    let plans = plans(&recipe);
    let (work, inbox) = ordered::channel(settings::MAX_BATCH.size());
    let (work, inbox) = (Arc::new(work), Arc::new(inbox));
    let (next, answered) = unbounded();
    let model = Hosted::new(name, recipe, plans.len());
    let follows = spawn("fl-next", move || next::run(&answered));
    for plan in plans {
        let (model, inbox, ways) = (Arc::clone(&model), Arc::clone(&inbox), ways.clone());
        let (name, engine, loading) =
            (format!("fl-engine-{}", plan.engine), plan.engine, Arc::clone(&model));
        if !follows || !spawn(&name, move || infer::run(&model, &plan, &inbox, &ways)) {
            loading.set(engine, Model::Failed("its threads cannot be started".to_owned()));
        }
    }
    Arc::new(Lane { model, ahead: Arc::default(), coming: AtomicUsize::new(0), work, next })
}

/// Gives a lane the name of its model: new jobs go there.
fn open(lane: &Arc<Lane>) {
    let mut lanes = LANES.write();
    let before = model::give_name(&lane.model);
    lanes.retain(|other| !before.as_ref().is_some_and(|before| Arc::ptr_eq(&other.model, before)));
    lanes.push(Arc::clone(lane));
}

/// Takes the name from a lane: no new jobs go there.
fn close(lane: &Arc<Lane>) {
    let mut lanes = LANES.write();
    model::forget(&lane.model);
    lanes.retain(|other| !Arc::ptr_eq(other, lane));
}

/// The lane of jobs that ask for a model by this name, or for none.
pub(super) fn find(name: Option<&str>) -> Option<Arc<Lane>> {
    let lanes = LANES.read();
    let model = model::find(name)?;
    lanes.iter().find(|lane| Arc::ptr_eq(&lane.model, &model)).cloned()
}

/// Whether a job that asks for this model, or for none if it is empty, may be started: one whose
/// picture is at hand.
pub(super) fn takes(model: &str) -> bool {
    is_open(model, Lane::has_room)
}

/// The same of one whose picture has to be downloaded.
pub(super) fn takes_downloads(model: &str) -> bool {
    is_open(model, |lane| lane.ahead.has_room())
}

fn is_open(model: &str, has_room: impl Fn(&Lane) -> bool) -> bool {
    match of(model) {
        Some(lane) => lane.model.loaded().is_some() && has_room(&lane),
        // Nobody will answer such a job: it ends when it is started.
        None => model::are_known(),
    }
}

/// The lane of jobs that ask for this model, or for none if it is empty.
pub(super) fn of(model: &str) -> Option<Arc<Lane>> {
    find(Some(model).filter(|model| !model.is_empty()))
}

/// A started job that will want room in the channel of its lane, until it is there.
pub(super) struct Coming(Arc<Lane>);

impl Coming {
    pub(super) fn to(lane: Arc<Lane>) -> Self {
        lane.coming.fetch_add(1, Ordering::Relaxed);
        Self(lane)
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.coming.fetch_sub(1, Ordering::Relaxed);
        wake();
    }
}

impl Lane {
    /// Whether one more job would find room in the channel. Where there is one model only, whoever has
    /// prepared a job may as well wait at its door.
    pub(super) fn has_room(&self) -> bool {
        LANES.read().len() == 1 || self.work.has_room(self.coming.load(Ordering::Relaxed))
    }
}

/// There may be room for another job in a lane: lets workers look again who wait for that.
pub(super) fn wake() {
    if LANES.read().len() > 1 {
        for kind in [Kind::Reader, Kind::Downloader] {
            queue().wake_one(kind);
        }
    }
}

/// Where the loops of engines of this number take turns.
pub(super) fn turns(engine: usize) -> Arc<FairMutex<()>> {
    static TURNS: Mutex<Option<HashMap<usize, Arc<FairMutex<()>>>>> = Mutex::new(None);
    Arc::clone(TURNS.lock().get_or_insert_default().entry(engine).or_default())
}

/// Loads a model beside the others, lets it answer once, and gives it its name. Until then jobs for a
/// new name wait; the name of another model stays what it is. If it fails, nothing has changed.
pub(crate) fn load(name: String, recipe: Recipe) -> Result<(), String> {
    // Each needs the memory of a model.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let Some(_one_at_a_time) = ONE_AT_A_TIME.try_lock() else {
        return Err("another model is being loaded".to_owned());
    };
    let is_new = model::find(Some(&name)).is_none();
    let ways = WAYS.get().ok_or("the server has only just begun to start")?;
    let lane = begin(name, recipe, ways);
    if is_new {
        open(&lane);
    }
    let engines = lane.model.engines().len();
    let loaded = (0..engines).try_for_each(|engine| lane.model.wait_for(engine).map(|_loaded| ()));
    let loaded = match (is_new, loaded) {
        (true, Err(problem)) => {
            close(&lane);
            Err(problem)
        }
        (true, Ok(())) if !model::has_name(&lane.model) => {
            Err("it was unloaded before it was ready".to_owned())
        }
        (false, Ok(())) => {
            open(&lane);
            Ok(())
        }
        (_, loaded) => loaded,
    };
    queue().wake();
    loaded
}

/// Takes its name from a model; its jobs under way go on to their ends.
pub(crate) fn unload(name: &str) -> Result<(), String> {
    let lane = find(Some(name)).ok_or_else(|| unknown(name))?;
    if model::is_default(&lane.model) {
        return Err(format!("{name} is the default model: make another the default first"));
    }
    close(&lane);
    // Jobs that wait for it end now.
    queue().wake();
    Ok(())
}

/// Makes a model the one for jobs that ask for none.
pub(crate) fn make_default(name: &str) -> Result<(), String> {
    let lane = find(Some(name)).ok_or_else(|| unknown(name))?;
    if lane.model.loaded().is_none() {
        return Err(format!("model {name} is not ready"));
    }
    model::make_default(name);
    queue().wake();
    Ok(())
}

fn unknown(name: &str) -> String {
    format!("there is no model {name}, only {}", model::names())
}
