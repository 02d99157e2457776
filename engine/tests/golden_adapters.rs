//! Adapters that PEFT made, and the answers of what it merged them to: ids and JSON are equal, the
//! adapter being of either layout, and the weights too.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]

mod common;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device};
use common::{check_answers, copy, fixture, path};
use florence_engine::{
    Florence, Kernels, LoadOptions,
    model::{Packing, merge},
};
use serde_json::{Value, json};

fn adapter(name: &str) -> PathBuf {
    path("adapters").join(name)
}

fn options(name: &str) -> LoadOptions {
    LoadOptions { adapter: Some(adapter(name)), ..LoadOptions::default() }
}

fn checkpoint(case: &Value) -> PathBuf {
    match case["checkpoint"].as_str().unwrap() {
        "models/tiny" => path("../../../models/tiny"),
        name => path(name),
    }
}

/// Asks a merged model what PEFT's was asked.
fn check(florence: &Florence, case: &Value) {
    let picture = std::fs::read(path(case["picture"].as_str().unwrap())).unwrap();
    let answers = case["answers"].as_array().unwrap();
    assert!(answers.len() >= 6);
    check_answers(florence, &picture, answers, Some(40));
}

/// Cases of the fixture, by the adapters' names.
fn cases() -> Vec<(String, Value)> {
    let fixture: Value = fixture("adapters.json");
    let cases = fixture["cases"].as_array().unwrap().iter();
    cases.map(|case| (case["adapter"].as_str().unwrap().to_owned(), case.clone())).collect()
}

fn case(name: &str) -> Value {
    cases().into_iter().find(|(found, _)| found == name).unwrap().1
}

#[test]
fn answers_are_those_of_what_peft_merges() {
    let cases = cases();
    assert!(cases.len() >= 8);
    for (name, case) in cases {
        let florence = Florence::load(&checkpoint(&case), &options(&name)).unwrap();
        check(&florence, &case);
    }
}

#[test]
fn candle_and_the_embedded_model_take_adapters_too() {
    for name in ["dora", "saved", "patterns-original"] {
        let options = LoadOptions { kernels: Kernels::Candle, ..options(name) };
        check(&Florence::load(&path("random-native"), &options).unwrap(), &case(name));
    }
    let florence = Florence::embedded(&options("tiny")).unwrap();
    assert_eq!(florence.name(), "tiny+tiny");
    check(&florence, &case("tiny"));
}

/// The tied weights of `random-native` under Microsoft's names, without the head of
/// `random-original`.
fn original() -> tempfile::TempDir {
    let directory = copy(&path("random-original"));
    let file = directory.path().join("pytorch_model.bin");
    let mut tensors: HashMap<_, _> =
        candle_core::pickle::read_all(&file).unwrap().into_iter().collect();
    tensors.remove("language_model.lm_head.weight").unwrap();
    candle_core::safetensors::save(&tensors, directory.path().join("model.safetensors")).unwrap();
    std::fs::remove_file(file).unwrap();
    directory
}

#[test]
fn an_adapter_of_either_layout_fits_weights_of_the_other() {
    let original = original();
    for (name, case) in cases() {
        if case["checkpoint"] != "models/tiny" {
            let florence = Florence::load(original.path(), &options(&name)).unwrap();
            check(&florence, &case);
        }
    }
}

#[test]
fn packed_weights_are_kept_for_each_adapter() {
    let model = copy(&path("random-native"));
    let packed = || {
        let files = std::fs::read_dir(model.path()).unwrap().map(|file| file.unwrap().file_name());
        let files = files.map(|name| name.into_string().unwrap());
        files
            .filter(|name| name.starts_with("florence-packed-f32") && name.ends_with("tensors"))
            .count()
    };
    let load = |adapter: Option<&Path>| {
        let adapter = adapter.map(Path::to_owned);
        let options = LoadOptions { keep_packed: true, adapter, ..LoadOptions::default() };
        let florence = Florence::load(model.path(), &options).unwrap();
        assert!(matches!(florence.model().packing(), Packing::Mapped));
        florence
    };
    load(None);
    assert_eq!(packed(), 1);
    let changing = copy(&adapter("usual"));
    for (name, files) in [("usual", 2), ("dora", 2), ("usual", 2)] {
        for entry in std::fs::read_dir(adapter(name)).unwrap() {
            let from = entry.unwrap().path();
            let bytes = std::fs::read(&from).unwrap();
            std::fs::write(changing.path().join(from.file_name().unwrap()), bytes).unwrap();
        }
        for _ in 0..2 {
            check(&load(Some(changing.path())), &case(name));
            assert_eq!(packed(), files);
        }
    }
    check(&load(Some(&adapter("dora"))), &case("dora"));
    assert_eq!(packed(), 3);
}

fn error(model: &Path, adapter: &Path) -> String {
    let options = LoadOptions { adapter: Some(adapter.to_owned()), ..LoadOptions::default() };
    match Florence::load(model, &options) {
        Ok(_) => panic!("{} loads", adapter.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_cannot_be_merged_is_named() {
    let model = path("random-native");
    let fails = |damage: &dyn Fn(&Path), expected: &[&str]| {
        let directory = copy(&adapter("patterns"));
        damage(directory.path());
        let found = error(&model, directory.path());
        for expected in expected {
            assert!(found.contains(expected), "{found:?} lacks {expected:?}");
        }
    };
    let rename = |directory: &Path, from: &str, to: &str| {
        common::edit_tensors(&directory.join("adapter_model.safetensors"), |tensors| {
            let names: Vec<String> = tensors.keys().cloned().collect();
            for name in names.into_iter().filter(|name| name.contains(from)) {
                let tensor = tensors.remove(&name).unwrap();
                tensors.insert(name.replace(from, to), tensor);
            }
        });
    };
    let config = |name: &'static str, value: Value| {
        move |directory: &Path| {
            let file = directory.join("adapter_config.json");
            common::edit_json(&file, |config| config[name] = value.clone());
        }
    };
    fails(&config("peft_type", json!("LOHA")), &["adapter_config.json", "kind LOHA", "LORA"]);
    fails(&config("init_lora_weights", json!("pissa")), &["init_lora_weights pissa"]);
    fails(&config("layer_replication", json!([[0, 2]])), &["layer_replication"]);
    fails(&config("r", json!(5)), &["image_projection", "with rank 5", "[32, 32]"]);
    fails(&config("rank_pattern", json!({"(": 1})), &["'(' is not a pattern"]);
    fails(
        &|directory| rename(directory, "encoder.layers.1.fc1", "encoder.layers.7.fc1"),
        &["adapter_model.safetensors", "belong to nothing", "encoder.layers.7.fc1.lora_A.weight"],
    );
    fails(
        &|directory| rename(directory, "layers.1.fc1.lora_A", "layers.1.fc1.lora_A.other"),
        &["belong to nothing", "layers.1.fc1.lora_A.other.weight"],
    );
    fails(
        &|directory| {
            rename(directory, "encoder.layers.1.fc1.lora_A", "encoder.layers.1.fc2.lora_A");
        },
        &["of model.language_model.encoder.layers.1.fc1 there is only A or B"],
    );
    fails(
        &|directory| {
            common::edit_tensors(&directory.join("adapter_model.safetensors"), |tensors| {
                tensors.clear();
            });
        },
        &["there is no tensor in it"],
    );
    fails(
        &|directory| std::fs::remove_file(directory.join("adapter_model.safetensors")).unwrap(),
        &["neither adapter_model.safetensors nor adapter_model.bin"],
    );
    fails(
        &|directory| std::fs::remove_file(directory.join("adapter_config.json")).unwrap(),
        &["cannot read", "adapter_config.json"],
    );
    let grouped = error(&model, &adapter("grouped"));
    let expected = "convolutions in groups cannot be merged: \
        model.vision_tower.blocks.0.0.spatial_block.conv1";
    assert!(grouped.contains(expected), "{grouped}");
    assert_eq!(error(&model, Path::new("/nowhere")), "there is no directory /nowhere");
    // The one in place of the other.
    let found = error(&adapter("usual"), &model);
    assert!(found.contains("usual holds an adapter, which needs the model"), "{found}");
}

/// The tensors of a merged checkpoint have the names, shapes and numbers of the one that it is of.
#[test]
fn a_merged_checkpoint_answers_as_the_model_with_the_adapter() {
    let original = original();
    let work = tempfile::tempdir().unwrap();
    // Rounding to float16 would be seen in the answers.
    let native = copy(&path("random-native"));
    for model in [native.path(), original.path()] {
        common::edit_tensors(&model.join("model.safetensors"), |tensors| {
            for tensor in tensors.values_mut() {
                *tensor = tensor.to_dtype(DType::F32).unwrap();
            }
        });
    }
    for (i, (name, case)) in cases().into_iter().enumerate() {
        if case["checkpoint"] == "models/tiny" {
            continue;
        }
        for model in [native.path(), original.path()] {
            let out = work.path().join(format!("{i}-{}", model.file_name().unwrap().display()));
            assert!(merge(model, &adapter(&name), &out).unwrap() > 5);
            check(&common::load(&out), &case);
            let tensors = |directory: &Path| {
                candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu)
            };
            let (before, after) = (tensors(model).unwrap(), tensors(&out).unwrap());
            for (name, tensor) in &before {
                assert_eq!(after[name].dims(), tensor.dims(), "{name}");
                assert_eq!(after[name].dtype(), tensor.dtype(), "{name}");
            }
            let config: Value =
                serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
            let is_untied = config["tie_word_embeddings"] == json!(false);
            assert_eq!(is_untied, after.len() > before.len(), "{name}");
            assert_eq!(is_untied, ["usual", "dora", "embeddings", "saved"].contains(&&*name));
        }
    }
    let out = work.path().join("again");
    merge(&path("random-original"), &adapter("usual"), &out).unwrap();
    let refused = merge(&path("random-original"), &adapter("usual"), &out).unwrap_err();
    assert!(refused.to_string().starts_with("cannot write"), "{refused}");
    let missing = merge(&path("random-native"), &path("random-native"), &work.path().join("none"));
    assert!(missing.unwrap_err().to_string().contains("adapter_config.json"));
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 2 * (cases().len() - 1) + 1);
}
