//! A text file for each picture, `NAME.txt` beside `NAME.jpg`, as trainers of image models read them
//! (kohya, taggui): one line for each prompt that was answered by a text.

use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::{out::Out, pictures::Pictures};

/// Without a folder, beside the pictures.
pub(super) fn write(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    ensure!(pictures.has_texts, "no answer is a text: ask for a caption");
    pictures.each(|picture| {
        let path = if folder.as_os_str().is_empty() {
            let path = PathBuf::from(&picture.file);
            ensure!(path.is_file(), "{} is no file here: --format captions=FOLDER", picture.file);
            path.with_extension("txt")
        } else {
            picture.below(folder, "txt")
        };
        if picture.texts.is_empty() {
            return Ok(());
        }
        let lines = picture.texts.iter().map(|text| text.text.trim().replace('\n', " ") + "\n");
        to.bytes(&path, lines.collect::<String>().as_bytes())
    })
}
