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
use labels::{answered, draw_pictures, florence, label, lines, succeeds, text};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

/// A folder of samples: a picture, its copy, another one, and what is none.
fn samples() -> TempDir {
    let directory = tempdir().unwrap();
    let pictures = directory.path().join("pics/sub");
    std::fs::create_dir_all(&pictures).unwrap();
    std::fs::copy(picture("shapes.png"), directory.path().join("pics/a.png")).unwrap();
    std::fs::copy(picture("shapes.png"), pictures.join("b.png")).unwrap();
    std::fs::copy(picture("sign.png"), pictures.join("c.png")).unwrap();
    std::fs::write(directory.path().join("pics/broken.jpg"), "hello").unwrap();
    std::fs::write(directory.path().join("pics/notes.md"), "hello").unwrap();
    directory
}

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
    let mut child = labels::command(&directory, &["-", "--task", "<CAPTION>"], &out)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(format!("pics/a.png\n{sign}\n").as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(answered(&out), [sign, "pics/a.png".to_owned()]);
    for (odd, told) in [
        ("nowhere.png", "there is no nowhere.png"),
        ("table.jsonl", "1 of 1 pictures have no answer"),
    ] {
        let out = root.join("odd.jsonl");
        let output = label(&directory, &[odd, "--task", "<OD>", "--limit", "1"], &out);
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{err}");
    }
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
    let mut child = labels::command(directory, args, out).stderr(Stdio::piped()).spawn().unwrap();
    eventually("something is written", || {
        (size(watched) > bytes || child.try_wait().unwrap().is_some()).then_some(())
    });
    child
}

#[test]
fn a_run_that_is_killed_again_and_again_loses_no_line_and_has_none_twice() {
    let count = std::env::var("FLORENCE_LABEL_PICTURES").map_or(2000, |it| it.parse().unwrap());
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
    draw_pictures(&directory, 600);
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
        assert!(lines(&out).len() < 600);
    }
    succeeds(&label(&directory, &args, &out));
    assert_eq!(sorted(&out), whole(&directory, &args[..5]));
}

#[test]
fn a_run_that_waits_for_names_can_be_interrupted() {
    let directory = samples();
    let out = directory.path().join("labels.jsonl");
    let mut child = labels::command(&directory, &["-", "--task", "<CAPTION>"], &out)
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

const FORMATS: [&str; 14] = [
    "captions=captions",
    "metadata=metadata.jsonl",
    "coco=coco.json",
    "coco-results=results.json",
    "yolo=yolo",
    "yolo-seg=yolo-seg",
    "florence=florence.jsonl",
    "csv=csv.csv",
    "voc=voc",
    "labelme=labelme",
    "label-studio=label-studio.json",
    "cvat=cvat.xml",
    "fiftyone=fiftyone.json",
    "masks=masks",
];

#[test]
fn every_format_is_read_by_the_tool_that_it_is_for() {
    let directory = tempdir().unwrap();
    let folder = directory.path().join("pics");
    std::fs::create_dir(&folder).unwrap();
    for name in ["shapes.png", "sign.png", "tall.png", "poster.jpg"] {
        std::fs::copy(picture(name), folder.join(name)).unwrap();
    }
    let mut args = vec!["pics", "--task", "<OD>", "--task", "<CAPTION>"];
    args.extend(["--task", "<REFERRING_EXPRESSION_SEGMENTATION> a red square"]);
    for format in FORMATS {
        args.extend(["--format", format]);
    }
    succeeds(&label(&directory, &args, Path::new("labels.jsonl")));
    let read = |directory: &TempDir| {
        let read = Command::new(florence_tests::readers_of_formats())
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/labels/formats.py"))
            .arg(directory.path())
            .output()
            .unwrap();
        let (out, err) = (text(&read.stdout), text(&read.stderr));
        assert!(read.status.success(), "{out}{err}");
        assert_eq!(out.matches(" ok\n").count(), 12, "{out}");
    };
    read(&directory);
    // From the lines alone, the same.
    let again = tempdir().unwrap();
    let lines = again.path().join("labels.jsonl");
    std::fs::copy(directory.path().join("labels.jsonl"), &lines).unwrap();
    std::fs::rename(&folder, again.path().join("pics")).unwrap();
    let mut convert = florence(&["convert", "labels.jsonl"]);
    convert.args(FORMATS.iter().flat_map(|format| ["--format", format]));
    succeeds(&convert.current_dir(&again).output().unwrap());
    read(&again);
}

/// What `convert` makes of lines.
fn converted(lines: &str, args: &[&str]) -> (TempDir, Output) {
    let directory = tempdir().unwrap();
    std::fs::write(directory.path().join("labels.jsonl"), lines).unwrap();
    let mut convert = florence(&["convert", "labels.jsonl"]);
    let output = convert.args(args).current_dir(&directory).output().unwrap();
    (directory, output)
}

/// A line of boxes, each with its label and score, on a picture of 100 times 50 pixels.
fn boxes(file: &str, found: &[(&str, [f64; 4], f64)]) -> String {
    let labels: Vec<&str> = found.iter().map(|it| it.0).collect();
    let bboxes: Vec<[f64; 4]> = found.iter().map(|it| it.1).collect();
    let scores: Vec<f64> = found.iter().map(|it| it.2).collect();
    let answer = serde_json::json!({ "<OD>": { "bboxes": bboxes, "labels": labels } });
    let line = serde_json::json!({ "file": file, "width": 100, "height": 50, "task": "<OD>",
        "prompt": "<OD>", "answer": answer, "scores": scores });
    format!("{line}\n")
}

fn coco(lines: &str, args: &[&str]) -> Value {
    let (directory, output) = converted(lines, &[&["--format", "coco"], args].concat());
    succeeds(&output);
    let text = std::fs::read_to_string(directory.path().join("labels.coco.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn objects_are_chosen_by_class_score_and_area_and_stay_within_the_picture() {
    let found = [
        ("car", [10.0, 10.0, 30.0, 30.0], 0.9),
        ("lorry", [50.0, 10.0, 120.0, 60.0], 0.6),
        ("cat", [0.0, 0.0, 5.0, 5.0], 0.3),
        ("car", [100.0, 10.0, 100.0, 40.0], 0.9),
    ];
    let lines = boxes("pics/a.png", &found) + &boxes("pics/b.png", &[]);
    let names = |coco: &Value| -> Vec<String> {
        let categories = coco["categories"].as_array().unwrap();
        categories.iter().map(|it| it["name"].as_str().unwrap().to_owned()).collect()
    };
    let bboxes = |coco: &Value| -> Vec<Value> {
        coco["annotations"].as_array().unwrap().iter().map(|it| it["bbox"].clone()).collect()
    };
    let all = coco(&lines, &[]);
    assert_eq!(names(&all), ["car", "cat", "lorry"]);
    assert_eq!(bboxes(&all).len(), 3, "what has no area is none");
    assert_eq!(bboxes(&all)[1], serde_json::json!([50.0, 10.0, 50.0, 40.0]));
    assert_eq!(all["images"].as_array().unwrap().len(), 2);
    let mapped = coco(&lines, &["--classes", "vehicle=vehicle,lorry=vehicle,car=vehicle"]);
    assert_eq!((names(&mapped), bboxes(&mapped).len()), (vec!["vehicle".to_owned()], 2));
    let sure = coco(&lines, &["--min-score", "0.5"]);
    assert_eq!((names(&sure), bboxes(&sure).len()), (vec!["car".into(), "lorry".into()], 2));
    assert_eq!(bboxes(&coco(&lines, &["--min-area", "401"])).len(), 1);
    assert_eq!(bboxes(&coco(&lines, &["--only", "<CAPTION>"])).len(), 0);
    let relative = coco(&lines, &["--root", "pics"]);
    assert_eq!(relative["images"][0]["file_name"], "a.png");
}

#[test]
fn a_yolo_data_set_has_classes_and_its_labels_where_readers_look_for_them() {
    let lines = boxes("images/train/a.png", &[("car", [1.0, 1.0, 9.0, 9.0], 0.5)]);
    let directory = tempdir().unwrap();
    std::fs::create_dir_all(directory.path().join("images/train")).unwrap();
    std::fs::copy(picture("shapes.png"), directory.path().join("images/train/a.png")).unwrap();
    std::fs::write(directory.path().join("labels.jsonl"), lines).unwrap();
    let mut convert = florence(&["convert", "labels.jsonl", "--format", "yolo=set"]);
    succeeds(&convert.current_dir(&directory).output().unwrap());
    // The last `images` of a picture's path becomes `labels`.
    for file in ["images/train/a.png", "labels/train/a.txt"] {
        assert!(directory.path().join("set").join(file).is_file(), "{file}");
    }
    let (_directory, output) = converted(&boxes("a.png", &[]), &["--format", "yolo"]);
    assert!(text(&output.stderr).contains("name them with --classes"));
    let (_directory, output) =
        converted(&boxes("a.png", &[]), &["--format", "yolo", "--classes", "car"]);
    succeeds(&output);
}

#[test]
fn a_voc_box_at_the_edge_stays_within_the_picture() {
    let edge = [("car", [99.6, 49.6, 100.0, 50.0], 0.5)];
    let (directory, output) = converted(&boxes("a.png", &edge), &["--format", "voc=voc"]);
    succeeds(&output);
    let xml = std::fs::read_to_string(directory.path().join("voc/a.xml")).unwrap();
    for told in ["<xmin>100</xmin>", "<ymin>50</ymin>", "<xmax>100</xmax>", "<ymax>50</ymax>"] {
        assert!(xml.contains(told), "{xml}");
    }
}

#[test]
fn all_texts_about_a_picture_are_one_result_in_label_studio() {
    let said = |prompt: &str, answer: &str| {
        let line = serde_json::json!({ "file": "a.png", "width": 100, "height": 50, "task": prompt,
            "prompt": prompt, "answer": { prompt: answer }, "scores": [0.5] });
        format!("{line}\n")
    };
    let lines =
        said("<CAPTION>", "a car") + &said("<OCR>", "") + &said("<DETAILED_CAPTION>", "red");
    let (directory, output) = converted(&lines, &["--format", "label-studio"]);
    succeeds(&output);
    let tasks = std::fs::read_to_string(directory.path().join("labels.label-studio.json")).unwrap();
    let tasks: Value = serde_json::from_str(&tasks).unwrap();
    let result = &tasks[0]["predictions"][0]["result"];
    assert_eq!(result.as_array().unwrap().len(), 1);
    assert_eq!(result[0]["value"]["text"], serde_json::json!(["a car", "red"]));
}

#[test]
fn a_later_answer_to_a_prompt_counts() {
    let first = boxes("a.png", &[("car", [1.0, 1.0, 9.0, 9.0], 0.5)]);
    let lines = first + &boxes("b.png", &[]) + &boxes("a.png", &[]);
    let coco = coco(&lines, &[]);
    assert_eq!(coco["images"].as_array().unwrap().len(), 2);
    assert_eq!(coco["annotations"], serde_json::json!([]));
}

#[test]
fn names_lead_neither_out_of_the_folder_nor_over_each_other() {
    let lines =
        boxes("../../x.png", &[]) + &boxes("s3://bucket/y.png", &[]) + &boxes("/z.png", &[]);
    let (directory, output) = converted(&lines, &["--format", "voc=voc"]);
    succeeds(&output);
    for name in ["x.xml", "bucket/y.xml", "z.xml"] {
        assert!(directory.path().join("voc").join(name).exists(), "{name}");
    }
    let found = [("car", [1.0, 1.0, 9.0, 9.0], 0.5)];
    let twice = boxes("a.png", &found) + &boxes("a.jpg", &found);
    for format in ["voc", "yolo", "labelme", "masks", "fiftyone"] {
        let (_directory, output) = converted(&twice, &["--format", format]);
        let err = text(&output.stderr);
        assert!(err.contains("two pictures would have"), "{err}");
    }
    let (_directory, output) = converted("{}\n", &["--format", "coco"]);
    assert!(text(&output.stderr).contains("labels.jsonl:1: not a line of labels"));
    let (_directory, output) = converted(&twice, &["--format", "captions"]);
    assert!(text(&output.stderr).contains("no answer is a text"));
    let (_directory, output) = converted(&twice, &["--format", "nothing"]);
    assert!(text(&output.stderr).contains("the formats are captions, metadata, coco"));
}

#[test]
fn captions_lie_beside_their_pictures() {
    let directory = samples();
    let out = directory.path().join("labels.jsonl");
    let args = ["pics/sub", "--task", "<CAPTION>", "--format", "captions"];
    succeeds(&label(&directory, &args, &out));
    let caption = std::fs::read_to_string(directory.path().join("pics/sub/c.txt")).unwrap();
    assert_eq!(caption, "a red square and the word EXIT\n");
    let again = directory.path().join("again.jsonl");
    let args = ["pics/sub", "--task", "<CAPTION>", "--where-missing", "txt"];
    succeeds(&label(&directory, &args, &again));
    assert!(lines(&again).is_empty());
}
