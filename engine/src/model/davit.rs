//! DaViT, the vision tower: pixel values to visual tokens.
//!
//! A stage is a convolution that shrinks the grid, then pairs of blocks: attention within windows
//! of the picture, then attention across channels. Tokens stay in `[B, N, C]` order throughout.

use candle_core::{IndexOp, Result, Tensor};

use super::{
    LoadError,
    compute::{Compute, floats, like},
    config::VisionConfig,
    layers::{LayerNorm, Linear, Loaded, Mlp, attend, matrix, norm},
    scope::{Scope, Source},
};
use crate::kernels::{self, Cpu};

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
    pub(crate) fn load(scope: &Scope<'_>, config: &VisionConfig) -> Loaded<Self> {
        let stage = |i: usize| {
            let size = config.dim_embed[i];
            let block = |b: usize| {
                let scope = scope.pp(format_args!("blocks.{i}.{b}"));
                let (spatial, channel) = (scope.pp("spatial_block"), scope.pp("channel_block"));
                let window = Attention::load_window(
                    &spatial,
                    size,
                    config.num_heads[i],
                    config.window_size,
                )?;
                let groups = Attention::load_channel(&channel, size, config.num_groups[i])?;
                Ok((Block::load(&spatial, size, window)?, Block::load(&channel, size, groups)?))
            };
            Ok(Stage {
                embed: ConvEmbed::load(&scope.pp(format_args!("convs.{i}")), config, i)?,
                blocks: (0..config.depths[i]).map(block).collect::<Loaded<_>>()?,
            })
        };
        let stages = (0..config.dim_embed.len()).map(stage);
        Ok(Self { stages: stages.collect::<Loaded<_>>()? })
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
    conv: Conv,
    norm: LayerNorm,
    prenorm: bool,
}

enum Conv {
    Kernel(Cpu, kernels::PatchConv),
    Candle { weight: Tensor, bias: Tensor, stride: usize, padding: usize },
}

impl ConvEmbed {
    fn load(scope: &Scope<'_>, config: &VisionConfig, stage: usize) -> Loaded<Self> {
        let to = config.dim_embed[stage];
        let from = if stage == 0 { 3 } else { config.dim_embed[stage - 1] };
        let kernel = config.patch_size[stage];
        let (stride, padding) = (config.patch_stride[stage], config.patch_padding[stage]);
        let prenorm = config.patch_prenorm[stage];
        let stored = [to, from, kernel, kernel];
        let bias = scope.get("conv.bias", &[to])?;
        let conv = match scope.compute() {
            Compute::Kernels(cpu, precision) => {
                let weight = Source {
                    name: "conv.weight",
                    stored: &stored,
                    shape: [to, from * kernel * kernel],
                    arrange: |weight| weight.permute((0, 2, 3, 1)),
                };
                let matrix = scope.matrix(&weight, Some(&bias), precision)?;
                Conv::Kernel(cpu, kernels::PatchConv { matrix, kernel, stride, padding })
            }
            Compute::Candle => {
                let weight = scope.get("conv.weight", &stored)?;
                Conv::Candle { weight, bias, stride, padding }
            }
        };
        let norm = LayerNorm::load(&scope.pp("norm"), if prenorm { from } else { to })?;
        Ok(Self { conv, norm, prenorm })
    }

    /// `[B, H, W, C] -> [B, H', W', C']`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = if self.prenorm { self.norm.forward(x)? } else { x.clone() };
        let x = self.conv.forward(&x)?;
        if self.prenorm { Ok(x) } else { self.norm.forward(&x) }
    }
}

impl Conv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kernel(cpu, conv) => {
                let (b, h, w, c) = x.dims4()?;
                let y = floats(x, |x| conv.forward(*cpu, x, (b, h, w, c)))?;
                Tensor::from_vec(y, (b, conv.side(h), conv.side(w), ()), x.device())
            }
            Self::Candle { weight, bias, stride, padding } => x
                .permute((0, 3, 1, 2))?
                .contiguous()?
                .conv2d(weight, *padding, *stride, 1, 1)?
                .permute((0, 2, 3, 1))?
                .broadcast_add(bias),
        }
    }
}

/// Depthwise 3x3 convolution with zero padding, plus its input: `[B, H, W, C] -> [B, H, W, C]`.
enum Depthwise {
    /// `[9, C]`, taps in row-major order.
    Kernel {
        cpu: Cpu,
        taps: Vec<f32>,
        bias: Vec<f32>,
    },
    Candle {
        taps: Tensor,
        bias: Tensor,
    },
}

impl Depthwise {
    fn load(scope: &Scope<'_>, channels: usize) -> Loaded<Self> {
        let weight = scope.get("weight", &[channels, 1, 3, 3])?;
        let bias = scope.get("bias", &[channels])?;
        let taps = || weight.reshape((channels, 9))?.t()?.contiguous();
        let load = || match scope.compute() {
            Compute::Kernels(cpu, _) => {
                let taps = taps()?.flatten_all()?.to_vec1()?;
                Ok(Self::Kernel { cpu, taps, bias: bias.to_vec1()? })
            }
            Compute::Candle => Ok(Self::Candle { taps: taps()?, bias: bias.clone() }),
        };
        load().map_err(LoadError::Device)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        match self {
            Self::Kernel { cpu, taps, bias } => {
                let grid = (b, h, w, c);
                let y = floats(x, |x| kernels::depthwise_residual(*cpu, x, grid, taps, bias))?;
                like(x, y, c)
            }
            // Nine shifted copies, multiplied and added.
            Self::Candle { taps, bias } => {
                let padded = x.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
                let mut sum = x.broadcast_add(bias)?;
                for tap in 0..9 {
                    let shifted = padded.narrow(1, tap / 3, h)?.narrow(2, tap % 3, w)?;
                    sum = (sum + shifted.broadcast_mul(&taps.get(tap)?)?)?;
                }
                Ok(sum)
            }
        }
    }
}

/// `x + attention(norm(x))`
enum Attention {
    WindowKernel(Cpu, kernels::WindowAttention),
    ChannelKernel(Cpu, kernels::ChannelAttention),
    Window { norm: LayerNorm, attention: WindowAttention },
    Channel { norm: LayerNorm, attention: ChannelAttention },
}

impl Attention {
    fn load_window(scope: &Scope<'_>, size: usize, heads: usize, window: usize) -> Loaded<Self> {
        let (norm_scope, scope) = (scope.pp("norm1"), scope.pp("window_attn"));
        if let Compute::Kernels(cpu, precision) = scope.compute() {
            return Ok(Self::WindowKernel(
                cpu,
                kernels::WindowAttention {
                    norm: norm(&norm_scope, size)?,
                    qkv: matrix(&scope.pp("qkv"), precision, size, 3 * size)?,
                    proj: matrix(&scope.pp("proj"), precision, size, size)?,
                    heads,
                    window,
                },
            ));
        }
        let attention =
            WindowAttention { projections: Projections::load(&scope, size, heads)?, window };
        Ok(Self::Window { norm: LayerNorm::load(&norm_scope, size)?, attention })
    }

    fn load_channel(scope: &Scope<'_>, size: usize, groups: usize) -> Loaded<Self> {
        let (norm_scope, scope) = (scope.pp("norm1"), scope.pp("channel_attn"));
        if let Compute::Kernels(cpu, precision) = scope.compute() {
            return Ok(Self::ChannelKernel(
                cpu,
                kernels::ChannelAttention {
                    norm: norm(&norm_scope, size)?,
                    qkv: matrix(&scope.pp("qkv"), precision, size, 3 * size)?,
                    proj: matrix(&scope.pp("proj"), precision, size, size)?,
                    groups,
                },
            ));
        }
        let attention = ChannelAttention(Projections::load(&scope, size, groups)?);
        Ok(Self::Channel { norm: LayerNorm::load(&norm_scope, size)?, attention })
    }

    /// `[B, N, C] -> [B, N, C]`
    fn forward(&self, x: &Tensor, (h, w): Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        match self {
            Self::WindowKernel(cpu, op) => {
                like(x, floats(x, |x| op.forward(*cpu, x, (b, h, w, c)))?, c)
            }
            Self::ChannelKernel(cpu, op) => like(x, floats(x, |x| op.forward(*cpu, x, n))?, c),
            Self::Window { norm, attention } => x + attention.forward(&norm.forward(x)?, (h, w))?,
            Self::Channel { norm, attention } => x + attention.forward(&norm.forward(x)?)?,
        }
    }
}

/// Convolution, attention, convolution, MLP, each added to its input.
struct Block {
    conv1: Depthwise,
    attention: Attention,
    conv2: Depthwise,
    mlp: Mlp,
}

impl Block {
    fn load(scope: &Scope<'_>, size: usize, attention: Attention) -> Loaded<Self> {
        Ok(Self {
            conv1: Depthwise::load(&scope.pp("conv1"), size)?,
            attention,
            conv2: Depthwise::load(&scope.pp("conv2"), size)?,
            mlp: Mlp::load(&scope.pp("ffn"), Some(&scope.pp("norm2")), size)?,
        })
    }

    /// `[B, N, C] -> [B, N, C]`
    fn forward(&self, x: &Tensor, (h, w): Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let convolve =
            |op: &Depthwise, x: &Tensor| op.forward(&x.reshape((b, h, w, c))?)?.reshape((b, n, c));
        let x = convolve(&self.conv1, x)?;
        let x = self.attention.forward(&x, (h, w))?;
        let x = convolve(&self.conv2, &x)?;
        self.mlp.forward(&x)
    }
}

/// The projections around an attention, and into how many parts the channels divide.
struct Projections {
    qkv: Linear,
    proj: Linear,
    parts: usize,
}

impl Projections {
    fn load(scope: &Scope<'_>, size: usize, parts: usize) -> Loaded<Self> {
        Ok(Self {
            qkv: Linear::load(&scope.pp("qkv"), size, 3 * size)?,
            proj: Linear::load(&scope.pp("proj"), size, size)?,
            parts,
        })
    }
}

/// Self-attention within square windows, without position bias or shift, on candle.
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

/// Attention across the channels of each group, on candle.
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
