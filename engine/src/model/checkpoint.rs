//! Where a checkpoint's files are: in a directory, or in this library.

use std::{
    borrow::Cow,
    path::{Component, Path, PathBuf},
};

use serde::de::DeserializeOwned;

use super::{LoadError, StandIn, adapter};

/// A checkpoint's files.
#[derive(Clone, Copy)]
pub(crate) enum Checkpoint<'a> {
    Directory(&'a Path),
    /// `models/tiny`, which is part of the library.
    Embedded,
    /// Made-up weights, with the tokenizer of `models/tiny`.
    Synthetic(Shape),
}

/// The published sizes of Florence-2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// 0.23 billion weights.
    Base,
    /// 0.77 billion weights.
    Large,
}

impl Shape {
    pub(super) const VOCABULARY: usize = 51_328;

    pub(super) fn d_model(self) -> usize {
        match self {
            Self::Base => 768,
            Self::Large => 1024,
        }
    }

    fn config(self) -> serde_json::Value {
        let (embed, heads, layers, text_heads) = match self {
            Self::Base => ([128, 256, 512, 1024], [4, 8, 16, 32], 6, 12),
            Self::Large => ([256, 512, 1024, 2048], [8, 16, 32, 64], 12, 16),
        };
        serde_json::json!({
            "vision_config": {
                "embed_dim": embed, "num_heads": heads, "num_groups": heads,
                "depths": [1, 1, 9, 1], "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2],
                "patch_padding": [3, 1, 1, 1], "patch_prenorm": [false, true, true, true],
                "window_size": 12,
            },
            "text_config": {
                "d_model": self.d_model(), "encoder_layers": layers, "decoder_layers": layers,
                "encoder_attention_heads": text_heads, "decoder_attention_heads": text_heads,
            },
        })
    }
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
            Self::Synthetic(shape) => format!("synthetic-{shape:?}").to_lowercase(),
        }
    }

    /// The directory, where it is one.
    pub(super) fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) => Some(path),
            Self::Embedded | Self::Synthetic(_) => None,
        }
    }

    /// The path of a file, for messages and for those files that are mapped.
    pub(crate) fn path(self, name: &str) -> PathBuf {
        match self {
            Self::Directory(path) => path.join(name),
            Self::Embedded => Path::new("embedded").join(name),
            Self::Synthetic(_) => Path::new("synthetic").join(name),
        }
    }

    /// Finds out whether there is a directory at all.
    pub(super) fn check(self) -> Result<(), LoadError> {
        let Self::Directory(path) = self else { return Ok(()) };
        if path.is_dir() {
            return Ok(());
        }
        let is_name = |part| matches!(part, Component::Normal(_));
        let is_of_hub = path.components().count() == 2 && path.components().all(is_name);
        let path = path.to_owned();
        Err(if is_of_hub { LoadError::HubName(path) } else { LoadError::NoDirectory(path) })
    }

    /// Finds out whether it may be a model.
    pub(crate) fn check_model(self) -> Result<(), LoadError> {
        self.check()?;
        match self {
            Self::Directory(path) if self.has(adapter::CONFIG) && !self.has("config.json") => {
                Err(LoadError::IsAdapter(path.to_owned()))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn has(self, name: &str) -> bool {
        match self {
            Self::Directory(path) => path.join(name).exists(),
            Self::Embedded | Self::Synthetic(_) => embedded(name).is_some(),
        }
    }

    pub(crate) fn read(self, name: &str) -> Result<Cow<'static, [u8]>, LoadError> {
        let path = self.path(name);
        match self {
            Self::Directory(_) => match std::fs::read(&path) {
                Ok(bytes) => match StandIn::of(&bytes) {
                    Some(found) => return Err(LoadError::StandIn { path, found }),
                    None => Ok(Cow::Owned(bytes)),
                },
                Err(error) => Err(error),
            },
            Self::Synthetic(shape) if name == "config.json" => {
                Ok(Cow::Owned(shape.config().to_string().into_bytes()))
            }
            Self::Synthetic(_) if name == "preprocessor_config.json" => {
                Ok(Cow::Borrowed(br#"{"size": {"height": 768, "width": 768}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}"#.as_slice()))
            }
            Self::Embedded | Self::Synthetic(_) => {
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
