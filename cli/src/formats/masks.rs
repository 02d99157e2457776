//! A PNG for each picture: 0 where nothing is, else the class from 1 on; `classes.txt` names them.
//! Small objects lie above large ones.

use std::path::Path;

use anyhow::{Context, ensure};
use tiny_skia::{FillRule, Mask, PathBuilder, Transform};

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    let classes = &pictures.classes.names;
    ensure!(classes.len() < 256, "a mask has room for 255 classes: choose some with --classes");
    let names = to.names(Picture::below)?;
    let lines: String = classes.iter().map(|name| name.replace('\n', " ") + "\n").collect();
    to.classes(&folder.join("classes.txt"), &lines, |there| there.starts_with(&lines))?;
    pictures.each(|picture| {
        let path = folder.join(names.file(picture, "png"));
        let png = png(picture, &pixels(picture)?)?;
        to.bytes(&path, &png)
    })
}

fn pixels(picture: &Picture) -> anyhow::Result<Vec<u8>> {
    let (width, height) = (u32::try_from(picture.width)?, u32::try_from(picture.height)?);
    let mut pixels = vec![0; picture.width * picture.height];
    let mut objects: Vec<&Object> = picture.objects.iter().collect();
    objects.sort_by(|a, b| b.area.total_cmp(&a.area));
    for object in objects {
        let mut mask = Mask::new(width, height).context("the picture has no pixels")?;
        let Some(path) = path(object) else { continue };
        mask.fill_path(&path, FillRule::EvenOdd, false, Transform::identity());
        let class = u8::try_from(object.class + 1)?;
        for (pixel, covered) in pixels.iter_mut().zip(mask.data()) {
            if *covered > 0 {
                *pixel = class;
            }
        }
    }
    Ok(pixels)
}

#[expect(clippy::cast_possible_truncation, reason = "places in a picture")]
fn path(object: &Object) -> Option<tiny_skia::Path> {
    let mut builder = PathBuilder::new();
    for outline in &object.outlines {
        for (i, (x, y)) in outline.iter().enumerate() {
            let (x, y) = (*x as f32, *y as f32);
            if i == 0 { builder.move_to(x, y) } else { builder.line_to(x, y) }
        }
        builder.close();
    }
    builder.finish()
}

/// Colours only tell classes apart to the eye: PIL and Ultralytics read the indices.
fn png(picture: &Picture, pixels: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = (u32::try_from(picture.width)?, u32::try_from(picture.height)?);
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_palette((0..=255).flat_map(colour).collect::<Vec<u8>>());
    encoder.write_header()?.write_image_data(pixels)?;
    Ok(bytes)
}

/// The palette of Pascal VOC: the bits of the index, spread over the channels from the top.
fn colour(index: u8) -> [u8; 3] {
    let mut colour = [0; 3];
    for level in 0..8 {
        for (channel, part) in colour.iter_mut().enumerate() {
            let bit = 3 * level + channel;
            if bit < 8 && index >> bit & 1 == 1 {
                *part |= 0x80 >> level;
            }
        }
    }
    colour
}
