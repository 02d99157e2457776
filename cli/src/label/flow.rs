//! A picture's way from the list to its answers: who reads it, what it is asked, how many are on
//! their way at once.
//!
//! Threads that read take what is listed, and hand a picture to whoever answers: the engine here
//! (`local`) or servers (`remote`). Its end goes to the thread that writes (`record`).

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use florence_engine::{Stop, image::is_turned};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    journal::Mark,
    repeated::{Asked, Claim, Repeated},
};
use crate::source::{Item, Listed, Place, Sources};

/// How often whoever waits looks whether to stop.
const LOOK: Duration = Duration::from_millis(100);

/// A picture that is to be read, and which of the prompts it is to be asked.
pub(super) struct Todo {
    pub(super) listed: Listed,
    pub(super) prompts: u64,
}

/// A picture on its way.
pub(super) struct Ticket {
    pub(super) item: Item,
    /// Which of the prompts it is asked.
    pub(super) prompts: u64,
    /// SHA-256 of its bytes, as far as they have come here.
    pub(super) sha256: Option<[u8; 32]>,
    /// The job that a server has of it.
    pub(super) job: Option<String>,
    _permit: Permit,
}

impl Ticket {
    pub(super) fn asked(&self) -> Option<Asked> {
        let sha256 = self.sha256?;
        let half = sha256.first_chunk::<16>()?;
        Some(Asked { content: u128::from_be_bytes(*half), prompts: self.prompts })
    }

    /// The prompts that it is asked, of all.
    pub(super) fn prompts<'a>(&self, all: &'a [String]) -> Vec<&'a str> {
        let asked = self.prompts;
        let is_asked = |(i, _): &(usize, &String)| asked >> i & 1 == 1;
        all.iter().enumerate().filter(is_asked).map(|(_, prompt)| prompt.as_str()).collect()
    }
}

/// What became of a picture.
pub(super) enum End {
    Answered(Ticket, Answers),
    /// The answers are those that stand there.
    Same(Ticket, Mark),
    Failed(Ticket, String),
    /// Something could not be listed.
    Unlisted(String, String),
    /// Nobody answers any more, and why: the run ends.
    Lost(String),
}

/// What is said of a picture.
pub(super) struct Answers {
    pub(super) size: (usize, usize),
    pub(super) model: String,
    /// One for each prompt.
    pub(super) parts: Vec<Part>,
}

pub(super) struct Part {
    /// The reference's JSON, an object with one entry.
    pub(super) answer: Value,
    pub(super) text: String,
    pub(super) scores: Value,
}

/// Bounds how many pictures are on their way.
#[derive(Clone)]
pub(super) struct Permits(Sender<()>, Receiver<()>);

/// That one may be.
pub(super) struct Permit(Receiver<()>);

impl Permits {
    pub(super) fn new(count: usize) -> Self {
        let (sender, receiver) = bounded(count);
        Self(sender, receiver)
    }

    /// Waits for one; `None` once `stop` says so.
    fn take(&self, stop: &Stop) -> Option<Permit> {
        while !stop.is_stopped() {
            if self.0.send_timeout((), LOOK).is_ok() {
                return Some(Permit(self.1.clone()));
            }
        }
        None
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}

/// What all that work on the way share.
pub(super) struct Flow<'a> {
    pub(super) sources: &'a Sources,
    pub(super) todo: Receiver<Todo>,
    pub(super) permits: Permits,
    pub(super) repeated: &'a Repeated,
    pub(super) stop: &'a Stop,
    pub(super) ends: Sender<End>,
    /// Whether whoever answers reads addresses itself.
    pub(super) leaves_addresses: bool,
    /// Where pictures are counted that their EXIF tag turns, if somebody wants to know.
    pub(super) turned: Option<&'a AtomicU64>,
}

impl Flow<'_> {
    /// Reads pictures until none is left, and hands them on; without bytes, those that whoever answers
    /// reads itself.
    pub(super) fn read(&self, ask: &mut dyn FnMut(Ticket, Option<Vec<u8>>)) {
        while let Some(Todo { listed, prompts }) = self.next() {
            let item = match listed {
                Ok(item) => item,
                Err(error) => {
                    self.end(End::Unlisted(error.name, error.reason));
                    continue;
                }
            };
            let Some(permit) = self.permits.take(self.stop) else { return };
            let mut ticket = Ticket { item, prompts, sha256: None, job: None, _permit: permit };
            if self.leaves_addresses && matches!(ticket.item.place, Place::Address(_)) {
                ask(ticket, None);
                continue;
            }
            match self.sources.read(&ticket.item.place, self.stop) {
                Ok(bytes) => {
                    if let Some(turned) = self.turned.filter(|_| is_turned(&bytes)) {
                        turned.fetch_add(1, Relaxed);
                    }
                    ticket.sha256 = Some(Sha256::digest(&bytes).into());
                    self.ask_once(ticket, bytes, ask);
                }
                Err(reason) => self.end(End::Failed(ticket, reason)),
            }
        }
    }

    /// The next that is listed. Whoever lists may wait for ever, for what is typed for example.
    fn next(&self) -> Option<Todo> {
        while !self.stop.is_stopped() {
            match self.todo.recv_timeout(LOOK) {
                Ok(todo) => return Some(todo),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        None
    }

    fn ask_once(
        &self,
        ticket: Ticket,
        bytes: Vec<u8>,
        ask: &mut dyn FnMut(Ticket, Option<Vec<u8>>),
    ) {
        let Some(asked) = ticket.asked() else { return ask(ticket, Some(bytes)) };
        match self.repeated.claim(asked, ticket) {
            Claim::Ask(ticket) => ask(ticket, Some(bytes)),
            Claim::Copy(ticket, mark) => self.end(End::Same(ticket, mark)),
            Claim::Wait => {}
        }
    }

    pub(super) fn end(&self, end: End) {
        // Nobody listens any more only if nothing can be written.
        let _ = self.ends.send(end);
    }
}
