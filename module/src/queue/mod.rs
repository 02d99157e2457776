//! Unfinished jobs, their order, and who works on them: a cache of the keyspace.
//!
//! - `scheduler`: which job is next (pure)
//! - `lease`: the right to work on a job
//! - `line`: workers that wait for a job
//! - `changes`: keys that may have become jobs without a command of ours
//! - `search`: jobs of which no event told
//! - `sync`: keyspace and server events keep the queue in step with the keys
//! - `owners`: which processes ended in an orderly way
//! - `retained`: the budget for ended jobs
//! - `ended`: the newest of them, which JOBS can list
//! - `waiters`: clients blocked in FLORENCE.WAIT

pub(crate) mod changes;
pub(crate) mod ended;
mod lease;
mod line;
mod owners;
pub(crate) mod retained;
mod scheduler;
pub(crate) mod search;
pub(crate) mod sync;
pub(crate) mod waiters;

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use redis_module::RedisError;

use crate::{
    figures,
    job::{Job, JobKey, KeyRef, State, Token, view::Progress},
    server::{self, Db, reply},
    settings,
};

pub(crate) use lease::{Lease, Phase, Place};
use line::Line;
pub(crate) use scheduler::{Kind, Limits};
use scheduler::{Next, Scheduler, Standing};

/// How often workers look again without being told to.
const LOOK: Duration = Duration::from_millis(250);

pub(crate) struct Queue {
    /// Never held across a call into the server: keyspace events take it too.
    scheduler: Mutex<Scheduler>,
    /// Those who wait for a job, by what they do.
    lines: [Line; 2],
    /// How long the engine takes for a job, lately; in microseconds, 0 before the first answer.
    pace: AtomicU64,
    is_shut: AtomicBool,
    /// Whether there are no jobs; who only asks that takes no lock.
    is_empty: AtomicBool,
}

static QUEUE: LazyLock<Arc<Queue>> = LazyLock::new(|| Arc::new(Queue::new()));

/// The queue of this process.
pub(crate) fn queue() -> &'static Arc<Queue> {
    &QUEUE
}

impl Queue {
    fn new() -> Self {
        Self {
            scheduler: Mutex::default(),
            lines: Default::default(),
            pace: AtomicU64::new(0),
            is_shut: AtomicBool::new(false),
            is_empty: AtomicBool::new(true),
        }
    }

    /// Changes the scheduler, and wakes a worker for what there is to do now.
    fn change<T>(&self, change: impl FnOnce(&mut Scheduler) -> T) -> T {
        let mut scheduler = self.scheduler.lock();
        let result = change(&mut scheduler);
        self.is_empty.store(scheduler.is_empty(), Ordering::Relaxed);
        for kind in Kind::ALL {
            self.lines[kind as usize].wake_if_wanted(&scheduler, kind);
        }
        result
    }

    /// Whether a key holds an unfinished job.
    fn knows(&self, key: KeyRef<'_>) -> bool {
        !self.is_empty.load(Ordering::Relaxed) && self.scheduler.lock().knows(key)
    }

    /// Waits until there is a job for a worker of this kind; `None` at shutdown. Nothing is taken
    /// while `limits` has none, and no job of a model that `is_open` refuses; an empty name is that of
    /// whichever is the default. `taken` hears of the model before anybody else asks.
    pub(crate) fn next(
        self: &Arc<Self>,
        kind: Kind,
        limits: impl Fn() -> Option<Limits>,
        (is_open, taken): (impl Fn(&str) -> bool, impl Fn(&str)),
    ) -> Option<Lease> {
        let line = &self.lines[kind as usize];
        let mut scheduler = self.scheduler.lock();
        while !self.is_shut() {
            let now = Instant::now();
            let next = match limits() {
                Some(limits) => scheduler.next(now, kind, (limits, &is_open), Token::new),
                None => Next::Idle,
            };
            let until = match next {
                Next::Run(key, claim) => {
                    taken(&claim.model);
                    line.wake_next(&scheduler, kind);
                    return Some(Lease::new(Arc::clone(self), key, claim));
                }
                Next::WaitUntil(until) => until.min(now + LOOK),
                Next::Idle => now + LOOK,
            };
            line.wait(&mut scheduler, until);
        }
        None
    }

    /// Lets workers look again that wait in [`Self::next`].
    pub(crate) fn wake(&self) {
        self.lines.iter().for_each(Line::wake_all);
    }

    /// Lets one worker of a kind look again.
    pub(crate) fn wake_one(&self, kind: Kind) {
        self.lines[kind as usize].wake_one(&self.scheduler.lock());
    }

    /// Nothing is taken any more: the server ends.
    pub(crate) fn shut(&self) {
        self.is_shut.store(true, Ordering::Relaxed);
        self.wake();
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.is_shut.load(Ordering::Relaxed)
    }

    /// Some of the jobs that have waited too long; they stay until their keys say that they ended.
    pub(crate) fn expired(&self) -> Vec<JobKey> {
        self.scheduler.lock().expired(Instant::now())
    }

    /// Some of the jobs whose hashes tell of a claim that nobody holds, and whether a process died
    /// with it; they stay until their keys say otherwise.
    pub(crate) fn unclaimed(&self) -> Vec<(JobKey, bool)> {
        self.scheduler.lock().unclaimed()
    }

    /// Whether there are jobs of either kind.
    pub(crate) fn has_overdue(&self) -> bool {
        self.scheduler.lock().has_overdue(Instant::now())
    }

    /// Puts jobs back that count as worked on although their leases are gone; tells which.
    pub(crate) fn recover(&self) -> Vec<JobKey> {
        let recovered = self.scheduler.lock().recover();
        if !recovered.is_empty() {
            self.wake();
        }
        recovered
    }

    /// Tells of `jobs` answers that took so long together; the newest count for a tenth.
    pub(crate) fn record_pace(&self, time: Duration, jobs: usize) {
        let sample = u64::try_from(time.as_micros()).unwrap_or(u64::MAX) / jobs.max(1) as u64;
        let known = self.pace.load(Ordering::Relaxed);
        let pace = if known == 0 { sample } else { known - known / 10 + sample / 10 };
        self.pace.store(pace.max(1), Ordering::Relaxed);
    }

    /// Jobs that wait, and jobs that are worked on.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let scheduler = self.scheduler.lock();
        (scheduler.waiting(), scheduler.active())
    }

    /// Jobs that wait for a moment.
    pub(crate) fn delayed(&self) -> usize {
        self.scheduler.lock().delayed()
    }

    /// How many more jobs may wait for their turn.
    pub(crate) fn room(&self) -> usize {
        let scheduler = self.scheduler.lock();
        settings::MAX_QUEUE.size().saturating_sub(scheduler.waiting() - scheduler.deferred())
    }

    /// Refuses `jobs`, of which so many are this user's, if there is no room for them.
    pub(crate) fn check_room(
        &self,
        user: &str,
        of_user: usize,
        jobs: usize,
        is_delayed: bool,
    ) -> Result<(), RedisError> {
        let scheduler = self.scheduler.lock();
        let deferred = scheduler.deferred();
        let share = settings::MAX_QUEUE_PER_USER.size();
        let full = if is_delayed && deferred + jobs > settings::MAX_DELAYED.size() {
            "too many delayed jobs"
        } else if !is_delayed && scheduler.waiting() - deferred + jobs > settings::MAX_QUEUE.size()
        {
            "queue is full"
        } else if share > 0 && scheduler.waiting_of(user) + of_user > share {
            "too many jobs of this user wait"
        } else {
            return Ok(());
        };
        figures::REFUSED.add(1);
        Err(reply::error("BUSY", format!("{full}, retry after 1000 ms")))
    }

    /// Up to `most` keys of unfinished jobs of a database that `is_meant`, of those that may be in
    /// `state`: the ones at work first, then in the order of their turn.
    pub(crate) fn keys(
        &self,
        db: Db,
        state: Option<State>,
        most: usize,
        is_meant: impl Fn(&JobKey) -> bool,
    ) -> Vec<JobKey> {
        /// So many jobs are looked at: the main thread asks.
        const LOOKED: usize = 50_000;
        let scheduler = self.scheduler.lock();
        let found = scheduler.keys(state).take(LOOKED).filter(|key| key.db == db && is_meant(key));
        found.take(most).cloned().collect()
    }

    /// Where a job stands.
    pub(crate) fn state(&self, key: KeyRef<'_>, job: &Job) -> State {
        self.progress(key, job).state
    }

    /// What is known of a job besides its hash.
    pub(crate) fn progress(&self, key: KeyRef<'_>, job: &Job) -> Progress {
        let mut progress = Progress::at(job.state);
        if job.state.is_final() {
            return progress;
        }
        let scheduler = self.scheduler.lock();
        // Elsewhere its master works on it.
        if job.state.is_claimed() && scheduler.is_enabled() {
            progress.state = State::Queued;
        }
        match scheduler.standing(key) {
            Some(Standing::Waiting { ahead, active }) => {
                let ahead = i64::try_from(ahead).unwrap_or(i64::MAX);
                let jobs = ahead.saturating_add(1).saturating_add_unsigned(active as u64);
                let pace = i64::try_from(self.pace.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
                progress.position = Some(ahead);
                let is_known = pace > 0 && !settings::PAUSED.get();
                progress.eta_ms = is_known.then(|| jobs.saturating_mul(pace) / 1000);
            }
            Some(Standing::Active(claim)) => {
                progress.state = job.state;
                progress.phase = Some(claim.phase());
                progress.tokens = Some(claim.tokens().into());
            }
            Some(Standing::Delayed) | None => {}
        }
        progress
    }
}

/// Puts back what was lost, logs it and counts it.
pub(crate) fn watch_leases() {
    for key in queue().recover() {
        figures::LEASES_RECOVERED.add(1);
        let shown = server::printable(&key.name);
        server::warn(&format!("nobody worked on job '{shown}', it is queued again"));
    }
}
