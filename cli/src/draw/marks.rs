//! What an answer locates on its picture, and what it only says: the reference's JSON as a flat list
//! of outlines with labels, and of texts. `florence draw` and the page of `florence web` draw these.

use serde::Serialize;
use serde_json::Value;

pub(crate) type Point = (f64, f64);

/// How an outline is to be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Box,
    Quad,
    /// It is filled, too.
    Polygon,
    /// What was asked about.
    Region,
}

/// Something that was found, or asked about.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Mark {
    pub(crate) kind: Kind,
    /// An object may have several polygons.
    pub(crate) outlines: Vec<Vec<Point>>,
    pub(crate) label: String,
    pub(crate) score: Option<f64>,
    /// Equal labels have equal ones.
    pub(crate) colour: usize,
    /// Which of the prompts it answers.
    pub(crate) prompt: usize,
}

/// A text that answers a prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Caption {
    pub(crate) prompt: usize,
    pub(crate) text: String,
    pub(crate) score: Option<f64>,
}

/// All of an answer.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Findings {
    /// As the answer names them.
    pub(crate) prompts: Vec<String>,
    pub(crate) marks: Vec<Mark>,
    pub(crate) texts: Vec<Caption>,
}

impl Findings {
    /// What `result` says, an object by prompt, with the `scores` that came with it.
    pub(crate) fn read(result: &Value, scores: &Value) -> Self {
        let mut found = Self::default();
        if let Some(steps) = result.get("steps").and_then(Value::as_array) {
            for (i, step) in steps.iter().enumerate() {
                found.add_step(i, step, scores.get(i).unwrap_or(&Value::Null));
            }
            found.give_colours();
            return found;
        }
        for (prompt, (name, answer)) in result.as_object().into_iter().flatten().enumerate() {
            found.prompts.push(name.clone());
            // Of several prompts they are lists in a list.
            let own = scores.get(prompt).filter(|own| own.is_array()).unwrap_or(scores);
            found.add(prompt, answer, &mut in_turn(own));
        }
        found.give_colours();
        found
    }

    /// Adds a step of a chain: its answer, or one for each region.
    fn add_step(&mut self, index: usize, step: &Value, scores: &Value) {
        self.prompts.push(step["prompt"].as_str().unwrap_or_default().to_owned());
        if let Some(answer) = only_value(&step["answer"]) {
            self.add(index, answer, &mut in_turn(scores));
        }
        let several = ["each", "crop"].iter().flat_map(|link| list(step.get(link)));
        for (i, one) in several.enumerate() {
            let Some(answer) = only_value(&one["answer"]) else { continue };
            let scores = &mut in_turn(scores.get(i).unwrap_or(&Value::Null));
            let label = one["label"].as_str().unwrap_or_default();
            let first = self.marks.len();
            match answer.as_str() {
                // A text is what is written at its region.
                Some(text) => {
                    let label = without_locations(text);
                    let (kind, outlines) = (Kind::Box, outlines(Kind::Box, &one["region"]));
                    let score = scores.next().flatten();
                    self.marks.push(Mark {
                        kind,
                        outlines,
                        label,
                        score,
                        colour: 0,
                        prompt: index,
                    });
                }
                None => self.add(index, answer, scores),
            }
            for mark in self.marks[first..].iter_mut().filter(|mark| mark.label.is_empty()) {
                label.clone_into(&mut mark.label);
            }
        }
    }

    fn add(
        &mut self,
        prompt: usize,
        answer: &Value,
        scores: &mut dyn Iterator<Item = Option<f64>>,
    ) {
        let mut next = || scores.next().flatten();
        if let Some(text) = answer.as_str() {
            self.texts.push(Caption { prompt, text: without_locations(text), score: next() });
            return;
        }
        let lists =
            [("bboxes", Kind::Box), ("quad_boxes", Kind::Quad), ("polygons", Kind::Polygon)];
        for (name, kind) in lists {
            // Where boxes and polygons have labels of their own, these are named after them.
            let own = format!("{name}_labels");
            let labels = answer.get(own.as_str()).or_else(|| answer.get("labels"));
            for (i, located) in list(answer.get(name)).iter().enumerate() {
                let label = labels.and_then(|labels| labels.get(i)?.as_str()).unwrap_or_default();
                let outlines = outlines(kind, located);
                let (label, score) = (label.to_owned(), next());
                if !outlines.is_empty() {
                    self.marks.push(Mark { kind, outlines, label, score, colour: 0, prompt });
                }
            }
        }
    }

    /// Adds what the prompts say: the regions that they ask about, in a picture of this size, and
    /// names for what was found and has none.
    pub(crate) fn ask(&mut self, prompts: &[String], size: (f64, f64)) {
        for (i, prompt) in prompts.iter().enumerate() {
            let asked = prompt.split_once('>').map_or("", |(_, text)| text.trim());
            if asked.starts_with('<') {
                self.add_region(i, asked, size);
                continue;
            }
            let nameless = |mark: &&mut Mark| mark.prompt == i && mark.label.is_empty();
            for mark in self.marks.iter_mut().filter(nameless) {
                asked.clone_into(&mut mark.label);
            }
        }
        self.give_colours();
    }

    fn add_region(&mut self, prompt: usize, text: &str, (width, height): (f64, f64)) {
        let places: Vec<f64> = text
            .split("<loc_")
            .skip(1)
            .filter_map(|part| part.split_once('>')?.0.parse::<u16>().ok())
            .map(|bin| (f64::from(bin.min(999)) + 0.5) / 1000.0)
            .collect();
        if let [x1, y1, x2, y2] = places[..] {
            let corners = rectangle(x1 * width, y1 * height, x2 * width, y2 * height);
            let mark = Mark {
                kind: Kind::Region,
                outlines: vec![corners],
                label: String::new(),
                score: None,
                colour: 0,
                prompt,
            };
            self.marks.insert(0, mark);
        }
    }

    fn give_colours(&mut self) {
        let mut names: Vec<(&str, bool)> = Vec::new();
        for mark in &mut self.marks {
            let name = (mark.label.as_str(), mark.kind == Kind::Region);
            let known = names.iter().position(|known| *known == name);
            mark.colour = known.unwrap_or(names.len());
            if known.is_none() {
                names.push(name);
            }
        }
    }

    /// The same on a picture of another size.
    pub(crate) fn scale(&mut self, (x, y): (f64, f64)) {
        let points = self.marks.iter_mut().flat_map(|mark| mark.outlines.iter_mut().flatten());
        for point in points {
            *point = (point.0 * x, point.1 * y);
        }
    }
}

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn numbers(value: &Value) -> Vec<f64> {
    list(Some(value)).iter().filter_map(Value::as_f64).collect()
}

fn outlines(kind: Kind, located: &Value) -> Vec<Vec<Point>> {
    let points = |value: &Value| -> Vec<Point> {
        numbers(value).chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
    };
    let found = match kind {
        Kind::Polygon => list(Some(located)).iter().map(points).collect(),
        Kind::Quad => vec![points(located)],
        Kind::Box | Kind::Region => match numbers(located)[..] {
            [x1, y1, x2, y2] => vec![rectangle(x1, y1, x2, y2)],
            _ => Vec::new(),
        },
    };
    found.into_iter().filter(|outline: &Vec<Point>| outline.len() > 1).collect()
}

/// The reference's object has one entry, named by the task.
fn only_value(answer: &Value) -> Option<&Value> {
    answer.as_object()?.values().next()
}

/// The numbers of a list, then none.
fn in_turn(list: &Value) -> impl Iterator<Item = Option<f64>> {
    let numbers = list.as_array().into_iter().flatten().map(Value::as_f64);
    numbers.chain(std::iter::repeat(None))
}

fn rectangle(x1: f64, y1: f64, x2: f64, y2: f64) -> Vec<Point> {
    vec![(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
}

/// A text without the location tokens that some tasks repeat after it.
fn without_locations(text: &str) -> String {
    let mut parts = text.split("<loc_");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('>').map_or(part, |(_, rest)| rest))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn steps_of_a_chain_are_drawn_at_their_regions() {
        let boxes = json!({ "<OD>": { "bboxes": [[0, 0, 20, 10]], "labels": ["car"] } });
        let polygons = json!({ "<S>": { "polygons": [[[1, 1, 2, 1, 2, 2]]], "labels": [""] } });
        let each = |answer: &Value| json!([{ "region": [0, 0, 20, 10], "label": "car", "answer": answer }]);
        let result = json!({ "steps": [
            { "prompt": "<OD>", "answer": boxes },
            { "prompt": "<S>", "each": each(&polygons), "left_out": 0 },
            { "prompt": "<OCR>", "crop": each(&json!({ "<OCR>": "stop<loc_1>" })), "left_out": 0 },
            { "prompt": "<T> {}", "answer": null },
        ] });
        let found = Findings::read(&result, &json!([[0.5], [[0.25]], [[0.75]], null]));
        let marks = found
            .marks
            .iter()
            .map(|mark| (mark.kind, mark.label.as_str(), mark.score, mark.prompt));
        let expected = [
            (Kind::Box, "car", Some(0.5), 0),
            (Kind::Polygon, "car", Some(0.25), 1),
            (Kind::Box, "stop", Some(0.75), 2),
        ];
        assert_eq!(marks.collect::<Vec<_>>(), expected);
        assert_eq!(found.prompts, ["<OD>", "<S>", "<OCR>", "<T> {}"]);
        assert!(found.texts.is_empty());
    }

    #[test]
    fn boxes_quads_and_polygons_have_their_labels_and_scores() {
        let result = json!({ "<OPEN_VOCABULARY_DETECTION>": {
            "bboxes": [[1, 2, 3, 4]], "bboxes_labels": ["cat"],
            "polygons": [[[0, 0, 4, 0, 4, 4], [1, 1, 2, 2]]], "polygons_labels": ["dog"],
        }});
        let found = Findings::read(&result, &json!([0.5, 0.25]));
        assert_eq!(found.marks.len(), 2);
        assert_eq!(found.marks[0].outlines, [[(1.0, 2.0), (3.0, 2.0), (3.0, 4.0), (1.0, 4.0)]]);
        assert_eq!((&*found.marks[0].label, found.marks[0].score), ("cat", Some(0.5)));
        assert_eq!((found.marks[1].kind, found.marks[1].outlines.len()), (Kind::Polygon, 2));
        assert_eq!((&*found.marks[1].label, found.marks[1].score), ("dog", Some(0.25)));
        let quads = json!({ "<OCR_WITH_REGION>": {
            "quad_boxes": [[0, 0, 9, 1, 9, 5, 0, 4]], "labels": ["EXIT"] }});
        let found = Findings::read(&quads, &Value::Null);
        assert_eq!(found.marks[0].outlines[0].len(), 4);
        assert_eq!((&*found.marks[0].label, found.marks[0].score), ("EXIT", None));
    }

    #[test]
    fn several_prompts_have_scores_of_their_own() {
        let result = json!({ "<OD>": { "bboxes": [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]],
            "labels": ["a", "b", "a"] }, "<CAPTION>": "a scene<loc_1><loc_2>" });
        let found = Findings::read(&result, &json!([[0.1, 0.2, 0.3], [0.9]]));
        let colours: Vec<usize> = found.marks.iter().map(|mark| mark.colour).collect();
        assert_eq!(colours, [0, 1, 0]);
        assert_eq!(found.marks[2].score, Some(0.3));
        let expected = Caption { prompt: 1, text: "a scene".into(), score: Some(0.9) };
        assert_eq!(found.texts, [expected]);
    }

    #[test]
    fn what_is_no_answer_marks_nothing() {
        for odd in [
            json!(null),
            json!([1]),
            json!({ "<OD>": { "bboxes": [[1, 2], "x", null], "labels": 3 } }),
            json!({ "<OD>": { "polygons": [[[1]], 7] } }),
        ] {
            let found = Findings::read(&odd, &json!("x"));
            assert!(found.marks.is_empty() && found.texts.is_empty(), "{odd}: {found:?}");
        }
    }

    #[test]
    fn prompts_add_regions_and_names() {
        let result = json!({ "<REFERRING_EXPRESSION_SEGMENTATION>":
            { "polygons": [[[1, 1, 2, 2, 3, 1]]], "labels": [""] } });
        let mut found = Findings::read(&result, &Value::Null);
        found.ask(&["<REFERRING_EXPRESSION_SEGMENTATION> a cat".to_owned()], (9.0, 9.0));
        assert_eq!((found.marks.len(), &*found.marks[0].label), (1, "a cat"));
        let mut found = Findings::default();
        let prompt = "<REGION_TO_CATEGORY><loc_0><loc_100><loc_500><loc_999>";
        found.ask(&["<OD>".to_owned(), prompt.to_owned()], (1000.0, 100.0));
        assert_eq!((found.marks.len(), found.marks[0].prompt), (1, 1));
        let corners = &found.marks[0].outlines[0];
        for (found, expected) in [(corners[0], (0.5, 10.05)), (corners[2], (500.5, 99.95))] {
            assert!((found.0 - expected.0).abs() < 1e-9, "{found:?}");
            assert!((found.1 - expected.1).abs() < 1e-9, "{found:?}");
        }
    }
}
