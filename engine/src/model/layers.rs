//! The layers that DaViT and BART share.
//!
//! On the CPU a layer is prepared when it is loaded: its weights are packed for `kernels`. On
//! other devices, and as the oracle of the tests, it is a formula of candle's tensor operations.

use candle_core::{D, Module, Result, Tensor};

use super::{
    LoadError,
    compute::{Compute, floats, like},
    scope::{Scope, Source},
};
use crate::kernels::{self, Cpu, Norm, Precision};

pub(super) type Loaded<T> = std::result::Result<T, LoadError>;

/// `y = x W^T + b` over the last dimension.
pub(super) enum Linear {
    Kernel(Cpu, kernels::Matrix),
    Candle(candle_nn::Linear),
}

impl Linear {
    pub(super) fn load(scope: &Scope<'_>, from: usize, to: usize) -> Loaded<Self> {
        let bias = scope.get("bias", &[to])?;
        Self::of(scope, &Source::plain("weight", &[to, from]), Some(bias))
    }

    pub(super) fn of(scope: &Scope<'_>, weight: &Source<'_>, bias: Option<Tensor>) -> Loaded<Self> {
        Ok(match scope.compute() {
            Compute::Kernels(cpu, precision) => {
                Self::Kernel(cpu, scope.matrix(weight, bias.as_ref(), precision)?)
            }
            Compute::Candle => Self::Candle(candle_nn::Linear::new(scope.arranged(weight)?, bias)),
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kernel(cpu, matrix) => {
                let y = floats(x, |x| kernels::linear(*cpu, matrix, x, None))?;
                like(x, y, matrix.outputs())
            }
            Self::Candle(linear) => linear.forward(x),
        }
    }

    /// Lends the elements of `forward(x)`.
    pub(super) fn forward_lent<R>(&self, x: &Tensor, look: impl FnOnce(&[f32]) -> R) -> Result<R> {
        match self {
            Self::Kernel(cpu, matrix) => floats(x, |x| kernels::linear_lent(*cpu, matrix, x, look)),
            Self::Candle(linear) => floats(&linear.forward(x)?, look),
        }
    }

    /// `residual + forward(x)`
    pub(super) fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kernel(cpu, matrix) => {
                let y = floats(x, |x| {
                    floats(residual, |add| kernels::linear(*cpu, matrix, x, Some(add)))
                })??;
                like(x, y, matrix.outputs())
            }
            Self::Candle(linear) => residual + linear.forward(x)?,
        }
    }
}

/// The packed weights of a linear layer, for kernels that do more than that layer.
pub(super) fn matrix(
    scope: &Scope<'_>,
    precision: Precision,
    from: usize,
    to: usize,
) -> Loaded<kernels::Matrix> {
    let bias = scope.get("bias", &[to])?;
    scope.matrix(&Source::plain("weight", &[to, from]), Some(&bias), precision)
}

/// Layer normalisation over the last dimension, with PyTorch's epsilon.
pub(super) enum LayerNorm {
    Kernel(Cpu, Norm),
    Candle { weight: Tensor, bias: Tensor },
}

impl LayerNorm {
    pub(super) fn load(scope: &Scope<'_>, size: usize) -> Loaded<Self> {
        if let Compute::Kernels(cpu, _) = scope.compute() {
            return Ok(Self::Kernel(cpu, norm(scope, size)?));
        }
        Ok(Self::Candle {
            weight: scope.get("weight", &[size])?,
            bias: scope.get("bias", &[size])?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kernel(cpu, norm) => {
                let y = floats(x, |x| kernels::layer_norm(*cpu, norm, x))?;
                like(x, y, norm.weight.len())
            }
            Self::Candle { weight, bias } => {
                candle_nn::ops::layer_norm(&x.contiguous()?, weight, bias, 1e-5)
            }
        }
    }
}

/// The weights of a normalisation, for kernels that do more than that.
pub(super) fn norm(scope: &Scope<'_>, size: usize) -> Loaded<Norm> {
    let vector = |name| {
        let tensor = scope.get(name, &[size])?;
        tensor.to_vec1::<f32>().map_err(LoadError::Device)
    };
    Ok(Norm { weight: vector("weight")?, bias: vector("bias")? })
}

/// `x + fc2(gelu(fc1(norm(x))))`; without a norm, `fc1` sees `x` itself.
pub(super) enum Mlp {
    Kernel(Cpu, kernels::Mlp),
    Candle { norm: Option<LayerNorm>, fc1: Linear, fc2: Linear },
}

impl Mlp {
    /// The hidden size is read from the file. `norm` names the norm's place.
    pub(super) fn load(
        scope: &Scope<'_>,
        norm_scope: Option<&Scope<'_>>,
        size: usize,
    ) -> Loaded<Self> {
        let hidden = scope.shape("fc1.weight").and_then(|shape| shape.first().copied());
        let hidden = hidden.unwrap_or(4 * size);
        let (fc1, fc2) = (scope.pp("fc1"), scope.pp("fc2"));
        Ok(match scope.compute() {
            Compute::Kernels(cpu, precision) => Self::Kernel(
                cpu,
                kernels::Mlp {
                    norm: norm_scope.map(|scope| norm(scope, size)).transpose()?,
                    fc1: matrix(&fc1, precision, size, hidden)?,
                    fc2: matrix(&fc2, precision, hidden, size)?,
                },
            ),
            Compute::Candle => Self::Candle {
                norm: norm_scope.map(|scope| LayerNorm::load(scope, size)).transpose()?,
                fc1: Linear::load(&fc1, size, hidden)?,
                fc2: Linear::load(&fc2, hidden, size)?,
            },
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kernel(cpu, mlp) => {
                let y = floats(x, |x| mlp.forward(*cpu, x))?;
                like(x, y, x.dim(D::Minus1)?)
            }
            Self::Candle { norm, fc1, fc2 } => {
                let normed = norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))?;
                fc2.forward_add(&fc1.forward(&normed)?.gelu_erf()?, x)
            }
        }
    }
}

/// Softmax of `scores` over the last dimension, times `v`, in candle's operations.
pub(super) fn attend(scores: &Tensor, v: &Tensor) -> Result<Tensor> {
    debug_assert_eq!(scores.dim(D::Minus1)?, v.dim(D::Minus2)?);
    candle_nn::ops::softmax_last_dim(scores)?.matmul(v)
}
