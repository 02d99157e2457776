//! labelme: a JSON file for each picture, shapes in pixels.

use std::path::{Path, absolute};

use serde_json::{Value, json};

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
};

/// The version of labelme whose files these are.
const VERSION: &str = "5.0.1";

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let names = to.names(Picture::below)?;
    pictures.each(|picture| {
        let path = folder.join(names.file(picture, "json"));
        let file = Path::new(&picture.file);
        let image = if file.is_file() { absolute(file)? } else { file.to_owned() };
        let shapes: Vec<Value> = (1..)
            .zip(&picture.objects)
            .flat_map(|(group, object): (u32, _)| shapes(group, object))
            .collect();
        let file = json!({
            "version": VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": image.display().to_string(),
            "imageData": null,
            "imageHeight": picture.height,
            "imageWidth": picture.width,
        });
        to.bytes(&path, serde_json::to_string_pretty(&file)?.as_bytes())
    })
}

/// The parts of an object are a group.
fn shapes(group: u32, object: &Object) -> Vec<Value> {
    let [x1, y1, x2, y2] = object.bounds;
    let is_group = object.outlines.len() > 1;
    let shape = |kind: &str, points: Value| {
        json!({
            "label": object.label,
            "points": points,
            "group_id": is_group.then_some(group),
            "description": "",
            "shape_type": kind,
            "flags": {},
        })
    };
    if object.is_box {
        return vec![shape("rectangle", json!([[x1, y1], [x2, y2]]))];
    }
    object.outlines.iter().map(|outline| shape("polygon", json!(outline))).collect()
}
