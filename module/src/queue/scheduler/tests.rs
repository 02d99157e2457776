//! The order of jobs, and what becomes of those that nobody works on any more.

use std::time::Duration;

use super::{lines::MOST_MODELS, *};
use crate::{
    job::{Due, Origin},
    queue::{Lease, Queue},
};

const SECOND: Duration = Duration::from_secs(1);
const NO_LIMITS: Limits = Limits { per_host: usize::MAX, per_user: usize::MAX };

fn key(name: &str) -> JobKey {
    JobKey { db: Db(0), name: name.as_bytes().into() }
}

fn at_rank(rank: i64) -> Waiting {
    Waiting {
        submitted: Some(rank),
        head_start: 0,
        until: None,
        expires: None,
        is_suspect: false,
        is_retry: false,
        origin: Origin { user: "".into(), host: None, model: "".into() },
    }
}

fn waiting(rank: i64) -> Seen {
    Seen::Waiting(at_rank(rank))
}

fn suspect(rank: i64) -> Seen {
    Seen::Waiting(Waiting { is_suspect: true, ..at_rank(rank) })
}

fn claimed(owner: &str, token: &str, content: u8) -> Seen {
    Seen::Claimed(Claimed {
        owner: owner.to_owned(),
        token: Token::parse(token.to_owned()),
        content: [content; 16],
    })
}

/// What a hash says that shows a claim.
fn shows(claim: &Claim, content: u8) -> Seen {
    claimed("here", claim.token.as_str(), content)
}

fn enabled() -> Scheduler {
    Scheduler { is_enabled: true, ..Scheduler::default() }
}

fn see(scheduler: &mut Scheduler, name: &str, seen: &Seen) {
    scheduler.observe(&key(name), seen, Death::None);
}

fn run(scheduler: &mut Scheduler, now: Instant) -> Option<(String, Arc<Claim>)> {
    match scheduler.next(now, Kind::Reader, (NO_LIMITS, &|_| true), Token::new) {
        Next::Run(key, claim) => Some((String::from_utf8_lossy(&key.name).into_owned(), claim)),
        _ => None,
    }
}

/// Runs all there is; the claims are kept, as somebody works on them.
fn order(scheduler: &mut Scheduler, now: Instant) -> (Vec<String>, Vec<Arc<Claim>>) {
    std::iter::from_fn(|| run(scheduler, now)).unzip()
}

#[test]
fn lower_ranks_run_first_and_equals_in_order_of_arrival() {
    let mut scheduler = enabled();
    for (name, rank) in [("b", 1), ("c", 1), ("a", 0), ("d", 2)] {
        see(&mut scheduler, name, &waiting(rank));
    }
    assert_eq!(order(&mut scheduler, Instant::now()).0, ["a", "b", "c", "d"]);
    assert_eq!((scheduler.active(), scheduler.waiting()), (4, 0));
}

#[test]
fn a_model_that_takes_no_jobs_leaves_the_turn_to_others() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for (name, rank, host, model) in [
        ("a", 0, None, "slow"),
        ("b", 1, None, ""),
        ("c", 2, Some("x"), "slow"),
        ("d", 3, Some("x"), ""),
    ] {
        let host = host.map(Arc::from);
        let origin = Origin { user: "".into(), host, model: model.into() };
        see(&mut scheduler, name, &Seen::Waiting(Waiting { origin, ..at_rank(rank) }));
    }
    let mut claims = Vec::new();
    let mut next = |kind, slow_is_open: bool| {
        let is_open = |model: &str| model != "slow" || slow_is_open;
        match scheduler.next(now, kind, (NO_LIMITS, &is_open), Token::new) {
            Next::Run(key, claim) => {
                claims.push(claim);
                Some(String::from_utf8_lossy(&key.name).into_owned())
            }
            _ => None,
        }
    };
    assert_eq!(next(Kind::Reader, false).as_deref(), Some("b"));
    assert_eq!(next(Kind::Reader, false), None);
    assert_eq!(next(Kind::Downloader, false).as_deref(), Some("d"));
    assert_eq!(next(Kind::Downloader, false), None);
    assert_eq!(next(Kind::Reader, true).as_deref(), Some("a"));
    assert_eq!(next(Kind::Downloader, true).as_deref(), Some("c"));
}

#[test]
fn a_suspect_whose_model_takes_no_jobs_does_not_hold_up_the_others() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for (name, rank, model) in [("a", 0, "gone"), ("b", 1, "")] {
        let origin = Origin { user: "".into(), host: None, model: model.into() };
        let waiting = Waiting { origin, is_suspect: true, ..at_rank(rank) };
        see(&mut scheduler, name, &Seen::Waiting(waiting));
    }
    let is_open = |model: &str| model != "gone";
    let next = scheduler.next(now, Kind::Reader, (NO_LIMITS, &is_open), Token::new);
    assert!(matches!(next, Next::Run(key, _) if *key.name == *b"b"));
}

#[test]
fn more_models_than_are_told_apart_share_a_line() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for i in 0..2 * MOST_MODELS {
        let model = format!("model {i}").into();
        let origin = Origin { user: "".into(), host: None, model };
        let rank = i64::try_from(i).unwrap();
        see(&mut scheduler, &format!("{i}"), &Seen::Waiting(Waiting { origin, ..at_rank(rank) }));
    }
    assert_eq!(scheduler.lines.models(), MOST_MODELS + 1);
    assert_eq!(order(&mut scheduler, now).0.len(), 2 * MOST_MODELS);
    assert!(scheduler.lines.are_empty());
}

#[test]
fn a_key_that_goes_stops_its_work() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    see(&mut scheduler, "a", &waiting(0));
    let (_, claim) = run(&mut scheduler, now).unwrap();
    see(&mut scheduler, "a", &shows(&claim, 1));
    assert!(!claim.stop.is_stopped());
    see(&mut scheduler, "a", &Seen::Nothing);
    assert!(claim.stop.is_stopped());
    assert_eq!(scheduler.active(), 0);
    assert!(!scheduler.knows(key("a").as_ref()));
}

#[test]
fn a_key_that_gets_other_content_stops_its_work() {
    let now = Instant::now();
    let others = [claimed("here", "another", 1), claimed("there", "", 1), waiting(0)];
    for other in others {
        let mut scheduler = enabled();
        see(&mut scheduler, "a", &waiting(0));
        let (_, claim) = run(&mut scheduler, now).unwrap();
        see(&mut scheduler, "a", &shows(&claim, 1));
        see(&mut scheduler, "a", &other);
        assert!(claim.stop.is_stopped(), "{other:?}");
        assert_eq!((scheduler.active(), scheduler.waiting()), (0, 1), "{other:?}");
        // The old lease has nothing to give back.
        scheduler.give_back(&key("a"), claim);
        assert_eq!((scheduler.active(), scheduler.waiting()), (0, 1), "{other:?}");
    }
    // The same claim, but another picture.
    let mut scheduler = enabled();
    see(&mut scheduler, "a", &waiting(0));
    let (_, claim) = run(&mut scheduler, now).unwrap();
    see(&mut scheduler, "a", &shows(&claim, 1));
    see(&mut scheduler, "a", &shows(&claim, 2));
    assert!(claim.stop.is_stopped());
}

#[test]
fn a_claim_that_nobody_holds_is_taken_from_the_hash_before_the_job_runs() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    see(&mut scheduler, "copy", &claimed("here", "x", 1));
    assert!(run(&mut scheduler, now).is_none());
    assert_eq!(scheduler.unclaimed(), [(key("copy"), false)]);
    see(&mut scheduler, "copy", &waiting(0));
    assert!(scheduler.unclaimed().is_empty());
    assert_eq!(order(&mut scheduler, now).0, ["copy"]);
}

#[test]
fn the_dead_are_told_from_those_that_gave_their_place_up() {
    let mut scheduler = enabled();
    scheduler.observe(&key("a"), &claimed("dead", "x", 1), Death::Crash);
    scheduler.observe(&key("b"), &claimed("master", "y", 1), Death::Unknown);
    assert_eq!(scheduler.unclaimed(), [(key("a"), true)]);
    // Another event of the same claim does not change the verdict.
    scheduler.observe(&key("a"), &claimed("dead", "x", 2), Death::None);
    scheduler.judge(|owner| if owner == "master" { Death::None } else { Death::Crash });
    assert_eq!(scheduler.unclaimed(), [(key("a"), true), (key("b"), false)]);
    scheduler.set_enabled(false);
    assert!(scheduler.unclaimed().is_empty());
}

#[test]
fn delayed_jobs_wait_for_their_moment() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    let later = now + SECOND;
    let delayed = |at| Seen::Waiting(Waiting { until: Some(Due::at(at, 7)), ..at_rank(0) });
    see(&mut scheduler, "a", &delayed(later));
    // The same time read again is not another one.
    see(&mut scheduler, "a", &delayed(later + SECOND));
    assert_eq!(scheduler.deferred(), 1);
    assert!(
        matches!(scheduler.next(now, Kind::Reader, (NO_LIMITS, &|_| true), Token::new), Next::WaitUntil(at) if at == later)
    );
    assert_eq!(order(&mut scheduler, later).0, ["a"]);
    assert_eq!(scheduler.deferred(), 0);
}

#[test]
fn a_job_that_does_not_say_when_it_came_keeps_its_place() {
    let mut scheduler = enabled();
    let undated = Seen::Waiting(Waiting { submitted: None, ..at_rank(0) });
    for name in ["a", "b", "a"] {
        see(&mut scheduler, name, &undated);
    }
    assert_eq!(order(&mut scheduler, Instant::now()).0, ["a", "b"]);
}

#[test]
fn waiting_jobs_expire_and_running_ones_do_not() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    let (soon, late) = (now + SECOND, now + 2 * SECOND);
    for (name, rank, until) in [("a", 0, None), ("b", 1, None), ("c", 2, Some(late))] {
        let (until, expires) = (until.map(|at| Due::at(at, 2)), Some(Due::at(soon, 1)));
        see(&mut scheduler, name, &Seen::Waiting(Waiting { until, expires, ..at_rank(rank) }));
    }
    assert!(scheduler.expired(now).is_empty() && !scheduler.has_overdue(now));
    assert!(scheduler.has_overdue(soon));
    let (name, claim) = run(&mut scheduler, now).unwrap();
    assert_eq!(name, "a");
    assert!(!claim.is_expired(now) && claim.is_expired(soon));
    assert_eq!(scheduler.expired(soon), [key("b"), key("c")]);
    see(&mut scheduler, "b", &Seen::Nothing);
    assert_eq!(scheduler.expired(soon), [key("c")]);
    assert!(run(&mut scheduler, late).is_some());
    assert!(scheduler.expired(late).is_empty());
}

#[test]
fn a_waiting_job_knows_how_many_are_ahead() {
    let mut scheduler = enabled();
    for i in 0..5000 {
        see(&mut scheduler, &i.to_string(), &waiting(i));
    }
    let ahead = |scheduler: &Scheduler, name: &str| match scheduler.standing(key(name).as_ref()) {
        Some(Standing::Waiting { ahead, active }) => (ahead, active),
        other => panic!("{other:?}"),
    };
    assert_eq!(ahead(&scheduler, "4321"), (4321, 0));
    let _claim = run(&mut scheduler, Instant::now());
    assert_eq!(ahead(&scheduler, "4321"), (4320, 1));
    assert!(matches!(scheduler.standing(key("0").as_ref()), Some(Standing::Active(_))));
    assert!(scheduler.standing(key("none").as_ref()).is_none());
}

#[test]
fn suspects_run_first_and_one_at_a_time() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for (name, rank) in [("a", 1), ("b", 2), ("c", 3)] {
        see(&mut scheduler, name, &waiting(rank));
    }
    see(&mut scheduler, "s", &suspect(9));
    see(&mut scheduler, "t", &suspect(8));
    let (name, claim) = run(&mut scheduler, now).unwrap();
    assert_eq!(name, "t");
    assert_eq!(order(&mut scheduler, now).0, ["a", "b", "c"]);
    // Gone from its key, but somebody is still in the middle of it.
    see(&mut scheduler, "t", &Seen::Nothing);
    assert!(run(&mut scheduler, now).is_none());
    scheduler.give_back(&key("t"), claim);
    assert_eq!(order(&mut scheduler, now).0, ["s"]);
}

#[test]
fn a_suspect_that_is_given_back_stays_one() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for name in ["s", "t", "u"] {
        see(&mut scheduler, name, &suspect(0));
    }
    for _ in 0..3 {
        let (name, claim) = run(&mut scheduler, now).unwrap();
        assert_eq!(name, "s");
        assert!(run(&mut scheduler, now).is_none());
        scheduler.give_back(&key("s"), claim);
    }
    // A retry of a suspect is one too.
    let until = Some(Due::at(now, 1));
    see(&mut scheduler, "s", &Seen::Waiting(Waiting { until, is_suspect: true, ..at_rank(-1) }));
    let (name, _claim) = run(&mut scheduler, now).unwrap();
    assert_eq!(name, "s");
    assert!(run(&mut scheduler, now).is_none());
}

#[test]
fn a_job_that_could_not_be_claimed_goes_back_to_its_place() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for name in ["a", "b"] {
        let expires = Some(Due::at(now + SECOND, 1));
        see(&mut scheduler, name, &Seen::Waiting(Waiting { expires, ..at_rank(5) }));
    }
    let (name, claim) = run(&mut scheduler, now).unwrap();
    scheduler.hold(now + SECOND);
    scheduler.give_back(&key(&name), claim);
    assert!(
        matches!(scheduler.next(now, Kind::Reader, (NO_LIMITS, &|_| true), Token::new), Next::WaitUntil(at) if at == now + SECOND)
    );
    assert_eq!(scheduler.expired(now + SECOND), [key("a"), key("b")]);
    see(&mut scheduler, "urgent", &waiting(1));
    assert_eq!(order(&mut scheduler, now + SECOND).0, ["urgent", "a", "b"]);
}

#[test]
fn a_job_whose_key_alone_is_refused_lets_others_pass() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for name in ["a", "b", "c"] {
        see(&mut scheduler, name, &waiting(5));
    }
    let (name, claim) = run(&mut scheduler, now).unwrap();
    scheduler.postpone(&key(&name), &claim, now + SECOND);
    let (name, _claim) = run(&mut scheduler, now).unwrap();
    assert_eq!(name, "b");
    assert_eq!(order(&mut scheduler, now + SECOND).0, ["a", "c"]);
}

#[test]
fn a_lease_that_is_dropped_gives_its_job_back() {
    let queue = Arc::new(Queue::new());
    queue.change(|scheduler| {
        scheduler.set_enabled(true);
        scheduler.observe(&key("a"), &waiting(0), Death::None);
    });
    let lease =
        queue.next(Kind::Reader, || Some(NO_LIMITS), (|_: &str| true, |_: &str| ())).unwrap();
    assert_eq!(queue.counts(), (0, 1));
    // Before the claim was written the job just waits again.
    drop(lease);
    assert_eq!(queue.counts(), (1, 0));
    assert!(queue.unclaimed().is_empty());
    let lease =
        queue.next(Kind::Reader, || Some(NO_LIMITS), (|_: &str| true, |_: &str| ())).unwrap();
    let shown = shows(lease.claim(), 1);
    queue.change(|scheduler| scheduler.observe(&key("a"), &shown, Death::None));
    drop(lease);
    assert_eq!(queue.unclaimed(), [(key("a"), false)]);
    // One that ends a job gives nothing back.
    queue.change(|scheduler| scheduler.observe(&key("a"), &waiting(0), Death::None));
    queue.next(Kind::Reader, || Some(NO_LIMITS), (|_: &str| true, |_: &str| ())).unwrap().end();
    assert_eq!(queue.counts(), (0, 0));
}

#[test]
fn a_lease_lost_in_a_panic_gives_its_job_back() {
    let queue = Arc::new(Queue::new());
    queue.change(|scheduler| {
        scheduler.set_enabled(true);
        scheduler.observe(&key("a"), &waiting(0), Death::None);
    });
    let work = || {
        let _lease: Lease =
            queue.next(Kind::Reader, || Some(NO_LIMITS), (|_: &str| true, |_: &str| ())).unwrap();
        panic!("at work");
    };
    assert!(florence_engine::catch_panic::<()>(work).is_err());
    assert_eq!(queue.counts(), (1, 0));
}

#[test]
fn the_watchdog_finds_what_nobody_works_on() {
    let queue = Arc::new(Queue::new());
    queue.change(|scheduler| {
        scheduler.set_enabled(true);
        for name in ["a", "b"] {
            scheduler.observe(&key(name), &waiting(0), Death::None);
        }
    });
    let held =
        queue.next(Kind::Reader, || Some(NO_LIMITS), (|_: &str| true, |_: &str| ())).unwrap();
    // What no code here can do: a claim that goes without its lease.
    queue.change(|scheduler| drop(run(scheduler, Instant::now()).unwrap()));
    assert_eq!(queue.recover(), [key("b")]);
    assert_eq!(queue.counts(), (1, 1));
    assert!(queue.recover().is_empty());
    drop(held);
}

#[test]
fn where_jobs_are_not_run_any_more_they_stop_and_wait() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    for name in ["fetching", "claimed", "waiting"] {
        see(&mut scheduler, name, &waiting(0));
    }
    let (_, written) = run(&mut scheduler, now).unwrap();
    see(&mut scheduler, "fetching", &shows(&written, 1));
    let (_, unwritten) = run(&mut scheduler, now).unwrap();
    scheduler.set_enabled(false);
    assert!(written.stop.is_stopped() && unwritten.stop.is_stopped());
    assert_eq!((scheduler.active(), scheduler.waiting()), (0, 3));
    assert!(run(&mut scheduler, now).is_none());
    scheduler.set_enabled(true);
    assert_eq!(scheduler.unclaimed(), [(key("fetching"), false)]);
    assert_eq!(order(&mut scheduler, now).0, ["claimed", "waiting"]);
}

#[test]
fn releasing_an_old_claim_leaves_a_new_job_alone() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    see(&mut scheduler, "a", &waiting(0));
    let (_, old) = run(&mut scheduler, now).unwrap();
    see(&mut scheduler, "a", &Seen::Nothing);
    see(&mut scheduler, "a", &waiting(0));
    scheduler.release(&key("a"), old);
    let (_, new) = run(&mut scheduler, now).unwrap();
    scheduler.release(&key("a"), new);
    assert!(!scheduler.knows(key("a").as_ref()));
}

#[test]
fn flushing_a_database_leaves_the_others() {
    let mut scheduler = enabled();
    see(&mut scheduler, "a", &waiting(0));
    let other = JobKey { db: Db(3), ..key("b") };
    scheduler.observe(&other, &waiting(0), Death::None);
    scheduler.clear(Some(Db(0)));
    assert!(!scheduler.knows(key("a").as_ref()) && scheduler.knows(other.as_ref()));
}

#[test]
fn the_jobs_of_other_databases_stay_what_they_are_when_most_are_flushed() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    let other = |name: &str| JobKey { db: Db(3), ..key(name) };
    for name in ["runs", "next", "last"] {
        scheduler.observe(&other(name), &waiting(0), Death::None);
    }
    let (running, claim) = run(&mut scheduler, now).unwrap();
    scheduler.observe(&other("lost"), &claimed("there", "t", 0), Death::Crash);
    for i in 0..20 {
        see(&mut scheduler, &format!("gone {i}"), &waiting(-1));
    }
    let (flushed, stopped) = run(&mut scheduler, now).unwrap();
    assert_eq!((&*running, &*flushed), ("runs", "gone 0"));
    assert_eq!(scheduler.clear(Some(Db(0))).waiting(), 19);
    assert!(stopped.stop.is_stopped() && !claim.stop.is_stopped());
    scheduler.release(&key(&flushed), stopped);
    assert_eq!(scheduler.unclaimed(), [(other("lost"), true)]);
    // It goes back to its place.
    scheduler.give_back(&other(&running), claim);
    assert_eq!(order(&mut scheduler, now).0, ["runs", "next", "last"]);
}

#[test]
fn what_is_downloaded_does_not_keep_what_is_at_hand() {
    let (mut scheduler, now) = (enabled(), Instant::now());
    let limits = Limits { per_host: 1, per_user: 9 };
    let from = |rank, host: &str| {
        let origin = Origin { user: "u".into(), host: Some(host.into()), model: "".into() };
        Seen::Waiting(Waiting { origin, ..at_rank(rank) })
    };
    for (name, seen) in [
        ("slow", from(0, "h")),
        ("next", from(1, "h")),
        ("other", from(2, "g")),
        ("data", waiting(3)),
    ] {
        see(&mut scheduler, name, &seen);
    }
    let mut next = |kind| match scheduler.next(now, kind, (limits, &|_| true), Token::new) {
        Next::Run(key, claim) => Some((key, claim)),
        _ => None,
    };
    let (slow, claim) = next(Kind::Downloader).unwrap();
    assert_eq!(slow, key("slow"));
    let other = next(Kind::Downloader).unwrap();
    assert_eq!(other.0, key("other"));
    assert!(next(Kind::Downloader).is_none());
    let data = next(Kind::Reader).unwrap();
    assert_eq!(data.0, key("data"));
    assert!(next(Kind::Reader).is_none());
    scheduler.downloaded(&slow, &claim);
    let second = match scheduler.next(now, Kind::Downloader, (limits, &|_| true), Token::new) {
        Next::Run(key, claim) => (key, claim),
        other => panic!("{other:?}"),
    };
    assert_eq!(second.0, key("next"));
    // The first has been given back, which frees nothing more.
    scheduler.give_back(&slow, claim);
    assert!(matches!(
        scheduler.next(now, Kind::Downloader, (limits, &|_| true), Token::new),
        Next::Idle
    ));
    scheduler.give_back(&second.0, second.1);
    assert!(matches!(
        scheduler.next(now, Kind::Downloader, (limits, &|_| true), Token::new),
        Next::Run(..)
    ));
}

#[test]
fn what_waits_is_counted_by_user_and_by_state() {
    let mut scheduler = enabled();
    let of = |user: &str, is_retry| {
        let origin = Origin { user: user.into(), host: None, model: "".into() };
        Seen::Waiting(Waiting { is_retry, origin, ..at_rank(0) })
    };
    see(&mut scheduler, "a", &of("x", false));
    see(&mut scheduler, "b", &of("x", true));
    see(&mut scheduler, "c", &of("y", false));
    assert_eq!((scheduler.waiting_of("x"), scheduler.waiting_of("z")), (2, 0));
    let retrying: Vec<_> = scheduler.keys(Some(State::Retrying)).cloned().collect();
    assert_eq!(retrying, [key("b")]);
    see(&mut scheduler, "b", &Seen::Nothing);
    assert_eq!(scheduler.waiting_of("x"), 1);
    assert_eq!(scheduler.keys(Some(State::Retrying)).count(), 0);
    assert_eq!(scheduler.clear(None).waiting(), 2);
    assert_eq!((scheduler.waiting(), scheduler.waiting_of("y")), (0, 0));
}
