//! Integration tests against real redis-server processes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]
#![expect(clippy::print_stdout, reason = "figures of `make chaos`, `fuzz` and `soak`")]

#[path = "suite/celery.rs"]
mod celery; // Celery's clients and Flower
#[path = "suite/chaos.rs"]
mod chaos; // servers that are killed every few seconds
#[path = "suite/clients.rs"]
mod clients; // redis-py and node-redis, as their users would
#[path = "suite/cluster.rs"]
mod cluster; // three masters with replicas
#[path = "suite/commands.rs"]
mod commands; // what each command answers, and refuses
#[path = "suite/durability.rs"]
mod durability; // crashes, replicas, migration, flushes: no job is lost
#[path = "suite/fuzz.rs"]
mod fuzz; // random commands and pictures
#[path = "suite/jobs.rs"]
mod jobs; // what a job can be asked for, and who hears of its end
#[path = "suite/load.rs"]
mod load; // many jobs, many waiters
#[path = "suite/module.rs"]
mod module; // loading, settings, documentation, models that cannot be loaded
#[path = "suite/sources.rs"]
mod sources; // where pictures come from, and what is wrong with them
