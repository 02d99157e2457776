//! A checkpoint's tensors, whatever its layout and file format.
//!
//! Names are mapped to one canonical form when the files are opened:
//! `vision_tower.*`, `projector.*`, `text.*`, `lm_head.weight`, `final_logits_bias`, with the
//! native layout's spelling below the prefix. The network asks for canonical names only.
//! Where there is an adapter, each weight is merged with it as it is given out.

use std::{
    cell::Cell,
    collections::HashMap,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{
    DType, Device, Tensor,
    pickle::PthTensors,
    safetensors::{MmapedSafetensors, SliceSafetensors},
};

use super::{
    Checkpoint, Shape, StandIn,
    adapter::{self, Adapter, Whole},
    embedded,
    error::LoadError,
    lora::Change,
    names::{HEAD, PROJECTION, PROJECTION_TRANSPOSED, TABLES, canonical},
    packed::{Content, Packed, Place},
    plan::{Int8, PlanPlace, is_int8_without_plan},
};
use crate::kernels::{Matrix, Precision, Switch};

enum File {
    Safetensors(MmapedSafetensors),
    Embedded(SliceSafetensors<'static>),
    Pickle(PthTensors),
}

/// All tensors of a checkpoint by canonical name; they are read when asked for.
pub(crate) struct Weights {
    files: Vec<(PathBuf, File)>,
    index: HashMap<String, Entry>,
    /// What an adapter makes of some of them.
    changes: HashMap<String, Change>,
    adapter: Option<PathBuf>,
    device: Device,
    /// Whether tensors are made up when they are asked for.
    is_synthetic: bool,
    packed: Packed,
    int8: Int8,
    bytes: Cell<WeightBytes>,
}

/// What a model's weights take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// In a mapped file, which all processes share.
    pub mapped: u64,
    /// In this process's own memory.
    pub owned: u64,
}

/// A tensor of a file.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Entry {
    file: usize,
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// Finds out whether a file that is there is the file itself.
fn check_start(path: &Path) -> Result<(), LoadError> {
    let mut start = Vec::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(StandIn::START as u64).read_to_end(&mut start));
    read.map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    match StandIn::of(&start) {
        Some(found) => Err(LoadError::StandIn { path: path.to_owned(), found }),
        None => Ok(()),
    }
}

impl Weights {
    /// Opens `model.safetensors` (or its shards) or `pytorch_model.bin`.
    pub(crate) fn open(checkpoint: Checkpoint<'_>, device: &Device) -> Result<Self, LoadError> {
        const SINGLE: &str = "model.safetensors";
        const SHARDS: &str = "model.safetensors.index.json";
        const PICKLE: &str = "pytorch_model.bin";
        let mut weights = Self {
            files: Vec::new(),
            index: HashMap::new(),
            changes: HashMap::new(),
            adapter: None,
            device: device.clone(),
            is_synthetic: false,
            packed: Packed::Nowhere,
            int8: Int8::default(),
            bytes: Cell::default(),
        };
        let mut names = Vec::new();
        if let Checkpoint::Synthetic(shape) = checkpoint {
            let shape = vec![Shape::VOCABULARY, shape.d_model()];
            names.push(Entry { file: 0, name: TABLES[0].to_owned(), shape });
            weights.is_synthetic = true;
        } else if let Checkpoint::Embedded = checkpoint {
            let bytes = embedded(SINGLE).unwrap_or_default();
            names = weights.add_embedded(bytes, checkpoint.path(SINGLE))?;
        } else if checkpoint.has(SINGLE) {
            names = weights.add_safetensors(checkpoint.path(SINGLE))?;
        } else if checkpoint.has(SHARDS) {
            let Index { weight_map } = checkpoint.read_json(SHARDS)?;
            let mut shards: Vec<String> = weight_map.into_values().collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                names.extend(weights.add_safetensors(checkpoint.path(&shard))?);
            }
        } else if checkpoint.has(PICKLE) {
            names = weights.add_pickle(checkpoint.path(PICKLE))?;
        } else {
            return Err(LoadError::NoWeights(checkpoint.path("")));
        }
        // Names that the network does not know are never asked for.
        weights.index = names.into_iter().map(|entry| (canonical(&entry.name), entry)).collect();
        Ok(weights)
    }

    /// Merges an adapter's directory in: from now on weights are given out as it changes them.
    ///
    /// # Errors
    ///
    /// [`LoadError::Config`] says what of it cannot be merged with this checkpoint.
    pub(crate) fn adapt(&mut self, directory: &Path) -> Result<(), LoadError> {
        let adapter = Adapter::read(directory)?;
        let path = adapter.file()?;
        let is_pickle = path.extension().is_some_and(|extension| extension == "bin");
        let entries = if is_pickle { self.add_pickle(path)? } else { self.add_safetensors(path)? };
        let mut plan = adapter.plan(entries, |name| self.adaptable(name))?;
        let is_tied = |name: &str| name == HEAD || TABLES.contains(&name);
        let unties = plan.names().any(is_tied);
        let (copies, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut plan.whole).into_iter().partition(|(_, whole)| whole.is_copy);
        if others.iter().any(|(name, _)| TABLES.contains(&&**name)) {
            // What is tied to it changes with it.
            self.index.retain(|name, _| !TABLES.contains(&&**name));
        }
        for (name, Whole { entry, .. }) in others {
            self.replace(name, entry);
        }
        if unties {
            self.untie();
        }
        for (name, Whole { entry, .. }) in copies {
            self.replace(name, entry);
        }
        let read =
            |entry: &Entry| self.read(entry)?.to_dtype(DType::F32).map_err(LoadError::Device);
        let changes = adapter.changes(&plan, |name| self.adaptable(name), read)?;
        let is_transposed = !self.index.contains_key(PROJECTION);
        let target = |(name, change)| match change {
            Change::Weight(lora) if is_transposed && name == PROJECTION => {
                (PROJECTION_TRANSPOSED.to_owned(), Change::Transposed(lora))
            }
            change => (name, change),
        };
        self.changes = changes.into_iter().map(target).collect();
        self.adapter = Some(directory.to_owned());
        Ok(())
    }

    /// The shape of a weight that an adapter may change.
    fn adaptable(&self, name: &str) -> Option<Vec<usize>> {
        let shape = |name: &str| self.shape(name).map(<[usize]>::to_vec);
        shape(name).or_else(|| match name {
            PROJECTION => shape(PROJECTION_TRANSPOSED).map(|shape| vec![shape[1], shape[0]]),
            HEAD => TABLES.iter().find_map(|table| shape(table)),
            _ if TABLES.contains(&name) => TABLES.iter().find_map(|table| shape(table)),
            _ => None,
        })
    }

    /// The weights' names, canonical and in their files.
    pub(super) fn names(&self) -> impl Iterator<Item = (&str, &str)> {
        self.index.iter().map(|(name, entry)| (name.as_str(), entry.name.as_str()))
    }

    /// How many weights the adapter changes.
    pub(super) fn changed(&self) -> usize {
        let of_adapter =
            |entry: &&Entry| self.adapter.is_some() && entry.file + 1 == self.files.len();
        self.changes.len() + self.index.values().filter(of_adapter).count()
    }

    /// Takes another tensor under a name.
    fn replace(&mut self, name: String, entry: Entry) {
        if name == PROJECTION {
            self.index.remove(PROJECTION_TRANSPOSED);
        }
        self.index.insert(name, entry);
    }

    /// Gives tied weights names of their own, so that one can change without the others.
    fn untie(&mut self) {
        let table = TABLES.iter().find_map(|name| self.index.get(*name)).cloned();
        for (name, table) in TABLES.into_iter().chain([HEAD]).zip(std::iter::repeat(table)) {
            if let Some(table) = table {
                self.index.entry(name.to_owned()).or_insert(table);
            }
        }
    }

    /// Whether two weights are the same, or have the same values.
    pub(crate) fn are_equal(&self, one: &str, other: &str) -> Result<bool, LoadError> {
        let (Some(a), Some(b)) = (self.index.get(one), self.index.get(other)) else {
            return Ok(false);
        };
        let is_changed = [one, other].iter().any(|name| self.changes.contains_key(*name));
        if is_changed || a.shape != b.shape {
            return Ok(false);
        }
        if a == b {
            return Ok(true);
        }
        let (a, b) = (self.read(a)?, self.read(b)?);
        let differ = || a.to_dtype(b.dtype())?.ne(&b)?.flatten_all()?.max(0)?.to_scalar::<u8>();
        Ok(differ().map_err(LoadError::Device)? == 0)
    }

    /// Takes matrices that are packed in these numbers from a file beside the checkpoint, or in a
    /// directory of files of several checkpoints, or leaves them there.
    ///
    /// # Errors
    ///
    /// There is no such file, and none can be made; the weights are of use all the same.
    pub(crate) fn keep_packed(
        &mut self,
        checkpoint: &Path,
        elsewhere: Option<&Path>,
        precision: Precision,
    ) -> std::io::Result<()> {
        let mut files: Vec<&Path> = self.files.iter().map(|(path, _)| path.as_path()).collect();
        let settings = self.adapter.as_ref().map(|adapter| adapter.join(adapter::CONFIG));
        files.extend(settings.as_deref());
        let int8 = (precision == Precision::Int8).then(|| self.int8.digest());
        let content = Content { files: &files, adapter: self.adapter.as_deref(), precision, int8 };
        self.packed = Place::new(checkpoint, elsewhere, &content)?.claim()?;
        Ok(())
    }

    /// Finds out which matrices are int8, in that precision: by the plan of a file, if there is one
    /// and no other is given.
    ///
    /// # Errors
    ///
    /// The file is no plan for these weights.
    pub(crate) fn plan(
        &mut self,
        checkpoint: Option<&Path>,
        elsewhere: Option<&Path>,
        given: &Int8,
    ) -> Result<Option<PlanPlace>, LoadError> {
        self.int8 = given.clone();
        let Some(checkpoint) = checkpoint else { return Ok(None) };
        let files = self.files.iter().map(|(path, _)| path.as_path());
        let place = PlanPlace::new(checkpoint, elsewhere, self.adapter.as_deref(), files)?;
        if let Int8::Planned = given
            && let Some(plan) = place.read(|name| self.shape(name).is_some())?
        {
            self.int8 = Int8::These(Arc::new(plan));
        }
        Ok(Some(place))
    }

    /// In what a matrix is packed, and what it may be switched to.
    pub(super) fn numbers(
        &self,
        name: &str,
        precision: Precision,
    ) -> (Precision, Option<(Precision, Arc<Switch>)>) {
        let or_int16 = |is_int8| if is_int8 { Precision::Int8 } else { Precision::Int16 };
        match &self.int8 {
            _ if precision != Precision::Int8 => (precision, None),
            Int8::Planned => (or_int16(is_int8_without_plan(name)), None),
            Int8::These(plan) => (or_int16(plan.int8.contains(name)), None),
            Int8::Trial(trial) => (Precision::Int16, Some((Precision::Int8, trial.add(name)))),
        }
    }

    /// Whether packed matrices come from a file.
    pub(crate) fn has_packed(&self) -> bool {
        matches!(self.packed, Packed::Mapped(_))
    }

    /// Completes the file of packed matrices, if it was not there; says whether it was not.
    ///
    /// # Errors
    ///
    /// It could not be written.
    pub(crate) fn finish_packed(&mut self) -> std::io::Result<bool> {
        match std::mem::take(&mut self.packed) {
            Packed::Growing(growing) => self.packed = growing.into_inner().finish()?,
            other => {
                self.packed = other;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn add_embedded(
        &mut self,
        bytes: &'static [u8],
        path: PathBuf,
    ) -> Result<Vec<Entry>, LoadError> {
        let file = SliceSafetensors::new(bytes)
            .map_err(|source| LoadError::Damaged { path: path.clone(), source })?;
        let tensors = file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec()));
        let entries = self.entries(tensors);
        self.files.push((path, File::Embedded(file)));
        Ok(entries)
    }

    #[expect(unsafe_code, reason = "mapping a file")]
    fn add_safetensors(&mut self, path: PathBuf) -> Result<Vec<Entry>, LoadError> {
        check_start(&path)?;
        // SAFETY: the mapping is read-only; like every user of mapped weights we rely on the
        // operator not to change a model's files while they are in use.
        let mapped = unsafe { MmapedSafetensors::new(&path) }
            .map_err(|source| LoadError::Damaged { path: path.clone(), source })?;
        let tensors =
            mapped.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec()));
        let entries = self.entries(tensors);
        self.files.push((path, File::Safetensors(mapped)));
        Ok(entries)
    }

    fn add_pickle(&mut self, path: PathBuf) -> Result<Vec<Entry>, LoadError> {
        check_start(&path)?;
        let file = PthTensors::new(&path, None)
            .map_err(|source| LoadError::Damaged { path: path.clone(), source })?;
        let tensors = file.tensor_infos().iter();
        let tensors =
            tensors.map(|(name, info)| (name.clone(), info.layout.shape().dims().to_vec()));
        let entries = self.entries(tensors);
        self.files.push((path, File::Pickle(file)));
        Ok(entries)
    }

    /// The tensors of the file that is about to be pushed.
    fn entries(&self, tensors: impl Iterator<Item = (String, Vec<usize>)>) -> Vec<Entry> {
        let file = self.files.len();
        tensors.map(|(name, shape)| Entry { file, name, shape }).collect()
    }

    /// The shape of a tensor, if the checkpoint has it.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The tensor of a canonical name as float32, if it has the expected shape.
    pub(crate) fn get(&self, name: &str, expected: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = self.get_stored(name, expected)?;
        tensor.to_dtype(DType::F32).map_err(LoadError::Device)
    }

    /// The same in the numbers that the file has; in float32 where an adapter changes it.
    pub(crate) fn get_stored(&self, name: &str, expected: &[usize]) -> Result<Tensor, LoadError> {
        if self.is_synthetic {
            let tensor =
                synthetic(name, expected).and_then(|tensor| tensor.to_device(&self.device));
            return tensor.map_err(LoadError::Device);
        }
        let entry = self.index.get(name).ok_or_else(|| LoadError::Missing {
            name: name.to_owned(),
            expected: expected.to_vec(),
        })?;
        if entry.shape != expected {
            return Err(LoadError::Shape {
                name: entry.name.clone(),
                expected: expected.to_vec(),
                found: entry.shape.clone(),
            });
        }
        let tensor = self.read(entry)?;
        match self.changes.get(name) {
            Some(change) => tensor.to_dtype(DType::F32).and_then(|weight| change.merged(&weight)),
            None => Ok(tensor),
        }
        .map_err(LoadError::Device)
    }

    /// A tensor as its file has it.
    fn read(&self, entry: &Entry) -> Result<Tensor, LoadError> {
        let (path, file) = &self.files[entry.file];
        let tensor = match file {
            File::Safetensors(file) => file.load(&entry.name, &self.device),
            File::Embedded(file) => file.load(&entry.name, &self.device),
            File::Pickle(file) => file.get(&entry.name).and_then(|tensor| match tensor {
                Some(tensor) => tensor.to_device(&self.device),
                None => Err(candle_core::Error::CannotFindTensor { path: entry.name.clone() }),
            }),
        };
        tensor.map_err(|source| LoadError::Damaged { path: path.clone(), source })
    }

    /// What was given out since this was asked last.
    pub(super) fn take_bytes(&self) -> WeightBytes {
        self.bytes.take()
    }

    fn count(&self, mapped: u64, owned: u64) {
        let so_far = self.bytes.get();
        let (mapped, owned) = (so_far.mapped + mapped, so_far.owned + owned);
        self.bytes.set(WeightBytes { mapped, owned });
    }

    /// A matrix that was packed before.
    pub(super) fn packed(
        &self,
        name: &str,
        bias: Option<&[f32]>,
        shape: [usize; 2],
        precision: Precision,
    ) -> Option<Matrix> {
        let Packed::Mapped(mapped) = &self.packed else { return None };
        let matrix = mapped.matrix(name, bias, shape, precision)?;
        self.count(size(&matrix), 0);
        Some(matrix)
    }

    /// Keeps a packed matrix: in the file for the next start, if there is a place for it.
    pub(super) fn keep(&self, name: &str, matrix: Matrix) -> Matrix {
        self.count(0, size(&matrix));
        match &self.packed {
            Packed::Growing(growing) => growing.lock().keep(name, matrix),
            _ => matrix,
        }
    }
}

fn size(matrix: &Matrix) -> u64 {
    let (lines, scales) = matrix.parts();
    (lines.len() + scales.len()) as u64
}

/// A made-up tensor that keeps activations in range: norms are neutral, biases 0, weights uniform
/// with the variance of one over their inputs; the same name always gets the same values.
fn synthetic(name: &str, shape: &[usize]) -> candle_core::Result<Tensor> {
    let count: usize = shape.iter().product();
    let values = if name.rsplit('.').next() == Some("bias") {
        vec![0.0; count]
    } else if name.contains("norm") {
        vec![1.0; count]
    } else {
        let inputs: usize = shape.iter().skip(1).product();
        let width = (12.0 / inputs.max(1) as f32).sqrt();
        let seed = name.bytes().fold(0x9e37_79b9_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        (0..count as u64)
            .map(|i| width * (unit(seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15)) - 0.5))
            .collect()
    };
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A number below 1 from the bits of another (the finisher of `splitmix64`).
fn unit(bits: u64) -> f32 {
    let mixed = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed >> 40) as f32 / (1 << 24) as f32
}

/// `model.safetensors.index.json`: which shard holds a tensor.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}
