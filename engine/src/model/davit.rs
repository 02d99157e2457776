//! DaViT, the vision tower: pixel values to visual tokens.
//!
//! A stage is a convolution that shrinks the grid, then pairs of blocks: attention within windows
//! of the picture, then attention across channels. Tokens stay in `[B, N, C]` order throughout.

use candle_core::{IndexOp, Module, Result, Tensor};

use super::{
    LoadError,
    config::VisionConfig,
    ops::{DepthwiseResidual, LayerNorm, Mlp, attend, linear},
    weights::Scope,
};

/// Height and width of a stage's token grid.
type Grid = (usize, usize);

pub(crate) struct DaVit {
    stages: Vec<Stage>,
}

struct Stage {
    embed: ConvEmbed,
    blocks: Vec<(Block, Block)>,
}

impl DaVit {
    pub(crate) fn load(
        scope: &Scope<'_>,
        config: &VisionConfig,
    ) -> std::result::Result<Self, LoadError> {
        let stage = |i: usize| {
            let block = |b: usize| {
                let scope = scope.pp(format_args!("blocks.{i}.{b}"));
                let (spatial, channel) = (scope.pp("spatial_block"), scope.pp("channel_block"));
                let size = config.dim_embed[i];
                let heads =
                    Projections::load(&spatial.pp("window_attn"), size, config.num_heads[i])?;
                let window = WindowAttention { projections: heads, window: config.window_size };
                let groups =
                    Projections::load(&channel.pp("channel_attn"), size, config.num_groups[i])?;
                Ok((
                    Block::load(&spatial, size, Attention::Window(window))?,
                    Block::load(&channel, size, Attention::Channel(ChannelAttention(groups)))?,
                ))
            };
            Ok(Stage {
                embed: ConvEmbed::load(&scope.pp(format_args!("convs.{i}")), config, i)?,
                blocks: (0..config.depths[i])
                    .map(block)
                    .collect::<std::result::Result<_, LoadError>>()?,
            })
        };
        let stages = (0..config.dim_embed.len()).map(stage);
        Ok(Self { stages: stages.collect::<std::result::Result<_, LoadError>>()? })
    }

    /// `[B, 3, side, side] -> [B, N, C]`; `seen` is shown every stage's output.
    pub(crate) fn forward(&self, pixels: &Tensor, mut seen: impl FnMut(&Tensor)) -> Result<Tensor> {
        let mut x = pixels.permute((0, 2, 3, 1))?; // [B, H, W, C]
        for stage in &self.stages {
            x = stage.embed.forward(&x)?;
            let (b, h, w, c) = x.dims4()?;
            let mut tokens = x.reshape((b, h * w, c))?;
            for (spatial, channel) in &stage.blocks {
                tokens = spatial.forward(&tokens, (h, w))?;
                tokens = channel.forward(&tokens, (h, w))?;
            }
            seen(&tokens);
            x = tokens.reshape((b, h, w, c))?;
        }
        x.flatten(1, 2)
    }
}

/// Convolution over patches, with a norm before it or, in the first stage, after it.
struct ConvEmbed {
    weight: Tensor,
    bias: Tensor,
    norm: LayerNorm,
    prenorm: bool,
    stride: usize,
    padding: usize,
}

impl ConvEmbed {
    fn load(
        scope: &Scope<'_>,
        config: &VisionConfig,
        stage: usize,
    ) -> std::result::Result<Self, LoadError> {
        let to = config.dim_embed[stage];
        let from = if stage == 0 { 3 } else { config.dim_embed[stage - 1] };
        let kernel = config.patch_size[stage];
        let prenorm = config.patch_prenorm[stage];
        Ok(Self {
            weight: scope.get("conv.weight", &[to, from, kernel, kernel])?,
            bias: scope.get("conv.bias", &[to])?,
            norm: LayerNorm::load(&scope.pp("norm"), if prenorm { from } else { to })?,
            prenorm,
            stride: config.patch_stride[stage],
            padding: config.patch_padding[stage],
        })
    }

    /// `[B, H, W, C] -> [B, H', W', C']`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = if self.prenorm { self.norm.forward(x)? } else { x.clone() };
        let x = x
            .permute((0, 3, 1, 2))?
            .contiguous()?
            .conv2d(&self.weight, self.padding, self.stride, 1, 1)?
            .permute((0, 2, 3, 1))?
            .broadcast_add(&self.bias)?;
        if self.prenorm { Ok(x) } else { self.norm.forward(&x) }
    }
}

enum Attention {
    Window(WindowAttention),
    Channel(ChannelAttention),
}

/// Convolution, attention, convolution, MLP, each added to its input.
struct Block {
    conv1: DepthwiseResidual,
    norm1: LayerNorm,
    attention: Attention,
    conv2: DepthwiseResidual,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn load(
        scope: &Scope<'_>,
        size: usize,
        attention: Attention,
    ) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            conv1: DepthwiseResidual::load(&scope.pp("conv1"), size)?,
            norm1: LayerNorm::load(&scope.pp("norm1"), size)?,
            attention,
            conv2: DepthwiseResidual::load(&scope.pp("conv2"), size)?,
            norm2: LayerNorm::load(&scope.pp("norm2"), size)?,
            mlp: Mlp::load(&scope.pp("ffn"), size)?,
        })
    }

    /// `[B, N, C] -> [B, N, C]`
    fn forward(&self, x: &Tensor, (h, w): Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let convolve = |op: &DepthwiseResidual, x: &Tensor| {
            op.forward(&x.reshape((b, h, w, c))?)?.reshape((b, n, c))
        };
        let x = convolve(&self.conv1, x)?;
        let normed = self.norm1.forward(&x)?;
        let x = (x + match &self.attention {
            Attention::Window(attention) => attention.forward(&normed, (h, w))?,
            Attention::Channel(attention) => attention.forward(&normed)?,
        })?;
        let x = convolve(&self.conv2, &x)?;
        &x + self.mlp.forward(&self.norm2.forward(&x)?)?
    }
}

/// The projections around an attention, and into how many parts the channels divide.
struct Projections {
    qkv: candle_nn::Linear,
    proj: candle_nn::Linear,
    parts: usize,
}

impl Projections {
    fn load(scope: &Scope<'_>, size: usize, parts: usize) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            qkv: linear(&scope.pp("qkv"), size, 3 * size)?,
            proj: linear(&scope.pp("proj"), size, size)?,
            parts,
        })
    }
}

/// Self-attention within square windows, without position bias or shift.
struct WindowAttention {
    projections: Projections,
    window: usize,
}

impl WindowAttention {
    /// `[B, N, C] -> [B, N, C]`
    ///
    /// The grid is padded with zeros at the right and the bottom to whole windows; padded cells
    /// take part in the attention, unmasked, as in the reference.
    fn forward(&self, x: &Tensor, (h, w): Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let Projections { qkv, proj, parts: heads } = &self.projections;
        let (side, heads) = (self.window, *heads);
        let (rows, columns) = (h.div_ceil(side), w.div_ceil(side));
        let windows = x
            .reshape((b, h, w, c))?
            .pad_with_zeros(1, 0, rows * side - h)?
            .pad_with_zeros(2, 0, columns * side - w)?
            .reshape(&[b, rows, side, columns, side, c][..])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .reshape((b * rows * columns, side * side, c))?;
        let qkv = qkv
            .forward(&windows)? // [windows, side * side, 3C]
            .reshape((b * rows * columns, side * side, 3, heads, c / heads))?
            .permute((2, 0, 3, 1, 4))?
            .contiguous()?; // [3, windows, A, side * side, K]
        let scale = ((c / heads) as f64).powf(-0.5);
        let scores = (qkv.i(0)? * scale)?.matmul(&qkv.i(1)?.t()?)?;
        let windows = attend(&scores, &qkv.i(2)?)? // [windows, A, side * side, K]
            .transpose(1, 2)?
            .reshape((b * rows * columns, side * side, c))?;
        proj.forward(&windows)?
            .reshape(&[b, rows, columns, side, side, c][..])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .reshape((b, rows * side, columns * side, c))?
            .i((.., ..h, ..w, ..))?
            .reshape((b, n, c))
    }
}

/// Attention across the channels of each group.
struct ChannelAttention(Projections);

impl ChannelAttention {
    /// `[B, N, C] -> [B, N, C]`
    ///
    /// The scale is `N^-0.5`, of the number of tokens and not of the head's size (docs/MODEL.md).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let Projections { qkv, proj, parts: groups } = &self.0;
        let qkv = qkv
            .forward(x)? // [B, N, 3C]
            .reshape((b, n, 3, *groups, c / groups))?
            .permute((2, 0, 3, 4, 1))?
            .contiguous()?; // [3, B, groups, C/groups, N]
        let scores = (qkv.i(0)? * (n as f64).powf(-0.5))?.matmul(&qkv.i(1)?.t()?)?;
        let mixed = attend(&scores, &qkv.i(2)?)? // [B, groups, C/groups, N]
            .permute((0, 3, 1, 2))?
            .reshape((b, n, c))?;
        proj.forward(&mixed)
    }
}
