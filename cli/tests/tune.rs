//! `florence tune` on the sample pictures: its plan is what `--precision int8` takes, and only for
//! the weights that it was made for.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod labels;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use florence_engine::Cpu;
use florence_tests::picture;
use labels::{florence, text};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

const PLAN: &str = "florence-int8-plan.json";

fn samples() -> String {
    picture("shapes.png").parent().unwrap().display().to_string()
}

/// A checkpoint that may be written beside.
fn model() -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    for entry in fs::read_dir(tiny).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_file() && !name.starts_with("florence-") {
            fs::copy(&path, directory.path().join(name)).unwrap();
        }
    }
    let path = directory.path().to_owned();
    (directory, path)
}

fn tune(model: &Path, agreement: &str) -> Output {
    let mut tune = florence(&["tune", &samples(), "--agreement", agreement, "--measured", "1"]);
    tune.args(["--task", "<OD>", "--task", "<CAPTION>", "--model"]).arg(model).output().unwrap()
}

fn run(model: &Path) -> Output {
    let picture = picture("shapes.png").display().to_string();
    let mut run = florence(&["run", &picture, "--prompt", "<OD>", "--precision", "int8"]);
    run.arg("--model").arg(model).output().unwrap()
}

#[test]
fn a_plan_is_made_beside_the_model_and_taken_there() {
    let (_directory, model) = model();
    let output = tune(&model, "0.9");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    if !Cpu::detect().has_int8() {
        return assert!(err.contains("this processor has no int8 products"), "{err}");
    }
    assert!(output.status.success(), "{err}");
    assert!(out.trim_end().ends_with(PLAN), "{out}");
    let kept = out.lines().find(|line| line.contains("products in int8 keep")).unwrap();
    let percent: f64 = kept.split(' ').nth(5).unwrap().parse().unwrap();
    assert!((90.0..=100.0).contains(&percent), "{kept}");

    let read =
        || -> Value { serde_json::from_slice(&fs::read(model.join(PLAN)).unwrap()).unwrap() };
    let mut plan = read();
    assert_eq!(plan["format"], "florence int8 plan 1");
    let int8 = plan["int8"].as_array().unwrap();
    assert_eq!(int8.len().to_string(), kept.split(' ').next().unwrap());
    assert!(out.matches("\nint8 ").count() == int8.len() && !int8.is_empty(), "{out}");
    assert!(plan["measured"]["agreement"].as_f64().unwrap() >= 0.9);

    // Packed weights are those of the plan, whenever it changes.
    let packed = || fs::metadata(model.join("florence-packed-int8.safetensors")).unwrap().len();
    assert!(run(&model).status.success());
    let small = packed();
    plan["int8"] = Value::Array(Vec::new());
    fs::write(model.join(PLAN), plan.to_string()).unwrap();
    assert!(run(&model).status.success());
    assert!(packed() > small, "int16 takes more than int8");

    for (field, value, told) in [
        ("int8", serde_json::json!(["lm_tail.weight"]), "has no matrix 'lm_tail.weight'"),
        ("weights", serde_json::json!({ "model.safetensors": 7 }), "run florence tune again"),
        ("format", "florence int8 plan 2".into(), "unknown variant"),
    ] {
        let mut wrong = plan.clone();
        wrong[field] = value;
        fs::write(model.join(PLAN), wrong.to_string()).unwrap();
        let output = run(&model);
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told) && err.contains(PLAN), "{err}");
    }
    // Nobody else reads it.
    let int16 = ["run", &picture("shapes.png").display().to_string(), "--precision", "int16"];
    let output = florence(&int16).args(["--prompt", "<OD>", "--model"]).arg(&model).output();
    assert!(output.unwrap().status.success());
}

#[test]
fn what_cannot_be_tuned_is_told_and_leaves_no_plan() {
    let (_directory, model) = model();
    for (agreement, told) in [("1.5", "--agreement is a share"), ("nan", "--agreement is a share")]
    {
        let output = tune(&model, agreement);
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{err}");
    }
    assert!(!model.join(PLAN).exists());
    let output = florence(&["tune", &samples()]).output().unwrap();
    let err = text(&output.stderr);
    let told = ["a plan is kept beside it", "has no int8 products"];
    assert!(!output.status.success() && told.iter().any(|told| err.contains(told)), "{err}");
}
