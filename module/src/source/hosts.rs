//! What was downloaded, by host.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use super::address;

/// What was downloaded from a host.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HostFigures {
    pub(crate) downloads: u64,
    pub(crate) failures: u64,
    pub(crate) bytes: u64,
    pub(crate) ms: u64,
    /// Counts on with every download: the lowest was longest without one.
    turn: u64,
}

impl HostFigures {
    fn add(&mut self, other: Self) {
        self.downloads += other.downloads;
        self.failures += other.failures;
        self.bytes += other.bytes;
        self.ms += other.ms;
        self.turn = self.turn.max(other.turn);
    }
}

static HOSTS: Mutex<Option<HashMap<String, HostFigures>>> = Mutex::new(None);

/// Counts a download.
pub(super) fn record(uri: &str, time: Duration, bytes: Option<usize>) {
    /// Clients choose the hosts: of so many, the one longest without a download makes room.
    const MOST: usize = 998;
    /// The entry of those that made room.
    const OTHERS: &str = "(others)";
    static TURNS: AtomicU64 = AtomicU64::new(0);
    let mut hosts = HOSTS.lock();
    let hosts = hosts.get_or_insert_default();
    let name = address::host(uri);
    if hosts.len() > MOST && !hosts.contains_key(&name) {
        let named = hosts.iter().filter(|(name, _)| *name != OTHERS);
        let oldest = named.min_by_key(|(_, figures)| figures.turn).map(|(name, _)| name.clone());
        if let Some(figures) = oldest.and_then(|oldest| hosts.remove(&oldest)) {
            hosts.entry(OTHERS.to_owned()).or_default().add(figures);
        }
    }
    hosts.entry(name).or_default().add(HostFigures {
        downloads: 1,
        failures: bytes.is_none().into(),
        bytes: bytes.unwrap_or_default() as u64,
        ms: u64::try_from(time.as_millis()).unwrap_or_default(),
        turn: TURNS.fetch_add(1, Ordering::Relaxed),
    });
}

/// Downloads by host, the busiest first.
pub(crate) fn hosts() -> Vec<(String, HostFigures)> {
    let mut hosts: Vec<_> = HOSTS.lock().clone().unwrap_or_default().into_iter().collect();
    hosts.sort_by_key(|(_, figures)| std::cmp::Reverse(figures.downloads));
    hosts
}
