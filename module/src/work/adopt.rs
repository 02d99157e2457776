//! The thread that looks for jobs of which no event told, beside all other work.

use std::{
    thread,
    time::{Duration, Instant},
};

use redis_module::Context;

use crate::{
    queue::{
        changes, queue,
        search::{self, Haste, Search},
        sync,
    },
    server::{self, with_server},
};

/// Wants a search if there are keys already; while the module loads.
pub(crate) fn look(ctx: &Context) {
    let mut has_keys = false;
    server::in_each_db(ctx, |_| has_keys |= server::has_keys(ctx));
    if has_keys {
        search::want(Haste::Now);
    }
}

pub(super) fn run() {
    loop {
        let haste = search::next();
        let load = sync::loads();
        let mut search = with_server(Search::new);
        loop {
            let mut took = Duration::ZERO;
            let has_more = with_server(|ctx| {
                let start = Instant::now();
                let has_more = search.step(ctx);
                took = start.elapsed();
                has_more
            });
            if !has_more || queue().is_shut() {
                break;
            }
            // The server's lock is free so many times as long as it is held.
            let share = if haste == Haste::Later && changes::are_many() { 80 } else { 2 };
            thread::sleep(took * share);
        }
        if haste == Haste::Now {
            sync::adopted(load);
        }
    }
}
