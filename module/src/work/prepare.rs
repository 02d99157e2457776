//! Prepare threads: claim a job, fetch and decode its picture, tokenize its prompt.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;
use florence_engine::{
    Answer, Error, Florence, PrepareOptions, Stop, catch_panic,
    image::DecodeLimits,
    serve::{Caches, Input, Keys, Part, Served, Verdict, Work},
};

use super::{WRITE_PAUSE, commit::Commit, elapsed_ms, guarded, infer::Claimant};
use crate::{
    figures,
    job::{
        Failure, Request,
        life::{self, Claim},
    },
    model::{self, Loaded},
    queue::{Lease, Phase, queue, sync},
    server::{Refused, with_server},
    settings, source,
};

/// How long to leave a job alone whose key the server does not write.
const KEY_PAUSE: Duration = Duration::from_secs(1);

/// What preparing a job came to.
enum Prepared {
    Ready { parts: Vec<Part>, input: Input },
    Answered(Vec<Arc<Answer>>),
}

pub(super) fn run(work: &Sender<Work<Claimant>>, commits: &Sender<Commit>) {
    while let Some(lease) = queue().next(|| model::loaded().is_some()) {
        let Some(loaded) = model::loaded() else { continue };
        if let Some(claimant) = claim(lease, commits) {
            prepare(&loaded, claimant, work);
        }
    }
}

/// Takes the job of a lease.
fn claim(lease: Lease, commits: &Sender<Commit>) -> Option<Claimant> {
    let is_expired = lease.claim().is_expired(Instant::now());
    let claim = with_server(|ctx| {
        if lease.is_stopped() {
            return Claim::Over;
        }
        let step = || life::claim(ctx, lease.key(), &lease.claim().token, is_expired);
        let claim = guarded(ctx, lease.key(), step).unwrap_or(Claim::Over);
        if matches!(claim, Claim::Over) {
            // There may be something else under the key, of which no event told.
            sync::refresh(ctx, lease.key());
        }
        claim
    });
    match claim {
        Claim::Taken(attempt) => {
            Some(Claimant { lease, attempt, fetch_ms: 0, commits: commits.clone() })
        }
        // The queue knows by now what is under the key; if it is still this claim, it goes back.
        Claim::Over => None,
        Claim::Refused(refused) => {
            let pause = match refused {
                Refused::All => WRITE_PAUSE,
                Refused::This => KEY_PAUSE,
            };
            lease.refused(refused, Instant::now() + pause);
            None
        }
    }
}

fn prepare(loaded: &Loaded, mut claimant: Claimant, work: &Sender<Work<Claimant>>) {
    let start = Instant::now();
    let request = &claimant.attempt.request;
    let prepared = catch_panic(|| prepared(loaded, &claimant));
    claimant.fetch_ms = elapsed_ms(start);
    figures::FETCH_MS.add(claimant.fetch_ms);
    if claimant.lease.is_stopped() {
        // Nobody wants it any more, whatever came of it.
        figures::DROPPED.add(1);
        return;
    }
    let prepared = match prepared {
        _ if Instant::now() >= claimant.attempt.deadline => Err(Failure::timeout()),
        Ok(prepared) => prepared,
        Err(text) => {
            figures::PANICS.add(1);
            claimant.log(&format!("panic: {text}"));
            Err(Failure::internal())
        }
    };
    match prepared {
        Ok(Prepared::Ready { parts, input }) => {
            claimant.lease.claim().enter(Phase::Ready);
            let (options, is_shared) = (request.options.clone(), !request.no_cache);
            // The engine goes only when the process does; what comes back gives itself back.
            let _ = work.send(Work { asker: claimant, parts, input, options, is_shared });
        }
        Ok(Prepared::Answered(answers)) => {
            let served = Served { answers, verdict: Verdict::Result, time: Duration::ZERO };
            claimant.answer(&served);
        }
        Err(failure) => claimant.end(Err(failure), 0),
    }
}

fn prepared(loaded: &Loaded, claimant: &Claimant) -> Result<Prepared, Failure> {
    let Loaded { florence, caches } = loaded;
    let (request, claim) = (&claimant.attempt.request, claimant.lease.claim());
    let fetched;
    let bytes: &[u8] = if let Some(data) = &request.data {
        data
    } else {
        fetched = source::read(&request.image, claimant.attempt.deadline, &claim.stop)?;
        &fetched
    };
    claim.enter(Phase::Decoding);
    let parts = parts(florence, request, bytes).map_err(|error| Failure::from(&error))?;
    if !request.no_cache {
        if let Some(answers) = answers(caches, &parts) {
            return Ok(Prepared::Answered(answers));
        }
        if let Some(visual) = parts.first().and_then(|part| caches.visual(&part.keys)) {
            return Ok(Prepared::Ready { parts, input: Input::Seen(visual) });
        }
    }
    let picture = florence.picture(bytes, &options(&claim.stop));
    let picture = picture.map_err(|error| Failure::from(&error))?;
    Ok(Prepared::Ready { parts, input: Input::Picture(picture) })
}

fn parts(florence: &Florence, request: &Request, bytes: &[u8]) -> Result<Vec<Part>, Error> {
    let part = |prompt: &String| {
        let question = florence.question(prompt)?;
        Ok(Part { question, keys: Keys::new(bytes, prompt, &request.options) })
    };
    request.prompts.iter().map(part).collect()
}

/// The answers, if the cache knows all of them.
fn answers(caches: &Caches, parts: &[Part]) -> Option<Vec<Arc<Answer>>> {
    parts.iter().map(|part| caches.answer(&part.keys)).collect()
}

fn options(stop: &Stop) -> PrepareOptions {
    PrepareOptions {
        limits: DecodeLimits {
            pixels: settings::MAX_IMAGE_PIXELS.get(),
            formats: *settings::IMAGE_FORMATS.get(),
            stop: stop.clone(),
            ..DecodeLimits::default()
        },
        ..PrepareOptions::default()
    }
}
