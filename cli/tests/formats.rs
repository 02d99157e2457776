//! The formats of labels: each is read as the tool that it is for reads it.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod labels;

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use florence_tests::{eventually, picture};
use labels::{florence, label, lines, samples, succeeds, text};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

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

/// A line of a text, on another picture.
fn said(prompt: &str, answer: &str) -> String {
    let line = serde_json::json!({ "file": "a.png", "width": 100, "height": 50, "task": prompt,
        "prompt": prompt, "answer": { prompt: answer }, "scores": [0.5] });
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
    assert_eq!(bboxes(&coco(&lines, &["--only", "<OD>"])).len(), 3);
    let with_a_caption = lines.clone() + &said("<CAPTION>", "a car");
    assert_eq!(bboxes(&coco(&with_a_caption, &["--only", "<CAPTION>"])).len(), 0);
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
fn of_a_picture_that_was_changed_the_newest_answers_count() {
    let old = boxes("a.png", &[("car", [1.0, 1.0, 9.0, 9.0], 0.5)]);
    let lines = old.replace("\"width\":100", "\"width\":90") + &said("<CAPTION>", "a car");
    let (directory, output) = converted(&lines, &["--format", "coco", "--format", "captions=c"]);
    succeeds(&output);
    let coco = std::fs::read_to_string(directory.path().join("labels.coco.json")).unwrap();
    let coco: Value = serde_json::from_str(&coco).unwrap();
    assert_eq!(coco["images"][0]["width"], 100);
    assert_eq!(coco["annotations"], serde_json::json!([]));
    let caption = std::fs::read_to_string(directory.path().join("c/a.txt")).unwrap();
    assert_eq!(caption, "a car\n");
}

#[test]
fn numbers_of_classes_do_not_change_below_files_that_stay() {
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let found = |label| [(label, [1.0, 1.0, 9.0, 9.0], 0.5)];
    let write = |lines: &str| std::fs::write(path("labels.jsonl"), lines).unwrap();
    let formats = ["--format", "yolo=yolo", "--format", "masks=masks"];
    write(&(boxes("a.png", &found("cat")) + &boxes("b.png", &found("dog"))));
    succeeds(&convert(&directory, &formats));
    let grown = std::fs::read_to_string(path("labels.jsonl")).unwrap();
    write(&(grown + &boxes("c.png", &found("ant"))));
    let output = convert(&directory, &formats);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    for told in ["data.yaml has other classes, and stays", "classes.txt has other classes"] {
        assert!(err.contains(told), "{err}");
    }
    assert!(!path("yolo/labels/c.txt").exists() && !path("masks/c.png").exists());
    // Those that there are go as far, and somebody has written more beside them.
    let data = std::fs::read_to_string(path("yolo/data.yaml")).unwrap() + "test: others\n";
    std::fs::write(path("yolo/data.yaml"), data).unwrap();
    write(&(boxes("a.png", &found("cat")) + &boxes("c.png", &found("cat"))));
    let output = convert(&directory, &formats);
    assert!(text(&output.stderr).contains("are there and say something else"));
    assert!(path("yolo/labels/c.txt").exists() && path("masks/c.png").exists());
    succeeds(&convert(&directory, &[&formats[..], &["--overwrite"]].concat()));
}

#[test]
fn a_picture_of_which_no_file_can_be_keeps_no_other_from_its_own() {
    let directory = labelled("pics");
    let mut lines = std::fs::read_to_string(directory.path().join("labels.jsonl")).unwrap();
    let urls = ["x", "y"].map(|end| format!("https://host/a.png?{}{end}", "q".repeat(1000)));
    for name in ["pics/a.png", &urls[0], &urls[1]] {
        lines += &said("<CAPTION>", "a car").replace("a.png", name);
    }
    std::fs::write(directory.path().join("labels.jsonl"), lines).unwrap();
    let folders = ["voc=voc", "labelme=lm", "captions=c", "yolo=yolo"];
    let args: Vec<&str> = folders.iter().flat_map(|format| ["--format", format]).collect();
    succeeds(&convert(&directory, &args));
    assert_eq!(std::fs::read_dir(directory.path().join("voc/host")).unwrap().count(), 2);
    let output = convert(&directory, &["--format", "captions"]);
    let err = text(&output.stderr);
    assert!(!output.status.success() && err.contains("2 pictures are no files here"), "{err}");
    assert!(directory.path().join("pics/a.txt").is_file());
}

#[test]
fn without_pictures_there_is_nothing_to_write() {
    let (directory, output) = converted("", &["--format", "captions", "--format", "yolo"]);
    succeeds(&output);
    assert!(text(&output.stdout).contains("there are no pictures"));
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1);
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
    let (_directory, output) = converted("{}\n", &["--format", "coco"]);
    assert!(text(&output.stderr).contains("labels.jsonl:1: not a line of labels"));
    let torn = boxes("a.png", &found) + &boxes("b.png", &found)[..40];
    let (_directory, output) = converted(&torn, &["--format", "coco"]);
    succeeds(&output);
    assert!(text(&output.stderr).contains("labels.jsonl:2: the last line is torn"));
    let (_directory, output) = converted(&twice, &["--format", "captions"]);
    assert!(text(&output.stderr).contains("no answer is a text"));
    let (_directory, output) = converted(&twice, &["--format", "nothing"]);
    assert!(text(&output.stderr).contains("the formats are captions, metadata, coco"));
}

#[test]
fn pictures_that_differ_in_their_ending_alone_have_files_of_their_own() {
    let found = [("car", [1.0, 1.0, 9.0, 9.0], 0.5)];
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    // The last of them is called as files of the second would be.
    let pictures = ["d/a.jpg", "d/a.png", "d/a.png.png", "d/b.png"];
    std::fs::create_dir(path("d")).unwrap();
    for name in pictures {
        std::fs::copy(picture("shapes.png"), path(name)).unwrap();
    }
    let lines: String = pictures.iter().map(|name| boxes(name, &found)).collect();
    std::fs::write(path("labels.jsonl"), lines).unwrap();
    let args = ["captions", "voc=voc", "yolo=yolo", "labelme=lm", "masks=masks", "fiftyone=f.json"];
    let args: Vec<&str> = args.iter().flat_map(|format| ["--format", format]).collect();
    let output = convert(&directory, &args);
    // One that cannot be written keeps no other from it.
    let err = text(&output.stderr);
    assert!(!output.status.success(), "{err}");
    assert!(err.contains("cannot write the format captions"), "{err}");
    assert!(err.contains("2 pictures are called as others but for their endings"), "{err}");
    let names = |folder: &str| -> Vec<String> {
        let files = std::fs::read_dir(path(folder)).unwrap();
        let mut names: Vec<_> =
            files.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let xml = names("voc/d");
    assert_eq!((xml.len(), &*xml[0], &*xml[2]), (4, "a.jpg.xml", "a.png.xml"));
    assert!(std::fs::read_to_string(path("voc/d/a.png.xml")).unwrap().contains("a.png.png"));
    assert_eq!((names("lm/d").len(), names("masks/d").len()), (4, 4));
    let stems = |folder: &str| -> Vec<String> {
        let names = names(folder);
        names.iter().map(|name| name.rsplit_once('.').unwrap().0.to_owned()).collect()
    };
    let mut labels = stems("yolo/labels/d");
    labels.sort();
    let mut links = stems("yolo/images/d");
    links.sort();
    assert_eq!(labels, links);
    assert_eq!((labels.len(), &*labels[0], &*labels[1]), (4, "a.jpg", "a.png"));
    assert!(path("yolo/data.yaml").is_file());
    let fiftyone = std::fs::read_to_string(path("f.json")).unwrap();
    let fiftyone: Value = serde_json::from_str(&fiftyone).unwrap();
    assert_eq!(fiftyone["labels"].as_object().unwrap().len(), 4);
    // The same names whatever the order of the lines.
    let lines: String = pictures.iter().rev().map(|name| boxes(name, &found)).collect();
    std::fs::write(path("labels.jsonl"), lines).unwrap();
    succeeds(&convert(&directory, &["--format", "voc=again"]));
    assert_eq!(names("again/d"), xml);
}

#[test]
fn a_signal_leaves_nothing_half_written() {
    let directory = tempdir().unwrap();
    let lines: String = (0..100_000).map(|i| boxes(&format!("{i}.png"), &[])).collect();
    std::fs::write(directory.path().join("labels.jsonl"), lines).unwrap();
    let mut convert = florence(&["convert", "labels.jsonl", "--format", "voc=voc"]);
    let mut child = convert.current_dir(&directory).stderr(Stdio::piped()).spawn().unwrap();
    let folder = directory.path().join("voc");
    eventually("some is written", || {
        let count = std::fs::read_dir(&folder).map_or(0, Iterator::count);
        (count > 10 || child.try_wait().unwrap().is_some()).then_some(())
    });
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("stopped; florence convert"), "{err}");
    let mut names = std::fs::read_dir(&folder).unwrap().map(|it| it.unwrap().file_name());
    assert!(names.all(|name| name.to_string_lossy().ends_with(".xml")));
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

#[test]
fn who_writes_a_format_is_told_of_pictures_that_its_readers_turn() {
    let directory = tempdir().unwrap();
    let folder = directory.path().join("pics");
    std::fs::create_dir(&folder).unwrap();
    let whole = std::fs::read(picture("poster.jpg")).unwrap();
    let exif =
        b"\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    std::fs::write(folder.join("turned.jpg"), [&whole[..2], exif, &whole[2..]].concat()).unwrap();
    std::fs::write(folder.join("upright.jpg"), whole).unwrap();
    for (more, is_told) in [
        (&["--format", "coco=coco.json"][..], true),
        (&["--format", "coco=coco.json", "--exif"], false),
        (&[], false),
    ] {
        let args = [&["pics", "--task", "<OD>", "--overwrite"][..], more].concat();
        let output = label(&directory, &args, Path::new("labels.jsonl"));
        succeeds(&output);
        let err = text(&output.stderr);
        assert_eq!(err.contains("1 pictures have an EXIF tag that turns them"), is_told, "{err}");
    }
}

/// A folder of these pictures, labelled.
fn labelled(folder: &str) -> TempDir {
    let directory = tempdir().unwrap();
    let pictures = directory.path().join(folder);
    std::fs::create_dir_all(&pictures).unwrap();
    std::fs::copy(picture("shapes.png"), pictures.join("a.png")).unwrap();
    succeeds(&label(&directory, &[folder, "--task", "<OD>"], Path::new("labels.jsonl")));
    directory
}

fn convert(directory: &TempDir, args: &[&str]) -> Output {
    florence(&["convert", "labels.jsonl"]).args(args).current_dir(directory).output().unwrap()
}

#[test]
fn what_is_there_stays_unless_it_may_be_written_over() {
    // The usual folders of a data set in YOLO's format, of which somebody has drawn labels by hand.
    let directory = labelled("images");
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir(path("labels")).unwrap();
    std::fs::write(path("labels/a.txt"), "0 0.5 0.5 1 1\n").unwrap();
    let output = convert(&directory, &["--format", "yolo=."]);
    let err = text(&output.stderr);
    assert!(!output.status.success(), "{err}");
    assert!(err.contains("labels/a.txt is there and says something else"), "{err}");
    assert_eq!(std::fs::read_to_string(path("labels/a.txt")).unwrap(), "0 0.5 0.5 1 1\n");
    succeeds(&convert(&directory, &["--format", "yolo=.", "--overwrite"]));
    assert_ne!(std::fs::read_to_string(path("labels/a.txt")).unwrap(), "0 0.5 0.5 1 1\n");
    // What says the same may be there.
    succeeds(&convert(&directory, &["--format", "yolo=."]));
    for _ in 0..2 {
        succeeds(&convert(&directory, &["--format", "yolo=one", "--format", "yolo-seg=two"]));
    }
    let is_whole = || {
        std::fs::read(path("images/a.png")).unwrap()
            == std::fs::read(picture("shapes.png")).unwrap()
    };
    assert!(is_whole() && !path("images/a.png").is_symlink());

    // Pictures and labels stay in any case, however they are called.
    let labels = std::fs::read(path("labels.jsonl")).unwrap();
    for (format, told) in [
        ("masks=.", "a picture or holds labels"),
        ("csv=./labels.jsonl", "a picture or holds labels"),
        ("csv=/dev/null", "it is there, and no file"),
    ] {
        let output = convert(&directory, &["--format", format, "--overwrite"]);
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{format}: {err}");
    }
    let twice = convert(&directory, &["--format", "coco=x", "--format", "csv=./x", "--overwrite"]);
    assert!(text(&twice.stderr).contains("two pictures or formats would have"));
    assert!(is_whole());
    assert_eq!(std::fs::read(path("labels.jsonl")).unwrap(), labels);
    let names = std::fs::read_dir(&directory).unwrap().map(|it| it.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().ends_with(".part")));
}

#[test]
fn what_chooses_nothing_is_a_mistake() {
    let directory = labelled("pics");
    for (args, told) in [
        (["--only", "OD"], "--only OD: no answer is of this task"),
        (["--root", "elsewhere"], "--root elsewhere: no picture's name begins with it"),
        (["--classes", "missing.txt"], "there is no file missing.txt"),
        (["--min-area", "nan"], "a number from 0"),
    ] {
        let output = convert(&directory, &[&["--format", "csv"], &args[..]].concat());
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{args:?}: {err}");
    }
    succeeds(&convert(&directory, &["--format", "csv", "--root", "./pics"]));
    let csv = std::fs::read_to_string(directory.path().join("labels.csv")).unwrap();
    assert!(csv.lines().nth(1).unwrap().starts_with("a.png,"), "{csv}");
}

#[test]
fn xml_stays_xml_whatever_is_in_a_label() {
    let odd = boxes("a\u{1}.png", &[("a \u{b}\u{ffff}<b>", [1.0, 1.0, 9.0, 9.0], 0.5)]);
    let (directory, output) = converted(&odd, &["--format", "cvat=a.xml", "--format", "voc=voc"]);
    succeeds(&output);
    for name in ["a.xml", "voc/a\u{1}.xml"] {
        let xml = std::fs::read_to_string(directory.path().join(name)).unwrap();
        let is_odd = |sign: char| sign < ' ' && sign != '\n' || sign == '\u{ffff}';
        assert!(!xml.contains(is_odd) && xml.contains("a \u{fffd}\u{fffd}&lt;b&gt;"), "{xml}");
    }
}
