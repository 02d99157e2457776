//! `florence draw`: an answer's boxes, quadrilaterals and polygons as outlines on its picture.

use std::path::PathBuf;

use anyhow::Context;
use image::{Rgb, RgbImage};
use serde_json::Value;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The picture
    image: PathBuf,
    /// The answer's JSON, as `run` or FLORENCE.GET .. RESULT give it
    answer: String,
    /// PNG to write
    out: PathBuf,
}

const COLOURS: [[u8; 3]; 6] =
    [[255, 0, 80], [0, 200, 255], [255, 160, 0], [120, 255, 0], [200, 80, 255], [255, 255, 0]];

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let answer: Value = serde_json::from_str(&args.answer).context("the answer is not JSON")?;
    let mut picture = image::open(&args.image)
        .with_context(|| format!("cannot read {}", args.image.display()))?
        .into_rgb8();
    let outlines = outlines(&answer);
    for (i, outline) in outlines.iter().enumerate() {
        let next = outline.iter().cycle().skip(1);
        for (from, to) in outline.iter().zip(next) {
            line(&mut picture, *from, *to, Rgb(COLOURS[i % COLOURS.len()]));
        }
    }
    picture.save(&args.out).with_context(|| format!("cannot write {}", args.out.display()))?;
    println!("{}: {} outlines", args.out.display(), outlines.len());
    Ok(())
}

type Point = (f64, f64);

/// The corners of everything an answer locates.
fn outlines(answer: &Value) -> Vec<Vec<Point>> {
    let task = answer.as_object().and_then(|object| object.values().next());
    let list =
        |name: &str| task.and_then(|task| task.get(name)?.as_array().cloned()).unwrap_or_default();
    let mut found: Vec<Vec<Point>> = Vec::new();
    for bbox in list("bboxes") {
        if let [x1, y1, x2, y2] = numbers(&bbox)[..] {
            found.push(vec![(x1, y1), (x2, y1), (x2, y2), (x1, y2)]);
        }
    }
    found.extend(list("quad_boxes").iter().map(points));
    for instance in list("polygons") {
        found.extend(instance.as_array().into_iter().flatten().map(points));
    }
    found
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

fn points(value: &Value) -> Vec<Point> {
    numbers(value).chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// A line three pixels wide.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "negative and huge coordinates saturate, and are then out of the picture"
)]
fn line(picture: &mut RgbImage, from: Point, to: Point, colour: Rgb<u8>) {
    let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).ceil().clamp(1.0, 1e5);
    for step in 0..=steps as u32 {
        let t = f64::from(step) / steps;
        let (x, y) = (from.0 + (to.0 - from.0) * t, from.1 + (to.1 - from.1) * t);
        for (dx, dy) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)] {
            let (x, y) = (x + dx, y + dy);
            if x >= 0.0
                && y >= 0.0
                && let Some(pixel) = picture.get_pixel_mut_checked(x as u32, y as u32)
            {
                *pixel = colour;
            }
        }
    }
}
