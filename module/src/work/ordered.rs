//! A channel and permits that keep the queue's order: what comes first there goes first here too,
//! however late it came.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use florence_engine::serve::{Inbox, Work};
use parking_lot::{Condvar, Mutex};

use crate::queue::Place;

/// A place; those of one place go in the order in which they came.
type Turn = (Place, u64);

fn turn(place: Place) -> Turn {
    static COMERS: AtomicU64 = AtomicU64::new(0);
    (place, COMERS.fetch_add(1, Ordering::Relaxed))
}

/// What is in a channel; `None` once nobody receives from it.
type Items<T> = Mutex<Option<BTreeMap<Turn, T>>>;

pub(super) struct OrderedSender<T> {
    items: Arc<Items<T>>,
    tokens: Sender<()>,
}

pub(super) struct OrderedReceiver<T> {
    items: Arc<Items<T>>,
    tokens: Receiver<()>,
}

/// A channel with so much room.
pub(super) fn channel<T>(room: usize) -> (OrderedSender<T>, OrderedReceiver<T>) {
    let items = Arc::new(Mutex::new(Some(BTreeMap::new())));
    let (sent, received) = bounded(room);
    let sender = OrderedSender { items: Arc::clone(&items), tokens: sent };
    (sender, OrderedReceiver { items, tokens: received })
}

impl<T> OrderedSender<T> {
    /// Sends an item and waits until there was room for one: the first may be taken before. Where
    /// nobody receives any more, the item is dropped.
    pub(super) fn send(&self, place: Place, item: T) {
        if let Some(items) = &mut *self.items.lock() {
            items.insert(turn(place), item);
        }
        // It takes the first item out, whosever that is.
        let _ = self.tokens.send(());
    }

    /// Whether there is room for one more, with so many on their way.
    pub(super) fn has_room(&self, coming: usize) -> bool {
        self.tokens.capacity().is_none_or(|room| self.tokens.len() + coming < room)
    }
}

impl<T> OrderedReceiver<T> {
    fn first(&self) -> Option<T> {
        self.items.lock().as_mut()?.pop_first().map(|(_, item)| item)
    }
}

impl<A> Inbox<A> for OrderedReceiver<Work<A>> {
    fn wait(&self, most: Duration) -> Result<Work<A>, RecvTimeoutError> {
        self.tokens.recv_timeout(most)?;
        self.first().ok_or(RecvTimeoutError::Timeout)
    }

    fn next(&self) -> Option<Work<A>> {
        self.tokens.try_recv().ok().and_then(|()| self.first())
    }
}

impl<T> Drop for OrderedReceiver<T> {
    fn drop(&mut self) {
        // It may hold the other end of the channel.
        let left = self.items.lock().take();
        drop(left);
    }
}

/// Leave for some at a time to go on.
pub(super) struct Permits {
    state: Mutex<Free>,
    changed: Condvar,
}

struct Free {
    count: usize,
    waiting: BTreeSet<Turn>,
}

/// Leave to go on, until it is dropped.
pub(super) struct Permit<'a>(&'a Permits);

impl Permits {
    pub(super) fn new(count: usize) -> Self {
        let state = Mutex::new(Free { count, waiting: BTreeSet::new() });
        Self { state, changed: Condvar::new() }
    }

    /// Leave, if it is this one's turn within a time.
    pub(super) fn wait(&self, place: Place, most: Duration) -> Option<Permit<'_>> {
        let (until, me) = (Instant::now() + most, turn(place));
        let mut state = self.state.lock();
        state.waiting.insert(me);
        let mut has_time = true;
        let is_next = loop {
            if state.count > 0 && state.waiting.first() == Some(&me) {
                break true;
            }
            if !has_time {
                break false;
            }
            has_time = !self.changed.wait_until(&mut state, until).timed_out();
        };
        state.waiting.remove(&me);
        state.count -= usize::from(is_next);
        if state.count > 0 {
            // It may be the turn of another now.
            self.changed.notify_all();
        }
        is_next.then(|| Permit(self))
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.state.lock().count += 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn first<T>(receiver: &OrderedReceiver<T>) -> Option<T> {
        receiver.tokens.recv_timeout(LONG).ok().and_then(|()| receiver.first())
    }

    fn until(done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < LONG);
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_first_in_the_order_goes_first_also_before_those_that_found_room() {
        let (sender, receiver) = channel(2);
        sender.send((5, 0), "c");
        sender.send((5, 1), "d");
        thread::scope(|scope| {
            for (place, item) in [((7, 2), "e"), ((1, 9), "a"), ((1, 9), "b")] {
                let came = receiver.items.lock().as_ref().unwrap().len();
                let sender = &sender;
                scope.spawn(move || sender.send(place, item));
                until(|| receiver.items.lock().as_ref().unwrap().len() > came);
            }
            let order: Vec<_> = (0..5).filter_map(|_| first(&receiver)).collect();
            assert_eq!(order, ["a", "b", "c", "d", "e"]);
        });
        assert!(receiver.first().is_none());
    }

    #[test]
    fn what_nobody_takes_any_more_is_dropped() {
        let item = Arc::new(());
        let (sender, receiver) = channel(1);
        sender.send((0, 0), Arc::clone(&item));
        thread::scope(|scope| {
            scope.spawn(|| sender.send((0, 1), Arc::clone(&item)));
            until(|| Arc::strong_count(&item) == 3);
            drop(receiver);
        });
        sender.send((0, 2), Arc::clone(&item));
        assert_eq!(Arc::strong_count(&item), 1);
    }

    #[test]
    fn permits_go_to_the_first_in_the_order() {
        let (permits, order) = (Permits::new(1), Mutex::new(Vec::new()));
        let held = permits.wait((0, 0), LONG);
        assert!(permits.wait((0, 1), Duration::from_millis(1)).is_none());
        thread::scope(|scope| {
            for (i, rank) in [3, 1, 2].into_iter().enumerate() {
                let (permits, order) = (&permits, &order);
                scope.spawn(move || {
                    let _permit = permits.wait((rank, 0), LONG);
                    order.lock().push(rank);
                });
                until(|| permits.state.lock().waiting.len() > i);
            }
            drop(held);
        });
        assert_eq!(*order.lock(), [1, 2, 3]);
        assert_eq!(permits.state.lock().count, 1);
    }
}
