//! Matrix products with packed matrices.
//!
//! A [`Matrix`] stands in panels of [`WIDTH`] columns: per panel, one cache line for every input
//! (bfloat16: for every two). A tile of up to 12 rows times a few panels stays in registers while
//! the inner dimension passes by once; what follows the product (bias, GELU, sum) happens before
//! it is stored. Each element is one sum in the order of the inner dimension, so results do not
//! depend on how rows and columns are cut into tiles and tasks.
#![expect(unsafe_code, reason = "pointers into panels, and the bfloat16 instructions")]

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    Cpu, Precision,
    rows::{gelu, load, store},
    scratch::{Line, Lines, WIDTH},
};

/// A weight matrix, packed for `y = x W^T + b`.
#[derive(Debug)]
pub(crate) struct Matrix {
    inputs: usize,
    outputs: usize,
    lines: Vec<Line>,
    /// Padded to whole panels.
    bias: Vec<f32>,
    /// Of int16: what one unit of each column is worth; padded likewise.
    scales: Vec<f32>,
    precision: Precision,
}

impl Matrix {
    /// Packs `weight`, `[outputs, inputs]`, and `bias`, `[outputs]`, on all threads.
    pub(crate) fn pack(
        weight: &[f32],
        bias: Option<&[f32]>,
        inputs: usize,
        precision: Precision,
    ) -> Self {
        let outputs = weight.len() / inputs.max(1);
        let steps = steps(inputs, precision);
        let mut lines = vec![Line::default(); outputs.div_ceil(WIDTH) * steps];
        let mut scales = vec![0.0; outputs.next_multiple_of(WIDTH)];
        let panels = lines.par_chunks_mut(steps.max(1)).zip(scales.par_chunks_mut(WIDTH));
        panels.enumerate().for_each(|(panel, (lines, scales))| {
            let rows = weight.chunks_exact(inputs).skip(panel * WIDTH).take(WIDTH);
            for (column, row) in rows.enumerate() {
                let scale = int16_scale(row);
                scales[column] = scale;
                let pack: &dyn Fn(&[f32]) -> f32 = match precision {
                    Precision::F32 => &|x| x[0],
                    Precision::Bf16 => &round_pair,
                    Precision::Int16 => &|pair| quantize_pair(pair, scale.recip()),
                };
                let parts = row.chunks(values_of_a_line(precision));
                for (line, part) in lines.iter_mut().zip(parts) {
                    line.0[column] = pack(part);
                }
            }
        });
        let mut padded = bias.unwrap_or_default().to_vec();
        padded.resize(outputs.next_multiple_of(WIDTH), 0.0);
        Self { inputs, outputs, lines, bias: padded, scales, precision }
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// All columns, as an operand.
    fn operand(&self) -> Panels<'_> {
        Panels {
            lines: &self.lines,
            steps: steps(self.inputs, self.precision),
            columns: self.outputs,
        }
    }

    /// `out = finish(x W^T + b)` for a block of rows, on this thread.
    pub(super) fn block(
        &self,
        cpu: Cpu,
        x: Rows<'_>,
        finish: &Finish<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        let out = Target::new(out, stride, x.count, self.outputs);
        self.columns(cpu, x, 0..self.panels(), finish, &out);
    }

    /// The same for some panels only; other threads may write the other columns.
    fn columns(
        &self,
        cpu: Cpu,
        x: Rows<'_>,
        panels: Range<usize>,
        finish: &Finish<'_>,
        out: &Target<'_>,
    ) {
        let finish = Finish { bias: Some(&self.bias), ..*finish };
        match self.precision {
            Precision::F32 => multiply(cpu, x, self.inputs, self.operand(), panels, &finish, out),
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 => {
                let unit = Bf16::new(cpu).expect("packed as bfloat16 only where the CPU has it");
                let mut rounded = Lines::floats(x.count * padded(self.inputs.div_ceil(2)));
                let rows = unit.round_rows(x, self.inputs, &mut rounded);
                // SAFETY: `unit` proves that the processor has the instructions.
                unsafe { unit.multiply(rows, self.operand(), panels, &finish, out) }
            }
            #[cfg(target_arch = "x86_64")]
            Precision::Int16 => {
                let unit = Int16::new(cpu).expect("packed as int16 only where the CPU has it");
                let mut rounded = Lines::floats(x.count * padded(self.inputs.div_ceil(2)));
                let mut scales = Lines::floats(x.count);
                let scales = &mut scales.as_floats()[..x.count];
                let rows = unit.quantize_rows(x, self.inputs, &mut rounded, scales);
                let finish = Finish { scales: Some((scales, &self.scales)), ..finish };
                // SAFETY: as above.
                unsafe { unit.multiply(rows, self.operand(), panels, &finish, out) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("packed in these precisions only where the CPU has them"),
        }
    }
}

/// Lines of a panel.
fn steps(inputs: usize, precision: Precision) -> usize {
    inputs.div_ceil(values_of_a_line(precision))
}

/// Inputs that one line of a panel holds of every column.
fn values_of_a_line(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 1,
        Precision::Bf16 | Precision::Int16 => 2,
    }
}

/// Lines (pairs of inputs) whose int16 products are summed as int32 before they become float32.
const INT16_STEPS: usize = 64;
/// Largest Euclidean length of a block in int16, and largest number.
const BLOCK_LENGTH: f32 = 45_800.0;
const LARGEST: f32 = 32_700.0;

/// What one unit of a row of int16 is worth, so that no sum of products of [`INT16_STEPS`] lines
/// can overflow: the largest number is 32767, and no block's Euclidean length is above the square
/// root of 2^31 (Cauchy and Schwarz then bound the sum), with a hundredth to spare for rounding.
#[inline(always)]
fn int16_scale(row: &[f32]) -> f32 {
    let mut most = f32::MIN_POSITIVE;
    for block in row.chunks(2 * INT16_STEPS) {
        let squares: f32 = block.iter().map(|x| x * x).sum();
        let largest = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        most = most.max(squares.sqrt() / BLOCK_LENGTH).max(largest / LARGEST);
    }
    most
}

/// Two floats in units of a scale's inverse, as int16, in the bits of one float.
fn quantize_pair(pair: &[f32], inverse: f32) -> f32 {
    /// Adding it rounds to an integer, whose two's complement then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let quantize = |x: f32| (x * inverse + ROUND).to_bits() & 0xffff;
    f32::from_bits(quantize(pair[0]) | pair.get(1).map_or(0, |x| quantize(*x) << 16))
}

/// Two floats, rounded to the nearest bfloat16, in the bits of one.
fn round_pair(pair: &[f32]) -> f32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
    };
    f32::from_bits(round(pair[0]) | pair.get(1).map_or(0, |x| round(*x) << 16))
}

/// Rows of the left operand: element `(r, k)` is `data[r * stride + k * step]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) step: usize,
    pub(super) count: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn new(data: &'a [f32], stride: usize, count: usize) -> Self {
        Self { data, stride, step: 1, count }
    }
}

/// The right operand of a product: whole panels.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) lines: &'a [Line],
    /// Lines of a panel.
    pub(super) steps: usize,
    /// Columns that count; the last panel is padded with zeros.
    pub(super) columns: usize,
}

impl Panels<'_> {
    fn count(&self) -> usize {
        self.columns.div_ceil(WIDTH)
    }
}

/// What happens to a sum before it is stored, in this order.
#[derive(Clone, Copy, Default)]
pub(super) struct Finish<'a> {
    /// Of int16: what a unit is worth in every row and in every column.
    pub(super) scales: Option<(&'a [f32], &'a [f32])>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) gelu: bool,
    /// Added at last: rows like those of the result, and their distance.
    pub(super) add: Option<(&'a [f32], usize)>,
}

/// Where the result goes; tasks of other threads hold other columns of it.
struct Target<'a> {
    data: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the tasks that share a target write disjoint columns.
unsafe impl Sync for Target<'_> {}

impl<'a> Target<'a> {
    fn new(data: &'a mut [f32], stride: usize, rows: usize, columns: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + columns <= data.len(), "the result has no room");
        let data = data.as_mut_ptr();
        Self { data, stride, rows, columns, _borrow: std::marker::PhantomData }
    }
}

/// `out = x B`, on this thread.
pub(super) fn product(cpu: Cpu, x: Rows<'_>, b: Panels<'_>, out: &mut [f32], stride: usize) {
    let out = Target::new(out, stride, x.count, b.columns);
    multiply(cpu, x, b.steps, b, 0..b.count(), &Finish::default(), &out);
}

fn multiply(
    cpu: Cpu,
    x: Rows<'_>,
    inputs: usize,
    b: Panels<'_>,
    panels: Range<usize>,
    finish: &Finish<'_>,
    out: &Target<'_>,
) {
    assert_eq!(inputs, b.steps, "the operands do not fit");
    cpu.run(Product { x, b, panels, finish, out, arithmetic: F32 });
}

/// How a tile multiplies: what a panel's line holds, and the instruction.
trait Arithmetic<S: Simd>: Copy {
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
struct Product<'a, A> {
    x: Rows<'a>,
    b: Panels<'a>,
    panels: Range<usize>,
    finish: &'a Finish<'a>,
    out: &'a Target<'a>,
    arithmetic: A,
}

impl WithSimd for Product<'_, F32> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.run(simd);
    }
}

impl<A> Product<'_, A> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S)
    where
        A: Arithmetic<S>,
    {
        let Self { x, b, panels, finish, out, .. } = &self;
        // All that the tiles touch is checked here, once.
        assert!(panels.end * b.steps <= b.lines.len(), "panels are missing");
        let reach = |rows: usize, stride: usize, last: usize| (rows - 1) * stride + last;
        if x.count == 0 || panels.is_empty() {
            return;
        }
        assert!(
            b.steps == 0 || reach(x.count, x.stride, (b.steps - 1) * x.step) < x.data.len(),
            "rows are missing"
        );
        assert!(x.count <= out.rows && b.columns <= out.columns, "the result has no room");
        if let Some(bias) = finish.bias {
            assert!(panels.end * WIDTH <= bias.len(), "the bias is too short");
        }
        if let Some((rows, columns)) = finish.scales {
            assert!(
                x.count <= rows.len() && panels.end * WIDTH <= columns.len(),
                "scales are missing"
            );
        }
        if let Some((add, stride)) = finish.add {
            assert!(reach(x.count, stride, b.columns) <= add.len(), "the addend is too short");
        }
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
                // SAFETY: rows and panels are within the bounds asserted above.
                unsafe { self.piece(simd, first, last - first, panel, width) };
                first = last;
            }
            panel += width;
        }
    }

    /// Chooses the tile: vectors per row are panels times vectors per panel.
    ///
    /// # Safety
    ///
    /// The rows `first..first + count` and the panels `panel..panel + width` must exist.
    #[inline(always)]
    unsafe fn piece<S: Simd>(&self, simd: S, first: usize, count: usize, panel: usize, width: usize)
    where
        A: Arithmetic<S>,
    {
        macro_rules! tile {
            ($($rows:literal)* by $vectors:literal) => {
                match count {
                    // SAFETY: the caller's promise.
                    $($rows => unsafe { self.tile::<S, $rows, $vectors>(simd, first, panel) },)*
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
    unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        first: usize,
        panel: usize,
    ) where
        A: Arithmetic<S>,
    {
        let Self { x, b, arithmetic, .. } = self;
        let parts = WIDTH / S::F32_LANES; // of a line
        let mut totals = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        // SAFETY: of all tiles together, `run` has checked that rows and panels exist; a vector is
        // a part of a line of one of the tile's panels.
        unsafe {
            let mut left = x.data.as_ptr().add(first * x.stride);
            let mut right = b.lines.as_ptr().add(panel * b.steps).cast::<f32>();
            let mut rest = b.steps;
            while rest > 0 {
                let block = rest.min(A::BLOCK);
                let mut sums = [[arithmetic.zero(simd); VECTORS]; ROWS];
                for _ in 0..block {
                    let line: [A::Part; VECTORS] = std::array::from_fn(|v| {
                        let offset = v / parts * b.steps * WIDTH + v % parts * S::F32_LANES;
                        arithmetic.load(simd, right.add(offset))
                    });
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let x = arithmetic.splat(simd, *left.add(r * x.stride));
                        for (sum, part) in sums.iter_mut().zip(line) {
                            *sum = arithmetic.multiply_add(simd, x, part, *sum);
                        }
                    }
                    left = left.wrapping_add(x.step);
                    right = right.add(WIDTH);
                }
                for (totals, sums) in totals.iter_mut().zip(sums) {
                    for (total, sum) in totals.iter_mut().zip(sums) {
                        let sum = arithmetic.as_f32s(simd, sum);
                        *total =
                            if A::BLOCK == usize::MAX { sum } else { simd.add_f32s(*total, sum) };
                    }
                }
                rest -= block;
            }
            self.store(simd, &totals, first, panel * WIDTH);
        }
    }

    /// # Safety
    ///
    /// As [`Self::piece`].
    #[inline(always)]
    unsafe fn store<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        sums: &[[S::f32s; VECTORS]; ROWS],
        first: usize,
        column: usize,
    ) {
        let Self { finish, out, .. } = self;
        let columns = self.b.columns;
        let f32s = |slice: &[f32], at: usize| {
            // Beyond the last column there are only zeros to add to zeros.
            let end = (at + S::F32_LANES).min(slice.len());
            load(simd, &slice[at.min(end)..end])
        };
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let at = column + v * S::F32_LANES;
                let Some(left) = columns.checked_sub(at).filter(|left| *left > 0) else { break };
                let mut y = *sum;
                if let Some((rows, columns)) = finish.scales {
                    let scales = simd.mul_f32s(f32s(columns, at), simd.splat_f32s(rows[first + r]));
                    y = simd.mul_f32s(y, scales);
                }
                if let Some(bias) = finish.bias {
                    y = simd.add_f32s(y, f32s(bias, at));
                }
                if finish.gelu {
                    y = gelu(simd, y);
                }
                if let Some((add, stride)) = finish.add {
                    y = simd.add_f32s(y, f32s(add, (first + r) * stride + at));
                }
                // SAFETY: row and columns are the target's, as `run` has checked, and no other
                // task has these columns.
                let to = unsafe { out.data.add((first + r) * out.stride + at) };
                let count = left.min(S::F32_LANES);
                // SAFETY: as above.
                let to = unsafe { std::slice::from_raw_parts_mut(to, count) };
                store(simd, to, y);
            }
        }
    }
}

/// `finish(x W^T + b)` for rows of `inputs` floats, on all threads.
pub(crate) fn linear(cpu: Cpu, matrix: &Matrix, x: &[f32], add: Option<&[f32]>) -> Vec<f32> {
    let (inputs, outputs) = (matrix.inputs, matrix.outputs);
    let mut out = vec![0.0; x.len() / inputs.max(1) * outputs];
    linear_into(
        cpu,
        matrix,
        x,
        Finish { add: add.map(|add| (add, outputs)), ..Finish::default() },
        &mut out,
    );
    out
}

/// Up to so many rows, tasks are ranges of columns: the weights are read once, by all threads.
pub(super) const FEW_ROWS: usize = 48;

/// As [`linear`], for tight rows in and out.
pub(super) fn linear_into(
    cpu: Cpu,
    matrix: &Matrix,
    x: &[f32],
    finish: Finish<'_>,
    out: &mut [f32],
) {
    let (inputs, outputs) = (matrix.inputs, matrix.outputs);
    let rows = x.len() / inputs.max(1);
    if rows > FEW_ROWS {
        let block = block_rows(rows);
        out.par_chunks_mut(block * outputs).enumerate().for_each(|(i, out)| {
            let first = i * block;
            let count = out.len() / outputs;
            // Rows whose distance is a large power of two would share few sets of the cache.
            let stride = padded(inputs);
            let mut copy = Lines::floats(count * stride);
            for (to, from) in
                copy.as_floats().chunks_mut(stride).zip(x[first * inputs..].chunks(inputs))
            {
                to[..inputs].copy_from_slice(from);
            }
            let x = Rows::new(copy.as_floats(), stride, count);
            let add = finish.add.map(|(add, stride)| (&add[first * stride..], stride));
            matrix.block(cpu, x, &Finish { add, ..finish }, out, outputs);
        });
        return;
    }
    let target = Target::new(out, outputs, rows, outputs);
    let x = Rows::new(x, inputs, rows);
    let panels = matrix.panels();
    // Whole groups of panels, a few tasks for each thread, none of them tiny.
    let task = panels.div_ceil(4 * rayon::current_num_threads()).max(4).next_multiple_of(4);
    (0..panels.div_ceil(task)).into_par_iter().for_each(|i| {
        let range = i * task..panels.min((i + 1) * task);
        matrix.columns(cpu, x, range, &finish, &target);
    });
}

/// A distance between rows of so many floats that spreads them over the sets of the cache.
pub(super) fn padded(size: usize) -> usize {
    size.next_multiple_of(WIDTH) + WIDTH
}

/// Rows of a task, so that all threads have several and each fits the cache.
pub(super) fn block_rows(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).clamp(12, 192)
}

/// Proof that the processor multiplies pairs of bfloat16 (AVX512-BF16).
#[derive(Clone, Copy)]
pub(super) struct Bf16(#[cfg(target_arch = "x86_64")] pulp::x86::V4);

/// Proof that the processor multiplies pairs of int16 (AVX512-VNNI).
#[derive(Clone, Copy)]
pub(super) struct Int16(#[cfg(target_arch = "x86_64")] pulp::x86::V4);

#[cfg(not(target_arch = "x86_64"))]
impl Bf16 {
    pub(super) fn new(_cpu: Cpu) -> Option<Self> {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Int16 {
    pub(super) fn new(_cpu: Cpu) -> Option<Self> {
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod pairs {
    use std::arch::x86_64::{
        __m256i, __m512, __m512bh, __m512i, _mm512_abs_ps, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh,
        _mm512_cvtps_epi32, _mm512_cvtsepi32_epi16, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_ps,
        _mm512_setzero_ps,
    };

    use pulp::x86::V4;

    use super::{
        Arithmetic, BLOCK_LENGTH, Bf16, Cpu, Finish, INT16_STEPS, Int16, LARGEST, Lines, Panels,
        Product, Range, Rows, Target, WIDTH, padded, quantize_pair, round_pair,
    };
    use crate::kernels::Level;

    /// The bits of a register as another type; both are 64 bytes of plain numbers.
    macro_rules! bits {
        ($from:ty => $to:ty, $x:expr) => {
            std::mem::transmute::<$from, $to>($x)
        };
    }

    macro_rules! unit {
        ($unit:ident, $is_there:expr, $features:literal, $total:ty, $block:expr,
         |$x:ident, $y:ident, $sum:ident| $multiply_add:expr, |$done:ident| $as_f32s:expr) => {
            impl Arithmetic<V4> for $unit {
                type Part = pulp::f32x16;
                type Sum = $total;
                const BLOCK: usize = $block;

                #[inline(always)]
                unsafe fn load(self, _simd: V4, from: *const f32) -> pulp::f32x16 {
                    // SAFETY: the caller's promise.
                    unsafe { from.cast::<pulp::f32x16>().read_unaligned() }
                }

                #[inline(always)]
                fn splat(self, simd: V4, x: f32) -> pulp::f32x16 {
                    pulp::Simd::splat_f32s(simd, x)
                }

                #[inline(always)]
                fn zero(self, simd: V4) -> $total {
                    let zero = pulp::Simd::splat_f32s(simd, 0.0);
                    // SAFETY: as `bits!` has it.
                    unsafe { bits!(pulp::f32x16 => $total, zero) }
                }

                #[inline(always)]
                fn multiply_add(
                    self,
                    _: V4,
                    $x: pulp::f32x16,
                    $y: pulp::f32x16,
                    $sum: $total,
                ) -> $total {
                    // SAFETY: `self` proves the feature.
                    unsafe { $multiply_add }
                }

                #[inline(always)]
                fn as_f32s(self, _: V4, $done: $total) -> pulp::f32x16 {
                    // SAFETY: as above.
                    unsafe { bits!(__m512 => pulp::f32x16, $as_f32s) }
                }
            }

            impl $unit {
                pub(in crate::kernels) fn new(cpu: Cpu) -> Option<Self> {
                    match cpu.0 {
                        Level::Avx512(simd) => $is_there.then_some(Self(simd)),_ => None,
                    }
                }

                /// # Safety
                ///
                /// None but the target features, which `self` proves.
                #[target_feature(enable = $features)]
                pub(super) unsafe fn multiply(
                    self,
                    x: Rows<'_>,
                    b: Panels<'_>,
                    panels: Range<usize>,
                    finish: &Finish<'_>,
                    out: &Target<'_>,
                ) {
                    Product { x, b, panels, finish, out, arithmetic: self }.run(self.0);
                }
            }
        };
    }

    unit!(
        Bf16,
        is_x86_feature_detected!("avx512bf16"),
        "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma,avx2,bmi1,bmi2,lzcnt,popcnt",
        __m512,
        usize::MAX,
        |x, y, sum| _mm512_dpbf16_ps(
            sum,
            bits!(pulp::f32x16 => __m512bh, x),
            bits!(pulp::f32x16 => __m512bh, y)
        ),
        |sum| sum
    );

    unit!(
        Int16,
        is_x86_feature_detected!("avx512vnni"),
        "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,avx2,bmi1,bmi2,lzcnt,popcnt",
        __m512i,
        INT16_STEPS,
        |x, y, sum| add_products(
            sum,
            bits!(pulp::f32x16 => __m512i, x),
            bits!(pulp::f32x16 => __m512i, y)
        ),
        |sum| _mm512_cvtepi32_ps(sum)
    );

    /// `vpdpwssd`, which the compiler would make two instructions of if it were the intrinsic.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn add_products(mut sum: __m512i, x: __m512i, y: __m512i) -> __m512i {
        // SAFETY: it reads and writes these registers only.
        unsafe {
            std::arch::asm!(
                "vpdpwssd {sum}, {x}, {y}",
                sum = inout(zmm_reg) sum,
                x = in(zmm_reg) x,
                y = in(zmm_reg) y,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }

    impl Bf16 {
        /// Rounds rows of `inputs` floats to pairs.
        pub(super) fn round_rows<'a>(
            self,
            x: Rows<'_>,
            inputs: usize,
            out: &'a mut Lines,
        ) -> Rows<'a> {
            // SAFETY: `self` proves the feature.
            each_row(self.0, x, inputs, out, |_, x, out| unsafe { round_row(x, out) })
        }
    }

    impl Int16 {
        /// Rounds rows of `inputs` floats to pairs, each row in units of its own.
        pub(super) fn quantize_rows<'a>(
            self,
            x: Rows<'_>,
            inputs: usize,
            out: &'a mut Lines,
            scales: &mut [f32],
        ) -> Rows<'a> {
            each_row(self.0, x, inputs, out, |row, x, out| {
                // SAFETY: `self` proves the feature.
                scales[row] = unsafe { quantize_row(x, out) }
            })
        }
    }

    fn each_row<'a>(
        _proof: V4,
        x: Rows<'_>,
        inputs: usize,
        out: &'a mut Lines,
        mut f: impl FnMut(usize, &[f32], &mut [f32]),
    ) -> Rows<'a> {
        assert_eq!(x.step, 1, "rows are not contiguous");
        let (pairs, stride) = (inputs.div_ceil(2), padded(inputs.div_ceil(2)));
        let rows = x.data.chunks(x.stride).zip(out.as_floats().chunks_mut(stride));
        for (row, (x, out)) in rows.take(x.count).enumerate() {
            f(row, &x[..inputs], &mut out[..pairs]);
        }
        Rows::new(out.as_floats(), stride, x.count)
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn round_row(x: &[f32], out: &mut [f32]) {
        let (pairs, tail) = x.as_chunks::<{ 2 * WIDTH }>();
        let (out, out_tail) = out.split_at_mut(pairs.len() * WIDTH);
        let (lines, _) = out.as_chunks_mut::<WIDTH>();
        for (pairs, line) in pairs.iter().zip(lines) {
            let [low, high] = bytemuck::must_cast::<[f32; 32], [pulp::f32x16; 2]>(*pairs);
            // SAFETY: as `bits!` has it.
            *line = unsafe {
                let [low, high] = [low, high].map(|x| bits!(pulp::f32x16 => __m512, x));
                bits!(__m512bh => [f32; WIDTH], _mm512_cvtne2ps_pbh(high, low))
            };
        }
        for (out, pair) in out_tail.iter_mut().zip(tail.chunks(2)) {
            *out = round_pair(pair);
        }
    }

    /// The same as `int16_scale` and `quantize_pair`, sixteen at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn quantize_row(x: &[f32], out: &mut [f32]) -> f32 {
        let register = |x: &[f32; WIDTH]| {
            let x = bytemuck::must_cast::<[f32; WIDTH], pulp::f32x16>(*x);
            // SAFETY: as `bits!` has it.
            unsafe { bits!(pulp::f32x16 => __m512, x) }
        };
        let mut scale = f32::MIN_POSITIVE;
        for block in x.chunks(2 * INT16_STEPS) {
            let (vectors, tail) = block.as_chunks::<WIDTH>();
            let mut last = [0.0; WIDTH];
            last[..tail.len()].copy_from_slice(tail);
            let (mut squares, mut largest) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for x in vectors.iter().chain([&last]) {
                let x = register(x);
                squares = _mm512_fmadd_ps(x, x, squares);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
            }
            let length = _mm512_reduce_add_ps(squares).sqrt();
            scale = scale.max(length / BLOCK_LENGTH);
            scale = scale.max(_mm512_reduce_max_ps(largest) / LARGEST);
        }
        let (vectors, tail) = x.as_chunks::<WIDTH>();
        let inverses = _mm512_set1_ps(scale.recip());
        let (out, out_tail) = out.split_at_mut(vectors.len() * WIDTH / 2);
        let (out, _) = out.as_chunks_mut::<{ WIDTH / 2 }>();
        for (x, out) in vectors.iter().zip(out) {
            let whole = _mm512_cvtps_epi32(_mm512_mul_ps(register(x), inverses));
            // SAFETY: both types are 32 bytes of plain numbers.
            *out = unsafe {
                std::mem::transmute::<__m256i, [f32; WIDTH / 2]>(_mm512_cvtsepi32_epi16(whole))
            };
        }
        for (out, pair) in out_tail.iter_mut().zip(tail.chunks(2)) {
            *out = quantize_pair(pair, scale.recip());
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{assert_close, random};

    /// `finish(x W^T + b)`, element by element, in float64.
    fn plain(
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        inputs: usize,
        add: Option<&[f32]>,
    ) -> Vec<f32> {
        let outputs = bias.len();
        let dot = |x: &[f32], w: &[f32]| -> f64 {
            x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        let mut out = Vec::new();
        for (r, x) in x.chunks_exact(inputs).enumerate() {
            for (c, w) in weight.chunks_exact(inputs).enumerate() {
                let add = add.map_or(0.0, |add| f64::from(add[r * outputs + c]));
                #[expect(clippy::cast_possible_truncation, reason = "the result's type")]
                out.push((dot(x, w) + f64::from(bias[c]) + add) as f32);
            }
        }
        out
    }

    #[test]
    fn products_are_right_for_every_number_of_rows_on_every_instruction_set() {
        for (inputs, outputs) in [(1, 1), (7, 16), (33, 50), (64, 147)] {
            let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
            let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::F32);
            for rows in (1..=50).chain([97, 200]) {
                let (x, add) = (random(rows * inputs, 3), random(rows * outputs, 4));
                let expected = plain(&x, &weight, &bias, inputs, Some(&add));
                for cpu in Cpu::available() {
                    let found = linear(cpu, &matrix, &x, Some(&add));
                    assert_close(&found, &expected, 1e-5, &format!("{} {rows}", cpu.name()));
                }
            }
        }
    }

    #[test]
    fn a_rows_result_does_not_depend_on_the_other_rows() {
        let (inputs, outputs) = (96, 80);
        let matrix = Matrix::pack(&random(outputs * inputs, 1), None, inputs, Precision::F32);
        let x = random(120 * inputs, 2);
        for cpu in Cpu::available() {
            let all = linear(cpu, &matrix, &x, None);
            for rows in [1, 2, 5, 13, 48, 49] {
                let some = linear(cpu, &matrix, &x[..rows * inputs], None);
                assert_eq!(some, all[..rows * outputs], "{} {rows} rows", cpu.name());
            }
        }
    }

    #[test]
    fn bfloat16_products_equal_those_of_rounded_operands() {
        let round = |values: Vec<f32>| -> Vec<f32> {
            let round = |x: f32| f32::from_bits(round_pair(&[x]).to_bits() << 16);
            values.into_iter().map(round).collect()
        };
        for inputs in [1, 31, 64, 147] {
            let outputs = 50;
            let (weight, bias) = (round(random(outputs * inputs, 1)), random(outputs, 2));
            let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Bf16);
            for cpu in Cpu::available().into_iter().filter(|cpu| cpu.has_bf16()) {
                for rows in [1, 3, 12, 13, 60] {
                    let x = round(random(rows * inputs, 3));
                    let expected = plain(&x, &weight, &bias, inputs, None);
                    let found = linear(cpu, &matrix, &x, None);
                    assert_close(&found, &expected, 1e-5, &format!("{inputs} inputs, {rows} rows"));
                }
            }
        }
    }

    #[test]
    fn int16_products_are_near_and_never_overflow() {
        for inputs in [1, 31, 130, 600, 2048] {
            let outputs = 50;
            let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
            // The worst case for sums: all numbers as large as they get, with one sign.
            let ones = vec![1.0; outputs * inputs];
            for (weight, tolerance) in [(weight, 3e-4), (ones, 1e-3)] {
                let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Int16);
                for cpu in Cpu::available().into_iter().filter(|cpu| cpu.has_int16()) {
                    for rows in [1, 3, 12, 13, 60] {
                        for x in [random(rows * inputs, 3), vec![-2.5; rows * inputs]] {
                            let expected = plain(&x, &weight, &bias, inputs, None);
                            let found = linear(cpu, &matrix, &x, None);
                            let what = format!("{inputs} inputs, {rows} rows");
                            assert_close(&found, &expected, tolerance, &what);
                        }
                    }
                }
            }
        }
    }
}
