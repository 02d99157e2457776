//! Kernels on the host, one block after the other: to test them, not to be fast.
#![expect(unsafe_code, reason = "kernels are C++, and work on pointers")]

use std::ffi::{CStr, CString, c_char};

use crate::Arg;

/// A launch that the driver would refuse, or that went wrong.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}: {reason}")]
pub struct LaunchError {
    kernel: String,
    reason: &'static str,
}

/// [`Arg`] as C++ reads it: the kind is a letter of `kind_of` in `host.h`.
#[repr(C)]
struct Argument {
    kind: u32,
    bits: u64,
}

impl From<&Arg> for Argument {
    fn from(arg: &Arg) -> Self {
        let (kind, bits) = match *arg {
            Arg::Pointer(pointer) => (b'p', pointer as u64),
            Arg::Int(int) => (b'i', i64::from(int).cast_unsigned()),
            Arg::Size(size) => (b'z', size as u64),
        };
        Self { kind: kind.into(), bits }
    }
}

unsafe extern "C" {
    fn florence_cuda_launch(
        name: *const c_char,
        grid: *const u32,
        block: u32,
        shared: u32,
        arguments: *const Argument,
        count: usize,
        backwards: bool,
    ) -> *const c_char;
}

/// Runs a kernel to its end, its blocks and the threads of each from the first to the last.
///
/// It fails where the driver would refuse the launch, and where threads wait for each other in
/// vain, write behind their shared memory, or use a pointer that is not aligned.
///
/// # Safety
///
/// Every pointer is valid for what the kernel reads and writes there, as the comment above it says
/// for these sizes, and nothing else uses what it writes until the end.
pub unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    args: &[Arg],
) -> Result<(), LaunchError> {
    // SAFETY: as this function's.
    unsafe { launch_in_order(name, (grid, block, shared), args, false) }
}

/// [`launch`], from the last block and thread to the first: a kernel whose threads do not wait for
/// each other where they must gives another result.
///
/// # Safety
///
/// As that of [`launch`].
pub unsafe fn launch_backwards(
    name: &str,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    args: &[Arg],
) -> Result<(), LaunchError> {
    // SAFETY: as this function's.
    unsafe { launch_in_order(name, (grid, block, shared), args, true) }
}

/// # Safety
///
/// As that of [`launch`].
unsafe fn launch_in_order(
    name: &str,
    (grid, block, shared): ([u32; 3], u32, u32),
    args: &[Arg],
    backwards: bool,
) -> Result<(), LaunchError> {
    // No kernel's name has a zero byte in it.
    let c_name = CString::new(name).unwrap_or_default();
    let arguments: Vec<Argument> = args.iter().map(Argument::from).collect();
    let (arguments, count) = (arguments.as_ptr(), arguments.len());
    // SAFETY: the name ends with a zero, there are three numbers of blocks and `count` arguments;
    // their number and kinds are compared with the kernel's. The caller answers for the pointers.
    let reason = unsafe {
        let (name, grid) = (c_name.as_ptr(), grid.as_ptr());
        florence_cuda_launch(name, grid, block, shared, arguments, count, backwards)
    };
    if reason.is_null() {
        return Ok(());
    }
    // SAFETY: reasons are literals.
    let reason = unsafe { CStr::from_ptr::<'static>(reason) };
    Err(LaunchError {
        kernel: name.to_owned(),
        reason: reason.to_str().unwrap_or("a reason that is no text"),
    })
}
