//! FiftyOne: the `labels.json` of a `FiftyOneImageDetectionDataset`; boxes as parts of the picture,
//! pictures by their names without ending.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        write!(out, "{{\"classes\": {}, \"labels\": {{", json!(pictures.classes.names))?;
        let mut comma = "";
        let names = to.names(|picture| PathBuf::from(&picture.name))?;
        pictures.each(|picture| {
            let name = names.stem(picture);
            let found: Vec<Value> =
                picture.objects.iter().map(|object| detection(picture, object)).collect();
            write!(out, "{comma}\n{}: {}", json!(name.display().to_string()), json!(found))?;
            comma = ",";
            Ok(())
        })?;
        Ok(writeln!(out, "\n}}}}")?)
    })
}

fn detection(picture: &Picture, object: &Object) -> Value {
    let (w, h) = (picture.width as f64, picture.height as f64);
    let [x1, y1, x2, y2] = object.bounds;
    let mut detection = json!({
        "label": object.class,
        "bounding_box": [x1 / w, y1 / h, (x2 - x1) / w, (y2 - y1) / h],
    });
    if let Some(score) = object.score {
        detection["confidence"] = json!(score);
    }
    detection
}
