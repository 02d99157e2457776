//! Real servers for the tests: redis-server with the module, and an HTTP server for pictures.
#![expect(clippy::unwrap_used, clippy::panic, reason = "test helpers")]

mod cluster;
mod pictures;
mod server;

pub use cluster::Cluster;
pub use pictures::{Pictures, picture};
pub use server::{Server, Settings};

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

/// Polls until `condition` gives a value; panics after half a minute.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "timed out: {what}");
        sleep(Duration::from_millis(10));
    }
}
