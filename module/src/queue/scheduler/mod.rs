//! Which job is next. Pure: it is told what the keys say and what the time is.
//!
//! It is a cache of the keyspace: [`Scheduler::observe`] is called for every change of a job's key,
//! and it never disagrees with the keys for longer than one event; but for keys that are overwritten
//! by a value of another type, which are looked for.

mod downloads;
mod lines;
mod places;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Weak},
    time::Instant,
};

use super::lease::{Claim, Place};
use crate::{
    job::{self, Claimed, Content, JobKey, KeyMap, KeyRef, Seen, State, Token, Waiting},
    server::Db,
};
pub(crate) use downloads::Limits;
use lines::{Line, Lines, Queued, count_down};

/// What became of the process that a hash names as the owner of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// It lives, or ended in an orderly way: the job did it no harm.
    None,
    /// It died while it worked on the job.
    Crash,
    /// It is another server's, which this one follows.
    Unknown,
}

/// Where an unfinished job stands in this process.
#[derive(Debug)]
pub(crate) enum Standing {
    /// So many jobs are to start before it, and so many are being worked on.
    Waiting {
        ahead: usize,
        active: usize,
    },
    /// It waits for a moment, or for its last claim to be taken from its hash.
    Delayed,
    Active(Arc<Claim>),
}

/// Who asks for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It takes jobs whose pictures are at hand.
    Reader,
    /// It takes jobs whose pictures have to be downloaded.
    Downloader,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Reader, Self::Downloader];
}

/// The next thing for a worker to do.
#[derive(Debug)]
pub(crate) enum Next {
    Run(JobKey, Arc<Claim>),
    WaitUntil(Instant),
    Idle,
}

#[derive(Debug)]
enum Slot {
    Waiting(Queued),
    Unclaimed(Unclaimed),
    Active(Active),
}

/// A job whose hash tells of a claim that nobody holds.
#[derive(Debug)]
struct Unclaimed {
    owner: String,
    death: Death,
}

/// A job that is worked on.
#[derive(Debug)]
struct Active {
    claim: Weak<Claim>,
    token: Token,
    /// What the hash said when it first showed the claim.
    content: Option<Content>,
    /// Where the job goes if it is given back.
    place: Place,
    waiting: Waiting,
    is_downloading: bool,
}

impl Active {
    /// Whether a hash still shows this claim, of the same job.
    fn is_shown(&mut self, shown: &Claimed) -> bool {
        shown.token == self.token && *self.content.get_or_insert(shown.content) == shown.content
    }

    fn is_of(&self, claim: &Arc<Claim>) -> bool {
        self.claim.as_ptr() == Arc::as_ptr(claim)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    jobs: KeyMap<Slot>,
    /// Jobs by database.
    databases: HashMap<Db, usize>,
    lines: Lines,
    /// The suspect that is being worked on, until whoever does has let go of it: told to stop, it
    /// may still be in the middle of something.
    suspect: Weak<Claim>,
    unclaimed: BTreeSet<JobKey>,
    active: HashSet<JobKey>,
    arrivals: u64,
    /// Only a master whose data set is loaded runs jobs.
    is_enabled: bool,
    /// The server has refused a claim: none is tried before.
    held: Option<Instant>,
}

impl Scheduler {
    /// Takes over what a key says now; `death` tells of the owner of the claim that it shows, if it
    /// shows one.
    pub(crate) fn observe(&mut self, key: &JobKey, seen: &Seen, death: Death) {
        if let (Seen::Claimed(shown), Some(Slot::Active(active))) = (seen, self.jobs.get_mut(key))
            && active.is_shown(shown)
        {
            if let Some(claim) = active.claim.upgrade() {
                claim.touch();
            }
            return;
        }
        match (seen, self.jobs.get(key)) {
            (Seen::Nothing, None) => {}
            (Seen::Nothing, Some(_)) => self.remove(key),
            (Seen::Waiting(new), Some(Slot::Waiting(known))) if *new == known.waiting => {}
            (Seen::Waiting(new), _) => {
                self.remove(key);
                let place = (new.rank(), self.arrival());
                self.insert(key, place, new.clone());
            }
            (Seen::Claimed(shown), Some(Slot::Unclaimed(known))) if shown.owner == known.owner => {}
            // Nobody here works on it: a copy, a renamed or restored job, or one whose content has
            // changed.
            (Seen::Claimed(shown), _) => {
                self.remove(key);
                self.insert_unclaimed(key, Unclaimed { owner: shown.owner.clone(), death });
            }
        }
    }

    /// The job for a worker to work on at `now`, of those whose model `is_open`; it counts as active
    /// until its key says otherwise.
    pub(crate) fn next(
        &mut self,
        now: Instant,
        kind: Kind,
        (limits, is_open): (Limits, &dyn Fn(&str) -> bool),
        token: impl FnOnce() -> Token,
    ) -> Next {
        if !self.is_enabled {
            return Next::Idle;
        }
        if let Some(until) = self.held.filter(|until| now < *until) {
            return Next::WaitUntil(until);
        }
        self.ripen(now);
        self.lines.downloads.limit(limits);
        let suspect = self.lines.first_suspect(kind, is_open).filter(|_| self.may_run_suspect());
        let Some(key) = suspect.or_else(|| self.lines.first_ready(kind, is_open)).cloned() else {
            return match self.lines.first_delayed() {
                Some((at, _)) => Next::WaitUntil(at),
                None => Next::Idle,
            };
        };
        let Some(Slot::Waiting(Queued { place, waiting, .. })) = self.take(&key) else {
            return Next::Idle;
        };
        let token = token();
        let claim = Arc::new(Claim::new(
            token.clone(),
            waiting.expires.map(|due| due.at),
            Arc::clone(&waiting.origin.model),
            place,
        ));
        if waiting.is_suspect {
            self.suspect = Arc::downgrade(&claim);
        }
        let is_downloading = kind == Kind::Downloader;
        if is_downloading {
            self.lines.downloads.start(&waiting.origin);
        }
        let active = Active {
            claim: Arc::downgrade(&claim),
            token,
            content: None,
            place,
            waiting,
            is_downloading,
        };
        self.put(&key, Slot::Active(active));
        self.active.insert(key.clone());
        Next::Run(key, claim)
    }

    /// Whether none is being worked on.
    fn may_run_suspect(&self) -> bool {
        self.suspect.strong_count() == 0
    }

    /// Whether there may be a job for a worker.
    pub(crate) fn has_job(&self, kind: Kind) -> bool {
        let has_suspect = self.lines.has_suspects() && self.may_run_suspect();
        self.is_enabled && (has_suspect || self.lines.first_ready(kind, &|_| true).is_some())
    }

    /// When the first job is due that waits for a moment.
    pub(crate) fn first_due(&self) -> Option<Instant> {
        self.lines.first_delayed().map(|(at, _)| at).filter(|_| self.is_enabled)
    }

    /// The picture of a job is here.
    pub(crate) fn downloaded(&mut self, key: &JobKey, claim: &Arc<Claim>) {
        if let Some(Slot::Active(active)) = self.jobs.get_mut(key)
            && active.is_of(claim)
            && std::mem::take(&mut active.is_downloading)
        {
            self.lines.downloads.end(&active.waiting.origin);
        }
    }

    /// Lets delayed jobs take their places whose moment has come: not all of a million at once, for
    /// which the main thread would have to wait.
    fn ripen(&mut self, now: Instant) {
        const MOST: usize = 1000;
        for _ in 0..MOST {
            let Some((_, key)) = self.lines.first_delayed().filter(|(at, _)| *at <= now) else {
                return;
            };
            let key = key.clone();
            let Some(Slot::Waiting(queued)) = self.jobs.get_mut(&key) else { return };
            self.lines.ripen(&key, queued);
        }
    }

    /// Gives a job back that nobody works on any more, if the claim is still the one it has. The
    /// claim is let go of here: a suspect behind it may run now.
    pub(crate) fn give_back(&mut self, key: &JobKey, claim: Arc<Claim>) {
        if self.has(key, &claim) {
            self.put_back(key);
        }
        drop(claim);
    }

    /// Nobody works on a job any more: back to its place.
    fn put_back(&mut self, key: &JobKey) {
        let Some(Slot::Active(active)) = self.take(key) else { return };
        if let Some(claim) = active.claim.upgrade() {
            claim.stop.stop();
        }
        if active.content.is_some() {
            // The hash shows the claim: it has to be taken from there first.
            let owner = job::owner().to_owned();
            self.insert_unclaimed(key, Unclaimed { owner, death: Death::None });
        } else {
            self.insert(key, active.place, active.waiting);
        }
    }

    fn has(&self, key: &JobKey, claim: &Arc<Claim>) -> bool {
        matches!(self.jobs.get(key), Some(Slot::Active(active)) if active.is_of(claim))
    }

    /// Forgets a job that has ended, unless its key has a new one already. The claim is let go of
    /// here, as in [`Self::give_back`].
    pub(crate) fn release(&mut self, key: &JobKey, claim: Arc<Claim>) {
        if self.has(key, &claim) {
            self.remove(key);
        }
        drop(claim);
    }

    /// No job is taken before `until`.
    pub(crate) fn hold(&mut self, until: Instant) {
        self.held = Some(until);
    }

    /// Gives a job back to its place, where it is not taken before `until`.
    pub(crate) fn postpone(&mut self, key: &JobKey, claim: &Arc<Claim>, until: Instant) {
        if !self.has(key, claim) {
            return;
        }
        self.put_back(key);
        if let Some(Slot::Waiting(Queued { place, waiting, .. })) = self.jobs.get(key) {
            let (place, waiting) = (*place, waiting.clone());
            self.take(key);
            self.insert_in(Line::Delayed(until), key, place, waiting);
        }
    }

    /// Puts jobs back whose claims are gone without having been given back; tells which.
    pub(crate) fn recover(&mut self) -> Vec<JobKey> {
        let is_lost = |key: &&JobKey| match self.jobs.get(*key) {
            Some(Slot::Active(active)) => active.claim.strong_count() == 0,
            _ => true,
        };
        let lost: Vec<JobKey> = self.active.iter().filter(is_lost).cloned().collect();
        for key in &lost {
            self.put_back(key);
        }
        lost
    }

    /// Some of the jobs that have waited too long; they stay until their keys say that they ended.
    pub(crate) fn expired(&self, now: Instant) -> Vec<JobKey> {
        if !self.is_enabled {
            return Vec::new();
        }
        self.lines.expired(now).take(ENOUGH).cloned().collect()
    }

    /// Some of the jobs whose hashes tell of a claim that nobody holds, and whether a process died
    /// with it; they stay until their keys say otherwise.
    pub(crate) fn unclaimed(&self) -> Vec<(JobKey, bool)> {
        if !self.is_enabled {
            return Vec::new();
        }
        let known = self.unclaimed.iter().filter_map(|key| match self.jobs.get(key) {
            Some(Slot::Unclaimed(unclaimed)) => Some((key.clone(), unclaimed.death)),
            _ => None,
        });
        let known = known.filter(|(_, death)| *death != Death::Unknown);
        known.map(|(key, death)| (key, death == Death::Crash)).take(ENOUGH).collect()
    }

    /// Whether [`Self::expired`] or [`Self::unclaimed`] has something to tell.
    pub(crate) fn has_overdue(&self, now: Instant) -> bool {
        let has_expired = self.lines.expired(now).next().is_some();
        self.is_enabled && (has_expired || !self.unclaimed.is_empty())
    }

    /// Decides about the claims of other servers, which are this one's to judge from now on.
    pub(crate) fn judge(&mut self, judge: impl Fn(&str) -> Death) {
        for slot in self.jobs.values_mut() {
            if let Slot::Unclaimed(unclaimed) = slot
                && unclaimed.death == Death::Unknown
            {
                unclaimed.death = judge(&unclaimed.owner);
            }
        }
    }

    fn arrival(&mut self) -> u64 {
        self.arrivals += 1;
        self.arrivals
    }

    fn insert(&mut self, key: &JobKey, place: Place, waiting: Waiting) {
        self.insert_in(Line::of(&waiting), key, place, waiting);
    }

    fn insert_in(&mut self, line: Line, key: &JobKey, place: Place, waiting: Waiting) {
        let queued = self.lines.insert(line, key, place, waiting);
        self.put(key, Slot::Waiting(queued));
    }

    fn put(&mut self, key: &JobKey, slot: Slot) {
        if self.jobs.insert(key.clone(), slot).is_none() {
            *self.databases.entry(key.db).or_default() += 1;
        }
    }

    fn insert_unclaimed(&mut self, key: &JobKey, unclaimed: Unclaimed) {
        self.unclaimed.insert(key.clone());
        self.put(key, Slot::Unclaimed(unclaimed));
    }

    /// Takes a job out of all lines.
    fn take(&mut self, key: &JobKey) -> Option<Slot> {
        let slot = self.jobs.swap_remove(key)?;
        count_down(&mut self.databases, &key.db);
        match &slot {
            Slot::Waiting(queued) => self.lines.remove(key, queued),
            Slot::Unclaimed(_) => {
                self.unclaimed.remove(key);
            }
            Slot::Active(active) => {
                self.active.remove(key);
                if active.is_downloading {
                    self.lines.downloads.end(&active.waiting.origin);
                }
            }
        }
        Some(slot)
    }

    /// Forgets a job; whoever works on it is told to stop.
    fn remove(&mut self, key: &JobKey) {
        if let Some(Slot::Active(active)) = self.take(key)
            && let Some(claim) = active.claim.upgrade()
        {
            claim.stop.stop();
        }
    }

    /// Forgets the jobs of a database, or of all; gives them away, since to drop many takes time. So
    /// does each that is taken out of its lines: either those that go are, or those that stay.
    pub(crate) fn clear(&mut self, db: Option<Db>) -> Self {
        let goes = |key: &&JobKey| db.is_none_or(|db| key.db == db);
        let of = |db| self.databases.get(&db).copied().unwrap_or_default();
        let are_few = db.is_some_and(|db| 2 * of(db) <= self.jobs.len());
        let known: Vec<JobKey> = if are_few {
            self.jobs.keys().filter(goes).cloned().collect()
        } else {
            self.active.iter().filter(goes).cloned().collect()
        };
        for key in known {
            self.remove(&key);
        }
        if are_few {
            return Self::default();
        }
        let empty = Self {
            suspect: Weak::clone(&self.suspect),
            arrivals: self.arrivals,
            is_enabled: self.is_enabled,
            held: self.held,
            ..Self::default()
        };
        let mut gone = std::mem::replace(self, empty);
        // Nothing is looked for where nothing stays.
        let others = if gone.databases.keys().any(|other| db.is_some_and(|db| *other != db)) {
            gone.jobs.keys().filter(|key| !goes(key)).cloned().collect()
        } else {
            Vec::new()
        };
        for key in others {
            if let Some(slot) = gone.take(&key) {
                self.take_over(&key, slot);
            }
        }
        gone
    }

    fn take_over(&mut self, key: &JobKey, slot: Slot) {
        match slot {
            Slot::Waiting(Queued { line, place, waiting, .. }) => {
                self.insert_in(line, key, place, waiting);
            }
            Slot::Unclaimed(unclaimed) => self.insert_unclaimed(key, unclaimed),
            Slot::Active(active) => {
                if active.is_downloading {
                    self.lines.downloads.start(&active.waiting.origin);
                }
                self.active.insert(key.clone());
                self.put(key, Slot::Active(active));
            }
        }
    }

    /// Whether jobs are run here. Where they are not any more, those at work go back to their
    /// places.
    pub(crate) fn set_enabled(&mut self, is_enabled: bool) {
        self.is_enabled = is_enabled;
        if !is_enabled {
            for key in self.active.iter().cloned().collect::<Vec<_>>() {
                self.put_back(&key);
            }
        }
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.is_enabled
    }

    /// Whether a claim is the one under which a job is worked on here.
    pub(crate) fn is_held(&self, key: &JobKey, token: &Token) -> bool {
        matches!(self.jobs.get(key), Some(Slot::Active(active)) if active.token == *token)
    }

    /// Whether a key holds an unfinished job.
    pub(crate) fn knows(&self, key: KeyRef<'_>) -> bool {
        self.jobs.contains_key(&key)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// The jobs whose hashes may show claims of this process.
    pub(crate) fn claimed(&self) -> Vec<JobKey> {
        self.active.iter().chain(&self.unclaimed).cloned().collect()
    }

    /// The jobs that are worked on.
    pub(crate) fn active_keys(&self) -> Vec<JobKey> {
        self.active.iter().cloned().collect()
    }

    /// Where a job stands, if the key holds an unfinished one.
    pub(crate) fn standing(&self, key: KeyRef<'_>) -> Option<Standing> {
        let active = self.active.len();
        Some(match self.jobs.get(&key)? {
            Slot::Waiting(queued) => match self.lines.ahead_of(queued) {
                Some(ahead) => Standing::Waiting { ahead, active },
                None => Standing::Delayed,
            },
            Slot::Unclaimed(_) => Standing::Delayed,
            Slot::Active(active) => Standing::Active(active.claim.upgrade()?),
        })
    }

    /// Jobs that wait, delayed ones too.
    pub(crate) fn waiting(&self) -> usize {
        self.jobs.len() - self.active.len()
    }

    /// Jobs that wait for a moment.
    pub(crate) fn delayed(&self) -> usize {
        self.lines.delayed()
    }

    /// Jobs that wait for the end of their delay.
    pub(crate) fn deferred(&self) -> usize {
        self.lines.deferred()
    }

    /// Jobs of a user that wait, delayed ones too.
    pub(crate) fn waiting_of(&self, user: &str) -> usize {
        self.lines.of_user(user)
    }

    /// Jobs that are worked on.
    pub(crate) fn active(&self) -> usize {
        self.active.len()
    }

    /// Keys of unfinished jobs: those at work first, then in the order of their turn. With a state,
    /// only those that may be in it.
    pub(crate) fn keys(&self, state: Option<State>) -> impl Iterator<Item = &JobKey> {
        let is_in = |states: &[State]| state.is_none_or(|state| states.contains(&state));
        let (is_waiting, is_active) =
            (is_in(&[State::Queued]), is_in(&[State::Fetching, State::Running]));
        let retrying = self.lines.retrying().filter(move |_| state == Some(State::Retrying));
        let active = self.active.iter().filter(move |_| is_active);
        let waiting = self.unclaimed.iter().chain(self.lines.keys()).filter(move |_| is_waiting);
        active.chain(retrying).chain(waiting)
    }
}

/// Jobs that are dealt with in one lock section.
const ENOUGH: usize = 256;
