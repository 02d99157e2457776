//! An answer on its picture's pixels.

use image::{Rgb, RgbImage};
use tiny_skia::{
    Color, FillRule, LineJoin, Paint, Path, PathBuilder, Pixmap, PremultipliedColorU8, Stroke,
    StrokeDash, Transform,
};

use super::{
    layout::{Layout, Line, Rect, Type, colour, ink},
    marks::{Findings, Kind, Mark, Point},
};

/// Of what polygons are filled with.
const FILL: f32 = 0.35;
const PAPER: [u8; 3] = [255; 3];
const INK: [u8; 3] = [20; 3];

/// The picture with its marks, and with the texts on a strip below it.
pub(super) fn paint(picture: &RgbImage, marks: &Findings) -> anyhow::Result<RgbImage> {
    let (width, height) = picture.dimensions();
    let layout = Layout::new(marks, (width as f32, height as f32))?;
    let letters = Type::new(layout.font_size)?;
    let whole = height + whole_pixels(layout.caption_height);
    let mut canvas = Pixmap::new(width, whole)
        .ok_or_else(|| anyhow::anyhow!("a picture of {width} x {whole} cannot be drawn on"))?;
    canvas.fill(solid(PAPER, 1.0));
    for (pixel, Rgb([r, g, b])) in canvas.pixels_mut().iter_mut().zip(picture.pixels()) {
        *pixel = opaque([*r, *g, *b]);
    }
    for mark in &marks.marks {
        outline(&mut canvas, mark, layout.stroke);
    }
    for label in &layout.labels {
        back(&mut canvas, label.back, label.colour);
        text(&mut canvas, &letters, &label.line, ink(label.colour));
    }
    for line in &layout.captions {
        text(&mut canvas, &letters, line, INK);
    }
    let pixels = canvas.pixels().iter().flat_map(|it| [it.red(), it.green(), it.blue()]).collect();
    RgbImage::from_raw(width, whole, pixels).ok_or_else(|| anyhow::anyhow!("a pixel is missing"))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small height")]
fn whole_pixels(height: f32) -> u32 {
    height.ceil() as u32
}

fn opaque([r, g, b]: [u8; 3]) -> PremultipliedColorU8 {
    PremultipliedColorU8::from_rgba(r, g, b, u8::MAX).unwrap_or(PremultipliedColorU8::TRANSPARENT)
}

fn solid([r, g, b]: [u8; 3], alpha: f32) -> Color {
    let [r, g, b] = [r, g, b].map(|channel| f32::from(channel) / 255.0);
    Color::from_rgba(r, g, b, alpha).unwrap_or(Color::BLACK)
}

fn paint_of(colour: [u8; 3], alpha: f32) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color(solid(colour, alpha));
    paint
}

/// The closed path of some outlines; none, if a point is nowhere.
#[expect(clippy::cast_possible_truncation, reason = "places in a picture")]
fn path(outlines: &[Vec<Point>]) -> Option<Path> {
    const FAR: f64 = 1e6;
    let mut path = PathBuilder::new();
    for outline in outlines {
        let place =
            |point: &Point| (point.0.clamp(-FAR, FAR) as f32, point.1.clamp(-FAR, FAR) as f32);
        let mut points = outline.iter().map(place);
        let (x, y) = points.next()?;
        path.move_to(x, y);
        points.for_each(|(x, y)| path.line_to(x, y));
        path.close();
    }
    path.finish()
}

fn outline(canvas: &mut Pixmap, mark: &Mark, width: f32) {
    let Some(path) = path(&mark.outlines) else { return };
    let place = Transform::identity();
    if mark.kind == Kind::Polygon {
        canvas.fill_path(&path, &paint_of(colour(mark), FILL), FillRule::EvenOdd, place, None);
    }
    let dash = (mark.kind == Kind::Region)
        .then(|| StrokeDash::new(vec![4.0 * width, 3.0 * width], 0.0))
        .flatten();
    let mut stroke =
        Stroke { width: width * 2.0, line_join: LineJoin::Round, dash, ..Stroke::default() };
    // A dark line under it, so that it is seen on its own colour.
    canvas.stroke_path(&path, &paint_of([0; 3], 0.35), &stroke, place, None);
    stroke.width = width;
    canvas.stroke_path(&path, &paint_of(colour(mark), 1.0), &stroke, place, None);
}

fn back(canvas: &mut Pixmap, rect: Rect, colour: [u8; 3]) {
    if let Some(rect) = tiny_skia::Rect::from_xywh(rect.x, rect.y, rect.width, rect.height) {
        canvas.fill_rect(rect, &paint_of(colour, 0.92), Transform::identity(), None);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "places are in the canvas, and colours between two colours"
)]
fn text(canvas: &mut Pixmap, letters: &Type, line: &Line, ink: [u8; 3]) {
    let (width, height) = (canvas.width(), canvas.height());
    letters.paint(line, |x, y, coverage| {
        if x < 0.0 || y < 0.0 || x as u32 >= width || y as u32 >= height {
            return;
        }
        let at = y as usize * width as usize + x as usize;
        if let Some(pixel) = canvas.pixels_mut().get_mut(at) {
            let share = coverage.clamp(0.0, 1.0);
            let mix = |below: u8, above: u8| {
                (f32::from(below) * (1.0 - share) + f32::from(above) * share).round() as u8
            };
            *pixel = opaque([
                mix(pixel.red(), ink[0]),
                mix(pixel.green(), ink[1]),
                mix(pixel.blue(), ink[2]),
            ]);
        }
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::draw::layout::COLOURS;

    fn painted(result: &serde_json::Value, size: (u32, u32)) -> RgbImage {
        let picture = RgbImage::from_pixel(size.0, size.1, Rgb([255; 3]));
        paint(&picture, &Findings::read(result, &json!([0.75]))).unwrap()
    }

    #[test]
    fn a_box_is_where_its_coordinates_are() {
        let drawn = painted(
            &json!({ "<OD>": { "bboxes": [[50, 60, 250, 160]], "labels": [""] }}),
            (300, 200),
        );
        assert_eq!(drawn.dimensions(), (300, 200));
        let colour = Rgb(COLOURS[0]);
        for (x, y) in [(150, 60), (150, 159), (50, 110), (249, 110)] {
            let near = (-2..=2_i32).any(|d| {
                let (x, y) = (x + d, y + d);
                *drawn.get_pixel(x.unsigned_abs(), y.unsigned_abs()) == colour
            });
            assert!(near, "no line near {x}, {y}");
        }
        assert_eq!(*drawn.get_pixel(150, 110), Rgb([255; 3]));
        assert_eq!(*drawn.get_pixel(10, 190), Rgb([255; 3]));
    }

    #[test]
    fn polygons_are_filled_and_the_picture_shows_through() {
        let result = json!({ "<REFERRING_EXPRESSION_SEGMENTATION>":
            { "polygons": [[[20, 20, 180, 20, 180, 180, 20, 180]]], "labels": [""] }});
        let drawn = painted(&result, (200, 200));
        let Rgb(found) = *drawn.get_pixel(100, 100);
        for (found, colour) in found.into_iter().zip(COLOURS[0]) {
            let expected = 255.0 * (1.0 - FILL) + f32::from(colour) * FILL;
            assert!((f32::from(found) - expected).abs() < 2.0, "{found} {expected}");
        }
    }

    #[test]
    fn texts_are_below_the_picture() {
        let drawn = painted(&json!({ "<CAPTION>": "a cat on a mat" }), (200, 100));
        assert_eq!(drawn.width(), 200);
        assert!(drawn.height() > 110);
        let dark = drawn.enumerate_pixels().filter(|(_, y, pixel)| *y > 100 && pixel.0[0] < 100);
        assert!(dark.count() > 50);
        assert!(drawn.enumerate_pixels().all(|(_, y, pixel)| y >= 100 || pixel.0 == [255; 3]));
    }

    #[test]
    fn coordinates_far_outside_are_no_danger() {
        let result = json!({ "<OD>": { "bboxes": [[-1e300, 0, 1e300, 5], [1e9, 1e9, 2e9, 2e9]],
            "labels": ["a", "b"] }});
        assert_eq!(painted(&result, (50, 40)).dimensions(), (50, 40));
    }
}
