//! Files that appear whole: written under another name, then renamed. What is there already and says
//! something else stays, unless whoever writes may write over it; pictures and labels stay always.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::HashSet,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf, absolute},
};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use tempfile::NamedTempFile;

use super::{
    names::Names,
    pictures::{Picture, Pictures},
};
use crate::whole::{folder_of, id, is_same, part};

/// Where formats write.
pub(super) struct Out<'a> {
    pictures: &'a Pictures,
    may_write_over: bool,
    /// What has been written, by all formats.
    written: RefCell<HashSet<PathBuf>>,
    /// What was there and says something else.
    left: RefCell<Vec<PathBuf>>,
    /// How many pictures' files keep the picture's ending, where most do.
    kept_endings: Cell<usize>,
    /// Pictures and labels, by what tells files apart; made when it is needed.
    kept: OnceCell<HashSet<(u64, u64)>>,
}

impl<'a> Out<'a> {
    pub(super) fn new(pictures: &'a Pictures, may_write_over: bool) -> Self {
        let (written, left, kept_endings, kept) = Default::default();
        Self { pictures, may_write_over, written, left, kept_endings, kept }
    }

    /// Names for files of which each picture has its own; `path` is where it would lie itself.
    pub(super) fn names(&self, path: fn(&Picture) -> PathBuf) -> anyhow::Result<Names> {
        let names = Names::new(self.pictures, path)?;
        self.kept_endings.set(self.kept_endings.get().max(names.kept()));
        Ok(names)
    }

    /// Writes a file, and the folder that it goes to.
    pub(super) fn file(
        &self,
        path: &Path,
        write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.take(path, place)?;
        // A link stays one.
        let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
        self.written(path, write).with_context(|| format!("cannot write {}", path.display()))
    }

    fn written(
        &self,
        path: &Path,
        write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let part = part(path)?;
        let mut writer = BufWriter::new(part.as_file().try_clone()?);
        write(&mut writer)?;
        writer.flush()?;
        if self.may_replace(path, &part)? {
            part.persist(path)?;
        }
        Ok(())
    }

    /// Writes a file of these bytes.
    pub(super) fn bytes(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        self.file(path, |out| Ok(out.write_all(bytes)?))
    }

    /// Writes the classes by whose numbers the other files of a format are written. Where others are
    /// there and stay, none of those may be, unless they agree as far as these go.
    pub(super) fn classes(
        &self,
        path: &Path,
        text: &str,
        agree: impl FnOnce(&str) -> bool,
    ) -> anyhow::Result<()> {
        let before = self.left.borrow().len();
        self.bytes(path, text.as_bytes())?;
        let is_left = self.left.borrow().len() > before;
        if is_left && !agree(&String::from_utf8_lossy(&std::fs::read(path)?)) {
            self.left.borrow_mut().pop();
            bail!("{} has other classes, and stays; --overwrite writes all anew", path.display());
        }
        Ok(())
    }

    /// Links to a picture, unless it is there itself.
    pub(super) fn link(&self, picture: &Path, link: &Path) -> anyhow::Result<()> {
        // The place of the link, not of what it leads to.
        self.take(link, spot)?;
        let in_words = || format!("cannot link {}", link.display());
        let target = absolute(picture).with_context(in_words)?;
        match link.symlink_metadata() {
            Ok(_) if is_same(&target, link) => return Ok(()),
            Ok(there) if there.is_symlink() && self.may_write_over => {
                std::fs::remove_file(link).with_context(in_words)?;
            }
            Ok(_) => {
                self.left.borrow_mut().push(link.to_owned());
                return Ok(());
            }
            Err(_) => {}
        }
        symlink(target, link).with_context(in_words)
    }

    /// Takes a name, which nothing else may have, and makes its folder.
    fn take(&self, path: &Path, place: fn(&Path) -> PathBuf) -> anyhow::Result<()> {
        let folder = folder_of(path);
        let made = std::fs::create_dir_all(folder);
        made.with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let is_new = self.written.borrow_mut().insert(place(path));
        ensure!(is_new, "two pictures or formats would have {}", path.display());
        Ok(())
    }

    fn may_replace(&self, path: &Path, part: &NamedTempFile) -> anyhow::Result<bool> {
        let there = match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            there => there?,
        };
        ensure!(there.is_file(), "it is there, and no file");
        if is_alike(path, part.path())? {
            return Ok(false);
        }
        if self.kept.get().is_none() {
            let files = self.pictures.files()?.into_iter();
            let _ = self.kept.set(files.filter_map(|it| Some(id(&it.metadata().ok()?))).collect());
        }
        if self.kept.get().is_some_and(|kept| kept.contains(&id(&there))) {
            bail!("it is a picture or holds labels, and stays");
        }
        if !self.may_write_over {
            self.left.borrow_mut().push(path.to_owned());
        }
        Ok(self.may_write_over)
    }

    /// Tells what is called otherwise, and what was left as it is.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        let kept_endings = self.kept_endings.get();
        if kept_endings > 0 {
            eprintln!(
                "{kept_endings} pictures are called as others but for their endings: files of their \
                 own keep it, as a.png.txt does, where others lose it"
            );
        }
        let left = self.left.into_inner();
        let Some(first) = left.first() else { return Ok(()) };
        let first = first.display();
        match left.len() - 1 {
            0 => bail!("{first} is there and says something else; --overwrite writes over it"),
            more => bail!(
                "{first} and {more} more are there and say something else; --overwrite writes over them"
            ),
        }
    }
}

/// A path by which files that are yet to be written are told apart.
pub(crate) fn place(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| spot(path))
}

/// The same, of a link itself.
fn spot(path: &Path) -> PathBuf {
    let folder = folder_of(path);
    let folder = folder.canonicalize().or_else(|_| absolute(folder)).unwrap_or_default();
    folder.join(path.file_name().unwrap_or_default())
}

/// Whether two files have the same bytes.
fn is_alike(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (BufReader::new(one).bytes(), BufReader::new(other).bytes());
    loop {
        match (one.next().transpose()?, other.next().transpose()?) {
            (None, None) => return Ok(true),
            (a, b) if a == b => {}
            _ => return Ok(false),
        }
    }
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
