//! The seam between the network and what computes it.
//!
//! `davit`, `projector` and `bart` say which parts there are and in which order they work; a backend
//! loads the parts from a checkpoint and computes them. What a backend keeps between calls, such as
//! a decoder's keys and values, has a type of its own: one backend's cannot reach another.

use candle_core::{Result, Tensor};

use super::{
    LoadError,
    network::Look,
    scope::{Scope, Source},
};

pub(crate) type Loaded<T> = std::result::Result<T, LoadError>;

/// Height and width of a grid of tokens.
pub(crate) type Grid = (usize, usize);

/// A convolution over patches: `[B, H, W, from] -> [B, H', W', to]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patches {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Height and width of a patch.
    pub(crate) size: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

/// Works on the last dimension, or on a grid, `[B, H, W, C]`.
pub(crate) trait Layer: Send + Sync {
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

/// `y = x W^T + b` over the last dimension.
pub(crate) trait Linear: Layer {
    /// `residual + forward(x)`
    fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor>;
}

/// `x + f(x)`, which may take the place of `x`: nobody else may need it.
pub(crate) trait Residual: Send + Sync {
    fn forward(&self, x: Tensor) -> Result<Tensor>;
}

/// The same of tokens that stand in a grid: `[B, N, C] -> [B, N, C]`.
pub(crate) trait OnGrid: Send + Sync {
    fn forward(&self, x: Tensor, grid: Grid) -> Result<Tensor>;
}

/// What the decoder has seen so far of one job's rows: keys and values of every layer.
pub(crate) trait History: Default + Send + Sync {
    /// Makes room for another token of each of `rows` rows.
    fn advance(&mut self, rows: usize);

    /// Row `i` goes on from what row `parents[i]` has seen.
    fn select(&mut self, parents: &[usize]) -> Result<()>;
}

pub(crate) trait Backend: Clone + Send + Sync + 'static {
    /// Pictures that are best encoded together.
    const PICTURES: usize;

    type Linear: Linear;
    type Norm: Layer;
    type Mlp: Residual;
    type Conv: Layer;
    type Depthwise: OnGrid;
    type Windows: OnGrid;
    type Channels: OnGrid;
    /// Keys and values of a sequence.
    type Keys: Send + Sync;
    type History: History;

    fn linear(
        &self,
        scope: &Scope<'_>,
        weight: &Source<'_>,
        bias: Option<Tensor>,
    ) -> Loaded<Self::Linear>;

    /// Layer normalisation over the last dimension, with PyTorch's epsilon.
    fn norm(&self, scope: &Scope<'_>, size: usize) -> Loaded<Self::Norm>;

    /// `x + fc2(gelu(fc1(norm(x))))`; without a norm, `fc1` sees `x` itself.
    fn mlp(
        &self,
        scope: &Scope<'_>,
        norm: Option<&Scope<'_>>,
        sizes: (usize, usize),
    ) -> Loaded<Self::Mlp>;

    fn conv(&self, scope: &Scope<'_>, patches: Patches) -> Loaded<Self::Conv>;

    /// Depthwise 3x3 convolution with zero padding, plus its input.
    fn depthwise(&self, scope: &Scope<'_>, channels: usize) -> Loaded<Self::Depthwise>;

    /// `x + attention(norm(x))` within square windows, without position bias or shift.
    ///
    /// The grid is padded with zeros at the right and the bottom to whole windows; padded cells
    /// take part in the attention, unmasked, as in the reference.
    fn windows(
        &self,
        block: &Scope<'_>,
        size: usize,
        heads: usize,
        window: usize,
    ) -> Loaded<Self::Windows>;

    /// `x + attention(norm(x))` across the channels of each group.
    ///
    /// The scale is `N^-0.5`, of the number of tokens and not of the head's size (docs/MODEL.md).
    fn channels(&self, block: &Scope<'_>, size: usize, groups: usize) -> Loaded<Self::Channels>;

    /// Bytes that a number of keys and values takes where they are kept.
    fn kept_bytes(&self) -> usize;

    /// Of a sequence's keys and values, `[S, D]` each.
    fn keys(&self, k: &Tensor, v: &Tensor, heads: usize) -> Result<Self::Keys>;

    /// Attention of queries, `[rows, D]`, over sequences: `sequences` lists, in the order of the
    /// rows, each one and how many rows look at it. Queries are scaled by `K^-0.5`.
    fn attend(
        &self,
        q: &Tensor,
        sequences: &[(&Self::Keys, usize)],
        heads: usize,
    ) -> Result<Tensor>;

    /// Self-attention of one decoder step: each job's rows over what they have seen in this layer,
    /// and themselves. `qkv` are queries, keys and values, `[rows, D]`, the rows of all jobs.
    fn attend_histories(
        &self,
        layer: usize,
        jobs: Vec<&mut Self::History>,
        qkv: [&Tensor; 3],
        heads: usize,
    ) -> Result<Tensor>;

    /// Lends the logits of hidden states, `[rows, D]`.
    fn logits(&self, head: &Self::Linear, hidden: &Tensor, look: Look<'_>) -> Result<()>;
}
