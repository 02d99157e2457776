//! Kernels on made-up numbers, beside formulas in float64: emulated on the host, or with the feature
//! `cuda` and `FLORENCE_CUDA_TESTS=device` on the first CUDA device.
#![expect(clippy::unwrap_used, unsafe_code, reason = "helpers of tests; kernels work on pointers")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test uses a part of it")]

#[cfg(feature = "cuda")]
mod device;

use std::fmt::Debug;

use florence_cuda::{Arg, Launch, host};
use half::{bf16, f16};

/// What products take and give.
pub(crate) trait Number: Copy + PartialEq + Debug {
    const SUFFIX: &'static str;
    /// How far a stored number may be from the exact one, relative to it.
    const STEP: f64;
    fn round(x: f32) -> Self;
    fn value(self) -> f64;
}

impl Number for f32 {
    const SUFFIX: &'static str = "f32";
    const STEP: f64 = 0.0;
    fn round(x: f32) -> Self {
        x
    }
    fn value(self) -> f64 {
        self.into()
    }
}

impl Number for bf16 {
    const SUFFIX: &'static str = "bf16";
    const STEP: f64 = 1.0 / 256.0;
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn value(self) -> f64 {
        self.into()
    }
}

impl Number for f16 {
    const SUFFIX: &'static str = "f16";
    const STEP: f64 = 1.0 / 2048.0;
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn value(self) -> f64 {
        self.into()
    }
}

/// Numbers between -1 and 1, always the same for a seed.
pub(crate) fn made<T: Number>(seed: u64, count: usize) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = u16::try_from((z ^ (z >> 31)) >> 48).unwrap();
        T::round(f32::from(bits) / 32768.0 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

/// What a kernel has not written: it equals nothing, itself included.
pub(crate) fn unwritten<T: Number>(count: usize) -> Vec<T> {
    vec![T::round(f32::NAN); count]
}

/// Notes a slice for launches on a device.
macro_rules! note {
    ($of:expr, $purpose:ident) => {
        #[cfg(feature = "cuda")]
        device::note($of, device::Use::$purpose);
    };
}

pub(crate) fn input<T>(of: &[T]) -> Arg {
    note!(of, Read);
    Arg::Pointer(of.as_ptr().cast())
}

/// Where slices begin that a kernel finds through a list.
pub(crate) fn addresses<T>(of: &[&[T]]) -> Vec<*const T> {
    let address = |of: &&[T]| {
        note!(of, Read);
        of.as_ptr()
    };
    of.iter().map(address).collect()
}

pub(crate) fn list<T>(of: &[*const T]) -> Arg {
    note!(of, List);
    Arg::Pointer(of.as_ptr().cast())
}

pub(crate) fn maybe<T>(of: Option<&[T]>) -> Arg {
    of.map_or(Arg::Pointer(std::ptr::null()), input)
}

pub(crate) fn output<T>(of: &mut [T]) -> Arg {
    note!(of, Written);
    Arg::Pointer(of.as_mut_ptr().cast_const().cast())
}

pub(crate) fn int(n: usize) -> Arg {
    Arg::Int(narrow(n))
}

/// Launches `kernel_suffix`.
pub(crate) type Run<'a> = &'a dyn Fn(&str, Launch, &[Arg]);

fn name<T: Number>(kernel: &str) -> String {
    format!("{kernel}_{}", T::SUFFIX)
}

pub(crate) fn run_forwards<T: Number>(kernel: &str, launch: Launch, args: &[Arg]) {
    #[cfg(feature = "cuda")]
    if device::is_wanted() {
        return device::launch(&name::<T>(kernel), launch, args);
    }
    let Launch { grid, block, shared } = launch;
    // SAFETY: the tests give slices of the sizes that they name.
    unsafe { host::launch(&name::<T>(kernel), grid, block, shared, args) }.unwrap();
}

/// On a device, where the order is its own, once more.
fn run_backwards<T: Number>(kernel: &str, launch: Launch, args: &[Arg]) {
    #[cfg(feature = "cuda")]
    if device::is_wanted() {
        return device::launch(&name::<T>(kernel), launch, args);
    }
    let Launch { grid, block, shared } = launch;
    // SAFETY: as above.
    unsafe { host::launch_backwards(&name::<T>(kernel), grid, block, shared, args) }.unwrap();
}

pub(crate) fn index(i: i32) -> usize {
    usize::try_from(i).unwrap()
}

pub(crate) fn narrow(n: usize) -> i32 {
    i32::try_from(n).unwrap()
}

/// What `f` gives, which must not depend on the order in which blocks and threads run.
pub(crate) fn in_both_orders<T: Number, R: PartialEq + Debug>(f: impl Fn(Run<'_>) -> R) -> R {
    let (forwards, backwards) = (f(&run_forwards::<T>), f(&run_backwards::<T>));
    assert!(forwards == backwards, "results depend on the order of threads, or were not written");
    forwards
}

/// Each number is as near to the exact one as its type and `tolerance` allow.
#[track_caller]
pub(crate) fn assert_near<T: Number>(got: &[T], exact: &[f64], tolerance: f64) {
    assert_eq!(got.len(), exact.len());
    for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
        let off = (got.value() - exact).abs();
        let allowed = tolerance * exact.abs().max(1.0) + T::STEP * exact.abs();
        assert!(off <= allowed, "{i}: {got:?} instead of {exact}, of {} numbers", T::SUFFIX);
    }
}

pub(crate) fn values<T: Number>(of: &[T]) -> Vec<f64> {
    of.iter().map(|x| x.value()).collect()
}

/// The average of `values`, rows of as many elements as the result has, weighted by the softmax of
/// `scores`.
pub(crate) fn weighed(scores: &[f64], values: &[Vec<f64>]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sum = vec![0.0; values[0].len()];
    for (weight, value) in weights.iter().zip(values) {
        for (sum, x) in sum.iter_mut().zip(value) {
            *sum += weight / total * x;
        }
    }
    sum
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
