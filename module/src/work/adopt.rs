//! Jobs that were there before the module: MODULE LOAD at run time tells of no key, so they are
//! looked for, slice by slice, beside all other work.

use parking_lot::Mutex;
use redis_module::Context;

use crate::{
    job::JobKey,
    queue::{queue, sync},
    server::{Scan, bytes, with_server},
};

/// Databases whose keys were there before the module.
static UNSEEN: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Finds out which databases have keys already; while the module loads.
pub(crate) fn look(ctx: &Context) {
    let info = bytes(ctx, "INFO", &[b"keyspace"]).unwrap_or_default();
    *UNSEEN.lock() = databases(&String::from_utf8_lossy(&info));
}

/// The databases of INFO's section `keyspace`: `db0:keys=1,expires=0`.
fn databases(info: &str) -> Vec<i32> {
    let line = |line: &str| line.strip_prefix("db")?.split_once(':')?.0.parse().ok();
    info.lines().filter_map(line).collect()
}

/// Starts the search, if there is anything to look at.
pub(super) fn start() {
    if !UNSEEN.lock().is_empty() {
        super::spawn("fl-adopt", run);
    }
}

fn run() {
    /// Keys that are looked at in one lock section.
    const SLICE: usize = 100;
    let databases = UNSEEN.lock().clone();
    for db in databases {
        let mut scan = with_server(|_| Scan::new(db));
        loop {
            let is_over = with_server(|ctx| {
                let Some(names) = scan.next(ctx, SLICE) else { return true };
                for name in names {
                    sync::refresh(ctx, &JobKey { db, name: name.into() });
                }
                false
            });
            if is_over || queue().is_shut() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_are_those_that_have_keys() {
        let info = "# Keyspace\r\ndb0:keys=2,expires=0,avg_ttl=0\r\ndb11:keys=1,expires=0\r\n";
        assert_eq!(databases(info), [0, 11]);
        assert!(databases("# Keyspace\r\n").is_empty());
    }
}
