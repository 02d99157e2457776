//! Real servers for the tests: redis-server with the module, and an HTTP server for pictures.
#![expect(clippy::unwrap_used, clippy::panic, reason = "test helpers")]

mod celery;
mod clock;
mod cluster;
mod pictures;
mod secure;
mod sentinel;
mod server;
mod tls;

pub use celery::celery_message;
pub use clock::Clock;
pub use cluster::Cluster;
pub use pictures::{Asked, Pictures, blank_png, picture};
pub use secure::{Authority, Validity};
pub use sentinel::Sentinel;
pub use server::{Server, Settings, call, free_port, module};

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread::sleep,
    time::{Duration, Instant},
};

/// The absolute path of a file or directory of this repository.
pub fn path(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = root.join(name).canonicalize();
    path.unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Copies the embedded model's files; weights that somebody has had packed beside them stay there.
pub fn copy_model(to: &Path) {
    for entry in fs::read_dir(path("models/tiny")).unwrap() {
        let (name, from) = entry.map(|entry| (entry.file_name(), entry.path())).unwrap();
        if from.is_file() && !name.to_string_lossy().starts_with("florence-packed-") {
            fs::copy(&from, to.join(name)).unwrap();
        }
    }
}

/// A Python with what tests/requirements.txt lists: `FLORENCE_PYTHON`, or that of `make test`.
pub fn python() -> PathBuf {
    let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    std::env::var("FLORENCE_PYTHON").map_or_else(|_| default(), PathBuf::from)
}

/// Runs a script of tests/clients, which says in the end that all is right; or what it has said
/// instead. One that hangs is ended.
pub fn run_client<A: AsRef<OsStr>>(
    program: &Path,
    script: &str,
    args: impl IntoIterator<Item = A>,
) -> Result<(), String> {
    const SECONDS: &str = "400";
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("clients").join(script);
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", SECONDS]).arg(program).arg(script).args(args);
    let Output { status, stdout, stderr } = command.output().map_err(|error| error.to_string())?;
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let is_right = status.success() && out.contains("all right");
    is_right.then_some(()).ok_or_else(|| format!("{status}; run `make test`\n{out}{err}"))
}

/// A Python with what tests/requirements-celery-5.0.txt lists.
pub fn oldest_celery() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv-celery-5.0/bin/python")
}

/// A Python with what tests/requirements-formats.txt lists.
pub fn readers_of_formats() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv-formats/bin/python")
}

/// Polls until `condition` gives a value; panics after a minute.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_mins(1), "timed out: {what}");
        sleep(Duration::from_millis(10));
    }
}
