//! Kernels on a CUDA device, for the tests that the host's emulation runs too.
//!
//! Tests lend slices of the host. Each is noted with its length; a launch copies what its arguments
//! reach to the device, addresses in lists too, and what is written back again. Every slice has an
//! allocation of its own there, so that compute-sanitizer sees what is read or written beside it.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::{CString, c_char, c_int, c_uint, c_void},
    ptr::{null, null_mut},
    sync::LazyLock,
};

use florence_cuda::{Arg, FATBIN, Launch};

type Address = u64;

#[link(name = "cuda")]
unsafe extern "C" {
    fn cuInit(flags: c_uint) -> c_int;
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int;
    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int;
    fn cuCtxSetCurrent(context: *mut c_void) -> c_int;
    fn cuCtxSynchronize() -> c_int;
    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> c_int;
    fn cuModuleGetFunction(
        function: *mut *mut c_void,
        module: *mut c_void,
        name: *const c_char,
    ) -> c_int;
    fn cuMemAlloc_v2(address: *mut Address, bytes: usize) -> c_int;
    fn cuMemFree_v2(address: Address) -> c_int;
    fn cuMemcpyHtoD_v2(to: Address, from: *const c_void, bytes: usize) -> c_int;
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: Address, bytes: usize) -> c_int;
    fn cuLaunchKernel(
        function: *mut c_void,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: *mut c_void,
        arguments: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> c_int;
}

/// Whether the tests are to run on a device: there is one, and all of them must pass there.
pub(crate) fn is_wanted() -> bool {
    std::env::var_os("FLORENCE_CUDA_TESTS").is_some_and(|value| value == "device")
}

#[track_caller]
fn check(status: c_int) {
    assert_eq!(status, 0, "CUDA error {status}");
}

/// What a slice holds, and what becomes of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Read,
    /// Addresses of other slices.
    List,
    Written,
}

thread_local! {
    /// Length and use of the slices that begin at these addresses.
    static NOTED: RefCell<BTreeMap<usize, (usize, Use)>> = const { RefCell::new(BTreeMap::new()) };
}

/// Notes a slice that launches may reach from now on.
pub(crate) fn note<T>(of: &[T], purpose: Use) {
    NOTED.with_borrow_mut(|noted| noted.insert(of.as_ptr().addr(), (size_of_val(of), purpose)));
}

struct Program(usize, usize);

/// The context and the module, as addresses.
static PROGRAM: LazyLock<Program> = LazyLock::new(|| {
    let (mut device, mut context, mut module) = (0, null_mut(), null_mut());
    // SAFETY: the calls write what they are given a place for; the image lives as long as the process.
    unsafe {
        check(cuInit(0));
        check(cuDeviceGet(&raw mut device, 0));
        check(cuDevicePrimaryCtxRetain(&raw mut context, device));
        check(cuCtxSetCurrent(context));
        check(cuModuleLoadData(&raw mut module, FATBIN.as_ptr().cast()));
    }
    Program(context.expose_provenance(), module.expose_provenance())
});

/// A slice on the device.
struct Copy {
    there: Address,
    here: usize,
    bytes: usize,
    purpose: Use,
}

/// Copies the slice that begins at an address, and what it lists.
fn copied(here: usize, copies: &mut Vec<Copy>) -> Address {
    if here == 0 {
        return 0;
    }
    if let Some(known) = copies.iter().find(|copy| copy.here == here) {
        return known.there;
    }
    let noted = NOTED.with_borrow(|noted| noted.get(&here).copied());
    let (bytes, purpose) = noted.expect("a slice that was noted");
    let from = std::ptr::with_exposed_provenance::<u64>(here);
    let list: Vec<Address> = if purpose == Use::List {
        // SAFETY: a list of addresses, which its test still has.
        let addresses = unsafe { std::slice::from_raw_parts(from, bytes / size_of::<u64>()) };
        addresses.iter().map(|at| copied(usize::try_from(*at).unwrap(), copies)).collect()
    } else {
        Vec::new()
    };
    let source = if purpose == Use::List { list.as_ptr() } else { from };
    let mut there = 0;
    // SAFETY: so many bytes are there on both sides.
    unsafe {
        check(cuMemAlloc_v2(&raw mut there, bytes.max(1)));
        check(cuMemcpyHtoD_v2(there, source.cast(), bytes));
    }
    copies.push(Copy { there, here, bytes, purpose });
    there
}

/// Runs a kernel to its end.
pub(crate) fn launch(name: &str, launch: Launch, args: &[Arg]) {
    let Program(context, module) = &*PROGRAM;
    let mut copies = Vec::new();
    // SAFETY: the context stays; a test's thread may be new.
    check(unsafe { cuCtxSetCurrent(std::ptr::with_exposed_provenance_mut(*context)) });
    let values = args.iter().map(|arg| match *arg {
        Arg::Pointer(pointer) => copied(pointer.expose_provenance(), &mut copies),
        Arg::Int(int) => u64::from(int.cast_unsigned()),
        Arg::Size(size) => size as u64,
    });
    let mut values: Vec<u64> = values.collect();
    let mut pointers: Vec<*mut c_void> =
        values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
    let c_name = CString::new(name).unwrap();
    let mut function = null_mut();
    let Launch { grid: [x, y, z], block, shared } = launch;
    // SAFETY: the arguments are as many and as large as the kernel's, all of which are little-endian.
    unsafe {
        let module = std::ptr::with_exposed_provenance_mut(*module);
        check(cuModuleGetFunction(&raw mut function, module, c_name.as_ptr()));
        let arguments = pointers.as_mut_ptr();
        let none = null::<c_void>().cast_mut();
        check(cuLaunchKernel(function, x, y, z, block, 1, 1, shared, none, arguments, null_mut()));
        check(cuCtxSynchronize());
    }
    for Copy { there, here, bytes, purpose } in copies {
        // SAFETY: what is written is lent by a test that waits for the launch.
        unsafe {
            if purpose == Use::Written {
                check(cuMemcpyDtoH_v2(std::ptr::with_exposed_provenance_mut(here), there, bytes));
            }
            check(cuMemFree_v2(there));
        }
    }
}
