//! What downloads leave where a file should be.

/// Something else than the file that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StandIn {
    /// What a repository holds in place of a large file.
    #[error(
        "a Git LFS pointer and not the file itself, which `git lfs pull` or `florence pull` fetches"
    )]
    LfsPointer,
    /// An error, or a network that wants one to sign in.
    #[error("a web page and not the file itself, perhaps of a proxy or for signing in")]
    WebPage,
}

impl StandIn {
    /// Bytes of a file's start that are enough to tell.
    pub const START: usize = 256;

    /// Tells by a file's start.
    pub fn of(start: &[u8]) -> Option<Self> {
        let start = &start[..start.len().min(Self::START)];
        let text = start.trim_ascii_start();
        let begins = |tag: &str| {
            text.get(..tag.len()).is_some_and(|found| found.eq_ignore_ascii_case(tag.as_bytes()))
        };
        if start.starts_with(b"version https://git-lfs.github.com/spec/") {
            Some(Self::LfsPointer)
        } else if begins("<!doctype html") || begins("<html") {
            Some(Self::WebPage)
        } else {
            None
        }
    }
}
