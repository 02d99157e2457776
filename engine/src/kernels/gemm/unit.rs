//! Products of narrower numbers than float32, in x86's instructions.
//!
//! Operands are bits in the places of floats: of bfloat16 and int16 two numbers, of int8 four.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _mm256_add_epi32, _mm256_and_si256, _mm256_cvtepi32_ps,
    _mm256_madd_epi16, _mm256_set1_epi32, _mm256_slli_epi16, _mm256_srai_epi16, _mm256_srli_epi16,
    _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
};

use pulp::{
    Simd,
    x86::{V3, V4},
};

use super::{
    padded,
    quantize::INT16_STEPS,
    round_pair,
    tile::{Arithmetic, Product, Rows},
};
use crate::kernels::{Cpu, Level, scratch::WIDTH};

/// The bits of a register as another type; both are the same number of plain numbers.
macro_rules! bits {
    ($from:ty => $to:ty, $x:expr) => {
        std::mem::transmute::<$from, $to>($x)
    };
}
pub(super) use bits;

/// A proof that the processor has some instructions, and how they multiply.
macro_rules! unit {
    ($(#[$about:meta])* $unit:ident($simd:ty), $features:literal,
     $float:ty: $register:ty, $sum:ty, $block:expr,
     |$x:ident, $y:ident, $total:ident| $multiply_add:expr, |$done:ident| $as_f32s:expr) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy)]
        pub(super) struct $unit(pub(super) $simd);

        impl Arithmetic<$simd> for $unit {
            type Part = $register;
            type Sum = $sum;
            const BLOCK: usize = $block;
            const INTERLEAVED: bool = true;

            #[inline(always)]
            unsafe fn load(self, _: $simd, from: *const f32) -> $register {
                // SAFETY: the caller's promise.
                unsafe { from.cast::<$register>().read_unaligned() }
            }

            #[inline(always)]
            fn splat(self, simd: $simd, x: f32) -> $register {
                // SAFETY: as `bits!` has it.
                unsafe { bits!($float => $register, simd.splat_f32s(x)) }
            }

            #[inline(always)]
            fn zero(self, simd: $simd) -> $sum {
                // SAFETY: as above.
                unsafe { bits!($float => $sum, simd.splat_f32s(0.0)) }
            }

            #[inline(always)]
            fn multiply_add(
                self,
                _: $simd,
                $x: $register,
                $y: $register,
                $total: $sum,
            ) -> $sum {
                // SAFETY: `self` proves the instructions.
                unsafe { $multiply_add }
            }

            #[inline(always)]
            fn as_f32s(self, _: $simd, $done: $sum) -> $float {
                // SAFETY: as above.
                unsafe { $as_f32s }
            }
        }

        impl $unit {
            pub(super) fn multiply(self, product: &Product<'_>) {
                #[target_feature(enable = $features)]
                fn run(unit: $unit, product: &Product<'_>) {
                    product.run(unit.0, unit);
                }
                // SAFETY: `self` proves the instructions.
                unsafe { run(self, product) }
            }
        }
    };
}

unit!(
    /// bfloat16 in AVX-512.
    Bf16(V4),
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma,avx2,bmi1,bmi2,lzcnt,popcnt",
    pulp::f32x16: __m512bh,
    __m512,
    usize::MAX,
    |x, y, sum| _mm512_dpbf16_ps(sum, x, y),
    |sum| bits!(__m512 => pulp::f32x16, sum)
);

unit!(
    /// int16 in AVX-512 with VNNI.
    Vnni16(V4),
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,avx2,bmi1,bmi2,lzcnt,popcnt",
    pulp::f32x16: __m512i,
    __m512i,
    INT16_STEPS,
    |x, y, sum| add_products_of_pairs(sum, x, y),
    |sum| bits!(__m512 => pulp::f32x16, _mm512_cvtepi32_ps(sum))
);

unit!(
    /// int16 in AVX2.
    Avx16(V3),
    "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c",
    pulp::f32x8: __m256i,
    __m256i,
    INT16_STEPS,
    |x, y, sum| _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)),
    |sum| bits!(std::arch::x86_64::__m256 => pulp::f32x8, _mm256_cvtepi32_ps(sum))
);

unit!(
    /// int8 in AVX-512 with VNNI.
    Vnni8(V4),
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,avx2,bmi1,bmi2,lzcnt,popcnt",
    pulp::f32x16: __m512i,
    __m512i,
    usize::MAX,
    |x, y, sum| add_products_of_fours(sum, x, y),
    |sum| bits!(__m512 => pulp::f32x16, _mm512_cvtepi32_ps(sum))
);

unit!(
    /// int8 in AVX2, as int16: no instruction of it adds products of bytes without a limit.
    Avx8(V3),
    "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c",
    pulp::f32x8: __m256i,
    __m256i,
    usize::MAX,
    |x, y, sum| {
        // Of each four bytes the first and third as a pair of int16, then the others.
        let even = _mm256_madd_epi16(
            _mm256_and_si256(x, _mm256_set1_epi32(0x00ff_00ff)),
            _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(y)),
        );
        let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(x), _mm256_srai_epi16::<8>(y));
        _mm256_add_epi32(_mm256_add_epi32(sum, even), odd)
    },
    |sum| bits!(std::arch::x86_64::__m256 => pulp::f32x8, _mm256_cvtepi32_ps(sum))
);

/// An instruction that the compiler would make two of if it were the intrinsic.
macro_rules! accumulate {
    ($(#[$about:meta])* $name:ident, $instruction:literal) => {
        $(#[$about])*
        #[inline]
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn $name(mut sum: __m512i, x: __m512i, y: __m512i) -> __m512i {
            // SAFETY: it reads and writes these registers only.
            unsafe {
                std::arch::asm!(
                    concat!($instruction, " {sum}, {x}, {y}"),
                    sum = inout(zmm_reg) sum,
                    x = in(zmm_reg) x,
                    y = in(zmm_reg) y,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            sum
        }
    };
}

accumulate!(
    /// Two numbers of each, both signed.
    add_products_of_pairs,
    "vpdpwssd"
);
accumulate!(
    /// Four numbers of each: those of `x` have no sign, those of `y` have one.
    add_products_of_fours,
    "vpdpbusd"
);

fn avx2(cpu: Cpu) -> Option<V3> {
    match cpu.0 {
        Level::Avx2(simd) => Some(simd),
        _ => None,
    }
}

fn avx512(cpu: Cpu) -> Option<V4> {
    match cpu.0 {
        Level::Avx512(simd) => Some(simd),
        Level::Amx(tiles) => Some(tiles.simd()),
        _ => None,
    }
}

impl Bf16 {
    pub(super) fn new(cpu: Cpu) -> Option<Self> {
        avx512(cpu).filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }
}

/// Rounds rows of `inputs` floats to pairs.
pub(super) fn round_rows(_proof: Bf16, x: Rows<'_>, inputs: usize, out: &mut [f32]) {
    let pairs = inputs.div_ceil(2);
    let rows = x.data.chunks(x.stride).zip(out.chunks_mut(padded(pairs)));
    for (x, out) in rows.take(x.count) {
        // SAFETY: a `Bf16` proves the instructions.
        unsafe { round_row(&x[..inputs], &mut out[..pairs]) };
    }
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

/// What multiplies int16.
#[derive(Clone, Copy)]
pub(super) enum Int16 {
    Avx2(Avx16),
    Vnni(Vnni16),
}

/// What multiplies int8.
#[derive(Clone, Copy)]
pub(super) enum Int8 {
    Avx2(Avx8),
    Vnni(Vnni8),
}

impl Int16 {
    pub(super) fn new(cpu: Cpu) -> Option<Self> {
        let vnni = Vnni16::new(cpu).map(Self::Vnni);
        vnni.or_else(|| avx2(cpu).map(|simd| Self::Avx2(Avx16(simd))))
    }

    pub(super) fn multiply(self, product: &Product<'_>) {
        match self {
            Self::Avx2(unit) => unit.multiply(product),
            Self::Vnni(unit) => unit.multiply(product),
        }
    }
}

impl Int8 {
    pub(super) fn new(cpu: Cpu) -> Option<Self> {
        let vnni = Vnni16::new(cpu).map(|Vnni16(simd)| Self::Vnni(Vnni8(simd)));
        vnni.or_else(|| avx2(cpu).map(|simd| Self::Avx2(Avx8(simd))))
    }

    pub(super) fn multiply(self, product: &Product<'_>) {
        match self {
            Self::Avx2(unit) => unit.multiply(product),
            Self::Vnni(unit) => unit.multiply(product),
        }
    }
}

impl Vnni16 {
    pub(super) fn new(cpu: Cpu) -> Option<Self> {
        avx512(cpu).filter(|_| is_x86_feature_detected!("avx512vnni")).map(Self)
    }
}
