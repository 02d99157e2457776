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
        lines.par_chunks_mut(steps.max(1)).enumerate().for_each(|(panel, lines)| {
            let rows = weight.chunks_exact(inputs).skip(panel * WIDTH).take(WIDTH);
            for (column, row) in rows.enumerate() {
                match precision {
                    Precision::F32 => {
                        for (line, x) in lines.iter_mut().zip(row) {
                            line.0[column] = *x;
                        }
                    }
                    Precision::Bf16 => {
                        for (line, pair) in lines.iter_mut().zip(row.chunks(2)) {
                            line.0[column] = round_pair(pair);
                        }
                    }
                }
            }
        });
        let mut padded = bias.unwrap_or_default().to_vec();
        padded.resize(outputs.next_multiple_of(WIDTH), 0.0);
        Self { inputs, outputs, lines, bias: padded, precision }
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
        match (self.precision, Bf16::new(cpu)) {
            (Precision::F32, _) => {
                multiply(cpu, x, self.inputs, self.operand(), panels, &finish, out)
            }
            #[cfg(target_arch = "x86_64")]
            (Precision::Bf16, Some(bf16)) => {
                let stride = padded(self.inputs.div_ceil(2));
                let mut rounded = Lines::floats(x.count * stride);
                bf16.round_rows(x, self.inputs, rounded.as_floats(), stride);
                let x = Rows::new(rounded.as_floats(), stride, x.count);
                // SAFETY: `bf16` proves that the processor has the instructions.
                unsafe { bf16.multiply(x, self.operand(), panels, &finish, out) }
            }
            _ => unreachable!("matrices are packed as bfloat16 only where `Cpu::has_bf16`"),
        }
    }
}

/// Lines of a panel.
fn steps(inputs: usize, precision: Precision) -> usize {
    match precision {
        Precision::F32 => inputs,
        Precision::Bf16 => inputs.div_ceil(2),
    }
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
    /// # Safety
    ///
    /// `S::F32_LANES` floats must be readable at the address.
    unsafe fn load(self, simd: S, from: *const f32) -> Self::Part;
    fn splat(self, simd: S, x: f32) -> Self::Part;
    fn multiply_add(self, simd: S, x: Self::Part, y: Self::Part, sum: S::f32s) -> S::f32s;
}

#[derive(Clone, Copy)]
struct F32;

impl<S: Simd> Arithmetic<S> for F32 {
    type Part = S::f32s;

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
    fn multiply_add(self, simd: S, x: S::f32s, y: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(x, y, sum)
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
            (2..=4, _) => tile!(1 2 3 4 5 6 by 4),
            (5..=8, 2) => tile!(1 2 by 4),
            (5..=8, _) => tile!(1 2 3 4 5 6 by 2),
            (_, 4) => tile!(1 2 3 4 5 6 by 4),
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
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        // SAFETY: of all tiles together, `run` has checked that rows and panels exist; a vector is
        // a part of a line of one of the tile's panels.
        unsafe {
            let mut left = x.data.as_ptr().add(first * x.stride);
            let mut right = b.lines.as_ptr().add(panel * b.steps).cast::<f32>();
            for _ in 0..b.steps {
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
            self.store(simd, &sums, first, panel * WIDTH);
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
pub(super) struct Bf16 {
    #[cfg(target_arch = "x86_64")]
    simd: pulp::x86::V4,
}

impl Bf16 {
    pub(super) fn new(cpu: Cpu) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if let super::Level::Avx512(simd) = cpu.0
            && is_x86_feature_detected!("avx512bf16")
        {
            return Some(Self { simd });
        }
        let _ = cpu;
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod bf16 {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps};

    use pulp::x86::V4;

    use super::{
        Arithmetic, Bf16, Finish, Panels, Product, Range, Rows, Target, WIDTH, round_pair,
    };

    impl Arithmetic<V4> for Bf16 {
        type Part = pulp::f32x16;

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
        fn multiply_add(
            self,
            _simd: V4,
            x: pulp::f32x16,
            y: pulp::f32x16,
            sum: pulp::f32x16,
        ) -> pulp::f32x16 {
            // SAFETY: `Bf16` proves the feature; all these types are 64 bytes without meaning
            // beyond their bits.
            unsafe {
                let pairs = |x: pulp::f32x16| std::mem::transmute::<pulp::f32x16, __m512bh>(x);
                let sum = std::mem::transmute::<pulp::f32x16, __m512>(sum);
                std::mem::transmute::<__m512, pulp::f32x16>(_mm512_dpbf16_ps(
                    sum,
                    pairs(x),
                    pairs(y),
                ))
            }
        }
    }

    impl Bf16 {
        /// # Safety
        ///
        /// None but the target features, which `self` proves.
        #[target_feature(
            enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma,avx2,bmi1,bmi2,lzcnt,popcnt"
        )]
        pub(super) unsafe fn multiply(
            self,
            x: Rows<'_>,
            b: Panels<'_>,
            panels: Range<usize>,
            finish: &Finish<'_>,
            out: &Target<'_>,
        ) {
            Product { x, b, panels, finish, out, arithmetic: self }.run(self.simd);
        }

        /// Rounds rows of `inputs` floats to rows of pairs at a distance of `stride`.
        pub(super) fn round_rows(self, x: Rows<'_>, inputs: usize, out: &mut [f32], stride: usize) {
            assert_eq!(x.step, 1, "rows are not contiguous");
            let rows = x.data.chunks(x.stride).zip(out.chunks_mut(stride));
            for (x, out) in rows.take(x.count) {
                // SAFETY: `self` proves the feature.
                unsafe { round_row(&x[..inputs], &mut out[..inputs.div_ceil(2)]) };
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn round_row(x: &[f32], out: &mut [f32]) {
        let (pairs, tail) = x.as_chunks::<{ 2 * WIDTH }>();
        let (out, out_tail) = out.split_at_mut(pairs.len() * WIDTH);
        let (lines, _) = out.as_chunks_mut::<WIDTH>();
        for (pairs, line) in pairs.iter().zip(lines) {
            let [low, high]: [__m512; 2] =
                bytemuck::must_cast::<[f32; 32], [pulp::f32x16; 2]>(*pairs)
                    // SAFETY: as in `multiply_add`.
                    .map(|x| unsafe { std::mem::transmute(x) });
            let rounded = _mm512_cvtne2ps_pbh(high, low);
            // SAFETY: as in `multiply_add`.
            *line = unsafe { std::mem::transmute::<__m512bh, [f32; WIDTH]>(rounded) };
        }
        for (out, pair) in out_tail.iter_mut().zip(tail.chunks(2)) {
            *out = round_pair(pair);
        }
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
}
