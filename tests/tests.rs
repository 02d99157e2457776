//! Integration tests against real redis-server processes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]
#![expect(clippy::print_stdout, reason = "figures of `make chaos`, `fuzz` and `soak`")]

#[path = "suite/addresses.rs"]
mod addresses; // addresses as clients write them, and what is wrong with where they lead
#[path = "suite/bystanders.rs"]
mod bystanders; // keys that are not ours, jobs that others write, crowded databases
#[path = "suite/celery.rs"]
mod celery; // Celery's clients and Flower
#[path = "suite/celery_messages.rs"]
mod celery_messages; // messages of other forms, and what is told of those that are not taken
#[path = "suite/celery_refusals.rs"]
mod celery_refusals; // messages while the server refuses to write
#[path = "suite/chains.rs"]
mod chains; // questions that follow from answers
#[path = "suite/chaos.rs"]
mod chaos; // servers that are killed every few seconds
#[path = "suite/claims/mod.rs"]
mod claims; // keys that change under a run; roles that change, orderly ends, writes that are refused
#[path = "suite/clients.rs"]
mod clients; // redis-py and node-redis, as their users would
#[path = "suite/clock.rs"]
mod clock; // a wall clock that is set back
#[path = "suite/cluster.rs"]
mod cluster; // three masters with replicas
#[path = "suite/commands.rs"]
mod commands; // what each command answers, and refuses
#[path = "suite/downloads.rs"]
mod downloads; // how many at a time, from whom, and who waits for them
#[path = "suite/durability.rs"]
mod durability; // crashes, replicas, migration, flushes: no job is lost
#[path = "suite/ends.rs"]
mod ends; // what is logged and counted when jobs end, downloads that are broken off
#[path = "suite/engines.rs"]
mod engines; // several engines, devices that are not there
#[path = "suite/forged.rs"]
mod forged; // hashes that claim to be jobs
#[path = "suite/fuzz.rs"]
mod fuzz; // random commands and pictures
#[path = "suite/history.rs"]
mod history; // jobs that have ended, as they are listed
#[path = "suite/jobs.rs"]
mod jobs; // what a job can be asked for, and who hears of its end
#[path = "suite/limits.rs"]
mod limits; // how much one command may ask for
#[path = "suite/load.rs"]
mod load; // many jobs, many waiters
#[path = "suite/memory.rs"]
mod memory; // what pictures take while they are read
#[path = "suite/metrics.rs"]
mod metrics; // latencies, ends and figures, and the page that documents them
#[path = "suite/mixed/mod.rs"]
mod mixed; // everything at once, at random: keys that change, servers that die and change roles
#[path = "suite/models.rs"]
mod models; // several models in one server, loaded and exchanged while it runs
#[path = "suite/module.rs"]
mod module; // loading, settings, documentation, models that cannot be loaded
#[path = "suite/nbest.rs"]
mod nbest; // the best beams and their scores
#[path = "suite/packaging.rs"]
mod packaging; // the container's entry point, `make install` and `make run`, versions
#[path = "suite/prompts.rs"]
mod prompts; // blanks around tasks, other texts than the fifteen tasks
#[path = "suite/sampling.rs"]
mod sampling; // answers that are drawn by chance, options of the search
#[path = "suite/secrets.rs"]
mod secrets; // what nobody who watches may see, and what everybody does
#[path = "suite/settings.rs"]
mod settings; // settings that are refused, and how that is said
#[path = "suite/sources.rs"]
mod sources; // where pictures come from, and what is wrong with them
#[path = "suite/tenants.rs"]
mod tenants; // several users of one server
#[path = "suite/thumbnails.rs"]
mod thumbnails; // small copies of the pictures
#[path = "suite/tokens.rs"]
mod tokens; // texts in streams while they are generated
