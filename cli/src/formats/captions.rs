//! A text file for each picture, `NAME.txt` beside `NAME.jpg`, as trainers of image models read them
//! (kohya, taggui): one line for each prompt that was answered by a text.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};

use super::{
    out::Out,
    pictures::{Picture, Pictures},
};

/// Without a folder, beside the pictures.
pub(super) fn write(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    ensure!(pictures.has_texts, "no answer is a text: ask for a caption");
    let is_beside = folder.as_os_str().is_empty();
    let beside = |picture: &Picture| PathBuf::from(&picture.file);
    let names = to.names(if is_beside { beside } else { Picture::below })?;
    let mut elsewhere = Vec::new();
    pictures.each(|picture| {
        if picture.texts.is_empty() {
            return Ok(());
        }
        if is_beside && !Path::new(&picture.file).is_file() {
            elsewhere.push(picture.file.clone());
            return Ok(());
        }
        let path = folder.join(names.file(picture, "txt"));
        let lines = picture.texts.iter().map(|text| text.text.trim().replace('\n', " ") + "\n");
        to.bytes(&path, lines.collect::<String>().as_bytes())
    })?;
    let Some(first) = elsewhere.first() else { return Ok(()) };
    let count = elsewhere.len();
    bail!("{count} pictures are no files here, such as {first}: --format captions=FOLDER has them")
}
