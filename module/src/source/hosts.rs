//! What was downloaded, by host.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

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
pub(super) fn host(uri: &str) -> String {
    match url::Url::parse(uri) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => {
            url.host_str().unwrap_or_default().to_owned()
        }
        Ok(url) => format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default()),
        Err(_) => String::new(),
    }
}

/// Counts a download; one that was refused, by its address or by that of a redirect, is no reason to
/// remember a host.
pub(super) fn record(uri: &str, is_refused: bool, time: Duration, bytes: Option<usize>) {
    /// Clients choose the hosts: beyond so many, they share one entry.
    const MOST: usize = 999;
    let mut hosts = HOSTS.lock();
    let hosts = hosts.get_or_insert_default();
    let mut name = host(uri);
    let is_known = hosts.contains_key(&name);
    if is_refused && !is_known {
        return;
    }
    if hosts.len() >= MOST && !is_known {
        "(others)".clone_into(&mut name);
    }
    let figures = hosts.entry(name).or_default();
    figures.downloads += 1;
    figures.failures += u64::from(bytes.is_none());
    figures.bytes += bytes.unwrap_or_default() as u64;
    figures.ms += u64::try_from(time.as_millis()).unwrap_or_default();
}

/// Downloads by host, the busiest first.
pub(crate) fn hosts() -> Vec<(String, HostFigures)> {
    let mut hosts: Vec<_> = HOSTS.lock().clone().unwrap_or_default().into_iter().collect();
    hosts.sort_by_key(|(_, figures)| std::cmp::Reverse(figures.downloads));
    hosts
}
