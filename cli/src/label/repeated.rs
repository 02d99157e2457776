//! Pictures whose bytes are those of another one: what was asked about them is asked once.

use std::collections::{HashMap, hash_map::Entry};

use parking_lot::Mutex;

use super::{flow::Ticket, journal::Mark};

/// A picture's bytes, by half of their SHA-256, and which prompts are asked about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Asked {
    pub(super) content: u128,
    pub(super) prompts: u64,
}

/// What is known of what was asked.
enum State {
    /// It is being answered, and these wait for it.
    Running(Vec<Ticket>),
    /// The answers are in the journal.
    Written(Mark),
}

#[derive(Default)]
pub(super) struct Repeated(Mutex<HashMap<Asked, State>>);

/// What is to be done about a picture.
pub(super) enum Claim {
    Ask(Ticket),
    /// The picture waits with one like it.
    Wait,
    Copy(Ticket, Mark),
}

impl Repeated {
    pub(super) fn claim(&self, asked: Asked, ticket: Ticket) -> Claim {
        match self.0.lock().entry(asked) {
            Entry::Vacant(place) => {
                place.insert(State::Running(Vec::new()));
                Claim::Ask(ticket)
            }
            Entry::Occupied(place) => match place.into_mut() {
                State::Written(mark) => Claim::Copy(ticket, *mark),
                State::Running(waiting) => {
                    waiting.push(ticket);
                    Claim::Wait
                }
            },
        }
    }

    /// The answers are in the journal; who waits for them.
    pub(super) fn written(&self, asked: Asked, mark: Mark) -> Vec<Ticket> {
        match self.0.lock().insert(asked, State::Written(mark)) {
            Some(State::Running(waiting)) => waiting,
            _ => Vec::new(),
        }
    }

    /// There are no answers; who waits for them. The next one like it is asked about again.
    pub(super) fn failed(&self, asked: Asked) -> Vec<Ticket> {
        match self.0.lock().remove(&asked) {
            Some(State::Running(waiting)) => waiting,
            _ => Vec::new(),
        }
    }
}
