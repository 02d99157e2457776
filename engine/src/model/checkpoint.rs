//! Where a checkpoint's files are: in a directory, or in this library.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

use super::LoadError;

/// A checkpoint's files.
#[derive(Clone, Copy)]
pub(crate) enum Checkpoint<'a> {
    Directory(&'a Path),
    /// `models/tiny`, which is part of the library.
    Embedded,
}

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../../../models/tiny/", $name)).as_slice())),*]
    };
}

static EMBEDDED: [(&str, &[u8]); 5] = embedded![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
];

impl Checkpoint<'_> {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Directory(path) => {
                path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
            }
            Self::Embedded => "tiny".to_owned(),
        }
    }

    /// The path of a file, for messages and for those files that are mapped.
    pub(crate) fn path(self, name: &str) -> PathBuf {
        match self {
            Self::Directory(path) => path.join(name),
            Self::Embedded => Path::new("embedded").join(name),
        }
    }

    pub(crate) fn has(self, name: &str) -> bool {
        match self {
            Self::Directory(path) => path.join(name).exists(),
            Self::Embedded => embedded(name).is_some(),
        }
    }

    pub(crate) fn read(self, name: &str) -> Result<Cow<'static, [u8]>, LoadError> {
        let path = self.path(name);
        match self {
            Self::Directory(_) => std::fs::read(&path).map(Cow::Owned),
            Self::Embedded => {
                embedded(name).map(Cow::Borrowed).ok_or(std::io::ErrorKind::NotFound.into())
            }
        }
        .map_err(|source| LoadError::Read { path, source })
    }

    pub(crate) fn read_json<T: DeserializeOwned>(self, name: &str) -> Result<T, LoadError> {
        serde_json::from_slice(&self.read(name)?)
            .map_err(|source| LoadError::Json { path: self.path(name), source })
    }
}

/// The bytes of a file of the embedded model.
pub(crate) fn embedded(name: &str) -> Option<&'static [u8]> {
    EMBEDDED.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes)
}
