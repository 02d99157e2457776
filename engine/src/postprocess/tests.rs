//! The reference's answers to hand-made texts: `tests/fixtures/postprocess.json`, made with
//! Microsoft's code ("original") and transformers' ("native"); see `tests/fixtures/README.md`.

use serde_json::Value;

use super::*;
use crate::task::Task;

#[derive(serde::Deserialize)]
struct Case {
    task: String,
    text: String,
    image_size_wh: (usize, usize),
    instances_original: Vec<Value>,
    instances_native: Vec<Value>,
}

/// Our final JSON, regrouped as the reference's list of instances.
fn expected(task: Task, instances: &[Value]) -> Value {
    let list = |name: &str| -> Vec<Value> {
        instances.iter().filter_map(|instance| instance.get(name).cloned()).collect()
    };
    let clean =
        |label: &Value| json!(label.as_str().unwrap_or_default().replace("</s>", "").trim());
    match task.answer() {
        AnswerKind::Quads => {
            let labels: Vec<Value> = list("text").iter().map(clean).collect();
            json!({ "quad_boxes": list("quad_box"), "labels": labels })
        }
        AnswerKind::Polygons => json!({ "polygons": list("polygons"), "labels": list("cat_name") }),
        AnswerKind::BoxesOrPolygons => {
            let (boxes, polygons) = (list("bbox"), list("polygons"));
            let names = list("cat_name");
            let (box_names, polygon_names) =
                if boxes.is_empty() { (vec![], names) } else { (names, vec![]) };
            json!({ "bboxes": boxes, "bboxes_labels": box_names,
                    "polygons": polygons, "polygons_labels": polygon_names })
        }
        AnswerKind::Phrases => {
            // One instance holds all boxes of a phrase.
            let pairs = instances.iter().flat_map(|instance| {
                let boxes = instance["bbox"].as_array().cloned().unwrap_or_default();
                boxes.into_iter().map(|b| (b, instance["cat_name"].clone()))
            });
            let (boxes, labels): (Vec<_>, Vec<_>) = pairs.unzip();
            json!({ "bboxes": boxes, "labels": labels })
        }
        _ => json!({ "bboxes": list("bbox"), "labels": list("cat_name") }),
    }
}

#[test]
fn every_worked_case_of_both_references_is_reproduced() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("../../tests/fixtures/postprocess.json")).unwrap();
    assert!(cases.len() >= 31);
    for case in cases {
        let task = Task::ALL.into_iter().find(|task| task.token() == case.task).unwrap();
        for (coordinates, instances) in [
            (Coordinates::Float, &case.instances_original),
            (Coordinates::Integer, &case.instances_native),
        ] {
            let scale = Scale { size: case.image_size_wh, coordinates };
            let found = post_process(task.answer(), &case.text, scale).json;
            assert_eq!(found, expected(task, instances), "{} {:?}", case.task, case.text);
        }
    }
}

#[test]
fn a_box_knows_its_location_tokens() {
    let text =
        "</s><s>a<loc_1><loc_2>b<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8></s>";
    let scale = Scale { size: (10, 10), coordinates: Coordinates::Float };
    assert_eq!(
        post_process(AnswerKind::LabelledBoxes, text, scale).scored,
        Scored::Locations(vec![2..6, 6..10])
    );
}

#[test]
fn whatever_has_a_label_knows_its_location_tokens() {
    let scale = Scale { size: (10, 10), coordinates: Coordinates::Float };
    let locations = |n| "<loc_5>".repeat(n);
    let check = |kind, text: String, expected: &[(usize, usize)]| {
        let scored = post_process(kind, &format!("</s><s>{text}</s>"), scale).scored;
        let expected = expected.iter().map(|(first, end)| *first..*end).collect();
        assert_eq!(scored, Scored::Locations(expected), "{kind:?} {text}");
    };
    let (four, six, eight) = (locations(4), locations(6), locations(8));
    check(AnswerKind::Quads, format!("ab{eight}c{eight}"), &[(0, 8), (8, 16)]);
    // A location that is none of the eight belongs to the label.
    check(AnswerKind::Quads, format!("ab<loc_9>c{eight}"), &[(1, 9)]);
    check(AnswerKind::Polygons, format!("{six}<sep>{four}"), &[(0, 10)]);
    check(
        AnswerKind::Polygons,
        format!("<poly>{six}</poly><poly>{four}</poly>"),
        &[(0, 6), (6, 10)],
    );
    let polygons = format!("x<loc_1>a{six}b<poly>{six}<sep>{four}</poly>");
    check(AnswerKind::BoxesOrPolygons, polygons, &[(1, 7), (7, 17)]);
    check(AnswerKind::BoxesOrPolygons, format!("a{four}b{eight}"), &[(0, 4), (4, 8), (8, 12)]);
    check(AnswerKind::Phrases, format!("it{four}a dog{four}"), &[(4, 8)]);
    check(AnswerKind::Boxes, String::new(), &[]);
    let text = post_process(AnswerKind::Text, "</s><s>a dog</s>", scale);
    assert_eq!((text.json, text.scored), (json!("a dog"), Scored::Text));
}

/// As the native reference of transformers 5.23 has it.
#[test]
fn polygons_keep_their_names_and_shapes_without_points_are_none() {
    let scale = Scale { size: (1000, 1000), coordinates: Coordinates::Integer };
    let found = |kind, text: &str| post_process(kind, text, scale).json;
    let square = "<loc_1><loc_2><loc_3><loc_4>";
    let text = format!("</s><s>caf\u{e9}<poly>{square}</poly>b<poly></poly><poly></poly></s>");
    let expected = json!({ "bboxes": [], "bboxes_labels": [], "polygons": [[[1, 2, 3, 4]]],
        "polygons_labels": ["caf\u{e9}"] });
    assert_eq!(found(AnswerKind::BoxesOrPolygons, &text), expected);
    let text = format!("</s><s><sep>{square}<poly></poly><poly></poly></s>");
    let expected = json!({ "polygons": [], "labels": [] });
    assert_eq!(found(AnswerKind::Polygons, &text), expected);
    let text = format!("</s><s><sep>{square}</s>");
    let expected = json!({ "polygons": [[[1, 2, 3, 4]]], "labels": ["<sep>"] });
    assert_eq!(found(AnswerKind::Polygons, &text), expected);
}

#[test]
fn coordinates_are_rounded_and_nothing_else_is() {
    let answer = json!({ "<OD>": { "bboxes": [[34.239_997_863_769_53, 1.05, 2.0, 7]], "labels": ["1.05"] } });
    let rounded = |decimals: &str| decimals.parse::<Decimals>().unwrap().round(&answer).to_string();
    assert_eq!(rounded("all"), answer.to_string());
    assert_eq!(rounded("1"), r#"{"<OD>":{"bboxes":[[34.2,1.1,2.0,7]],"labels":["1.05"]}}"#);
    assert_eq!(rounded("0"), r#"{"<OD>":{"bboxes":[[34.0,1.0,2.0,7]],"labels":["1.05"]}}"#);
    assert_eq!(
        rounded("9"),
        r#"{"<OD>":{"bboxes":[[34.239997864,1.05,2.0,7]],"labels":["1.05"]}}"#
    );
    for text in ["", "10", "-1", "1.5", "none"] {
        assert!(text.parse::<Decimals>().is_err(), "{text}");
    }
}

/// The model may say anything.
#[test]
fn any_text_of_the_model_is_read() {
    for seed in 0..20_000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let text: String = (0..random.usize(..=40)).map(|_| piece(&mut random)).collect();
        let task = Task::ALL[random.usize(..Task::ALL.len())];
        let size = (random.usize(1..5000), random.usize(1..5000));
        for coordinates in [Coordinates::Float, Coordinates::Integer] {
            let parsed = post_process(task.answer(), &text, Scale { size, coordinates });
            let labels = ["labels", "bboxes_labels", "polygons_labels"]
                .into_iter()
                .filter_map(|name| Some(parsed.json.get(name)?.as_array()?.len()));
            match parsed.scored {
                Scored::Text => assert!(parsed.json.is_string(), "{seed}: {text:?}"),
                Scored::Locations(found) => {
                    assert_eq!(found.len(), labels.sum::<usize>(), "{seed}: {text:?}");
                }
            }
        }
    }
}

/// A token of a place or a part of one, another token, some letters, or any character.
fn piece(random: &mut fastrand::Rng) -> String {
    const TOKENS: [&str; 7] = ["<loc_", "<poly>", "</poly>", "<sep>", "<and>", "<s>", "</s>"];
    const LETTERS: [char; 6] = ['a', 'b', 'z', ',', '.', ' '];
    match random.u8(..4) {
        0 => format!("<loc_{}>", random.u32(..100_000)),
        1 => TOKENS[random.usize(..TOKENS.len())].to_owned(),
        2 => (0..random.usize(..=6)).map(|_| LETTERS[random.usize(..LETTERS.len())]).collect(),
        _ => random.char(' '..).to_string(),
    }
}
