//! Texts of answers on their way to the streams of `TOKENS`: engines hand over what is new after a
//! step, the committer takes all of it at once. While it is behind, pieces of one text are joined, so
//! there is never more here than the texts of the jobs at work.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crossbeam_channel::Sender;
use florence_engine::Stop;
use indexmap::IndexMap;
use parking_lot::Mutex;
use redis_module::Context;

use super::{
    commit::{Commit, Deadline},
    guarded,
};
use crate::{
    job::{JobKey, Token, life},
    news::{self, Piece},
    queue::Lease,
    server::{self, Refused, can_write},
};

/// A claimed job whose text goes to a stream.
pub(super) struct Listener {
    key: JobKey,
    token: Token,
    attempt: i64,
    stream: Arc<[u8]>,
    /// Told when the job is no longer the claim's.
    stop: Stop,
    /// Whether the log has it that the stream cannot be written.
    has_failed: AtomicBool,
}

impl Listener {
    pub(super) fn new(lease: &Lease, attempt: i64, stream: Arc<[u8]>) -> Self {
        let claim = lease.claim();
        Self {
            key: lease.key().clone(),
            token: claim.token.clone(),
            attempt,
            stream,
            stop: claim.stop.clone(),
            has_failed: AtomicBool::new(false),
        }
    }

    /// Adds a piece; one that the stream does not take is dropped.
    fn write(
        &self,
        ctx: &Context,
        (step, index): (usize, usize),
        text: &str,
    ) -> Result<(), Refused> {
        let piece = Piece { job: &self.key.name, attempt: self.attempt, step, index, text };
        let Err(error) = news::add_piece(ctx, &self.stream, &piece) else { return Ok(()) };
        if Refused::of(&error) == Refused::All {
            return Err(Refused::All);
        }
        if !self.has_failed.swap(true, Ordering::Relaxed) {
            let (job, stream) =
                (server::printable(&self.key.name), server::printable(&self.stream));
            news::warn(&format!("the text of job '{job}' cannot be added to '{stream}': {error}"));
        }
        Ok(())
    }
}

/// One text of a job: its claim, its step and its place there.
type TextId = (String, usize, usize);

/// Texts by question, in the order in which they began.
#[derive(Default)]
pub(super) struct Texts(IndexMap<TextId, (Arc<Listener>, String)>);

impl Texts {
    fn add(&mut self, listener: &Arc<Listener>, (step, index): (usize, usize), text: &str) {
        let place = (listener.token.as_str().to_owned(), step, index);
        let new = || (Arc::clone(listener), String::new());
        self.0.entry(place).or_insert_with(new).1.push_str(text);
    }

    /// Appends what came later.
    fn join(&mut self, later: Self) {
        for ((_, step, index), (listener, text)) in later.0 {
            self.add(&listener, (step, index), &text);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those that have text here.
    pub(super) fn claims(&self) -> HashSet<String> {
        self.0.keys().map(|(claim, ..)| claim.clone()).collect()
    }

    /// Writes them to their streams, of jobs that are still worked on; keeps what the server does not
    /// take now, and what is too much for one lock section.
    pub(super) fn write(&mut self, ctx: &Context, deadline: Deadline) -> Result<(), Refused> {
        self.0.retain(|_, (listener, _)| !listener.stop.is_stopped());
        if !self.is_empty() && !can_write(ctx) {
            return Err(Refused::All);
        }
        let mut texts = std::mem::take(&mut self.0).into_iter();
        while !deadline.is_past()
            && let Some((place, (listener, text))) = texts.next()
        {
            let write = || {
                if life::is_claimed(ctx, &listener.key, &listener.token) {
                    listener.write(ctx, (place.1, place.2), &text)
                } else {
                    Ok(())
                }
            };
            if let Some(Err(refused)) = guarded(ctx, &listener.key, write) {
                self.0 = std::iter::once((place, (listener, text))).chain(texts).collect();
                return Err(refused);
            }
        }
        self.0 = texts.collect();
        Ok(())
    }
}

/// What has not been taken yet.
#[derive(Default)]
pub(super) struct Pieces {
    texts: Mutex<Texts>,
    /// Whether the committer has been told of them.
    is_told: AtomicBool,
}

impl Pieces {
    pub(super) fn add(&self, listener: &Arc<Listener>, place: (usize, usize), text: &str) {
        self.texts.lock().add(listener, place, text);
    }

    /// Tells the committer once that there is something to take.
    pub(super) fn tell(&self, commits: &Sender<Commit>) {
        if !self.texts.lock().is_empty() && !self.is_told.swap(true, Ordering::Relaxed) {
            // As with all that is sent to it.
            let _ = commits.send(Commit::Told);
        }
    }

    /// Hands over all that there is.
    pub(super) fn take_into(&self, texts: &mut Texts) {
        self.is_told.store(false, Ordering::Relaxed);
        texts.join(std::mem::take(&mut *self.texts.lock()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Db;

    fn listener(token: &str) -> Arc<Listener> {
        Arc::new(Listener {
            key: JobKey { db: Db(0), name: b"job"[..].into() },
            token: Token::parse(token.to_owned()),
            attempt: 1,
            stream: b"s"[..].into(),
            stop: Stop::default(),
            has_failed: AtomicBool::new(false),
        })
    }

    #[test]
    fn pieces_of_a_text_are_joined_and_those_of_others_kept_apart() {
        let (a, b) = (listener("a"), listener("b"));
        let pieces = Pieces::default();
        for (listener, place, text) in
            [(&a, (0, 0), "1"), (&b, (0, 0), "x"), (&a, (0, 1), "5"), (&a, (0, 0), "2")]
        {
            pieces.add(listener, place, text);
        }
        let mut texts = Texts::default();
        pieces.take_into(&mut texts);
        assert!(pieces.texts.lock().is_empty());
        // What could not be written is continued.
        pieces.add(&a, (0, 0), "3");
        pieces.take_into(&mut texts);
        let found: Vec<_> = texts
            .0
            .iter()
            .map(|((token, ..), (_, text))| (token.as_str(), text.as_str()))
            .collect();
        assert_eq!(found, [("a", "123"), ("b", "x"), ("a", "5")]);
    }

    #[test]
    fn the_committer_is_told_once() {
        let (commits, outbox) = crossbeam_channel::unbounded();
        let pieces = Pieces::default();
        pieces.tell(&commits);
        assert!(outbox.is_empty());
        for _ in 0..3 {
            pieces.add(&listener("a"), (0, 0), "1");
            pieces.tell(&commits);
        }
        assert_eq!(outbox.len(), 1);
        pieces.take_into(&mut Texts::default());
        pieces.add(&listener("a"), (0, 0), "1");
        pieces.tell(&commits);
        assert_eq!(outbox.len(), 2);
    }
}
