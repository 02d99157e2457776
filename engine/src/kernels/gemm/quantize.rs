//! Rows of floats as whole numbers, each row in units of its own.
//!
//! The numbers stand in the bits of floats: two of int16, four of int8.

use pulp::{Simd, WithSimd};

use super::{padded, tile::Rows};

/// Lines (pairs of inputs) whose int16 products are summed as int32 before they become float32.
pub(super) const INT16_STEPS: usize = 64;
/// Largest Euclidean length of a block in int16, and largest number.
const BLOCK_LENGTH: f32 = 45_800.0;
const LARGEST: f32 = 32_700.0;
/// Adding it rounds to an integer, whose two's complement then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// Rows of an operand of int16, left or right; `units` gets what a unit of each row is worth.
pub(super) struct Int16Rows<'a> {
    pub(super) x: Rows<'a>,
    pub(super) inputs: usize,
    pub(super) out: &'a mut [f32],
    pub(super) units: &'a mut [f32],
}

impl WithSimd for Int16Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, inputs, out, units } = self;
        let rows = x.data.chunks(x.stride).zip(out.chunks_mut(padded(inputs.div_ceil(2))));
        for ((x, out), unit) in rows.zip(units).take(x.count) {
            *unit = int16(simd, &x[..inputs], &mut out[..inputs.div_ceil(2)]);
        }
    }
}

/// The left operand of a product of int8, without signs: `zeros` gets what 0 is worth in each row.
pub(super) struct Int8Rows<'a> {
    pub(super) x: Rows<'a>,
    pub(super) inputs: usize,
    pub(super) out: &'a mut [f32],
    pub(super) units: &'a mut [f32],
    pub(super) zeros: &'a mut [f32],
}

impl WithSimd for Int8Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, inputs, out, units, zeros } = self;
        let rows = x.data.chunks(x.stride).zip(out.chunks_mut(padded(inputs.div_ceil(4))));
        for (((x, out), unit), zero) in rows.zip(units).zip(zeros).take(x.count) {
            let x = &x[..inputs];
            let [lowest, highest] = extremes(simd, x);
            *unit = ((highest - lowest) / 255.0).max(f32::MIN_POSITIVE);
            *zero = lowest;
            let inverse = unit.recip();
            let out: &mut [u8] = bytemuck::cast_slice_mut(&mut out[..inputs.div_ceil(4)]);
            for (out, x) in out.iter_mut().zip(x) {
                *out = whole((x - lowest) * inverse).to_le_bytes()[0];
            }
            // What stands beyond meets zeros of the matrix.
        }
    }
}

/// A row in int16; returns what a unit is worth. No sum of products of [`INT16_STEPS`] lines can
/// overflow: the largest number is 32767, and no block's Euclidean length is above the square root
/// of 2^31 (Cauchy and Schwarz then bound the sum), with a hundredth to spare for rounding.
#[inline(always)]
fn int16<S: Simd>(simd: S, row: &[f32], out: &mut [f32]) -> f32 {
    let zero = simd.splat_f32s(0.0);
    // Of the block with the most, and the largest number of all.
    let (mut most, mut largest, mut largest_of_tail) = (0.0f32, zero, 0.0f32);
    for block in row.chunks(2 * INT16_STEPS) {
        let (head, tail) = S::as_simd_f32s(block);
        let mut squares = zero;
        for x in head {
            squares = simd.mul_add_e_f32s(*x, *x, squares);
            largest = simd.max_f32s(largest, simd.abs_f32s(*x));
        }
        let squares = simd.reduce_sum_f32s(squares);
        most = most.max(squares + tail.iter().map(|x| x * x).sum::<f32>());
        largest_of_tail = tail.iter().fold(largest_of_tail, |most, x| most.max(x.abs()));
    }
    let largest = simd.reduce_max_f32s(largest).max(largest_of_tail);
    let unit = (most.sqrt() / BLOCK_LENGTH).max(largest / LARGEST);
    let unit = unit.max(f32::MIN_POSITIVE);
    let inverse = unit.recip();
    let out: &mut [u16] = bytemuck::cast_slice_mut(out);
    for (out, x) in out.iter_mut().zip(row) {
        let [low, high, ..] = whole(x * inverse).to_le_bytes();
        *out = u16::from_le_bytes([low, high]);
    }
    out[row.len()..].fill(0);
    unit
}

/// A row in int8, with signs, for a matrix; returns what a unit is worth and the row's sum.
pub(super) fn int8(row: &[f32], out: &mut [f32]) -> (f32, f32) {
    let largest = row.iter().fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
    let unit = largest / 127.0;
    let out: &mut [i8] = bytemuck::cast_slice_mut(out);
    out.fill(0);
    for (out, x) in out.iter_mut().zip(row) {
        *out = i8::from_le_bytes([whole(x / unit).to_le_bytes()[0]]);
    }
    let sum: f32 = out.iter().map(|x| f32::from(*x)).sum();
    (unit, unit * sum)
}

/// The nearest integer's two's complement, in the lowest bits.
#[inline(always)]
fn whole(x: f32) -> u32 {
    (x + ROUND).to_bits()
}

/// The lowest and the highest of some numbers.
#[inline(always)]
fn extremes<S: Simd>(simd: S, x: &[f32]) -> [f32; 2] {
    let (head, tail) = S::as_simd_f32s(x);
    let Some(first) = head.first().copied() else {
        let fold = |f: fn(f32, f32) -> f32| tail.iter().copied().reduce(f).unwrap_or_default();
        return [fold(f32::min), fold(f32::max)];
    };
    let (mut lowest, mut highest) = (first, first);
    for x in head {
        lowest = simd.min_f32s(lowest, *x);
        highest = simd.max_f32s(highest, *x);
    }
    let lowest = tail.iter().copied().fold(simd.reduce_min_f32s(lowest), f32::min);
    [lowest, tail.iter().copied().fold(simd.reduce_max_f32s(highest), f32::max)]
}
