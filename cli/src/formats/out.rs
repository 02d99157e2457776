//! Files that appear whole: written under another name, then renamed. What a folder of files is to
//! have twice is told of.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use serde::Serialize;

/// Writes a file.
pub(super) fn file(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let in_words = || format!("cannot write {}", path.display());
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let mut writer = BufWriter::new(File::create(&part).with_context(in_words)?);
    let written = write(&mut writer).and_then(|()| Ok(writer.flush()?));
    if let Err(error) = written {
        drop(writer);
        let _ = std::fs::remove_file(&part);
        return Err(error).with_context(in_words);
    }
    std::fs::rename(&part, path).with_context(in_words)
}

/// Writes a file of these bytes.
pub(super) fn bytes(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    file(path, |out| Ok(out.write_all(bytes)?))
}

/// The items of a JSON list, as they come.
pub(super) struct List<'a, W> {
    out: &'a mut W,
    is_empty: bool,
}

impl<'a, W: Write> List<'a, W> {
    pub(super) fn begin(out: &'a mut W) -> anyhow::Result<Self> {
        out.write_all(b"[")?;
        Ok(Self { out, is_empty: true })
    }

    pub(super) fn push(&mut self, item: &impl Serialize) -> anyhow::Result<()> {
        self.out.write_all(if self.is_empty { b"\n" } else { b",\n" })?;
        self.is_empty = false;
        Ok(serde_json::to_writer(&mut *self.out, item)?)
    }

    pub(super) fn end(self) -> anyhow::Result<()> {
        Ok(self.out.write_all(b"\n]")?)
    }
}

/// Names, each for one picture.
#[derive(Default)]
pub(super) struct Names(HashSet<PathBuf>);

impl Names {
    /// Takes a name, which no other picture may have.
    pub(super) fn take(&mut self, name: &Path) -> anyhow::Result<()> {
        ensure!(self.0.insert(name.to_owned()), "two pictures would have {}", name.display());
        Ok(())
    }

    /// Takes a file's, and makes the folder that it goes to.
    pub(super) fn take_file(&mut self, path: &Path) -> anyhow::Result<()> {
        self.take(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let made = std::fs::create_dir_all(folder);
        made.with_context(|| format!("cannot make the folder {}", folder.display()))
    }
}
