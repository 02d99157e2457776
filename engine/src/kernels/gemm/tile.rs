//! One thread's product: tiles of rows and panels that stay in registers.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::kernels::{
    Cpu,
    rows::{gelu, load, store},
    scratch::{Line, WIDTH},
};

/// Rows of the left operand: element `(r, k)` is `data[r * stride + k * step]`.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Rows<'a> {
    pub(in crate::kernels) data: &'a [f32],
    pub(in crate::kernels) stride: usize,
    pub(in crate::kernels) step: usize,
    pub(in crate::kernels) count: usize,
}

impl<'a> Rows<'a> {
    pub(in crate::kernels) fn new(data: &'a [f32], stride: usize, count: usize) -> Self {
        Self { data, stride, step: 1, count }
    }
}

/// The right operand of a product: whole panels.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Panels<'a> {
    pub(in crate::kernels) lines: &'a [Line],
    /// Lines of a panel.
    pub(in crate::kernels) steps: usize,
    /// Columns that count; the last panel is padded with zeros.
    pub(in crate::kernels) columns: usize,
}

impl Panels<'_> {
    fn count(&self) -> usize {
        self.columns.div_ceil(WIDTH)
    }
}

/// What happens to a sum before it is stored, in this order.
#[derive(Clone, Copy, Default)]
pub(in crate::kernels) struct Finish<'a> {
    /// Of whole numbers: what a unit is worth in every row and in every column.
    pub(in crate::kernels) units: Option<(&'a [f32], &'a [f32])>,
    /// Of int8: what 0 is worth in every row, and what every column's sum is worth.
    pub(in crate::kernels) zeros: Option<(&'a [f32], &'a [f32])>,
    pub(in crate::kernels) bias: Option<&'a [f32]>,
    pub(in crate::kernels) gelu: bool,
    /// Whether it is added to what stands in its place.
    pub(in crate::kernels) onto: bool,
}

impl Finish<'_> {
    fn is_nothing(&self) -> bool {
        self.units.is_none() && self.bias.is_none() && !self.gelu && !self.onto
    }
}

/// Where the result goes; tasks of other threads hold other columns of it.
pub(super) struct Target<'a> {
    data: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the tasks that share a target write disjoint columns.
unsafe impl Sync for Target<'_> {}

impl<'a> Target<'a> {
    pub(super) fn new(data: &'a mut [f32], stride: usize, rows: usize, columns: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + columns <= data.len(), "the result has no room");
        let data = data.as_mut_ptr();
        Self { data, stride, rows, columns, _borrow: std::marker::PhantomData }
    }
}

/// `out = x B`, on this thread.
pub(in crate::kernels) fn product(
    cpu: Cpu,
    x: Rows<'_>,
    b: Panels<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let out = Target::new(out, stride, x.count, b.columns);
    let (panels, finish) = (0..b.count(), &Finish::default());
    Product { x, b, panels, finish, out: &out }.multiply(cpu);
}

/// How a tile multiplies: what a panel's line holds, and the instruction.
pub(super) trait Arithmetic<S: Simd>: Copy {
    /// Part of a line, as a register.
    type Part: Copy;
    /// Sums, as a register.
    type Sum: Copy;
    /// Lines after which sums are turned into float32.
    const BLOCK: usize;

    /// # Safety
    ///
    /// `S::F32_LANES` floats must be readable at the address.
    unsafe fn load(self, simd: S, from: *const f32) -> Self::Part;
    fn splat(self, simd: S, x: f32) -> Self::Part;
    fn zero(self, simd: S) -> Self::Sum;
    fn multiply_add(self, simd: S, x: Self::Part, y: Self::Part, sum: Self::Sum) -> Self::Sum;
    fn as_f32s(self, simd: S, sum: Self::Sum) -> S::f32s;
}

/// Asks for a line that will be needed in a while.
#[inline(always)]
fn prefetch_later(line: *const Line) {
    // SAFETY: a hint reads nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Asks for what will be needed soon.
#[inline(always)]
pub(in crate::kernels) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(slice)).step_by(size_of::<Line>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().cast::<i8>().wrapping_add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

#[derive(Clone, Copy)]
struct F32;

impl<S: Simd> Arithmetic<S> for F32 {
    type Part = S::f32s;
    type Sum = S::f32s;
    const BLOCK: usize = usize::MAX;

    #[inline(always)]
    unsafe fn load(self, _simd: S, from: *const f32) -> S::f32s {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
    }

    #[inline(always)]
    fn splat(self, simd: S, x: f32) -> S::f32s {
        simd.splat_f32s(x)
    }

    #[inline(always)]
    fn zero(self, simd: S) -> S::f32s {
        simd.splat_f32s(0.0)
    }

    #[inline(always)]
    fn multiply_add(self, simd: S, x: S::f32s, y: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(x, y, sum)
    }

    #[inline(always)]
    fn as_f32s(self, _simd: S, sum: S::f32s) -> S::f32s {
        sum
    }
}

/// A product on one thread.
pub(super) struct Product<'a> {
    pub(super) x: Rows<'a>,
    pub(super) b: Panels<'a>,
    pub(super) panels: Range<usize>,
    pub(super) finish: &'a Finish<'a>,
    pub(super) out: &'a Target<'a>,
}

struct Floats<'a>(&'a Product<'a>);

impl WithSimd for Floats<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.0.run(simd, F32);
    }
}

impl Product<'_> {
    /// In float32.
    pub(super) fn multiply(&self, cpu: Cpu) {
        cpu.run(Floats(self));
    }

    /// All that the tiles touch is checked here, once; says whether there is anything to do.
    pub(super) fn check(&self) -> bool {
        let Self { x, b, panels, finish, out, .. } = self;
        assert!(panels.end * b.steps <= b.lines.len(), "panels are missing");
        let reach = |rows: usize, stride: usize, last: usize| (rows - 1) * stride + last;
        if x.count == 0 || panels.is_empty() {
            return false;
        }
        assert!(
            b.steps == 0 || reach(x.count, x.stride, (b.steps - 1) * x.step) < x.data.len(),
            "rows are missing"
        );
        assert!(x.count <= out.rows && b.columns <= out.columns, "the result has no room");
        if let Some(bias) = finish.bias {
            assert!(panels.end * WIDTH <= bias.len(), "the bias is too short");
        }
        for (rows, columns) in finish.units.iter().chain(&finish.zeros) {
            assert!(
                x.count <= rows.len() && panels.end * WIDTH <= columns.len(),
                "scales are missing"
            );
        }
        true
    }

    #[inline(always)]
    pub(super) fn run<S: Simd, A: Arithmetic<S>>(&self, simd: S, arithmetic: A) {
        if !self.check() {
            return;
        }
        let Self { x, panels, .. } = self;
        // Few rows leave registers for more panels, which hides the latency of the sums.
        let rows = match S::F32_LANES {
            1 => 1,
            2..=8 => 6,
            _ => 12,
        };
        let pieces = x.count.div_ceil(rows);
        let most = x.count.div_ceil(pieces);
        let wide = match S::F32_LANES {
            1 => 1,
            2..=8 => {
                if most <= 2 {
                    2
                } else {
                    1
                }
            }
            _ => {
                if most <= 6 {
                    4
                } else {
                    2
                }
            }
        };
        let mut panel = panels.start;
        while panel < panels.end {
            let width = if panel + wide <= panels.end { wide } else { 1 };
            let mut first = 0;
            for piece in 0..pieces {
                let last = (piece + 1) * x.count / pieces;
                // While the second and later tiles compute, the next panels come nearer.
                let next = (panel + width + piece).wrapping_sub(1);
                let next = if piece == 0 || next >= panels.end { panel } else { next };
                // SAFETY: rows and panels are within the bounds asserted above.
                unsafe {
                    self.piece((simd, arithmetic), (first, last - first), panel, width, next);
                };
                first = last;
            }
            panel += width;
        }
    }

    /// Chooses the tile: vectors per row are panels times vectors per panel.
    ///
    /// # Safety
    ///
    /// The rows `first..first + count` and the panels `panel..panel + width` and `next` must exist.
    #[inline(always)]
    unsafe fn piece<S: Simd, A: Arithmetic<S>>(
        &self,
        (simd, arithmetic): (S, A),
        (first, count): (usize, usize),
        panel: usize,
        width: usize,
        next: usize,
    ) {
        macro_rules! tile {
            ($($rows:literal)* by $vectors:literal) => {
                match count {
                    // SAFETY: the caller's promise.
                    $($rows => unsafe { self.tile::<S, A, $rows, $vectors>((simd, arithmetic), first, panel, next) },)*
                    _ => unreachable!("`run` cuts rows into pieces of these sizes"),
                }
            };
        }
        match (S::F32_LANES, width) {
            (1, _) => tile!(1 by 16),
            (2..=4, 2) => tile!(1 2 by 8),
            (5..=8, 2) => tile!(1 2 by 4),
            (5..=8, _) => tile!(1 2 3 4 5 6 by 2),
            (2..=4, _) | (_, 4) => tile!(1 2 3 4 5 6 by 4),
            (_, 2) => tile!(1 2 3 4 5 6 7 8 9 10 11 12 by 2),
            _ => tile!(1 2 3 4 5 6 7 8 9 10 11 12 by 1),
        }
    }

    /// # Safety
    ///
    /// As [`Self::piece`].
    #[inline(always)]
    unsafe fn tile<S: Simd, A: Arithmetic<S>, const ROWS: usize, const VECTORS: usize>(
        &self,
        (simd, arithmetic): (S, A),
        first: usize,
        panel: usize,
        next: usize,
    ) {
        let Self { x, b, .. } = self;
        let parts = WIDTH / S::F32_LANES; // of a line
        let mut totals = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        // SAFETY: of all tiles together, `check` has it that rows and panels exist, and room for
        // the result, whose columns no other task has; a vector is a part of a line of one of the
        // tile's panels.
        unsafe {
            // Every third row: the two after it are addressed from there, by one instruction each.
            let left = x.data.as_ptr().add(first * x.stride);
            let mut left: [*const f32; 4] =
                std::array::from_fn(|third| left.wrapping_add(3 * third * x.stride));
            let mut right = b.lines.as_ptr().add(panel * b.steps).cast::<f32>();
            let mut ahead = b.lines.as_ptr().add(next * b.steps);
            let mut rest = b.steps;
            while rest > 0 {
                let block = rest.min(A::BLOCK);
                let mut sums = [[arithmetic.zero(simd); VECTORS]; ROWS];
                for _ in 0..block {
                    prefetch_later(ahead);
                    ahead = ahead.add(1);
                    let line: [A::Part; VECTORS] = std::array::from_fn(|v| {
                        let offset = v / parts * b.steps * WIDTH + v % parts * S::F32_LANES;
                        arithmetic.load(simd, right.add(offset))
                    });
                    // Written out: in a loop that the compiler keeps, the sums leave the registers.
                    macro_rules! each_row {
                        ($($r:literal)*) => {
                            $(if let Some(sums) = sums.get_mut($r) {
                                let x = arithmetic.splat(simd, *left[$r / 3].add($r % 3 * x.stride));
                                for (sum, part) in sums.iter_mut().zip(line) {
                                    *sum = arithmetic.multiply_add(simd, x, part, *sum);
                                }
                            })*
                        };
                    }
                    each_row!(0 1 2 3 4 5 6 7 8 9 10 11);
                    left = left.map(|left| left.wrapping_add(x.step));
                    right = right.add(WIDTH);
                }
                for (totals, sums) in totals.iter_mut().zip(&sums) {
                    for (total, sum) in totals.iter_mut().zip(sums) {
                        let sum = arithmetic.as_f32s(simd, *sum);
                        *total =
                            if A::BLOCK == usize::MAX { sum } else { simd.add_f32s(*total, sum) };
                    }
                }
                rest -= block;
            }
            let Self { finish, out, .. } = self;
            let column = panel * WIDTH;
            if finish.is_nothing() && column + VECTORS * S::F32_LANES <= b.columns {
                for (r, totals) in totals.iter().enumerate() {
                    let to = out.data.add((first + r) * out.stride + column);
                    for (v, total) in totals.iter().enumerate() {
                        to.add(v * S::F32_LANES).cast::<S::f32s>().write_unaligned(*total);
                    }
                }
            } else {
                let sums = bytemuck::must_cast_slice(totals.as_flattened());
                self.store(simd, sums, ROWS, (first, column));
            }
        }
    }

    /// Finishes sums, one row after the other, and puts them in their place.
    ///
    /// # Safety
    ///
    /// The rows `first..first + rows`, and panels for that many columns from `column` on, must exist.
    #[inline(always)]
    pub(super) unsafe fn store<S: Simd>(
        &self,
        simd: S,
        sums: &[f32],
        rows: usize,
        (first, column): (usize, usize),
    ) {
        simd.vectorize(Finished { product: self, sums, rows, first, column });
    }
}

/// Sums of a tile, to be finished and put in their place. It is compiled once for an instruction
/// set: in every tile it would be most of the code.
struct Finished<'a> {
    product: &'a Product<'a>,
    /// One row after the other.
    sums: &'a [f32],
    rows: usize,
    first: usize,
    column: usize,
}

impl WithSimd for Finished<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { product: Product { finish, out, b, .. }, sums, rows, first, column } = self;
        let width = sums.len() / rows;
        let splat = |x| simd.splat_f32s(x);
        for offset in (0..width).step_by(S::F32_LANES) {
            let at = column + offset;
            let count = b.columns.saturating_sub(at).min(S::F32_LANES);
            if count == 0 {
                break;
            }
            // Beyond the last column there are only zeros to add to zeros.
            let of_columns = |slice: &[f32]| {
                let end = (at + S::F32_LANES).min(slice.len());
                load(simd, &slice[at.min(end)..end])
            };
            let units = finish.units.map(|(rows, columns)| (rows, of_columns(columns)));
            let zeros = finish.zeros.map(|(rows, columns)| (rows, of_columns(columns)));
            let bias = finish.bias.map(of_columns);
            for (r, sums) in sums.chunks_exact(width).enumerate() {
                let row = first + r;
                let mut y = load(simd, &sums[offset..offset + S::F32_LANES]);
                if let Some((rows, columns)) = units {
                    y = simd.mul_f32s(y, simd.mul_f32s(columns, splat(rows[row])));
                }
                if let Some((rows, columns)) = zeros {
                    y = simd.mul_add_e_f32s(columns, splat(rows[row]), y);
                }
                if let Some(bias) = bias {
                    y = simd.add_f32s(y, bias);
                }
                if finish.gelu {
                    y = gelu(simd, y);
                }
                // SAFETY: row and columns are the target's, as `check` has it, and no other task
                // has these columns.
                let to = unsafe {
                    std::slice::from_raw_parts_mut(out.data.add(row * out.stride + at), count)
                };
                if finish.onto {
                    y = simd.add_f32s(y, load(simd, to));
                }
                store(simd, to, y);
            }
        }
    }
}
