//! Where pictures may come from: URLs, and files below the configured directories.

use std::path::{Component, Path, PathBuf};

use florence_engine::{Error, fetch::Fetcher};
use redis_module::RedisError;

use crate::{config, reply, workers::Failure};

/// Whether a URI may be fetched at all; asked before a job is stored.
pub(crate) fn check(uri: &str) -> Result<(), RedisError> {
    if uri.starts_with("http://") || uri.starts_with("https://") {
        return Ok(());
    }
    let Some(path) = local_path(uri) else {
        let text = "the image must be an http(s) URL, an absolute path, DATA bytes or KEY key";
        return Err(reply::error("ERR", text));
    };
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    if is_plain && config::file_roots().iter().any(|root| path.starts_with(root)) {
        return Ok(());
    }
    Err(reply::error("DENIED", "the file is not below a directory of florence.file-roots"))
}

fn local_path(uri: &str) -> Option<PathBuf> {
    let path = uri.strip_prefix("file://").unwrap_or(uri);
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// The bytes behind a URI.
pub(crate) fn read(fetcher: &Fetcher, uri: &str) -> Result<Vec<u8>, Failure> {
    match local_path(uri) {
        Some(path) => read_file(&path),
        None => fetcher.fetch(uri).map_err(|error| Failure::from(Error::from(error))),
    }
}

/// Reads a file whose real path, symbolic links followed, is below an allowed directory.
fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    let missing = |_error| Failure::permanent("FETCH", "the file cannot be read");
    let real = path.canonicalize().map_err(missing)?;
    let roots = config::file_roots();
    let is_allowed =
        roots.iter().filter_map(|root| root.canonicalize().ok()).any(|root| real.starts_with(root));
    if !is_allowed {
        let text = "the file is not below a directory of florence.file-roots";
        return Err(Failure::permanent("DENIED", text));
    }
    let metadata = real.metadata().map_err(missing)?;
    if !metadata.is_file() || metadata.len() > config::number(&config::MAX_IMAGE_BYTES) {
        return Err(Failure::permanent("FETCH", "not a regular file, or larger than the limit"));
    }
    std::fs::read(&real).map_err(missing)
}
