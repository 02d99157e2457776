//! Names of the files that a format has for each picture: without the picture's ending, and with it
//! where another picture is called so but for its ending. They depend on the pictures' names alone,
//! not on the order of the lines.

use std::{
    collections::HashMap,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::pictures::{Picture, Pictures};

/// How many there are of each, by a hash of it.
type Counts = HashMap<u128, usize>;

pub(super) struct Names {
    /// Where the picture itself would lie.
    path: fn(&Picture) -> PathBuf,
    stems: Counts,
    paths: Counts,
}

impl Names {
    pub(super) fn new(pictures: &Pictures, path: fn(&Picture) -> PathBuf) -> anyhow::Result<Self> {
        let (mut stems, mut paths) = (Counts::new(), Counts::new());
        pictures.each(|picture| {
            let path = path(picture);
            *stems.entry(hash(&path.with_extension(""))).or_default() += 1;
            *paths.entry(hash(&path)).or_default() += 1;
            Ok(())
        })?;
        Ok(Self { path, stems, paths })
    }

    /// How many pictures' files keep the ending.
    pub(super) fn kept(&self) -> usize {
        self.stems.values().filter(|count| **count > 1).sum()
    }

    /// The name for the picture's own files, yet without an ending.
    pub(super) fn stem(&self, picture: &Picture) -> PathBuf {
        let path = (self.path)(picture);
        let stem = path.with_extension("");
        if self.stems.get(&hash(&stem)).is_none_or(|count| *count == 1) {
            return stem;
        }
        let is_another = self.stems.contains_key(&hash(&path));
        if is_another || self.paths.get(&hash(&path)).is_some_and(|count| *count > 1) {
            let whole = xxh3_64(picture.file.as_bytes());
            return appended(path, &format!("-{whole:016x}"));
        }
        path
    }

    pub(super) fn file(&self, picture: &Picture, ending: &str) -> PathBuf {
        appended(self.stem(picture), &format!(".{ending}"))
    }

    /// The name of the picture itself beside such files: readers look for theirs by it.
    pub(super) fn picture(&self, picture: &Picture) -> PathBuf {
        match Path::new(&picture.file).extension() {
            Some(ending) => self.file(picture, &ending.to_string_lossy()),
            None => self.stem(picture),
        }
    }
}

fn hash(path: &Path) -> u128 {
    xxh3_128(path.as_os_str().as_bytes())
}

fn appended(path: PathBuf, more: &str) -> PathBuf {
    let mut path = path.into_os_string();
    path.push(more);
    path.into()
}
