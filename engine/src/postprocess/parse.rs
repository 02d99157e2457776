//! The reference's parsers, with its own regular expressions, quirks included (docs/MODEL.md).
//!
//! Input is the answer's text without `<s>`, `</s>` and `<pad>`; output is labels and bins.

use std::{ops::Range, sync::LazyLock};

use fancy_regex::{Captures, Regex};

/// A label and one box of bins `x1, y1, x2, y2`, or a quadrilateral of eight.
pub(super) struct LabelledBox<const N: usize = 4> {
    pub(super) label: String,
    pub(super) bins: [u32; N],
    /// Ordinal of the box's first location token among all of the text's.
    pub(super) first_location: usize,
}

/// A label and its polygons, each of bins `x, y, x, y, ..`.
pub(super) struct Shape {
    pub(super) label: String,
    pub(super) polygons: Vec<Vec<u32>>,
    /// Ordinals of its location tokens among all of the text's.
    pub(super) locations: Range<usize>,
}

macro_rules! patterns {
    ($($name:ident = $pattern:expr;)*) => {
        $(static $name: LazyLock<Regex> =
            LazyLock::new(|| Regex::new($pattern).expect("a constant pattern"));)*
    };
}

patterns! {
    LABEL_AND_BOXES = r"[^<]+(?:<loc_\d+>){4,}";
    ONLY_BOXES = r"(?:<loc_\d+>){4,}";
    NAME = r"^\s*(.*?)(?=<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_)";
    NAME_OR_POLY = r"^\s*(.*?)(?=<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_|<poly>)";
    BOX = r"<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>";
    QUAD = r"(.+?)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>";
    LABEL_AND_POLYGONS = r"[^<]+(?:<loc_\d+>|<sep>|<poly>|</poly>){4,}";
    ONLY_POLYGONS = r"(?:<loc_\d+>|<sep>|<poly>|</poly>){4,}";
    POLYGON_GROUP = r"<poly>(.*?)</poly>";
    POLYGON = r"((?:<loc_\d+>)+)(?:<sep>|$)";
    LOCATION = r"<loc_(\d+)>";
}

/// Names that phrase grounding drops, case-sensitively.
const BANNED: [&str; 72] = [
    "it",
    "I",
    "me",
    "mine",
    "you",
    "your",
    "yours",
    "he",
    "him",
    "his",
    "she",
    "her",
    "hers",
    "they",
    "them",
    "their",
    "theirs",
    "one",
    "oneself",
    "we",
    "us",
    "our",
    "ours",
    "its",
    "myself",
    "yourself",
    "himself",
    "herself",
    "itself",
    "ourselves",
    "yourselves",
    "themselves",
    "this",
    "that",
    "these",
    "those",
    "who",
    "whom",
    "whose",
    "which",
    "what",
    "all",
    "another",
    "any",
    "anybody",
    "anyone",
    "anything",
    "each",
    "everybody",
    "everyone",
    "everything",
    "few",
    "many",
    "nobody",
    "none",
    "several",
    "some",
    "somebody",
    "someone",
    "something",
    "each other",
    "one another",
    "the image",
    "image",
    "images",
    "the",
    "a",
    "an",
    "a group",
    "other objects",
    "lots",
    "a set",
];

/// Labels followed by boxes; a label is repeated for each of its boxes.
pub(super) fn labelled_boxes(text: &str) -> Vec<LabelledBox> {
    chunks(&LABEL_AND_BOXES, text)
        .filter_map(|(start, chunk)| Some((start, chunk, name(&NAME, chunk)?)))
        .flat_map(|(start, chunk, name)| boxes_of(text, start, chunk, &ascii(&name)))
        .collect()
}

/// Boxes whatever stands around them, without labels.
pub(super) fn boxes(text: &str) -> Vec<LabelledBox> {
    chunks(&ONLY_BOXES, text).flat_map(|(start, chunk)| boxes_of(text, start, chunk, "")).collect()
}

/// Phrases followed by boxes, but for pronouns and the like.
pub(super) fn phrases(text: &str) -> Vec<LabelledBox> {
    chunks(&LABEL_AND_BOXES, text)
        .filter_map(|(start, chunk)| Some((start, chunk, name(&NAME, chunk)?)))
        .filter(|(_, _, name)| !BANNED.contains(&name.as_str()))
        .flat_map(|(start, chunk, name)| boxes_of(text, start, chunk, &ascii(&name)))
        .collect()
}

/// Words followed by the eight bins of a quadrilateral.
pub(super) fn quads(text: &str) -> impl Iterator<Item = LabelledBox<8>> {
    QUAD.captures_iter(text).map_while(Result::ok).map(|found| LabelledBox {
        label: strip(found.get(1).map_or("", |m| m.as_str())).to_owned(),
        bins: std::array::from_fn(|i| bin(&found, i + 2)),
        first_location: locations(text, found.get(1).map_or(0, |m| m.end())),
    })
}

/// Polygons without labels.
pub(super) fn polygons(text: &str) -> Vec<Shape> {
    shapes(&ONLY_POLYGONS, text)
}

/// Labels followed by polygons.
pub(super) fn labelled_polygons(text: &str) -> Vec<Shape> {
    shapes(&LABEL_AND_POLYGONS, text)
}

fn shapes(pattern: &'static Regex, text: &str) -> Vec<Shape> {
    chunks(pattern, text)
        .filter_map(|(start, chunk)| Some((start, chunk, name(&NAME_OR_POLY, chunk)?)))
        .flat_map(|(start, chunk, name)| shapes_of(text, start, chunk, &name))
        .filter(|shape| !shape.polygons.is_empty())
        .collect()
}

fn chunks<'t>(pattern: &'static Regex, text: &'t str) -> impl Iterator<Item = (usize, &'t str)> {
    pattern.find_iter(text).map_while(Result::ok).map(|found| (found.start(), found.as_str()))
}

fn name(pattern: &Regex, chunk: &str) -> Option<String> {
    Some(strip(pattern.find(chunk).ok()??.as_str()).to_owned())
}

/// Without blanks at the ends; to Python, four separators are blanks too.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// The reference drops other characters from labels of boxes, after trimming.
fn ascii(name: &str) -> String {
    name.chars().filter(char::is_ascii).collect()
}

fn bin(found: &Captures<'_>, group: usize) -> u32 {
    found.get(group).and_then(|digits| digits.as_str().parse().ok()).unwrap_or(u32::MAX)
}

/// The boxes of a chunk that begins at `start` of `text`; one to three left-over bins are ignored.
fn boxes_of(text: &str, start: usize, chunk: &str, label: &str) -> Vec<LabelledBox> {
    let whole = |found: Captures<'_>| {
        let at = start + found.get(0).map_or(0, |m| m.start());
        LabelledBox {
            label: label.to_owned(),
            bins: std::array::from_fn(|i| bin(&found, i + 1)),
            first_location: locations(text, at),
        }
    };
    BOX.captures_iter(chunk).map_while(Result::ok).map(whole).collect()
}

/// Location tokens in the first bytes of a text.
fn locations(text: &str, bytes: usize) -> usize {
    text[..bytes].matches("<loc_").count()
}

/// One shape for each `<poly>..</poly>` of a chunk that begins at `start` of `text`, or one for the
/// whole chunk if there is none.
fn shapes_of(text: &str, start: usize, chunk: &str, label: &str) -> Vec<Shape> {
    let shape = |part: Range<usize>| {
        // A chunk may begin within a broken token.
        let first = chunk[part.clone()].find("<loc_").map_or(part.end, |at| part.start + at);
        Shape {
            label: label.to_owned(),
            polygons: polygons_of(&chunk[part.clone()]),
            locations: locations(text, start + first)..locations(text, start + part.end),
        }
    };
    if chunk.contains("<poly>") && chunk.contains("</poly>") {
        let groups = POLYGON_GROUP.captures_iter(chunk).map_while(Result::ok);
        return groups.map(|found| shape(found.get(1).map_or(0..0, |m| m.range()))).collect();
    }
    vec![shape(0..chunk.len())]
}

/// Runs of bins, separated by `<sep>`; an odd last bin is dropped.
fn polygons_of(part: &str) -> Vec<Vec<u32>> {
    let runs = POLYGON.captures_iter(part).map_while(Result::ok);
    runs.map(|run| {
        let run = run.get(1).map_or("", |m| m.as_str());
        let found = LOCATION.captures_iter(run).map_while(Result::ok);
        let mut bins: Vec<u32> = found.map(|found| bin(&found, 1)).collect();
        bins.truncate(bins.len() / 2 * 2);
        bins
    })
    .collect()
}
