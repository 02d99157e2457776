//! Tiny random checkpoints in both layouts against the reference: every stage, ids, JSON.
//!
//! The native one is float16 safetensors, the original one a pickle with a head of its own.

mod common;

use common::{compare, fixture};
use florence_engine::{
    Florence, GenerateOptions, Job, Kernels, LoadOptions, Precision, PrepareOptions,
};
use serde_json::Value;

/// Largest difference allowed between two float32 computations in different orders, relative to
/// the deviation of the stage's values; a wrong formula is off by far more.
const TOLERANCE: f32 = 5e-5;

/// The processor's kernels, and those of CUDA devices, emulated; where the processor is emulated too,
/// that would take too long.
fn both() -> impl Iterator<Item = LoadOptions> {
    let emulated = cfg!(target_arch = "x86_64").then_some(Kernels::Emulated);
    let kernels = std::iter::once(Kernels::Best).chain(emulated);
    kernels.map(|kernels| LoadOptions { kernels, ..LoadOptions::default() })
}

#[test]
fn every_stage_equals_the_references() {
    let fixtures: Value = fixture("random.json");
    let picture = std::fs::read(common::path("random.png")).unwrap();
    let cases = fixtures["cases"].as_array().unwrap();
    for (case, options) in cases.iter().flat_map(|case| both().map(move |options| (case, options)))
    {
        let checkpoint = case["checkpoint"].as_str().unwrap();
        let florence = Florence::load(&common::path(checkpoint), &options).unwrap();
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
            let what = format!("{checkpoint} {name} {}", florence.arithmetic());
            compare(&what, &found, &case["stages"][name], TOLERANCE);
        }
    }
}

#[test]
fn ids_and_json_equal_the_references() {
    let fixtures: Value = fixture("random.json");
    let picture = std::fs::read(common::path("random.png")).unwrap();
    let cases = fixtures["cases"].as_array().unwrap();
    for (case, options) in cases.iter().flat_map(|case| both().map(move |options| (case, options)))
    {
        let checkpoint = case["checkpoint"].as_str().unwrap();
        let florence = Florence::load(&common::path(checkpoint), &options).unwrap();
        // What is emulated takes its time.
        let step = if matches!(options.kernels, Kernels::Emulated) { 12 } else { 1 };
        for expected in case["answers"].as_array().unwrap().iter().step_by(step) {
            let prompt = expected["prompt"].as_str().unwrap();
            let prepared = florence.prepare(&picture, prompt, &PrepareOptions::default()).unwrap();
            assert_eq!(serde_json::json!(prepared.prompt_ids()), expected["prompt_ids"]);
            common::check_answers(&florence, &picture, std::slice::from_ref(expected), None);
        }
    }
}

#[test]
fn a_devices_answers_do_not_depend_on_who_else_is_there() {
    let options = LoadOptions { kernels: Kernels::Emulated, ..LoadOptions::default() };
    let florence = Florence::load(&common::path("random-native"), &options).unwrap();
    let picture = |name| std::fs::read(common::path(name)).unwrap();
    let pictures = [picture("random.png"), picture("pictures/00.png"), picture("pictures/01.png")];
    let prompts = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING>a red circle", "<OCR>", "<CAPTION>"];
    let options = |i: usize| GenerateOptions {
        beams: Some(1 + i % 3),
        max_new_tokens: Some(4 + 2 * i),
        ..GenerateOptions::default()
    };
    let prepare = PrepareOptions::default();
    let jobs: Vec<_> = (0..5)
        .map(|i| {
            let prepared = florence.prepare(&pictures[i % 3], prompts[i % 4], &prepare).unwrap();
            (prepared, options(i))
        })
        .collect();
    let batch: Vec<Job<'_>> =
        jobs.iter().map(|(prepared, options)| Job { prepared, options }).collect();
    let together = florence.run(&batch, &|_| false).unwrap();
    for ((prepared, options), together) in jobs.iter().zip(together) {
        let alone = florence.run_one(prepared, options).unwrap();
        assert_eq!(together.unwrap().token_ids, alone.token_ids);
    }
    // Pictures that are encoded together are those that are encoded alone, to the bit.
    let picture = |i: usize| jobs[i].0.pixels();
    let values = |pictures: &[usize]| -> Vec<Vec<f32>> {
        let pixels: Vec<_> = pictures.iter().map(|i| picture(*i)).collect();
        let tokens = florence.model().visual_tokens(&pixels, |_| {}).unwrap();
        tokens.flatten_from(1).unwrap().to_vec2().unwrap()
    };
    let all = values(&[0, 1, 2]);
    for (i, together) in all.iter().enumerate() {
        assert!(values(&[i])[0] == *together, "picture {i}");
    }
}

#[test]
fn a_device_in_bfloat16_stays_near() {
    let bytes = std::fs::read(common::path("random.png")).unwrap();
    let encoded = |precision| -> Vec<f32> {
        let options =
            LoadOptions { kernels: Kernels::Emulated, precision, ..LoadOptions::default() };
        let florence = Florence::load(&common::path("random-native"), &options).unwrap();
        let prepared = florence.prepare(&bytes, "<OD>", &PrepareOptions::default()).unwrap();
        let model = florence.model();
        let visual = model.visual_tokens(&[prepared.pixels()], |_| {}).unwrap();
        let encoded = model.encode(&visual, prepared.prompt_ids()).unwrap();
        let logits = model.logits_after(&encoded, &[2, 0, 5]).unwrap();
        let both = [encoded.flatten_all().unwrap(), logits];
        both.iter().flat_map(|x| x.to_vec1::<f32>().unwrap()).collect()
    };
    let (exact, found) = (encoded(Precision::F32), encoded(Precision::Bf16));
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let cosine = dot(&exact, &found) / (dot(&exact, &exact) * dot(&found, &found)).sqrt();
    assert!(cosine > 0.999 && exact != found, "{cosine}");
}
