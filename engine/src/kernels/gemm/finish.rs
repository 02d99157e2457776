//! What happens to the sums of a tile, and where they go.

use std::{marker::PhantomData, mem::MaybeUninit};

use pulp::{Simd, WithSimd};

use super::tile::Product;
use crate::kernels::rows::{gelu, load, store};

/// What happens to a sum before it is stored: the bias is in units of the result, as is what zeros
/// are worth.
#[derive(Clone, Copy, Default)]
pub(in crate::kernels) struct Finish<'a> {
    /// Of whole numbers: what a unit is worth in every row and in every column.
    pub(in crate::kernels) units: Option<(&'a [f32], &'a [f32])>,
    /// Of int8: what 0 is worth in every row, and what every column's sum is worth.
    pub(in crate::kernels) zeros: Option<(&'a [f32], &'a [f32])>,
    pub(in crate::kernels) bias: Option<&'a [f32]>,
    pub(in crate::kernels) then: Then,
}

/// What happens to a sum at last.
#[derive(Clone, Copy, Default)]
pub(in crate::kernels) enum Then {
    #[default]
    Store,
    Gelu,
    /// It is added to what stands in its place.
    Add,
}

impl Then {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, y: S::f32s, there: impl FnOnce() -> S::f32s) -> S::f32s {
        match self {
            Self::Store => y,
            Self::Gelu => gelu(simd, y),
            Self::Add => simd.add_f32s(y, there()),
        }
    }
}

impl Finish<'_> {
    pub(super) fn is_nothing(&self) -> bool {
        self.units.is_none() && self.bias.is_none() && matches!(self.then, Then::Store)
    }
}

/// Where the result goes; tasks of other threads hold other columns of it.
pub(super) struct Target<'a> {
    pub(super) data: *mut f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the tasks that share a target write disjoint columns.
unsafe impl Sync for Target<'_> {}

impl<'a> Target<'a> {
    pub(super) fn new(data: &'a mut [f32], stride: usize, rows: usize, columns: usize) -> Self {
        Self::unwritten(unwritten(data), stride, rows, columns)
    }

    /// Of whose elements none is read, unless the product is added to what stands there.
    pub(super) fn unwritten(
        data: &'a mut [MaybeUninit<f32>],
        stride: usize,
        rows: usize,
        columns: usize,
    ) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + columns <= data.len(), "the result has no room");
        let data = data.as_mut_ptr().cast();
        Self { data, stride, rows, columns, _borrow: PhantomData }
    }
}

/// Floats as room for floats; only floats may be written there.
pub(super) fn unwritten(data: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the types are alike in memory, and products write nothing but floats.
    unsafe { &mut *(std::ptr::from_mut(data) as *mut [MaybeUninit<f32>]) }
}

/// Sums of a tile, to be finished and put in their place. It is compiled once for an instruction
/// set: in every tile it would be most of the code.
pub(super) struct Finished<'a> {
    pub(super) product: &'a Product<'a>,
    /// One row after the other.
    pub(super) sums: &'a [f32],
    pub(super) rows: usize,
    pub(super) first: usize,
    pub(super) column: usize,
}

impl WithSimd for Finished<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { finish, b, .. } = self.product;
        for offset in (0..self.sums.len() / self.rows).step_by(S::F32_LANES) {
            let count = b.columns.saturating_sub(self.column + offset).min(S::F32_LANES);
            if count == 0 {
                break;
            }
            // One loop over the rows for each case, none with a case in it.
            // SAFETY: of each vector only what is the target's is read and written.
            unsafe {
                match finish.then {
                    _ if count < S::F32_LANES => self.vectors(simd, offset, |y, to| {
                        let to = std::slice::from_raw_parts_mut(to, count);
                        let y = finish.then.apply(simd, y, || load(simd, to));
                        store(simd, to, y);
                    }),
                    Then::Store => self.vectors(simd, offset, |y, to| put::<S>(to, y)),
                    Then::Gelu => self.vectors(simd, offset, |y, to| put::<S>(to, gelu(simd, y))),
                    Then::Add => self.vectors(simd, offset, |y, to| {
                        put::<S>(to, simd.add_f32s(y, get::<S>(to)));
                    }),
                }
            }
        }
    }
}

/// # Safety
///
/// A register of floats must be readable there.
#[inline(always)]
pub(super) unsafe fn get<S: Simd>(from: *const f32) -> S::f32s {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<S::f32s>().read_unaligned() }
}

/// # Safety
///
/// There must be room for a register of floats.
#[inline(always)]
pub(super) unsafe fn put<S: Simd>(to: *mut f32, y: S::f32s) {
    // SAFETY: the caller's promise.
    unsafe { to.cast::<S::f32s>().write_unaligned(y) };
}

impl Finished<'_> {
    /// Calls `put` with what the sums of every row at `offset` are worth, and with their place.
    ///
    /// # Safety
    ///
    /// `put` must know how much there is of the target.
    #[inline(always)]
    unsafe fn vectors<S: Simd>(&self, simd: S, offset: usize, put: impl Fn(S::f32s, *mut f32)) {
        let Self { product: Product { finish, out, .. }, sums, rows, first, column } = self;
        let (width, at) = (sums.len() / rows, column + offset);
        let splat = |x| simd.splat_f32s(x);
        // SAFETY: `check` has it that there are rows, and columns to whole panels.
        unsafe {
            let of_columns = |slice: &[f32]| get::<S>(slice.as_ptr().add(at));
            let bias = finish.bias.map_or(splat(0.0), of_columns);
            let units = finish.units.map(|(rows, columns)| (rows, of_columns(columns)));
            let zeros = finish.zeros.map(|(rows, columns)| (rows, of_columns(columns)));
            for r in 0..*rows {
                let row = first + r;
                let mut y = get::<S>(sums.as_ptr().add(r * width + offset));
                y = match units {
                    Some((rows, columns)) => {
                        let unit = simd.mul_f32s(columns, splat(*rows.get_unchecked(row)));
                        simd.mul_add_e_f32s(y, unit, bias)
                    }
                    None => simd.add_f32s(y, bias),
                };
                if let Some((rows, columns)) = zeros {
                    y = simd.mul_add_e_f32s(columns, splat(*rows.get_unchecked(row)), y);
                }
                put(y, out.data.add(row * out.stride).wrapping_add(at));
            }
        }
    }
}
