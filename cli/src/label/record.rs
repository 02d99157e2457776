//! Writes what became of pictures: answers into the journal, failures into a file of their own.

use std::{
    fmt::Write as _,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use serde_json::json;

use super::{
    flow::{Answers, End, Part, Ticket},
    journal::{Journal, Mark, remove},
    progress::Progress,
    repeated::Repeated,
};
use crate::formats::Line;

/// What could not be answered, a JSON object a line; no file if there is nothing.
pub(super) struct Errors {
    path: PathBuf,
    file: Option<File>,
}

impl Errors {
    /// Begins anew.
    pub(super) fn new(path: &Path) -> anyhow::Result<Self> {
        remove(path)?;
        Ok(Self { path: path.to_owned(), file: None })
    }

    fn add(&mut self, name: &str, reason: &str) -> anyhow::Result<()> {
        let in_words = || format!("cannot write {}", self.path.display());
        if self.file.is_none() {
            self.file = Some(File::create(&self.path).with_context(in_words)?);
        }
        if let Some(file) = &mut self.file {
            let line = format!("{}\n", json!({ "file": name, "error": reason }));
            file.write_all(line.as_bytes()).with_context(in_words)?;
        }
        Ok(())
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
