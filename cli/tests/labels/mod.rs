//! `florence label` as a process, pictures for it, and what it writes.
#![expect(clippy::unwrap_used, reason = "test helpers")]
#![allow(dead_code, clippy::allow_attributes, reason = "not every test needs every helper")]

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use florence_tests::picture;
use image::{Rgb, RgbImage};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

pub(crate) fn florence(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_florence"));
    command.args(args).env_remove("FLORENCE_REDIS").env("RUST_BACKTRACE", "0");
    command
}

/// `florence label` in a folder.
pub(crate) fn command(directory: &TempDir, args: &[&str], out: &Path) -> Command {
    let mut command = florence(&["label"]);
    command.args(args).arg("--out").arg(out).current_dir(directory);
    command.stdout(Stdio::piped());
    command
}

pub(crate) fn label(directory: &TempDir, args: &[&str], out: &Path) -> Output {
    command(directory, args, out).output().unwrap()
}

pub(crate) fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The files of an output, in their order.
pub(crate) fn answered(path: &Path) -> Vec<String> {
    let mut files: Vec<String> =
        lines(path).iter().map(|line| line["file"].as_str().unwrap().to_owned()).collect();
    files.sort();
    files
}

/// A folder of samples: a picture, its copy, another one, and what is none.
pub(crate) fn samples() -> TempDir {
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

/// So many small pictures in `pics`, no two alike.
pub(crate) fn draw_pictures(directory: &TempDir, count: u32) {
    let folder = directory.path().join("pics");
    std::fs::create_dir_all(&folder).unwrap();
    for i in 0..count {
        let [_, r, g, b] = (i * 7919).to_be_bytes();
        let square = RgbImage::from_fn(48, 48, |x, y| {
            let is_square = (8..32).contains(&x) && (8..32).contains(&y);
            if is_square { Rgb([r, g, b]) } else { Rgb([255, 255, 255]) }
        });
        square.save(folder.join(format!("{i:05}.png"))).unwrap();
    }
}
