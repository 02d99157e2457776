//! A table: a row for each object and each text; a picture of which nothing is said has a row too.

use std::path::Path;

use super::{out::Out, pictures::Pictures};

const HEAD: [&str; 13] = [
    "file", "width", "height", "prompt", "label", "score", "x1", "y1", "x2", "y2", "area",
    "polygons", "text",
];

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    let number = |number: Option<f64>| number.map_or(String::new(), |number| number.to_string());
    to.file(path, |out| {
        let mut table = csv::Writer::from_writer(out);
        table.write_record(HEAD)?;
        pictures.each(|picture| {
            let size = [picture.width.to_string(), picture.height.to_string()];
            let row = |prompt: Option<usize>, rest: [String; 9]| {
                let prompt = prompt.map_or("", |prompt| &picture.prompts[prompt]).to_owned();
                let first = [picture.name.clone()].into_iter().chain(size.clone());
                first.chain([prompt]).chain(rest).collect::<Vec<_>>()
            };
            for object in &picture.objects {
                let [x1, y1, x2, y2] = object.bounds.map(|number| number.to_string());
                let polygons = if object.is_box {
                    String::new()
                } else {
                    serde_json::to_string(&object.outlines)?
                };
                let (label, score) = (object.label.clone(), number(object.score));
                let area = object.area.to_string();
                let rest = [label, score, x1, y1, x2, y2, area, polygons, String::new()];
                table.write_record(row(Some(object.prompt), rest))?;
            }
            for text in &picture.texts {
                let mut rest: [String; 9] = Default::default();
                rest[1] = number(text.score);
                rest[8].clone_from(&text.text);
                table.write_record(row(Some(text.prompt), rest))?;
            }
            if picture.objects.is_empty() && picture.texts.is_empty() {
                table.write_record(row(None, Default::default()))?;
            }
            Ok(())
        })?;
        Ok(table.flush()?)
    })
}
