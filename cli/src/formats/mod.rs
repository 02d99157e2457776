//! Answers in the formats of other tools, written from the lines of `florence label` alone.
//!
//! A checklist to add a format: a file with a function `write`, a row in [`FORMATS`], a section of
//! docs/LABEL.md, and a test that reads it as the tool does.

mod captions;
mod classes;
mod coco;
mod csv;
mod cvat;
mod fiftyone;
mod finetune;
mod label_studio;
mod labelme;
mod labels;
mod masks;
mod metadata;
mod names;
mod out;
mod pictures;
mod voc;
mod xml;
mod yolo;

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use classes::ClassArgs;
use florence_engine::Stop;
pub(crate) use labels::Line;
use out::Out;
pub(crate) use out::place;
use pictures::Pictures;

/// A way to write all pictures to a file or folder.
type Write = fn(&Pictures, &Out<'_>, &Path) -> anyhow::Result<()>;

struct Format {
    name: &'static str,
    /// Where it goes if nobody says so, after the name of the lines; `None` beside the pictures.
    ending: Option<&'static str>,
    write: Write,
}

const fn format(name: &'static str, ending: &'static str, write: Write) -> Format {
    Format { name, ending: Some(ending), write }
}

const FORMATS: [Format; 14] = [
    Format { name: "captions", ending: None, write: captions::write },
    format("metadata", ".metadata.jsonl", metadata::write),
    format("coco", ".coco.json", coco::write),
    format("coco-results", ".results.json", coco::write_results),
    format("yolo", ".yolo", yolo::write),
    format("yolo-seg", ".yolo-seg", yolo::write_polygons),
    format("florence", ".florence.jsonl", finetune::write),
    format("csv", ".csv", csv::write),
    format("voc", ".voc", voc::write),
    format("labelme", ".labelme", labelme::write),
    format("label-studio", ".label-studio.json", label_studio::write),
    format("cvat", ".cvat.xml", cvat::write),
    format("fiftyone", ".fiftyone.json", fiftyone::write),
    format("masks", ".masks", masks::write),
];

/// The names of all formats.
pub(crate) fn names() -> String {
    FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ")
}

#[derive(clap::Args)]
pub(crate) struct FormatArgs {
    /// Write this format too: captions, metadata, coco, coco-results, yolo, yolo-seg, florence, csv,
    /// voc, labelme, label-studio, cvat, fiftyone or masks; to PATH, or a name made of the output's
    #[arg(long = "format", value_name = "FORMAT[=PATH]")]
    formats: Vec<Wanted>,
    /// Folder that the names of pictures in the formats are relative to
    #[arg(long, value_name = "DIRECTORY")]
    root: Option<PathBuf>,
    #[command(flatten)]
    classes: ClassArgs,
}

#[derive(Clone)]
struct Wanted {
    format: &'static Format,
    path: Option<PathBuf>,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) => (name, Some(PathBuf::from(path))),
            None => (text, None),
        };
        let format = FORMATS.iter().find(|format| format.name == name);
        let format = format.ok_or_else(|| format!("the formats are {}", names()))?;
        Ok(Self { format, path })
    }
}

impl FormatArgs {
    pub(crate) fn is_empty(&self) -> bool {
        self.formats.is_empty()
    }

    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.classes.check()
    }

    /// Where all goes that has a place of its own.
    pub(crate) fn paths(&self, named: &Path) -> impl Iterator<Item = PathBuf> {
        let paths = self.formats.iter().map(|wanted| wanted.path(named));
        paths.filter(|path| !path.as_os_str().is_empty())
    }
}

impl Wanted {
    /// Empty for what goes beside the pictures.
    fn path(&self, named: &Path) -> PathBuf {
        match (&self.path, self.format.ending) {
            (Some(path), _) => path.clone(),
            (None, Some(ending)) => {
                let mut name = named.file_stem().unwrap_or_default().to_owned();
                name.push(ending);
                named.with_file_name(name)
            }
            (None, None) => PathBuf::new(),
        }
    }
}

/// Writes all that is wanted, from these files of lines; over what is there only if it may.
pub(crate) fn write(
    labels: &[PathBuf],
    named: &Path,
    args: &FormatArgs,
    may_write_over: bool,
    stop: &Stop,
) -> anyhow::Result<()> {
    if args.formats.is_empty() {
        return Ok(());
    }
    let pictures = Pictures::new(labels, args, stop)?;
    if pictures.len() == 0 {
        tellln!("there are no pictures, and so no formats");
        return Ok(());
    }
    let out = Out::new(&pictures, may_write_over);
    let mut failed = Vec::new();
    for wanted in &args.formats {
        let (name, path) = (wanted.format.name, wanted.path(named));
        if let Err(error) = (wanted.format.write)(&pictures, &out, &path) {
            failed.push(error.context(format!("cannot write the format {name}")));
            if stop.is_stopped() {
                break;
            }
            continue;
        }
        let to = if path.as_os_str().is_empty() {
            "files beside the pictures".to_owned()
        } else {
            path.display().to_string()
        };
        tellln!("{name}: {} pictures in {to}", pictures.len());
    }
    failed.extend(out.finish().err());
    // All are told of, whichever is the last.
    let last = failed.pop();
    for error in failed {
        eprintln!("Error: {error:#}");
    }
    last.map_or(Ok(()), Err)
}
