//! Where pictures may come from: URLs, buckets, and files below the configured directories.

mod address;
mod hosts;
mod inline;

use std::{
    ffi::OsString,
    hash::{DefaultHasher, Hash, Hasher},
    io::Read,
    os::unix::ffi::OsStringExt,
    path::{Component, Path, PathBuf},
    sync::LazyLock,
    time::Instant,
};

use cap_std::{
    ambient_authority,
    fs::{Dir, OpenOptions, OpenOptionsExt},
};
use florence_engine::{
    Stop,
    fetch::{AccessRules, FetchError, FetchLimits, Fetcher},
};
use redis_module::RedisError;

use crate::{server::reply, settings};

pub(crate) use address::{MOST_BYTES, has_long_host, host_and_port, is_address, without_secrets};
pub(crate) use hosts::hosts;
pub(crate) use inline::inline;

/// The one client for all threads, made for the first URL.
static FETCHER: LazyLock<Fetcher> = LazyLock::new(|| {
    let rules = AccessRules {
        allow_networks: (*settings::ALLOW_NETWORKS.get()).clone(),
        deny_networks: (*settings::DENY_NETWORKS.get()).clone(),
        allow_hosts: (*settings::ALLOW_HOSTS.get()).clone(),
        deny_hosts: (*settings::DENY_HOSTS.get()).clone(),
    };
    Fetcher::new(rules, (*settings::BUCKETS.get()).clone())
});

/// Why there are no bytes behind a URI.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the file is not below a directory of florence.file-roots")]
    NotBelowRoot,
    #[error("the file cannot be read")]
    Unreadable,
    #[error("not a regular file, or larger than the limit")]
    TooLarge,
}

/// An address as text, if what it names may be fetched at all; asked before a job is stored.
pub(crate) fn check(uri: &[u8]) -> Result<&str, RedisError> {
    if uri.len() > MOST_BYTES {
        let (length, most) = (uri.len(), MOST_BYTES);
        let text = format!("the image's address has {length} bytes, more than {most}");
        return Err(reply::error("ERR", text));
    }
    let uri = std::str::from_utf8(uri)
        .map_err(|_not_text| reply::error("ERR", "the image is not valid UTF-8"))?;
    if address::remote(uri).is_some() {
        let host = address::host(uri);
        let (length, most) = (host.len(), address::MOST_HOST_BYTES);
        if length > most {
            let text = format!("the host's name has {length} bytes, more than {most}");
            return Err(reply::error("ERR", text));
        }
        let is_denied = uri.starts_with("http") && !FETCHER.permits_host(&host);
        if is_denied {
            return Err(reply::error("DENIED", "the host is not allowed"));
        }
        return Ok(uri);
    }
    let Some(path) = local_path(uri) else {
        let text = "the image must be an http(s), gs, s3 or data URL, an absolute path, DATA bytes \
            or KEY key";
        return Err(reply::error("ERR", text));
    };
    if below_root(&path, &settings::FILE_ROOTS.get().0).is_some() {
        return Ok(uri);
    }
    Err(reply::error("DENIED", "the file is not below a directory of florence.file-roots"))
}

/// Refuses a picture that is larger than allowed.
pub(crate) fn check_size(bytes: usize) -> Result<(), RedisError> {
    let limit = settings::MAX_IMAGE_BYTES.size();
    if bytes <= limit {
        return Ok(());
    }
    let text = format!("the image has {bytes} bytes, florence.max-image-bytes is {limit}");
    Err(reply::error("ERR", text))
}

/// The character that stands for byte 0x80 in the name of a file that is no text; the other bytes
/// follow. All of a job is text, but clients of Celery have such names.
pub(crate) const FIRST_BYTE: u32 = 0x10_fc80;

/// The byte of a file's name that a character stands for.
pub(crate) fn byte_of(letter: char) -> Option<u8> {
    let distance = u8::try_from(u32::from(letter).checked_sub(FIRST_BYTE)?).ok()?;
    distance.checked_add(0x80)
}

fn local_path(uri: &str) -> Option<PathBuf> {
    let path = uri.strip_prefix("file://").unwrap_or(uri);
    path.starts_with('/').then(|| PathBuf::from(OsString::from_vec(name_bytes(path))))
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

/// The first root that a path is below, and the rest of the path.
fn below_root<'a>(path: &'a Path, roots: &[PathBuf]) -> Option<(PathBuf, &'a Path)> {
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    let root = roots.iter().find(|root| is_plain && path.starts_with(root))?;
    let rest = path.strip_prefix(root).ok().filter(|rest| *rest != Path::new(""))?;
    Some((root.clone(), rest))
}

/// The bytes behind a URI that a user asks for, if they come before the deadline, and before `stop`
/// says so.
pub(crate) fn read(
    uri: &str,
    user: &str,
    deadline: Instant,
    stop: &Stop,
) -> Result<Vec<u8>, SourceError> {
    if let Some(path) = local_path(uri) {
        return read_file(&path);
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let limits = FetchLimits {
        bytes: settings::MAX_IMAGE_BYTES.get(),
        total: settings::FETCH_TIMEOUT_MS.milliseconds().min(left),
        asker: hash_of(user),
        ..FetchLimits::default()
    };
    let start = Instant::now();
    let fetched = FETCHER.fetch(uri, &limits, stop);
    let is_refused = fetched.as_ref().is_err_and(|error| {
        use FetchError::{BadObject, BadUrl, Denied, DeniedHost};
        matches!(error, BadUrl | BadObject | Denied | DeniedHost)
    });
    // Nobody was asked: there is nothing to tell of.
    if !is_refused {
        hosts::record(uri, start.elapsed(), fetched.as_ref().ok().map(Vec::len));
    }
    Ok(fetched?)
}

fn hash_of(user: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    hasher.finish()
}

/// Reads a regular file below an allowed directory; no link leads out of it, whatever changes
/// while it is resolved.
fn read_file(path: &Path) -> Result<Vec<u8>, SourceError> {
    const NO_WAITING: i32 = 0o4000; // O_NONBLOCK: opening a pipe must not wait for its other end
    let roots = settings::FILE_ROOTS.get();
    let (root, rest) = below_root(path, &roots.0).ok_or(SourceError::NotBelowRoot)?;
    let unreadable = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => SourceError::NotBelowRoot,
        _ => SourceError::Unreadable,
    };
    let root = Dir::open_ambient_dir(root, ambient_authority()).map_err(unreadable)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(NO_WAITING);
    let file = root.open_with(rest, &options).map_err(unreadable)?;
    let limit = settings::MAX_IMAGE_BYTES.get();
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > limit {
        return Err(SourceError::TooLarge);
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    // It may have grown meanwhile.
    if bytes.len() as u64 > limit { Err(SourceError::TooLarge) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_text_are_those_bytes() {
        let bytes = name_bytes("/a/\u{e9}\u{10fc80}\u{10fcff}\u{10fd00}.png");
        assert_eq!(bytes, b"/a/\xc3\xa9\x80\xff\xf4\x8f\xb4\x80.png");
    }
}
