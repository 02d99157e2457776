//! An answer as an SVG, with its picture inside.

use std::fmt::Write;

use base64::{Engine as _, prelude::BASE64_STANDARD};

use super::{
    layout::{FAMILY, Label, Layout, Line, colour, ink},
    marks::{Findings, Kind, Mark},
};

/// The picture, of this size and kind, with its marks and texts.
pub(super) fn svg(
    (bytes, kind): (&[u8], &str),
    (width, height): (u32, u32),
    marks: &Findings,
) -> anyhow::Result<String> {
    let layout = Layout::new(marks, (width as f32, height as f32))?;
    let whole = height as f32 + layout.caption_height.ceil();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{whole}\" \
         viewBox=\"0 0 {width} {whole}\" font-family=\"{FAMILY}\" font-size=\"{}\">\n\
         <rect width=\"{width}\" height=\"{whole}\" fill=\"#fff\"/>\n\
         <image width=\"{width}\" height=\"{height}\" href=\"data:{kind};base64,{}\"/>\n",
        layout.font_size,
        BASE64_STANDARD.encode(bytes)
    );
    for mark in &marks.marks {
        outline(&mut svg, mark, layout.stroke);
    }
    for label in &layout.labels {
        labelled(&mut svg, label);
    }
    for line in &layout.captions {
        text(&mut svg, line, [20; 3]);
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

pub(super) fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn outline(svg: &mut String, mark: &Mark, width: f32) {
    let mut path = String::new();
    for outline in &mark.outlines {
        for (i, (x, y)) in outline.iter().enumerate() {
            let _ = write!(path, "{}{x:.2} {y:.2}", if i == 0 { "M" } else { "L" });
        }
        path.push('Z');
    }
    let colour = hex(colour(mark));
    let fill = if mark.kind == Kind::Polygon { colour.as_str() } else { "none" };
    let dash = if mark.kind == Kind::Region {
        format!(" stroke-dasharray=\"{} {}\"", 4.0 * width, 3.0 * width)
    } else {
        String::new()
    };
    let _ = writeln!(
        svg,
        "<path d=\"{path}\" fill=\"{fill}\" fill-opacity=\"0.35\" fill-rule=\"evenodd\" \
         stroke=\"{colour}\" stroke-width=\"{width}\" stroke-linejoin=\"round\"{dash}/>"
    );
}

fn labelled(svg: &mut String, label: &Label) {
    let back = label.back;
    let _ = writeln!(
        svg,
        "<rect x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{:.2}\" fill=\"{}\"/>",
        back.x,
        back.y,
        back.width,
        back.height,
        hex(label.colour)
    );
    text(svg, &label.line, ink(label.colour));
}

fn text(svg: &mut String, line: &Line, ink: [u8; 3]) {
    let _ = writeln!(
        svg,
        "<text x=\"{:.2}\" y=\"{:.2}\" fill=\"{}\">{}</text>",
        line.x,
        line.baseline,
        hex(ink),
        escaped(&line.text)
    );
}

/// A text as XML takes it: what XML has no place for is left out.
fn escaped(text: &str) -> String {
    let is_allowed =
        |letter: &char| !letter.is_control() && !matches!(letter, '\u{fffe}' | '\u{ffff}');
    let text: String = text.chars().filter(is_allowed).collect();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_are_texts_and_nothing_else() {
        let result = json!({ "<OD>": { "bboxes": [[1, 2, 30, 40]],
            "labels": ["<img src=x onerror=\"alert(1)\">&\u{0}"] }});
        let svg =
            svg((b"x", "image/png"), (600, 400), &Findings::read(&result, &json!([]))).unwrap();
        assert!(svg.contains("&lt;img src=x onerror=\"alert(1)\"&gt;&amp;</text>"), "{svg}");
        assert!(!svg.contains("<img") && !svg.contains('\u{0}'));
        assert!(svg.contains("d=\"M1.00 2.00L30.00 2.00L30.00 40.00L1.00 40.00Z\""), "{svg}");
    }
}
