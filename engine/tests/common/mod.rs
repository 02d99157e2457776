//! Helpers of the golden tests.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "test helpers"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "not every test needs every helper")]

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor, safetensors};
use florence_engine::{Coordinates, Florence, GenerateOptions, LoadOptions, PrepareOptions};
use serde_json::Value;

/// A file below `tests/fixtures`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A JSON fixture.
pub(crate) fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(name)).unwrap()).unwrap()
}

/// A copy of a directory's files.
pub(crate) fn copy(directory: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(directory).unwrap() {
        let from = entry.unwrap().path();
        if from.is_file() {
            std::fs::copy(&from, to.path().join(from.file_name().unwrap())).unwrap();
        }
    }
    to
}

/// Changes a JSON file.
pub(crate) fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Changes the tensors of a file.
pub(crate) fn edit_tensors(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = safetensors::load(path, &Device::Cpu).unwrap();
    change(&mut tensors);
    safetensors::save(&tensors, path).unwrap();
}

/// The checkpoint of a directory.
pub(crate) fn load(directory: &Path) -> Florence {
    Florence::load(directory, &LoadOptions::default()).unwrap()
}

/// Asks a model what the reference was asked about a picture; `most_tokens` where it is not said.
pub(crate) fn check_answers(
    florence: &Florence,
    picture: &[u8],
    answers: &[Value],
    most_tokens: Option<usize>,
) {
    for expected in answers {
        let prompt = expected["prompt"].as_str().unwrap();
        let prepared = florence.prepare(picture, prompt, &PrepareOptions::default()).unwrap();
        let number = |name: &str| expected[name].as_u64().map(|n| usize::try_from(n).unwrap());
        let options = GenerateOptions {
            beams: number("beams"),
            no_repeat_ngram: number("no_repeat_ngram"),
            max_new_tokens: number("max_new_tokens").or(most_tokens),
            coordinates: Coordinates::Integer,
            ..GenerateOptions::default()
        };
        let answer = florence.run_one(&prepared, &options).unwrap();
        let what = format!("{} {prompt} {options:?} {}", florence.name(), florence.arithmetic());
        assert_eq!(serde_json::json!(answer.token_ids), expected["token_ids"], "{what}");
        assert_eq!(answer.json, expected["answer"], "{what}");
    }
}

/// Compares values with the strided sample of a fixture.
pub(crate) fn compare(what: &str, found: &[f32], expected: &Value, tolerance: f32) {
    let deviation = expected["std"].as_f64().unwrap() as f32;
    let count: u64 =
        expected["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
    assert_eq!(found.len() as u64, count, "{what}: number of values");
    let step = usize::try_from(expected["step"].as_u64().unwrap()).unwrap();
    let expected: Vec<f32> = serde_json::from_value(expected["values"].clone()).unwrap();
    let found: Vec<f32> = found.iter().step_by(step).copied().collect();
    let difference = |i: usize| (found[i] - expected[i]).abs() / deviation;
    let worst =
        (0..expected.len()).max_by(|a, b| difference(*a).total_cmp(&difference(*b))).unwrap();
    println!("{what}: largest difference {:.1e} of the deviation", difference(worst));
    assert!(
        difference(worst) <= tolerance,
        "{what}: value {worst} is {}, expected {}; first {:?}, expected {:?}",
        found[worst],
        expected[worst],
        &found[..5],
        &expected[..5],
    );
}
