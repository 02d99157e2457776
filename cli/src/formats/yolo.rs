//! YOLO, as Ultralytics reads it: `labels/NAME.txt` beside links to the pictures in `images`, and
//! `data.yaml`. A line is a class and numbers from 0 to 1; an empty file says that nothing was found.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf, absolute},
};

use anyhow::ensure;

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
};

/// Boxes.
pub(super) fn write(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    all(pictures, to, folder, |picture, object, text| {
        let [x1, y1, x2, y2] = object.bounds;
        let (w, h) = (picture.width as f64, picture.height as f64);
        let numbers =
            [f64::midpoint(x1, x2) / w, f64::midpoint(y1, y2) / h, (x2 - x1) / w, (y2 - y1) / h];
        line(text, object.class, numbers);
    })
}

/// Outlines; a line for each part of an object.
pub(super) fn write_polygons(
    pictures: &Pictures,
    to: &Out<'_>,
    folder: &Path,
) -> anyhow::Result<()> {
    all(pictures, to, folder, |picture, object, text| {
        let (w, h) = (picture.width as f64, picture.height as f64);
        for outline in &object.outlines {
            line(text, object.class, outline.iter().flat_map(|(x, y)| [x / w, y / h]));
        }
    })
}

fn line(text: &mut String, class: usize, numbers: impl IntoIterator<Item = f64>) {
    let _ = write!(text, "{class}");
    for number in numbers {
        let _ = write!(text, " {number:.6}");
    }
    text.push('\n');
}

/// A picture's place below `labels` and `images`. Readers look for its labels where the last
/// `images` of its path is `labels`: no folder of its own may be called so.
fn place(picture: &Picture) -> PathBuf {
    let path = picture.below();
    let folders = path.parent().into_iter().flatten().filter(|folder| *folder != "images");
    folders.chain(path.file_name()).collect()
}

fn all(
    pictures: &Pictures,
    to: &Out<'_>,
    folder: &Path,
    describe: impl Fn(&Picture, &Object, &mut String),
) -> anyhow::Result<()> {
    ensure!(
        !pictures.classes.names.is_empty(),
        "nothing was found, and a data set has classes: name them with --classes"
    );
    std::fs::create_dir_all(folder.join("images"))?;
    write_data(pictures, to, folder)?;
    let names = to.names(place)?;
    let mut elsewhere = 0;
    pictures.each(|picture| {
        let path = folder.join("labels").join(names.file(picture, "txt"));
        let mut text = String::new();
        for object in &picture.objects {
            describe(picture, object, &mut text);
        }
        to.bytes(&path, text.as_bytes())?;
        let file = Path::new(&picture.file);
        if file.is_file() {
            to.link(file, &folder.join("images").join(names.picture(picture)))?;
        } else {
            elsewhere += 1;
        }
        Ok(())
    })?;
    if elsewhere > 0 {
        eprintln!("{elsewhere} pictures are no files here: images/ has no links to them");
    }
    Ok(())
}

fn write_data(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    // A string in JSON is one in YAML.
    let root = serde_json::to_string(&absolute(folder)?.display().to_string())?;
    let mut names = "names:\n".to_owned();
    for (class, name) in pictures.classes.names.iter().enumerate() {
        let _ = writeln!(names, "  {class}: {}", serde_json::to_string(name)?);
    }
    let data = format!("path: {root}\ntrain: images\nval: images\n{names}");
    // Other places of the pictures may have been written there.
    to.classes(&folder.join("data.yaml"), &data, |there| there.contains(&names))
}
