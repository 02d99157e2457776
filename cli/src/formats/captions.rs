//! A text file for each picture, `NAME.txt` beside `NAME.jpg`, as trainers of image models read them
//! (kohya, taggui): one line for each prompt that was answered by a text.

use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::{
    out::{self, Names},
    pictures::Pictures,
};

/// Without a folder, beside the pictures.
pub(super) fn write(pictures: &Pictures, folder: &Path) -> anyhow::Result<()> {
    let mut names = Names::default();
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
        names.take_file(&path)?;
        let lines = picture.texts.iter().map(|text| text.text.trim().replace('\n', " ") + "\n");
        out::bytes(&path, lines.collect::<String>().as_bytes())
    })
}
