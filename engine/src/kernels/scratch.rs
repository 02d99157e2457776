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

/// Borrowed cache lines; their contents are what the last user left.
pub(super) struct Lines {
    /// As many as were ever asked of it: what is there need not be cleared again.
    all: Vec<Line>,
    count: usize,
}

impl Lines {
    pub(super) fn new(count: usize) -> Self {
        let mut all = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
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
