//! Celery's wire mode: lists of Celery messages are taken as jobs, and how the jobs fare is told as a
//! Celery worker would.
//!
//! ```text
//! LPUSH celery ... -> keyspace event -> intake thread: message -> job (one transaction)
//! job starts, retries, ends -> outcome: celery-task-meta-<id>, events, what follows the task
//! PUBLISH /0.celery.pidbox ... -> FLORENCE.CONTROL -> control: answers `inspect`, revokes
//! ```
//!
//! - `json`: JSON as Python has it (pure)
//! - `message`: Celery's messages, read and written (pure)
//! - `arguments`: what a task is called with, bound to its parameters (pure)
//! - `intake`: the thread that takes messages from the lists
//! - `passed`: which messages were left for others (pure)
//! - `outcome`: how a job's life looks to clients of Celery
//! - `result`: results, as `AsyncResult` reads them
//! - `canvas`: callbacks, chains and chords
//! - `events`: what Flower listens to
//! - `control`: remote control

mod arguments;
mod canvas;
mod control;
mod events;
mod intake;
mod json;
mod message;
mod outcome;
mod outgoing;
mod passed;
mod result;
mod time;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    hash::BuildHasher,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use redis_module::{Context, ContextFlags};
use serde::{Deserialize, Serialize};

pub(crate) use control::{published, run as run_control};
pub(crate) use intake::{list_changed, run};
pub(crate) use outcome::Tasks;

use crate::{
    server::{self, Db},
    settings,
};
use message::{Embed, Headers};
use outgoing::{Outgoing, Sender};

/// The field of a job that keeps its task.
const FIELD: &str = "celery";
/// Keys of jobs begin so; the task's id follows.
const JOB_PREFIX: &str = "florence:celery:";

/// The wire mode as the settings have it, and what it has come to.
struct Celery {
    /// Queues and the tasks that are taken from each.
    queues: BTreeMap<String, Vec<String>>,
    db: i32,
    result_db: i32,
    prefix: String,
    result_prefix: String,
    /// Priorities that have a list of their own, the most urgent first.
    steps: Vec<i64>,
    /// Between a queue's name and the priority, in the names of these lists.
    separator: String,
    /// The worker's name: `florence@host`.
    name: String,
    rejects_unknown: bool,
    since: Instant,
    /// Lamport's clock, by which Celery orders events.
    clock: AtomicU64,
    ended: AtomicU64,
    /// Tasks taken, by name.
    taken: Mutex<BTreeMap<String, u64>>,
    /// Other tasks that were found on the queues, by a hash of their names.
    others: Mutex<HashSet<u64>>,
    revoked: Mutex<Revoked>,
}

static CELERY: OnceLock<Celery> = OnceLock::new();

fn celery() -> Option<&'static Celery> {
    CELERY.get()
}

/// Reads the settings; without queues there is no wire mode.
pub(crate) fn start(ctx: &Context) -> Result<(), String> {
    let queues = settings::CELERY_QUEUES.get();
    if queues.0.is_empty() {
        return Ok(());
    }
    if ctx.get_flags().contains(ContextFlags::CLUSTER) {
        return Err("celery-queues: Celery cannot use a Redis Cluster".to_owned());
    }
    for (name, number) in [
        ("celery-db", settings::CELERY_DB.get()),
        ("celery-result-db", settings::CELERY_RESULT_DB.get()),
    ] {
        if !i32::try_from(number).is_ok_and(|number| server::has_db(ctx, number)) {
            return Err(format!("{name}: the server has no database {number}"));
        }
    }
    let celery = Celery {
        queues: queues.0.clone(),
        db: i32::try_from(settings::CELERY_DB.get()).unwrap_or_default(),
        result_db: i32::try_from(settings::CELERY_RESULT_DB.get()).unwrap_or_default(),
        prefix: (*settings::CELERY_PREFIX.get()).clone(),
        steps: settings::CELERY_PRIORITY_STEPS.get().0.clone(),
        separator: (*settings::CELERY_SEPARATOR.get()).clone(),
        result_prefix: result_prefix(&settings::CELERY_RESULT_PREFIX.get()),
        name: settings::CELERY_NAME.get().replace("%h", &host()),
        rejects_unknown: settings::CELERY_REJECT_UNKNOWN.get(),
        since: Instant::now(),
        clock: AtomicU64::new(1),
        ended: AtomicU64::new(0),
        taken: Mutex::default(),
        others: Mutex::default(),
        revoked: Mutex::default(),
    };
    let channel = control::channel(&celery);
    CELERY.get_or_init(|| celery);
    server::watch_lists(ctx)?;
    server::divert_publish(ctx, channel)
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned())
}

/// What Celery puts before the keys of results where that is its `global_keyprefix`.
fn result_prefix(given: &str) -> String {
    let separator =
        if given.is_empty() || given.ends_with([':', '_', '-', '.']) { "" } else { "_" };
    format!("{given}{separator}")
}

impl Celery {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether a task of this name was not found before. The first thousand are told apart.
    fn is_new_other(&self, name: &str) -> bool {
        const MOST: usize = 1000;
        let mut others = self.others.lock();
        let name = others.hasher().hash_one(name);
        others.len() < MOST && others.insert(name)
    }

    /// The list of a queue for messages of a priority.
    fn list(&self, queue: &str, priority: i64) -> String {
        let step = self.steps.iter().rev().find(|step| **step <= priority);
        match step {
            None | Some(0) => format!("{}{queue}", self.prefix),
            Some(step) => format!("{}{queue}{}{step}", self.prefix, self.separator),
        }
    }

    /// The broker's database.
    fn broker_db(&self) -> Db {
        server::numbered(self.db)
    }

    /// The result backend's database.
    fn backend_db(&self) -> Db {
        server::numbered(self.result_db)
    }

    /// Sends a message to its queue.
    fn send(&self, ctx: &Context, message: &Outgoing) -> Result<(), String> {
        let list = self.list(&message.queue, message.priority);
        server::in_db(ctx, self.broker_db(), || {
            server::call(ctx, "LPUSH", &[list.as_bytes(), message.json.as_bytes()])
        })
    }
}

/// A job's task, as its hash keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Task {
    queue: String,
    priority: i64,
    headers: Headers,
    embed: Embed,
}

impl Task {
    fn id(&self) -> &str {
        &self.headers.id
    }

    /// The key of the task's job.
    fn key(&self) -> String {
        format!("{JOB_PREFIX}{}", self.id())
    }

    fn sender(&self) -> Sender<'_> {
        Sender { headers: &self.headers, queue: &self.queue }
    }
}

/// Ids of tasks that are not to be run, the oldest forgotten first.
#[derive(Default)]
struct Revoked {
    ids: HashSet<String>,
    order: VecDeque<String>,
    /// Of all ids.
    bytes: usize,
}

impl Revoked {
    /// As many as Celery's workers remember.
    const MOST: usize = 50_000;

    /// Bytes of all ids; Celery's have 36 each, but clients may choose others.
    const MOST_BYTES: usize = 1 << 23;

    fn insert(&mut self, id: &str) {
        if !self.ids.insert(id.to_owned()) {
            return;
        }
        self.order.push_back(id.to_owned());
        self.bytes += id.len();
        while self.order.len() > Self::MOST || self.bytes > Self::MOST_BYTES {
            let Some(oldest) = self.order.pop_front() else { return };
            self.bytes -= oldest.len();
            self.ids.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_revoked_ids_are_forgotten() {
        let mut revoked = Revoked::default();
        for id in 0..=Revoked::MOST {
            revoked.insert(&id.to_string());
            revoked.insert("1");
        }
        assert!(!revoked.ids.contains("0"));
        assert!(revoked.ids.contains("1") && revoked.ids.len() == Revoked::MOST);
    }

    #[test]
    fn long_ids_are_remembered_as_far_as_there_is_room() {
        let mut revoked = Revoked::default();
        let id = |n: usize| format!("{n}{}", "x".repeat(Revoked::MOST_BYTES / 4));
        (0..4).for_each(|n| revoked.insert(&id(n)));
        assert!(!revoked.ids.contains(&id(0)) && revoked.ids.contains(&id(3)));
        assert!(revoked.bytes <= Revoked::MOST_BYTES && revoked.order.len() == 3);
        revoked.insert(&"y".repeat(Revoked::MOST_BYTES + 1));
        assert!(revoked.ids.is_empty() && revoked.bytes == 0);
    }
}
