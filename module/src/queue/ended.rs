//! Ended jobs that JOBS can list: of each database and state the newest.
//!
//! A cache of the keyspace, best effort: what it names is looked at before it is listed. After a
//! start it fills again as the search for jobs comes across ended ones.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Bound,
    sync::atomic::{AtomicBool, Ordering},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::{
    job::{Job, JobKey, KeyMap, KeyRef, State},
    server::{Db, unix_ms},
    settings,
};

/// The states that are ends.
const ENDS: [State; 4] = [State::Done, State::Failed, State::Cancelled, State::Expired];

/// When a job ended, how many were noted before it, and its key.
type Place = (i64, u64, JobKey);

/// Those of a database.
#[derive(Default)]
pub(super) struct Ended {
    /// Which end a job came to, when, and how many were noted before it.
    jobs: KeyMap<(usize, i64, u64)>,
    by_age: [BTreeSet<Place>; ENDS.len()],
    /// Several may end in one millisecond.
    noted: u64,
}

/// How many are forgotten at most where one is noted.
const FORGOTTEN: usize = 16;

static ENDED: Mutex<Option<HashMap<Db, Ended, RandomState>>> = Mutex::new(None);

/// Whether there may be some; who only asks takes no lock.
static IS_USED: AtomicBool = AtomicBool::new(false);

impl Ended {
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    fn forget(&mut self, key: KeyRef<'_>) {
        if let Some((key, (end, at, noted))) = self.jobs.swap_remove_entry(&key) {
            self.by_age[end].remove(&(at, noted, key));
        }
    }

    fn note(&mut self, key: &JobKey, (end, at): (usize, i64), most: usize) {
        if self.jobs.get(key).is_none_or(|known| (known.0, known.1) != (end, at)) {
            self.forget(key.as_ref());
            self.noted += 1;
            self.jobs.insert(key.clone(), (end, at, self.noted));
            self.by_age[end].insert((at, self.noted, key.clone()));
        }
        // Where the limit has become lower, it is not reached at once: nobody is to wait for that.
        for _ in 0..FORGOTTEN {
            if self.by_age[end].len() <= most {
                return;
            }
            let Some((.., oldest)) = self.by_age[end].pop_first() else { return };
            self.jobs.swap_remove(&oldest);
        }
    }

    /// Those that came to some ends, the newest first; with `before`, those that are older.
    fn newest(&self, ends: &[usize], before: Option<&Place>) -> impl Iterator<Item = &Place> {
        let line = |end: &usize| {
            let bound = before.map_or(Bound::Unbounded, Bound::Excluded);
            let mut line = self.by_age[*end].range::<Place, _>((Bound::Unbounded, bound)).rev();
            (line.next(), line)
        };
        let mut lines: Vec<_> = ends.iter().map(line).collect();
        std::iter::from_fn(move || {
            let (first, others) = lines.iter_mut().max_by_key(|(first, _)| *first)?;
            std::mem::replace(first, others.next())
        })
    }
}

fn end_of(state: State) -> Option<usize> {
    ENDS.iter().position(|end| *end == state)
}

/// A job has ended, or changed after that.
pub(super) fn note(key: &JobKey, job: &Job) {
    let Some(end) = end_of(job.state) else { return };
    // Whoever writes a later time must not stay in front for ever.
    let at = job.number("finished_at").unwrap_or_default().min(unix_ms());
    IS_USED.store(true, Ordering::Relaxed);
    let mut ended = ENDED.lock();
    let of_db = ended.get_or_insert_default().entry(key.db).or_default();
    of_db.note(key, (end, at), settings::ENDED_JOBS.size());
}

/// A key holds no ended job any more.
pub(crate) fn forget(key: KeyRef<'_>) {
    if IS_USED.load(Ordering::Relaxed)
        && let Some(of_db) = ENDED.lock().as_mut().and_then(|ended| ended.get_mut(&key.db))
    {
        of_db.forget(key);
    }
}

/// A database was flushed, or all (`None`): what is forgotten.
pub(super) fn clear(db: Option<Db>) -> Vec<Ended> {
    let mut ended = ENDED.lock();
    let Some(ended) = ended.as_mut() else { return Vec::new() };
    match db {
        Some(db) => ended.remove(&db).into_iter().collect(),
        None => std::mem::take(ended).into_values().collect(),
    }
}

/// Keys of jobs that ended in a state, or in any, the newest end first.
///
/// Some at a time: nothing is locked while the caller looks at them.
pub(crate) fn newest(db: Db, state: Option<State>) -> impl Iterator<Item = JobKey> {
    const SOME: usize = 128;
    let ends: Vec<usize> = match state {
        Some(state) => end_of(state).into_iter().collect(),
        None => (0..ENDS.len()).collect(),
    };
    let (mut known, mut last) = (Vec::new().into_iter(), None);
    std::iter::from_fn(move || {
        let next = known.next().or_else(|| {
            known = some_of(db, &ends, last.as_ref(), SOME).into_iter();
            known.next()
        });
        last.clone_from(&next);
        next.map(|(.., key)| key)
    })
}

fn some_of(db: Db, ends: &[usize], before: Option<&Place>, most: usize) -> Vec<Place> {
    let ended = ENDED.lock();
    let of_db = ended.as_ref().and_then(|ended| ended.get(&db));
    of_db.map(|of_db| of_db.newest(ends, before).take(most).cloned().collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> JobKey {
        JobKey { db: Db(0), name: name.as_bytes().into() }
    }

    fn names(ended: &Ended, ends: &[usize], before: Option<i64>) -> Vec<String> {
        let before = before.map(|at| (at, 0, key("")));
        let found = ended.newest(ends, before.as_ref());
        found.map(|(.., key)| String::from_utf8_lossy(&key.name).into_owned()).collect()
    }

    const ALL: [usize; 4] = [0, 1, 2, 3];

    #[test]
    fn the_newest_of_each_end_stay() {
        let mut ended = Ended::default();
        for (name, end, at) in [("a", 0, 1), ("b", 1, 2), ("c", 0, 4), ("d", 0, 3), ("e", 0, 0)] {
            ended.note(&key(name), (end, at), 2);
        }
        assert_eq!(names(&ended, &ALL, None), ["c", "d", "b"]);
        assert_eq!(names(&ended, &ALL, Some(4)), ["d", "b"]);
        assert_eq!(names(&ended, &ALL, Some(2)), [""; 0]);
        assert_eq!(names(&ended, &[1], None), ["b"]);
        assert_eq!(ended.len(), 3);
    }

    #[test]
    fn of_those_of_one_moment_the_last_that_was_noted_is_the_newest() {
        let mut ended = Ended::default();
        for (name, end) in [("b", 0), ("c", 1), ("a", 0), ("b", 0)] {
            ended.note(&key(name), (end, 7), 9);
        }
        assert_eq!(names(&ended, &ALL, None), ["a", "c", "b"]);
    }

    #[test]
    fn a_job_is_there_once_whatever_becomes_of_it() {
        let mut ended = Ended::default();
        ended.note(&key("a"), (0, 1), 9);
        ended.note(&key("a"), (1, 5), 9);
        assert_eq!(names(&ended, &ALL, None), ["a"]);
        assert_eq!(names(&ended, &[0], None), [""; 0]);
        ended.forget(key("a").as_ref());
        assert_eq!(names(&ended, &ALL, None), [""; 0]);
        assert_eq!(ended.len(), 0);
        ended.note(&key("a"), (0, 1), 0);
        assert_eq!(ended.len(), 0);
    }
}
