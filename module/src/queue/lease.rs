//! A lease: the right and the duty to work on a job.
//!
//! It is not cloned, and not lost: dropped without an end, for whatever reason, it gives the job
//! back to its place in the order.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    time::Instant,
};

use florence_engine::Stop;

use super::Queue;
use crate::{
    job::{JobKey, Token},
    server::Refused,
};

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

/// A job's place in the order of turns: its rank, then when it arrived.
pub(crate) type Place = (i64, u64);

/// What a lease and the queue share: who works on the job, how far that is, and whether it is to
/// end early.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) token: Token,
    pub(crate) stop: Stop,
    /// The job is of no use if it has not been claimed by then.
    pub(super) expires: Option<Instant>,
    /// The model that the job asks for; empty for whichever is the default.
    pub(crate) model: Arc<str>,
    pub(crate) place: Place,
    phase: AtomicU8,
    tokens: AtomicU32,
    /// Others have changed the key since it was claimed; the job is the same as far as its content
    /// tells, which leaves out a picture that came with it.
    is_touched: AtomicBool,
}

impl Claim {
    pub(super) fn new(
        token: Token,
        expires: Option<Instant>,
        model: Arc<str>,
        place: Place,
    ) -> Self {
        Self {
            token,
            model,
            place,
            stop: Stop::default(),
            expires,
            phase: AtomicU8::default(),
            tokens: AtomicU32::default(),
            is_touched: AtomicBool::default(),
        }
    }

    pub(super) fn touch(&self) {
        self.is_touched.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_touched(&self) -> bool {
        self.is_touched.load(Ordering::Relaxed)
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

    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

/// A job that is worked on.
pub(crate) struct Lease {
    queue: Arc<Queue>,
    key: JobKey,
    /// There until the lease is dropped.
    claim: Option<Arc<Claim>>,
}

impl Lease {
    pub(super) fn new(queue: Arc<Queue>, key: JobKey, claim: Arc<Claim>) -> Self {
        Self { queue, key, claim: Some(claim) }
    }

    pub(crate) fn key(&self) -> &JobKey {
        &self.key
    }

    pub(crate) fn claim(&self) -> &Arc<Claim> {
        self.claim.as_ref().expect("a lease has its claim until it is dropped")
    }

    /// Whether the job is no longer this lease's: its key has gone, or holds something else.
    pub(crate) fn is_stopped(&self) -> bool {
        self.claim().stop.is_stopped()
    }

    /// The picture is here: its host and its user may have another download.
    pub(crate) fn downloaded(&self) {
        self.queue.change(|scheduler| scheduler.downloaded(&self.key, self.claim()));
    }

    /// There is nothing to give back: the job has ended, or is not there.
    pub(crate) fn end(mut self) {
        if let Some(claim) = self.claim.take() {
            self.queue.change(|scheduler| scheduler.release(&self.key, claim));
        }
    }

    /// The claim could not be written: back to its place. It is not tried before `until`, and no
    /// other is if the server takes no writes at all.
    pub(crate) fn refused(self, refused: Refused, until: Instant) {
        self.queue.change(|scheduler| match refused {
            Refused::All => scheduler.hold(until),
            Refused::This => scheduler.postpone(&self.key, self.claim(), until),
        });
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            self.queue.change(|scheduler| scheduler.give_back(&self.key, claim));
        }
    }
}
