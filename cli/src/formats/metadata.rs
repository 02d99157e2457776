//! `metadata.jsonl`, as the imagefolder of Hugging Face's datasets reads it: a line for each picture,
//! the same columns in all.

use std::{io::Write as _, path::Path};

use serde_json::{Map, Value, json};

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        pictures.each(|picture| {
            serde_json::to_writer(&mut *out, &row(pictures, picture))?;
            Ok(out.write_all(b"\n")?)
        })
    })
}

fn row(pictures: &Pictures, picture: &Picture) -> Value {
    let mut row = Map::new();
    row.insert("file_name".to_owned(), json!(picture.name));
    row.insert("width".to_owned(), json!(picture.width));
    row.insert("height".to_owned(), json!(picture.height));
    if pictures.has_texts {
        let texts: Vec<&str> = picture.texts.iter().map(|text| text.text.trim()).collect();
        row.insert("text".to_owned(), json!(texts.join("\n")));
    }
    if pictures.has_objects {
        let all = |of: &dyn Fn(&Object) -> Value| picture.objects.iter().map(of).collect::<Value>();
        let objects = json!({
            "bbox": all(&|object| {
                let [x1, y1, x2, y2] = object.bounds;
                json!([x1, y1, x2 - x1, y2 - y1])
            }),
            "category": all(&|object| json!(object.label)),
            "area": all(&|object| json!(object.area)),
        });
        row.insert("objects".to_owned(), objects);
    }
    row.into()
}
