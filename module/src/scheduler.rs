//! Which job is next. Pure: it is told what the keys say and what the time is.
//!
//! It is a cache of the keyspace: [`Scheduler::observe`] is called for every change of a job's key,
//! and it never disagrees with the keys for longer than one event.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    time::Instant,
};

use indexset::BTreeMap;

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
    /// The job waits, until a moment if one is given; it is of no use after another.
    Waiting { rank: i64, until: Option<Instant>, expires: Option<Instant> },
    /// The server died, or handed the job over, while it was worked on.
    Suspect { rank: i64 },
    /// The job is being worked on by this process.
    Active { rank: i64 },
}

/// What is being done for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Downloading,
    Decoding,
    /// Prepared; the engine has no room yet.
    Ready,
    Encoding,
    Generating,
}

impl Phase {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Downloading, "downloading"),
        (Self::Decoding, "decoding"),
        (Self::Ready, "ready"),
        (Self::Encoding, "encoding"),
        (Self::Generating, "generating"),
    ];
}

/// Between a job's key and those who work on it: tells them to stop, and others how far they are.
#[derive(Debug, Default)]
pub(crate) struct Control {
    is_stopped: AtomicBool,
    phase: AtomicU8,
    tokens: AtomicU32,
}

impl Control {
    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The name of the phase.
    pub(crate) fn phase(&self) -> &'static str {
        let phase = usize::from(self.phase.load(Ordering::Relaxed));
        Phase::ALL.get(phase).map_or("", |(_, name)| name)
    }

    pub(crate) fn set_tokens(&self, tokens: u32) {
        self.tokens.store(tokens, Ordering::Relaxed);
    }

    /// Tokens generated so far.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens.load(Ordering::Relaxed)
    }
}

/// Where an unfinished job stands in this process.
#[derive(Debug)]
pub(crate) enum Standing {
    /// So many jobs are to start before it, and so many are being worked on.
    Waiting {
        ahead: usize,
        active: usize,
    },
    /// It waits for a moment.
    Delayed,
    Active(Arc<Control>),
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
    Suspect(Place),
    Ready(Place, Option<Instant>),
    Delayed(Instant, Place, Option<Instant>),
    Active(Arc<Control>),
}

#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    jobs: HashMap<JobKey, Slot>,
    /// Jobs that may have ended the server. They go first, but one at a time: if one of them does
    /// it again, it is the only one that was there both times.
    suspects: BTreeMap<Place, JobKey>,
    /// The suspect that is being worked on.
    suspect: Option<JobKey>,
    ready: BTreeMap<Place, JobKey>,
    delayed: BTreeMap<(Instant, Place), JobKey>,
    /// Waiting jobs that are of no use after a moment.
    expiring: BTreeSet<(Instant, JobKey)>,
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
            (Seen::Waiting { rank, until: None, .. }, Some(Slot::Ready((known, _), _)))
                if rank == known => {}
            (Seen::Suspect { rank }, Some(Slot::Suspect((known, _)))) if rank == known => {}
            (Seen::Nothing, Some(_)) => self.remove(key),
            (Seen::Suspect { rank }, _) => {
                self.remove(key);
                self.arrivals += 1;
                self.suspects.insert((*rank, self.arrivals), key.clone());
                self.jobs.insert(key.clone(), Slot::Suspect((*rank, self.arrivals)));
            }
            (Seen::Waiting { rank, until, expires }, _) => {
                self.remove(key);
                self.insert(key, *rank, *until, *expires);
            }
            // It claims to run here, but nobody works on it: a copy, a renamed or a restored job.
            (Seen::Active { rank }, _) => {
                self.remove(key);
                self.insert(key, *rank, None, None);
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
                if let Some(Slot::Delayed(_, _, expires)) = self.jobs.get(&key) {
                    let slot = Slot::Ready(place, *expires);
                    self.jobs.insert(key.clone(), slot);
                }
                self.ready.insert(place, key);
            }
        }
        let suspect = match self.suspect {
            None => self.suspects.pop_first().map(|(_, key)| key),
            Some(_) => None,
        };
        let next = suspect.clone().or_else(|| self.ready.pop_first().map(|(_, key)| key));
        if let Some(key) = next {
            self.remove(&key);
            if suspect.is_some() {
                self.suspect = suspect;
            }
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
            self.insert(key, i64::MIN, Some(until), None);
        }
    }

    /// Some of the jobs that have waited too long; they stay until their keys say that they ended.
    pub(crate) fn expired(&self, now: Instant) -> Vec<JobKey> {
        const ENOUGH: usize = 256;
        if !self.is_enabled {
            return Vec::new();
        }
        let expired = self.expiring.iter().take_while(|(at, _)| *at <= now);
        expired.map(|(_, key)| key.clone()).take(ENOUGH).collect()
    }

    /// Forgets a job that turned out not to be there, unless its key has a new one already.
    pub(crate) fn release(&mut self, key: &JobKey, control: &Arc<Control>) {
        let is_same = |slot: &Slot| matches!(slot, Slot::Active(own) if Arc::ptr_eq(own, control));
        if self.jobs.get(key).is_some_and(is_same) {
            self.remove(key);
        }
    }

    fn insert(
        &mut self,
        key: &JobKey,
        rank: i64,
        until: Option<Instant>,
        expires: Option<Instant>,
    ) {
        self.arrivals += 1;
        let place = (rank, self.arrivals);
        let slot = if let Some(until) = until {
            self.delayed.insert((until, place), key.clone());
            Slot::Delayed(until, place, expires)
        } else {
            self.ready.insert(place, key.clone());
            Slot::Ready(place, expires)
        };
        self.jobs.insert(key.clone(), slot);
        if let Some(expires) = expires {
            self.expiring.insert((expires, key.clone()));
        }
    }

    fn remove(&mut self, key: &JobKey) {
        if self.suspect.as_ref() == Some(key) {
            self.suspect = None;
        }
        let expires = match self.jobs.remove(key) {
            Some(Slot::Suspect(place)) => {
                self.suspects.remove(&place);
                None
            }
            Some(Slot::Ready(place, expires)) => {
                self.ready.remove(&place);
                expires
            }
            Some(Slot::Delayed(until, place, expires)) => {
                self.delayed.remove(&(until, place));
                expires
            }
            Some(Slot::Active(control)) => {
                control.stop();
                self.active -= 1;
                None
            }
            None => None,
        };
        if let Some(expires) = expires {
            self.expiring.remove(&(expires, key.clone()));
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
            let (rank, until, expires) = match self.jobs.get(&key) {
                Some(Slot::Suspect((rank, _))) => (*rank, None, None),
                Some(Slot::Ready((rank, _), expires)) => (*rank, None, *expires),
                Some(Slot::Delayed(until, (rank, _), expires)) => (*rank, Some(*until), *expires),
                _ => (i64::MIN, None, None),
            };
            self.remove(&key);
            key.db = if key.db == first { second } else { first };
            self.insert(&key, rank, until, expires);
        }
    }

    pub(crate) fn set_enabled(&mut self, is_enabled: bool) {
        self.is_enabled = is_enabled;
    }

    /// Whether a key holds an unfinished job.
    pub(crate) fn knows(&self, key: &JobKey) -> bool {
        self.jobs.contains_key(key)
    }

    /// Where a job stands, if the key holds an unfinished one.
    pub(crate) fn standing(&self, key: &JobKey) -> Option<Standing> {
        Some(match self.jobs.get(key)? {
            Slot::Suspect(place) => {
                Standing::Waiting { ahead: self.suspects.rank(place), active: self.active }
            }
            Slot::Ready(place, _) => {
                let ahead = self.suspects.len() + self.ready.rank(place);
                Standing::Waiting { ahead, active: self.active }
            }
            Slot::Delayed(..) => Standing::Delayed,
            Slot::Active(control) => Standing::Active(Arc::clone(control)),
        })
    }

    /// Jobs that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.suspects.len() + self.ready.len() + self.delayed.len()
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
            .chain(self.suspects.values())
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
        Seen::Waiting { rank, until: None, expires: None }
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
        scheduler.observe(&key("a"), &Seen::Waiting { rank: 0, until: Some(later), expires: None });
        assert!(matches!(scheduler.next(now), Next::WaitUntil(at) if at == later));
        assert_eq!(order(&mut scheduler, later), ["a"]);
    }

    #[test]
    fn waiting_jobs_expire_and_running_ones_do_not() {
        let (mut scheduler, now) = (enabled(), Instant::now());
        let (soon, late) = (now + Duration::from_secs(1), now + Duration::from_secs(2));
        for (name, rank, until) in [("a", 0, None), ("b", 1, None), ("c", 2, Some(late))] {
            scheduler.observe(&key(name), &Seen::Waiting { rank, until, expires: Some(soon) });
        }
        assert!(scheduler.expired(now).is_empty());
        assert_eq!(run(&mut scheduler, now).unwrap().0, "a");
        assert_eq!(scheduler.expired(soon), [key("b"), key("c")]);
        scheduler.observe(&key("b"), &Seen::Nothing);
        assert_eq!(scheduler.expired(soon), [key("c")]);
        assert!(run(&mut scheduler, late).is_some());
        assert!(scheduler.expired(late).is_empty());
    }

    #[test]
    fn a_waiting_job_knows_how_many_are_ahead() {
        let mut scheduler = enabled();
        for i in 0..5000 {
            scheduler.observe(&key(&i.to_string()), &waiting(i));
        }
        let ahead = |scheduler: &Scheduler, name: &str| match scheduler.standing(&key(name)) {
            Some(Standing::Waiting { ahead, active }) => (ahead, active),
            other => panic!("{other:?}"),
        };
        assert_eq!(ahead(&scheduler, "4321"), (4321, 0));
        run(&mut scheduler, Instant::now());
        assert_eq!(ahead(&scheduler, "4321"), (4320, 1));
        assert!(matches!(scheduler.standing(&key("0")), Some(Standing::Active(_))));
        assert!(scheduler.standing(&key("none")).is_none());
    }

    #[test]
    fn suspects_run_first_and_one_at_a_time() {
        let (mut scheduler, now) = (enabled(), Instant::now());
        for (name, rank) in [("a", 1), ("b", 2), ("c", 3)] {
            scheduler.observe(&key(name), &waiting(rank));
        }
        scheduler.observe(&key("s"), &Seen::Suspect { rank: 9 });
        scheduler.observe(&key("t"), &Seen::Suspect { rank: 8 });
        let mut next = || run(&mut scheduler, now).map(|(name, _)| name);
        assert_eq!([next(), next()], ["t", "a"].map(|name| Some(name.to_owned())));
        scheduler.observe(&key("t"), &Seen::Nothing);
        assert_eq!(order(&mut scheduler, now), ["s", "b", "c"]);
        scheduler.observe(&key("s"), &Seen::Nothing);
        assert_eq!(scheduler.active(), 3);
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
