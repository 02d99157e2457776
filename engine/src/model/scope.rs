//! Where a layer finds its weights: the tree of canonical names, and matrices of what is there.

use candle_core::Tensor;

use super::{LoadError, cpu::floats, weights::Weights};
use crate::kernels::{Matrix, Precision};

/// A weight matrix that a kernel or a linear layer is made of.
pub(crate) struct Source<'a> {
    pub(crate) name: &'a str,
    /// Its shape in the file.
    pub(crate) stored: &'a [usize],
    /// `[outputs, inputs]`
    pub(crate) shape: [usize; 2],
    /// Puts its dimensions in that order; they are joined to two afterwards.
    pub(crate) arrange: fn(&Tensor) -> candle_core::Result<Tensor>,
}

impl<'a> Source<'a> {
    /// A matrix that is stored as it is used.
    pub(crate) fn plain(name: &'a str, shape: &'a [usize; 2]) -> Self {
        Self { name, stored: shape, shape: *shape, arrange: |weight| Ok(weight.clone()) }
    }
}

/// A place in the tree of names, so that the code of a layer names only what is its own.
pub(crate) struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl<'a> Scope<'a> {
    pub(super) fn new(weights: &'a Weights, prefix: &str) -> Self {
        Self { weights, prefix: prefix.to_owned() }
    }
}

impl Scope<'_> {
    pub(crate) fn pp(&self, part: impl std::fmt::Display) -> Self {
        Self { weights: self.weights, prefix: format!("{}.{part}", self.prefix) }
    }

    pub(crate) fn get(&self, name: &str, expected: &[usize]) -> Result<Tensor, LoadError> {
        self.weights.get(&format!("{}.{name}", self.prefix), expected)
    }

    /// A matrix, `[outputs, inputs]`.
    pub(crate) fn arranged(&self, source: &Source<'_>) -> Result<Tensor, LoadError> {
        let weight = self.get(source.name, source.stored)?;
        let arranged = (source.arrange)(&weight).and_then(|weight| weight.reshape(&source.shape));
        arranged.map_err(LoadError::Device)
    }

    /// The same for kernels, with a bias; where it was packed before, the tensor is not read.
    pub(crate) fn matrix(
        &self,
        source: &Source<'_>,
        bias: Option<&Tensor>,
        precision: Precision,
    ) -> Result<Matrix, LoadError> {
        let name = format!("{}.{}", self.prefix, source.name);
        let bias = bias.map(Tensor::to_vec1::<f32>).transpose().map_err(LoadError::Device)?;
        let (first, other) = self.weights.numbers(&name, precision);
        if let Some(matrix) = self.weights.packed(&name, bias.as_deref(), source.shape, first) {
            return Ok(matrix);
        }
        let weight = self.arranged(source)?;
        let pack = |precision| {
            let pack = |x: &[f32]| Matrix::pack(x, bias.as_deref(), source.shape[1], precision);
            floats(&weight, pack).map_err(LoadError::Device)
        };
        let matrix = pack(first)?;
        if let Some((precision, switch)) = other {
            return Ok(matrix.or(pack(precision)?, switch));
        }
        Ok(self.weights.keep(&name, matrix))
    }

    /// Taps of a depthwise 3x3 convolution, `[9, C]` in row-major order, and its bias.
    pub(crate) fn taps(&self, channels: usize) -> Result<(Tensor, Tensor), LoadError> {
        let weight = self.get("weight", &[channels, 1, 3, 3])?;
        let taps = weight.reshape((channels, 9)).and_then(|taps| taps.t()?.contiguous());
        Ok((taps.map_err(LoadError::Device)?, self.get("bias", &[channels])?))
    }

    /// Size of a perceptron's hidden layer, as the file has it.
    pub(crate) fn hidden(&self, size: usize) -> usize {
        let stored = self.shape("fc1.weight").and_then(|shape| shape.first().copied());
        stored.unwrap_or(4 * size)
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.weights.shape(&format!("{}.{name}", self.prefix))
    }
}
