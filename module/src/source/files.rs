//! Pictures in files below the configured directories.

use std::{
    ffi::OsString,
    io::{self, ErrorKind, Read},
    os::unix::ffi::OsStringExt,
    path::{Component, Path, PathBuf},
};

use cap_std::{
    ambient_authority,
    fs::{Dir, File, OpenOptions, OpenOptionsExt},
};
use florence_engine::fetch::file_of_url;

use super::SourceError;
use crate::settings;

/// The character that stands for byte 0x80 in the name of a file that is no text; the other bytes
/// follow. All of a job is text, but clients of Celery have such names.
pub(crate) const FIRST_BYTE: u32 = 0x10_fc80;

/// The byte of a file's name that a character stands for.
pub(crate) fn byte_of(letter: char) -> Option<u8> {
    let distance = u8::try_from(u32::from(letter).checked_sub(FIRST_BYTE)?).ok()?;
    distance.checked_add(0x80)
}

fn name_bytes(path: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(path.len());
    for letter in path.chars() {
        match byte_of(letter) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(letter.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

/// The path that an address names: an absolute one as it is, or one of a `file:` URL of this
/// machine, decoded.
pub(super) fn path(uri: &str) -> Option<PathBuf> {
    let name = name_bytes(uri.trim_start());
    if name.starts_with(b"/") {
        return Some(OsString::from_vec(name).into());
    }
    file_of_url(&name)
}

/// Whether a path is below a directory of `florence.file-roots`, as it is written.
pub(super) fn is_below_root(path: &Path) -> bool {
    below(path, &settings::FILE_ROOTS.get().0).is_some()
}

/// The first root that a path is below, and the rest of the path.
fn below<'a>(path: &'a Path, roots: &[PathBuf]) -> Option<(PathBuf, &'a Path)> {
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    let root = roots.iter().find(|root| is_plain && path.starts_with(root))?;
    let rest = path.strip_prefix(root).ok().filter(|rest| *rest != Path::new(""))?;
    Some((root.clone(), rest))
}

/// Reads a regular file below an allowed directory.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, SourceError> {
    let file = open(path, &settings::FILE_ROOTS.get().0)?;
    let limit = settings::MAX_IMAGE_BYTES.get();
    let metadata = file.metadata().map_err(problem)?;
    if !metadata.is_file() {
        return Err(SourceError::NotRegular);
    }
    if metadata.len() > limit {
        return Err(SourceError::TooLarge(limit));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(problem)?;
    // It may have grown meanwhile.
    if bytes.len() as u64 > limit { Err(SourceError::TooLarge(limit)) } else { Ok(bytes) }
}

/// Opens what is below a root. No link leads out of it, whatever changes meanwhile; one that names
/// its aim from the root of all files, or in another allowed directory, is followed if it ends
/// below one of them.
fn open(path: &Path, roots: &[PathBuf]) -> Result<File, SourceError> {
    let (root, rest) = below(path, roots).ok_or(SourceError::NotBelowRoot)?;
    let opened = open_below(&root, rest);
    if !matches!(opened, Err(SourceError::NotBelowRoot)) {
        return opened;
    }
    // Where it leads now; opened as any other path, in case that changes.
    let aim = path.canonicalize().map_err(|_elsewhere| SourceError::NotBelowRoot)?;
    let roots: Vec<_> = roots.iter().filter_map(|root| root.canonicalize().ok()).collect();
    let (root, rest) = below(&aim, &roots).ok_or(SourceError::NotBelowRoot)?;
    open_below(&root, rest)
}

fn open_below(root: &Path, rest: &Path) -> Result<File, SourceError> {
    const NO_WAITING: i32 = 0o4000; // O_NONBLOCK: opening a pipe must not wait for its other end
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(NO_WAITING);
    let root = Dir::open_ambient_dir(root, ambient_authority()).map_err(problem)?;
    root.open_with(rest, &options).map_err(problem)
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err has it")]
fn problem(error: io::Error) -> SourceError {
    match error.kind() {
        // What the kernel says has a number; the others are links that lead out.
        ErrorKind::PermissionDenied if error.raw_os_error().is_none() => SourceError::NotBelowRoot,
        ErrorKind::NotFound => SourceError::Missing,
        _ => SourceError::Unreadable,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn names_that_are_no_text_are_those_bytes() {
        let bytes = name_bytes("/a/\u{e9}\u{10fc80}\u{10fcff}\u{10fd00}.png");
        assert_eq!(bytes, b"/a/\xc3\xa9\x80\xff\xf4\x8f\xb4\x80.png");
    }

    #[test]
    fn files_are_named_by_paths_and_urls() {
        for (uri, expected) in [
            ("/a/b.png", Some("/a/b.png")),
            ("  /a/b.png", Some("/a/b.png")),
            ("/a%20b.png", Some("/a%20b.png")),
            ("file:///a/b.png", Some("/a/b.png")),
            ("FILE:///a/b.png", Some("/a/b.png")),
            (" File:///a/b.png", Some("/a/b.png")),
            ("file:/a/b.png", Some("/a/b.png")),
            ("file://localhost/a/b.png", Some("/a/b.png")),
            ("file://LocalHost/a/b.png", Some("/a/b.png")),
            ("file:///a%20b/%C3%BC%23%3F%25.png", Some("/a b/\u{fc}#?%.png")),
            ("file:///100%.png", Some("/100%.png")),
            ("file:///a b#c?d", Some("/a b#c?d")),
            ("file:///..%2Fx", Some("/../x")),
            ("file://other/a.png", None),
            ("file://localhost", None),
            ("file://", None),
            ("file:a.png", None),
            ("file:%2Fa.png", None),
            ("a.png", None),
            ("files:///a.png", None),
        ] {
            assert_eq!(path(uri), expected.map(PathBuf::from), "{uri}");
        }
        let bytes = OsString::from_vec(b"/\xff".to_vec());
        assert_eq!(path("file:///%FF"), Some(bytes.into()));
    }

    #[test]
    fn links_are_followed_as_long_as_they_stay_below_a_root() {
        let all = tempfile::tempdir().unwrap();
        let all = all.path();
        for name in ["root", "root/deep", "second", "outside"] {
            std::fs::create_dir(all.join(name)).unwrap();
            std::fs::write(all.join(name).join("file"), name).unwrap();
        }
        let (root, outside) = (all.join("root"), all.join("outside"));
        symlink(&root, all.join("by-link")).unwrap();
        for (name, aim) in [
            ("relative", PathBuf::from("deep/file")),
            ("absolute", root.join("deep/file")),
            ("directory", root.join("deep")),
            ("up", PathBuf::from("deep/../file")),
            ("second", all.join("second/file")),
            ("through", all.join("by-link/deep/file")),
            ("chain", root.join("absolute")),
            ("out", outside.join("file")),
            ("out-relative", PathBuf::from("../outside/file")),
            ("out-directory", outside.clone()),
            ("out-nowhere", outside.join("nowhere")),
            ("broken", root.join("nowhere")),
            ("circle", root.join("circle")),
        ] {
            symlink(aim, root.join(name)).unwrap();
        }
        let roots = [root.clone(), all.join("second"), all.join("by-link")];
        let read = |path: &str| {
            let mut text = String::new();
            open(&all.join(path), &roots)?.read_to_string(&mut text).map_err(problem)?;
            Ok::<_, SourceError>(text)
        };
        for (path, text) in [
            ("root/file", "root"),
            ("root/relative", "root/deep"),
            ("root/absolute", "root/deep"),
            ("root/directory/file", "root/deep"),
            ("root/up", "root"),
            ("root/second", "second"),
            ("root/through", "root/deep"),
            ("root/chain", "root/deep"),
            ("by-link/absolute", "root/deep"),
        ] {
            assert_eq!(read(path).unwrap(), text, "{path}");
        }
        for path in ["root/out", "root/out-relative", "root/out-directory/file", "root/out-nowhere"]
        {
            assert!(matches!(read(path), Err(SourceError::NotBelowRoot)), "{path}");
        }
        for path in ["outside/file", "root/../outside/file", "root/deep/../file", "root"] {
            assert!(matches!(read(path), Err(SourceError::NotBelowRoot)), "{path}");
        }
        assert!(matches!(read("root/nowhere"), Err(SourceError::Missing)));
        for path in ["root/broken", "root/circle"] {
            assert!(read(path).is_err(), "{path}");
        }
    }
}
