//! Where pictures may come from: URLs, buckets, and files below the configured directories.

use std::{
    collections::HashMap,
    io::Read,
    path::{Component, Path, PathBuf},
    sync::{LazyLock, Mutex as StdMutex},
    time::Instant,
};

use cap_std::{
    ambient_authority,
    fs::{Dir, OpenOptions, OpenOptionsExt},
};
use florence_engine::{
    Error,
    fetch::{AccessRules, Buckets, FetchLimits, Fetcher},
    image::Formats,
};
use parking_lot::Mutex;
use redis_module::RedisError;

use crate::{config, reply, workers::Failure};

/// The one client for all threads, made for the first URL: by then the settings are known to be
/// good.
static FETCHER: LazyLock<Fetcher> = LazyLock::new(|| {
    let (rules, buckets) = settings().unwrap_or_default();
    Fetcher::new(rules, buckets)
});

fn settings() -> Result<(AccessRules, Buckets), String> {
    fn parse<T: std::str::FromStr<Err = String>>(
        name: &str,
        setting: &StdMutex<String>,
    ) -> Result<T, String> {
        config::text(setting).parse().map_err(|problem| format!("{name}: {problem}"))
    }
    let rules = AccessRules {
        allow_networks: parse("allow-networks", &config::ALLOW_NETWORKS)?,
        deny_networks: parse("deny-networks", &config::DENY_NETWORKS)?,
        allow_hosts: parse("allow-hosts", &config::ALLOW_HOSTS)?,
        deny_hosts: parse("deny-hosts", &config::DENY_HOSTS)?,
    };
    Ok((rules, parse("buckets", &config::BUCKETS)?))
}

/// A typing error in a rule must not pass silently: the module is not loaded with one.
pub(crate) fn check_settings() -> Result<(), String> {
    image_formats()?;
    settings().map(|_settings| ())
}

/// The decoders that may be used.
pub(crate) fn image_formats() -> Result<Formats, String> {
    let formats = config::text(&config::IMAGE_FORMATS).parse();
    formats.map_err(|problem| format!("image-formats: {problem}"))
}

/// Whether a URI may be fetched at all; asked before a job is stored.
pub(crate) fn check(uri: &str) -> Result<(), RedisError> {
    if ["http://", "https://", "gs://", "s3://"].iter().any(|scheme| uri.starts_with(scheme)) {
        let is_denied = uri.starts_with("http") && !FETCHER.permits_host(&host(uri));
        if is_denied {
            return Err(reply::error("DENIED", "the host is not allowed"));
        }
        return Ok(());
    }
    let Some(path) = local_path(uri) else {
        let text = "the image must be an http(s), gs, s3 or data URL, an absolute path, DATA bytes \
            or KEY key";
        return Err(reply::error("ERR", text));
    };
    if below_root(&path, &config::file_roots()).is_some() {
        return Ok(());
    }
    Err(reply::error("DENIED", "the file is not below a directory of florence.file-roots"))
}

/// The bytes and the media type of a `data:` URL; `None` for other URLs.
pub(crate) fn inline(uri: &str) -> Option<Result<(String, Vec<u8>), RedisError>> {
    let is_data = uri.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"));
    is_data.then(|| {
        let malformed = || reply::error("ERR", "the data URL is malformed");
        let url = data_url::DataUrl::process(uri).map_err(|_error| malformed())?;
        let (bytes, _fragment) = url.decode_to_vec().map_err(|_error| malformed())?;
        let kind = url.mime_type();
        Ok((format!("data:{}/{}", kind.type_, kind.subtype), bytes))
    })
}

fn local_path(uri: &str) -> Option<PathBuf> {
    let path = uri.strip_prefix("file://").unwrap_or(uri);
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// The first root that a path is below, and the rest of the path.
fn below_root<'a>(path: &'a Path, roots: &[PathBuf]) -> Option<(PathBuf, &'a Path)> {
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    let root = roots.iter().find(|root| is_plain && path.starts_with(root))?;
    let rest = path.strip_prefix(root).ok().filter(|rest| *rest != Path::new(""))?;
    Some((root.clone(), rest))
}

/// The bytes behind a URI, if they come before the deadline.
pub(crate) fn read(uri: &str, deadline: Instant) -> Result<Vec<u8>, Failure> {
    if let Some(path) = local_path(uri) {
        return read_file(&path);
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let limits = FetchLimits {
        bytes: config::number(&config::MAX_IMAGE_BYTES),
        total: config::milliseconds(&config::FETCH_TIMEOUT_MS).min(left),
        ..FetchLimits::default()
    };
    let start = Instant::now();
    let fetched = FETCHER.fetch(uri, &limits);
    record(uri, start, fetched.as_ref().ok().map(Vec::len));
    fetched.map_err(|error| Failure::from(Error::from(error)))
}

/// Reads a regular file below an allowed directory; no link leads out of it, whatever changes
/// while it is resolved.
fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    const NO_WAITING: i32 = 0o4000; // O_NONBLOCK: opening a pipe must not wait for its other end
    let denied = || {
        let text = "the file is not below a directory of florence.file-roots";
        Failure::permanent("DENIED", text)
    };
    let (root, rest) = below_root(path, &config::file_roots()).ok_or_else(denied)?;
    let unreadable = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => denied(),
        _ => Failure::permanent("FETCH", "the file cannot be read"),
    };
    let root = Dir::open_ambient_dir(root, ambient_authority()).map_err(unreadable)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(NO_WAITING);
    let file = root.open_with(rest, &options).map_err(unreadable)?;
    let limit = config::number(&config::MAX_IMAGE_BYTES);
    let metadata = file.metadata().map_err(unreadable)?;
    let too_large = || Failure::permanent("FETCH", "not a regular file, or larger than the limit");
    if !metadata.is_file() || metadata.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    // It may have grown meanwhile.
    if bytes.len() as u64 > limit { Err(too_large()) } else { Ok(bytes) }
}

/// What was downloaded from a host.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HostFigures {
    pub(crate) downloads: u64,
    pub(crate) failures: u64,
    pub(crate) bytes: u64,
    pub(crate) ms: u64,
}

static HOSTS: Mutex<Option<HashMap<String, HostFigures>>> = Mutex::new(None);

/// The host of a URL as the browser would see it, or the bucket.
fn host(uri: &str) -> String {
    match url::Url::parse(uri) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => {
            url.host_str().unwrap_or_default().to_owned()
        }
        Ok(url) => format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default()),
        Err(_) => String::new(),
    }
}

fn record(uri: &str, start: Instant, bytes: Option<usize>) {
    /// Clients choose the hosts: beyond so many, they share one entry.
    const MOST: usize = 1000;
    let mut hosts = HOSTS.lock();
    let hosts = hosts.get_or_insert_default();
    let mut name = host(uri);
    if hosts.len() >= MOST && !hosts.contains_key(&name) {
        "(others)".clone_into(&mut name);
    }
    let figures = hosts.entry(name).or_default();
    figures.downloads += 1;
    figures.failures += u64::from(bytes.is_none());
    figures.bytes += bytes.unwrap_or_default() as u64;
    figures.ms += u64::try_from(start.elapsed().as_millis()).unwrap_or_default();
}

/// Downloads by host, the busiest first.
pub(crate) fn hosts() -> Vec<(String, HostFigures)> {
    let mut hosts: Vec<_> = HOSTS.lock().clone().unwrap_or_default().into_iter().collect();
    hosts.sort_by_key(|(_, figures)| std::cmp::Reverse(figures.downloads));
    hosts
}
