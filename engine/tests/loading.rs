//! Checkpoint directories that are split, damaged or inconsistent.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]

mod common;

use std::{collections::HashMap, path::Path};

use candle_core::{Device, safetensors};
use common::{load, path};
use florence_engine::{Florence, GenerateOptions, LoadOptions, PrepareOptions};
use serde_json::{Value, json};

fn copy(name: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(path(name)).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, to.path().join(from.file_name().unwrap())).unwrap();
    }
    to
}

fn error(directory: &Path) -> String {
    match Florence::load(directory, &LoadOptions::default()) {
        Ok(_) => panic!("{} loads", directory.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_sharded_checkpoint_answers_like_the_single_file() {
    let directory = copy("random-native");
    let single = directory.path().join("model.safetensors");
    let tensors = safetensors::load(&single, &Device::Cpu).unwrap();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut weight_map = HashMap::new();
    for (i, part) in names.chunks(names.len().div_ceil(3)).enumerate() {
        let file = format!("model-{i:05}-of-00003.safetensors");
        let part: HashMap<String, _> =
            part.iter().map(|name| ((*name).clone(), tensors[*name].clone())).collect();
        safetensors::save(&part, directory.path().join(&file)).unwrap();
        weight_map.extend(part.into_keys().map(|name| (name, file.clone())));
    }
    std::fs::remove_file(single).unwrap();
    let index = json!({ "weight_map": weight_map }).to_string();
    std::fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();

    let picture = std::fs::read(path("random.png")).unwrap();
    let answer = |florence: &Florence| {
        let prepared = florence.prepare(&picture, "<OD>", &PrepareOptions::default()).unwrap();
        let options = GenerateOptions { max_new_tokens: Some(20), ..GenerateOptions::default() };
        florence.run_one(&prepared, &options).unwrap().token_ids
    };
    assert_eq!(answer(&load(directory.path())), answer(&load(&path("random-native"))));
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_named() {
    let edit = |directory: &Path, change: &dyn Fn(&mut Value)| {
        let path = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
    };
    let check = |damage: &dyn Fn(&Path), expected: &str| {
        let directory = copy("random-native");
        damage(directory.path());
        let found = error(directory.path());
        assert!(found.contains(expected), "{found:?} lacks {expected:?}");
    };
    check(&|dir| std::fs::remove_file(dir.join("config.json")).unwrap(), "config.json");
    check(&|dir| std::fs::write(dir.join("config.json"), "{").unwrap(), "config.json is not what");
    check(&|dir| std::fs::write(dir.join("tokenizer.json"), "{}").unwrap(), "tokenizer.json");
    check(
        &|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap(),
        "neither model.safetensors nor pytorch_model.bin",
    );
    check(
        &|dir| std::fs::write(dir.join("model.safetensors"), [0; 100]).unwrap(),
        "model.safetensors is damaged",
    );
    check(
        &|dir| edit(dir, &|config| config["text_config"]["encoder_layers"] = json!(3)),
        "tensor text.encoder.layers.2.self_attn.q_proj.weight is missing, expected shape [32, 32]",
    );
    check(
        &|dir| edit(dir, &|config| config["vision_config"]["embed_dim"][1] = json!(24)),
        "tensor model.vision_tower.convs.1.conv.weight has shape [16, 8, 3, 3], expected [24, 8, 3, 3]",
    );
    check(
        &|dir| edit(dir, &|config| config["vision_config"]["num_heads"] = json!([1])),
        "differ in length",
    );
    check(
        &|dir| edit(dir, &|config| config["text_config"]["decoder_attention_heads"] = json!(5)),
        "does not divide into 5 heads",
    );
}

#[test]
fn special_tokens_cannot_be_smuggled_in() {
    let florence = load(&path("random-native"));
    for text in ["</s>", "a <loc_5> b", "<image>", "x<pad>"] {
        let prompt = format!("<OPEN_VOCABULARY_DETECTION>{text}");
        let error = florence.question(&prompt).unwrap_err().to_string();
        assert!(error.contains("must not contain the special token"), "{error}");
    }
    let long = format!("<OPEN_VOCABULARY_DETECTION>{}", "word ".repeat(500));
    let error = florence.question(&long).unwrap_err().to_string();
    assert!(error.contains("the model takes at most"), "{error}");
}

#[test]
fn a_run_stops_when_it_is_told_to() {
    let florence = load(&path("random-native"));
    let picture = std::fs::read(path("random.png")).unwrap();
    let prepared = florence.prepare(&picture, "<OD>", &PrepareOptions::default()).unwrap();
    let options = GenerateOptions::default();
    let job = || florence_engine::Job { prepared: &prepared, options: &options };
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let stopped =
        |i: usize| i == 1 && asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= 3;
    let answers = florence.run(&[job(), job()], &stopped).unwrap();
    assert!(answers[0].is_some() && answers[1].is_none());
}
