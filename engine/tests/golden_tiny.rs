//! `models/tiny` against the reference: ids and JSON of sixty pictures over all tasks.

#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod common;

use std::collections::HashSet;

use common::{fixture, path};
use florence_engine::{
    Coordinates, Cpu, Florence, GenerateOptions, Job, Kernels, LoadOptions, Precision,
    PrepareOptions, Prepared,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn question(case: &Value) -> (&str, &str) {
    (case["picture"].as_str().unwrap(), case["prompt"].as_str().unwrap())
}

fn prepare(florence: &Florence, case: &Value) -> (Prepared, GenerateOptions) {
    let (name, prompt) = question(case);
    let bytes = std::fs::read(path("pictures").join(name)).unwrap();
    let prepared = florence.prepare(&bytes, prompt, &PrepareOptions::default()).unwrap();
    let number = |name: &str| case[name].as_u64().map(|n| usize::try_from(n).unwrap());
    let options = GenerateOptions {
        beams: number("beams"),
        max_new_tokens: Some(256),
        no_repeat_ngram: number("no_repeat_ngram"),
        coordinates: Coordinates::Integer,
        ..GenerateOptions::default()
    };
    (prepared, options)
}

#[test]
fn ids_and_json_equal_the_references() {
    let fixture = fixture("tiny.json");
    let weights = path("../../../models/tiny/model.safetensors");
    let digest = format!("{:x}", Sha256::digest(std::fs::read(weights).unwrap()));
    let made_with = &fixture["provenance"]["model_sha256"];
    assert_eq!(digest, *made_with, "the fixtures are of another model: make fixtures");

    let florence = Florence::embedded(&LoadOptions::default()).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    let (mut pictures, mut tasks) = (HashSet::new(), HashSet::new());
    let mut all = Vec::new();
    for case in cases {
        let (name, prompt) = question(case);
        pictures.insert(name);
        tasks.insert(prompt.split('>').next().unwrap());
        let (prepared, options) = prepare(&florence, case);
        let answer = florence.run_one(&prepared, &options).unwrap();
        let what = format!("{name} {prompt} {options:?}");
        assert_eq!(serde_json::json!(answer.token_ids), case["token_ids"], "{what}");
        assert_eq!(answer.text, case["text"].as_str().unwrap(), "{what}");
        assert_eq!(answer.json, case["answer"], "{what}");
        assert!(answer.scores.iter().all(|score| (0.0..=1.0).contains(score)), "{what}");
        if answer.json.as_object().unwrap().values().all(Value::is_string) {
            // That of the sequence, by which the search ranks it.
            let [score] = answer.scores[..] else { panic!("{what}: {:?}", answer.scores) };
            assert!((score - answer.score.exp()).abs() < 1e-5, "{what}: {score}");
        }
        all.push((prepared, options, answer));
    }
    assert!(pictures.len() >= 60, "{} pictures", pictures.len());
    assert_eq!(tasks.len(), 15, "{tasks:?}");

    // Answers do not depend on batch mates: the same in batches as alone.
    for batch in all.chunks(7) {
        let jobs: Vec<Job<'_>> =
            batch.iter().map(|(prepared, options, _)| Job { prepared, options }).collect();
        let answers = florence.run(&jobs, &|_| false).unwrap();
        for ((_, _, alone), together) in batch.iter().zip(answers) {
            let together = together.unwrap();
            assert_eq!(alone.token_ids, together.token_ids);
            assert_eq!(alone.json, together.json);
        }
    }
}

#[test]
fn every_instruction_set_and_candle_give_the_references_ids() {
    let fixture = fixture("tiny.json");
    let cases = fixture["cases"].as_array().unwrap();
    let kernels = Cpu::available().map(Kernels::On).chain([Kernels::Candle]);
    for kernels in kernels {
        let options = LoadOptions { kernels, ..LoadOptions::default() };
        let florence = Florence::embedded(&options).unwrap();
        for case in cases.iter().step_by(7) {
            let (prepared, options) = prepare(&florence, case);
            let answer = florence.run_one(&prepared, &options).unwrap();
            let found = serde_json::json!(answer.token_ids);
            assert_eq!(found, case["token_ids"], "{kernels:?} {:?}", question(case));
        }
    }
}

#[test]
fn the_fast_precision_agrees_with_float32() {
    let fixture = fixture("tiny.json");
    let cases = fixture["cases"].as_array().unwrap();
    let options = LoadOptions { precision: Precision::Auto, ..LoadOptions::default() };
    let florence = Florence::embedded(&options).unwrap();
    let (mut equal, mut all) = (0, 0);
    for case in cases {
        let (prepared, options) = prepare(&florence, case);
        let found = florence.run_one(&prepared, &options).unwrap().token_ids;
        let expected: Vec<u32> = serde_json::from_value(case["token_ids"].clone()).unwrap();
        equal += found.iter().zip(&expected).filter(|(a, b)| a == b).count();
        all += found.len().max(expected.len());
    }
    let share = equal as f64 / all as f64;
    assert!(share >= 0.99, "{}: only {share:.4} of the tokens", florence.arithmetic());
}
