//! CUDA devices: which there are, and what must be so before one is used.
//!
//! All work of a device goes through one stream, so that it happens in the order in which it is asked
//! for, whichever thread asks. A thread binds the device before it drops what is stored there: the
//! driver would not know of which device to free it, and the next work there would fail for it.
//! Memory comes from the driver's pool alone. It is neither managed nor pinned: a fork of the server
//! then shares no more with the driver than it inherits unused.
#![cfg_attr(feature = "cuda", expect(unsafe_code, reason = "calls into CUDA's driver"))]

use candle_core::{Device, Result};

/// Opens a device.
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    {
        cuda::open(ordinal)
    }
    #[cfg(not(feature = "cuda"))]
    Device::new_cuda(ordinal)
}

/// All devices, each as it is described; or why there is none.
pub fn devices() -> std::result::Result<Vec<String>, String> {
    #[cfg(feature = "cuda")]
    {
        cuda::devices().map_err(|problem| problem.to_string())
    }
    #[cfg(not(feature = "cuda"))]
    Err(super::LoadError::NotForCuda.to_string())
}

/// What is to be said of an open device: of a GPU its name, memory, compute
/// capability and driver, after a blank.
pub(crate) fn describe(device: &Device) -> String {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let text = cuda::describe(device.cuda_stream().context().ordinal());
        return text.map_or_else(|_unknown| String::new(), |text| format!(" {text}"));
    }
    let _ = device;
    String::new()
}

/// Prepares the calling thread for dropping what is stored on a device.
pub(crate) fn bind(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        // A device that is lost fails at its next work.
        let _ = device.cuda_stream().context().bind_to_thread();
    }
    let _ = device;
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{
        Device, Error, Result,
        cuda_backend::{
            WrapErr,
            cudarc::driver::{
                result::{self, device, mem_pool},
                sys::{
                    self,
                    CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
                    CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
                    CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as RELEASE_THRESHOLD,
                },
            },
        },
    };

    use crate::catch_panic;

    /// The oldest compute capability that the kernels have code for.
    const OLDEST: (i32, i32) = (8, 0);

    pub(super) fn open(ordinal: usize) -> Result<Device> {
        // The bindings panic where they find what they do not expect.
        catch_panic(|| prepared(ordinal)).unwrap_or_else(|text| Err(failed(text))).map_err(plain)
    }

    fn prepared(ordinal: usize) -> Result<Device> {
        result::init().w()?;
        let count = device::get_count().w()?;
        let number = i32::try_from(ordinal).ok().filter(|ordinal| *ordinal < count);
        let number = number.ok_or_else(|| failed(format!("there are {count} devices")))?;
        let handle = device::get(number).w()?;
        let found = capability(handle)?;
        if found < OLDEST {
            let (major, minor) = found;
            return Err(failed(format!("compute capability {major}.{minor}, and 8.0 is needed")));
        }
        let opened = Device::new_cuda_with_stream(ordinal)?;
        if let Device::Cuda(cuda) = &opened {
            // SAFETY: all that a model has on a device uses the one stream that it was opened with, so
            // there is nothing to wait for; no tensor goes from one model to another.
            unsafe { cuda.disable_event_tracking() };
            if cuda.cuda_stream().context().has_async_alloc() {
                keep_memory(handle)?;
            }
        }
        Ok(opened)
    }

    /// Freed memory stays with the process: by default it goes back to the system whenever the host
    /// waits for the device, which is at every step of the decoder.
    fn keep_memory(handle: sys::CUdevice) -> Result<()> {
        let mut all = u64::MAX;
        // SAFETY: the device is there, its default pool lives as long, and this attribute is a u64.
        unsafe {
            let pool = device::get_default_mem_pool(handle).w()?;
            mem_pool::set_attribute(pool, RELEASE_THRESHOLD, (&raw mut all).cast()).w()
        }
    }

    pub(super) fn devices() -> Result<Vec<String>> {
        let all = || {
            result::init().w()?;
            let count = usize::try_from(device::get_count().w()?).unwrap_or_default();
            (0..count).map(describe).collect()
        };
        catch_panic(all).unwrap_or_else(|text| Err(failed(text))).map_err(plain)
    }

    /// The error alone: clients are told of it.
    fn plain(error: Error) -> Error {
        match error {
            Error::WithBacktrace { inner, .. } => *inner,
            error => error,
        }
    }

    pub(super) fn describe(ordinal: usize) -> Result<String> {
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let handle = device::get(number).w()?;
        let name = device::get_name(handle).w()?;
        // SAFETY: the device is there.
        let memory = unsafe { device::total_mem(handle) }.w()? >> 20;
        let (major, minor) = capability(handle)?;
        let mut driver = 0;
        // SAFETY: it writes the number.
        unsafe { sys::cuDriverGetVersion(&raw mut driver) }.result().w()?;
        let (driver, part) = (driver / 1000, driver % 1000 / 10);
        Ok(format!(
            "{name}, {memory} MiB, compute capability {major}.{minor}, driver for CUDA {driver}.{part}"
        ))
    }

    fn capability(handle: sys::CUdevice) -> Result<(i32, i32)> {
        // SAFETY: the device is there.
        let of = |attribute| unsafe { device::get_attribute(handle, attribute) }.w();
        Ok((of(MAJOR)?, of(MINOR)?))
    }

    fn failed(text: String) -> Error {
        Error::Msg(text).bt()
    }
}
