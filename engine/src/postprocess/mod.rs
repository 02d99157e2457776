//! Answer text to the JSON of the reference's `post_process_generation`.
//!
//! Labels and texts are cleaned as the native reference does (special tokens removed, trimmed).
//! Coordinates are floats by default, as in Microsoft's own code; [`Coordinates::Integer`] gives
//! the native reference's truncated integers. Nothing is clamped, ordered or merged.

mod parse;

use std::str::FromStr;

use serde_json::{Value, json};

use crate::task::{AnswerKind, Task};
use parse::{LabelledBox, Shape};

/// How coordinates are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Coordinates {
    /// Float32 values, as in Microsoft's code.
    #[default]
    Float,
    /// Truncated toward zero, as in transformers' native code.
    Integer,
}

impl FromStr for Coordinates {
    type Err = UnknownCoordinates;

    fn from_str(name: &str) -> Result<Self, UnknownCoordinates> {
        match name {
            "float" => Ok(Self::Float),
            "int" => Ok(Self::Integer),
            _ => Err(UnknownCoordinates),
        }
    }
}

/// There is no such way to write coordinates.
#[derive(Debug, thiserror::Error)]
#[error("coordinates are float or int")]
pub struct UnknownCoordinates;

/// Turns location bins into pixels of a picture.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// Width and height in pixels.
    pub(crate) size: (usize, usize),
    pub(crate) coordinates: Coordinates,
}

/// An answer as JSON, and which location tokens each of its boxes came from.
pub(crate) struct Parsed {
    pub(crate) json: Value,
    /// Per box, the ordinal of its first location token among all of the answer's.
    pub(crate) boxes: Vec<usize>,
}

/// Parses the decoded text (special tokens included) of a task's answer.
pub(crate) fn post_process(task: Task, text: &str, scale: Scale) -> Parsed {
    let text = text.replace("<s>", "").replace("</s>", "").replace("<pad>", "");
    let (json, boxes) = match task.answer() {
        AnswerKind::Text => (json!(text.trim()), Vec::new()),
        AnswerKind::LabelledBoxes => boxes(parse::labelled_boxes(&text), scale),
        AnswerKind::Boxes => boxes(parse::boxes(&text), scale),
        AnswerKind::Phrases => boxes(parse::phrases(&text), scale),
        AnswerKind::Quads => {
            let (quads, labels): (Vec<_>, Vec<_>) =
                parse::quads(&text).map(|(label, bins)| (scale.points(&bins), label)).unzip();
            (json!({ "quad_boxes": quads, "labels": labels }), Vec::new())
        }
        AnswerKind::Polygons => {
            let found = parse::polygons(&text);
            let (polygons, labels) = shapes(&found, scale);
            (json!({ "polygons": polygons, "labels": labels }), Vec::new())
        }
        AnswerKind::BoxesOrPolygons => boxes_or_polygons(&text, scale),
    };
    Parsed { json: json!({ task.token(): json }), boxes }
}

fn boxes(found: Vec<LabelledBox>, scale: Scale) -> (Value, Vec<usize>) {
    let (bboxes, labels, ordinals) = columns(found, scale);
    (json!({ "bboxes": bboxes, "labels": labels }), ordinals)
}

fn columns(found: Vec<LabelledBox>, scale: Scale) -> (Vec<Value>, Vec<String>, Vec<usize>) {
    let mut columns = (Vec::new(), Vec::new(), Vec::new());
    for item in found {
        columns.0.push(scale.points(&item.bins));
        columns.1.push(item.label);
        columns.2.push(item.first_location);
    }
    columns
}

fn shapes(found: &[Shape], scale: Scale) -> (Vec<Value>, Vec<&str>) {
    let polygons = |shape: &Shape| shape.polygons.iter().map(|bins| scale.points(bins)).collect();
    found.iter().map(|shape| (polygons(shape), shape.label.as_str())).unzip()
}

fn boxes_or_polygons(text: &str, scale: Scale) -> (Value, Vec<usize>) {
    let (found_boxes, found_shapes) = if text.contains("<poly>") {
        (Vec::new(), parse::labelled_polygons(text))
    } else {
        (parse::labelled_boxes(text), Vec::new())
    };
    let (bboxes, bboxes_labels, ordinals) = columns(found_boxes, scale);
    let (polygons, polygons_labels) = shapes(&found_shapes, scale);
    let json = json!({
        "bboxes": bboxes,
        "bboxes_labels": bboxes_labels,
        "polygons": polygons,
        "polygons_labels": polygons_labels,
    });
    (json, ordinals)
}

impl Scale {
    /// Bins `x, y, x, y, ..` to pixels: the middle of the bin, in float32 as the reference has it.
    fn points(self, bins: &[u32]) -> Value {
        let (width, height) = self.size;
        let number = |(i, bin): (usize, &u32)| {
            let size = if i % 2 == 0 { width } else { height };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "float32 and integers, as the reference"
            )]
            let pixels = (f64::from(*bin) + 0.5) as f32 * (size as f64 / 1000.0) as f32;
            match self.coordinates {
                Coordinates::Float => json!(f64::from(pixels)),
                #[expect(clippy::cast_possible_truncation, reason = "truncated on purpose")]
                Coordinates::Integer => json!(pixels as i64),
            }
        };
        bins.iter().enumerate().map(number).collect()
    }
}

#[cfg(test)]
mod tests;
