//! What the network computes on the CPU, on slices of float32.
//!
//! Every kernel is written once, over [`pulp::Simd`], and compiled for each instruction set; a
//! [`Cpu`] is the proof that the processor has one. Results do not depend on the number of
//! threads, nor on which rows are computed together: every element is summed in one fixed order.
//!
//! - `gemm`: packed matrices and their product, the only unsafe code of the kernels
//! - `rows`: normalisation, softmax, GELU
//! - `attention`: within windows, across channels, over sequences
//! - `history`: over what a decoder's row has seen; `past`: which rows have seen what
//! - `mlp`, `conv`: the other parts of a layer
//! - `scratch`: buffers that threads reuse
#![expect(clippy::inline_always, reason = "what runs inside of `vectorize` must be inlined there")]
#![expect(clippy::too_many_arguments, reason = "operands and their strides")]

mod attention;
#[cfg(feature = "bench")]
pub mod bench;
mod conv;
mod gemm;
mod history;
mod mlp;
mod past;
mod rows;
mod scratch;

use std::sync::OnceLock;

use pulp::{Scalar, Simd, WithSimd};

pub(crate) use attention::{
    ChannelAttention, SequenceKeys, WindowAttention, attend_sequence, attend_sequences,
};
pub(crate) use conv::{PatchConv, depthwise_residual};
pub(crate) use gemm::{Matrix, Switch, linear, linear_lent};
pub(crate) use history::{History, attend_histories};
pub(crate) use mlp::Mlp;
pub(crate) use past::Past;
pub(crate) use rows::{Norm, layer_norm, log_sum_exp};

/// The instruction set that kernels run on, found at run time.
#[derive(Debug, Clone, Copy)]
pub struct Cpu(Level);

#[derive(Debug, Clone, Copy)]
enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    /// AVX-512, and tiles for products of int16.
    #[cfg(target_arch = "x86_64")]
    Amx(gemm::Amx),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
}

impl Cpu {
    /// The best instruction set of this processor.
    pub fn detect() -> Self {
        Self::available().next_back().unwrap_or(Self(Level::Scalar))
    }

    /// All instruction sets that this processor can run, the best one last; found out once.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        static FOUND: OnceLock<Vec<Cpu>> = OnceLock::new();
        FOUND.get_or_init(Self::find).iter().copied()
    }

    fn find() -> Vec<Self> {
        let mut found = vec![Self(Level::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(pulp::x86::V3::try_new().map(|simd| Self(Level::Avx2(simd))));
            found.extend(pulp::x86::V4::try_new().map(|simd| Self(Level::Avx512(simd))));
            found.extend(gemm::Amx::detect().map(|tiles| Self(Level::Amx(tiles))));
        }
        #[cfg(target_arch = "aarch64")]
        found.extend(pulp::aarch64::Neon::try_new().map(|simd| Self(Level::Neon(simd))));
        found
    }

    /// `scalar`, `avx2`, `avx512`, `amx` or `neon`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Amx(_) => "amx",
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => "neon",
        }
    }

    /// Whether products of bfloat16 pairs are one instruction.
    pub fn has_bf16(self) -> bool {
        gemm::can_multiply(self, Precision::Bf16)
    }

    /// Whether there is something for products of int16 pairs, which is then faster than float32.
    pub fn has_int16(self) -> bool {
        gemm::can_multiply(self, Precision::Int16)
    }

    /// Whether there is something for products of int8.
    pub fn has_int8(self) -> bool {
        gemm::can_multiply(self, Precision::Int8)
    }

    /// The same without what only products of int16 use.
    pub(crate) fn without_tiles(self) -> Self {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx(tiles) => Self(Level::Avx512(tiles.simd())),
            _ => self,
        }
    }

    #[inline]
    fn run<Op: WithSimd>(self, op: Op) -> Op::Output {
        match self.0 {
            Level::Scalar => Simd::vectorize(Scalar, op),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => Simd::vectorize(simd, op),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => Simd::vectorize(simd, op),
            #[cfg(target_arch = "x86_64")]
            Level::Amx(tiles) => Simd::vectorize(tiles.simd(), op),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(simd) => Simd::vectorize(simd, op),
        }
    }
}

/// In what numbers products are computed; sums are always float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Precision {
    /// float32 throughout: the reference's answers.
    #[default]
    F32,
    /// Weights and inputs of matrix products rounded to bfloat16.
    Bf16,
    /// Weights and inputs of matrix products rounded to int16, each row in units of its own.
    Int16,
    /// Those of int8: a column of weights in units of its own, a row of inputs in units and from a
    /// lowest number of its own.
    Int8,
}

impl Precision {
    /// In what attention's keys and values are kept: int8 is for weights only.
    pub(crate) fn kept(self) -> Self {
        if self == Self::Int8 { Self::Int16 } else { self }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cpu;
    use crate::not_run;

    /// The instruction sets of this processor that a test is about; where there is none, the run's
    /// output says so.
    pub(super) fn cpus_with(what: &str, has: impl Fn(Cpu) -> bool) -> Vec<Cpu> {
        let cpus: Vec<Cpu> = Cpu::available().filter(|cpu| has(*cpu)).collect();
        if cpus.is_empty() {
            not_run(&format!("the processor has no {what}"));
        }
        cpus
    }

    /// Numbers between -1 and 1, the same for the same seed.
    pub(super) fn random(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Whether all differences are small beside the largest expected value.
    pub(super) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let largest = expected.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance * largest, "{what}: {worst} beside {largest}");
    }
}
