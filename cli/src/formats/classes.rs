//! Labels as classes: which of them are meant, what they are called, and in which order.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use anyhow::{Context, ensure};

use crate::{draw::Mark, limits::within};

/// What an object is called that nothing names.
const NAMELESS: &str = "object";

#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ClassArgs {
    /// Labels that are meant, in the order of their classes: NAME,NAME or a file of them, one a line;
    /// LABEL=NAME gives a label another name (default: all labels, in the order of the alphabet)
    #[arg(long, value_name = "NAMES|FILE")]
    classes: Option<String>,
    /// Leave out objects of a lower score; what has none stays
    #[arg(long, value_name = "0..1", value_parser = within::<f64>(0.0..=1.0))]
    min_score: Option<f64>,
    /// Leave out objects of a smaller area, in square pixels
    #[arg(long, value_name = "PIXELS", value_parser = within::<f64>(0.0..=1e12))]
    min_area: Option<f64>,
    /// Take only the answers of this task, such as `<OD>`; may be repeated
    #[arg(long, value_name = "TASK")]
    pub(super) only: Vec<String>,
}

impl ClassArgs {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        Classes::wanted(self).map(drop)
    }

    pub(super) fn takes(&self, task: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == task)
    }

    /// Whether an object is large and sure enough.
    pub(super) fn keeps(&self, mark: &Mark, area: f64) -> bool {
        let is_sure = mark.score.zip(self.min_score).is_none_or(|(score, least)| score >= least);
        is_sure && self.min_area.is_none_or(|least| area >= least)
    }
}

/// The classes, and which labels are of them.
#[derive(Debug, Default)]
pub(super) struct Classes {
    pub(super) names: Vec<String>,
    by_label: HashMap<String, usize>,
    by_name: HashMap<String, usize>,
}

impl Classes {
    /// Those that are asked for; `None` if they are to be made of the labels that there are.
    pub(super) fn wanted(args: &ClassArgs) -> anyhow::Result<Option<Self>> {
        let Some(given) = &args.classes else { return Ok(None) };
        let is_file = Path::new(given).is_file();
        let ending = Path::new(given).extension();
        let is_meant = ending.is_some_and(|it| it == "txt" || it == "names");
        ensure!(is_file || !is_meant, "there is no file {given}");
        let text = if is_file {
            std::fs::read_to_string(given).with_context(|| format!("cannot read {given}"))?
        } else {
            given.replace(',', "\n")
        };
        let mut classes = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (label, name) = line.split_once('=').unwrap_or((line, line));
            classes.add(label.trim(), name.trim());
        }
        ensure!(!classes.names.is_empty(), "--classes names no class");
        Ok(Some(classes))
    }

    pub(super) fn of(labels: BTreeSet<String>) -> Self {
        let mut classes = Self::default();
        for label in labels {
            classes.add(&label, &label);
        }
        classes
    }

    fn add(&mut self, label: &str, name: &str) {
        let next = self.names.len();
        let class = *self.by_name.entry(name.to_owned()).or_insert(next);
        if class == next {
            self.names.push(name.to_owned());
        }
        self.by_label.insert(label.to_owned(), class);
    }

    pub(super) fn class(&self, label: &str) -> Option<usize> {
        self.by_label.get(label).copied()
    }
}

/// A label as classes are made of it.
pub(super) fn label(mark: &Mark) -> &str {
    let label = mark.label.trim();
    if label.is_empty() { NAMELESS } else { label }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_mapped_to_classes_in_the_order_given() {
        let args =
            ClassArgs { classes: Some("car, lorry = car,person".into()), ..Default::default() };
        let classes = Classes::wanted(&args).unwrap().unwrap();
        assert_eq!(classes.names, ["car", "person"]);
        let of = ["car", "lorry", "person", "cat"].map(|label| classes.class(label));
        assert_eq!(of, [Some(0), Some(0), Some(1), None]);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("names.txt");
        std::fs::write(&file, "traffic light\n\na, b\n").unwrap();
        let args = ClassArgs { classes: Some(file.display().to_string()), ..Default::default() };
        assert_eq!(Classes::wanted(&args).unwrap().unwrap().names, ["traffic light", "a, b"]);
        assert!(ClassArgs { classes: Some(",".into()), ..Default::default() }.check().is_err());
        let no_file = ClassArgs { classes: Some("missing.txt".into()), ..Default::default() };
        assert!(no_file.check().is_err());
    }
}
