//! A checkpoint's tensors, whatever its layout and file format.
//!
//! Names are mapped to one canonical form when the files are opened:
//! `vision_tower.*`, `projector.*`, `text.*`, `lm_head.weight`, `final_logits_bias`, with the
//! native layout's spelling below the prefix. The network asks for canonical names only.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    pickle::PthTensors,
    safetensors::{MmapedSafetensors, SliceSafetensors},
};

use super::{
    Checkpoint, Shape, embedded,
    layers::Compute,
    packed::{Packed, Place},
    scope::Scope,
};
use crate::kernels::{Matrix, Precision};

/// Why a checkpoint directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is missing or cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is malformed or lacks a field.
    #[error("{path} is not what Florence-2 needs: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The values of `config.json` contradict each other.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// `tokenizer.json` is missing or malformed.
    #[error("cannot load {path}: {source}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: tokenizers::Error,
    },
    /// A weight file is damaged.
    #[error("{path} is damaged or not a weight file: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: candle_core::Error,
    },
    /// There is no weight file at all.
    #[error("{0} holds neither model.safetensors nor pytorch_model.bin")]
    NoWeights(PathBuf),
    /// A tensor is missing.
    #[error("tensor {name} is missing, expected shape {expected:?}")]
    Missing {
        /// Canonical name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name in the file.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The device cannot be used.
    #[error("cannot use the device: {0}")]
    Device(#[source] candle_core::Error),
}

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
    compute: Compute,
    /// Whether tensors are made up when they are asked for.
    is_synthetic: bool,
    packed: Packed,
}

#[derive(Clone)]
struct Entry {
    file: usize,
    name: String,
    shape: Vec<usize>,
}

impl Weights {
    /// Opens `model.safetensors` (or its shards) or `pytorch_model.bin`.
    pub(crate) fn open(
        checkpoint: Checkpoint<'_>,
        device: &Device,
        compute: Compute,
    ) -> Result<Self, LoadError> {
        const SINGLE: &str = "model.safetensors";
        const SHARDS: &str = "model.safetensors.index.json";
        const PICKLE: &str = "pytorch_model.bin";
        let (files, index) = (Vec::new(), HashMap::new());
        let (device, packed) = (device.clone(), Packed::Nowhere);
        let mut weights = Self { files, index, device, compute, is_synthetic: false, packed };
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

    /// Takes packed matrices from a file beside the checkpoint, or leaves them there.
    ///
    /// # Errors
    ///
    /// There is no such file, and none can be made; the weights are of use all the same.
    pub(crate) fn keep_packed(&mut self, directory: &Path) -> std::io::Result<()> {
        if let Compute::Kernels(_, precision) = self.compute {
            let files = self.files.iter().map(|(path, _)| path.as_path());
            self.packed = Place::new(directory, files, precision)?.claim()?;
        }
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

    /// A matrix that was packed before.
    pub(super) fn packed(
        &self,
        name: &str,
        bias: Option<&[f32]>,
        shape: [usize; 2],
        precision: Precision,
    ) -> Option<Matrix> {
        match &self.packed {
            Packed::Mapped(mapped) => mapped.matrix(name, bias, shape, precision),
            Packed::Growing(_) | Packed::Nowhere => None,
        }
    }

    /// Leaves a packed matrix for the next start, if there is a place for it.
    pub(super) fn leave(&self, name: &str, matrix: &Matrix) {
        if let Packed::Growing(growing) = &self.packed {
            growing.lock().add(name, matrix);
        }
    }

    /// What layers are to compute with.
    pub(super) fn compute(&self) -> Compute {
        self.compute
    }

    /// The tensors below a prefix.
    pub(crate) fn scope(&self, prefix: &str) -> Scope<'_> {
        Scope::new(self, prefix)
    }
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

/// One spelling for a tensor of either layout.
///
/// ORIG is Microsoft's layout, NAT the one of `florence-community` and newer transformers.
fn canonical(name: &str) -> String {
    // ORIG writes the projection as a bare parameter that is multiplied from the right.
    if name == "image_projection" {
        return "projector.image_projection_transposed".to_owned();
    }
    let name = name.strip_prefix("model.").unwrap_or(name);
    let name = name
        .strip_prefix("multi_modal_projector.")
        .map_or_else(|| name.to_owned(), |rest| format!("projector.{rest}"));
    if let Some(rest) = name.strip_prefix("language_model.") {
        return match rest.strip_prefix("model.") {
            Some(text) => format!("text.{text}"),
            None if rest.starts_with("lm_head.") || rest == "final_logits_bias" => rest.to_owned(),
            None => format!("text.{rest}"),
        };
    }
    if name.starts_with("image_proj_norm.") {
        return format!("projector.{name}");
    }
    if let Some(rest) = name.strip_prefix("image_pos_embed.") {
        return format!("projector.image_position_embed.{rest}");
    }
    if !name.starts_with("vision_tower.") {
        return name;
    }
    [
        (".proj.weight", ".conv.weight", "convs."),
        (".proj.bias", ".conv.bias", "convs."),
        (".fn.dw.", ".", ""),
        (".window_attn.norm.", ".norm1.", ""),
        (".channel_attn.norm.", ".norm1.", ""),
        (".ffn.norm.", ".norm2.", ""),
        (".window_attn.fn.", ".window_attn.", ""),
        (".channel_attn.fn.", ".channel_attn.", ""),
        (".ffn.fn.net.", ".ffn.", ""),
    ]
    .iter()
    .filter(|(_, _, only)| name["vision_tower.".len()..].starts_with(only))
    .fold(name.clone(), |name, (original, native, _)| name.replace(original, native))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_have_one_canonical_name() {
        let check = |original: &str, native: &str| {
            assert_eq!(canonical(original), canonical(native));
        };
        check("vision_tower.convs.0.proj.weight", "model.vision_tower.convs.0.conv.weight");
        check("vision_tower.convs.1.norm.bias", "model.vision_tower.convs.1.norm.bias");
        let block = "vision_tower.blocks.2.8";
        for (original, native) in [
            ("spatial_block.conv1.fn.dw.weight", "spatial_block.conv1.weight"),
            ("spatial_block.window_attn.norm.weight", "spatial_block.norm1.weight"),
            ("spatial_block.window_attn.fn.qkv.bias", "spatial_block.window_attn.qkv.bias"),
            ("spatial_block.window_attn.fn.proj.weight", "spatial_block.window_attn.proj.weight"),
            ("channel_block.channel_attn.fn.proj.bias", "channel_block.channel_attn.proj.bias"),
            ("channel_block.channel_attn.norm.bias", "channel_block.norm1.bias"),
            ("channel_block.conv2.fn.dw.bias", "channel_block.conv2.bias"),
            ("channel_block.ffn.norm.weight", "channel_block.norm2.weight"),
            ("channel_block.ffn.fn.net.fc1.weight", "channel_block.ffn.fc1.weight"),
        ] {
            check(&format!("{block}.{original}"), &format!("model.{block}.{native}"));
        }
        check("image_proj_norm.weight", "model.multi_modal_projector.image_proj_norm.weight");
        check(
            "image_pos_embed.row_embeddings.weight",
            "model.multi_modal_projector.image_position_embed.row_embeddings.weight",
        );
        check(
            "language_model.model.encoder.layers.0.fc1.weight",
            "model.language_model.encoder.layers.0.fc1.weight",
        );
        check("language_model.lm_head.weight", "lm_head.weight");
        assert_eq!(canonical("language_model.final_logits_bias"), "final_logits_bias");
    }
}
