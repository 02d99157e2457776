//! Lines to fine-tune Florence-2 itself, as maestro reads them: picture, prompt, and the text that the
//! model is to give, with places as `<loc_0>` to `<loc_999>`.

use std::{fmt::Write as _, io::Write as _, path::Path};

use serde_json::json;

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
};
use crate::draw::Point;

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        pictures.each(|picture| {
            for (i, prompt) in picture.prompts.iter().enumerate() {
                let line =
                    json!({ "image": picture.name, "prefix": prompt, "suffix": suffix(picture, i) });
                writeln!(out, "{line}")?;
            }
            Ok(())
        })
    })
}

fn suffix(picture: &Picture, prompt: usize) -> String {
    let texts = picture.texts.iter().filter(|text| text.prompt == prompt);
    let mut suffix: String = texts.map(|text| text.text.trim()).collect();
    let is_phrase = picture.prompts[prompt].starts_with("<REFERRING_EXPRESSION_SEGMENTATION>")
        || picture.prompts[prompt].starts_with("<REGION_");
    for object in picture.objects.iter().filter(|object| object.prompt == prompt) {
        // The model repeats no phrase that it was asked for.
        suffix.push_str(if is_phrase { "" } else { &object.label });
        locations(&mut suffix, picture, object);
    }
    suffix
}

fn locations(suffix: &mut String, picture: &Picture, object: &Object) {
    let [x1, y1, x2, y2] = object.bounds;
    let corners = [vec![(x1, y1), (x2, y2)]];
    let outlines = if object.is_box { &corners[..] } else { &object.outlines };
    for (i, outline) in outlines.iter().enumerate() {
        suffix.push_str(if i > 0 { "<sep>" } else { "" });
        for (x, y) in outline {
            let (x, y) = bins(picture, (*x, *y));
            let _ = write!(suffix, "<loc_{x}><loc_{y}>");
        }
    }
}

fn bins(picture: &Picture, (x, y): Point) -> (u32, u32) {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 999")]
    let bin =
        |place: f64, size: usize| (place / (size as f64 / 1000.0)).floor().clamp(0.0, 999.0) as u32;
    (bin(x, picture.width), bin(y, picture.height))
}
