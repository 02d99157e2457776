//! Folders and globs, in the order of their names.

use std::{
    fmt::{self, Display, Formatter},
    path::{Path, PathBuf},
};

use anyhow::Context;
use globset::{GlobBuilder, GlobMatcher};
use walkdir::{DirEntry, WalkDir};

use super::{Item, List, Listed, NO_TEXT, Place, Unlisted, has_ending, is_picture};

/// A picture by the name of its file, which lines can only tell if it is text.
pub(super) fn item(path: &Path) -> Listed {
    let place = Place::File(path.to_owned());
    match plain(path).to_str() {
        Some(name) => Ok(Item { name: name.to_owned(), place }),
        None => Err(Unlisted::new(&path.display(), &NO_TEXT)),
    }
}

/// Whether something this far below what was named is hidden.
fn is_hidden(path: &Path, depth: usize) -> bool {
    depth > 0 && path.file_name().is_some_and(|it| it.as_encoded_bytes().starts_with(b"."))
}

/// A path without what says nothing.
fn plain(path: &Path) -> &Path {
    path.strip_prefix("./").unwrap_or(path)
}

/// The pictures of a folder and of all below it, but for what is hidden.
pub(super) fn folder(path: &Path) -> List<'static> {
    let entries = walk(path).into_iter();
    let entries = entries.filter_entry(|entry| !is_hidden(entry.path(), entry.depth()));
    // A link that leads nowhere is none of these entries.
    let entries = entries.filter(|entry| match entry {
        Err(error) => error.path().is_none_or(|path| !is_hidden(path, error.depth())),
        Ok(_) => true,
    });
    let is_wanted = |entry: &DirEntry| is_picture(&entry.file_name().to_string_lossy());
    let files = entries.filter_map(move |entry| found(entry, is_wanted));
    Box::new(files.map(|file| file.and_then(|path| item(&path))))
}

fn walk(path: &Path) -> WalkDir {
    WalkDir::new(path).follow_links(true).sort_by_file_name()
}

/// A file that is wanted, or why nobody knows.
fn found(
    entry: walkdir::Result<DirEntry>,
    is_wanted: impl Fn(&DirEntry) -> bool,
) -> Option<Result<PathBuf, Unlisted>> {
    match entry {
        Ok(entry) => {
            let is_wanted = entry.file_type().is_file() && is_wanted(&entry);
            is_wanted.then(|| Ok(entry.into_path()))
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
    /// Which folders may hold matches, for each depth below the base, as far as that can be told.
    folders: Vec<GlobMatcher>,
    /// The parts of the pattern that begin with a dot: as in shells, no others mean such names.
    dotted: Vec<GlobMatcher>,
    most_depth: usize,
    /// Whether the pattern says how the names end, so that it may mean lists and archives.
    has_ending: bool,
}

impl Display for Glob {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.matcher.glob().fmt(f)
    }
}

impl Glob {
    /// `None` for what has nothing of a glob.
    pub(super) fn of(pattern: &str) -> anyhow::Result<Option<Self>> {
        const SPECIAL: [char; 4] = ['*', '?', '[', '{'];
        if !pattern.contains(SPECIAL) {
            return Ok(None);
        }
        let matcher = |parts: &[&str]| {
            let glob = GlobBuilder::new(&parts.join("/")).literal_separator(true).build();
            let glob = glob.with_context(|| format!("{pattern} is not a pattern of names"))?;
            anyhow::Ok(glob.compile_matcher())
        };
        // As walking spells names; the first is empty if they begin at the root.
        let is_part = |(i, part): &(usize, &str)| *part != "." && (*i == 0 || !part.is_empty());
        let parts: Vec<&str> =
            pattern.split('/').enumerate().filter(is_part).map(|(_, part)| part).collect();
        let plain = parts.iter().take_while(|part| !part.contains(SPECIAL)).count();
        let base = match &parts[..plain] {
            [] => ".".to_owned(),
            [""] => "/".to_owned(),
            parts => parts.join("/"),
        };
        let is_told = |part: &&&str| !part.contains("**") && !part.contains('{');
        let told = plain + parts[plain..].iter().take_while(is_told).count();
        let folders = (plain + 1..=told.min(parts.len() - 1)).map(|end| matcher(&parts[..end]));
        let dotted = parts[plain..].iter().filter(|part| part.starts_with('.'));
        let last = parts.last().and_then(|part| part.rsplit_once('.'));
        Ok(Some(Self {
            base: PathBuf::from(base),
            matcher: matcher(&parts)?,
            folders: folders.collect::<Result<_, _>>()?,
            dotted: dotted.map(|part| matcher(&[part])).collect::<Result<_, _>>()?,
            most_depth: if told == parts.len() { told - plain } else { usize::MAX },
            has_ending: last.is_some_and(|(_, ending)| !ending.contains(SPECIAL)),
        }))
    }

    /// The files that match. Unless the pattern says how they end, pictures are meant.
    pub(super) fn files(&self) -> impl Iterator<Item = Result<PathBuf, Unlisted>> {
        // Whether something of this depth matches, or may lead to what does.
        let is_on_the_way = |path: &Path, depth: usize, is_folder: bool| {
            let folder = depth.checked_sub(1).and_then(|depth| self.folders.get(depth));
            let may_hold =
                depth < self.most_depth && folder.is_none_or(|it| it.is_match(plain(path)));
            is_folder && may_hold || self.matcher.is_match(plain(path))
        };
        let is_meant = |path: &Path, depth: usize| {
            let name = path.file_name().unwrap_or_default();
            !is_hidden(path, depth) || self.dotted.iter().any(|part| part.is_match(name))
        };
        let is_near = move |path: &Path, depth: usize, is_folder: bool| {
            is_meant(path, depth) && is_on_the_way(path, depth, is_folder)
        };
        let is_wanted = move |entry: &DirEntry| {
            (self.has_ending || has_ending(entry.path()))
                && self.matcher.is_match(plain(entry.path()))
        };
        // What cannot be looked at matters only where something may be found.
        let matters = move |entry: &walkdir::Result<DirEntry>| match entry {
            Err(error) => error.path().is_none_or(|path| is_near(path, error.depth(), true)),
            Ok(_) => true,
        };
        let entries = walk(&self.base).max_depth(self.most_depth).into_iter();
        let is_entry_near = move |entry: &DirEntry| {
            is_near(entry.path(), entry.depth(), entry.file_type().is_dir())
        };
        let files = entries.filter_entry(is_entry_near).filter(matters);
        files.filter_map(move |entry| found(entry, is_wanted))
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
        // As Emacs leaves it.
        std::os::unix::fs::symlink("nowhere", root.join("sub/.#c.webp")).unwrap();
        assert_eq!(names(folder(root)), ["a.JPG", "b.png", "sub/c.webp"]);
        let glob = |pattern: &str| -> Vec<String> {
            let pattern = format!("{}/{pattern}", root.display());
            let files = Glob::of(&pattern).unwrap().unwrap();
            let name = |path: PathBuf| path.strip_prefix(root).unwrap().display().to_string();
            files.files().map(|file| name(file.unwrap())).collect()
        };
        assert_eq!(glob("*.png"), ["b.png"]);
        assert_eq!(glob("**/*.{png,webp}"), ["b.png", "sub/c.webp"]);
        // What begins with a dot is meant by a part that does.
        assert_eq!(glob("*/.h*.png"), ["sub/.hidden.png"]);
        assert_eq!(glob(".git/*.png"), [".git/d.png"]);
        assert_eq!(glob(".*/*.png"), [".git/d.png"]);
        // However it is spelled; and what cannot match is not even looked at.
        assert_eq!(glob(".//sub/./*.webp"), ["sub/c.webp"]);
        assert_eq!(glob("*"), ["a.JPG", "b.png"]);
        assert_eq!(glob("*.txt"), ["note.txt"]);
        std::os::unix::fs::symlink(root, root.join("sub/loop")).unwrap();
        assert_eq!(glob("s*/*.webp"), ["sub/c.webp"]);
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
