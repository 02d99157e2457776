//! Writes what became of pictures: answers into the journal, failures into a file of their own.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write as _},
    path::{Path, PathBuf, absolute},
};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::{
    flow::{Answers, End, Part, Ticket},
    journal::{Journal, Mark},
    progress::Progress,
    repeated::Repeated,
};
use crate::{formats::Line, whole::part};

/// What could not be answered, a JSON object a line; no file if there is nothing. Outputs may share
/// it: each line tells its own.
pub(super) struct Errors {
    path: PathBuf,
    out: String,
    file: Option<File>,
}

impl Errors {
    /// Begins anew; the lines of other outputs stay.
    pub(super) fn new(path: &Path, out: &Path) -> anyhow::Result<Self> {
        let out = absolute(out).unwrap_or_else(|_| out.to_owned()).display().to_string();
        let errors = Self { path: path.to_owned(), out, file: None };
        errors.forget().with_context(|| errors.in_words())?;
        Ok(errors)
    }

    fn forget(&self) -> io::Result<()> {
        // A device or a pipe has nothing that could be forgotten.
        if !self.path.is_file() {
            return Ok(());
        }
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            // Another run is adding to it.
            return Ok(());
        }
        let there = std::fs::read(&self.path)?;
        if std::str::from_utf8(&there).is_err() {
            return Err(io::Error::other("it is there, and no text"));
        }
        let is_ours = |line: &[u8]| {
            serde_json::from_slice(line)
                .is_ok_and(|line: Value| line["error"].is_string() && line["out"] == self.out)
        };
        let lines = || there.split_inclusive(|byte| *byte == b'\n');
        let others: Vec<&[u8]> = lines().filter(|line| !is_ours(line)).collect();
        if others.is_empty() {
            std::fs::remove_file(&self.path)
        } else if others.len() < lines().count() {
            let mut part = part(&self.path)?;
            part.write_all(&others.concat())?;
            std::fs::set_permissions(part.path(), file.metadata()?.permissions())?;
            part.persist(&self.path)?;
            Ok(())
        } else {
            Ok(())
        }
    }

    fn in_words(&self) -> String {
        format!("cannot write {}", self.path.display())
    }

    fn add(&mut self, name: &str, reason: &str) -> anyhow::Result<()> {
        if self.file.is_none() {
            let file = OpenOptions::new().append(true).create(true).open(&self.path);
            let file = file.with_context(|| self.in_words())?;
            // Where there are no locks, runs that share the file must not begin anew.
            let _ = file.try_lock_shared();
            self.file = Some(file);
        }
        let line = format!("{}\n", json!({ "file": name, "error": reason, "out": self.out }));
        let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(line.as_bytes()));
        written.with_context(|| self.in_words())
    }
}

pub(super) struct Recorder<'a> {
    pub(super) journal: Journal,
    pub(super) errors: Errors,
    pub(super) prompts: &'a [String],
    pub(super) repeated: &'a Repeated,
    pub(super) progress: &'a Progress,
    /// Hears of jobs whose ends are written.
    pub(super) ended: &'a dyn Fn(String),
}

impl Recorder<'_> {
    /// Writes an end.
    pub(super) fn take(&mut self, end: End) -> anyhow::Result<()> {
        let job = match end {
            End::Answered(mut ticket, answers) => {
                let job = ticket.job.take();
                self.answered(&ticket, answers)?;
                job
            }
            End::Same(ticket, mark) => {
                self.same(&ticket, mark)?;
                None
            }
            End::Failed(mut ticket, reason) => {
                let job = ticket.job.take();
                self.failed(&ticket.item.name, &reason)?;
                for other in ticket.asked().map(|it| self.repeated.failed(it)).unwrap_or_default() {
                    self.failed(&other.item.name, &reason)?;
                }
                job
            }
            End::Unlisted(name, reason) => {
                self.failed(&name, &reason)?;
                None
            }
            End::Lost(reason) => bail!(reason),
        };
        if let Some(job) = job {
            (self.ended)(job);
        }
        Ok(())
    }

    fn failed(&mut self, name: &str, reason: &str) -> anyhow::Result<()> {
        self.progress.failed();
        self.errors.add(name, reason)
    }

    fn answered(&mut self, ticket: &Ticket, answers: Answers) -> anyhow::Result<()> {
        let Answers { size: (width, height), model, parts } = answers;
        let sha256 = ticket.sha256.map(|sha256| hex(&sha256));
        let line = |(prompt, part): (&str, Part)| Line {
            file: ticket.item.name.clone(),
            width,
            height,
            task: part
                .answer
                .as_object()
                .and_then(|it| it.keys().next())
                .cloned()
                .unwrap_or_default(),
            prompt: prompt.to_owned(),
            answer: part.answer,
            text: part.text,
            scores: part.scores,
            model: model.clone(),
            sha256: sha256.clone(),
        };
        let lines: Vec<Line> =
            ticket.prompts(self.prompts).into_iter().zip(parts).map(line).collect();
        let mark = self.journal.append(&lines)?;
        self.progress.answered();
        for other in ticket.asked().map(|it| self.repeated.written(it, mark)).unwrap_or_default() {
            self.same(&other, mark)?;
        }
        Ok(())
    }

    /// The answers of another picture of the same bytes.
    fn same(&mut self, ticket: &Ticket, mark: Mark) -> anyhow::Result<()> {
        let asked = ticket.prompts(self.prompts);
        let mut lines = self.journal.read(mark, asked.len())?;
        let prompts: Vec<&str> = lines.iter().map(|line| line.prompt.as_str()).collect();
        ensure!(prompts == asked, "the output was changed while it was written");
        for line in &mut lines {
            line.file.clone_from(&ticket.item.name);
        }
        self.journal.append(&lines)?;
        self.progress.repeated();
        Ok(())
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
