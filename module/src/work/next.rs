//! What is asked next about a job's picture: its first questions, or those that follow from answers.
//!
//! What the caches know is not asked. A chain comes back from the engine after each step, to a thread
//! of its own, so that nobody waits while parts are cut out of its picture.

use std::{ops::Deref, sync::Arc, time::Instant};

use crossbeam_channel::Receiver;
use florence_engine::{
    Answer, Error, Stop, catch_panic,
    chain::Asked,
    image::{self, DecodeLimits, Decoded, Orientation, Rgb},
    serve::{Input, Keys, Part, PictureKey, Work},
};

use super::infer::Claimant;
use crate::{
    figures::{self, latency},
    job::{Failure, Request},
    model::{self, Hosted, Loaded},
    queue::Phase,
    settings,
};

/// A picture as it came.
pub(super) enum Bytes {
    /// With the job.
    Sent(Arc<[u8]>),
    /// From elsewhere.
    Read(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Sent(bytes) => bytes,
            Self::Read(bytes) => bytes,
        }
    }
}

/// A job's picture, as far as it has been looked at.
pub(super) struct Picture {
    bytes: Bytes,
    key: PictureKey,
    orientation: Orientation,
    decoded: Option<Decoded>,
    /// The whole picture for the model.
    input: Option<Input>,
}

impl Picture {
    pub(super) fn new(bytes: Bytes, model: &Hosted, request: &Request) -> Self {
        let user = if settings::SHARED_CACHE.get() { "" } else { &request.user };
        // One model's answers are not another's, whatever it is called.
        let scope = format!("{} {user}", model.id);
        let key = PictureKey::new(&scope, &bytes, request.orientation);
        Self { bytes, key, orientation: request.orientation, decoded: None, input: None }
    }

    /// What the engine gives back of it.
    pub(super) fn keep(&mut self, input: Option<Input>) {
        self.input = input.or(self.input.take());
    }

    /// Decodes it, unless that was done.
    pub(super) fn decode(&mut self, claimant: &Claimant) -> Result<&Decoded, Failure> {
        if self.decoded.is_none() {
            let limits = decode_limits(&claimant.lease.claim().stop, claimant.attempt.clock.ends());
            let decoded = image::decode(&self.bytes, &limits, self.orientation);
            self.decoded = Some(decoded.map_err(|error| Failure::from(&Error::from(error)))?);
        }
        self.decoded.as_ref().ok_or_else(Failure::internal)
    }

    /// The small copy, if the job wants one; without one it goes on. Only parts need the picture
    /// after this.
    pub(super) fn thumbnail(&mut self, claimant: &Claimant) -> Option<Box<[u8]>> {
        let side = claimant.attempt.request.thumbnail;
        let decoded = (side > 0).then(|| self.decode(claimant).ok()).flatten();
        let small = decoded.and_then(|picture| image::thumbnail(picture, side));
        self.decoded = self.decoded.take().filter(|_| claimant.run.needs_parts());
        small
    }
}

/// What is to be done with a job now.
pub(super) enum Next {
    Infer {
        parts: Vec<Part>,
        inputs: Vec<Input>,
    },
    /// All is answered.
    End,
}

/// A chain whose last questions the engine has answered.
pub(super) type Answered = (Claimant, Vec<Arc<Answer>>);

/// Asks what follows from the answers of chains.
pub(super) fn run(answered: &Receiver<Answered>) {
    while let Ok((mut claimant, answers)) = answered.recv() {
        let Some(loaded) = claimant.lane.model.loaded() else { continue };
        claimant.stopwatch.restart();
        claimant.attempt.clock.go_on();
        let asked = catch_panic(|| {
            claimant.run.answered(answers);
            let mut picture = claimant.picture.take().ok_or_else(Failure::internal)?;
            let next = next(&loaded, &mut claimant, &mut picture);
            claimant.picture = Some(picture);
            next
        });
        pass_on(claimant, asked);
    }
}

/// The next questions that the caches cannot answer.
pub(super) fn next(
    loaded: &Loaded,
    claimant: &mut Claimant,
    picture: &mut Picture,
) -> Result<Next, Failure> {
    let Loaded { florence, caches } = loaded;
    let is_shared = !claimant.attempt.request.no_cache;
    loop {
        let asked = claimant.run.asks();
        let Some(first) = asked.first() else { return Ok(Next::End) };
        let parts = asked.iter().enumerate();
        let parts = parts.map(|(i, asked)| part(loaded, claimant, picture, (i, asked)));
        let parts = parts.collect::<Result<Vec<_>, _>>().map_err(|error| Failure::from(&error))?;
        let known = || parts.iter().map(|part| caches.answer(&part.keys)).collect();
        let known: Option<Vec<Arc<Answer>>> = is_shared.then(known).flatten();
        if let Some(answers) = known {
            claimant.knows(&answers);
            claimant.run.answered(answers);
            continue;
        }
        let input = |picture: &Rgb| {
            let input = florence.preprocess(picture).map(Input::Picture);
            input.map_err(|error| Failure::from(&error))
        };
        let inputs = if first.area.is_some() {
            let decoded = picture.decode(claimant)?;
            let areas = asked.iter().filter_map(|asked| asked.area);
            areas.map(|area| input(&decoded.part(area))).collect::<Result<_, Failure>>()?
        } else {
            let seen = || parts.first().and_then(|part| caches.visual(&part.keys));
            let seen = || is_shared.then(seen).flatten().map(Input::Seen);
            let seen = picture.input.take().or_else(seen);
            vec![seen.map_or_else(|| input(picture.decode(claimant)?), Ok)?]
        };
        return Ok(Next::Infer { parts, inputs });
    }
}

fn part(
    loaded: &Loaded,
    claimant: &Claimant,
    picture: &Picture,
    (index, asked): (usize, &Asked),
) -> Result<Part, Error> {
    let question = loaded.florence.question(&asked.prompt, *settings::PROMPTS.get())?;
    let key = asked.area.map_or(picture.key, |area| picture.key.part(area));
    let keys = Keys::new(key, &question, &claimant.attempt.request.options);
    // Each part is a picture of its own; all other questions are about the whole one.
    let picture = if asked.area.is_some() { index } else { 0 };
    Ok(Part { question, picture, keys })
}

/// Hands a job to the engine, or ends the attempt.
pub(super) fn pass_on(mut claimant: Claimant, next: Result<Result<Next, Failure>, String>) {
    if claimant.lease.is_stopped() {
        // Nobody wants it any more, whatever came of it.
        figures::DROPPED.add(1);
        return;
    }
    let next = match next {
        Ok(Ok(Next::End)) => Ok(Next::End),
        _ if claimant.attempt.clock.is_over(Instant::now()) => Err(Failure::timeout()),
        Ok(next) => next,
        Err(text) => {
            figures::PANICS.add(1);
            claimant.log(&format!("panic: {text}"));
            Err(Failure::internal())
        }
    };
    if next.is_ok() {
        claimant.stopwatch.lap(latency::Phase::Prepare);
    }
    match next {
        Ok(Next::Infer { parts, inputs }) => {
            claimant.lease.claim().enter(Phase::Ready);
            let request = &claimant.attempt.request;
            let (options, is_shared) = (request.options.clone(), !request.no_cache);
            claimant.attempt.clock.stand_still();
            // Where the engines have gone, what comes back gives itself back.
            let (work, _coming) = (Arc::clone(&claimant.lane.work), claimant.coming.take());
            let place = claimant.lease.claim().place;
            work.send(place, Work { asker: claimant, parts, inputs, options, is_shared });
        }
        Ok(Next::End) => claimant.answer(),
        Err(failure) => claimant.end(Err(failure)),
    }
}

fn decode_limits(stop: &Stop, deadline: Instant) -> DecodeLimits {
    DecodeLimits {
        budget: Some(model::work().clone()),
        deadline: Some(deadline),
        pixels: settings::MAX_IMAGE_PIXELS.get(),
        formats: *settings::IMAGE_FORMATS.get(),
        stop: stop.clone(),
        ..DecodeLimits::default()
    }
}
