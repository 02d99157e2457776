//! The engine thread: jobs join and leave a batch that is decoded step by step.
//!
//! A job joins as soon as it is prepared and there is room; who asks what is just being answered
//! shares that answer. Jobs never wait for a batch to fill.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{Answer, Batch, Error, Florence, GenerateOptions, Question, Visual};
use redis_module::Context;

use super::{
    Failure, can_write,
    commit::Commit,
    elapsed_ms,
    prepare::{Claimed, Input, Work},
    with_server,
};
use crate::{
    cache::{CACHES, Keys, Verdict},
    config,
    job::{self, State},
    state::{Counters, SHARED},
};

/// One request in the batch, and all jobs that wait for its answer.
struct Ticket {
    claimants: Vec<Claimant>,
    question: Question,
    visual: Visual,
    options: GenerateOptions,
    keys: Keys,
    is_shared: bool,
}

struct Claimant {
    claimed: Claimed,
    fetch_ms: u64,
    verdict: Verdict,
    since: Instant,
}

struct Engine<'a> {
    florence: &'a Florence,
    batch: Batch<'a, Ticket>,
    commits: &'a Sender<Commit>,
}

pub(super) fn run(florence: &Florence, inbox: &Receiver<Work>, commits: &Sender<Commit>) {
    let mut engine = Engine { florence, batch: Batch::new(florence), commits };
    loop {
        if engine.batch.is_empty() {
            let Ok(work) = inbox.recv() else { return };
            engine.take(work);
        }
        let start = Instant::now();
        while engine.batch.len() < config::size(&config::MAX_BATCH) {
            let Ok(work) = inbox.try_recv() else { break };
            engine.take(work);
        }
        engine.step();
        Counters::add(&SHARED.counters.infer_ms, elapsed_ms(start));
    }
}

impl Engine<'_> {
    /// Answers a job from the cache, or lets it join a request or the batch.
    fn take(&mut self, work: Work) {
        let Work { claimed, question, input, keys, fetch_ms } = work;
        let options = claimed.options.clone();
        let is_shared = !claimed.no_cache;
        let mut claimant =
            Claimant { claimed, fetch_ms, verdict: Verdict::Miss, since: Instant::now() };
        if claimant.claimed.is_over() {
            return self.end(claimant, Err(interrupted));
        }
        if is_shared {
            if let Some(answer) = CACHES.answer(&keys) {
                claimant.verdict = Verdict::Result;
                return self.end(claimant, Ok(&answer));
            }
            let is_same =
                |ticket: &&mut Ticket| ticket.is_shared && ticket.keys.is_same_request(&keys);
            if let Some(ticket) = self.batch.tickets_mut().find(is_same) {
                with_server(|ctx| mark_running(ctx, &claimant.claimed));
                claimant.verdict = Verdict::Result;
                ticket.claimants.push(claimant);
                return;
            }
        }
        with_server(|ctx| mark_running(ctx, &claimant.claimed));
        let visual = match self.visual(input, &keys, is_shared) {
            Ok((visual, verdict)) => {
                claimant.verdict = verdict;
                visual
            }
            Err(_) => return self.end(claimant, Err(|_| Failure::internal())),
        };
        let claimants = vec![claimant];
        self.join(Ticket { claimants, question, visual, options, keys, is_shared });
    }

    fn visual(
        &self,
        input: Input,
        keys: &Keys,
        is_shared: bool,
    ) -> Result<(Visual, Verdict), Error> {
        let picture = match input {
            Input::Seen(visual) => return Ok((visual, Verdict::Features)),
            Input::Picture(picture) => picture,
        };
        // Another job may have encoded it since this one was prepared.
        if let Some(visual) = CACHES.visual(keys).filter(|_| is_shared) {
            return Ok((visual, Verdict::Features));
        }
        let visual = guarded(|| self.florence.visual(&picture))?;
        if is_shared {
            CACHES.keep_visual(keys, &visual);
        }
        Ok((visual, Verdict::Miss))
    }

    fn join(&mut self, ticket: Ticket) {
        let (question, visual) = (ticket.question.clone(), ticket.visual.clone());
        let options = ticket.options.clone();
        if guarded(|| self.batch.join(ticket, &question, &visual, &options)).is_err() {
            self.restart();
        }
    }

    /// One decoder step; ends the jobs that are answered, cancelled or out of time.
    fn step(&mut self) {
        let mut over = Vec::new();
        for ticket in self.batch.tickets_mut() {
            over.extend(ticket.claimants.extract_if(.., |claimant| claimant.claimed.is_over()));
        }
        for claimant in over {
            self.end(claimant, Err(interrupted));
        }
        self.batch.retain(|ticket| !ticket.claimants.is_empty());
        if self.batch.is_empty() {
            return;
        }
        Counters::add(&SHARED.counters.decoder_steps, 1);
        match guarded(|| self.batch.step()) {
            Ok(answered) => {
                for (ticket, answer) in answered {
                    self.answer(ticket, answer);
                }
            }
            Err(_) => self.restart(),
        }
    }

    fn answer(&self, ticket: Ticket, answer: Answer) {
        let answer = Arc::new(answer);
        if ticket.is_shared {
            CACHES.keep_answer(&ticket.keys, &answer);
        }
        for claimant in ticket.claimants {
            self.end(claimant, Ok(&answer));
        }
    }

    /// After a failure of the batch as a whole: each of its jobs alone, so that one cannot harm
    /// the others.
    fn restart(&mut self) {
        for ticket in self.batch.clear() {
            let mut alone = Batch::new(self.florence);
            let (question, visual) = (ticket.question.clone(), ticket.visual.clone());
            let options = ticket.options.clone();
            let run = || {
                alone.join((), &question, &visual, &options)?;
                loop {
                    if let Some(((), answer)) = alone.step()?.pop() {
                        return Ok(answer);
                    }
                    if ticket.claimants.iter().all(|claimant| claimant.claimed.is_over()) {
                        return Err(Error::Cancelled);
                    }
                }
            };
            match guarded(run) {
                Ok(answer) => self.answer(ticket, answer),
                Err(_) => {
                    for claimant in ticket.claimants {
                        self.end(claimant, Err(|_| Failure::internal()));
                    }
                }
            }
        }
    }

    fn end(&self, claimant: Claimant, result: Result<&Arc<Answer>, fn(&Claimed) -> Failure>) {
        let Claimant { claimed, fetch_ms, verdict, since } = claimant;
        let result = result.map(Arc::clone).map_err(|failure| failure(&claimed));
        let infer_ms = elapsed_ms(since);
        // The committer goes only when the process does.
        let _ = self.commits.send(Commit { claimed, result, verdict, fetch_ms, infer_ms });
    }
}

/// A panic of the engine as its error.
fn guarded<T>(f: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_panic| {
        Counters::add(&SHARED.counters.panics, 1);
        Err(Error::Cancelled)
    })
}

/// Why a job ends before its answer.
fn interrupted(claimed: &Claimed) -> Failure {
    if claimed.control.is_stopped() {
        return Failure::permanent("CANCELLED", "the job was cancelled");
    }
    Failure { is_retryable: true, ..Failure::permanent("TIMEOUT", "the attempt took too long") }
}

/// Best effort: while writes are paused the job stays `fetching`, which loses nothing.
fn mark_running(ctx: &Context, claimed: &Claimed) {
    if can_write(ctx) && job::open(ctx, &claimed.key).is_ok_and(|job| claimed.holds(&job)) {
        let fields = vec![("state", State::Running.name().into())];
        let _ = job::write(ctx, &claimed.key.name, &fields);
    }
}
