//! Where labels and captions go: measured with the font that is part of the program, so that what is
//! painted and what an SVG shows are laid out alike.

use ab_glyph::{Font, FontRef, PxScale, ScaleFont};

use super::marks::{Findings, Kind, Mark, Point};

pub(super) const FAMILY: &str = "DejaVu Sans, sans-serif";

/// Of equal luminance as far as may be, so that neighbours are told apart by their hue.
pub(super) const COLOURS: [[u8; 3]; 10] = [
    [230, 25, 75],
    [0, 130, 200],
    [60, 180, 75],
    [245, 130, 48],
    [145, 30, 180],
    [0, 170, 170],
    [240, 50, 230],
    [170, 110, 40],
    [128, 128, 0],
    [255, 225, 25],
];

pub(super) fn colour(mark: &Mark) -> [u8; 3] {
    COLOURS[mark.colour % COLOURS.len()]
}

/// Black or white, whichever is read better on a colour.
pub(super) fn ink([r, g, b]: [u8; 3]) -> [u8; 3] {
    let linear = |channel: u8| (f64::from(channel) / 255.0).powf(2.2);
    let luminance = 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    // Where the contrast to either is the same.
    if luminance > 0.179 { [0; 3] } else { [255; 3] }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rect {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) width: f32,
    pub(super) height: f32,
}

impl Rect {
    fn overlaps(&self, other: &Self) -> bool {
        self.x < other.x + other.width
            && other.x < self.x + self.width
            && self.y < other.y + other.height
            && other.y < self.y + self.height
    }
}

/// A line of text, and where it begins.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) text: String,
    pub(super) x: f32,
    pub(super) baseline: f32,
}

#[derive(Debug)]
pub(super) struct Label {
    /// Which mark it belongs to.
    pub(super) mark: usize,
    pub(super) back: Rect,
    pub(super) line: Line,
    pub(super) colour: [u8; 3],
}

/// What is drawn beside the outlines.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) font_size: f32,
    pub(super) stroke: f32,
    pub(super) labels: Vec<Label>,
    pub(super) captions: Vec<Line>,
    /// What the captions add below the picture.
    pub(super) caption_height: f32,
}

/// The font at a size.
pub(super) struct Type {
    font: FontRef<'static>,
    scale: PxScale,
}

impl Type {
    pub(super) fn new(size: f32) -> anyhow::Result<Self> {
        let font = FontRef::try_from_slice(dejavu::sans::regular())?;
        let scale = font.pt_to_px_scale(size * 0.75).unwrap_or(PxScale::from(size));
        Ok(Self { font, scale })
    }

    fn width(&self, text: &str) -> f32 {
        let font = self.font.as_scaled(self.scale);
        text.chars().map(|letter| font.h_advance(font.glyph_id(letter))).sum()
    }

    fn ascent(&self) -> f32 {
        self.font.as_scaled(self.scale).ascent()
    }

    /// Calls `pixel` with place and coverage of every pixel of a line.
    pub(super) fn paint(&self, line: &Line, mut pixel: impl FnMut(f32, f32, f32)) {
        let font = self.font.as_scaled(self.scale);
        let mut x = line.x;
        for letter in line.text.chars() {
            let id = font.glyph_id(letter);
            let glyph = id.with_scale_and_position(self.scale, (x, line.baseline));
            x += font.h_advance(id);
            if let Some(outline) = self.font.outline_glyph(glyph) {
                let bounds = outline.px_bounds();
                outline.draw(|dx, dy, coverage| {
                    pixel(bounds.min.x + dx as f32, bounds.min.y + dy as f32, coverage);
                });
            }
        }
    }

    /// As much of a text as fits into a width.
    fn fitted(&self, text: &str, width: f32) -> String {
        if self.width(text) <= width {
            return text.to_owned();
        }
        let mut short = String::new();
        for letter in text.chars() {
            if self.width(&short) + self.width(&format!("{letter}\u{2026}")) > width {
                break;
            }
            short.push(letter);
        }
        short + "\u{2026}"
    }

    /// A text in lines of a width, broken at blanks, and within words that are longer.
    fn wrapped(&self, text: &str, width: f32) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for part in text.lines() {
            let mut line = String::new();
            for word in part.split_whitespace() {
                let longer =
                    if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
                if self.width(&longer) <= width {
                    line = longer;
                    continue;
                }
                if !line.is_empty() {
                    lines.push(std::mem::take(&mut line));
                }
                for letter in word.chars() {
                    line.push(letter);
                    if self.width(&line) > width && line.chars().count() > 1 {
                        line.pop();
                        lines.push(std::mem::replace(&mut line, letter.to_string()));
                    }
                }
            }
            lines.push(line);
        }
        lines
    }
}

/// The most marks that are labelled: each label looks for a place among the others.
const MOST_LABELS: usize = 1000;
/// The most lines below a picture.
const MOST_LINES: usize = 60;

impl Layout {
    pub(super) fn new(marks: &Findings, (width, height): (f32, f32)) -> anyhow::Result<Self> {
        let font_size = (width.max(height) / 45.0).clamp(11.0, 72.0);
        let letters = Type::new(font_size)?;
        let mut layout = Self {
            font_size,
            stroke: (width.max(height) / 400.0).clamp(2.0, 12.0),
            labels: Vec::new(),
            captions: Vec::new(),
            caption_height: 0.0,
        };
        for (i, mark) in marks.marks.iter().take(MOST_LABELS).enumerate() {
            let label = layout.label(&letters, (i, mark), (width, height));
            layout.labels.extend(label);
        }
        layout.caption(&letters, marks, (width, height));
        Ok(layout)
    }

    /// Above its outline, else within or below it, where no other label is; always in the picture.
    fn label(
        &self,
        letters: &Type,
        (index, mark): (usize, &Mark),
        (width, height): (f32, f32),
    ) -> Option<Label> {
        let text = caption_of(mark);
        if text.is_empty() || mark.kind == Kind::Region {
            return None;
        }
        let pad = self.font_size * 0.25;
        let text = letters.fitted(&text, width - 2.0 * pad);
        let (label_width, label_height) = (letters.width(&text) + 2.0 * pad, self.font_size * 1.25);
        let (left, top, bottom) = bounds(mark);
        let x = left.min(width - label_width).max(0.0);
        let at = |y: f32| Rect {
            x,
            y: y.min(height - label_height).max(0.0),
            width: label_width,
            height: label_height,
        };
        let places = [top - label_height, top, bottom, bottom - label_height].map(at);
        let is_free = |place: &&Rect| self.labels.iter().all(|label| !label.back.overlaps(place));
        let back = *places.iter().find(is_free).unwrap_or(&places[0]);
        let baseline = back.y + (label_height - self.font_size) / 2.0 + letters.ascent() * 0.92;
        let line = Line { text, x: back.x + pad, baseline };
        Some(Label { mark: index, back, line, colour: colour(mark) })
    }

    fn caption(&mut self, letters: &Type, marks: &Findings, (width, height): (f32, f32)) {
        let (pad, step) = (self.font_size * 0.6, self.font_size * 1.35);
        let mut lines = Vec::new();
        for text in &marks.texts {
            let prompt = marks.prompts.get(text.prompt).filter(|_| marks.prompts.len() > 1);
            let score = text.score.map_or(String::new(), |score| format!(" ({score:.2})"));
            let prompt = prompt.map_or(String::new(), |prompt| format!("{prompt} "));
            let whole = format!("{prompt}{}{score}", text.text.trim());
            lines.extend(letters.wrapped(&whole, width - 2.0 * pad));
        }
        if lines.len() > MOST_LINES {
            lines.truncate(MOST_LINES);
            lines.push("\u{2026}".to_owned());
        }
        if lines.is_empty() {
            return;
        }
        self.caption_height = 2.0 * pad + step * lines.len() as f32;
        let first = height + pad + letters.ascent();
        self.captions = lines
            .into_iter()
            .enumerate()
            .map(|(i, text)| Line { text, x: pad, baseline: first + step * i as f32 })
            .collect();
    }
}

fn caption_of(mark: &Mark) -> String {
    let score = mark.score.map(|score| format!("{score:.2}"));
    let parts = [Some(mark.label.clone()).filter(|label| !label.is_empty()), score];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// The left, upper and lower edges of a mark.
#[expect(clippy::cast_possible_truncation, reason = "places in a picture")]
fn bounds(mark: &Mark) -> (f32, f32, f32) {
    let edge = |of: fn(&Point) -> f64, pick: fn(f64, f64) -> f64, start: f64| {
        mark.outlines.iter().flatten().map(of).fold(start, pick) as f32
    };
    let (x, y) = (|point: &Point| point.0, |point: &Point| point.1);
    (
        edge(x, f64::min, f64::INFINITY),
        edge(y, f64::min, f64::INFINITY),
        edge(y, f64::max, f64::NEG_INFINITY),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn layout(result: &serde_json::Value, size: (f32, f32)) -> Layout {
        Layout::new(&Findings::read(result, &json!([0.5, 0.25])), size).unwrap()
    }

    #[test]
    fn labels_stay_in_the_picture_and_apart() {
        let result = json!({ "<OD>": {
            "bboxes": [[390, 0, 400, 20], [390, 0, 400, 20], [0, 280, 10, 300]],
            "labels": ["traffic light", "far too long ".repeat(20), "x"],
        }});
        let layout = layout(&result, (400.0, 300.0));
        assert_eq!(layout.labels.len(), 3);
        for (i, label) in layout.labels.iter().enumerate() {
            let back = label.back;
            assert!(back.x >= 0.0 && back.x + back.width <= 400.5, "{label:?}");
            assert!(back.y >= 0.0 && back.y + back.height <= 300.5, "{label:?}");
            for other in &layout.labels[..i] {
                assert!(!other.back.overlaps(&back), "{label:?} {other:?}");
            }
        }
        assert!(layout.labels[0].line.text.ends_with(" 0.50"));
        assert!(layout.labels[1].line.text.ends_with('\u{2026}'));
    }

    #[test]
    fn captions_are_wrapped_below_the_picture() {
        let result = json!({ "<CAPTION>": "word ".repeat(40) + &"x".repeat(200) });
        let layout = layout(&result, (200.0, 100.0));
        let letters = Type::new(layout.font_size).unwrap();
        assert!(layout.captions.len() > 5 && layout.caption_height > 50.0);
        for line in &layout.captions {
            assert!(line.x + letters.width(&line.text) <= 200.0, "{line:?}");
            assert!(line.baseline > 100.0 && line.baseline < 100.0 + layout.caption_height);
        }
    }

    #[test]
    fn ink_can_be_read_on_every_colour() {
        let luminance = |colour: [u8; 3]| {
            let linear = colour.map(|channel| (f64::from(channel) / 255.0).powf(2.2));
            0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05
        };
        for colour in COLOURS {
            let (a, b) = (luminance(colour), luminance(ink(colour)));
            let contrast = a.max(b) / a.min(b);
            assert!(contrast >= 4.5, "{colour:?}: {contrast}");
        }
    }
}
