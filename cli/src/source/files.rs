//! Folders and globs, in the order of their names.

use std::path::{Path, PathBuf};

use anyhow::Context;
use globset::{GlobBuilder, GlobMatcher};
use walkdir::{DirEntry, WalkDir};

use super::{Item, List, Listed, Place, Unlisted, is_picture};

pub(super) fn item(path: &Path) -> Item {
    Item { name: path.display().to_string(), place: Place::File(path.to_owned()) }
}

/// The pictures of a folder and of all below it, but for what is hidden.
pub(super) fn folder(path: &Path) -> List<'static> {
    let is_visible = |entry: &DirEntry| {
        entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
    };
    let entries = walk(path).into_iter().filter_entry(is_visible);
    let is_wanted = |entry: &DirEntry| is_picture(&entry.file_name().to_string_lossy());
    Box::new(entries.filter_map(move |entry| listed(entry, is_wanted)))
}

fn walk(path: &Path) -> WalkDir {
    WalkDir::new(path).follow_links(true).sort_by_file_name()
}

fn listed(
    entry: walkdir::Result<DirEntry>,
    is_wanted: impl Fn(&DirEntry) -> bool,
) -> Option<Listed> {
    match entry {
        Ok(entry) => {
            let is_wanted = entry.file_type().is_file() && is_wanted(&entry);
            is_wanted.then(|| Ok(item(entry.path())))
        }
        Err(error) => {
            let name = error.path().map(|path| path.display().to_string()).unwrap_or_default();
            // Its own text repeats the path.
            let reason = error.io_error().map_or_else(|| error.to_string(), ToString::to_string);
            Some(Err(Unlisted::new(&name, &format!("cannot list it: {reason}"))))
        }
    }
}

/// `pictures/**/*.jpg`; `**` stands for folders of any depth.
#[derive(Debug)]
pub(super) struct Glob {
    /// The folder that all matches are in.
    base: PathBuf,
    matcher: GlobMatcher,
}

impl Glob {
    /// `None` for what has nothing of a glob.
    pub(super) fn of(pattern: &str) -> anyhow::Result<Option<Self>> {
        let Some(first) = pattern.find(['*', '?', '[', '{']) else { return Ok(None) };
        let base = pattern[..first].rsplit_once('/').map_or("", |(base, _)| base);
        let base = if base.is_empty() && pattern.starts_with('/') { "/" } else { base };
        let glob = GlobBuilder::new(pattern).literal_separator(true).build();
        let glob = glob.with_context(|| format!("{pattern} is not a pattern of names"))?;
        let base = PathBuf::from(if base.is_empty() { "." } else { base });
        Ok(Some(Self { base, matcher: glob.compile_matcher() }))
    }

    pub(super) fn list(&self) -> List<'_> {
        let entries = walk(&self.base).into_iter();
        let plain = |entry: &DirEntry| {
            let path = entry.path();
            path.strip_prefix("./").unwrap_or(path).to_owned()
        };
        Box::new(entries.filter_map(move |entry| {
            let found = listed(entry, |entry| self.matcher.is_match(plain(entry)))?;
            Some(found.map(|found| match found.name.strip_prefix("./") {
                Some(name) => Item { name: name.to_owned(), ..found },
                None => found,
            }))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_and_folders_find_pictures_in_the_order_of_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for name in ["b.png", "a.JPG", "note.txt", "sub/c.webp", "sub/.hidden.png", ".git/d.png"] {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let names = |list: List<'_>| -> Vec<String> {
            let strip = |item: Item| {
                let Place::File(path) = item.place else { unreachable!() };
                path.strip_prefix(root).unwrap().display().to_string()
            };
            list.map(|item| strip(item.unwrap())).collect()
        };
        assert_eq!(names(folder(root)), ["a.JPG", "b.png", "sub/c.webp"]);
        let glob = |pattern: &str| {
            let pattern = root.join(pattern).display().to_string();
            names(Glob::of(&pattern).unwrap().unwrap().list())
        };
        assert_eq!(glob("*.png"), ["b.png"]);
        assert_eq!(
            glob("**/*.{png,webp}"),
            [".git/d.png", "b.png", "sub/.hidden.png", "sub/c.webp"]
        );
        assert!(Glob::of("plain.png").unwrap().is_none());
        assert!(Glob::of("[").is_err());
    }

    #[test]
    fn a_folder_that_is_not_there_is_told_of() {
        let listed: Vec<Listed> = folder(Path::new("/nowhere")).collect();
        let unlisted = listed[0].as_ref().unwrap_err();
        assert_eq!(unlisted.name, "/nowhere");
        assert!(unlisted.reason.starts_with("cannot list it: "), "{}", unlisted.reason);
    }
}
