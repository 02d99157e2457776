//! Files that are there as a whole or not at all.

use std::{
    fs::{Metadata, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use tempfile::{Builder, NamedTempFile};

/// A file beside a path, to be renamed to it once it is whole; gone if it never is.
pub(crate) fn part(path: &Path) -> io::Result<NamedTempFile> {
    // Rights are as far as the process's mask lets them be.
    let rights = Permissions::from_mode(0o666);
    let mut part = Builder::new();
    part.prefix(".florence-").suffix(".part").permissions(rights).tempfile_in(folder_of(path))
}

/// Writes beside the name and then renames: what is there stays until all of it is written. What is
/// no file, such as a pipe, is written to; a link stays one.
pub(crate) fn write(out: &Path, bytes: &[u8]) -> io::Result<()> {
    let out = &out.canonicalize().unwrap_or_else(|_| out.to_owned());
    if out.exists() && !out.is_file() {
        return std::fs::write(out, bytes);
    }
    let mut part = part(out)?;
    part.write_all(bytes)?;
    part.persist(out)?;
    Ok(())
}

pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What tells files apart, whatever their names.
pub(crate) fn id(there: &Metadata) -> (u64, u64) {
    (there.dev(), there.ino())
}

/// Whether two names are of one file, which is there.
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    let both = one.metadata().ok().zip(other.metadata().ok());
    both.is_some_and(|(one, other)| id(&one) == id(&other))
}
