//! Packed matrices in a file, beside the checkpoint or in a directory for those of several: the
//! next start maps them instead of packing, and all servers of a host that run the checkpoint share
//! their pages.
//!
//! The file is a safetensors file. Each matrix has its panels, in the bits of int32, and what a
//! unit of each column is worth, both under the name of the tensor that they were made of. Every
//! tensor begins at a cache line. The file is used only if version, precision and the weight
//! files' lengths and times are as it says, and every checksum is right; else it is made anew.
//!
//! One process packs and the others wait for it, by a lock on a file of its own. The file appears
//! under its name when it is complete; those who have mapped an older one keep that.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::{Mmap, MmapOptions};
use parking_lot::Mutex;
use rayon::prelude::*;
use rustix::fs::{FlockOperation, flock};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};

use crate::kernels::{Matrix, Precision};

/// Bytes before the first tensor: the header's length, the header, spaces.
const HEADER: usize = 1 << 18;
/// What stands before the header.
const LENGTH: usize = size_of::<u64>();

/// What matrices are packed of, and in which numbers.
pub(super) struct Content<'a> {
    /// Whatever they depend on, the adapter's files too.
    pub(super) files: &'a [&'a Path],
    /// The directory of an adapter that is merged in.
    pub(super) adapter: Option<&'a Path>,
    pub(super) precision: Precision,
    /// Which of them are int8, where some are.
    pub(super) int8: Option<String>,
}

/// Where the packed matrices of a checkpoint are in one precision, and what they are made of.
pub(super) struct Place {
    directory: PathBuf,
    name: String,
    /// What the file's header must say.
    origin: HashMap<String, String>,
}

/// What there is to take packed matrices from, or to leave them in.
#[derive(Default)]
pub(super) enum Packed {
    /// Nothing: matrices are packed in memory.
    #[default]
    Nowhere,
    Mapped(Mapped),
    Growing(Mutex<Growing>),
}

impl Place {
    /// The file of the checkpoint in a directory: there, or elsewhere.
    ///
    /// # Errors
    ///
    /// A path, or a file's length or time, cannot be read.
    pub(super) fn new(
        checkpoint: &Path,
        elsewhere: Option<&Path>,
        content: &Content<'_>,
    ) -> io::Result<Self> {
        let Content { files, adapter, precision, int8 } = content;
        let mut origin = HashMap::from([
            ("format".to_owned(), format!("florence packed {}", Matrix::LAYOUT)),
            ("precision".to_owned(), precision.name().to_owned()),
        ]);
        for path in *files {
            let file = fs::metadata(path)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let changed = file.modified()?.duration_since(std::time::UNIX_EPOCH);
            let changed = changed.unwrap_or_default().as_nanos();
            origin.insert(name.into_owned(), format!("{} bytes, time {changed}", file.len()));
        }
        origin.extend(int8.clone().map(|int8| ("int8".to_owned(), int8)));
        let stem = format!("florence-packed-{}", precision.name());
        let path = path_of(checkpoint, elsewhere, *adapter, &stem, "safetensors")?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let directory = path.parent().unwrap_or(checkpoint).to_owned();
        Ok(Self { directory, name, origin })
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}{suffix}", self.name))
    }

    /// The file, if it is there and right; else the right to make it, once no other process does.
    ///
    /// # Errors
    ///
    /// There is no file, and none can be made.
    pub(super) fn claim(self) -> io::Result<Packed> {
        if let Some(mapped) = self.open() {
            return Ok(Packed::Mapped(mapped));
        }
        let lock = File::create(self.path(".lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        if let Some(mapped) = self.open() {
            return Ok(Packed::Mapped(mapped));
        }
        // It is read, too: what is written is mapped.
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        let mut file = io::BufWriter::new(options.open(self.path(".new"))?);
        file.seek(SeekFrom::Start(HEADER as u64))?;
        let (tensors, checksums) = (Vec::new(), HashMap::new());
        let growing = Growing {
            place: self,
            file,
            tensors,
            checksums,
            length: 0,
            problem: None,
            _lock: lock,
        };
        Ok(Packed::Growing(Mutex::new(growing)))
    }

    #[expect(unsafe_code, reason = "mapping a file")]
    fn open(&self) -> Option<Mapped> {
        let file = File::open(self.path("")).ok()?;
        // SAFETY: the mapping is read-only, and the file is never changed under its name; as with
        // weights we rely on the operator not to change it either.
        let map = unsafe { Mmap::map(&file) }.ok()?;
        let (length, metadata) = SafeTensors::read_metadata(&map).ok()?;
        let header = metadata.metadata().as_ref()?;
        let is_ours = self.origin.iter().all(|(name, value)| header.get(name) == Some(value));
        if !is_ours || length + LENGTH != HEADER {
            return None;
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone()));
        let tensors: HashMap<_, _> = tensors.collect();
        let is_whole = tensors.par_iter().all(|(name, info)| {
            let (from, to) = info.data_offsets;
            let sum = checksum(&map[HEADER + from..HEADER + to]);
            header.get(&checksum_name(name)) == Some(&sum)
        });
        is_whole.then(|| Mapped { map: Arc::new(map), tensors })
    }
}

/// Where a file belongs that is made for a checkpoint. Elsewhere, the checkpoint's path is part of
/// its name: others have files of the same lengths, and perhaps of the same times.
///
/// # Errors
///
/// A path cannot be read.
pub(super) fn path_of(
    checkpoint: &Path,
    elsewhere: Option<&Path>,
    adapter: Option<&Path>,
    stem: &str,
    extension: &str,
) -> io::Result<PathBuf> {
    let suffix = match elsewhere {
        Some(_) => format!("-{}", digest(&fs::canonicalize(checkpoint)?)),
        None => String::new(),
    };
    let adapter = adapter.map(adapter_name).transpose()?.unwrap_or_default();
    Ok(elsewhere.unwrap_or(checkpoint).join(format!("{stem}{suffix}{adapter}.{extension}")))
}

/// What tells the file of one adapter from that of another: its directory's name, as far as a
/// file's name has room for it, and a digest of the whole path.
fn adapter_name(directory: &Path) -> io::Result<String> {
    const MOST: usize = 40;
    let path = fs::canonicalize(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().take(MOST).collect();
    Ok(format!("+{name}-{}", digest(&path)))
}

fn digest(path: &Path) -> String {
    checksum(path.as_os_str().as_bytes())
}

pub(super) fn checksum(bytes: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(bytes))
}

fn checksum_name(tensor: &str) -> String {
    format!("crc32 of {tensor}")
}

fn scales_name(tensor: &str) -> String {
    format!("{tensor} scales")
}

/// A complete file.
pub(super) struct Mapped {
    map: Arc<Mmap>,
    tensors: HashMap<String, TensorInfo>,
}

impl Mapped {
    /// The matrix that was made of a tensor, `[outputs, inputs]`.
    pub(super) fn matrix(
        &self,
        tensor: &str,
        bias: Option<&[f32]>,
        shape: [usize; 2],
        precision: Precision,
    ) -> Option<Matrix> {
        let range = |name: &str| {
            let (from, to) = self.tensors.get(name)?.data_offsets;
            Some(HEADER + from..HEADER + to)
        };
        let (lines, scales) = (range(tensor)?, range(&scales_name(tensor))?);
        Matrix::mapped(&self.map, lines, scales, bias, shape, precision)
    }
}

/// A file that is being written, tensor by tensor.
pub(super) struct Growing {
    place: Place,
    file: io::BufWriter<File>,
    tensors: Vec<(String, TensorInfo)>,
    checksums: HashMap<String, String>,
    length: usize,
    /// The first write that failed; nothing is written after it.
    problem: Option<io::Error>,
    /// Other processes wait for it.
    _lock: File,
}

impl Growing {
    /// Moves the matrix that was made of a tensor into the file, so that memory never holds all of
    /// them; once a write has failed they stay in memory.
    pub(super) fn keep(&mut self, tensor: &str, matrix: Matrix) -> Matrix {
        let (lines, scales) = matrix.parts();
        let (start, length) = (HEADER + self.length, lines.len());
        self.write(tensor, Dtype::I32, lines);
        self.write(&scales_name(tensor), Dtype::F32, scales);
        if self.problem.is_some() {
            return matrix;
        }
        match self.map(start, length) {
            Ok(map) => matrix.moved(map),
            Err(problem) => {
                self.problem = Some(problem);
                matrix
            }
        }
    }

    #[expect(unsafe_code, reason = "mapping a file")]
    fn map(&mut self, start: usize, length: usize) -> io::Result<Mmap> {
        self.file.flush()?;
        // SAFETY: as in `Place::open`; what is written to the file from now on comes after this.
        unsafe { MmapOptions::new().offset(start as u64).len(length).map(self.file.get_ref()) }
    }

    fn write(&mut self, name: &str, dtype: Dtype, bytes: &[u8]) {
        if self.problem.is_some() {
            return;
        }
        if let Err(problem) = self.file.write_all(bytes) {
            self.problem = Some(problem);
        }
        let data_offsets = (self.length, self.length + bytes.len());
        let shape = vec![bytes.len() / dtype.bitsize() * 8];
        self.length += bytes.len();
        self.tensors.push((name.to_owned(), TensorInfo { dtype, shape, data_offsets }));
        self.checksums.insert(checksum_name(name), checksum(bytes));
    }

    /// Completes the file and maps it.
    pub(super) fn finish(mut self) -> io::Result<Packed> {
        if let Some(problem) = self.problem.take() {
            return Err(problem);
        }
        let header = self.place.origin.iter().map(|(name, value)| (name.clone(), value.clone()));
        let header = header.chain(std::mem::take(&mut self.checksums)).collect();
        let metadata = Metadata::new(Some(header), std::mem::take(&mut self.tensors));
        let mut header = serde_json::to_vec(&metadata.map_err(io::Error::other)?)?;
        if header.len() > HEADER - LENGTH {
            return Err(io::Error::other("too many tensors for the header"));
        }
        header.resize(HEADER - LENGTH, b' ');
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&(header.len() as u64).to_le_bytes())?;
        self.file.write_all(&header)?;
        self.file.flush()?;
        fs::rename(self.place.path(".new"), self.place.path(""))?;
        let mapped = self.place.open();
        mapped.map(Packed::Mapped).ok_or_else(|| io::Error::other("the file changed"))
    }
}

impl Drop for Growing {
    /// What was not finished goes; after `finish` there is nothing under this name.
    fn drop(&mut self) {
        let _ = fs::remove_file(self.place.path(".new"));
    }
}
