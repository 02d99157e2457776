//! The CUDA kernels of Florence-2.
//!
//! Their sources, in `kernels`, are one C++ program: nvcc makes `FATBIN` of it for GPUs (feature
//! `cuda`), the host's compiler makes what [`host::launch`] runs, on every machine and under its
//! debuggers and sanitizers. A kernel is named after what it computes and the type of the numbers
//! that products take and give: `layer_norm_f32`, `layer_norm_bf16`. The comment above it in the
//! sources has its shapes; [`geometry`] says how it is launched.
#![warn(missing_docs)]

use std::ffi::c_void;

pub mod geometry;
pub mod host;

#[cfg(feature = "cuda")]
#[repr(C, align(16))]
struct Aligned<B: ?Sized>(B);

#[cfg(feature = "cuda")]
static ALIGNED: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// All kernels, for the driver to load.
#[cfg(feature = "cuda")]
pub static FATBIN: &[u8] = &ALIGNED.0;

/// How a kernel is launched: a grid of blocks of `block` threads in one dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory that a block needs.
    pub shared: u32,
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// A pointer to any type; it may be null where the kernel's comment marks it with `?`.
    Pointer(*const c_void),
    /// C's `int`.
    Int(i32),
    /// C's `size_t`.
    Size(usize),
}
