//! Answer text to the JSON of the reference's `post_process_generation`.
//!
//! Labels and texts are cleaned as the native reference does (special tokens removed, trimmed).
//! Coordinates are floats by default, as in Microsoft's own code; [`Coordinates::Integer`] gives
//! the native reference's truncated integers. Nothing is clamped, ordered or merged.

mod parse;

use std::{ops::Range, str::FromStr};

use serde_json::{Value, json};

use crate::task::AnswerKind;
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

/// How many decimals of coordinates are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Decimals(Option<i32>);

impl FromStr for Decimals {
    type Err = UnknownDecimals;

    fn from_str(text: &str) -> Result<Self, UnknownDecimals> {
        if text == "all" {
            return Ok(Self(None));
        }
        let decimals = text.parse().ok().filter(|decimals| (0..=9).contains(decimals));
        decimals.map(|decimals| Self(Some(decimals))).ok_or(UnknownDecimals)
    }
}

/// There is no such number of decimals.
#[derive(Debug, thiserror::Error)]
#[error("decimals are all, or a whole number from 0 to 9")]
pub struct UnknownDecimals;

impl Decimals {
    /// An answer's JSON with rounded coordinates: it has no other numbers.
    pub(crate) fn round(self, json: &Value) -> Value {
        let Some(decimals) = self.0 else { return json.clone() };
        let unit = 10_f64.powi(decimals);
        rounded(json, unit)
    }
}

fn rounded(json: &Value, unit: f64) -> Value {
    match json {
        Value::Number(number) if number.is_f64() => {
            number.as_f64().map_or(Value::Null, |number| json!((number * unit).round() / unit))
        }
        Value::Array(list) => list.iter().map(|item| rounded(item, unit)).collect(),
        Value::Object(map) => {
            map.iter().map(|(name, value)| (name.clone(), rounded(value, unit))).collect()
        }
        other => other.clone(),
    }
}

/// Turns location bins into pixels of a picture.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// Width and height in pixels.
    pub(crate) size: (usize, usize),
    pub(crate) coordinates: Coordinates,
}

/// An answer's JSON without its name, and what its scores are of.
pub(crate) struct Parsed {
    pub(crate) json: Value,
    pub(crate) scored: Scored,
}

/// What an answer has scores of.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scored {
    /// The text as a whole.
    Text,
    /// For each label, its location tokens: their ordinals among all of the answer's.
    Locations(Vec<Range<usize>>),
}

/// Parses the decoded text (special tokens included) of an answer.
pub(crate) fn post_process(kind: AnswerKind, text: &str, scale: Scale) -> Parsed {
    let text = text.replace("<s>", "").replace("</s>", "").replace("<pad>", "");
    let (json, locations) = match kind {
        AnswerKind::Text => {
            return Parsed { json: json!(parse::strip(&text)), scored: Scored::Text };
        }
        AnswerKind::LabelledBoxes => boxes(parse::labelled_boxes(&text), scale),
        AnswerKind::Boxes => boxes(parse::boxes(&text), scale),
        AnswerKind::Phrases => boxes(parse::phrases(&text), scale),
        AnswerKind::Quads => {
            let (quads, labels, locations) = box_columns(parse::quads(&text), scale);
            (json!({ "quad_boxes": quads, "labels": labels }), locations)
        }
        AnswerKind::Polygons => {
            let (polygons, labels, locations) = shape_columns(parse::polygons(&text), scale);
            (json!({ "polygons": polygons, "labels": labels }), locations)
        }
        AnswerKind::BoxesOrPolygons => boxes_or_polygons(&text, scale),
    };
    Parsed { json, scored: Scored::Locations(locations) }
}

/// What is drawn, its labels, and its location tokens.
type Columns = (Vec<Value>, Vec<String>, Vec<Range<usize>>);

fn boxes(found: Vec<LabelledBox>, scale: Scale) -> (Value, Vec<Range<usize>>) {
    let (bboxes, labels, locations) = box_columns(found, scale);
    (json!({ "bboxes": bboxes, "labels": labels }), locations)
}

fn box_columns<const N: usize>(
    found: impl IntoIterator<Item = LabelledBox<N>>,
    scale: Scale,
) -> Columns {
    let mut columns = Columns::default();
    for item in found {
        columns.0.push(scale.points(&item.bins));
        columns.1.push(item.label);
        columns.2.push(item.first_location..item.first_location + N);
    }
    columns
}

fn shape_columns(found: Vec<Shape>, scale: Scale) -> Columns {
    let mut columns = Columns::default();
    for shape in found {
        columns.0.push(shape.polygons.iter().map(|bins| scale.points(bins)).collect());
        columns.1.push(shape.label);
        columns.2.push(shape.locations);
    }
    columns
}

fn boxes_or_polygons(text: &str, scale: Scale) -> (Value, Vec<Range<usize>>) {
    let (mut boxes, mut shapes) = (Columns::default(), Columns::default());
    if text.contains("<poly>") {
        shapes = shape_columns(parse::labelled_polygons(text), scale);
    } else {
        boxes = box_columns(parse::labelled_boxes(text), scale);
    }
    let json = json!({
        "bboxes": boxes.0,
        "bboxes_labels": boxes.1,
        "polygons": shapes.0,
        "polygons_labels": shapes.1,
    });
    (json, [boxes.2, shapes.2].concat())
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
