//! A matrix in other numbers beside it, so that both can be tried in a model that is loaded.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use super::Matrix;

/// Which of two matrices is taken, and how long its products took.
#[derive(Debug, Default)]
pub(crate) struct Switch {
    is_other: AtomicBool,
    nanoseconds: AtomicU64,
}

impl Switch {
    /// Takes the other one from now on, or this one.
    pub(crate) fn set(&self, is_other: bool) {
        self.is_other.store(is_other, Relaxed);
    }

    /// Thread time of all products since this was asked last, in nanoseconds.
    pub(crate) fn take_time(&self) -> u64 {
        self.nanoseconds.swap(0, Relaxed)
    }
}

/// The other matrix.
#[derive(Debug)]
pub(super) struct Other {
    matrix: Matrix,
    switch: Arc<Switch>,
}

/// Adds the time until it is dropped, on so many threads.
pub(super) struct Clock<'a>(Option<(&'a Switch, Instant)>, usize);

impl Drop for Clock<'_> {
    fn drop(&mut self) {
        if let Self(Some((switch, start)), threads) = self {
            #[expect(clippy::cast_possible_truncation, reason = "less than 500 years")]
            let passed = start.elapsed().as_nanos() as u64 * *threads as u64;
            switch.nanoseconds.fetch_add(passed, Relaxed);
        }
    }
}

impl Matrix {
    /// The same with another one beside it, which `switch` may choose.
    pub(crate) fn or(self, matrix: Self, switch: Arc<Switch>) -> Self {
        assert_eq!((self.inputs, self.outputs), (matrix.inputs, matrix.outputs));
        Self { other: Some(Box::new(Other { matrix, switch })), ..self }
    }

    /// The one that is to be used, and what times its use by so many threads.
    #[inline]
    pub(super) fn chosen(&self, threads: impl FnOnce() -> usize) -> (&Self, Clock<'_>) {
        match self.other.as_deref() {
            None => (self, Clock(None, 0)),
            Some(Other { matrix, switch }) => {
                let is_other = switch.is_other.load(Relaxed);
                let clock = Clock(Some((&**switch, Instant::now())), threads());
                (if is_other { matrix } else { self }, clock)
            }
        }
    }
}
