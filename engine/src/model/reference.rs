//! The backend of formulas: candle's own operations, on any device. It is slow, and what the others
//! are held against.

use candle_core::{D, IndexOp, Module, Result, Tensor};

use super::{
    Logits,
    backend::{Backend, Grid, History, Layer, Linear, Loaded, OnGrid, Patches, Residual},
    network::Look,
    scope::{Scope, Source},
};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Reference;

pub(crate) struct Norm {
    weight: Tensor,
    bias: Tensor,
}

pub(crate) struct Mlp {
    norm: Option<Norm>,
    fc1: candle_nn::Linear,
    fc2: candle_nn::Linear,
}

pub(crate) struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

pub(crate) struct Depthwise {
    /// `[9, C]`, in row-major order.
    taps: Tensor,
    bias: Tensor,
}

/// What both attentions of a block have; `parts` are heads, or groups of channels.
struct Attention {
    norm: Norm,
    qkv: candle_nn::Linear,
    proj: candle_nn::Linear,
    parts: usize,
}

pub(crate) struct Windows {
    attention: Attention,
    side: usize,
}

pub(crate) struct Channels(Attention);

/// `[A, S, K]` each.
pub(crate) struct Keys {
    k: Tensor,
    v: Tensor,
}

#[derive(Default)]
pub(crate) struct Seen {
    rows: usize,
    /// Of every layer, keys and values `[rows, A, T, K]`.
    layers: Vec<(Tensor, Tensor)>,
}

impl Backend for Reference {
    const PICTURES: usize = 2;

    type Linear = candle_nn::Linear;
    type Norm = Norm;
    type Mlp = Mlp;
    type Conv = Conv;
    type Depthwise = Depthwise;
    type Windows = Windows;
    type Channels = Channels;
    type Keys = Keys;
    type History = Seen;

    fn linear(
        &self,
        scope: &Scope<'_>,
        weight: &Source<'_>,
        bias: Option<Tensor>,
    ) -> Loaded<candle_nn::Linear> {
        Ok(candle_nn::Linear::new(scope.arranged(weight)?, bias))
    }

    fn norm(&self, scope: &Scope<'_>, size: usize) -> Loaded<Norm> {
        Ok(Norm { weight: scope.get("weight", &[size])?, bias: scope.get("bias", &[size])? })
    }

    fn mlp(
        &self,
        scope: &Scope<'_>,
        norm: Option<&Scope<'_>>,
        (size, hidden): (usize, usize),
    ) -> Loaded<Mlp> {
        Ok(Mlp {
            norm: norm.map(|scope| self.norm(scope, size)).transpose()?,
            fc1: linear(&scope.pp("fc1"), size, hidden)?,
            fc2: linear(&scope.pp("fc2"), hidden, size)?,
        })
    }

    fn conv(&self, scope: &Scope<'_>, patches: Patches) -> Loaded<Conv> {
        let Patches { from, to, size, stride, padding } = patches;
        let weight = scope.get("weight", &[to, from, size, size])?;
        Ok(Conv { weight, bias: scope.get("bias", &[to])?, stride, padding })
    }

    fn depthwise(&self, scope: &Scope<'_>, channels: usize) -> Loaded<Depthwise> {
        let (taps, bias) = scope.taps(channels)?;
        Ok(Depthwise { taps, bias })
    }

    fn windows(
        &self,
        block: &Scope<'_>,
        size: usize,
        heads: usize,
        window: usize,
    ) -> Loaded<Windows> {
        let attention = self.attention(block, "window_attn", size, heads)?;
        Ok(Windows { attention, side: window })
    }

    fn channels(&self, block: &Scope<'_>, size: usize, groups: usize) -> Loaded<Channels> {
        Ok(Channels(self.attention(block, "channel_attn", size, groups)?))
    }

    fn kept_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn keys(&self, k: &Tensor, v: &Tensor, heads: usize) -> Result<Keys> {
        let split = |x: &Tensor| split(&x.unsqueeze(0)?, heads)?.squeeze(0);
        Ok(Keys { k: split(k)?, v: split(v)? })
    }

    fn attend(&self, q: &Tensor, sequences: &[(&Keys, usize)], _heads: usize) -> Result<Tensor> {
        let mut first = 0;
        let parts = sequences.iter().map(|(Keys { k, v }, rows)| {
            let q = q.narrow(0, first, *rows)?.unsqueeze(0)?; // [1, rows, D]
            first += rows;
            mix(&q, &k.unsqueeze(0)?, &v.unsqueeze(0)?)?.squeeze(0)
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }

    fn attend_histories(
        &self,
        layer: usize,
        jobs: Vec<&mut Seen>,
        [q, k, v]: [&Tensor; 3],
        heads: usize,
    ) -> Result<Tensor> {
        let mut first = 0;
        let mut parts = Vec::with_capacity(jobs.len());
        for Seen { rows: count, layers } in jobs {
            // One token a row: [rows, 1, D].
            let rows = |x: &Tensor| x.narrow(0, first, *count)?.unsqueeze(1);
            let (mut k, mut v) = (split(&rows(k)?, heads)?, split(&rows(v)?, heads)?);
            if let Some((past_k, past_v)) = layers.get(layer) {
                k = Tensor::cat(&[past_k, &k], 2)?;
                v = Tensor::cat(&[past_v, &v], 2)?;
            }
            parts.push(mix(&rows(q)?, &k, &v)?.squeeze(1)?);
            layers.splice(layer..(layer + 1).min(layers.len()), [(k, v)]);
            first += *count;
        }
        Tensor::cat(&parts, 0)
    }

    /// Of each row only as many as are enough, as a device sends them that has all on its side.
    fn logits(&self, head: &candle_nn::Linear, hidden: &Tensor, look: Look<'_>) -> Result<()> {
        let logits = Module::forward(head, hidden)?;
        let log_sums: Vec<f32> = logits.log_sum_exp(D::Minus1)?.to_vec1()?;
        let (mut values, mut ids) = (Vec::new(), Vec::new());
        let width = look.highest.min(logits.dim(D::Minus1)?);
        for row in logits.to_vec2::<f32>()? {
            let mut highest: Vec<(u32, f32)> = (0..).zip(row).collect();
            highest.sort_by(|a, b| b.1.total_cmp(&a.1));
            highest.truncate(width);
            highest.sort_unstable_by_key(|(token, _)| *token);
            ids.extend(highest.iter().map(|(token, _)| *token));
            values.extend(highest.iter().map(|(_, logit)| *logit));
        }
        (look.at)(Logits::highest(&values, &ids, &log_sums, width));
        Ok(())
    }
}

impl Reference {
    fn attention(
        self,
        block: &Scope<'_>,
        name: &str,
        size: usize,
        parts: usize,
    ) -> Loaded<Attention> {
        let scope = block.pp(name);
        Ok(Attention {
            norm: self.norm(&block.pp("norm1"), size)?,
            qkv: linear(&scope.pp("qkv"), size, 3 * size)?,
            proj: linear(&scope.pp("proj"), size, size)?,
            parts,
        })
    }
}

fn linear(scope: &Scope<'_>, from: usize, to: usize) -> Loaded<candle_nn::Linear> {
    let bias = scope.get("bias", &[to])?;
    Ok(candle_nn::Linear::new(scope.get("weight", &[to, from])?, Some(bias)))
}

impl Layer for candle_nn::Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Module::forward(self, x)
    }
}

impl Linear for candle_nn::Linear {
    fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        residual + Module::forward(self, x)?
    }
}

impl Layer for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, 1e-5)
    }
}

impl Residual for Mlp {
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let normed = self.norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(&x))?;
        let hidden = Module::forward(&self.fc1, &normed)?.gelu_erf()?;
        x + Module::forward(&self.fc2, &hidden)?
    }
}

impl Layer for Conv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.permute((0, 3, 1, 2))?
            .contiguous()?
            .conv2d(&self.weight, self.padding, self.stride, 1, 1)?
            .permute((0, 2, 3, 1))?
            .broadcast_add(&self.bias)
    }
}

impl OnGrid for Depthwise {
    /// Nine shifted copies, multiplied and added.
    fn forward(&self, x: Tensor, (h, w): Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let x = x.reshape((b, h, w, c))?;
        let padded = x.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
        let mut sum = x.broadcast_add(&self.bias)?;
        for tap in 0..9 {
            let shifted = padded.narrow(1, tap / 3, h)?.narrow(2, tap % 3, w)?;
            sum = (sum + shifted.broadcast_mul(&self.taps.get(tap)?)?)?;
        }
        sum.reshape((b, n, c))
    }
}

impl OnGrid for Windows {
    fn forward(&self, x: Tensor, (h, w): Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let (side, Attention { norm, qkv, proj, parts: heads }) = (self.side, &self.attention);
        let heads = *heads;
        let (rows, columns) = (h.div_ceil(side), w.div_ceil(side));
        let windows = norm
            .forward(&x)?
            .reshape((b, h, w, c))?
            .pad_with_zeros(1, 0, rows * side - h)?
            .pad_with_zeros(2, 0, columns * side - w)?
            .reshape(&[b, rows, side, columns, side, c][..])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .reshape((b * rows * columns, side * side, c))?;
        let qkv = Module::forward(qkv, &windows)? // [windows, side * side, 3C]
            .reshape((b * rows * columns, side * side, 3, heads, c / heads))?
            .permute((2, 0, 3, 1, 4))?
            .contiguous()?; // [3, windows, A, side * side, K]
        let scale = ((c / heads) as f64).powf(-0.5);
        let scores = (qkv.i(0)? * scale)?.matmul(&qkv.i(1)?.t()?)?;
        let windows = weigh(&scores, &qkv.i(2)?)? // [windows, A, side * side, K]
            .transpose(1, 2)?
            .reshape((b * rows * columns, side * side, c))?;
        let mixed = Module::forward(proj, &windows)?
            .reshape(&[b, rows, columns, side, side, c][..])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .reshape((b, rows * side, columns * side, c))?
            .i((.., ..h, ..w, ..))?
            .reshape((b, n, c))?;
        x + mixed
    }
}

impl OnGrid for Channels {
    fn forward(&self, x: Tensor, _grid: Grid) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let Attention { norm, qkv, proj, parts: groups } = &self.0;
        let qkv = Module::forward(qkv, &norm.forward(&x)?)? // [B, N, 3C]
            .reshape((b, n, 3, *groups, c / groups))?
            .permute((2, 0, 3, 4, 1))?
            .contiguous()?; // [3, B, groups, C/groups, N]
        let scores = (qkv.i(0)? * (n as f64).powf(-0.5))?.matmul(&qkv.i(1)?.t()?)?;
        let mixed = weigh(&scores, &qkv.i(2)?)? // [B, groups, C/groups, N]
            .permute((0, 3, 1, 2))?
            .reshape((b, n, c))?;
        x + Module::forward(proj, &mixed)?
    }
}

impl History for Seen {
    fn advance(&mut self, rows: usize) {
        self.rows = rows;
    }

    fn select(&mut self, parents: &[usize]) -> Result<()> {
        #[expect(clippy::cast_possible_truncation, reason = "a job has few rows")]
        let parents: Vec<u32> = parents.iter().map(|parent| *parent as u32).collect();
        for (k, v) in &mut self.layers {
            let parents = Tensor::new(parents.as_slice(), k.device())?;
            *k = k.index_select(&parents, 0)?;
            *v = v.index_select(&parents, 0)?;
        }
        Ok(())
    }
}

/// `[B, T, D] -> [B, A, T, K]`
fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, t, d) = x.dims3()?;
    x.reshape((b, t, heads, d / heads))?.transpose(1, 2)?.contiguous()
}

/// Queries `[B, T, D]` over keys and values `[B, A, S, K]`, heads joined: `[B, T, D]`
fn mix(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (heads, size) = (k.dim(1)?, k.dim(D::Minus1)?);
    let q = split(&(q * (size as f64).powf(-0.5))?, heads)?;
    weigh(&q.matmul(&k.t()?)?, v)?.transpose(1, 2)?.flatten_from(2)
}

/// Softmax of `scores` over the last dimension, times `v`.
fn weigh(scores: &Tensor, v: &Tensor) -> Result<Tensor> {
    debug_assert_eq!(scores.dim(D::Minus1)?, v.dim(D::Minus2)?);
    candle_nn::ops::softmax_last_dim(scores)?.matmul(v)
}
