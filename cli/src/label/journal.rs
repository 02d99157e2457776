//! The output, which is the journal too: an answer's line is there, whole, or it is not. What a run
//! that was ended has left is read back, and a torn last line is cut off.
//!
//! In shards, the one that is written is called `NAME.part`, and renamed when it is full.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};

use crate::{formats::Line, whole::folder_of};

/// Where a line begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    shard: u32,
    offset: u64,
}

/// What is to become of what is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// There must be nothing.
    Nothing,
    Kept,
    Dropped,
}

pub(super) struct Journal {
    names: Names,
    file: File,
    /// Of whole lines.
    length: u64,
    shard: u32,
    /// In this shard.
    lines: usize,
}

/// How the files are called.
struct Names {
    out: PathBuf,
    /// Lines of a shard.
    most: Option<usize>,
}

impl Names {
    fn shard(&self, shard: u32) -> PathBuf {
        if self.most.is_none() {
            return self.out.clone();
        }
        let stem = self.out.file_stem().unwrap_or_default().to_string_lossy();
        let ending = self.out.extension().map_or("jsonl".into(), |it| it.to_string_lossy());
        self.out.with_file_name(format!("{stem}-{shard:05}.{ending}"))
    }

    /// The one that is being written.
    fn open(&self, shard: u32) -> PathBuf {
        let mut path = self.shard(shard).into_os_string();
        if self.most.is_some() {
            path.push(".part");
        }
        path.into()
    }

    /// What there is, by number.
    fn there(&self) -> anyhow::Result<BTreeMap<u32, PathBuf>> {
        if self.most.is_none() {
            return Ok(self.out.exists().then(|| (0, self.out.clone())).into_iter().collect());
        }
        let mut there = BTreeMap::new();
        let entries = match std::fs::read_dir(folder_of(&self.out)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(there),
            entries => entries,
        };
        let in_words = || format!("cannot look for the files of {}", self.out.display());
        for entry in entries.with_context(in_words)? {
            let name = entry.with_context(in_words)?.file_name();
            if let Some(shard) = self.number(&name.to_string_lossy()) {
                let closed = self.shard(shard);
                let path = self.out.with_file_name(name);
                there.insert(shard, if closed.exists() { closed } else { path });
            }
        }
        Ok(there)
    }

    /// The number of the shard that has this name, closed or open.
    fn number(&self, name: &str) -> Option<u32> {
        let digits = name.rsplit_once('-')?.1.split('.').next()?;
        let number = digits.parse().ok()?;
        let names = [self.shard(number), self.open(number)];
        let is_its = |path: &PathBuf| path.file_name().is_some_and(|it| it == name);
        names.iter().any(is_its).then_some(number)
    }
}

impl Journal {
    /// Opens the output; `each` sees every line that is there already.
    pub(super) fn open(
        out: &Path,
        most: Option<usize>,
        before: Before,
        mut each: impl FnMut(Mark, Line),
    ) -> anyhow::Result<Self> {
        let names = Names { out: out.to_owned(), most };
        let there = names.there()?;
        match before {
            Before::Nothing => {
                if let Some(first) = there.values().next() {
                    let first = first.display();
                    bail!("{first} is there: --resume goes on with it, --overwrite begins anew");
                }
            }
            Before::Dropped => {
                for path in there.values() {
                    // A run that still writes it keeps it.
                    let _held = locked(path)?;
                    check_is_ours(path)?;
                    if names.most.is_some() {
                        remove(path)?;
                    }
                }
            }
            Before::Kept => {
                if there.is_empty() {
                    check_other_form(out, most)?;
                }
                return Self::go_on(names, &there, &mut each);
            }
        }
        Self::begin(names, 0)
    }

    fn begin(names: Names, shard: u32) -> anyhow::Result<Self> {
        let path = names.open(shard);
        let file = locked(&path)?;
        // One that was begun and left before.
        file.set_len(0).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { names, file, length: 0, shard, lines: 0 })
    }

    fn go_on(
        names: Names,
        there: &BTreeMap<u32, PathBuf>,
        each: &mut dyn FnMut(Mark, Line),
    ) -> anyhow::Result<Self> {
        let Some(&shard) = there.keys().next_back() else { return Self::begin(names, 0) };
        let is_closed = names.most.is_some() && names.shard(shard).exists();
        // Before it is read: another run may be adding to it.
        let held = if is_closed { None } else { Some(locked(&names.open(shard))?) };
        let mut last = (0, 0);
        for (expected, (&shard, path)) in (0..).zip(there) {
            if shard != expected {
                let missing = names.shard(expected);
                bail!("{} is not there, and --resume reads all of an output", missing.display());
            }
            last = read(path, shard, each)?;
        }
        let Some(mut file) = held else { return Self::begin(names, shard + 1) };
        let ((length, lines), open) = (last, names.open(shard));
        file.set_len(length).with_context(|| format!("cannot write {}", open.display()))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { names, file, length, shard, lines })
    }

    /// Adds the lines of a picture, all or, if there is an error, none that a reader would take for
    /// one; the place of the first.
    pub(super) fn append(&mut self, lines: &[Line]) -> anyhow::Result<Mark> {
        if self.names.most.is_some_and(|most| self.lines >= most) {
            self.close()?;
            let names = Names { out: self.names.out.clone(), most: self.names.most };
            *self = Self::begin(names, self.shard + 1)?;
        }
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
        }
        if let Err(error) = self.file.write_all(&text) {
            // Room for less there is always.
            let _ = self.file.set_len(self.length);
            let path = self.names.open(self.shard);
            return Err(error).with_context(|| format!("cannot write {}", path.display()));
        }
        let mark = Mark { shard: self.shard, offset: self.length };
        self.length += text.len() as u64;
        self.lines += lines.len();
        Ok(mark)
    }

    /// Lines that were written before.
    pub(super) fn read(&self, mark: Mark, count: usize) -> anyhow::Result<Vec<Line>> {
        let path = if mark.shard == self.shard {
            self.names.open(mark.shard)
        } else {
            self.names.shard(mark.shard)
        };
        let mut file =
            File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        file.seek(SeekFrom::Start(mark.offset))?;
        let lines = BufReader::new(file).lines().take(count);
        lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect()
    }

    fn close(&self) -> anyhow::Result<()> {
        let (open, shard) = (self.names.open(self.shard), self.names.shard(self.shard));
        let closed = self
            .file
            .sync_all()
            .and_then(|()| if open == shard { Ok(()) } else { std::fs::rename(&open, &shard) });
        closed.with_context(|| format!("cannot write {}", shard.display()))
    }

    /// Ends the output; without this, the last shard keeps its temporary name.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        if self.shard > 0 && self.length == 0 {
            return remove(&self.names.open(self.shard));
        }
        self.close()
    }

    /// The files of a finished output.
    pub(super) fn files(out: &Path, most: Option<usize>) -> anyhow::Result<Vec<PathBuf>> {
        Ok(Names { out: out.to_owned(), most }.there()?.into_values().collect())
    }
}

/// Refuses to begin anew what was begun in shards or without them.
fn check_other_form(out: &Path, most: Option<usize>) -> anyhow::Result<()> {
    // Shards of any length are called alike.
    let other = Names { out: out.to_owned(), most: most.is_none().then_some(1) };
    let Some(there) = other.there()?.into_values().next() else { return Ok(()) };
    let there = there.display();
    match most {
        None => bail!("{there} is there, a shard: --resume goes on with it with --shard"),
        Some(_) => {
            bail!("{there} is there, not in shards: --resume goes on with it without --shard")
        }
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot write {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A file to write, which no other run writes.
fn locked(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).append(true).create(true).open(path);
    let in_words = || format!("cannot write {}", path.display());
    let file = file.with_context(in_words)?;
    // What is written is read back.
    ensure!(file.metadata().with_context(in_words)?.is_file(), "{} is no file", path.display());
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => bail!("another run is writing {}", path.display()),
        // Some file systems have no locks.
        Err(TryLockError::Error(_)) | Ok(()) => Ok(file),
    }
}

/// Reads whole lines; how long they are, and how many.
fn read(path: &Path, shard: u32, each: &mut dyn FnMut(Mark, Line)) -> anyhow::Result<(u64, usize)> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let (mut offset, mut count, mut text) = (0, 0, Vec::new());
    loop {
        text.clear();
        let length = reader.by_ref().read_until(b'\n', &mut text)? as u64;
        if length == 0 {
            return Ok((offset, count));
        }
        match serde_json::from_slice::<Line>(&text) {
            Ok(line) if text.ends_with(b"\n") => each(Mark { shard, offset }, line),
            // What a run that was killed, or a full disk, has torn off.
            _ if is_torn(&text) => return Ok((offset, count)),
            _ => bail!("{}:{}: not a line of labels", path.display(), count + 1),
        }
        offset += length;
        count += 1;
    }
}

/// Whether this is a line of ours without its end.
fn is_torn(text: &[u8]) -> bool {
    const BEGIN: &[u8] = b"{\"file\":\"";
    let length = text.len().min(BEGIN.len());
    !text.ends_with(b"\n") && text[..length] == BEGIN[..length]
}

/// Refuses to drop what no run has written, such as a picture.
fn check_is_ours(path: &Path) -> anyhow::Result<()> {
    const MOST: u64 = 1 << 26;
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut first = Vec::new();
    BufReader::new(file).take(MOST).read_until(b'\n', &mut first)?;
    let is_ours = is_torn(&first) || serde_json::from_slice::<Line>(&first).is_ok();
    ensure!(is_ours, "{} holds no lines of labels, and stays", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(file: &str) -> Line {
        Line {
            file: file.to_owned(),
            width: 4,
            height: 3,
            task: "<CAPTION>".to_owned(),
            prompt: "<CAPTION>".to_owned(),
            answer: json!({ "<CAPTION>": file }),
            text: String::new(),
            scores: json!([0.5]),
            model: "tiny".to_owned(),
            sha256: None,
        }
    }

    fn found(out: &Path, most: Option<usize>) -> anyhow::Result<(Journal, Vec<String>)> {
        let mut files = Vec::new();
        let journal = Journal::open(out, most, Before::Kept, |_, line| files.push(line.file))?;
        Ok((journal, files))
    }

    #[test]
    fn a_torn_line_is_cut_off_and_the_rest_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("a.jsonl");
        let mut journal = Journal::open(&out, None, Before::Nothing, |_, _| ()).unwrap();
        let first = journal.append(&[line("a"), line("b")]).unwrap();
        assert_eq!(journal.read(first, 2).unwrap(), [line("a"), line("b")]);
        journal.append(&[line("c")]).unwrap();
        drop(journal);
        let whole = std::fs::read(&out).unwrap();
        // Without its end it may still be JSON.
        for cut in [1, 2, 20] {
            std::fs::write(&out, &whole[..whole.len() - cut]).unwrap();
            let (mut journal, files) = found(&out, None).unwrap();
            assert_eq!(files, ["a", "b"], "{cut}");
            journal.append(&[line("c")]).unwrap();
            drop(journal);
            assert_eq!(std::fs::read(&out).unwrap(), whole, "{cut}");
        }
        std::fs::write(&out, [b"{}\n", &whole[..]].concat()).unwrap();
        let error = found(&out, None).err().unwrap();
        assert!(error.to_string().ends_with("a.jsonl:1: not a line of labels"), "{error}");
    }

    #[test]
    fn what_no_run_has_written_stays() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("a.jsonl");
        for other in
            ["{\"images\": []}", "{\"images\": []}\n", "{\"file\": \"a.png\"}\n", "\u{89}PNG"]
        {
            std::fs::write(&out, other).unwrap();
            let refused = |before| Journal::open(&out, None, before, |_, _| ()).err().unwrap();
            let (kept, dropped) = (refused(Before::Kept), refused(Before::Dropped));
            assert!(kept.to_string().ends_with("a.jsonl:1: not a line of labels"), "{kept}");
            assert!(dropped.to_string().ends_with("holds no lines of labels, and stays"));
            assert_eq!(std::fs::read_to_string(&out).unwrap(), other);
        }
        std::fs::write(&out, "").unwrap();
        assert!(Journal::open(&out, None, Before::Dropped, |_, _| ()).is_ok());
    }

    #[test]
    fn an_output_goes_on_as_it_was_begun_and_has_no_empty_shard() {
        let directory = tempfile::tempdir().unwrap();
        let finished = |name: &str, most| {
            let out = directory.path().join(name);
            let mut journal = Journal::open(&out, most, Before::Nothing, |_, _| ()).unwrap();
            journal.append(&[line("a")]).unwrap();
            journal.finish().unwrap();
            out
        };
        let (whole, shards) = (finished("a.jsonl", None), finished("b.jsonl", Some(1)));
        let told = found(&whole, Some(1)).err().unwrap().to_string();
        assert!(told.contains("a.jsonl is there, not in shards"), "{told}");
        let told = found(&shards, None).err().unwrap().to_string();
        assert!(told.contains("b-00000.jsonl is there, a shard"), "{told}");
        found(&shards, Some(1)).unwrap().0.finish().unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 2);
    }

    #[test]
    fn what_is_there_is_neither_written_over_nor_by_two() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("a.jsonl");
        let journal = Journal::open(&out, None, Before::Nothing, |_, _| ()).unwrap();
        let error = Journal::open(&out, None, Before::Nothing, |_, _| ()).err().unwrap();
        assert!(error.to_string().contains("--resume goes on with it"), "{error}");
        for before in [Before::Kept, Before::Dropped] {
            let error = Journal::open(&out, None, before, |_, _| ()).err().unwrap();
            assert!(error.to_string().contains("another run is writing"), "{error}");
        }
        drop(journal);
        assert!(Journal::open(&out, None, Before::Dropped, |_, _| ()).is_ok());
    }

    #[test]
    fn a_shard_has_its_name_when_it_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("a.jsonl");
        let names = || {
            let entries = std::fs::read_dir(&directory).unwrap();
            let mut names: Vec<String> =
                entries.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let mut journal = Journal::open(&out, Some(2), Before::Nothing, |_, _| ()).unwrap();
        let marks: Vec<Mark> =
            ["a", "b", "c"].iter().map(|it| journal.append(&[line(it)]).unwrap()).collect();
        assert_eq!(names(), ["a-00000.jsonl", "a-00001.jsonl.part"]);
        assert_eq!(journal.read(marks[1], 1).unwrap(), [line("b")]);
        assert_eq!(journal.read(marks[2], 1).unwrap(), [line("c")]);
        drop(journal);
        let (mut journal, files) = found(&out, Some(2)).unwrap();
        assert_eq!(files, ["a", "b", "c"]);
        journal.append(&[line("d")]).unwrap();
        journal.append(&[line("e")]).unwrap();
        journal.finish().unwrap();
        assert_eq!(names(), ["a-00000.jsonl", "a-00001.jsonl", "a-00002.jsonl"]);
        let (journal, files) = found(&out, Some(2)).unwrap();
        assert_eq!(files, ["a", "b", "c", "d", "e"]);
        drop(journal);
        // Those that were moved away are missed, and the others not taken for nothing.
        std::fs::rename(directory.path().join("a-00000.jsonl"), directory.path().join("b"))
            .unwrap();
        let refused =
            |before| Journal::open(&out, Some(2), before, |_, _| ()).err().unwrap().to_string();
        let (missing, there) = (refused(Before::Kept), refused(Before::Nothing));
        assert!(missing.contains("a-00000.jsonl is not there"), "{missing}");
        assert!(there.contains("a-00001.jsonl is there"), "{there}");
    }
}
