//! The loop: which questions are in the batch, and who hears of their answers.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Asker, Caches, Failure, Input, Keys, Part, Served, Turn, Verdict, Wants, Watch, Work,
    admission::Admission,
    machine::{Machine, RequestId},
};
use crate::{Answer, Error, GenerateOptions, Picture, Question, Reservation, Visual, catch_panic};

type JobId = u64;

/// A job in the engine.
struct Job<A> {
    asker: A,
    answers: Vec<Option<Arc<Answer>>>,
    pictures: Vec<Slot>,
    options: GenerateOptions,
    is_shared: bool,
    verdict: Verdict,
    since: Instant,
}

/// A picture of a job.
struct Slot {
    /// Until it is encoded.
    input: Option<Input>,
    visual: Option<Visual>,
}

/// One of a job's questions, by its place.
#[derive(Debug, Clone, Copy)]
struct Claimant {
    job: JobId,
    index: usize,
    /// Bytes of the answer's text that the asker was told.
    heard: usize,
}

/// A request in the batch, and all that wait for its answer.
struct Request {
    claimants: Vec<Claimant>,
    question: Question,
    visual: Visual,
    options: GenerateOptions,
    keys: Keys,
    is_shared: bool,
    tokens: u32,
    /// What is known of the answer's text, if anyone listens.
    text: String,
    /// For its keys and values.
    _room: Reservation,
}

impl Request {
    /// The jobs that wait for it, each for as many of its questions.
    fn jobs(&self) -> impl Iterator<Item = JobId> {
        self.claimants.iter().map(|claimant| claimant.job)
    }
}

pub(super) struct Serving<'a, M, A> {
    machine: M,
    caches: &'a Caches,
    watch: &'a dyn Watch,
    jobs: BTreeMap<JobId, Job<A>>,
    requests: BTreeMap<RequestId, Request>,
    /// Questions of jobs that are in the engine but not in the batch.
    ready: VecDeque<(Claimant, Part)>,
    /// Answers of this turn, which are told at its end.
    answered: Vec<(Request, Answer)>,
    admission: Admission,
    /// Most pictures that are encoded together: fewer after that has failed.
    together: usize,
    ids: u64,
    /// Why the machine can do no more.
    lost: Option<Failure>,
}

impl<'a, M: Machine, A: Asker> Serving<'a, M, A> {
    pub(super) fn new(machine: M, caches: &'a Caches, watch: &'a dyn Watch) -> Self {
        Self {
            machine,
            caches,
            watch,
            jobs: BTreeMap::new(),
            requests: BTreeMap::new(),
            ready: VecDeque::new(),
            answered: Vec::new(),
            admission: Admission::default(),
            together: usize::MAX,
            ids: 0,
            lost: None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Why the machine can do no more, if it cannot.
    pub(super) fn take_lost(&mut self) -> Option<Failure> {
        self.lost.take()
    }

    fn new_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub(super) fn admit(&mut self, work: Work<A>) {
        let Work { asker, parts, inputs, options, is_shared } = work;
        asker.started();
        if parts.is_empty() {
            let (answers, verdict) = (Vec::new(), Verdict::Result);
            let time = Duration::ZERO;
            return asker.answered(Served { answers, input: None, verdict, time });
        }
        let id = self.new_id();
        let job = Job {
            asker,
            answers: vec![None; parts.len()],
            pictures: inputs
                .into_iter()
                .map(|input| Slot { input: Some(input), visual: None })
                .collect(),
            options,
            is_shared,
            verdict: Verdict::Result,
            since: self.machine.now(),
        };
        self.jobs.insert(id, job);
        for (index, part) in parts.into_iter().enumerate() {
            self.ready.push_back((Claimant { job: id, index, heard: 0 }, part));
        }
    }

    /// All have waited for so long.
    pub(super) fn wait(&self, time: Duration) {
        self.jobs.values().for_each(|job| job.asker.waited(time));
    }

    /// Some jobs were worked for, each for as many questions as it is named: that is its share of
    /// the time, and for the rest of it every job has waited.
    fn charge(&self, time: Duration, worked_for: &[JobId]) {
        let mut shares: BTreeMap<JobId, u32> = BTreeMap::new();
        for id in worked_for {
            *shares.entry(*id).or_default() += 1;
        }
        let all = shares.values().sum::<u32>().max(1);
        for (id, job) in &self.jobs {
            let own = time * shares.get(id).copied().unwrap_or_default() / all;
            job.asker.waited(time.saturating_sub(own));
        }
    }

    /// Takes in what there is room for, then makes one decoder step.
    pub(super) fn turn(&mut self, arrivals: &mut dyn FnMut() -> Option<Work<A>>) {
        let start = self.machine.now();
        self.sweep();
        while self.lost.is_none() && self.admission.admits(self.requests.len(), self.watch.most()) {
            let enough = self.machine.pictures_at_once().min(self.together);
            if self.ready.len() < enough
                && let Some(work) = arrivals()
            {
                self.admit(work);
                continue;
            }
            if self.share_next() {
                continue;
            }
            let Some(room) = self.room_for_next() else { break };
            let start = self.machine.now();
            self.encode_together(enough);
            let Some((claimant, part)) = self.ready.pop_front() else { break };
            let alone = self.machine.now();
            let joined = self.join(claimant, part, room);
            self.charge(self.machine.now() - alone, &[claimant.job]);
            if joined.is_err() {
                self.restart();
            }
            self.admission.encoded(self.machine.now() - start);
        }
        let encoded = self.machine.now();
        let has_stepped = !self.requests.is_empty();
        if has_stepped {
            let jobs: Vec<JobId> = self.requests.values().flat_map(Request::jobs).collect();
            let stepped = self.step();
            self.charge(self.machine.now() - encoded, &jobs);
            if stepped.is_err() {
                self.restart();
            }
        }
        let now = self.machine.now();
        self.admission.stepped(now - encoded);
        let answers = self.answered.len();
        // Whoever has an answer finds it counted.
        self.watch.turned(&Turn { time: now - start, has_stepped, answers });
        for (request, answer) in std::mem::take(&mut self.answered) {
            self.answer(request, answer);
        }
        if let Some(failure) = self.lost.clone() {
            for id in self.jobs.keys().copied().collect::<Vec<_>>() {
                self.fail(id, failure.clone());
            }
        }
    }

    /// Ends the jobs that are not wanted any more, and drops what only they asked.
    fn sweep(&mut self) {
        let now = self.machine.now();
        let over = |(id, job): (&JobId, &Job<A>)| {
            let failure = match job.asker.wants(now) {
                Wants::Answers => return None,
                Wants::Nothing => Failure::Cancelled,
                Wants::TooLate => Failure::Late,
            };
            Some((*id, failure))
        };
        for (id, failure) in self.jobs.iter().filter_map(over).collect::<Vec<_>>() {
            self.fail(id, failure);
        }
        let Self { machine, jobs, requests, ready, .. } = self;
        ready.retain(|(claimant, _)| jobs.contains_key(&claimant.job));
        for request in requests.values_mut() {
            request.claimants.retain(|claimant| jobs.contains_key(&claimant.job));
        }
        requests.retain(|_, request| !request.claimants.is_empty());
        machine.retain(&|id| requests.contains_key(&id));
    }

    /// Room for the next question's keys and values; nothing, if there is none or no question.
    fn room_for_next(&self) -> Option<Reservation> {
        let (claimant, part) = self.ready.front()?;
        let options = self.jobs.get(&claimant.job).map(|job| &job.options)?;
        let bytes = self.machine.kv_cache_bytes(&part.question, options);
        self.watch.kv_cache().reserve_now(bytes, self.requests.is_empty())
    }

    /// Gives the next question an answer from the cache, or lets it wait for that of a request in the
    /// batch; whether there is one. Neither needs room or time.
    fn share_next(&mut self) -> bool {
        let Self { jobs, requests, ready, caches, .. } = self;
        let is_shared =
            |claimant: &Claimant| jobs.get(&claimant.job).is_some_and(|job| job.is_shared);
        let Some(&(mut claimant, Part { keys, .. })) =
            ready.front().filter(|(claimant, _)| is_shared(claimant))
        else {
            return false;
        };
        let is_same =
            |request: &&mut Request| request.is_shared && request.keys.is_same_request(&keys);
        let cached = caches.answer(&keys);
        if cached.is_none() {
            let Some(request) = requests.values_mut().find(is_same) else { return false };
            hear(jobs, &mut claimant, &request.text);
            request.claimants.push(claimant);
        }
        ready.pop_front();
        if let Some(answer) = cached {
            self.give(claimant, &answer);
        }
        true
    }

    /// Lets a question join the batch. The error: the batch, this question included, has to begin
    /// again.
    fn join(&mut self, claimant: Claimant, part: Part, room: Reservation) -> Result<(), Failure> {
        let Part { question, picture, keys } = part;
        let Some(job) = self.jobs.get(&claimant.job) else { return Ok(()) };
        let (is_shared, options) = (job.is_shared, job.options.clone());
        let visual = match self.visual(claimant.job, picture, &keys) {
            Ok(visual) => visual,
            Err(failure) => {
                self.fail(claimant.job, failure);
                self.check();
                return Ok(());
            }
        };
        let id = self.new_id();
        let joined = guarded(|| self.machine.join(id, &question, &visual, &options));
        let claimants = vec![claimant];
        let (tokens, text) = (0, String::new());
        let request = Request {
            claimants,
            question,
            visual,
            options,
            keys,
            is_shared,
            tokens,
            text,
            _room: room,
        };
        self.requests.insert(id, request);
        joined.inspect_err(|failure| self.watch.stumbled(failure))
    }

    /// The pictures of the next questions that nobody has encoded, each once, as many as there is
    /// room for.
    fn unseen(&self, most: usize) -> Vec<(JobId, usize, Keys)> {
        let room = self.watch.most().saturating_sub(self.requests.len()).min(most);
        let mut chosen: Vec<(JobId, usize, Keys)> = Vec::new();
        for (claimant, Part { picture, keys, .. }) in &self.ready {
            let job = self.jobs.get(&claimant.job);
            let Some(job) = job.filter(|_| chosen.len() < room) else { break };
            let slot = job.pictures.get(*picture);
            let is_raw = slot.is_some_and(|slot| matches!(slot.input, Some(Input::Picture(_))));
            let is_chosen = chosen.iter().any(|(id, index, other)| {
                (id, index) == (&claimant.job, picture)
                    || (job.is_shared && other.is_same_picture(keys))
            });
            let is_known = job.is_shared
                && (self.caches.answer(keys).is_some() || self.caches.visual(keys).is_some());
            if is_raw && !is_chosen && !is_known {
                chosen.push((claimant.job, *picture, *keys));
            }
        }
        chosen
    }

    /// Encodes the pictures of the next questions, if there are several that nobody has encoded.
    fn encode_together(&mut self, most: usize) {
        let chosen = if most < 2 { Vec::new() } else { self.unseen(most) };
        if chosen.len() < 2 {
            return;
        }
        let start = self.machine.now();
        let Self { machine, caches, jobs, watch, together, .. } = self;
        let picture = |(id, index, _): &(JobId, usize, Keys)| match jobs
            .get(id)?
            .pictures
            .get(*index)?
            .input
            .as_ref()?
        {
            Input::Picture(picture) => Some(picture),
            Input::Seen(_) => None,
        };
        let pictures: Vec<&Picture> = chosen.iter().filter_map(picture).collect();
        match guarded(|| machine.visuals(&pictures)) {
            Ok(visuals) => {
                *together = together.saturating_mul(2);
                for ((id, index, keys), visual) in chosen.iter().zip(visuals) {
                    if let Some(job) = jobs.get_mut(id)
                        && let Some(slot) = job.pictures.get_mut(*index)
                    {
                        if job.is_shared {
                            caches.keep_visual(keys, &visual);
                        }
                        (slot.visual, slot.input) = (Some(visual), None);
                        job.verdict = Verdict::Miss;
                    }
                }
            }
            Err(failure) => {
                // Each is tried alone when its turn comes: one cannot harm the others.
                watch.stumbled(&failure);
                // Two at least: what has failed once may do well later.
                *together = (pictures.len() / 2).max(2);
            }
        }
        let jobs: Vec<JobId> = chosen.iter().map(|(id, ..)| *id).collect();
        self.charge(self.machine.now() - start, &jobs);
    }

    /// An encoded picture of a job; its other questions find it there.
    fn visual(&mut self, id: JobId, index: usize, keys: &Keys) -> Result<Visual, Failure> {
        let Self { machine, caches, jobs, .. } = self;
        let job = jobs.get_mut(&id).ok_or(Failure::Cancelled)?;
        let slot = job.pictures.get_mut(index).ok_or(Failure::Cancelled)?;
        if let Some(visual) = &slot.visual {
            return Ok(visual.reused());
        }
        // Another job may have encoded it since this one was prepared.
        let known = caches.visual(keys).filter(|_| job.is_shared);
        let (visual, verdict) = match (known, slot.input.take()) {
            (Some(visual), _) | (None, Some(Input::Seen(visual))) => (visual, Verdict::Features),
            (None, Some(Input::Picture(picture))) => {
                let encoded = guarded(|| machine.visuals(&[&picture]))?;
                let visual = encoded.into_iter().next().ok_or(Failure::Cancelled)?;
                if job.is_shared {
                    caches.keep_visual(keys, &visual);
                }
                (visual, Verdict::Miss)
            }
            (None, None) => return Err(Failure::Cancelled),
        };
        slot.visual = Some(visual.clone());
        job.verdict = job.verdict.max(verdict);
        Ok(visual)
    }

    /// One decoder step. The error: the batch has to begin again.
    fn step(&mut self) -> Result<(), Failure> {
        for request in self.requests.values_mut() {
            request.tokens += 1;
            for claimant in &request.claimants {
                if let Some(job) = self.jobs.get(&claimant.job) {
                    job.asker.generated(request.tokens);
                }
            }
        }
        let answered =
            guarded(|| self.machine.step()).inspect_err(|failure| self.watch.stumbled(failure))?;
        let Self { requests, .. } = self;
        let of = |(id, answer)| Some((requests.remove(&id)?, answer));
        self.answered.extend(answered.into_iter().filter_map(of));
        self.tell();
        Ok(())
    }

    /// Tells more of the answers' texts to those who listen.
    fn tell(&mut self) {
        let Self { machine, jobs, requests, .. } = self;
        let listens =
            |claimant: &Claimant| jobs.get(&claimant.job).is_some_and(|job| job.asker.listens());
        let is_wanted = |id: RequestId| {
            requests.get(&id).is_some_and(|request| request.claimants.iter().any(listens))
        };
        let mut more: Vec<(RequestId, String)> = Vec::new();
        let mut tell = |id, text: &str| more.push((id, text.to_owned()));
        // Where it fails, the rest comes with the answer.
        let _ = catch_panic(|| machine.tell(&is_wanted, &mut tell));
        for (id, text) in more {
            let Some(request) = requests.get_mut(&id) else { continue };
            request.text.push_str(&text);
            for claimant in &mut request.claimants {
                hear(jobs, claimant, &request.text);
            }
        }
    }

    fn answer(&mut self, mut request: Request, answer: Answer) {
        // One that was begun again may differ on a GPU: what was told cannot be taken back.
        if !answer.text.starts_with(&request.text) {
            request.claimants.iter_mut().for_each(|claimant| claimant.heard = answer.text.len());
        }
        let answer = Arc::new(answer);
        if request.is_shared {
            self.caches.keep_answer(&request.keys, &answer);
        }
        for claimant in request.claimants {
            self.give(claimant, &answer);
        }
    }

    /// After a failure of the batch as a whole: each of its requests alone, so that one cannot harm
    /// the others.
    fn restart(&mut self) {
        let mut has_failed = false;
        for (id, request) in std::mem::take(&mut self.requests) {
            self.machine.clear();
            self.sweep();
            let start = self.machine.now();
            let answer = self.alone(id, &request);
            self.charge(self.machine.now() - start, &request.jobs().collect::<Vec<_>>());
            match answer {
                Ok(answer) => self.answered.push((request, answer)),
                Err(failure) => {
                    has_failed = true;
                    for claimant in request.claimants {
                        self.fail(claimant.job, failure.clone());
                    }
                }
            }
        }
        self.machine.clear();
        if has_failed {
            self.check();
        }
    }

    /// After a failure: if the machine can do no more, nobody here gets another answer of it.
    pub(super) fn check(&mut self) {
        let Err(failure) = guarded(|| self.machine.check()) else { return };
        self.ready.clear();
        self.requests.clear();
        self.lost = Some(failure);
    }

    fn alone(&mut self, id: RequestId, request: &Request) -> Result<Answer, Failure> {
        let Request { claimants, question, visual, options, .. } = request;
        guarded(|| self.machine.join(id, question, visual, options))?;
        loop {
            let now = self.machine.now();
            let is_wanted = |claimant: &Claimant| {
                let job = self.jobs.get(&claimant.job);
                job.is_some_and(|job| job.asker.wants(now) == Wants::Answers)
            };
            if !claimants.iter().any(is_wanted) {
                return Err(Failure::Cancelled);
            }
            if let Some((_, answer)) = guarded(|| self.machine.step())?.pop() {
                return Ok(answer);
            }
        }
    }

    /// One of a job's answers; with the last one it is done.
    fn give(&mut self, mut claimant: Claimant, answer: &Arc<Answer>) {
        hear(&self.jobs, &mut claimant, &answer.text);
        let Some(job) = self.jobs.get_mut(&claimant.job) else { return };
        job.answers[claimant.index] = Some(Arc::clone(answer));
        if job.answers.iter().any(Option::is_none) {
            return;
        }
        if let Some(job) = self.jobs.remove(&claimant.job) {
            let time = self.machine.now() - job.since;
            let answers = job.answers.into_iter().flatten().collect();
            let first = job.pictures.into_iter().next();
            let input = first.and_then(|Slot { input, visual }| visual.map(Input::Seen).or(input));
            job.asker.answered(Served { answers, input, verdict: job.verdict, time });
        }
    }

    fn fail(&mut self, id: JobId, failure: Failure) {
        if let Some(job) = self.jobs.remove(&id) {
            let now = self.machine.now();
            // What is not wanted any more did not fail, whatever became of it.
            let failure = match job.asker.wants(now) {
                Wants::Answers => failure,
                Wants::Nothing => Failure::Cancelled,
                Wants::TooLate => Failure::Late,
            };
            job.asker.failed(failure, now - job.since);
        }
    }
}

/// Tells an asker that listens what it has not heard of a text.
fn hear<A: Asker>(jobs: &BTreeMap<JobId, Job<A>>, claimant: &mut Claimant, text: &str) {
    let Some(job) = jobs.get(&claimant.job).filter(|job| job.asker.listens()) else { return };
    if let Some(more) = text.get(claimant.heard..).filter(|more| !more.is_empty()) {
        job.asker.told(claimant.index, more);
        claimant.heard = text.len();
    }
}

fn guarded<T>(f: impl FnOnce() -> Result<T, Error>) -> Result<T, Failure> {
    match catch_panic(f) {
        Ok(result) => result.map_err(|error| Failure::Failed(Arc::new(error))),
        Err(text) => Err(Failure::Panicked(text)),
    }
}
