//! Which job is next. Pure: it is told what the keys say and what the time is.
//!
//! It is a cache of the keyspace: [`Scheduler::observe`] is called for every change of a job's key,
//! and it never disagrees with the keys for longer than one event.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// A job's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct JobKey {
    pub(crate) db: i32,
    pub(crate) name: Arc<[u8]>,
}

/// What a job's key says, as far as the scheduler cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    /// There is no unfinished job under the key.
    Nothing,
    /// The job waits, until a moment if one is given.
    Waiting { rank: i64, until: Option<Instant> },
    /// The job is being worked on by this process.
    Active { rank: i64 },
}

/// Tells those who work on a job that it is to stop.
#[derive(Debug, Default)]
pub(crate) struct Control(AtomicBool);

impl Control {
    pub(crate) fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The next thing for a worker to do.
#[derive(Debug)]
pub(crate) enum Next {
    Run(JobKey, Arc<Control>),
    WaitUntil(Instant),
    Idle,
}

/// Rank, then order of arrival.
type Place = (i64, u64);

#[derive(Debug)]
enum Slot {
    Ready(Place),
    Delayed(Instant, Place),
    Active(Arc<Control>),
}

#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    jobs: HashMap<JobKey, Slot>,
    ready: BTreeMap<Place, JobKey>,
    delayed: BTreeMap<(Instant, Place), JobKey>,
    arrivals: u64,
    active: usize,
    /// Only a master whose data set is loaded runs jobs.
    is_enabled: bool,
}

impl Scheduler {
    /// Takes over what a key says now.
    pub(crate) fn observe(&mut self, key: &JobKey, seen: &Seen) {
        match (seen, self.jobs.get(key)) {
            (Seen::Active { .. }, Some(Slot::Active(_))) | (Seen::Nothing, None) => {}
            (Seen::Waiting { rank, until: None }, Some(Slot::Ready((known, _))))
                if rank == known => {}
            (Seen::Nothing, Some(_)) => self.remove(key),
            (Seen::Waiting { rank, until }, _) => {
                self.remove(key);
                self.insert(key, *rank, *until);
            }
            // It claims to run here, but nobody works on it: a copy, a renamed or a restored job.
            (Seen::Active { rank }, _) => {
                self.remove(key);
                self.insert(key, *rank, None);
            }
        }
    }

    /// The job to work on at `now`; it counts as active until its key says otherwise.
    pub(crate) fn next(&mut self, now: Instant) -> Next {
        if !self.is_enabled {
            return Next::Idle;
        }
        while let Some((&(at, place), _)) = self.delayed.first_key_value() {
            if at > now {
                break;
            }
            if let Some(key) = self.delayed.remove(&(at, place)) {
                self.jobs.insert(key.clone(), Slot::Ready(place));
                self.ready.insert(place, key);
            }
        }
        if let Some((_, key)) = self.ready.pop_first() {
            let control = Arc::new(Control::default());
            self.jobs.insert(key.clone(), Slot::Active(Arc::clone(&control)));
            self.active += 1;
            return Next::Run(key, control);
        }
        match self.delayed.first_key_value() {
            Some(((at, _), _)) => Next::WaitUntil(*at),
            None => Next::Idle,
        }
    }

    /// Gives a job back that could not be claimed just now.
    pub(crate) fn put_back(&mut self, key: &JobKey, until: Instant) {
        if matches!(self.jobs.get(key), Some(Slot::Active(_))) {
            self.remove(key);
            self.insert(key, i64::MIN, Some(until));
        }
    }

    /// Forgets a job that turned out not to be there, unless its key has a new one already.
    pub(crate) fn release(&mut self, key: &JobKey, control: &Arc<Control>) {
        let is_same = |slot: &Slot| matches!(slot, Slot::Active(own) if Arc::ptr_eq(own, control));
        if self.jobs.get(key).is_some_and(is_same) {
            self.remove(key);
        }
    }

    fn insert(&mut self, key: &JobKey, rank: i64, until: Option<Instant>) {
        self.arrivals += 1;
        let place = (rank, self.arrivals);
        let slot = if let Some(until) = until {
            self.delayed.insert((until, place), key.clone());
            Slot::Delayed(until, place)
        } else {
            self.ready.insert(place, key.clone());
            Slot::Ready(place)
        };
        self.jobs.insert(key.clone(), slot);
    }

    fn remove(&mut self, key: &JobKey) {
        match self.jobs.remove(key) {
            Some(Slot::Ready(place)) => {
                self.ready.remove(&place);
            }
            Some(Slot::Delayed(until, place)) => {
                self.delayed.remove(&(until, place));
            }
            Some(Slot::Active(control)) => {
                control.stop();
                self.active -= 1;
            }
            None => {}
        }
    }

    /// Forgets the jobs of a database, or of all.
    pub(crate) fn clear(&mut self, db: Option<i32>) {
        let gone: Vec<JobKey> =
            self.jobs.keys().filter(|key| db.is_none_or(|db| key.db == db)).cloned().collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// Two databases have changed places; what runs in them is queued again.
    pub(crate) fn swap(&mut self, first: i32, second: i32) {
        let moved: Vec<JobKey> =
            self.jobs.keys().filter(|key| key.db == first || key.db == second).cloned().collect();
        for mut key in moved {
            let rank = match self.jobs.get(&key) {
                Some(Slot::Ready((rank, _)) | Slot::Delayed(_, (rank, _))) => *rank,
                _ => i64::MIN,
            };
            self.remove(&key);
            key.db = if key.db == first { second } else { first };
            self.insert(&key, rank, None);
        }
    }

    pub(crate) fn set_enabled(&mut self, is_enabled: bool) {
        self.is_enabled = is_enabled;
    }

    /// Whether a key holds an unfinished job.
    pub(crate) fn knows(&self, key: &JobKey) -> bool {
        self.jobs.contains_key(key)
    }

    /// Jobs that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.ready.len() + self.delayed.len()
    }

    /// Jobs that are worked on.
    pub(crate) fn active(&self) -> usize {
        self.active
    }

    /// Keys of unfinished jobs of a database: those at work first, then in the order of their turn.
    pub(crate) fn keys(&self, db: i32) -> impl Iterator<Item = &JobKey> {
        let active = self.jobs.iter().filter(|(_, slot)| matches!(slot, Slot::Active(_)));
        active
            .map(|(key, _)| key)
            .chain(self.ready.values())
            .chain(self.delayed.values())
            .filter(move |key| key.db == db)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn key(name: &str) -> JobKey {
        JobKey { db: 0, name: name.as_bytes().into() }
    }

    fn waiting(rank: i64) -> Seen {
        Seen::Waiting { rank, until: None }
    }

    fn run(scheduler: &mut Scheduler, now: Instant) -> Option<(String, Arc<Control>)> {
        match scheduler.next(now) {
            Next::Run(key, control) => {
                Some((String::from_utf8_lossy(&key.name).into_owned(), control))
            }
            _ => None,
        }
    }

    fn order(scheduler: &mut Scheduler, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| run(scheduler, now).map(|(name, _)| name)).collect()
    }

    fn enabled() -> Scheduler {
        Scheduler { is_enabled: true, ..Scheduler::default() }
    }

    #[test]
    fn lower_ranks_run_first_and_equals_in_order_of_arrival() {
        let mut scheduler = enabled();
        for (name, rank) in [("b", 1), ("c", 1), ("a", 0), ("d", 2)] {
            scheduler.observe(&key(name), &waiting(rank));
        }
        assert_eq!(order(&mut scheduler, Instant::now()), ["a", "b", "c", "d"]);
        assert_eq!((scheduler.active(), scheduler.waiting()), (4, 0));
    }

    #[test]
    fn a_key_that_goes_stops_its_work() {
        let (mut scheduler, now) = (enabled(), Instant::now());
        scheduler.observe(&key("a"), &waiting(0));
        let (_, control) = run(&mut scheduler, now).unwrap();
        scheduler.observe(&key("a"), &Seen::Active { rank: 0 });
        assert!(!control.is_stopped());
        scheduler.observe(&key("a"), &Seen::Nothing);
        assert!(control.is_stopped());
        assert_eq!(scheduler.active(), 0);
        assert!(!scheduler.knows(&key("a")));
    }

    #[test]
    fn a_job_that_nobody_works_on_is_queued_again() {
        let (mut scheduler, now) = (enabled(), Instant::now());
        scheduler.observe(&key("copy"), &Seen::Active { rank: 0 });
        assert_eq!(order(&mut scheduler, now), ["copy"]);
    }

    #[test]
    fn delayed_jobs_wait_for_their_moment() {
        let (mut scheduler, now) = (enabled(), Instant::now());
        let later = now + Duration::from_secs(1);
        scheduler.observe(&key("a"), &Seen::Waiting { rank: 0, until: Some(later) });
        assert!(matches!(scheduler.next(now), Next::WaitUntil(at) if at == later));
        assert_eq!(order(&mut scheduler, later), ["a"]);
    }

    #[test]
    fn releasing_an_old_claim_leaves_a_new_job_alone() {
        let (mut scheduler, now) = (enabled(), Instant::now());
        scheduler.observe(&key("a"), &waiting(0));
        let (_, old) = run(&mut scheduler, now).unwrap();
        scheduler.observe(&key("a"), &Seen::Nothing);
        scheduler.observe(&key("a"), &waiting(0));
        scheduler.release(&key("a"), &old);
        let (_, new) = run(&mut scheduler, now).unwrap();
        scheduler.release(&key("a"), &new);
        assert!(!scheduler.knows(&key("a")));
    }

    #[test]
    fn nothing_runs_while_disabled() {
        let (mut scheduler, now) = (Scheduler::default(), Instant::now());
        scheduler.observe(&key("a"), &waiting(0));
        assert!(matches!(scheduler.next(now), Next::Idle));
        scheduler.set_enabled(true);
        assert_eq!(order(&mut scheduler, now), ["a"]);
    }

    #[test]
    fn flushing_a_database_leaves_the_others() {
        let mut scheduler = enabled();
        scheduler.observe(&key("a"), &waiting(0));
        let other = JobKey { db: 3, ..key("b") };
        scheduler.observe(&other, &waiting(0));
        scheduler.clear(Some(0));
        assert!(!scheduler.knows(&key("a")) && scheduler.knows(&other));
        scheduler.swap(3, 0);
        assert!(scheduler.knows(&key("b")) && !scheduler.knows(&other));
    }
}
