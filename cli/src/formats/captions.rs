//! A text file for each picture, `NAME.txt` beside `NAME.jpg`, as trainers of image models read them
//! (kohya, taggui): one line for each prompt that was answered by a text.

use std::path::{Path, PathBuf};

use anyhow::ensure;

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
    pictures.each(|picture| {
        let is_here = !is_beside || Path::new(&picture.file).is_file();
        ensure!(is_here, "{} is no file here: --format captions=FOLDER", picture.file);
        let path = folder.join(names.file(picture, "txt"));
        if picture.texts.is_empty() {
            return Ok(());
        }
        let lines = picture.texts.iter().map(|text| text.text.trim().replace('\n', " ") + "\n");
        to.bytes(&path, lines.collect::<String>().as_bytes())
    })
}
