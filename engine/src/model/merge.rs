//! A checkpoint with an adapter merged in, written as a checkpoint of its own.
//!
//! It has the layout, the names and the numbers of the one that it is made of. Weights that were
//! tied and no longer have the same values are stored one by one, and `config.json` then says that
//! they are not tied. The directory appears under its name when it is complete.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::{
    Checkpoint, ConfigFile, LoadError, adapter,
    names::{HEAD, PROJECTION, PROJECTION_TRANSPOSED, TABLES},
    weights::Weights,
};

const CONFIG: &str = "config.json";

/// Writes to `out`, which must not be there, the model of a directory with an adapter merged in;
/// how many weights it changed.
///
/// # Errors
///
/// [`LoadError`] says what cannot be read, merged or written.
pub fn merge(model: &Path, adapter: &Path, out: &Path) -> Result<usize, LoadError> {
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::Write { path, source }
    };
    // A slash at the end says nothing.
    let out = &out.components().collect::<PathBuf>();
    if out.exists() {
        return Err(write(out)(io::ErrorKind::AlreadyExists.into()));
    }
    let checkpoint = Checkpoint::Directory(model);
    checkpoint.check_model()?;
    let plain = Weights::open(checkpoint, &Device::Cpu)?;
    let mut adapted = Weights::open(checkpoint, &Device::Cpu)?;
    adapted.adapt(adapter)?;
    // What it is not, cannot be changed.
    let _is_config: ConfigFile = checkpoint.read_json(CONFIG)?;
    let mut config: Value = checkpoint.read_json(CONFIG)?;
    let tensors = tensors(&plain, &adapted, &mut config)?;

    let mut name = out.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    fs::create_dir(&new).map_err(write(&new))?;
    let written = write_files(model, &new, &tensors, &config);
    if let Err(error) = written.and_then(|()| fs::rename(&new, out)) {
        let _ = fs::remove_dir_all(&new);
        return Err(write(out)(error));
    }
    Ok(adapted.changed())
}

/// The tensors by their names in the file; what else has to be said of them goes into `config`.
fn tensors(
    plain: &Weights,
    adapted: &Weights,
    config: &mut Value,
) -> Result<BTreeMap<String, Tensor>, LoadError> {
    let get = |weights: &Weights, name: &str| {
        weights.get_stored(name, weights.shape(name).unwrap_or_default())
    };
    let mut tensors = BTreeMap::new();
    for (name, stored) in plain.names() {
        let dtype = get(plain, name)?.dtype();
        let is_replaced = name == PROJECTION_TRANSPOSED && adapted.shape(name).is_none();
        let tensor =
            if is_replaced { get(adapted, PROJECTION)?.t() } else { Ok(get(adapted, name)?) };
        insert(&mut tensors, stored, tensor, dtype)?;
    }
    let table = |weights: &Weights| TABLES.into_iter().find(|name| weights.shape(name).is_some());
    let (Some(before), Some(now)) = (table(plain), table(adapted)) else { return Ok(tensors) };
    let mut is_untied = false;
    for name in TABLES.into_iter().chain([HEAD]).filter(|name| adapted.shape(name).is_some()) {
        is_untied |= name != now && plain.shape(name).is_none() && !adapted.are_equal(now, name)?;
    }
    if is_untied {
        let dtype = get(plain, before)?.dtype();
        let is_original = plain.names().any(|(_, stored)| stored.starts_with("language_model."));
        for name in TABLES.into_iter().chain([HEAD]).filter(|name| plain.shape(name).is_none()) {
            insert(&mut tensors, &spelled(name, is_original), Ok(get(adapted, name)?), dtype)?;
        }
        config["tie_word_embeddings"] = json!(false);
        config["text_config"]["tie_word_embeddings"] = json!(false);
    }
    let rows = adapted.shape(now).map(|shape| shape[0]);
    if rows != plain.shape(before).map(|shape| shape[0]) {
        config["text_config"]["vocab_size"] = json!(rows);
    }
    Ok(tensors)
}

/// Adds a tensor in the numbers that the checkpoint has.
fn insert(
    tensors: &mut BTreeMap<String, Tensor>,
    name: &str,
    tensor: candle_core::Result<Tensor>,
    dtype: DType,
) -> Result<(), LoadError> {
    let tensor = tensor.and_then(|tensor| tensor.to_dtype(dtype)?.contiguous());
    tensors.insert(name.to_owned(), tensor.map_err(LoadError::Device)?);
    Ok(())
}

/// The name of a table or of the head in a layout.
fn spelled(name: &str, is_original: bool) -> String {
    match (name.strip_prefix("text."), is_original) {
        (Some(rest), true) => format!("language_model.model.{rest}"),
        (Some(rest), false) => format!("model.language_model.{rest}"),
        (None, true) => format!("language_model.{name}"),
        (None, false) => name.to_owned(),
    }
}

fn write_files(
    model: &Path,
    new: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &Value,
) -> io::Result<()> {
    for entry in fs::read_dir(model)? {
        let from = entry?.path();
        if from.is_file() && is_copied(&from) {
            fs::copy(&from, new.join(from.file_name().unwrap_or_default()))?;
        }
    }
    fs::write(new.join(CONFIG), format!("{config:#}\n"))?;
    // transformers looks for this.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights = new.join("model.safetensors");
    safetensors::serialize_to_file(tensors, Some(format), &weights).map_err(io::Error::other)?;
    // It is for its owner alone, but whoever serves the model may be another user.
    fs::set_permissions(weights, fs::metadata(new.join(CONFIG))?.permissions())
}

/// Whether a file of the checkpoint goes with the merged one as it is: all but weights and what
/// tells of them, such as a plan of ours for int8.
fn is_copied(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    name != adapter::CONFIG
        && !name.starts_with("florence-")
        && !name.ends_with(".index.json")
        && (matches!(extension, "json" | "txt" | "py" | "jinja") || name.starts_with("LICENSE"))
}
