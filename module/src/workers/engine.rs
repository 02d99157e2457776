//! The engine thread: jobs join and leave a batch that is decoded step by step.
//!
//! A job's questions join as soon as it is prepared and there is room; who asks what is just being
//! answered shares that answer. Jobs never wait for a batch to fill, nor for all others to join:
//! encoding a picture takes as long as many decoder steps, so each is followed by some of these.

use std::{
    cell::RefCell,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{Answer, Batch, Error, Florence, GenerateOptions, Question, Visual};
use redis_module::Context;

use super::{
    Failure, can_write,
    commit::Commit,
    elapsed_ms,
    prepare::{Claimed, Input, Part, Work},
    with_server,
};
use crate::{
    cache::{CACHES, Keys, Verdict},
    config,
    job::{self, State},
    scheduler::Phase,
    state::{Counters, SHARED},
};

/// For every so many seconds of encoding, one of decoder steps goes before the next picture.
const ENCODE_TO_DECODE: u32 = 8;

/// One request in the batch, and all that wait for its answer.
struct Ticket {
    claimants: Vec<Claimant>,
    question: Question,
    visual: Visual,
    options: GenerateOptions,
    keys: Keys,
    is_shared: bool,
    tokens: u32,
}

/// A job in the engine.
struct Pending {
    claimed: Claimed,
    answers: Vec<Option<Arc<Answer>>>,
    /// The picture, until it is encoded.
    input: Option<Input>,
    visual: Option<Visual>,
    verdict: Verdict,
    fetch_ms: u64,
    since: Instant,
    is_committed: bool,
}

/// A job's wish for one of its answers.
#[derive(Clone)]
struct Claimant {
    job: Rc<RefCell<Pending>>,
    /// Which of its prompts.
    index: usize,
}

impl Claimant {
    fn is_over(&self) -> bool {
        let job = self.job.borrow();
        job.is_committed || job.claimed.is_over()
    }
}

struct Engine<'a> {
    florence: &'a Florence,
    batch: Batch<'a, Ticket>,
    /// Questions of jobs that are in the engine but not in the batch.
    ready: VecDeque<(Claimant, Part)>,
    commits: &'a Sender<Commit>,
    /// Time spent since the last answer.
    busy: Duration,
    /// Time for decoder steps before another question is taken in.
    owed: Duration,
}

pub(super) fn run(florence: &Florence, inbox: &Receiver<Work>, commits: &Sender<Commit>) {
    let batch = Batch::new(florence);
    let (busy, owed) = (Duration::ZERO, Duration::ZERO);
    let mut engine = Engine { florence, batch, ready: VecDeque::new(), commits, busy, owed };
    loop {
        if engine.batch.is_empty() && engine.ready.is_empty() {
            let Ok(work) = inbox.recv() else { return };
            engine.admit(work);
        }
        let start = Instant::now();
        while engine.has_room() {
            if let Some((claimant, part)) = engine.ready.pop_front() {
                let start = Instant::now();
                engine.take(claimant, part);
                engine.owed = start.elapsed() / ENCODE_TO_DECODE;
            } else if let Ok(work) = inbox.try_recv() {
                engine.admit(work);
            } else {
                break;
            }
        }
        let encoded = Instant::now();
        let answered = engine.step();
        engine.owed = engine.owed.saturating_sub(encoded.elapsed());
        Counters::add(&SHARED.counters.infer_ms, elapsed_ms(start));
        engine.busy += start.elapsed();
        if answered > 0 {
            SHARED.pace.record(std::mem::take(&mut engine.busy), answered);
        }
    }
}

impl Engine<'_> {
    /// Whether another question may be taken in now.
    fn has_room(&self) -> bool {
        let is_owed = !self.owed.is_zero() && !self.batch.is_empty();
        !is_owed && self.batch.len() < config::size(&config::MAX_BATCH)
    }

    fn admit(&mut self, work: Work) {
        let Work { claimed, parts, input, fetch_ms } = work;
        let job = Rc::new(RefCell::new(Pending {
            claimed,
            answers: vec![None; parts.len()],
            input: Some(input),
            visual: None,
            verdict: Verdict::Result,
            fetch_ms,
            since: Instant::now(),
            is_committed: false,
        }));
        with_server(|ctx| mark_running(ctx, &job.borrow().claimed));
        job.borrow().claimed.control.enter(Phase::Encoding);
        for (index, part) in parts.into_iter().enumerate() {
            self.ready.push_back((Claimant { job: Rc::clone(&job), index }, part));
        }
    }

    /// Answers a question from the cache, or lets it join a request or the batch.
    fn take(&mut self, claimant: Claimant, part: Part) {
        let Part { question, keys } = part;
        if claimant.is_over() {
            return self.interrupt(&claimant);
        }
        let is_shared = !claimant.job.borrow().claimed.no_cache;
        if is_shared {
            if let Some(answer) = CACHES.answer(&keys) {
                return self.give(&claimant, &answer);
            }
            let is_same =
                |ticket: &&mut Ticket| ticket.is_shared && ticket.keys.is_same_request(&keys);
            if let Some(ticket) = self.batch.tickets_mut().find(is_same) {
                ticket.claimants.push(claimant);
                return;
            }
        }
        let Ok(visual) = self.visual(&claimant, &keys, is_shared) else {
            return self.end(&claimant, Err(Failure::internal()));
        };
        let options = claimant.job.borrow().claimed.options.clone();
        let claimants = vec![claimant];
        self.join(Ticket { claimants, question, visual, options, keys, is_shared, tokens: 0 });
    }

    /// The encoded picture of a job; its other questions find it there.
    fn visual(&self, claimant: &Claimant, keys: &Keys, is_shared: bool) -> Result<Visual, Error> {
        let mut job = claimant.job.borrow_mut();
        if let Some(visual) = &job.visual {
            return Ok(visual.reused());
        }
        // Another job may have encoded it since this one was prepared.
        let known = CACHES.visual(keys).filter(|_| is_shared);
        let (visual, verdict) = match (known, job.input.take()) {
            (Some(visual), _) | (None, Some(Input::Seen(visual))) => (visual, Verdict::Features),
            (None, Some(Input::Picture(picture))) => {
                let visual = guarded(|| self.florence.visual(&picture))?;
                if is_shared {
                    CACHES.keep_visual(keys, &visual);
                }
                (visual, Verdict::Miss)
            }
            (None, None) => return Err(Error::Cancelled),
        };
        job.visual = Some(visual.clone());
        job.verdict = verdict;
        Ok(visual)
    }

    fn join(&mut self, ticket: Ticket) {
        let (question, visual) = (ticket.question.clone(), ticket.visual.clone());
        let options = ticket.options.clone();
        if guarded(|| self.batch.join(ticket, &question, &visual, &options)).is_err() {
            self.restart();
        }
    }

    /// One decoder step; ends the jobs that are answered, cancelled or out of time. Returns the
    /// number of answers.
    fn step(&mut self) -> usize {
        let mut over = Vec::new();
        for ticket in self.batch.tickets_mut() {
            over.extend(ticket.claimants.extract_if(.., |claimant| claimant.is_over()));
        }
        for claimant in over {
            self.interrupt(&claimant);
        }
        self.batch.retain(|ticket| !ticket.claimants.is_empty());
        if self.batch.is_empty() {
            return 0;
        }
        Counters::add(&SHARED.counters.decoder_steps, 1);
        for ticket in self.batch.tickets_mut() {
            ticket.tokens += 1;
            for claimant in &ticket.claimants {
                let control = &claimant.job.borrow().claimed.control;
                control.enter(Phase::Generating);
                control.set_tokens(ticket.tokens);
            }
        }
        let Ok(answered) = guarded(|| self.batch.step()) else {
            self.restart();
            return 0;
        };
        let count = answered.len();
        for (ticket, answer) in answered {
            self.answer(ticket, answer);
        }
        count
    }

    fn answer(&self, ticket: Ticket, answer: Answer) {
        let answer = Arc::new(answer);
        if ticket.is_shared {
            CACHES.keep_answer(&ticket.keys, &answer);
        }
        for claimant in ticket.claimants {
            self.give(&claimant, &answer);
        }
    }

    /// After a failure of the batch as a whole: each of its requests alone, so that one cannot
    /// harm the others.
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
                    if ticket.claimants.iter().all(Claimant::is_over) {
                        return Err(Error::Cancelled);
                    }
                }
            };
            match guarded(run) {
                Ok(answer) => self.answer(ticket, answer),
                Err(_) => {
                    for claimant in &ticket.claimants {
                        self.end(claimant, Err(Failure::internal()));
                    }
                }
            }
        }
    }

    /// One of a job's answers; with the last one it is done.
    fn give(&self, claimant: &Claimant, answer: &Arc<Answer>) {
        let answers: Option<Vec<_>> = {
            let mut job = claimant.job.borrow_mut();
            job.answers[claimant.index] = Some(Arc::clone(answer));
            job.answers.iter().cloned().collect()
        };
        if let Some(answers) = answers {
            self.end(claimant, Ok(answers));
        }
    }

    /// Ends a job that was cancelled or ran out of time.
    fn interrupt(&self, claimant: &Claimant) {
        let is_stopped = claimant.job.borrow().claimed.control.is_stopped();
        let failure = if is_stopped {
            Failure::permanent("CANCELLED", "the job was cancelled")
        } else {
            Failure::timeout()
        };
        self.end(claimant, Err(failure));
    }

    /// Hands a job to the committer, once.
    fn end(&self, claimant: &Claimant, result: Result<Vec<Arc<Answer>>, Failure>) {
        let mut job = claimant.job.borrow_mut();
        if std::mem::replace(&mut job.is_committed, true) {
            return;
        }
        let commit = Commit {
            claimed: job.claimed.clone(),
            result,
            verdict: job.verdict,
            fetch_ms: job.fetch_ms,
            infer_ms: elapsed_ms(job.since),
        };
        // The committer goes only when the process does.
        let _ = self.commits.send(commit);
    }
}

/// A panic of the engine as its error.
fn guarded<T>(f: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_panic| {
        Counters::add(&SHARED.counters.panics, 1);
        Err(Error::Cancelled)
    })
}

/// Best effort: while writes are paused the job stays `fetching`, which loses nothing.
fn mark_running(ctx: &Context, claimed: &Claimed) {
    if can_write(ctx) && job::open(ctx, &claimed.key).is_ok_and(|job| claimed.holds(&job)) {
        let fields = vec![("state", State::Running.name().into())];
        let _ = job::write(ctx, &claimed.key.name, &fields);
    }
}
