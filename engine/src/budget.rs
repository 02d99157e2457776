//! Working memory that several threads share: whoever is about to take much says how much, and waits
//! until there is room.
//!
//! First come, first served, so that a large request is not starved by small ones. One that is larger
//! than the whole budget is granted when nothing else is reserved: somebody always gets on.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::Stop;

/// How often whoever waits looks whether to stop.
const LOOK: Duration = Duration::from_millis(50);

/// A number of bytes that reservations share; clones are the same budget.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    limit: u64,
    used: u64,
    peak: u64,
    /// Who waits, in the order of their coming.
    waiting: VecDeque<u64>,
    /// The number of the next to come.
    next: u64,
}

impl State {
    fn has_room(&self, bytes: u64) -> bool {
        self.used == 0 || self.used.saturating_add(bytes) <= self.limit
    }
}

/// Why nothing was reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// Whoever waited was told to stop.
    #[error("interrupted")]
    Stopped,
    /// There was no room in time.
    #[error("there was no room in time")]
    Late,
}

/// Some bytes of a budget; given back when it is dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Budget,
    bytes: u64,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let state = State { limit: bytes, used: 0, peak: 0, waiting: VecDeque::new(), next: 0 };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }))
    }

    /// Changes the size. What is reserved stays reserved.
    pub fn set(&self, bytes: u64) {
        self.0.state.lock().limit = bytes;
        self.0.changed.notify_all();
    }

    /// The size in bytes.
    pub fn limit(&self) -> u64 {
        self.0.state.lock().limit
    }

    /// Bytes that are reserved.
    pub fn used(&self) -> u64 {
        self.0.state.lock().used
    }

    /// Most bytes that were reserved at once.
    pub fn peak(&self) -> u64 {
        self.0.state.lock().peak
    }

    /// How many wait for room.
    pub fn waiting(&self) -> usize {
        self.0.state.lock().waiting.len()
    }

    /// Reserves so many bytes if there is room now, or `anyway`, for those who cannot wait.
    pub fn reserve_now(&self, bytes: u64, anyway: bool) -> Option<Reservation> {
        let mut state = self.0.state.lock();
        (anyway || state.has_room(bytes)).then(|| self.granted(&mut state, bytes))
    }

    fn granted(&self, state: &mut State, bytes: u64) -> Reservation {
        state.used = state.used.saturating_add(bytes);
        state.peak = state.peak.max(state.used);
        Reservation { budget: self.clone(), bytes }
    }

    /// Reserves so many bytes; waits for room, but not past `deadline`, and not once `stop` says so.
    ///
    /// # Errors
    ///
    /// [`NoRoom`].
    pub fn reserve(
        &self,
        bytes: u64,
        stop: &Stop,
        deadline: Option<Instant>,
    ) -> Result<Reservation, NoRoom> {
        let mut state = self.0.state.lock();
        let me = state.next;
        state.next += 1;
        state.waiting.push_back(me);
        let result = loop {
            if stop.is_stopped() {
                break Err(NoRoom::Stopped);
            }
            if state.waiting.front() == Some(&me) && state.has_room(bytes) {
                break Ok(self.granted(&mut state, bytes));
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| deadline <= now) {
                break Err(NoRoom::Late);
            }
            let next_look = now + LOOK;
            let until = deadline.map_or(next_look, |deadline| deadline.min(next_look));
            self.0.changed.wait_until(&mut state, until);
        };
        state.waiting.retain(|waiting| *waiting != me);
        drop(state);
        // Whoever is first now may have room as well.
        self.0.changed.notify_all();
        result
    }
}

impl Reservation {
    /// Bytes that are reserved.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives back all but so many bytes.
    pub fn shrink_to(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.bytes -= less;
        self.budget.0.state.lock().used -= less;
        self.budget.0.changed.notify_all();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    fn reserve(budget: &Budget, bytes: u64) -> Result<Reservation, NoRoom> {
        let soon = Instant::now() + Duration::from_millis(20);
        budget.reserve(bytes, &Stop::default(), Some(soon))
    }

    /// Waits until so many wait.
    fn wait_for(budget: &Budget, waiting: usize) {
        while budget.waiting() != waiting {
            thread::yield_now();
        }
    }

    #[test]
    fn what_is_reserved_never_passes_the_budget_and_all_get_on() {
        let budget = Budget::new(100);
        thread::scope(|scope| {
            for i in 0..8 {
                let budget = &budget;
                scope.spawn(move || {
                    for j in 0..200 {
                        let bytes = (i * 7 + j * 13) % 60;
                        let held = budget.reserve(bytes, &Stop::default(), None).unwrap();
                        assert_eq!(held.bytes(), bytes);
                        assert!(budget.used() <= 100);
                    }
                });
            }
        });
        assert_eq!((budget.used(), budget.waiting()), (0, 0));
        assert!((1..=100).contains(&budget.peak()), "{}", budget.peak());
    }

    #[test]
    fn more_than_all_is_granted_when_nothing_else_is_reserved() {
        let budget = Budget::new(10);
        let small = reserve(&budget, 1).unwrap();
        assert_eq!(reserve(&budget, 11).unwrap_err(), NoRoom::Late);
        drop(small);
        let large = reserve(&budget, 11).unwrap();
        assert_eq!(reserve(&budget, 1).unwrap_err(), NoRoom::Late);
        drop(large);
        assert_eq!((budget.used(), budget.peak()), (0, 11));
        assert!(reserve(&Budget::new(0), 1).is_ok());
    }

    #[test]
    fn a_large_request_is_not_starved_by_small_ones() {
        let budget = Budget::new(10);
        let held = reserve(&budget, 6).unwrap();
        let ((sender, order), budget) = (mpsc::channel(), &budget);
        thread::scope(|scope| {
            for (waiting, bytes) in [(1, 8), (2, 2)] {
                let sender = sender.clone();
                scope.spawn(move || {
                    let held = budget.reserve(bytes, &Stop::default(), None).unwrap();
                    sender.send(bytes).unwrap();
                    // The small one would fit beside what is held, but came later.
                    wait_for(budget, 0);
                    drop(held);
                });
                wait_for(budget, waiting);
            }
            drop(held);
        });
        // Both fit now, and are told in the order of their coming.
        assert_eq!(budget.peak(), 10);
        let mut both: Vec<u64> = order.try_iter().collect();
        both.sort_unstable();
        assert_eq!(both, [2, 8]);
    }

    #[test]
    fn who_waits_can_be_stopped_and_lets_the_next_pass() {
        let budget = Budget::new(10);
        let held = reserve(&budget, 6).unwrap();
        let stop = Stop::default();
        thread::scope(|scope| {
            let large = scope.spawn(|| budget.reserve(8, &stop, None).map(drop));
            wait_for(&budget, 1);
            let small = scope.spawn(|| budget.reserve(2, &Stop::default(), None).map(drop));
            wait_for(&budget, 2);
            stop.stop();
            assert_eq!(large.join().unwrap(), Err(NoRoom::Stopped));
            assert_eq!(small.join().unwrap(), Ok(()));
        });
        drop(held);
        assert_eq!(budget.reserve(1, &stop, None).unwrap_err(), NoRoom::Stopped);
    }

    #[test]
    fn more_room_wakes_who_waits() {
        let budget = Budget::new(10);
        let mut held = reserve(&budget, 10).unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| budget.reserve(5, &Stop::default(), None).unwrap());
            wait_for(&budget, 1);
            budget.set(15);
            let mut other = waits.join().unwrap();
            assert_eq!((budget.used(), budget.limit()), (15, 15));
            other.shrink_to(3);
            // To more than there is: nothing is taken without asking.
            held.shrink_to(20);
            assert_eq!(budget.used(), 13);
        });
        drop(held);
        assert_eq!(budget.used(), 0);
    }
}
