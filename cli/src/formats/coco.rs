//! COCO: pictures, categories and annotations in one JSON file, or detections as its evaluation
//! takes them. Pixels from 0, boxes as x, y, width, height; classes from 1.

use std::{io::Write as _, path::Path};

use serde_json::{Value, json};

use super::{
    out::{List, Out},
    pictures::{Object, Pictures},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        let info = json!({ "description": "Florence-2", "version": env!("CARGO_PKG_VERSION") });
        write!(out, "{{\"info\": {info}, \"licenses\": [], \"images\": ")?;
        let mut list = List::begin(out)?;
        pictures.each(|picture| {
            list.push(&json!({
                "id": picture.id,
                "width": picture.width,
                "height": picture.height,
                "file_name": picture.name,
            }))
        })?;
        list.end()?;
        write!(out, ", \"annotations\": ")?;
        let (mut list, mut id) = (List::begin(out)?, 0);
        pictures.each(|picture| {
            for object in &picture.objects {
                id += 1;
                list.push(&annotation(id, picture.id, object))?;
            }
            Ok(())
        })?;
        list.end()?;
        let categories: Value = (1..)
            .zip(&pictures.classes.names)
            .map(|(id, name): (u32, _)| json!({ "id": id, "name": name, "supercategory": "none" }))
            .collect();
        Ok(writeln!(out, ", \"categories\": {categories}}}")?)
    })
}

/// `[{image_id, category_id, bbox, score}]`, of what has a score.
pub(super) fn write_results(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        let mut list = List::begin(out)?;
        pictures.each(|picture| {
            for object in picture.objects.iter().filter(|object| object.score.is_some()) {
                list.push(&json!({
                    "image_id": picture.id,
                    "category_id": object.class + 1,
                    "bbox": bbox(object),
                    "score": object.score,
                }))?;
            }
            Ok(())
        })?;
        list.end()?;
        Ok(writeln!(out)?)
    })
}

fn bbox(object: &Object) -> [f64; 4] {
    let [x1, y1, x2, y2] = object.bounds;
    [x1, y1, x2 - x1, y2 - y1]
}

fn annotation(id: u64, picture: usize, object: &Object) -> Value {
    let polygons: Vec<Vec<f64>> = if object.is_box {
        Vec::new()
    } else {
        let flat = |outline: &Vec<(f64, f64)>| outline.iter().flat_map(|(x, y)| [*x, *y]).collect();
        object.outlines.iter().map(flat).collect()
    };
    let mut annotation = json!({
        "id": id,
        "image_id": picture,
        "category_id": object.class + 1,
        "segmentation": polygons,
        "area": object.area,
        "bbox": bbox(object),
        "iscrowd": 0,
    });
    if let Some(score) = object.score {
        annotation["score"] = json!(score);
    }
    annotation
}
