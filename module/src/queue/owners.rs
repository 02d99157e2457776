//! Which processes have ended in an orderly way: a job that was at work then is no suspect.
//!
//! At an orderly shutdown the server's files are already written, so the process leaves its name in
//! a small file beside them. Where that cannot be written, its jobs count as those of a crash.

use std::{fs, io::Write, path::Path, sync::LazyLock};

use crate::{job::owner, server};

/// In the server's directory, beside its data.
const FILE: &str = "florence.shutdown";
/// So many names are kept: data may be older than the last shutdown.
const MOST: usize = 32;

fn read() -> Vec<String> {
    let text = fs::read_to_string(FILE).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Whether a process has ended in an orderly way, as far as this directory tells.
pub(super) fn ended_well(owner: &str) -> bool {
    // Read once, when the first job is looked at: what is written later is of no data here.
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(read);
    NAMES.iter().any(|name| name == owner)
}

/// This process ends in an orderly way.
pub(super) fn end_well() {
    let mut names = read();
    names.push(owner().to_owned());
    let skipped = names.len().saturating_sub(MOST);
    let text = names[skipped..].join("\n") + "\n";
    if let Err(error) = write(Path::new(FILE), &text) {
        server::warn(&format!("cannot write {FILE}, jobs at work will count as crashed: {error}"));
    }
}

/// Replaces the file as a whole, durably.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("shutdown.new");
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}
