//! Buffers that a thread keeps for its next task: no allocation, no page faults.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

/// Elements of a panel's row, and of a cache line.
pub(super) const WIDTH: usize = 16;

/// A cache line of float32 (or of pairs of bfloat16, see `gemm`).
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [f32; WIDTH]);

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// The smallest buffer that is large enough, else the largest: few of them grow to the largest size.
fn take(free: &mut Vec<Vec<Line>>, count: usize) -> Option<Vec<Line>> {
    let by_fit = |(_, lines): &(usize, &Vec<Line>)| {
        let length = lines.len();
        if length < count { (true, usize::MAX - length) } else { (false, length) }
    };
    let (at, _) = free.iter().enumerate().min_by_key(by_fit)?;
    Some(free.swap_remove(at))
}

/// Borrowed cache lines; their contents are what the last user left.
pub(super) struct Lines {
    /// As many as were ever asked of it: what is there need not be cleared again.
    all: Vec<Line>,
    count: usize,
}

impl Lines {
    pub(super) fn new(count: usize) -> Self {
        let mut all = FREE.with_borrow_mut(|free| take(free, count)).unwrap_or_default();
        if all.len() < count {
            all.resize(count, Line::default());
        }
        Self { all, count }
    }

    /// For so many floats.
    pub(super) fn floats(count: usize) -> Self {
        Self::new(count.div_ceil(WIDTH))
    }

    pub(super) fn as_floats(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut *self)
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        &self.all[..self.count]
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        &mut self.all[..self.count]
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        FREE.with_borrow_mut(|free| free.push(std::mem::take(&mut self.all)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_is_left_for_those_who_need_it() {
        let lines = |length| vec![Line::default(); length];
        let mut free = vec![lines(9), lines(2), lines(5)];
        let mut taken = |count| take(&mut free, count).map(|lines| lines.len());
        assert_eq!([taken(1), taken(6), taken(6), taken(1)], [Some(2), Some(9), Some(5), None]);
    }
}
