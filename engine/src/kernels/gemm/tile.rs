//! One thread's product: tiles of rows and panels that stay in registers.

use std::{mem::MaybeUninit, ops::Range};

use pulp::{Simd, WithSimd};

use super::finish::{Finish, Finished, Target, get, put};
use crate::kernels::{
    Cpu,
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
    /// Whether the left operand is [`Interleave`]d.
    const INTERLEAVED: bool;

    /// # Safety
    ///
    /// `S::F32_LANES` floats must be readable at the address.
    unsafe fn load(self, simd: S, from: *const f32) -> Self::Part;
    fn splat(self, simd: S, x: f32) -> Self::Part;
    fn zero(self, simd: S) -> Self::Sum;
    fn multiply_add(self, simd: S, x: Self::Part, y: Self::Part, sum: Self::Sum) -> Self::Sum;
    fn as_f32s(self, simd: S, sum: Self::Sum) -> S::f32s;
}

/// Asks for a line that will be needed soon, or, `LATER`, in a while.
#[inline(always)]
fn prefetch_line<const LATER: bool>(line: *const Line) {
    // SAFETY: a hint reads nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if LATER {
            _mm_prefetch::<_MM_HINT_T1>(line.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[inline(always)]
fn prefetch_lines<const LATER: bool, T>(slice: &[T]) {
    for line in 0..size_of_val(slice).div_ceil(size_of::<Line>()) {
        prefetch_line::<LATER>(slice.as_ptr().cast::<Line>().wrapping_add(line));
    }
}

/// Asks for what will be needed soon.
#[inline(always)]
pub(in crate::kernels) fn prefetch<T>(slice: &[T]) {
    prefetch_lines::<false, T>(slice);
}

/// Asks for what will be needed in a while.
#[inline(always)]
pub(in crate::kernels) fn prefetch_later<T>(slice: &[T]) {
    prefetch_lines::<true, T>(slice);
}

#[derive(Clone, Copy)]
struct F32;

impl<S: Simd> Arithmetic<S> for F32 {
    type Part = S::f32s;
    type Sum = S::f32s;
    const BLOCK: usize = usize::MAX;
    const INTERLEAVED: bool = false;

    #[inline(always)]
    unsafe fn load(self, _simd: S, from: *const f32) -> S::f32s {
        // SAFETY: the caller's promise.
        unsafe { get::<S>(from) }
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

/// Rows of a tile, at most.
fn rows_of_a_tile<S: Simd>() -> usize {
    match S::F32_LANES {
        1 => 1,
        2..=8 => 6,
        _ => 12,
    }
}

/// The rows of each tile.
fn pieces<S: Simd>(count: usize) -> impl Iterator<Item = Range<usize>> {
    let pieces = count.div_ceil(rows_of_a_tile::<S>());
    (1..=pieces).scan(0, move |first, piece| {
        let rows = *first..piece * count / pieces;
        *first = rows.end;
        Some(rows)
    })
}

/// Rows of the largest of these tiles.
fn most_rows<S: Simd>(count: usize) -> usize {
    count.div_ceil(count.div_ceil(rows_of_a_tile::<S>()).max(1))
}

/// Rows that [`Interleave`] puts together.
const FOUR: usize = 4;

/// Writes rows of `steps` numbers so that a tile reads them from few addresses: of four rows at a
/// time the first number of each, then the second ones. A tile's last rows stand for those that it
/// lacks, which nobody reads.
pub(super) struct Interleave<'a> {
    pub(super) x: Rows<'a>,
    pub(super) steps: usize,
    pub(super) out: &'a mut [f32],
}

impl Interleave<'_> {
    /// Numbers that `count` rows of `steps` become, at most.
    pub(super) fn length(count: usize, steps: usize) -> usize {
        // Where tiles have up to 6 rows; of those with up to 12 there are half as many.
        count.div_ceil(6) * 6_usize.next_multiple_of(FOUR) * steps
    }

    /// Numbers of each tile.
    fn tile<S: Simd>(count: usize, steps: usize) -> usize {
        most_rows::<S>(count).next_multiple_of(FOUR) * steps
    }
}

impl WithSimd for Interleave<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self { x, steps, out } = self;
        let tile = Self::tile::<S>(x.count, steps);
        assert!(pieces::<S>(x.count).count() * tile <= out.len(), "no room for the rows");
        for (rows, out) in pieces::<S>(x.count).zip(out.chunks_exact_mut(tile.max(1))) {
            let row = |r: usize| &x.data[r.min(rows.end - 1) * x.stride..][..steps];
            for (first, out) in rows.clone().step_by(FOUR).zip(out.chunks_exact_mut(FOUR * steps)) {
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| row(first + i));
                let (out, _) = out.as_chunks_mut::<FOUR>();
                for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                    *out = [*a, *b, *c, *d];
                }
            }
        }
    }
}

/// Lines between one that is used and one that is asked for.
const AHEAD: usize = 16;

/// The same address, of which the compiler knows nothing: else it keeps one for every row, which are
/// more than there are registers.
#[inline(always)]
#[cfg_attr(
    target_arch = "x86_64",
    expect(clippy::pointers_in_nomem_asm_block, reason = "nothing is read or written")
)]
fn opaque(address: *const f32) -> *const f32 {
    #[cfg(target_arch = "x86_64")]
    let address = {
        let mut address = address;
        // SAFETY: nothing is done.
        unsafe {
            std::arch::asm!("/* {} */", inout(reg) address, options(pure, nomem, nostack));
        }
        address
    };
    address
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
    pub(super) fn check(&self, is_interleaved: bool) -> bool {
        let Self { x, b, panels, finish, out, .. } = self;
        assert!(panels.end * b.steps <= b.lines.len(), "panels are missing");
        if x.count == 0 || panels.is_empty() {
            return false;
        }
        let last = |steps: usize| (x.count - 1) * x.stride + (steps - 1) * x.step;
        let has_rows = match b.steps {
            0 => true,
            steps if is_interleaved => Interleave::length(x.count, steps) <= x.data.len(),
            steps => last(steps) < x.data.len(),
        };
        assert!(has_rows, "rows are missing");
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
        if !self.check(A::INTERLEAVED) {
            return;
        }
        let Self { x, b, panels, .. } = self;
        // Few rows leave registers for more panels, which hides the latency of the sums.
        let most = most_rows::<S>(x.count);
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
        let interleaved = Interleave::tile::<S>(x.count, b.steps);
        let mut panel = panels.start;
        while panel < panels.end {
            let width = if panel + wide <= panels.end { wide } else { 1 };
            for (piece, rows) in pieces::<S>(x.count).enumerate() {
                // While the second and later tiles compute, the next panels come nearer.
                let next = (panel + width + piece).wrapping_sub(1);
                let next = if piece == 0 || next >= panels.end { panel } else { next };
                let start =
                    if A::INTERLEAVED { piece * interleaved } else { rows.start * x.stride };
                // SAFETY: rows and panels are within the bounds asserted above.
                unsafe { self.piece((simd, arithmetic), rows, start, panel, width, next) };
            }
            panel += width;
        }
    }

    /// Chooses the tile: vectors per row are panels times vectors per panel.
    ///
    /// # Safety
    ///
    /// The rows, which begin at `start` of the left operand, and the panels `panel..panel + width`
    /// and `next` must exist.
    #[inline(always)]
    unsafe fn piece<S: Simd, A: Arithmetic<S>>(
        &self,
        (simd, arithmetic): (S, A),
        rows: Range<usize>,
        start: usize,
        panel: usize,
        width: usize,
        next: usize,
    ) {
        macro_rules! tile {
            ($($rows:literal)* by $vectors:literal) => {
                match rows.len() {
                    // SAFETY: the caller's promise.
                    $($rows => unsafe { self.tile::<S, A, $rows, $vectors>((simd, arithmetic), (rows.start, start), panel, next) },)*
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
        (first, start): (usize, usize),
        panel: usize,
        next: usize,
    ) {
        let Self { x, b, .. } = self;
        let parts = WIDTH / S::F32_LANES; // of a line
        let mut totals = MaybeUninit::<Aligned<[[S::f32s; VECTORS]; ROWS]>>::uninit();
        let totals = totals.as_mut_ptr().cast::<S::f32s>();
        // SAFETY: of all tiles together, `check` has it that rows and panels exist, and room for
        // the result, whose columns no other task has; a vector is a part of a line of one of the
        // tile's panels.
        unsafe {
            // Four rows that are interleaved have one address. Of others it is every third's, from
            // which one instruction each finds the two after it.
            let (apart, step) =
                if A::INTERLEAVED { (FOUR * b.steps, FOUR) } else { (3 * x.stride, x.step) };
            let left = x.data.as_ptr().add(start);
            let mut left: [*const f32; 4] = std::array::from_fn(|i| left.wrapping_add(i * apart));
            let mut right = b.lines.as_ptr().add(panel * b.steps).cast::<f32>();
            let mut ahead = b.lines.as_ptr().add(next * b.steps);
            let mut rest = b.steps;
            loop {
                let block = rest.min(A::BLOCK);
                let mut sums = [[arithmetic.zero(simd); VECTORS]; ROWS];
                for _ in 0..block {
                    prefetch_line::<true>(ahead);
                    ahead = ahead.add(1);
                    for panel in 0..VECTORS / parts {
                        let at = (panel * b.steps + AHEAD) * WIDTH;
                        prefetch_line::<false>(right.wrapping_add(at).cast());
                    }
                    let line: [A::Part; VECTORS] = std::array::from_fn(|v| {
                        let offset = v / parts * b.steps * WIDTH + v % parts * S::F32_LANES;
                        arithmetic.load(simd, right.add(offset))
                    });
                    // Written out: in a loop that the compiler keeps, the sums leave the registers.
                    macro_rules! each_row {
                        ($($r:literal)*) => {
                            $(if let Some(sums) = sums.get_mut($r) {
                                let x = if A::INTERLEAVED {
                                    left[$r / FOUR].add($r % FOUR)
                                } else {
                                    left[$r / 3].add($r % 3 * x.stride)
                                };
                                let x = arithmetic.splat(simd, *x);
                                for (sum, part) in sums.iter_mut().zip(line) {
                                    *sum = arithmetic.multiply_add(simd, x, part, *sum);
                                }
                            })*
                        };
                    }
                    each_row!(0 1 2 3 4 5 6 7 8 9 10 11);
                    left = left.map(|left| left.wrapping_add(step));
                    if !A::INTERLEAVED {
                        left = left.map(opaque);
                    }
                    right = right.add(WIDTH);
                }
                let is_first = rest == b.steps;
                for (i, sum) in sums.as_flattened().iter().enumerate() {
                    let (total, sum) = (totals.add(i), arithmetic.as_f32s(simd, *sum));
                    *total = if is_first { sum } else { simd.add_f32s(*total, sum) };
                }
                rest -= block;
                if rest == 0 {
                    break;
                }
            }
            let Self { finish, out, .. } = self;
            let column = panel * WIDTH;
            if finish.is_nothing() && column + VECTORS * S::F32_LANES <= b.columns {
                for r in 0..ROWS {
                    let to = out.data.add((first + r) * out.stride + column);
                    for v in 0..VECTORS {
                        put::<S>(to.add(v * S::F32_LANES), *totals.add(r * VECTORS + v));
                    }
                }
            } else {
                let sums =
                    std::slice::from_raw_parts(totals.cast::<f32>(), ROWS * VECTORS * S::F32_LANES);
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

/// Registers in memory, none of them across two cache lines.
#[repr(align(64))]
struct Aligned<T>(T);
