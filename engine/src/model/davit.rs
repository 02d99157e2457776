//! DaViT, the vision tower: pixel values to visual tokens.
//!
//! A stage is a convolution that shrinks the grid, then pairs of blocks: attention within windows
//! of the picture, then attention across channels. Tokens stay in `[B, N, C]` order throughout.

use candle_core::{Result, Tensor};

use super::{
    backend::{Backend, Grid, Layer, Loaded, OnGrid, Patches, Residual},
    config::VisionConfig,
    scope::Scope,
};

pub(crate) struct DaVit<B: Backend> {
    stages: Vec<Stage<B>>,
}

type Pair<B> = (Block<B, <B as Backend>::Windows>, Block<B, <B as Backend>::Channels>);

struct Stage<B: Backend> {
    embed: ConvEmbed<B>,
    blocks: Vec<Pair<B>>,
}

impl<B: Backend> DaVit<B> {
    pub(crate) fn load(backend: &B, scope: &Scope<'_>, config: &VisionConfig) -> Loaded<Self> {
        let stage = |i: usize| {
            let (size, window) = (config.dim_embed[i], config.window_size);
            let (heads, groups) = (config.num_heads[i], config.num_groups[i]);
            let block = |b: usize| {
                let scope = scope.pp(format_args!("blocks.{i}.{b}"));
                let (spatial, channel) = (scope.pp("spatial_block"), scope.pp("channel_block"));
                let windows = backend.windows(&spatial, size, heads, window)?;
                let channels = backend.channels(&channel, size, groups)?;
                Ok((
                    Block::load(backend, &spatial, size, windows)?,
                    Block::load(backend, &channel, size, channels)?,
                ))
            };
            Ok(Stage {
                embed: ConvEmbed::load(backend, &scope.pp(format_args!("convs.{i}")), config, i)?,
                blocks: (0..config.depths[i]).map(block).collect::<Loaded<_>>()?,
            })
        };
        let stages = (0..config.dim_embed.len()).map(stage);
        Ok(Self { stages: stages.collect::<Loaded<_>>()? })
    }

    /// `[B, 3, side, side] -> [B, N, C]`; `seen` is shown every stage's output.
    pub(crate) fn forward(&self, pixels: &Tensor, seen: &mut dyn FnMut(&Tensor)) -> Result<Tensor> {
        let mut x = pixels.permute((0, 2, 3, 1))?; // [B, H, W, C]
        for stage in &self.stages {
            x = stage.embed.forward(&x)?;
            let (b, h, w, c) = x.dims4()?;
            x = x.reshape((b, h * w, c))?;
            for (spatial, channel) in &stage.blocks {
                x = spatial.forward(x, (h, w))?;
                x = channel.forward(x, (h, w))?;
            }
            seen(&x);
            x = x.reshape((b, h, w, c))?;
        }
        x.flatten(1, 2)
    }
}

/// Convolution over patches, with a norm before it or, in the first stage, after it.
struct ConvEmbed<B: Backend> {
    conv: B::Conv,
    norm: B::Norm,
    prenorm: bool,
}

impl<B: Backend> ConvEmbed<B> {
    fn load(backend: &B, scope: &Scope<'_>, config: &VisionConfig, stage: usize) -> Loaded<Self> {
        let to = config.dim_embed[stage];
        let from = if stage == 0 { 3 } else { config.dim_embed[stage - 1] };
        let patches = Patches {
            from,
            to,
            size: config.patch_size[stage],
            stride: config.patch_stride[stage],
            padding: config.patch_padding[stage],
        };
        let prenorm = config.patch_prenorm[stage];
        Ok(Self {
            conv: backend.conv(&scope.pp("conv"), patches)?,
            norm: backend.norm(&scope.pp("norm"), if prenorm { from } else { to })?,
            prenorm,
        })
    }

    /// `[B, H, W, C] -> [B, H', W', C']`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.prenorm {
            self.conv.forward(&self.norm.forward(x)?)
        } else {
            self.norm.forward(&self.conv.forward(x)?)
        }
    }
}

/// Convolution, attention, convolution, MLP, each added to its input.
struct Block<B: Backend, A> {
    conv1: B::Depthwise,
    attention: A,
    conv2: B::Depthwise,
    mlp: B::Mlp,
}

impl<B: Backend, A: OnGrid> Block<B, A> {
    fn load(backend: &B, scope: &Scope<'_>, size: usize, attention: A) -> Loaded<Self> {
        let mlp = scope.pp("ffn");
        Ok(Self {
            conv1: backend.depthwise(&scope.pp("conv1"), size)?,
            attention,
            conv2: backend.depthwise(&scope.pp("conv2"), size)?,
            mlp: backend.mlp(&mlp, Some(&scope.pp("norm2")), (size, mlp.hidden(size)))?,
        })
    }

    /// `[B, N, C] -> [B, N, C]`
    fn forward(&self, x: Tensor, grid: Grid) -> Result<Tensor> {
        let x = self.conv1.forward(x, grid)?;
        let x = self.attention.forward(x, grid)?;
        self.mlp.forward(self.conv2.forward(x, grid)?)
    }
}
