//! Which matrices of a model are int8 where `precision` says so; the others are int16.
//!
//! A checkpoint may have a plan of its own in a file, which `florence tune` makes of measurements;
//! without one the built-in plan counts. While a plan is looked for, every matrix is there in both
//! numbers ([`Trial`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{error::LoadError, packed};
use crate::kernels::Switch;

/// Which matrices are int8.
#[derive(Debug, Clone, Default)]
pub enum Int8 {
    /// Those of the plan in the checkpoint's file, else of the built-in one.
    #[default]
    Planned,
    /// Those of a plan.
    These(Arc<Plan>),
    /// All can be, and none are until they are switched.
    Trial(Arc<Trial>),
}

/// The matrices of a checkpoint that are int8.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Tells the file from others.
    pub format: PlanFormat,
    /// The weight files that it was made for, and their lengths.
    pub weights: BTreeMap<String, u64>,
    /// Names of the matrices' weights.
    pub int8: BTreeSet<String>,
    /// What was measured when it was made, for people.
    pub measured: serde_json::Value,
}

/// The one format there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlanFormat {
    /// As documented in docs/MODEL.md.
    #[default]
    #[serde(rename = "florence int8 plan 1")]
    One,
}

impl Int8 {
    /// What tells packed weights of one choice from those of another.
    pub(super) fn digest(&self) -> String {
        match self {
            Self::Planned => "built-in plan 1".to_owned(),
            Self::These(plan) => {
                let names: Vec<&str> = plan.int8.iter().map(String::as_str).collect();
                format!("plan {}", packed::checksum(names.join("\n").as_bytes()))
            }
            Self::Trial(_) => "trial".to_owned(),
        }
    }
}

/// Where the plan of a checkpoint is, and the weight files that it has to be for.
#[derive(Debug, Clone)]
pub struct PlanPlace {
    path: PathBuf,
    weights: BTreeMap<String, u64>,
}

impl PlanPlace {
    pub(super) fn new<'a>(
        checkpoint: &Path,
        elsewhere: Option<&Path>,
        adapter: Option<&Path>,
        files: impl Iterator<Item = &'a Path>,
    ) -> Result<Self, LoadError> {
        let unread = |source| LoadError::Read { path: checkpoint.to_owned(), source };
        let length = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, fs::metadata(path)?.len()))
        };
        let weights = files.map(length).collect::<io::Result<_>>().map_err(unread)?;
        let path = packed::path_of(checkpoint, elsewhere, adapter, "florence-int8-plan", "json");
        Ok(Self { path: path.map_err(unread)?, weights })
    }

    /// The plan, if there is one.
    pub(super) fn read(&self, is_known: impl Fn(&str) -> bool) -> Result<Option<Plan>, LoadError> {
        let path = self.path.clone();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(LoadError::Read { path, source }),
        };
        let problem = match serde_json::from_slice::<Plan>(&bytes) {
            Ok(plan) if plan.weights != self.weights => {
                "it was made for other weights: run florence tune again".to_owned()
            }
            Ok(plan) => match plan.int8.iter().find(|name| !is_known(name)) {
                Some(name) => format!("the checkpoint has no matrix '{name}'"),
                None => return Ok(Some(plan)),
            },
            Err(error) => error.to_string(),
        };
        Err(LoadError::Config { path, problem })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A plan for these weights, with what was measured of it.
    pub fn plan(&self, int8: BTreeSet<String>, measured: serde_json::Value) -> Plan {
        Plan { format: PlanFormat::One, weights: self.weights.clone(), int8, measured }
    }

    /// Writes a plan to its file; a server takes it at its next start.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn write(&self, plan: &Plan) -> io::Result<()> {
        let new = self.path.with_extension("json.new");
        fs::write(&new, serde_json::to_vec_pretty(plan)?)?;
        fs::rename(new, &self.path)
    }
}

/// What a matrix is where there is no plan: the vision tower's third stage is two thirds of the work
/// of a picture, and costs little (docs/SPEED.md).
pub(super) fn is_int8_without_plan(name: &str) -> bool {
    name.starts_with("vision_tower.blocks.2.")
}

/// A model's matrices, each in int16 and int8.
#[derive(Debug, Default)]
pub struct Trial {
    products: Mutex<BTreeMap<String, Arc<Switch>>>,
}

impl Trial {
    /// What a matrix is switched and timed with.
    pub(super) fn add(&self, name: &str) -> Arc<Switch> {
        Arc::clone(self.products.lock().entry(name.to_owned()).or_default())
    }

    /// The names of all matrices.
    pub fn names(&self) -> Vec<String> {
        self.products.lock().keys().cloned().collect()
    }

    /// From now on these are int8, and no others.
    pub fn switch(&self, int8: &BTreeSet<String>) {
        for (name, product) in &*self.products.lock() {
            product.set(int8.contains(name));
        }
    }

    /// Thread time that each took since this was asked last, in nanoseconds.
    pub fn take_times(&self) -> BTreeMap<String, u64> {
        let products = self.products.lock();
        products.iter().map(|(name, product)| (name.clone(), product.take_time())).collect()
    }
}
