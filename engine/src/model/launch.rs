//! How the kernels of `florence-cuda` see candle's tensors: on a CUDA device, or on the host, where
//! they run emulated.
#![expect(unsafe_code, reason = "kernels take pointers")]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Tensor, backend::BackendStorage,
};
use florence_cuda::{Launch, host};

/// What a kernel is given.
pub(super) enum Arg<'a> {
    Tensor(&'a Tensor),
    /// A tensor that is not there.
    Null,
    Int(i32),
    Size(usize),
}

impl Arg<'_> {
    pub(super) fn int(value: usize) -> Self {
        Self::Int(i32::try_from(value).unwrap_or(i32::MAX))
    }
}

/// The kernels on a device, for products in numbers of one kind.
pub(super) struct Kernels {
    device: Device,
    suffix: &'static str,
    #[cfg(feature = "cuda")]
    on_cuda: Option<cuda::Kernels>,
}

impl Kernels {
    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unnecessary_wraps, reason = "a device may fail")
    )]
    pub(super) fn load(device: &Device, kind: DType) -> Result<Self> {
        let suffix = if kind == DType::BF16 { "bf16" } else { "f32" };
        Ok(Self {
            #[cfg(feature = "cuda")]
            on_cuda: cuda::Kernels::load(device)?,
            device: device.clone(),
            suffix,
        })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn run(&self, name: &str, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        /// Those that know no other numbers.
        const FLOATS: [&str; 5] =
            ["depthwise", "channel_softmax", "top_k", "product", "product_few"];
        let suffix = if FLOATS.contains(&name) { "f32" } else { self.suffix };
        let name = format!("{name}_{suffix}");
        #[cfg(feature = "cuda")]
        if let Some(kernels) = &self.on_cuda {
            return kernels.run(&name, launch, args);
        }
        let pointer = |address: u64| {
            let address = usize::try_from(address).unwrap_or_default();
            std::ptr::with_exposed_provenance(address)
        };
        let args = args.iter().map(|arg| {
            Ok(match arg {
                Arg::Tensor(x) => florence_cuda::Arg::Pointer(pointer(address(x)?)),
                Arg::Null => florence_cuda::Arg::Pointer(std::ptr::null()),
                Arg::Int(value) => florence_cuda::Arg::Int(*value),
                Arg::Size(value) => florence_cuda::Arg::Size(*value),
            })
        });
        let args = args.collect::<Result<Vec<_>>>()?;
        let Launch { grid, block, shared } = launch;
        // SAFETY: the callers in `device` give every kernel what the comment above it says.
        unsafe { host::launch(&name, grid, block, shared, &args) }
            .map_err(|problem| candle_core::Error::Msg(problem.to_string()).bt())
    }
}

/// A tensor that a kernel is about to fill.
pub(super) fn fresh(device: &Device, shape: impl Into<Shape>, kind: DType) -> Result<Tensor> {
    // SAFETY: every kernel writes all of what it gives.
    unsafe { Tensor::empty(shape, kind, device) }
}

/// Where the elements of a contiguous tensor are, on its device. Kernels write to tensors that
/// nobody else has yet, or that belong to their caller.
pub(super) fn address(x: &Tensor) -> Result<u64> {
    let found = Address(AtomicU64::new(0));
    x.inplace_op1(&found)?;
    Ok(found.0.into_inner())
}

/// Asks a tensor where its elements are.
struct Address(AtomicU64);

impl Address {
    fn is(&self, start: u64, layout: &Layout, kind: DType) -> Result<()> {
        if layout.contiguous_offsets().is_none() {
            return Err(candle_core::Error::Msg("a tensor with gaps".to_owned()).bt());
        }
        let offset = layout.start_offset() * kind.size_in_bytes();
        self.0.store(start + offset as u64, Relaxed);
        Ok(())
    }
}

impl InplaceOp1 for Address {
    fn name(&self) -> &'static str {
        "address"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let start = match storage {
            CpuStorage::F32(x) => x.as_mut_ptr().expose_provenance(),
            CpuStorage::BF16(x) => x.as_mut_ptr().expose_provenance(),
            CpuStorage::U32(x) => x.as_mut_ptr().expose_provenance(),
            CpuStorage::I64(x) => x.as_mut_ptr().expose_provenance(),
            _ => return Err(unknown_kind()),
        };
        self.is(start as u64, layout, storage.dtype())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        self.is(cuda::start(storage)?, layout, storage.dtype())
    }
}

fn unknown_kind() -> candle_core::Error {
    candle_core::Error::Msg("no kernel takes such numbers".to_owned()).bt()
}

#[cfg(feature = "cuda")]
mod cuda {
    //! The same on a real device.

    use std::{collections::HashMap, sync::Arc};

    use candle_core::{
        CudaStorage, Device, Result,
        cuda_backend::{
            CudaStorageSlice, WrapErr,
            cudarc::{
                driver::{
                    CudaFunction, CudaModule, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
                },
                nvrtc::Ptx,
            },
        },
    };
    use florence_cuda::{FATBIN, Launch};
    use parking_lot::Mutex;

    use super::Arg;

    pub(super) struct Kernels {
        stream: Arc<CudaStream>,
        module: Arc<CudaModule>,
        functions: Mutex<HashMap<String, CudaFunction>>,
    }

    impl Kernels {
        /// None where the device is the host.
        pub(super) fn load(device: &Device) -> Result<Option<Self>> {
            let Device::Cuda(device) = device else { return Ok(None) };
            let stream = device.cuda_stream();
            let module = stream.context().load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
            Ok(Some(Self { stream, module, functions: Mutex::default() }))
        }

        fn function(&self, name: &str) -> Result<CudaFunction> {
            let mut functions = self.functions.lock();
            if let Some(function) = functions.get(name) {
                return Ok(function.clone());
            }
            let function = self.module.load_function(name).w()?;
            functions.insert(name.to_owned(), function.clone());
            Ok(function)
        }

        pub(super) fn run(&self, name: &str, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
            let function = self.function(name)?;
            let addresses = args.iter().map(|arg| match arg {
                Arg::Tensor(x) => super::address(x),
                _ => Ok(0),
            });
            let addresses = addresses.collect::<Result<Vec<u64>>>()?;
            let mut builder = self.stream.launch_builder(&function);
            for (arg, address) in args.iter().zip(&addresses) {
                match arg {
                    Arg::Tensor(_) | Arg::Null => builder.arg(address),
                    Arg::Int(value) => builder.arg(value),
                    Arg::Size(value) => builder.arg(value),
                };
            }
            let [x, y, z] = launch.grid;
            let config = LaunchConfig {
                grid_dim: (x, y, z),
                block_dim: (launch.block, 1, 1),
                shared_mem_bytes: launch.shared,
            };
            // SAFETY: the callers in `device` give every kernel what its declaration says.
            unsafe { builder.launch(config) }.w()?;
            Ok(())
        }
    }

    /// Where a storage begins.
    pub(super) fn start(storage: &CudaStorage) -> Result<u64> {
        let stream = storage.device.cuda_stream();
        Ok(match &storage.slice {
            CudaStorageSlice::F32(x) => x.device_ptr(&stream).0,
            CudaStorageSlice::BF16(x) => x.device_ptr(&stream).0,
            CudaStorageSlice::U32(x) => x.device_ptr(&stream).0,
            CudaStorageSlice::I64(x) => x.device_ptr(&stream).0,
            _ => return Err(super::unknown_kind()),
        })
    }
}
