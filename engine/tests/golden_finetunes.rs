//! Fine-tunes as they lie on the hub: what their files leave out, or have wrong, against the
//! reference's answers from checkpoints of that form.

#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod common;

use std::path::Path;

use candle_core::DType;
use common::{check_answers, copy, edit_json, edit_tensors, fixture, path};
use florence_engine::{Florence, LoadOptions, PrepareOptions, TokenIds, Visual, image::Rgb};
use serde_json::{Value, json};

/// Asks a model what the reference was asked.
fn check(florence: &Florence, case: &Value) {
    let picture = case["picture"].as_str().unwrap();
    let picture = std::fs::read(path(picture)).unwrap();
    let answers = case["answers"].as_array().unwrap();
    assert!(answers.len() >= 3);
    check_answers(florence, &picture, answers, Some(30));
}

fn case(name: &str) -> Value {
    fixture("finetunes.json")["cases"][name].clone()
}

/// The answers of `random-native` or `random-original` as they are.
fn unchanged(name: &str) -> Value {
    let fixture: Value = fixture("random.json");
    let mut cases = fixture["cases"].as_array().unwrap().iter();
    let case = cases.find(|case| case["checkpoint"] == name).unwrap();
    json!({"picture": fixture["picture"], "answers": case["answers"]})
}

fn load(directory: &Path) -> Florence {
    let florence = common::load(directory);
    assert_eq!(florence.remarks(), [""; 0]);
    florence
}

fn changed(name: &str, file: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let directory = copy(&path(name));
    edit_json(&directory.path().join(file), change);
    directory
}

fn without_resizing(side: usize) -> String {
    json!({
        "do_resize": false, "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    })
    .to_string()
}

#[test]
fn what_a_bare_checkpoint_lacks_is_told_by_its_tensors_and_another_tokenizer() {
    let options = LoadOptions { tokenizer: Some(path("random-native")), ..LoadOptions::default() };
    let bare = path("random-bare");
    let florence = Florence::load(&bare, &options).unwrap();
    check(&florence, &case("bare"));
    let remarks = florence.remarks();
    assert_eq!(remarks.len(), 2, "{remarks:?}");
    assert_eq!(remarks[0], "preprocessor_config.json is the tokenizer's");
    for field in ["dim_embed", "num_heads", "num_groups", "depths", "patch_prenorm", "window_size"]
    {
        assert!(remarks[1].contains(field), "{remarks:?}");
    }

    let small = copy(&bare);
    std::fs::write(small.path().join("preprocessor_config.json"), without_resizing(100)).unwrap();
    let florence = Florence::load(small.path(), &options).unwrap();
    check(&florence, &case("bare, not resized"));

    let Err(error) = Florence::load(&bare, &LoadOptions::default()) else {
        panic!("it loads without a tokenizer")
    };
    let error = error.to_string();
    assert!(error.contains("has no tokenizer.json") && error.contains("--tokenizer"), "{error}");
}

#[test]
fn a_square_of_64_pixels_that_is_not_resized_has_five_tokens() {
    let model = copy(&path("random-native"));
    std::fs::write(model.path().join("preprocessor_config.json"), without_resizing(100)).unwrap();
    let florence = load(model.path());
    check(&florence, &case("not resized"));
    let prepare = |name: &str| {
        let picture = std::fs::read(path(name)).unwrap();
        florence.prepare(&picture, "<OD>", &PrepareOptions::default())
    };
    let prepared = prepare("random-64.png").unwrap();
    let visual = florence.model().visual_tokens(&[prepared.pixels()], |_| {}).unwrap();
    assert_eq!(visual.dims(), [1, 5, 32]);
    // Pictures of several sizes are encoded as each alone.
    let larger = Rgb { width: 96, height: 96, data: vec![99; 3 * 96 * 96] };
    let larger = florence.preprocess(&larger).unwrap();
    let sizes = florence.visuals(&[prepared.picture(), &larger, prepared.picture()]).unwrap();
    assert_eq!(sizes.len(), 3);
    let bytes = [5, 10, 5].map(|tokens| tokens * 32 * 4);
    assert!(sizes.iter().map(Visual::bytes).eq(bytes));
    let refused = prepare("random.png").unwrap_err().to_string();
    let expected = "the picture is 120x90, but this model takes pictures as they are: squares of \
        up to 100 pixels";
    assert_eq!(refused, expected);
}

#[test]
fn what_means_nothing_here_changes_nothing() {
    for name in ["random-native", "random-original"] {
        let model = changed(name, "config.json", |config| {
            config["auto_map"] = json!({"AutoConfig": "somebody/else--configuration.Config"});
            config["architectures"] = json!(["SomethingElse"]);
            config["pad_token_id"] = json!(50);
            config["vision_config"].as_object_mut().unwrap().remove("model_type");
        });
        check(&load(model.path()), &unchanged(name));
    }
}

#[test]
fn one_field_of_the_generation_settings_leaves_the_others_as_they_are_published() {
    let one = |settings: &mut Value| *settings = json!({"num_beams": 2});
    let model = changed("random-native", "generation_config.json", one);
    check(&load(model.path()), &case("one field"));
}

#[test]
fn wrong_ids_are_taken_and_told_unless_the_tokenizer_decides() {
    let wrong = |settings: &mut Value| {
        for (name, id) in [
            ("decoder_start_token_id", json!(5)),
            ("forced_bos_token_id", json!(7)),
            ("eos_token_id", json!([259, 2])),
            ("forced_eos_token_id", json!(11)),
        ] {
            settings[name] = id;
        }
    };
    let of_text = |config: &mut Value| wrong(&mut config["text_config"]);
    for (name, model, expected) in [
        ("random-native", changed("random-native", "generation_config.json", wrong), "wrong ids"),
        (
            "random-original",
            changed("random-original", "config.json", of_text),
            "wrong ids, original",
        ),
    ] {
        let florence = common::load(model.path());
        check(&florence, &case(expected));
        let told = "start 5, forced_bos 7, eos 259 and forced_eos 11 are given for answers, where \
            the tokenizer has <s> as 0 and </s> as 2; token-ids tokenizer takes these";
        assert_eq!(florence.remarks(), [told]);
        let options = LoadOptions { token_ids: TokenIds::Tokenizer, ..LoadOptions::default() };
        let florence = Florence::load(model.path(), &options).unwrap();
        check(&florence, &unchanged(name));
        assert!(florence.remarks().is_empty());
    }
}

#[test]
fn settings_for_generation_that_no_answer_can_have_are_refused() {
    for (name, value, told) in [
        ("num_beams", 0, "num_beams is 0, not from 1 to 16"),
        ("num_beams", 1000, "num_beams is 1000, not from 1 to 16"),
        ("forced_bos_token_id", 4000, "forced_bos_token_id is 4000, the model has only 1711 ids"),
        ("eos_token_id", 1711, "eos_token_id is 1711, the model has only 1711 ids"),
    ] {
        let one = |settings: &mut Value| settings[name] = json!(value);
        let model = changed("random-native", "generation_config.json", one);
        let loaded = Florence::load(model.path(), &LoadOptions::default());
        let error = loaded.err().unwrap();
        assert!(error.to_string().ends_with(told), "{error}");
    }
}

#[test]
fn weights_may_be_float16_bfloat16_or_float32() {
    let stored_as = |dtype: DType| {
        let model = copy(&path("random-native"));
        edit_tensors(&model.path().join("model.safetensors"), |tensors| {
            for tensor in tensors.values_mut() {
                assert_eq!(tensor.dtype(), DType::F16);
                *tensor = tensor.to_dtype(dtype).unwrap();
            }
        });
        model
    };
    check(&load(stored_as(DType::F32).path()), &unchanged("random-native"));
    check(&load(stored_as(DType::BF16).path()), &case("bfloat16"));
}
