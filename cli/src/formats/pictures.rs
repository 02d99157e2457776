//! The lines of `florence label`, by picture: what was found on it, in pixels of it and as classes.
//!
//! Lines stay where they are: of each picture only their places are kept, so a format may look at all
//! pictures as often as it likes.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use florence_engine::Stop;
use indexmap::IndexMap;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{
    FormatArgs, Line,
    classes::{self, ClassArgs, Classes},
};
use crate::draw::{Findings, Kind, Mark, Point};

/// A picture and what is said of it.
#[derive(Debug)]
pub(super) struct Picture {
    /// From 1.
    pub(super) id: usize,
    /// As the lines have it.
    pub(super) file: String,
    /// The same, relative to the root.
    pub(super) name: String,
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) model: String,
    /// A line's each.
    pub(super) prompts: Vec<String>,
    pub(super) objects: Vec<Object>,
    pub(super) texts: Vec<Said>,
}

/// Something that was found.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) class: usize,
    pub(super) label: String,
    pub(super) score: Option<f64>,
    pub(super) is_box: bool,
    /// Within the picture: x1, y1, x2, y2.
    pub(super) bounds: [f64; 4],
    /// Within the picture; of a box, its corners.
    pub(super) outlines: Vec<Vec<Point>>,
    pub(super) area: f64,
    /// By its place in `prompts`.
    pub(super) prompt: usize,
}

/// Something that was said.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) text: String,
    pub(super) score: Option<f64>,
    pub(super) prompt: usize,
}

/// Where a line is.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    offset: u64,
}

pub(super) struct Pictures {
    labels: Vec<PathBuf>,
    /// By a hash of the picture's name, in the order of their first lines.
    places: IndexMap<u128, Vec<Place>>,
    root: Option<PathBuf>,
    args: ClassArgs,
    stop: Stop,
    pub(super) classes: Classes,
    pub(super) has_objects: bool,
    pub(super) has_texts: bool,
}

impl Pictures {
    pub(super) fn new(labels: &[PathBuf], args: &FormatArgs, stop: &Stop) -> anyhow::Result<Self> {
        let (root, args) = (args.root.clone(), &args.classes);
        let mut pictures = Self {
            labels: labels.to_vec(),
            places: IndexMap::new(),
            root,
            args: args.clone(),
            stop: stop.clone(),
            classes: Classes::default(),
            has_objects: false,
            has_texts: false,
        };
        let (wanted, mut found) = (Classes::wanted(args)?, BTreeSet::new());
        let mut missing: BTreeSet<&str> = args.only.iter().map(String::as_str).collect();
        let mut is_below_root = pictures.root.is_none();
        for (file, path) in labels.iter().enumerate() {
            let mut reader = Lines::open(path)?;
            while let Some((offset, line)) = reader.next()? {
                pictures.go_on()?;
                let places = pictures.places.entry(xxh3_128(line.file.as_bytes())).or_default();
                places.push(Place { file, offset });
                is_below_root |= pictures.relative(&line.file).is_some();
                missing.remove(&*line.task);
                if !args.takes(&line.task) {
                    continue;
                }
                let findings = findings(&line);
                pictures.has_texts |= !findings.texts.is_empty();
                for (mark, shape) in objects(&findings, &line) {
                    pictures.has_objects = true;
                    if args.keeps(mark, shape.area) && wanted.is_none() {
                        found.insert(classes::label(mark).to_owned());
                    }
                }
            }
        }
        if let (Some(task), false) = (missing.first(), pictures.places.is_empty()) {
            bail!("--only {task}: no answer is of this task");
        }
        if let (Some(root), false) = (&pictures.root, is_below_root || pictures.places.is_empty()) {
            bail!("--root {}: no picture's name begins with it", root.display());
        }
        pictures.classes = wanted.unwrap_or_else(|| Classes::of(found));
        Ok(pictures)
    }

    /// The files of labels, and of pictures as far as they are files here.
    pub(super) fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut files = self.labels.clone();
        self.each(|picture| {
            files.push(PathBuf::from(&picture.file));
            Ok(())
        })?;
        Ok(files)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// An error once somebody has asked to end.
    fn go_on(&self) -> anyhow::Result<()> {
        ensure!(!self.stop.is_stopped(), "stopped; florence convert writes formats from the lines");
        Ok(())
    }

    /// Shows every picture, in the order of their first lines.
    pub(super) fn each(
        &self,
        mut show: impl FnMut(&Picture) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut readers: Vec<Lines> =
            self.labels.iter().map(|path| Lines::open(path)).collect::<Result<_, _>>()?;
        for (id, places) in (1..).zip(self.places.values()) {
            self.go_on()?;
            let mut lines: Vec<Line> = Vec::new();
            for place in places {
                let (_, line) = readers[place.file].at(place.offset)?.context("a line is gone")?;
                // Of two answers to one prompt the later counts, and of two pictures of one name.
                lines.retain(|other| other.prompt != line.prompt && is_alike(other, &line));
                lines.push(line);
            }
            show(&self.picture(id, &lines)?)?;
        }
        Ok(())
    }

    fn picture(&self, id: usize, lines: &[Line]) -> anyhow::Result<Picture> {
        let first = lines.first().context("a line is gone")?;
        let mut picture = Picture {
            id,
            file: first.file.clone(),
            name: self.name(&first.file),
            width: first.width,
            height: first.height,
            model: first.model.clone(),
            prompts: Vec::new(),
            objects: Vec::new(),
            texts: Vec::new(),
        };
        for line in lines.iter().filter(|line| self.args.takes(&line.task)) {
            let prompt = picture.prompts.len();
            picture.prompts.push(line.prompt.clone());
            let findings = findings(line);
            for (mark, shape) in objects(&findings, line) {
                let class = self.classes.class(classes::label(mark));
                let Some(class) = class.filter(|_| self.args.keeps(mark, shape.area)) else {
                    continue;
                };
                let (score, label) = (mark.score, self.classes.names[class].clone());
                picture.objects.push(Object { class, label, score, prompt, ..shape });
            }
            for text in findings.texts {
                picture.texts.push(Said { text: text.text, score: text.score, prompt });
            }
        }
        Ok(picture)
    }

    fn name(&self, file: &str) -> String {
        self.relative(file).map_or_else(|| file.to_owned(), |path| path.display().to_string())
    }

    fn relative<'a>(&self, file: &'a str) -> Option<&'a Path> {
        let root = self.root.as_ref()?;
        Path::new(file).strip_prefix(root.strip_prefix("./").unwrap_or(root)).ok()
    }
}

impl Picture {
    /// A path for the picture below a folder of files: without what would lead out of it, or is too
    /// long for a name.
    pub(super) fn below(&self) -> PathBuf {
        let path = self.name.split_once("://").map_or(&*self.name, |(_, path)| path);
        let plain = Path::new(path).components().filter_map(|component| match component {
            Component::Normal(part) => Some(short(&part.to_string_lossy()).into_owned()),
            _ => None,
        });
        plain.collect()
    }
}

/// Whether two lines are about the same picture, as far as they tell.
fn is_alike(one: &Line, other: &Line) -> bool {
    let both = one.sha256.as_ref().zip(other.sha256.as_ref());
    (one.width, one.height) == (other.width, other.height)
        && both.is_none_or(|(one, other)| one == other)
}

/// A name that leaves room for an ending; what is cut off is told by its hash.
fn short(name: &str) -> Cow<'_, str> {
    const MOST: usize = 220;
    if name.len() <= MOST {
        return name.into();
    }
    format!("{}-{:016x}", &name[..name.floor_char_boundary(MOST)], xxh3_64(name.as_bytes())).into()
}

fn findings(line: &Line) -> Findings {
    let mut findings = Findings::read(&line.answer, &line.scores);
    findings.ask(std::slice::from_ref(&line.prompt), (line.width as f64, line.height as f64));
    findings
}

/// What has a place and a size on the picture.
fn objects<'a>(findings: &'a Findings, line: &'a Line) -> impl Iterator<Item = (&'a Mark, Object)> {
    let (width, height) = (line.width as f64, line.height as f64);
    let found = findings.marks.iter().filter(|mark| mark.kind != Kind::Region);
    found.filter_map(move |mark| {
        let clamp = |(x, y): &Point| (x.clamp(0.0, width), y.clamp(0.0, height));
        let is_box = mark.kind == Kind::Box;
        let outlines: Vec<Vec<Point>> = mark
            .outlines
            .iter()
            .map(|outline| outline.iter().map(clamp).collect::<Vec<_>>())
            .filter(|outline| outline.len() >= 3)
            .collect();
        let bounds = bounds(outlines.iter().flatten())?;
        let area = outlines.iter().map(|outline| area(outline)).sum();
        let shape = Object {
            class: 0,
            label: String::new(),
            score: None,
            is_box,
            bounds,
            outlines,
            area,
            prompt: 0,
        };
        Some((mark, shape))
    })
}

/// The box around some points, unless it is empty.
fn bounds<'a>(points: impl Iterator<Item = &'a Point>) -> Option<[f64; 4]> {
    let start = [f64::INFINITY, f64::INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY];
    let bounds = points
        .fold(start, |[x1, y1, x2, y2], (x, y)| [x1.min(*x), y1.min(*y), x2.max(*x), y2.max(*y)]);
    (bounds[0] < bounds[2] && bounds[1] < bounds[3]).then_some(bounds)
}

/// Of a polygon, by the shoelace formula.
fn area(outline: &[Point]) -> f64 {
    let next = outline.iter().cycle().skip(1);
    let twice: f64 = outline.iter().zip(next).map(|(a, b)| a.0 * b.1 - b.0 * a.1).sum();
    twice.abs() / 2.0
}

/// Reads lines, and knows where it is.
struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    offset: u64,
    number: usize,
}

impl Lines {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let reader = BufReader::with_capacity(1 << 18, file);
        Ok(Self { path: path.to_owned(), reader, offset: 0, number: 0 })
    }

    /// The next line, and where it begins.
    fn next(&mut self) -> anyhow::Result<Option<(u64, Line)>> {
        let mut text = Vec::new();
        let (offset, length) = (self.offset, self.reader.read_until(b'\n', &mut text)?);
        self.number += 1;
        if length == 0 {
            return Ok(None);
        }
        self.offset += length as u64;
        match serde_json::from_slice(&text) {
            Ok(line) => Ok(Some((offset, line))),
            // A run that was killed, or a full disk, has torn it off; `label --resume` cuts it off.
            Err(_) if !text.ends_with(b"\n") => {
                eprintln!(
                    "{}:{}: the last line is torn, and left out",
                    self.path.display(),
                    self.number
                );
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| {
                format!("{}:{}: not a line of labels", self.path.display(), self.number)
            }),
        }
    }

    fn at(&mut self, offset: u64) -> anyhow::Result<Option<(u64, Line)>> {
        if self.offset != offset {
            self.reader.seek(SeekFrom::Start(offset))?;
            self.offset = offset;
        }
        self.next()
    }
}
