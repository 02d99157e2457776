//! Tiny random checkpoints in both layouts against the reference: every stage, ids, JSON.
//!
//! The native one is float16 safetensors, the original one a pickle with a head of its own.

mod common;

use common::{compare, fixture, load};
use florence_engine::{Coordinates, GenerateOptions, PrepareOptions};
use serde_json::Value;

/// Largest difference allowed between two float32 computations in different orders, relative to
/// the deviation of the stage's values; a wrong formula is off by far more.
const TOLERANCE: f32 = 5e-5;

#[test]
fn every_stage_equals_the_references() {
    let fixtures: Value = fixture("random.json");
    let picture = std::fs::read(common::path("random.png")).unwrap();
    for case in fixtures["cases"].as_array().unwrap() {
        let checkpoint = case["checkpoint"].as_str().unwrap();
        let florence = load(&common::path(checkpoint));
        let prepared = florence.prepare(&picture, "<OD>", &PrepareOptions::default()).unwrap();
        let mut stages = Vec::new();
        let visual = florence
            .model()
            .visual_tokens(&[prepared.pixels()], |stage| stages.push(stage.clone()))
            .unwrap();
        let encoded = florence.model().encode(&visual, prepared.prompt_ids()).unwrap();
        stages.push(visual);
        let logits = florence.model().logits_after(&encoded, &[2, 0]).unwrap();
        stages.extend([encoded, logits]);
        let names = [
            "pixel_values",
            "stage_0",
            "stage_1",
            "stage_2",
            "stage_3",
            "projector",
            "encoder",
            "logits",
        ];
        assert_eq!(stages.len(), names.len());
        for (name, found) in names.into_iter().zip(stages) {
            let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
            compare(&format!("{checkpoint} {name}"), &found, &case["stages"][name], TOLERANCE);
        }
    }
}

#[test]
fn ids_and_json_equal_the_references() {
    let fixtures: Value = fixture("random.json");
    let picture = std::fs::read(common::path("random.png")).unwrap();
    for case in fixtures["cases"].as_array().unwrap() {
        let checkpoint = case["checkpoint"].as_str().unwrap();
        let florence = load(&common::path(checkpoint));
        for expected in case["answers"].as_array().unwrap() {
            let prompt = expected["prompt"].as_str().unwrap();
            let prepared = florence.prepare(&picture, prompt, &PrepareOptions::default()).unwrap();
            assert_eq!(serde_json::json!(prepared.prompt_ids()), expected["prompt_ids"]);
            let number = |name: &str| expected[name].as_u64().map(|n| usize::try_from(n).unwrap());
            let options = GenerateOptions {
                beams: number("beams"),
                max_new_tokens: number("max_new_tokens"),
                no_repeat_ngram: number("no_repeat_ngram"),
                coordinates: Coordinates::Integer,
                ..GenerateOptions::default()
            };
            let answer = florence.run_one(&prepared, &options).unwrap();
            let what = format!("{checkpoint} {prompt} {options:?}");
            assert_eq!(serde_json::json!(answer.token_ids), expected["token_ids"], "{what}");
            assert_eq!(answer.json, expected["answer"], "{what}");
        }
    }
}
