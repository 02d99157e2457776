//! Operations that candle has not, or has too slowly on the CPU, behind its `CustomOp`.
//!
//! Each also has a formulation in plain tensor operations, which serves CUDA and judges the
//! CPU version in the tests.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, D, Layout, Module, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{LoadError, weights::Scope};

/// Depthwise 3x3 convolution with zero padding, plus its input: `[B, H, W, C] -> [B, H, W, C]`.
pub(super) struct DepthwiseResidual {
    /// `[9, C]`, taps in row-major order.
    taps: Tensor,
    bias: Tensor,
}

impl DepthwiseResidual {
    pub(super) fn load(scope: &Scope<'_>, channels: usize) -> std::result::Result<Self, LoadError> {
        let weight = scope.get("weight", &[channels, 1, 3, 3])?;
        let taps = weight
            .reshape((channels, 9))
            .and_then(|w| w.t()?.contiguous())
            .map_err(LoadError::Device)?;
        Ok(Self { taps, bias: scope.get("bias", &[channels])? })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() {
            return x.contiguous()?.apply_op3_no_bwd(&self.taps, &self.bias, &DepthwiseCpu);
        }
        self.forward_plain(x)
    }

    /// Nine shifted copies, multiplied and added.
    fn forward_plain(&self, x: &Tensor) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        let padded = x.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
        let mut sum = x.broadcast_add(&self.bias)?;
        for tap in 0..9 {
            let shifted = padded.narrow(1, tap / 3, h)?.narrow(2, tap % 3, w)?;
            sum = (sum + shifted.broadcast_mul(&self.taps.get(tap)?)?)?;
        }
        Ok(sum)
    }
}

struct DepthwiseCpu;

impl CustomOp3 for DepthwiseCpu {
    fn name(&self) -> &'static str {
        "depthwise-residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        taps: &CpuStorage,
        taps_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, h, w, c) = x_layout.shape().dims4()?;
        let x = contiguous(x, x_layout)?;
        let taps = contiguous(taps, taps_layout)?;
        let bias = contiguous(bias, bias_layout)?;
        let mut out = vec![0.0f32; x.len()];
        out.par_chunks_exact_mut(w * c).enumerate().for_each(|(row, out)| {
            let (image, y) = (row / h, row % h);
            let pixels = &x[image * h * w * c..(image + 1) * h * w * c];
            for (column, out) in out.chunks_exact_mut(c).enumerate() {
                let here = (y * w + column) * c;
                for ((out, pixel), bias) in out.iter_mut().zip(&pixels[here..]).zip(bias) {
                    *out = pixel + bias;
                }
                for tap in 0..9 {
                    let (ty, tx) = (y + tap / 3, column + tap % 3);
                    // Coordinates are shifted by one, so that the padding is row and column 0.
                    if ty == 0 || ty > h || tx == 0 || tx > w {
                        continue;
                    }
                    let there = &pixels[((ty - 1) * w + tx - 1) * c..];
                    for ((out, pixel), weight) in
                        out.iter_mut().zip(there).zip(&taps[tap * c..(tap + 1) * c])
                    {
                        *out += pixel * weight;
                    }
                }
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

/// The exact (erf) GELU, on all threads.
pub(super) fn gelu(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op1_no_bwd(&GeluCpu);
    }
    x.gelu_erf()
}

struct GeluCpu;

impl CustomOp1 for GeluCpu {
    fn name(&self) -> &'static str {
        "gelu-erf"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        const CHUNK: usize = 4096;
        let x = contiguous(x, layout)?;
        let mut out = vec![0.0f32; x.len()];
        out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
            for (out, x) in out.iter_mut().zip(x) {
                let erf = candle_core::cpu::erf::erf_f32(x * std::f32::consts::FRAC_1_SQRT_2);
                *out = 0.5 * x * (1.0 + erf);
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// The elements of a contiguous float32 tensor.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::RequiresContiguous { op: "florence custom op" }.bt())?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// `y = x W^T + b` over the last dimension.
pub(super) fn linear(
    scope: &Scope<'_>,
    from: usize,
    to: usize,
) -> std::result::Result<candle_nn::Linear, LoadError> {
    Ok(candle_nn::Linear::new(scope.get("weight", &[to, from])?, Some(scope.get("bias", &[to])?)))
}

/// Layer normalisation over the last dimension, with PyTorch's epsilon.
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    pub(super) fn load(scope: &Scope<'_>, size: usize) -> std::result::Result<Self, LoadError> {
        Ok(Self { weight: scope.get("weight", &[size])?, bias: scope.get("bias", &[size])? })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, 1e-5)
    }
}

/// `fc2(gelu(fc1(x)))`.
pub(super) struct Mlp {
    fc1: candle_nn::Linear,
    fc2: candle_nn::Linear,
}

impl Mlp {
    /// The hidden size is read from the file.
    pub(super) fn load(scope: &Scope<'_>, size: usize) -> std::result::Result<Self, LoadError> {
        let hidden = scope.shape("fc1.weight").and_then(|shape| shape.first().copied());
        let hidden = hidden.unwrap_or(4 * size);
        Ok(Self {
            fc1: linear(&scope.pp("fc1"), size, hidden)?,
            fc2: linear(&scope.pp("fc2"), hidden, size)?,
        })
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&gelu(&self.fc1.forward(x)?)?)
    }
}

/// Softmax of `scores` over the last dimension, times `v`.
pub(super) fn attend(scores: &Tensor, v: &Tensor) -> Result<Tensor> {
    debug_assert_eq!(scores.dim(D::Minus1)?, v.dim(D::Minus2)?);
    candle_nn::ops::softmax_last_dim(scores)?.matmul(v)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_cpu_depthwise_convolution_equals_nine_shifted_copies() {
        for (h, w, c) in [(1, 1, 1), (1, 5, 3), (4, 3, 8), (7, 7, 33)] {
            let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let op = DepthwiseResidual { taps: random(&[9, c]), bias: random(&[c]) };
            let x = random(&[2, h, w, c]);
            let difference = (op.forward(&x).unwrap() - op.forward_plain(&x).unwrap()).unwrap();
            let worst = difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // Nine products in another order.
            assert!(worst < 1e-5, "{h}x{w}x{c}: {worst}");
        }
    }

    #[test]
    fn the_cpu_gelu_equals_candles() {
        let x = Tensor::randn(0f32, 3.0, &[5, 1013], &Device::Cpu).unwrap();
        let difference = (gelu(&x).unwrap() - x.gelu_erf().unwrap()).unwrap();
        let worst = difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-5, "{worst}");
    }
}
