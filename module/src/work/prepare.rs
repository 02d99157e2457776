//! Prepare threads: claim a job, fetch and decode its picture, tokenize its prompt. Those that
//! download mostly wait, so they are many; what is at hand never waits for them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use florence_engine::{
    Answer, Error, Florence, Stop, catch_panic,
    image::{self, DecodeLimits, Rgb},
    serve::{Caches, Input, Keys, Part, PictureKey, Served, Verdict, Work},
};

use super::{WRITE_PAUSE, ahead, commit::Commit, elapsed_ms, guarded, infer::Claimant};
use crate::{
    figures::{self, latency},
    job::{
        Failure, Request,
        life::{self, Attempt, Claim},
    },
    model::{self, Loaded},
    queue::{Kind, Lease, Limits, Phase, queue, sync},
    server::{Refused, with_server},
    settings, source,
};

/// How long to leave a job alone whose key the server does not write.
const KEY_PAUSE: Duration = Duration::from_secs(1);

/// What preparing a job came to.
struct Prepared {
    work: Next,
    /// A small copy of the picture, if one is wanted.
    thumbnail: Option<Box<[u8]>>,
}

/// What is to be done after that.
enum Next {
    Infer { parts: Vec<Part>, input: Input },
    Answer(Vec<Arc<Answer>>),
}

/// Takes jobs whose pictures are at hand.
pub(super) fn read(work: &Sender<Work<Claimant>>, commits: &Sender<Commit>) {
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
    let limits = || limits().filter(|_| ahead::has_room());
    while let Some(lease) = queue().next(Kind::Downloader, limits) {
        let Some(loaded) = model::loaded() else { continue };
        let mut ahead = ahead::Download::begin();
        let Some(claimant) = claim(lease, commits) else { continue };
        let mut has_permit = false;
        prepare(claimant, work, |claimant| {
            let read = fetch(claimant);
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

/// Within which limits jobs may be started; none may without a model, or in a pause.
fn limits() -> Option<Limits> {
    let limits = || Limits {
        per_host: settings::MAX_DOWNLOADS_PER_HOST.size(),
        per_user: settings::MAX_DOWNLOADS_PER_USER.size(),
    };
    (model::loaded().is_some() && !settings::PAUSED.get()).then(limits)
}

/// The picture's bytes, from where the job says.
fn fetch(claimant: &Claimant) -> Result<Vec<u8>, Failure> {
    let Attempt { request, deadline, .. } = &*claimant.attempt;
    claimant.stopwatch.restart();
    let stop = &claimant.lease.claim().stop;
    let read = source::read(&request.image, &request.user, *deadline, stop);
    if !claimant.lease.is_stopped() {
        claimant.stopwatch.lap(latency::Phase::Fetch);
    }
    Ok(read?)
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
            Some(Claimant::new(lease, attempt, commits.clone()))
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
    let prepared = prepared.map(|Prepared { work, thumbnail }| {
        claimant.stopwatch.lap(latency::Phase::Prepare);
        claimant.thumbnail = thumbnail;
        work
    });
    let request = &claimant.attempt.request;
    match prepared {
        Ok(Next::Infer { parts, input }) => {
            claimant.lease.claim().enter(Phase::Ready);
            let (options, is_shared) = (request.options.clone(), !request.no_cache);
            // The engine goes only when the process does; what comes back gives itself back.
            let _ = work.send(Work { asker: claimant, parts, input, options, is_shared });
        }
        Ok(Next::Answer(answers)) => {
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
            read = fetch(claimant)?;
            &read
        }
    };
    claim.enter(Phase::Decoding);
    let parts = parts(florence, request, bytes).map_err(|error| Failure::from(&error))?;
    let decoded = || {
        let limits = decode_limits(&claim.stop, claimant.attempt.deadline);
        image::decode(bytes, &limits, request.orientation)
    };
    let small = |picture: &Rgb| image::thumbnail(picture, request.thumbnail);
    let parts = match if request.no_cache { Err(parts) } else { known(caches, parts) } {
        Ok(work) => {
            // The picture is looked at for the small copy alone; without one the job goes on.
            let picture = (request.thumbnail > 0).then(decoded).and_then(Result::ok);
            return Ok(Prepared { work, thumbnail: picture.and_then(|picture| small(&picture)) });
        }
        Err(parts) => parts,
    };
    let picture = decoded().map_err(|error| Failure::from(&Error::from(error)))?;
    let input = florence.preprocess(&picture).map_err(|error| Failure::from(&error))?;
    let input = Input::Picture(input);
    Ok(Prepared { work: Next::Infer { parts, input }, thumbnail: small(&picture) })
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

/// What the caches spare a job, if they know all its answers, or the encoded picture; else its parts.
fn known(caches: &Caches, parts: Vec<Part>) -> Result<Next, Vec<Part>> {
    let answers: Option<_> = parts.iter().map(|part| caches.answer(&part.keys)).collect();
    if let Some(answers) = answers {
        return Ok(Next::Answer(answers));
    }
    match parts.first().and_then(|part| caches.visual(&part.keys)) {
        Some(visual) => Ok(Next::Infer { parts, input: Input::Seen(visual) }),
        None => Err(parts),
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
