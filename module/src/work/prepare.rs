//! Prepare threads: claim a job, fetch and decode its picture, tokenize its prompt. Those that
//! download mostly wait, so they are many; what is at hand never waits for them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{
    Answer, Error, Florence, PrepareOptions, Stop, catch_panic,
    image::DecodeLimits,
    serve::{Caches, Input, Keys, Part, PictureKey, Served, Verdict, Work},
};

use super::{WRITE_PAUSE, ahead, commit::Commit, elapsed_ms, guarded, infer::Claimant};
use crate::{
    figures,
    job::{
        Failure, Request,
        life::{self, Claim},
    },
    model::{self, Loaded},
    queue::{Kind, Lease, Limits, Phase, queue, sync},
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

/// Takes jobs whose pictures are at hand.
pub(super) fn read(work: &Sender<Work<Claimant>>, commits: &Sender<Commit>) {
    let limits = || model::loaded().map(|_loaded| limits());
    while let Some(lease) = queue().next(Kind::Reader, limits) {
        let Some(loaded) = model::loaded() else { continue };
        if let Some(claimant) = claim(lease, commits) {
            prepare(claimant, work, |claimant| prepared(&loaded, claimant, None));
        }
    }
}

/// Takes jobs whose pictures have to be downloaded. Between the download and the engine only so many
/// of these threads go on as `permits` holds.
pub(super) fn download(
    permits: &(Sender<()>, Receiver<()>),
    work: &Sender<Work<Claimant>>,
    commits: &Sender<Commit>,
) {
    let limits = || (model::loaded().is_some() && ahead::has_room()).then(limits);
    while let Some(lease) = queue().next(Kind::Downloader, limits) {
        let Some(loaded) = model::loaded() else { continue };
        let mut ahead = ahead::Download::begin();
        let Some(claimant) = claim(lease, commits) else { continue };
        let mut has_permit = false;
        prepare(claimant, work, |claimant| {
            let request = &claimant.attempt.request;
            let (deadline, stop) = (claimant.attempt.deadline, &claimant.lease.claim().stop);
            let read = source::read(&request.image, &request.user, deadline, stop);
            ahead.is_here();
            claimant.lease.downloaded();
            let bytes = read?;
            has_permit = wait_for_permit(permits, claimant);
            if !has_permit {
                return Err(Failure::timeout());
            }
            prepared(&loaded, claimant, Some(&bytes))
        });
        if has_permit {
            let _ = permits.1.try_recv();
        }
    }
}

/// Whether there was a permit before the attempt was out of time, or nobody wanted it any more.
fn wait_for_permit(permits: &(Sender<()>, Receiver<()>), claimant: &Claimant) -> bool {
    const LOOK: Duration = Duration::from_millis(100);
    while !claimant.lease.is_stopped() && Instant::now() < claimant.attempt.deadline {
        if permits.0.send_timeout((), LOOK).is_ok() {
            return true;
        }
    }
    false
}

fn limits() -> Limits {
    Limits {
        per_host: settings::MAX_DOWNLOADS_PER_HOST.size(),
        per_user: settings::MAX_DOWNLOADS_PER_USER.size(),
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
        Claim::Taken(mut attempt) => {
            attempt.take_picture();
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

fn prepare(
    mut claimant: Claimant,
    work: &Sender<Work<Claimant>>,
    prepared: impl FnOnce(&Claimant) -> Result<Prepared, Failure>,
) {
    let start = Instant::now();
    let request = &claimant.attempt.request;
    let prepared = catch_panic(|| prepared(&claimant));
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

fn prepared(
    loaded: &Loaded,
    claimant: &Claimant,
    downloaded: Option<&[u8]>,
) -> Result<Prepared, Failure> {
    let Loaded { florence, caches } = loaded;
    let (request, claim) = (&claimant.attempt.request, claimant.lease.claim());
    let read;
    let bytes: &[u8] = match (downloaded, &request.data) {
        (Some(bytes), _) => bytes,
        (None, Some(data)) => data,
        (None, None) => {
            let deadline = claimant.attempt.deadline;
            read = source::read(&request.image, &request.user, deadline, &claim.stop)?;
            &read
        }
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
    let options = PrepareOptions {
        limits: decode_limits(&claim.stop, claimant.attempt.deadline),
        orientation: request.orientation,
        ..PrepareOptions::default()
    };
    let picture = florence.picture(bytes, &options).map_err(|error| Failure::from(&error))?;
    Ok(Prepared::Ready { parts, input: Input::Picture(picture) })
}

fn parts(florence: &Florence, request: &Request, bytes: &[u8]) -> Result<Vec<Part>, Error> {
    let scope = if settings::SHARED_CACHE.get() { "" } else { &request.user };
    let picture = PictureKey::new(scope, bytes, request.orientation);
    let taken = *settings::PROMPTS.get();
    let part = |prompt: &String| {
        let question = florence.question(prompt, taken)?;
        Ok(Part { keys: Keys::new(picture, &question, &request.options), question })
    };
    request.prompts.iter().map(part).collect()
}

/// The answers, if the cache knows all of them.
fn answers(caches: &Caches, parts: &[Part]) -> Option<Vec<Arc<Answer>>> {
    parts.iter().map(|part| caches.answer(&part.keys)).collect()
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
