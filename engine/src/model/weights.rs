//! A checkpoint's tensors, whatever its layout and file format.
//!
//! Names are mapped to one canonical form when the files are opened:
//! `vision_tower.*`, `projector.*`, `text.*`, `lm_head.weight`, `final_logits_bias`, with the
//! native layout's spelling below the prefix. The network asks for canonical names only.

use std::{
    cell::Cell,
    collections::HashMap,
    io::Read,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    pickle::PthTensors,
    safetensors::{MmapedSafetensors, SliceSafetensors},
};

use super::{
    Checkpoint, Shape, StandIn, embedded,
    error::LoadError,
    names::canonical,
    packed::{Packed, Place},
};
use crate::kernels::{Matrix, Precision};

enum File {
    Safetensors(MmapedSafetensors),
    Embedded(SliceSafetensors<'static>),
    Pickle(PthTensors),
}

/// All tensors of a checkpoint by canonical name; they are read when asked for.
pub(crate) struct Weights {
    files: Vec<(PathBuf, File)>,
    index: HashMap<String, Entry>,
    device: Device,
    /// Whether tensors are made up when they are asked for.
    is_synthetic: bool,
    packed: Packed,
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

#[derive(Clone)]
struct Entry {
    file: usize,
    name: String,
    shape: Vec<usize>,
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
        let (files, index) = (Vec::new(), HashMap::new());
        let (device, packed) = (device.clone(), Packed::Nowhere);
        let (is_synthetic, bytes) = (false, Cell::default());
        let mut weights = Self { files, index, device, is_synthetic, packed, bytes };
        if let Checkpoint::Synthetic(shape) = checkpoint {
            weights.add("text.shared.weight".to_owned(), vec![Shape::VOCABULARY, shape.d_model()]);
            weights.is_synthetic = true;
        } else if let Checkpoint::Embedded = checkpoint {
            weights.add_embedded(embedded(SINGLE).unwrap_or_default(), checkpoint.path(SINGLE))?;
        } else if checkpoint.has(SINGLE) {
            weights.add_safetensors(checkpoint.path(SINGLE))?;
        } else if checkpoint.has(SHARDS) {
            let Index { weight_map } = checkpoint.read_json(SHARDS)?;
            let mut shards: Vec<String> = weight_map.into_values().collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                weights.add_safetensors(checkpoint.path(&shard))?;
            }
        } else if checkpoint.has(PICKLE) {
            weights.add_pickle(checkpoint.path(PICKLE))?;
        } else {
            return Err(LoadError::NoWeights(checkpoint.path("")));
        }
        Ok(weights)
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
        let files = self.files.iter().map(|(path, _)| path.as_path());
        let place = match elsewhere {
            None => Place::beside(checkpoint, files, precision)?,
            Some(directory) => Place::within(directory, checkpoint, files, precision)?,
        };
        self.packed = place.claim()?;
        Ok(())
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

    fn add_embedded(&mut self, bytes: &'static [u8], path: PathBuf) -> Result<(), LoadError> {
        let file = SliceSafetensors::new(bytes)
            .map_err(|source| LoadError::Damaged { path: path.clone(), source })?;
        for (name, view) in file.tensors() {
            self.add(name, view.shape().to_vec());
        }
        self.files.push((path, File::Embedded(file)));
        Ok(())
    }

    #[expect(unsafe_code, reason = "mapping a file")]
    fn add_safetensors(&mut self, path: PathBuf) -> Result<(), LoadError> {
        check_start(&path)?;
        // SAFETY: the mapping is read-only; like every user of mapped weights we rely on the
        // operator not to change a model's files while they are in use.
        let mapped = unsafe { MmapedSafetensors::new(&path) }
            .map_err(|source| LoadError::Damaged { path: path.clone(), source })?;
        for (name, view) in mapped.tensors() {
            self.add(name, view.shape().to_vec());
        }
        self.files.push((path, File::Safetensors(mapped)));
        Ok(())
    }

    fn add_pickle(&mut self, path: PathBuf) -> Result<(), LoadError> {
        check_start(&path)?;
        let tensors = PthTensors::new(&path, None)
            .map_err(|source| LoadError::Damaged { path: path.clone(), source })?;
        for (name, info) in tensors.tensor_infos() {
            self.add(name.clone(), info.layout.shape().dims().to_vec());
        }
        self.files.push((path, File::Pickle(tensors)));
        Ok(())
    }

    /// Records a tensor of the file that is about to be pushed; unknown names are ignored later.
    fn add(&mut self, name: String, shape: Vec<usize>) {
        let entry = Entry { file: self.files.len(), name, shape };
        self.index.insert(canonical(&entry.name), entry);
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

    /// The same in the numbers that the file has.
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
        let (path, file) = &self.files[entry.file];
        let damaged = |source| LoadError::Damaged { path: path.clone(), source };
        let tensor = match file {
            File::Safetensors(file) => file.load(&entry.name, &self.device),
            File::Embedded(file) => file.load(&entry.name, &self.device),
            File::Pickle(file) => file.get(&entry.name).and_then(|tensor| match tensor {
                Some(tensor) => tensor.to_device(&self.device),
                None => Err(candle_core::Error::CannotFindTensor { path: entry.name.clone() }),
            }),
        };
        tensor.map_err(damaged)
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

    /// Leaves a packed matrix for the next start, if there is a place for it.
    pub(super) fn leave(&self, name: &str, matrix: &Matrix) {
        self.count(0, size(matrix));
        if let Packed::Growing(growing) = &self.packed {
            growing.lock().add(name, matrix);
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
