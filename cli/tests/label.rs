//! `florence label` as people call it: every kind of source, runs that are ended in every way and go
//! on, output that is never torn nor double.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod labels;

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use florence_tests::{Pictures, eventually, picture};
use labels::{answered, command, draw_pictures, florence, label, lines, samples, succeeds, text};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

/// The only lines of a task, by file.
fn by_file(lines: &[Value], task: &str) -> BTreeMap<String, Value> {
    let of_task = lines.iter().filter(|line| line["task"] == task);
    let found: Vec<&Value> = of_task.collect();
    let map: BTreeMap<String, Value> = found
        .iter()
        .map(|line| (line["file"].as_str().unwrap().to_owned(), (*line).clone()))
        .collect();
    assert_eq!(map.len(), found.len(), "a picture is there twice");
    map
}

#[test]
fn a_folder_is_labelled_and_what_is_broken_is_told_of() {
    let directory = samples();
    let out = directory.path().join("labels.jsonl");
    let output = label(&directory, &["pics", "--task", "<OD>", "--task", "<CAPTION>"], &out);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("1 of 4 pictures have no answer: "), "{err}");
    let told = text(&output.stdout);
    assert!(
        told.contains("3 pictures answered (1 copies of others), 0 were there, 1 failed"),
        "{told}"
    );
    let found = lines(&out);
    assert_eq!(found.len(), 6);
    let (boxes, captions) = (by_file(&found, "<OD>"), by_file(&found, "<CAPTION>"));
    let files: Vec<&String> = boxes.keys().collect();
    assert_eq!(files, ["pics/a.png", "pics/sub/b.png", "pics/sub/c.png"]);
    let run = florence(&["run", "--json", "--prompt", "<OD>"])
        .arg(picture("shapes.png"))
        .output()
        .unwrap();
    let alone: Value = serde_json::from_slice(&run.stdout).unwrap();
    for file in ["pics/a.png", "pics/sub/b.png"] {
        let line = &boxes[file];
        for name in ["answer", "text", "scores", "width", "height", "model", "prompt"] {
            assert_eq!(line[name], alone[name], "{name}");
        }
        assert_eq!(line["sha256"].as_str().unwrap().len(), 64);
        assert!(captions[file]["answer"]["<CAPTION>"].as_str().unwrap().contains("circle"));
    }
    let errors = lines(&directory.path().join("errors.jsonl"));
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0]["file"], "pics/broken.jpg");
    assert!(errors[0]["error"].as_str().unwrap().starts_with("not a picture"), "{errors:?}");
}

#[test]
fn an_output_is_not_written_over_and_goes_on_only_with_its_model() {
    let directory = samples();
    let out = directory.path().join("labels.jsonl");
    let args = ["pics/sub", "--task", "<CAPTION>"];
    succeeds(&label(&directory, &args, &out));
    let before = std::fs::read(&out).unwrap();
    let refused = text(&label(&directory, &args, &out).stderr);
    assert!(refused.contains("--resume goes on with it, --overwrite begins anew"), "{refused}");
    let again = label(&directory, &[&args[..], &["--resume"]].concat(), &out);
    let told = text(&again.stdout);
    assert!(told.contains("0 pictures answered (0 copies of others), 2 were there"), "{told}");
    assert_eq!(std::fs::read(&out).unwrap(), before);
    // Another task is another answer, about the same pictures.
    let more = ["pics/sub", "--task", "<CAPTION>", "--task", "<OD>", "--resume"];
    succeeds(&label(&directory, &more, &out));
    assert_eq!(lines(&out).len(), 4);
    let text_of_other = text(&before).replace("\"model\":\"tiny\"", "\"model\":\"base\"");
    std::fs::write(&out, text_of_other).unwrap();
    let refused = text(&label(&directory, &[&args[..], &["--resume"]].concat(), &out).stderr);
    assert!(refused.contains("has answers of the model base, not of tiny"), "{refused}");
    succeeds(&label(&directory, &[&args[..], &["--overwrite"]].concat(), &out));
    assert_eq!(lines(&out).len(), 2);
}

#[test]
fn every_kind_of_source_gives_the_same_pictures() {
    let directory = samples();
    let root = directory.path();
    let write = |name: &str, text: &str| std::fs::write(root.join(name), text).unwrap();
    write("list.txt", "pics/a.png\n\npics/sub/c.png\n");
    write("table.csv", "id,image\n1,pics/a.png\n2,pics/sub/c.png\n");
    write("table.jsonl", "{\"pic\": \"pics/a.png\"}\n{\"pic\": \"pics/sub/c.png\"}\n");
    let mut tar = tar::Builder::new(std::fs::File::create(root.join("set.tar")).unwrap());
    let long = "x".repeat(120);
    tar.append_path_with_name(root.join("pics/a.png"), "0.png").unwrap();
    tar.append_path_with_name(root.join("pics/notes.md"), "0.txt").unwrap();
    tar.append_path_with_name(root.join("pics/sub/c.png"), format!("{long}.png")).unwrap();
    tar.into_inner().unwrap().flush().unwrap();
    let pictures = Pictures::serve();
    let (shapes, sign) = (pictures.url("shapes.png"), pictures.url("flaky/1/sign.png"));
    let cases: [&[&str]; 6] = [
        &["pics/**/[ac].png"],
        &["list.txt"],
        &["table.csv"],
        &["table.jsonl", "--column", "pic"],
        &["set.tar"],
        &[&shapes, &sign],
    ];
    for (i, source) in cases.into_iter().enumerate() {
        let out = root.join(format!("{i}.jsonl"));
        succeeds(&label(&directory, &[source, &["--task", "<CAPTION>"]].concat(), &out));
        let mut captions: Vec<Value> =
            lines(&out).into_iter().map(|line| line["answer"]["<CAPTION>"].clone()).collect();
        captions.sort_by_key(ToString::to_string);
        let expected =
            ["a blue circle, a red square and a black triangle", "a red square and the word EXIT"];
        assert_eq!(captions, expected, "{source:?}");
    }
    let out = root.join("stdin.jsonl");
    let mut child = command(&directory, &["-", "--task", "<CAPTION>"], &out)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(format!("pics/a.png\n{sign}\n").as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(answered(&out), [sign, "pics/a.png".to_owned()]);
    for (odd, told) in [
        ("nowhere.png", "there is no nowhere.png"),
        ("table.jsonl", "2 of 2 pictures have no answer"),
    ] {
        let out = root.join("odd.jsonl");
        let output = label(&directory, &[odd, "--task", "<OD>", "--limit", "1"], &out);
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{err}");
    }
}

#[test]
fn tables_may_call_different_pictures_alike() {
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for (folder, sample) in [("train", "shapes.png"), ("val", "sign.png")] {
        std::fs::create_dir_all(path("hf").join(folder)).unwrap();
        std::fs::copy(picture(sample), path("hf").join(folder).join("0.png")).unwrap();
        let table = path("hf").join(folder).join("metadata.csv");
        std::fs::write(table, "file_name\n./0.png\n0.png\n").unwrap();
    }
    let (train, val) = ("hf/train/metadata.csv", "hf/val/metadata.csv");
    let args = ["--task", "<CAPTION>", "--format", "captions", "--format", "yolo=yolo"];
    let args = [&args[..], &["--classes", "circle"]].concat();
    succeeds(&label(&directory, &[&[train, val], &args[..]].concat(), &path("a.jsonl")));
    assert_eq!(answered(&path("a.jsonl")), ["hf/train/0.png", "hf/val/0.png"]);
    let caption = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    assert!(caption("hf/train/0.txt").contains("circle"));
    assert!(caption("hf/val/0.txt").contains("EXIT"));
    assert!(path("yolo/images/hf/val/0.png").is_file());
    for table in [train, val] {
        let args = [table, "--task", "<CAPTION>", "--resume"];
        succeeds(&label(&directory, &args, &path("b.jsonl")));
    }
    assert_eq!(answered(&path("b.jsonl")), answered(&path("a.jsonl")));
}

#[test]
fn a_picture_that_is_listed_twice_is_there_once() {
    let directory = samples();
    let out = directory.path().join("labels.jsonl");
    let args = ["pics/sub", "pics/sub/c.png", "pics/sub/*.png", "--task", "<CAPTION>"];
    succeeds(&label(&directory, &args, &out));
    assert_eq!(answered(&out), ["pics/sub/b.png", "pics/sub/c.png"]);
}

#[test]
fn every_copy_of_a_broken_picture_is_told_of() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("labels.jsonl");
    let bytes = std::fs::read(picture("poster.jpg")).unwrap();
    std::fs::create_dir(directory.path().join("pics")).unwrap();
    for i in 0..30 {
        let path = directory.path().join(format!("pics/{i:02}.jpg"));
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }
    let output = label(&directory, &["pics", "--task", "<CAPTION>"], &out);
    assert!(text(&output.stderr).contains("30 of 30 pictures have no answer"));
    let mut failed = answered(&directory.path().join("errors.jsonl"));
    failed.dedup();
    assert_eq!((failed.len(), lines(&out).len()), (30, 0));
}

#[test]
fn only_some_pictures_are_taken_where_that_is_wished() {
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 40);
    let take = |name: &str, args: &[&str]| {
        let out = directory.path().join(name);
        let args = [&["pics", "--task", "<CAPTION>", "--beams", "1"], args].concat();
        succeeds(&label(&directory, &args, &out));
        answered(&out)
    };
    assert_eq!(take("a.jsonl", &["--limit", "3"]).len(), 3);
    let sample = take("b.jsonl", &["--sample", "5"]);
    assert_eq!((sample.len(), &sample), (5, &take("c.jsonl", &["--sample", "5"])));
    assert_ne!(sample, take("d.jsonl", &["--sample", "5", "--seed", "1"]));
    for file in &sample[..4] {
        std::fs::write(directory.path().join(file).with_extension("txt"), "x").unwrap();
    }
    assert_eq!(take("e.jsonl", &["--where-missing", ".txt"]).len(), 36);
}

/// What a run of its own gives, by file.
fn whole(directory: &TempDir, args: &[&str]) -> Vec<String> {
    let out = directory.path().join("whole.jsonl");
    succeeds(&label(directory, args, &out));
    sorted(&out)
}

fn sorted(out: &Path) -> Vec<String> {
    let mut lines: Vec<String> =
        std::fs::read_to_string(out).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Bytes that are written so far.
fn size(out: &Path) -> u64 {
    std::fs::metadata(out).map_or(0, |it| it.len())
}

/// A run, when a file of it has at least so many bytes.
fn started(
    directory: &TempDir,
    args: &[&str],
    (out, watched): (&Path, &Path),
    bytes: u64,
) -> Child {
    let mut child = command(directory, args, out).stderr(Stdio::piped()).spawn().unwrap();
    eventually("something is written", || {
        (size(watched) > bytes || child.try_wait().unwrap().is_some()).then_some(())
    });
    child
}

#[test]
fn a_run_that_is_killed_again_and_again_loses_no_line_and_has_none_twice() {
    let count = std::env::var("FLORENCE_LABEL_PICTURES").map_or(600, |it| it.parse().unwrap());
    let directory = tempdir().unwrap();
    draw_pictures(&directory, count);
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--resume"];
    let out = directory.path().join("labels.jsonl");
    let (mut kills, mut left) = (0, size(&out));
    loop {
        let mut child =
            started(&directory, &args, (&out, &out), left + (20 * u64::from(count)).min(400_000));
        // It may have come to its end.
        let _ = child.kill();
        let status = child.wait().unwrap();
        if status.success() {
            break;
        }
        kills += 1;
        let torn = std::fs::OpenOptions::new().write(true).open(&out).unwrap();
        torn.set_len(size(&out).saturating_sub(7)).unwrap();
        left = size(&out);
    }
    assert!(kills >= 3, "{kills}");
    assert_eq!(lines(&out).len(), usize::try_from(count).unwrap());
    assert_eq!(sorted(&out), whole(&directory, &args[..5]));
}

#[test]
fn a_run_that_is_interrupted_says_how_to_go_on() {
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 300);
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--resume"];
    let out = directory.path().join("labels.jsonl");
    for signal in ["-INT", "-TERM"] {
        let mut child = started(&directory, &args, (&out, &out), size(&out) + 5_000);
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{err}");
        assert!(err.contains("the same command with --resume goes on there"), "{err}");
        assert!(lines(&out).len() < 300);
    }
    succeeds(&label(&directory, &args, &out));
    assert_eq!(sorted(&out), whole(&directory, &args[..5]));
}

#[test]
fn a_run_that_waits_for_names_can_be_interrupted() {
    let directory = samples();
    let out = directory.path().join("labels.jsonl");
    let mut child = command(&directory, &["-", "--task", "<CAPTION>"], &out)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"pics/a.png\n").unwrap();
    eventually("the first is answered", || (size(&out) > 0).then_some(()));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(lines(&out).len(), 1);
}

#[test]
fn a_disk_that_is_full_ends_the_run_and_costs_no_line() {
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 60);
    let out = directory.path().join("labels.jsonl");
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--resume"];
    // Files of at most 4 KiB: a write beyond that fails as on a full disk.
    let limited: Output = Command::new("bash")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 4; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_florence"),
        ])
        .args([&["label"], &args[..]].concat())
        .arg("--out")
        .arg(&out)
        .current_dir(&directory)
        .output()
        .unwrap();
    let err = text(&limited.stderr);
    assert_eq!(limited.status.code(), Some(1), "{err}");
    assert!(err.contains("the same command with --resume goes on there"), "{err}");
    assert!(err.contains("labels.jsonl") && err.contains("File too large"), "{err}");
    let there = lines(&out).len();
    assert!(there > 0 && there < 60, "{there}");
    assert!(std::fs::read(&out).unwrap().ends_with(b"\n"));
    succeeds(&label(&directory, &args, &out));
    assert_eq!(sorted(&out), whole(&directory, &args[..5]));
}

#[test]
fn shards_appear_whole() {
    let directory = tempdir().unwrap();
    draw_pictures(&directory, 300);
    let args = ["pics", "--task", "<CAPTION>", "--beams", "1", "--shard", "64", "--resume"];
    let out = directory.path().join("labels.jsonl");
    let first = directory.path().join("labels-00000.jsonl");
    let mut child = started(&directory, &args, (&out, &first), 0);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(lines(&first).len(), 64);
    succeeds(&label(&directory, &args, &out));
    let shards: Vec<PathBuf> =
        (0..5).map(|i| directory.path().join(format!("labels-{i:05}.jsonl"))).collect();
    let counts: Vec<usize> = shards.iter().map(|shard| lines(shard).len()).collect();
    assert_eq!(counts, [64, 64, 64, 64, 44]);
    let mut all: Vec<String> = shards.iter().flat_map(|shard| answered(shard)).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 300);
    let temporary = std::fs::read_dir(&directory)
        .unwrap()
        .any(|entry| entry.unwrap().file_name().to_string_lossy().ends_with(".part"));
    assert!(!temporary);
}

#[test]
fn no_output_destroys_another() {
    let directory = samples();
    let path = |name: &str| directory.path().join(name);
    let args = ["pics", "--task", "<OD>"];
    let refused = |args: &[&str], out: &str, told: &str| {
        let output = label(&directory, args, &path(out));
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{args:?}: {err}");
    };
    refused(&args, "errors.jsonl", "errors.jsonl would be written twice");
    let same = [&args[..], &["--errors", "./a.jsonl"]].concat();
    refused(&same, "a.jsonl", "a.jsonl would be written twice");
    refused(
        &[&args[..], &["--format", "csv=a.jsonl"]].concat(),
        "a.jsonl",
        "would be written twice",
    );
    std::fs::write(path("list.jsonl"), "{\"file\": \"pics/a.png\"}\n").unwrap();
    let listed = ["list.jsonl", "--task", "<OD>", "--overwrite"];
    refused(&listed, "list.jsonl", "list.jsonl would be read and written");
    refused(&[&args[..], &["--overwrite"]].concat(), "/dev/null", "/dev/null is no file");
    std::fs::write(path("there.csv"), "mine").unwrap();
    refused(&[&args[..], &["--format", "csv=there.csv"]].concat(), "a.jsonl", "there.csv is there");

    let before = std::fs::read(path("pics/a.png")).unwrap();
    let over = [&args[..], &["--overwrite"]].concat();
    refused(&over, "pics/a.png", "pics/a.png holds no lines of labels, and stays");
    let appended = [&over[..], &["--errors", "pics/a.png"]].concat();
    refused(&appended, "a.jsonl", "it is there, and no text");
    assert_eq!(std::fs::read(path("pics/a.png")).unwrap(), before);

    // Failures of two outputs may stand in one file, and a device stays one.
    let mine = "{\"error\":\"mine\",\"level\":\"fatal\"}\n";
    std::fs::write(path("errors.jsonl"), mine).unwrap();
    for (out, more) in
        [("a.jsonl", "--overwrite"), ("b.jsonl", "--overwrite"), ("a.jsonl", "--resume")]
    {
        refused(&[&args[..], &[more]].concat(), out, "1 of 4 pictures have no answer");
    }
    let errors = lines(&path("errors.jsonl"));
    assert_eq!(errors[0]["error"], "mine");
    let outs: Vec<&str> = errors[1..].iter().map(|line| line["out"].as_str().unwrap()).collect();
    assert!(
        outs.len() == 2 && outs[0].ends_with("/b.jsonl") && outs[1].ends_with("/a.jsonl"),
        "{outs:?}"
    );
    let silent = [&args[..], &["--overwrite", "--errors", "/dev/null"]].concat();
    refused(&silent, "a.jsonl", "1 of 4 pictures have no answer");
    assert!(!Path::new("/dev/null").is_file());
}

#[test]
fn what_cannot_be_named_or_is_not_there_is_told_of() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

    let directory = tempdir().unwrap();
    let folder = directory.path().join("pics");
    std::fs::create_dir_all(folder.join("empty")).unwrap();
    for name in [&b"a\xfe.png"[..], b"a\xff.png", b"b.png"] {
        std::fs::copy(picture("shapes.png"), folder.join(OsStr::from_bytes(name))).unwrap();
    }
    for (name, text) in [("head.csv", "file,label\n"), ("none.txt", "\n"), ("none.jsonl", "")] {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    for (source, told) in [
        ("pics", "2 of 3 pictures"),
        ("pics/empty", "1 of 1 pictures"),
        ("pics/*.jpg", "1 of 1 pictures"),
        ("head.csv", "1 of 1 pictures"),
        ("none.txt", "1 of 1 pictures"),
        ("none.jsonl", "1 of 1 pictures"),
        ("-", "1 of 1 pictures"),
    ] {
        let out = directory.path().join("a.jsonl");
        let output = label(&directory, &[source, "--task", "<OD>", "--overwrite"], &out);
        let err = text(&output.stderr);
        assert!(output.status.code() == Some(1) && err.contains(told), "{source}: {err}");
    }
    let errors = lines(&directory.path().join("errors.jsonl"));
    assert_eq!(errors[0]["error"], "there are no pictures");
    // The first of them cannot be listed, and is none of so many.
    let out = directory.path().join("b.jsonl");
    let output = label(&directory, &["pics", "--task", "<OD>", "--limit", "1"], &out);
    assert!(text(&output.stderr).contains("2 of 3 pictures"), "{}", text(&output.stderr));
    assert_eq!(answered(&out), ["pics/b.png"]);
}

#[test]
fn a_link_in_an_archive_is_told_of() {
    let directory = samples();
    let mut tar =
        tar::Builder::new(std::fs::File::create(directory.path().join("set.tar")).unwrap());
    tar.append_path_with_name(directory.path().join("pics/a.png"), "a.png").unwrap();
    let mut head = tar::Header::new_gnu();
    head.set_entry_type(tar::EntryType::Link);
    head.set_size(0);
    tar.append_link(&mut head, "b.png", "a.png").unwrap();
    tar.into_inner().unwrap();
    let out = directory.path().join("a.jsonl");
    let output = label(&directory, &["set.tar", "--task", "<OD>"], &out);
    assert!(text(&output.stderr).contains("1 of 2 pictures"), "{}", text(&output.stderr));
    assert_eq!(answered(&out), ["set.tar/a.png"]);
}

#[test]
fn the_work_does_not_end_with_who_reads_of_it() {
    let directory = samples();
    let out = directory.path().join("a.jsonl");
    let mut child = command(&directory, &["pics", "--task", "<OD>"], &out)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(lines(&out).len(), 3);

    let mut child = florence(&["run", "--prompt", "<OD>"])
        .args(["pics/a.png", "pics/broken.jpg"])
        .current_dir(&directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let full = florence(&["run", "--prompt", "<OD>", "pics/a.png"])
        .current_dir(&directory)
        .stdout(std::fs::File::create("/dev/full").unwrap())
        .output()
        .unwrap();
    assert!(text(&full.stderr).contains("cannot write to standard output"));
}
