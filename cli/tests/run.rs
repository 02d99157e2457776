//! `florence run` as scripts use it: exit codes, what goes where, pipes that are closed.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::{
    io::Read,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn sample(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tiny/samples").join(name);
    path.display().to_string()
}

fn florence(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_florence"));
    command.arg("run").args(args);
    command
}

fn run(args: &[&str]) -> Output {
    florence(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The object of a run with `--json` of one picture.
fn json(args: &[&str]) -> Value {
    let output = run(&[&["--json"], args].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_version_is_that_of_all_crates() {
    let output = Command::new(env!("CARGO_BIN_EXE_florence")).arg("--version").output().unwrap();
    assert_eq!(text(&output.stdout), concat!("florence ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_broken_picture_does_not_stop_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken.png").display().to_string();
    std::fs::write(&broken, b"hello").unwrap();
    let missing = directory.path().join("missing.png").display().to_string();
    let (shapes, sign) = (sample("shapes.png"), sample("sign.png"));
    let output = run(&["--prompt", "<OCR>", &shapes, &broken, &missing, &sign]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{err}");
    let answered: Vec<&str> = out.lines().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(answered, [&shapes, &sign], "{err}");
    assert!(err.contains(&format!("{broken}: not a picture in a known format")), "{err}");
    assert!(err.contains(&format!("{missing}: cannot read it: No such file")), "{err}");
    assert!(err.contains("2 of 4 pictures have no answer"), "{err}");
}

#[test]
fn an_adapter_answers_and_can_be_merged() {
    let engine = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures");
    let fixture = |name: &str| engine.join(name).display().to_string();
    let (native, adapter, bare) =
        (fixture("random-native"), fixture("adapters/biases"), fixture("random-bare"));
    let work = tempfile::tempdir().unwrap();
    let merged = format!("{}/", work.path().join("merged").display());
    let shapes = sample("shapes.png");
    let ask = |model: &[&str]| {
        let fixed = ["--no-packed-file", "--max-new-tokens", "20", "--prompt", "<OD>", &shapes];
        json(&[model, &fixed].concat())
    };
    let plain = ask(&["--model", &native]);
    let adapted = ask(&["--model", &native, "--adapter", &adapter]);
    assert_eq!(adapted["model"], "random-native+biases");
    assert_ne!(adapted["token_ids"], plain["token_ids"]);
    let merge = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_florence"));
        command.args(["merge", &native, &adapter, &merged]).output().unwrap()
    };
    let output = merge();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && out.contains("weights changed"), "{out} {err}");
    assert_eq!(ask(&["--model", &merged])["model"], "merged");
    // Whoever serves it may be another user.
    let mode = |name: &str| {
        std::fs::metadata(work.path().join("merged").join(name)).unwrap().permissions().mode()
    };
    assert_eq!(mode("model.safetensors"), mode("config.json"));
    let again = merge();
    let err = text(&again.stderr);
    assert!(!again.status.success() && err.contains("cannot write"), "{err}");

    let refused = run(&["--model", &adapter, "--prompt", "<OD>", &shapes]);
    let err = text(&refused.stderr);
    assert!(err.contains("biases holds an adapter, which needs the model"), "{err}");
    let refused = run(&["--model", &bare, "--prompt", "<OD>", &shapes]);
    let err = text(&refused.stderr);
    assert!(err.contains("random-bare has no tokenizer.json"), "{err}");
    let fixed = ["--no-packed-file", "--max-new-tokens", "5", "--prompt", "<OD>", &shapes];
    let output = run(&[&["--model", &bare, "--tokenizer", &native], &fixed[..]].concat());
    let err = text(&output.stderr);
    assert!(output.status.success() && err.contains("config.json has no dim_embed"), "{err}");
}

#[test]
fn the_best_beams_are_told_with_their_scores() {
    let shapes = sample("shapes.png");
    let found = json(&["--prompt", "<OD>", "--nbest", "3", &shapes]);
    let best = found["nbest"].as_array().unwrap();
    assert_eq!((best.len(), &best[0]["result"]), (3, &found["answer"]));
    assert!(best[0]["score"].as_f64() >= best[2]["score"].as_f64(), "{best:?}");
    let output = run(&["--prompt", "<CAPTION>", "--beams", "2", "--nbest", "2", &shapes]);
    let out = text(&output.stdout);
    assert_eq!(
        out.lines().filter(|line| line.contains(": -0.") && line.ends_with('}')).count(),
        2,
        "{out}"
    );
    for (options, told) in [
        (&["--nbest", "4"][..], "--nbest 4 is more than there are beams, 3"),
        (&["--nbest", "2", "--temperature", "1"], "cannot be used with"),
        (&["--nbest", "2", "--step", "EACH <REGION_TO_OCR>"], "cannot be used with"),
        (&["--nbest", "0"], "a number from 1 to 16"),
    ] {
        let refused = run(&[&["--prompt", "<OD>", &shapes], options].concat());
        let err = text(&refused.stderr);
        assert!(!refused.status.success() && err.contains(told), "{err}");
    }
}

#[test]
fn a_bad_prompt_is_told_once() {
    let shapes = sample("shapes.png");
    let output = run(&["--prompt", "<OD> cats", &shapes, &shapes]);
    let err = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{err}");
    let told = "<OD> takes no text; did you mean <CAPTION_TO_PHRASE_GROUNDING>?";
    assert_eq!(err.matches(told).count(), 1, "{err}");
}

#[test]
fn a_reader_that_has_seen_enough_ends_the_run_quietly() {
    let shapes = sample("shapes.png");
    let mut args = vec!["--json", "--prompt", "<OD>"];
    args.extend([shapes.as_str(); 40]);
    for broken in [false, true] {
        let mut command = florence(&args);
        if broken {
            // Standard error may be the same pipe.
            command.arg("/nowhere");
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = [0];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let output = child.wait_with_output().unwrap();
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{err}");
        assert!(!err.contains("panicked"), "{err}");
    }
    let mut child =
        florence(&["--prompt", "<OD>", "/nowhere"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().code().is_some_and(|code| code < 2));
}

#[test]
fn the_embedded_model_says_on_stderr_what_it_knows() {
    let output = run(&["--prompt", "<OD>", &sample("shapes.png")]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(err.contains("tiny model knows coloured shapes and short words"), "{err}");
    assert!(err.contains("florence pull microsoft/Florence-2-base-ft"), "{err}");
    assert_eq!(out.lines().count(), 1, "{out}");
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    let model = model.display().to_string();
    let args = ["--no-packed-file", "--model", &model, "--prompt", "<OD>", &sample("shapes.png")];
    assert_eq!(text(&run(&args).stderr), "");
}

#[test]
fn an_answer_tells_the_pictures_size_and_has_a_score_for_each_label() {
    let shapes = sample("shapes.png");
    let picture = image::open(&shapes).unwrap();
    for (prompt, labels) in [
        ("<OD>", "labels"),
        ("<OCR_WITH_REGION>", "labels"),
        ("<REGION_PROPOSAL>", "labels"),
        ("<CAPTION_TO_PHRASE_GROUNDING> a red circle", "labels"),
        ("<REFERRING_EXPRESSION_SEGMENTATION> red circle", "labels"),
        ("<OPEN_VOCABULARY_DETECTION> red circle", "bboxes_labels"),
    ] {
        let line = json(&["--prompt", prompt, &shapes]);
        let size = (line["width"].as_u64(), line["height"].as_u64());
        assert_eq!(size, (Some(picture.width().into()), Some(picture.height().into())));
        let answer = line["answer"].as_object().unwrap().values().next().unwrap();
        let scores = line["scores"].as_array().unwrap();
        assert_eq!(scores.len(), answer[labels].as_array().unwrap().len(), "{line}");
        let is_probability = |score: &Value| score.as_f64().is_some_and(|p| p > 0.0 && p <= 1.0);
        assert!(scores.iter().all(is_probability), "{line}");
    }
    let caption = json(&["--prompt", "<CAPTION>", &shapes]);
    assert_eq!(caption["scores"].as_array().unwrap().len(), 1);
}

#[test]
fn coordinates_have_as_many_decimals_as_wished() {
    let shapes = sample("shapes.png");
    let boxes = |decimals: &str| -> Vec<f64> {
        let line = json(&["--prompt", "<OD>", "--decimals", decimals, &shapes]);
        let boxes: Vec<Vec<f64>> =
            serde_json::from_value(line["answer"]["<OD>"]["bboxes"].clone()).unwrap();
        boxes.concat()
    };
    let (all, one) = (boxes("all"), boxes("1"));
    assert_eq!(all, {
        let line = json(&["--prompt", "<OD>", &shapes]);
        let boxes: Vec<Vec<f64>> =
            serde_json::from_value(line["answer"]["<OD>"]["bboxes"].clone()).unwrap();
        boxes.concat()
    });
    assert_ne!(all, one);
    let rounded: Vec<f64> = all.iter().map(|number| (number * 10.0).round() / 10.0).collect();
    assert_eq!(one, rounded);
    assert!(boxes("0").iter().all(|number| number.fract() == 0.0));
}

#[test]
fn other_texts_are_asked_where_any_prompt_is_taken() {
    let shapes = sample("shapes.png");
    let refused = run(&["--prompt", "<DocVQA> what is red?", &shapes]);
    let err = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(err.contains("Other texts are taken where prompts is any"), "{err}");
    let ask = |prompt: &str| json(&["--prompts", "any", "--prompt", prompt, &shapes]);
    let answer = ask("<DocVQA> what is red?");
    assert!(answer["answer"]["<DocVQA>"].is_string(), "{answer}");
    // The sentence of a task is the same question, under another name.
    let sentence = "What does the image describe?";
    assert_eq!(ask(sentence)["answer"][sentence], ask("<CAPTION>")["answer"]["<CAPTION>"]);
    let special = run(&["--prompts", "any", "--prompt", "<DocVQA></s>x", &shapes]);
    assert!(text(&special.stderr).contains("special token </s>"));
}

#[test]
fn the_version_is_told_under_the_programs_name() {
    let told = Command::new(env!("CARGO_BIN_EXE_florence")).arg("--version").output().unwrap();
    assert_eq!(text(&told.stdout).trim(), concat!("florence ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn steps_ask_about_what_was_found_and_can_be_drawn() {
    let shapes = sample("shapes.png");
    let told = json(&["--prompt", "<OD>", "--step", "EACH <REGION_TO_SEGMENTATION>", &shapes]);
    let steps = told["answer"]["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 2);
    let found = steps[0]["answer"]["<OD>"]["labels"].as_array().unwrap().len();
    assert_eq!(steps[1]["each"].as_array().unwrap().len(), found);
    let one = json(&["--prompt", "<OD>", "--step", "CROP <OCR>", "--most-regions", "1", &shapes]);
    assert_eq!(one["answer"]["steps"][1]["left_out"], found - 1);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out.svg").display().to_string();
    let drawn = Command::new(env!("CARGO_BIN_EXE_florence"))
        .args(["draw", &shapes, &told.to_string(), &out])
        .output()
        .unwrap();
    assert!(drawn.status.success(), "{}", text(&drawn.stderr));
    let svg = std::fs::read_to_string(&out).unwrap();
    assert_eq!(svg.matches("<path").count(), 2 * found);
    for (step, problem) in [
        ("EACH <CAPTION>", "EACH asks about regions"),
        ("<OCR>", "a step is THEN, EACH or CROP, and a prompt"),
    ] {
        let output = run(&["--prompt", "<OD>", "--step", step, &shapes]);
        assert!(!output.status.success() && text(&output.stderr).contains(problem), "{step}");
    }
}

#[test]
fn tokens_are_drawn_alike_with_the_same_seed() {
    let drawn = |seed: &str| {
        let options = ["--temperature", "8", "--seed", seed, "--max-new-tokens", "24"];
        let asked = ["--prompt", "<DETAILED_CAPTION>", &sample("shapes.png")];
        json(&[&options[..], &asked].concat())["token_ids"].clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    let asked = ["--prompt", "<DETAILED_CAPTION>", "--max-new-tokens", "24", &sample("shapes.png")];
    let ids = |options: &[&str]| json(&[&asked[..], options].concat())["token_ids"].clone();
    // One of them is enough.
    let all = ["--temperature", "1", "--top-k", "50", "--seed", "0"];
    assert_eq!(ids(&["--top-k", "50"]), ids(&all));
    assert_eq!(ids(&["--seed", "0"]), ids(&all));
    for option in ["--temperature", "--top-k", "--top-p", "--seed"] {
        let output = run(&["--prompt", "<OD>", option, "1", "--beams", "3", "x.png"]);
        assert_eq!(output.status.code(), Some(2), "beams and {option} do not go together");
        let output = run(&["--prompt", "<OD>", option, "1", "--length-penalty", "3", "x.png"]);
        assert_eq!(output.status.code(), Some(2), "no beams have a length penalty");
    }
    let greedy = run(&["--prompt", "<OD>", "--beams", "1", "--length-penalty", "3", "x.png"]);
    assert!(text(&greedy.stderr).contains("--length-penalty is for several beams"));
    let margin = run(&["--prompt", "<OD>", "--margin", "5", &sample("shapes.png")]);
    assert!(text(&margin.stderr).contains("--margin is for CROP"));
}
