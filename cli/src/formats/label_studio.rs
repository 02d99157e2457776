//! Label Studio: a list of tasks with predictions, places in percent of the picture. The labelling
//! configuration is to name its picture `image` and its controls `label`, `polygon` and `caption`.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    out::{List, Out},
    pictures::{Object, Picture, Pictures, Said},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        let mut list = List::begin(out)?;
        pictures.each(|picture| list.push(&task(picture)))?;
        list.end()
    })
}

fn task(picture: &Picture) -> Value {
    let mut result: Vec<Value> = Vec::new();
    let mut push = |kind: &str, from: &str, score: Option<f64>, value: Value| {
        let mut region = json!({
            "id": format!("{}-{}", picture.id, result.len() + 1),
            "type": kind,
            "from_name": from,
            "to_name": "image",
            "original_width": picture.width,
            "original_height": picture.height,
            "image_rotation": 0,
            "value": value,
        });
        if let Some(score) = score {
            region["score"] = json!(score);
        }
        result.push(region);
    };
    for object in &picture.objects {
        for (kind, from, value) in regions(picture, object) {
            push(kind, from, object.score, value);
        }
    }
    // The editor shows one result of a control, which may have several texts.
    let said = picture.texts.iter().filter(|said| !said.text.trim().is_empty());
    let said: Vec<&Said> = said.collect();
    if let [first, others @ ..] = &*said {
        let texts: Vec<&str> = said.iter().map(|said| said.text.trim()).collect();
        let score = first.score.filter(|_| others.is_empty());
        push("textarea", "caption", score, json!({ "text": texts }));
    }
    let scores: Vec<f64> = picture.objects.iter().filter_map(|object| object.score).collect();
    let mut prediction = json!({ "model_version": picture.model, "result": result });
    if !scores.is_empty() {
        prediction["score"] = json!(scores.iter().sum::<f64>() / scores.len() as f64);
    }
    json!({ "data": { "image": picture.name }, "predictions": [prediction] })
}

fn regions(picture: &Picture, object: &Object) -> Vec<(&'static str, &'static str, Value)> {
    let (w, h) = (100.0 / picture.width as f64, 100.0 / picture.height as f64);
    if object.is_box {
        let [x1, y1, x2, y2] = object.bounds;
        let value = json!({
            "x": x1 * w,
            "y": y1 * h,
            "width": (x2 - x1) * w,
            "height": (y2 - y1) * h,
            "rotation": 0,
            "rectanglelabels": [object.label],
        });
        return vec![("rectanglelabels", "label", value)];
    }
    let polygon = |outline: &Vec<(f64, f64)>| {
        let points: Vec<[f64; 2]> = outline.iter().map(|(x, y)| [x * w, y * h]).collect();
        let value = json!({ "points": points, "closed": true, "polygonlabels": [object.label] });
        ("polygonlabels", "polygon", value)
    };
    object.outlines.iter().map(polygon).collect()
}
