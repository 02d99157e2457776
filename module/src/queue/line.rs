//! Workers of one kind that wait for a job. They are many, so they are woken one by one: who has
//! got a job wakes the next if there is more. One of them watches the clock for all.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Instant,
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::scheduler::{Kind, Scheduler};

#[derive(Default)]
pub(super) struct Line {
    woken: Condvar,
    /// When the one wakes who watches the clock. Touched under the scheduler's lock.
    alarm: Mutex<Option<Instant>>,
    /// One has been woken and has not looked yet: it is enough for all that happens until it does.
    /// Touched under the scheduler's lock.
    is_waking: AtomicBool,
}

impl Line {
    /// Waits to be woken; until then if nobody else watches the clock for as early a moment.
    pub(super) fn wait(&self, scheduler: &mut MutexGuard<'_, Scheduler>, until: Instant) {
        let is_watched = self.alarm.lock().is_some_and(|alarm| alarm <= until);
        if is_watched {
            self.woken.wait(scheduler);
            self.is_waking.store(false, Relaxed);
            return;
        }
        *self.alarm.lock() = Some(until);
        self.woken.wait_until(scheduler, until);
        self.is_waking.store(false, Relaxed);
        let mut alarm = self.alarm.lock();
        if *alarm == Some(until) {
            *alarm = None;
        }
    }

    /// Wakes a worker if there is a job for it, or one that is due before anybody looks.
    pub(super) fn wake_if_wanted(&self, scheduler: &Scheduler, kind: Kind) {
        let is_early = |due| self.alarm.lock().is_none_or(|alarm| due < alarm);
        if scheduler.has_job(kind) || scheduler.first_due().is_some_and(is_early) {
            self.wake_one(scheduler);
        }
    }

    /// The caller has got a job: another goes on in its place.
    pub(super) fn wake_next(&self, scheduler: &Scheduler, kind: Kind) {
        if scheduler.has_job(kind) || self.alarm.lock().is_none() {
            self.wake_one(scheduler);
        }
    }

    /// The scheduler is there to show that its lock is held.
    pub(super) fn wake_one(&self, _scheduler: &Scheduler) {
        if !self.is_waking.load(Relaxed) {
            self.is_waking.store(self.woken.notify_one(), Relaxed);
        }
    }

    pub(super) fn wake_all(&self) {
        self.woken.notify_all();
    }
}
