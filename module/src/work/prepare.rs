//! Prepare threads: claim a job, fetch and decode its picture, tokenize its prompt. Those that
//! download mostly wait, so they are many; what is at hand never waits for them.

use std::{
    cell::Cell,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use florence_engine::catch_panic;

use super::{
    WRITE_PAUSE,
    ahead::Download,
    elapsed_ms, guarded,
    infer::{Claimant, Ways},
    lanes::{self, Coming},
    next::{self, Bytes, Next, Picture},
    ordered::{Permit, Permits},
};
use crate::{
    figures::{self, latency},
    job::{
        Code, Failure,
        life::{self, Attempt, Claim},
        new::too_many_best,
    },
    model::Loaded,
    queue::{Kind, Lease, Limits, Phase, queue, sync},
    server::{Refused, with_server},
    settings, source,
};

/// How long to leave a job alone whose key the server does not write.
const KEY_PAUSE: Duration = Duration::from_secs(1);

/// Takes jobs whose pictures are at hand.
pub(super) fn read(ways: &Ways) {
    let coming = Cell::new(None);
    // Before the next job is looked for: it has room only if this one leaves some.
    let taken = |model: &str| coming.set(lanes::of(model).map(Coming::to));
    while let Some(lease) = queue().next(Kind::Reader, limits, (lanes::takes, &taken)) {
        let coming = coming.take();
        if let Some((mut claimant, loaded)) = claim(lease, ways) {
            claimant.coming = coming;
            prepare(claimant, |claimant| prepared(&loaded, claimant, None));
        }
    }
}

/// Takes jobs whose pictures have to be downloaded. Between the download and the engine only so many
/// of these threads go on as `permits` holds.
pub(super) fn download(permits: &Permits, ways: &Ways) {
    source::make_client();
    let begun = Cell::new(None);
    let taken = |model: &str| begun.set(lanes::of(model).map(|lane| Download::begin(&lane.ahead)));
    while let Some(lease) = queue().next(Kind::Downloader, limits, (lanes::takes_downloads, &taken))
    {
        let mut begun = begun.take();
        let Some((claimant, loaded)) = claim(lease, ways) else { continue };
        let mut permit = None;
        prepare(claimant, |claimant| {
            let read = fetch(claimant);
            if let Some(begun) = &mut begun {
                begun.is_here();
            }
            claimant.lease.downloaded();
            let bytes = read?;
            claimant.attempt.clock.stand_still();
            permit = wait_for_permit(permits, claimant);
            claimant.attempt.clock.go_on();
            if permit.is_none() {
                // Nobody hears of it.
                return Err(Failure::timeout());
            }
            prepared(&loaded, claimant, Some(bytes))
        });
        drop(permit);
    }
}

/// Leave to go on, unless nobody wants the attempt any more before. Who has it must not wait for room
/// in a lane: others want it for jobs of other models.
fn wait_for_permit<'a>(permits: &'a Permits, claimant: &mut Claimant) -> Option<Permit<'a>> {
    const LOOK: Duration = Duration::from_millis(100);
    const LOOK_FOR_ROOM: Duration = Duration::from_millis(10);
    while !claimant.lease.is_stopped() {
        if claimant.coming.is_none() && !claimant.lane.has_room() {
            thread::sleep(LOOK_FOR_ROOM);
            continue;
        }
        claimant.coming.get_or_insert_with(|| Coming::to(Arc::clone(&claimant.lane)));
        let permit = permits.wait(claimant.lease.claim().place, LOOK);
        if permit.is_some() {
            return permit;
        }
    }
    None
}

/// Within which limits jobs may be started; none may in a pause.
fn limits() -> Option<Limits> {
    let limits = || Limits {
        per_host: settings::MAX_DOWNLOADS_PER_HOST.size(),
        per_user: settings::MAX_DOWNLOADS_PER_USER.size(),
    };
    (!settings::PAUSED.get()).then(limits)
}

/// The picture's bytes, from where the job says.
fn fetch(claimant: &Claimant) -> Result<Vec<u8>, Failure> {
    let Attempt { request, clock, .. } = &*claimant.attempt;
    claimant.stopwatch.restart();
    let stop = &claimant.lease.claim().stop;
    let read = source::read(&request.image, &request.user, clock.ends(), stop);
    if !claimant.lease.is_stopped() {
        claimant.stopwatch.lap(latency::Phase::Fetch);
    }
    Ok(read?)
}

/// Takes the job of a lease, and the model that it asks for.
fn claim(lease: Lease, ways: &Ways) -> Option<(Claimant, Arc<Loaded>)> {
    let model = Arc::clone(&lease.claim().model);
    // Without one the job fails, below.
    let lane = lanes::of(&model);
    let loaded = lane.as_ref().and_then(|lane| lane.model.loaded());
    if lane.is_some() && loaded.is_none() {
        lease.refused(Refused::This, Instant::now() + KEY_PAUSE);
        return None;
    }
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
            // Who asks for another model meanwhile is another job, which gets a lease of its own.
            let is_same = attempt.request.wants.as_deref().unwrap_or_default() == &*model;
            let claimant = Claimant::new(lease, attempt, lane.filter(|_| is_same)?, ways.clone());
            Some((claimant, loaded?))
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

fn prepare(mut claimant: Claimant, prepared: impl FnOnce(&mut Claimant) -> Result<Next, Failure>) {
    let start = Instant::now();
    let prepared = catch_panic(|| prepared(&mut claimant));
    claimant.fetch_ms = elapsed_ms(start);
    figures::FETCH_MS.add(claimant.fetch_ms);
    next::pass_on(claimant, prepared);
}

fn prepared(
    loaded: &Loaded,
    claimant: &mut Claimant,
    downloaded: Option<Vec<u8>>,
) -> Result<Next, Failure> {
    if let Some(problem) = too_many_best(&loaded.florence, &claimant.attempt.request.options) {
        return Err(Failure::permanent(Code::Invalid, problem));
    }
    let bytes = match (downloaded, &claimant.attempt.request.data) {
        (Some(bytes), _) => Bytes::Read(bytes),
        (None, Some(data)) => Bytes::Sent(Arc::clone(data)),
        (None, None) => Bytes::Read(fetch(claimant)?),
    };
    claimant.lease.claim().enter(Phase::Decoding);
    let mut picture = Picture::new(bytes, &claimant.lane.model, &claimant.attempt.request);
    let next = next::next(loaded, claimant, &mut picture)?;
    if claimant.run.needs_parts() && matches!(next, Next::Infer { .. }) {
        // Whoever asks the next questions must not wait for room, which others behind it may hold.
        picture.decode(claimant)?;
    }
    claimant.thumbnail = picture.thumbnail(claimant);
    claimant.picture = Some(picture).filter(|_| claimant.run.is_chain());
    Ok(next)
}
