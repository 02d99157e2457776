//! What layers compute with, and how kernels see candle's tensors.

use candle_core::{Device, Result, Storage, Tensor};

use crate::kernels::{Cpu, Precision};

/// What layers compute with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Compute {
    /// This project's kernels.
    Kernels(Cpu, Precision),
    /// candle's operations.
    Candle,
}

/// Lends the elements of a float32 tensor.
pub(super) fn floats<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let x = x.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
    else {
        return Err(candle_core::Error::Msg("not a tensor on the CPU".to_owned()).bt());
    };
    Ok(f(&storage.as_slice::<f32>()?[start..end]))
}

/// A tensor like `x` but with another last dimension.
pub(super) fn like(x: &Tensor, data: Vec<f32>, last: usize) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    if let Some(size) = dims.last_mut() {
        *size = last;
    }
    Tensor::from_vec(data, dims, &Device::Cpu)
}
