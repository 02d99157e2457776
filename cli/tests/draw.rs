//! `florence draw` as people call it: answers in every form, pictures of every kind, three formats.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use florence_tests::{Server, picture};
use image::ImageEncoder;
use tempfile::TempDir;

const ANSWER: &str = r#"{"<OD>":{"bboxes":[[200,20,340,100]],"labels":["a <b> & c"]}}"#;

fn sample(name: &str) -> String {
    picture(name).display().to_string()
}

fn florence(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_florence"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Where to draw to.
fn out(directory: &TempDir, name: &str) -> String {
    directory.path().join(name).display().to_string()
}

fn draw(args: &[&str], input: &str) {
    let output = florence(&[&["draw"], args].concat(), input);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn refused(args: &[&str]) -> String {
    let output = florence(&[&["draw"], args].concat(), "");
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether the box of [`ANSWER`] is drawn: its colour, or one near it, on its left edge.
fn has_box(path: &str) -> bool {
    let drawn = image::open(path).unwrap().into_rgb8();
    let is_near = |x: u32| {
        let near = |(found, colour): (u8, u8)| found.abs_diff(colour) < 60;
        drawn.get_pixel(x, 60).0.into_iter().zip([230, 25, 75]).all(near)
    };
    (198..203).any(is_near) && !(250..290).any(is_near)
}

#[test]
fn the_ending_of_the_name_chooses_the_format() {
    let directory = tempfile::tempdir().unwrap();
    let shapes = sample("shapes.png");
    for name in ["a.png", "a.JPG", "a.jpeg"] {
        let path = out(&directory, name);
        draw(&[&shapes, ANSWER, &path], "");
        assert!(has_box(&path), "{name}");
    }
    let path = out(&directory, "a.svg");
    draw(&[&shapes, ANSWER, &path], "");
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.contains("a &lt;b&gt; &amp; c</text>") && svg.contains("data:image/png;base64,"));
    let error = refused(&[&shapes, ANSWER, &out(&directory, "a.txt")]);
    assert!(error.contains("is to end in .png, .jpg or .svg"), "{error}");
}

#[test]
fn pictures_are_read_by_what_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let (misnamed, path) = (out(&directory, "really.jpg"), out(&directory, "a.png"));
    std::fs::copy(sample("shapes.png"), &misnamed).unwrap();
    draw(&[&misnamed, ANSWER, &path], "");
    assert!(has_box(&path));
    std::fs::write(&misnamed, "hello").unwrap();
    let error = refused(&[&misnamed, ANSWER, &path]);
    assert!(error.contains("not a picture"), "{error}");
    let error = refused(&[&sample("shapes.png"), "hello", &path]);
    assert!(error.contains("the answer is not JSON"), "{error}");
    let error = refused(&[&sample("shapes.png"), &path]);
    assert!(error.contains("give the picture, its answer and the file to write"), "{error}");
}

/// A frame that does not fit makes a GIF's screen larger, and PNGs are read without their end.
#[test]
fn the_pixels_are_those_that_were_answered_about() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/decoded");
    let directory = tempfile::tempdir().unwrap();
    for (name, size) in [
        ("gif-over.gif", (400, 320)),
        ("png-badcrc-idat.png", (360, 280)),
        ("png-noiend.png", (360, 280)),
    ] {
        let (file, path) = (format!("{fixtures}/{name}"), out(&directory, "a.png"));
        draw(&[&file, ANSWER, &path], "");
        let drawn = image::open(&path).unwrap();
        assert_eq!((drawn.width(), drawn.height()), size, "{name}");
        assert!(has_box(&path), "{name}");
    }
}

/// Programs would turn it, and what is drawn on it would stay.
#[test]
fn a_picture_with_a_tag_does_not_stand_in_an_svg_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let (tagged, path) = (out(&directory, "tagged.png"), out(&directory, "a.svg"));
    let exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut file = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut file);
    encoder.set_exif_metadata(exif.to_vec()).unwrap();
    image::RgbImage::new(400, 300).write_with_encoder(encoder).unwrap();
    std::fs::write(&tagged, &file).unwrap();
    for (more, size) in
        [(None, "width=\"400\" height=\"300\""), (Some("--exif"), "width=\"300\" height=\"400\"")]
    {
        let args: Vec<&str> = [tagged.as_str(), ANSWER, &path].into_iter().chain(more).collect();
        draw(&args, "");
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains(&format!("<image {size}")), "{svg:.300}");
        assert!(!svg.contains(&BASE64_STANDARD.encode(&file)), "{svg:.300}");
    }
}

#[test]
fn a_line_of_run_is_an_answer_with_its_scores() {
    let directory = tempfile::tempdir().unwrap();
    let (shapes, path) = (sample("shapes.png"), out(&directory, "a.svg"));
    let line = florence(&["run", "--json", "--prompt", "<OD>", &shapes], "");
    let line = String::from_utf8(line.stdout).unwrap();
    draw(&[&shapes, "-", &path], &line);
    let svg = std::fs::read_to_string(&path).unwrap();
    for label in ["circle 0.", "square 0.", "triangle 0."] {
        assert!(svg.contains(label), "{label}: {svg}");
    }
}

#[test]
fn a_line_of_run_without_json_is_an_answer_too() {
    let directory = tempfile::tempdir().unwrap();
    let (shapes, path) = (sample("shapes.png"), out(&directory, "a.svg"));
    let line = florence(&["run", "--prompt", "<OD>", &shapes], "");
    draw(&[&shapes, "-", &path], &String::from_utf8(line.stdout).unwrap());
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(["circle", "square", "triangle"].iter().all(|label| svg.contains(label)), "{svg}");
}

#[test]
fn an_answer_may_stand_after_any_name_and_after_a_score() {
    let directory = tempfile::tempdir().unwrap();
    let (shapes, path) = (sample("shapes.png"), out(&directory, "a.png"));
    for line in [
        format!("a: {{b}}: c.png: {ANSWER}\n"),
        format!("a.png: -0.1234 {ANSWER}\na.png: -0.5 {{\"<OD>\":{{}}}}\n"),
    ] {
        draw(&[&shapes, "-", &path], &line);
        assert!(has_box(&path), "{line}");
    }
    for line in [format!("a.png: {ANSWER}\nb.png: {ANSWER}\n"), format!("{{\"answer\": {ANSWER}")] {
        let refused = florence(&["draw", &shapes, "-", &path], &line);
        assert!(!refused.status.success(), "{line}");
    }
}

#[test]
fn the_picture_itself_is_not_drawn_over() {
    let directory = tempfile::tempdir().unwrap();
    let picture = out(&directory, "a.png");
    let before = std::fs::read(sample("shapes.png")).unwrap();
    std::fs::write(&picture, &before).unwrap();
    let again = directory.path().join(".").join("a.png").display().to_string();
    let error = refused(&[&picture, r#"{"<OD>": {"bboxes": [], "labels": []}}"#, &again]);
    assert!(error.contains("would be written over"), "{error}");
    assert_eq!(std::fs::read(&picture).unwrap(), before);
}

#[test]
fn a_job_is_drawn_from_its_server() {
    let root = picture("shapes.png").parent().unwrap().display().to_string();
    let server = Server::ready(&[&format!("florence.file-roots {root}")]);
    let (shapes, directory) = (sample("shapes.png"), tempfile::tempdir().unwrap());
    let url = format!("redis://127.0.0.1:{}", server.port);
    let (path, of) = (out(&directory, "a.svg"), ["--job", "job", "--redis", &url]);
    let error = refused(&[&[shapes.as_str(), &path], &of[..]].concat());
    assert!(error.contains("there is no job job"), "{error}");
    server.call::<()>(&[
        "FLORENCE.SUBMIT",
        "job",
        &shapes,
        "<REGION_TO_CATEGORY><loc_48><loc_472><loc_272><loc_759>",
    ]);
    server.call::<redis::Value>(&["FLORENCE.WAIT", "job", "60"]);
    draw(&[&[shapes.as_str(), &path], &of[..]].concat(), "");
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.contains("stroke-dasharray") && svg.contains("circle ("), "{svg}");
    // Without a picture's file, the one that the job keeps.
    let error = refused(&[&[path.as_str()], &of[..]].concat());
    assert!(error.contains("job keeps no picture: name its file"), "{error}");
    let bytes = std::fs::read(&shapes).unwrap();
    redis::cmd("HSET").arg("job").arg("thumbnail").arg(bytes).exec(&mut server.connect()).unwrap();
    draw(&[&[path.as_str()], &of[..]].concat(), "");
    server.call::<()>(&["FLORENCE.SUBMIT", "late", &shapes, "<OD>", "DELAY", "3600000"]);
    let error = refused(&[&shapes, &path, "--job", "late", "--redis", &url]);
    assert!(error.contains("late is queued and has no answer"), "{error}");
}
