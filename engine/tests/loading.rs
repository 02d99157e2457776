//! Checkpoint directories that are split, damaged or inconsistent.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]

mod common;

use std::{collections::HashMap, path::Path};

use candle_core::{Device, safetensors};
use common::{load, path};
use florence_engine::{
    Florence, GenerateOptions, LoadOptions, PrepareOptions, has_cpu,
    model::Packing,
    prompt::{PromptError, Prompts},
};
use serde_json::{Value, json};

fn copy(name: &str) -> tempfile::TempDir {
    common::copy(&path(name))
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

    assert_eq!(answer(&load(directory.path())), answer(&load(&path("random-native"))));
}

fn answer(florence: &Florence) -> Vec<u32> {
    let picture = std::fs::read(path("random.png")).unwrap();
    let prepared = florence.prepare(&picture, "<OD>", &PrepareOptions::default()).unwrap();
    let options = GenerateOptions { max_new_tokens: Some(20), ..GenerateOptions::default() };
    florence.run_one(&prepared, &options).unwrap().token_ids
}

#[test]
fn weights_that_were_never_trained_are_found_out_by_trying() {
    load(&path("random-native")).try_out().unwrap();
    let directory = copy("random-native");
    common::edit_tensors(&directory.path().join("model.safetensors"), |tensors| {
        let (name, weight) = tensors
            .iter()
            .find(|(name, _)| name.ends_with("decoder.layernorm_embedding.weight"))
            .unwrap();
        let (name, broken) = (name.clone(), weight.affine(f64::NAN, 0.0).unwrap());
        tensors.insert(name, broken);
    });
    let problem = load(directory.path()).try_out().unwrap_err().to_string();
    assert!(problem.contains("no probabilities"), "{problem}");
}

#[test]
fn packed_weights_are_kept_and_made_anew_when_they_are_not_right() {
    let directory = copy("random-original");
    let file = directory.path().join("florence-packed-f32.safetensors");
    let expected = answer(&load(&path("random-original")));
    let load = || {
        let options = LoadOptions { keep_packed: true, ..LoadOptions::default() };
        Florence::load(directory.path(), &options).unwrap()
    };
    let check = |florence: &Florence| {
        assert!(
            matches!(florence.model().packing(), Packing::Mapped),
            "{:?}",
            florence.model().packing()
        );
        assert_eq!(answer(florence), expected);
        std::fs::metadata(&file).unwrap().modified().unwrap()
    };
    // Several at once: one packs, and all of them map the same file.
    let first = std::thread::scope(|scope| {
        let loads: Vec<_> = (0..4).map(|_| scope.spawn(|| check(&load()))).collect();
        let times: Vec<_> = loads.into_iter().map(|load| load.join().unwrap()).collect();
        assert!(times.iter().all(|time| *time == times[0]));
        times[0]
    });
    let old = load();
    assert_eq!(check(&old), first);

    let whole = std::fs::read(&file).unwrap();
    for damage in [whole.len() - 100, whole.len() / 2, 300] {
        let mut damaged = whole.clone();
        damaged[damage] ^= 4;
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, damaged).unwrap();
        check(&load());
        assert!(std::fs::read(&file).unwrap().len() == whole.len());
    }
    for cut in [0, 7, 1000, whole.len() - 1] {
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, &whole[..cut]).unwrap();
        check(&load());
    }
    // Other weights under the old name.
    let weights = directory.path().join("pytorch_model.bin");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, bytes).unwrap();
    assert!(check(&load()) > first);
    // Who mapped the first file still has it.
    assert_eq!(answer(&old), expected);
    assert!(!directory.path().join("florence-packed-f32.safetensors.new").exists());
}

#[test]
fn a_model_loads_where_nothing_can_be_kept() {
    let directory = copy("random-native");
    let check = || {
        let options = LoadOptions { keep_packed: true, ..LoadOptions::default() };
        let florence = Florence::load(directory.path(), &options).unwrap();
        assert_eq!(answer(&florence), answer(&load(&path("random-native"))));
        assert!(matches!(florence.model().packing(), Packing::Failed(_)));
    };
    let lock = directory.path().join("florence-packed-f32.safetensors.lock");
    std::fs::create_dir(&lock).unwrap();
    check();
    // A disk that is full.
    std::fs::remove_dir(lock).unwrap();
    let file = directory.path().join("florence-packed-f32.safetensors.new");
    std::os::unix::fs::symlink("/dev/full", file).unwrap();
    check();
}

#[test]
fn packed_weights_of_several_checkpoints_are_kept_in_one_directory() {
    let (original, native) = (copy("random-original"), copy("random-native"));
    let elsewhere = tempfile::tempdir().unwrap();
    for directory in [&original, &native] {
        // As a directory that may not be written to.
        let lock = directory.path().join("florence-packed-f32.safetensors.lock");
        std::fs::create_dir(lock).unwrap();
    }
    let options = LoadOptions {
        keep_packed: true,
        packed_directory: Some(elsewhere.path().to_owned()),
        ..LoadOptions::default()
    };
    let kept = || {
        let files = std::fs::read_dir(elsewhere.path()).unwrap().map(|file| file.unwrap());
        let kept = files.filter(|file| file.path().extension().unwrap() == "safetensors");
        let kept = kept.map(|file| (file.path(), file.metadata().unwrap().modified().unwrap()));
        kept.collect::<HashMap<_, _>>()
    };
    let check = || {
        for directory in [&original, &native] {
            let florence = Florence::load(directory.path(), &options).unwrap();
            assert!(matches!(florence.model().packing(), Packing::Mapped));
            assert_eq!(answer(&florence), answer(&load(directory.path())));
        }
        kept()
    };
    let first = check();
    assert_eq!(first.len(), 2, "{first:?}");
    assert_eq!(check(), first, "they were made anew");
}

/// A service manager's filter of system calls, as in Debian's unit of Redis, which ends the
/// process at `setpriority` and `sched_setaffinity`; for this thread and those that it starts.
#[expect(unsafe_code, reason = "system calls that have no wrapper")]
fn end_the_process_at_changes_of_priority() {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let line = |code: u32, jt, jf, k| sock_filter { code: code.try_into().unwrap(), jt, jf, k };
    let is = |call: i64, to_the_end| {
        line(BPF_JMP | BPF_JEQ | BPF_K, to_the_end, 0, u32::try_from(call).unwrap())
    };
    let mut lines = [
        line(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        is(libc::SYS_setpriority, 2),
        is(libc::SYS_sched_setaffinity, 1),
        line(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        line(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let len = lines.len().try_into().unwrap();
    let program = libc::sock_fprog { len, filter: lines.as_mut_ptr() };
    // SAFETY: the kernel copies the program.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program),
        ]
    };
    assert_eq!(results, [0, 0], "{}", std::io::Error::last_os_error());
}

#[test]
fn a_model_loads_where_its_threads_may_be_neither_nice_nor_pinned() {
    let filtered = || {
        end_the_process_at_changes_of_priority();
        assert!(!has_cpu(0));
        let options = LoadOptions { nice: 5, cpus: vec![0], ..LoadOptions::default() };
        answer(&Florence::load(&path("random-native"), &options).unwrap())
    };
    let found = std::thread::scope(|scope| scope.spawn(filtered).join().unwrap());
    assert_eq!(found, answer(&load(&path("random-native"))));
    assert!(has_cpu(0));
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
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for name in ["model.safetensors", "tokenizer.json"] {
        check(
            &|dir| std::fs::write(dir.join(name), pointer).unwrap(),
            &format!("{name} is a Git LFS pointer and not the file itself"),
        );
    }
    for (name, page) in [
        ("model.safetensors", "<!DOCTYPE html>\n<html><body>Sign in"),
        ("config.json", "  <html lang=\"en\"><body>Sign in"),
    ] {
        check(
            &|dir| std::fs::write(dir.join(name), page).unwrap(),
            &format!("{name} is a web page and not the file itself"),
        );
    }
    check(
        &|dir| edit(dir, &|config| config["text_config"]["encoder_layers"] = json!(3)),
        "tensor text.encoder.layers.2.self_attn.q_proj.bias is missing, expected shape [32]",
    );
    check(
        &|dir| edit(dir, &|config| config["vision_config"]["embed_dim"][1] = json!(24)),
        "tensor model.vision_tower.convs.1.conv.bias has shape [16], expected [24]",
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
fn a_directory_that_is_not_there_may_be_a_name_of_the_hub() {
    let hub = "there is no directory microsoft/Florence-2-base; if it is a name of the Hugging Face \
        hub, `florence pull microsoft/Florence-2-base` downloads it";
    assert_eq!(error(Path::new("microsoft/Florence-2-base")), hub);
    for path in ["/nowhere/model", "./nowhere/model", "../nowhere", "nowhere"] {
        assert_eq!(error(Path::new(path)), format!("there is no directory {path}"));
    }
}

#[test]
fn special_tokens_cannot_be_smuggled_in() {
    let florence = load(&path("random-native"));
    for text in ["</s>", "a <loc_5> b", "<image>", "x<pad>"] {
        for (task, prompts) in
            [("<OPEN_VOCABULARY_DETECTION>", Prompts::Tasks), ("<DocVQA>", Prompts::Any)]
        {
            let error = florence.question(&format!("{task}{text}"), prompts).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("must not contain the special token"), "{error}");
        }
    }
    let long = format!("<OPEN_VOCABULARY_DETECTION>{}", "word ".repeat(500));
    let error = florence.question(&long, Prompts::Tasks).unwrap_err().to_string();
    assert!(error.contains("the model takes at most"), "{error}");
}

#[test]
fn a_prompt_that_was_taken_once_is_taken_only_where_it_may_be() {
    let florence = load(&path("random-native"));
    let prompt = "<DocVQA> what is it?";
    assert!(florence.question(prompt, Prompts::Tasks).is_err());
    assert!(florence.question(prompt, Prompts::Any).is_ok());
    let refused = florence.question(prompt, Prompts::Tasks);
    assert!(matches!(refused, Err(PromptError::UnknownTask { .. })), "{refused:?}");
    assert!(florence.question("<OD>", Prompts::Any).is_ok());
    assert!(florence.question("<OD>", Prompts::Tasks).is_ok());
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
