//! Products of pairs: bfloat16 (AVX512-BF16) and int16 (AVX512-VNNI), one instruction for two.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _mm512_abs_ps, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh,
    _mm512_cvtps_epi32, _mm512_cvtsepi32_epi16, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_max_ps,
    _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_ps, _mm512_setzero_ps,
};

use pulp::x86::V4;

use super::{
    BLOCK_LENGTH, INT16_STEPS, LARGEST, padded, quantize_pair, round_pair,
    tile::{Arithmetic, Product, Rows},
};
use crate::kernels::{
    Cpu, Level,
    scratch::{Lines, WIDTH},
};

/// Proof that the processor multiplies pairs of bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Bf16(V4);

/// Proof that the processor multiplies pairs of int16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Int16(pub(super) V4);

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
            pub(super) fn new(cpu: Cpu) -> Option<Self> {
                let simd = match cpu.0 {
                    Level::Avx512(simd) => simd,
                    Level::Amx(tiles) => tiles.simd(),
                    _ => return None,
                };
                $is_there.then_some(Self(simd))
            }

            /// # Safety
            ///
            /// None but the target features, which `self` proves.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn multiply(self, product: Product<'_, Self>) {
                product.run(self.0);
            }
        }
    };
}

pub(super) use bits;

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
    pub(super) fn round_rows<'a>(self, x: Rows<'_>, inputs: usize, out: &'a mut Lines) -> Rows<'a> {
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
        each_row(self.0, x, inputs, out, |row, x, out| scales[row] = quantize(self, x, out))
    }
}

/// Rounds a row of floats to pairs; returns what a unit is worth.
pub(super) fn quantize(_proof: Int16, x: &[f32], out: &mut [f32]) -> f32 {
    // SAFETY: an `Int16` proves the feature.
    unsafe { quantize_row(x, out) }
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
