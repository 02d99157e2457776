//! The lines in which jobs wait, and how many there are of whom.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    sync::Arc,
    time::Instant,
};

use indexset::BTreeMap;

use super::{Kind, Place, downloads::Downloads, places::Places};
use crate::job::{JobKey, Origin, Waiting};

/// So many models are told apart: each takes a look whenever a job is wanted, and hashes may name any.
pub(super) const MOST_MODELS: usize = 64;

/// In which line a job waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// May have ended the server.
    Suspects,
    Ready,
    Delayed(Instant),
}

impl Line {
    /// The line for a job whose moment, if it waits for one, has come.
    fn when_ripe(waiting: &Waiting) -> Self {
        if waiting.is_suspect { Self::Suspects } else { Self::Ready }
    }

    /// The line for a job of which this is known.
    pub(super) fn of(waiting: &Waiting) -> Self {
        waiting.until.map_or_else(|| Self::when_ripe(waiting), |until| Self::Delayed(until.at))
    }
}

/// A job that waits.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) line: Line,
    pub(super) place: Place,
    pub(super) waiting: Waiting,
    /// Its origin, with the model among whose jobs it waits.
    filed: Origin,
}

impl Queued {
    /// Whether it waits for the end of its delay, not to be tried again.
    fn is_deferred(&self) -> bool {
        matches!(self.line, Line::Delayed(_)) && !self.waiting.is_retry
    }
}

#[derive(Debug, Default)]
pub(super) struct Lines {
    /// Jobs by user.
    users: HashMap<Arc<str>, usize>,
    /// Jobs by the model that they ask for.
    models: HashMap<Arc<str>, usize>,
    /// Jobs that may have ended the server. They go first, but one at a time: if one of them does
    /// it again, it is the only one that was there both times.
    suspects: BTreeMap<Place, JobKey>,
    /// The same by whose work they are, readers' and downloaders'.
    suspected: [Places; 2],
    ready: BTreeMap<Place, JobKey>,
    /// Of the ready ones, those whose pictures are at hand, and the others.
    at_hand: Places,
    pub(super) downloads: Downloads,
    delayed: BTreeMap<(Instant, Place), JobKey>,
    /// How many of them wait for the end of their delay, not to be tried again.
    deferred: usize,
    /// Jobs that are of no use after a moment.
    expiring: BTreeSet<(Instant, JobKey)>,
    /// Jobs that have been tried before.
    retrying: BTreeSet<JobKey>,
}

impl Lines {
    /// A job comes to wait in a line.
    pub(super) fn insert(
        &mut self,
        line: Line,
        key: &JobKey,
        place: Place,
        waiting: Waiting,
    ) -> Queued {
        let mut filed = waiting.origin.clone();
        if self.models.len() >= MOST_MODELS && !self.models.contains_key(&filed.model) {
            filed.model = Arc::default();
        }
        *self.models.entry(Arc::clone(&filed.model)).or_default() += 1;
        *self.users.entry(Arc::clone(&waiting.origin.user)).or_default() += 1;
        if let Some(expires) = waiting.expires {
            self.expiring.insert((expires.at, key.clone()));
        }
        if waiting.is_retry {
            self.retrying.insert(key.clone());
        }
        let queued = Queued { line, place, waiting, filed };
        self.enter(key, &queued);
        queued
    }

    /// A job does not wait any more.
    pub(super) fn remove(&mut self, key: &JobKey, queued: &Queued) {
        self.leave(queued);
        let Queued { waiting, filed, .. } = queued;
        if let Some(expires) = waiting.expires {
            self.expiring.remove(&(expires.at, key.clone()));
        }
        if waiting.is_retry {
            self.retrying.remove(key);
        }
        count_down(&mut self.users, &waiting.origin.user);
        count_down(&mut self.models, &filed.model);
    }

    fn enter(&mut self, key: &JobKey, queued: &Queued) {
        let Queued { line, place, filed, .. } = queued;
        self.deferred += usize::from(queued.is_deferred());
        match line {
            Line::Suspects => {
                self.suspected[usize::from(filed.host.is_some())].insert(&filed.model, *place);
                self.suspects.insert(*place, key.clone())
            }
            Line::Ready => {
                if filed.host.is_some() {
                    self.downloads.insert(*place, filed);
                } else {
                    self.at_hand.insert(&filed.model, *place);
                }
                self.ready.insert(*place, key.clone())
            }
            Line::Delayed(until) => self.delayed.insert((*until, *place), key.clone()),
        };
    }

    fn leave(&mut self, queued: &Queued) {
        let Queued { line, place, filed, .. } = queued;
        self.deferred -= usize::from(queued.is_deferred());
        match line {
            Line::Suspects => {
                self.suspected[usize::from(filed.host.is_some())].remove(&filed.model, *place);
                self.suspects.remove(place)
            }
            Line::Ready => {
                self.at_hand.remove(&filed.model, *place);
                self.downloads.remove(*place, filed);
                self.ready.remove(place)
            }
            Line::Delayed(until) => self.delayed.remove(&(*until, *place)),
        };
    }

    /// A job whose moment has come takes its place.
    pub(super) fn ripen(&mut self, key: &JobKey, queued: &mut Queued) {
        self.leave(queued);
        queued.line = Line::when_ripe(&queued.waiting);
        self.enter(key, queued);
    }

    /// The first of the delayed jobs, and when it is due.
    pub(super) fn first_delayed(&self) -> Option<(Instant, &JobKey)> {
        self.delayed.first_key_value().map(|((at, _), key)| (*at, key))
    }

    /// The first suspect for a worker, of those whose model is open.
    pub(super) fn first_suspect(
        &self,
        kind: Kind,
        is_open: &dyn Fn(&str) -> bool,
    ) -> Option<&JobKey> {
        let places = &self.suspected[usize::from(kind == Kind::Downloader)];
        self.suspects.get(&places.first(is_open)?)
    }

    /// The first ready job for a worker, of those whose model is open.
    pub(super) fn first_ready(
        &self,
        kind: Kind,
        is_open: &dyn Fn(&str) -> bool,
    ) -> Option<&JobKey> {
        let place = match kind {
            Kind::Reader => self.at_hand.first(is_open),
            Kind::Downloader => self.downloads.first(is_open),
        };
        self.ready.get(&place?)
    }

    pub(super) fn has_suspects(&self) -> bool {
        !self.suspects.is_empty()
    }

    /// How many jobs are to start before this one, if it does not wait for a moment.
    pub(super) fn ahead_of(&self, queued: &Queued) -> Option<usize> {
        match queued.line {
            Line::Suspects => Some(self.suspects.rank(&queued.place)),
            Line::Ready => Some(self.suspects.len() + self.ready.rank(&queued.place)),
            Line::Delayed(_) => None,
        }
    }

    /// Jobs that have waited too long at `now`.
    pub(super) fn expired(&self, now: Instant) -> impl Iterator<Item = &JobKey> {
        self.expiring.iter().take_while(move |(at, _)| *at <= now).map(|(_, key)| key)
    }

    pub(super) fn delayed(&self) -> usize {
        self.delayed.len()
    }

    /// Delayed jobs that wait for the end of their delay, not to be tried again.
    pub(super) fn deferred(&self) -> usize {
        self.deferred
    }

    pub(super) fn of_user(&self, user: &str) -> usize {
        self.users.get(user).copied().unwrap_or_default()
    }

    /// All of them, in the order of their turn.
    pub(super) fn keys(&self) -> impl Iterator<Item = &JobKey> {
        self.suspects.values().chain(self.ready.values()).chain(self.delayed.values())
    }

    /// Those that have been tried before.
    pub(super) fn retrying(&self) -> impl Iterator<Item = &JobKey> {
        self.retrying.iter()
    }

    #[cfg(test)]
    pub(super) fn models(&self) -> usize {
        self.models.len()
    }

    /// Whether nothing is kept of jobs that were there.
    #[cfg(test)]
    pub(super) fn are_empty(&self) -> bool {
        self.models.is_empty()
            && self.users.is_empty()
            && self.at_hand.is_empty()
            && self.suspected.iter().all(Places::is_empty)
            && self.deferred == 0
    }
}

/// One less; what is 0 is not kept.
pub(super) fn count_down<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
