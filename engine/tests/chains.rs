//! Chains against the same questions asked one by one, of pictures that were cut out by hand.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod common;

use std::io::Cursor;

use common::{fixture, path};
use florence_engine::{
    Decimals, Florence, GenerateOptions, LoadOptions, PrepareOptions,
    chain::{Chain, Told},
    image::{DecodeLimits, Orientation, decode},
    prompt::Prompts,
};
use image::ImageFormat;
use serde_json::{Value, json};

fn ask(florence: &Florence, bytes: &[u8], prompt: &str) -> Value {
    let prepared = florence.prepare(bytes, prompt, &PrepareOptions::default()).unwrap();
    florence.run_one(&prepared, &GenerateOptions::default()).unwrap().json
}

fn chained(florence: &Florence, bytes: &[u8], prompt: &str, step: &str) -> Told {
    let chain = Chain {
        prompts: vec![prompt.to_owned()],
        steps: vec![step.parse().unwrap()],
        margin: 0,
        most_regions: 64,
    };
    chain.check(Prompts::Tasks).unwrap();
    let picture = decode(bytes, &DecodeLimits::default(), Orientation::AsStored).unwrap();
    // As the fixtures were made.
    let options = GenerateOptions { max_new_tokens: Some(256), ..GenerateOptions::default() };
    let run = florence.run_chain(&picture, chain, Prompts::Tasks, &options).unwrap();
    run.told(Decimals::default())
}

fn numbers(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn texts_equal_the_references_asked_one_by_one() {
    let fixture = fixture("chains.json");
    let florence = Florence::embedded(&LoadOptions::default()).unwrap();
    let mut answers = 0;
    for case in fixture["cases"].as_array().unwrap() {
        let named = |name: &str| case[name].as_str().unwrap();
        let bytes = std::fs::read(path("pictures").join(named("picture"))).unwrap();
        let told = chained(&florence, &bytes, named("prompt"), named("step"));
        let texts = if named("step").starts_with("THEN") {
            json!(case["texts"][0])
        } else {
            case["texts"].clone()
        };
        assert_eq!(told.text, json!([case["text"], texts]), "{case}");
        answers += case["texts"].as_array().unwrap().len();
    }
    assert!(answers > 40, "{answers} answers");
}

#[test]
fn each_region_is_asked_as_a_client_would_ask() {
    let florence = Florence::embedded(&LoadOptions::default()).unwrap();
    let bytes = std::fs::read(path("../../../models/tiny/samples/shapes.png")).unwrap();
    let told = chained(&florence, &bytes, "<OD>", "EACH <REGION_TO_SEGMENTATION>").json;
    let found = ask(&florence, &bytes, "<OD>");
    assert_eq!(told["steps"][0]["answer"], found);
    let each = told["steps"][1]["each"].as_array().unwrap();
    assert_eq!(each.len(), found["<OD>"]["bboxes"].as_array().unwrap().len());
    for (one, place) in each.iter().zip(found["<OD>"]["bboxes"].as_array().unwrap()) {
        let edges = numbers(place).into_iter().zip([360.0, 280.0, 360.0, 280.0]);
        let places = edges.map(|(edge, size)| format!("<loc_{}>", (edge * 1000.0 / size).floor()));
        let place = places.collect::<Vec<_>>().concat();
        let alone = ask(&florence, &bytes, &format!("<REGION_TO_SEGMENTATION>{place}"));
        assert_eq!(one["answer"], alone, "{one}");
    }
}

#[test]
fn a_crop_is_answered_as_the_part_of_the_picture_alone() {
    let florence = Florence::embedded(&LoadOptions::default()).unwrap();
    let bytes = std::fs::read(path("../../../models/tiny/samples/poster.jpg")).unwrap();
    let told = chained(&florence, &bytes, "<OD>", "CROP <OD>").json;
    let crops = told["steps"][1]["crop"].as_array().unwrap();
    assert!(crops.len() > 1, "{told}");
    let whole = decode(&bytes, &DecodeLimits::default(), Orientation::AsStored).unwrap();
    let size = |side: usize| u32::try_from(side).unwrap();
    let whole =
        image::RgbImage::from_raw(size(whole.width), size(whole.height), whole.data.clone());
    let whole = image::DynamicImage::from(whole.unwrap());
    for one in crops {
        let edges: Vec<f64> =
            numbers(&one["region"]).into_iter().map(f64::round_ties_even).collect();
        let [left, top, right, bottom] = edges.try_into().unwrap();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pixels")]
        let [x, y, width, height] = [left, top, right - left, bottom - top].map(|edge| edge as u32);
        let mut part = Cursor::new(Vec::new());
        whole.crop_imm(x, y, width, height).write_to(&mut part, ImageFormat::Png).unwrap();
        let alone = ask(&florence, part.get_ref(), "<OD>");
        let (here, alone) = (&one["answer"]["<OD>"], &alone["<OD>"]);
        assert_eq!(here["labels"], alone["labels"]);
        let boxes = |value: &Value| value["bboxes"].as_array().unwrap().clone();
        for (here, alone) in boxes(here).iter().zip(&boxes(alone)) {
            for ((here, alone), by) in
                numbers(here).into_iter().zip(numbers(alone)).zip([left, top, left, top])
            {
                assert!((here - alone - by).abs() < 1e-9, "{one}");
            }
        }
    }
}
