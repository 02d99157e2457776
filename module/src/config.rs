//! Settings, as `CONFIG SET florence.*` and `loadmodule` arguments know them.
//!
//! Names, defaults and ranges stand once, in the table of `redis_module!`; here are the values.

use std::{
    path::PathBuf,
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use florence_engine::Coordinates;
use redis_module::RedisString;

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])* pub(crate) static $name: AtomicI64 = AtomicI64::new(0);)*
    };
}

numbers! {
    /// Compute threads; 0 leaves one core to Redis.
    THREADS;
    /// Niceness of the compute threads.
    NICE;
    /// Threads that fetch and decode pictures.
    PREPARE_THREADS;
    /// Most jobs that are decoded together.
    MAX_BATCH;
    /// Most jobs that may wait.
    MAX_QUEUE;
    /// Largest picture in bytes.
    MAX_IMAGE_BYTES;
    /// Largest picture in pixels.
    MAX_IMAGE_PIXELS;
    /// Time for one download.
    FETCH_TIMEOUT_MS;
    /// Pause before the first retry; doubles with every further one.
    RETRY_DELAY_MS;
    /// TIMEOUT of a job that gives none.
    DEFAULT_TIMEOUT_MS;
    /// RETRIES of a job that gives none.
    DEFAULT_RETRIES;
    /// TTL of a job that gives none.
    DEFAULT_TTL;
    /// Budget for answers that may be asked for again; 0 for none.
    RESULT_CACHE_BYTES;
    /// Budget for finished jobs; 0 leaves them to their TTL.
    RETAIN_BYTES;
    /// Entries that the stream of finished jobs keeps, about.
    STREAM_LENGTH;
    /// Database of Celery's queues.
    CELERY_DB;
    /// Database of Celery's results.
    CELERY_RESULT_DB;
    /// Seconds that a result of Celery's is kept; 0 for ever.
    CELERY_RESULT_EXPIRES;
    /// Budget for encoded pictures that may be asked about again; 0 for none.
    FEATURE_CACHE_BYTES;
}

/// Directory of the checkpoint; empty for the embedded one.
pub(crate) static MODEL: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Numbers that the model computes in: `f32`, `bf16` or `auto`.
pub(crate) static PRECISION: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// How coordinates are given: `float` or `int`.
pub(crate) static COORDINATES: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// CPUs that the compute threads are pinned to: `0-3 8`; empty for none.
pub(crate) static CPUS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Networks besides the public ones that pictures may come from, separated by spaces.
pub(crate) static ALLOW_NETWORKS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Networks that pictures may not come from, though public.
pub(crate) static DENY_NETWORKS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// The only hosts that pictures may come from, if any are named.
pub(crate) static ALLOW_HOSTS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Hosts that pictures may not come from.
pub(crate) static DENY_HOSTS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Formats of pictures that are decoded.
pub(crate) static IMAGE_FORMATS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Buckets that are read with the server's credentials.
pub(crate) static BUCKETS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Directories that pictures may be read from, separated by spaces; empty for none.
pub(crate) static FILE_ROOTS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Celery's queues and the tasks that are taken from them: `queue:task queue:task`.
pub(crate) static CELERY_QUEUES: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// What the keys and channels of Celery's broker begin with.
pub(crate) static CELERY_PREFIX: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Priorities that have a list of their own: `0 3 6 9`.
pub(crate) static CELERY_PRIORITY_STEPS: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// Between a queue's name and a priority, in the name of a list.
pub(crate) static CELERY_SEPARATOR: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// What the keys of Celery's results begin with.
pub(crate) static CELERY_RESULT_PREFIX: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);
/// The worker's name; `%h` is the host's.
pub(crate) static CELERY_NAME: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);

/// Whether a task's result says STARTED while it is worked on.
pub(crate) static CELERY_TRACK_STARTED: AtomicBool = AtomicBool::new(false);
/// Whether Celery's events are published.
pub(crate) static CELERY_EVENTS: AtomicBool = AtomicBool::new(true);
/// Whether messages for other tasks are answered with an error; they are left alone otherwise.
pub(crate) static CELERY_REJECT_UNKNOWN: AtomicBool = AtomicBool::new(false);
/// Whether packed weights are kept beside the checkpoint.
pub(crate) static KEEP_PACKED: AtomicBool = AtomicBool::new(true);
/// Whether jobs that end are published.
pub(crate) static PUBLISH: AtomicBool = AtomicBool::new(true);
/// The stream that jobs are added to when they end; empty for none.
pub(crate) static STREAM: LazyLock<Mutex<String>> = LazyLock::new(Mutex::default);

const NAMES: [&str; 42] = [
    "threads",
    "nice",
    "cpus",
    "prepare-threads",
    "max-batch",
    "max-queue",
    "max-image-bytes",
    "max-image-pixels",
    "fetch-timeout-ms",
    "retry-delay-ms",
    "default-timeout-ms",
    "default-retries",
    "default-ttl",
    "result-cache-bytes",
    "feature-cache-bytes",
    "retain-bytes",
    "stream",
    "stream-length",
    "publish",
    "precision",
    "coordinates",
    "allow-networks",
    "deny-networks",
    "allow-hosts",
    "deny-hosts",
    "buckets",
    "image-formats",
    "model",
    "keep-packed",
    "file-roots",
    "celery-queues",
    "celery-db",
    "celery-prefix",
    "celery-priority-steps",
    "celery-separator",
    "celery-result-db",
    "celery-result-prefix",
    "celery-result-expires",
    "celery-name",
    "celery-track-started",
    "celery-events",
    "celery-reject-unknown",
];

/// A setting as an unsigned number; the table's ranges have no negative ones.
pub(crate) fn number(setting: &AtomicI64) -> u64 {
    u64::try_from(setting.load(Ordering::Relaxed)).unwrap_or_default()
}

/// As [`number`], for sizes.
pub(crate) fn size(setting: &AtomicI64) -> usize {
    usize::try_from(number(setting)).unwrap_or(usize::MAX)
}

/// As [`number`], for settings in milliseconds.
pub(crate) fn milliseconds(setting: &AtomicI64) -> Duration {
    Duration::from_millis(number(setting))
}

/// The value of a yes-or-no setting.
pub(crate) fn flag(setting: &AtomicBool) -> bool {
    setting.load(Ordering::Relaxed)
}

/// The value of a text setting.
pub(crate) fn text(setting: &Mutex<String>) -> String {
    setting.lock().map(|text| text.clone()).unwrap_or_default()
}

/// The directories that pictures may be read from.
pub(crate) fn file_roots() -> Vec<PathBuf> {
    text(&FILE_ROOTS).split_whitespace().map(PathBuf::from).collect()
}

/// How coordinates are given.
pub(crate) fn coordinates() -> Result<Coordinates, String> {
    match text(&COORDINATES).as_str() {
        "float" => Ok(Coordinates::Float),
        "int" => Ok(Coordinates::Integer),
        other => Err(format!("coordinates: '{other}' is neither float nor int")),
    }
}

/// The CPUs of the setting, in its order.
pub(crate) fn cpus() -> Result<Vec<usize>, String> {
    /// As many as the kernel's set has room for.
    const MOST: usize = 1024;
    let mut cpus = Vec::new();
    for part in text(&CPUS).split([' ', ',']).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) if first <= last && last < MOST => cpus.extend(first..=last),
            _ => return Err(format!("cpus: '{part}' is neither a CPU nor a range of them")),
        }
    }
    Ok(cpus)
}

/// The crate ignores unknown `loadmodule` arguments; a typing error must not pass silently.
pub(crate) fn check_arguments(args: &[RedisString]) -> Result<(), String> {
    for pair in args.chunks(2) {
        let name = pair[0].to_string_lossy();
        if !NAMES.contains(&name.as_str()) {
            return Err(format!("unknown module argument '{name}'"));
        }
        if pair.len() == 1 {
            return Err(format!("module argument '{name}' has no value"));
        }
    }
    Ok(())
}
