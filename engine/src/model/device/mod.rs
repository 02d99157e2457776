//! The backend of a CUDA device: in bfloat16 products by cuBLAS through candle, in float32 by a kernel
//! of `florence-cuda`, as is what comes between them and is fused there. On the host the same code
//! runs with these kernels emulated, but for the products, which is slow and for tests.
//!
//! Products take and give the numbers that the backend is made for, float32 or bfloat16; sums,
//! norms, softmax and what layers are added to stay float32. One thread drives a device.

mod layers;
mod slots;

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Result, Tensor};
use florence_cuda::geometry;
use parking_lot::Mutex;

use super::{
    LoadError, Logits,
    backend::{Backend, Loaded, Patches},
    launch::{Arg, Kernels, address, fresh},
    network::Look,
    scope::{Scope, Source},
};
use layers::{Attention, Channels, Conv, Depthwise, Mlp, Norm, Product, Windows};
use slots::Pool;
pub(crate) use slots::Seen;

/// A device and what is loaded there; cheap to clone.
#[derive(Clone)]
pub(crate) struct OnDevice(Arc<Inner>);

struct Inner {
    kernels: Kernels,
    /// The numbers of products.
    kind: DType,
    /// Where there is no bias.
    nothing: Mutex<HashMap<usize, Tensor>>,
    pool: Mutex<Pool>,
}

/// `[S, D]` each.
pub(crate) struct Keys {
    k: Tensor,
    v: Tensor,
}

impl OnDevice {
    pub(crate) fn new(device: &Device, kind: DType) -> Result<Self> {
        let kernels = Kernels::load(device, kind)?;
        let (nothing, pool) = (Mutex::default(), Mutex::default());
        Ok(Self(Arc::new(Inner { kernels, kind, nothing, pool })))
    }

    fn device(&self) -> &Device {
        self.0.kernels.device()
    }

    /// A tensor that a kernel is about to fill.
    fn fresh(&self, shape: impl Into<candle_core::Shape>, kind: DType) -> Result<Tensor> {
        fresh(self.device(), shape, kind)
    }

    /// As many zeros.
    fn nothing(&self, count: usize) -> Result<Tensor> {
        let mut known = self.0.nothing.lock();
        if let Some(zeros) = known.get(&count) {
            return Ok(zeros.clone());
        }
        let zeros = Tensor::zeros(count, DType::F32, self.device())?;
        known.insert(count, zeros.clone());
        Ok(zeros)
    }

    fn run(&self, name: &str, launch: florence_cuda::Launch, args: &[Arg<'_>]) -> Result<()> {
        self.0.kernels.run(name, launch, args)
    }

    fn product(&self, scope: &Scope<'_>, from: usize, to: usize) -> Loaded<Product> {
        let bias = scope.get("bias", &[to])?;
        self.linear(scope, &Source::plain("weight", &[to, from]), Some(bias))
    }

    fn attention(
        &self,
        block: &Scope<'_>,
        name: &str,
        size: usize,
        parts: usize,
    ) -> Loaded<Attention> {
        let scope = block.pp(name);
        Ok(Attention {
            norm: self.norm(&block.pp("norm1"), size)?,
            qkv: self.product(&scope.pp("qkv"), size, 3 * size)?,
            proj: self.product(&scope.pp("proj"), size, size)?,
            parts,
        })
    }

    /// `product + bias + residual`
    fn add(&self, product: &Tensor, bias: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (rows, size) = product.dims2()?;
        let sum = self.fresh(residual.shape(), DType::F32)?;
        let residual = residual.contiguous()?;
        self.run(
            "bias_residual",
            geometry::bias_residual(rows, size),
            &[
                Arg::Tensor(product),
                Arg::Tensor(bias),
                Arg::Tensor(&residual),
                Arg::Tensor(&sum),
                Arg::Size(rows),
                Arg::int(size),
            ],
        )?;
        Ok(sum)
    }
}

impl Backend for OnDevice {
    const PICTURES: usize = 16;

    type Linear = Product;
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
    ) -> Loaded<Product> {
        let load = || {
            let bias = bias.map_or_else(|| self.nothing(weight.shape[0]), Ok)?;
            Ok((bias, self.0.kind))
        };
        let (bias, kind) = load().map_err(LoadError::Device)?;
        let weight = scope.arranged(weight)?;
        let weight = weight.to_dtype(kind).and_then(|weight| weight.contiguous());
        Ok(Product { on: self.clone(), weight: weight.map_err(LoadError::Device)?, bias })
    }

    fn norm(&self, scope: &Scope<'_>, size: usize) -> Loaded<Norm> {
        let vector = |name| scope.get(name, &[size]);
        Ok(Norm { on: self.clone(), weight: vector("weight")?, shift: vector("bias")? })
    }

    fn mlp(
        &self,
        scope: &Scope<'_>,
        norm: Option<&Scope<'_>>,
        (size, hidden): (usize, usize),
    ) -> Loaded<Mlp> {
        Ok(Mlp {
            norm: norm.map(|scope| self.norm(scope, size)).transpose()?,
            fc1: self.product(&scope.pp("fc1"), size, hidden)?,
            fc2: self.product(&scope.pp("fc2"), hidden, size)?,
        })
    }

    fn conv(&self, scope: &Scope<'_>, patches: Patches) -> Loaded<Conv> {
        let Patches { from, to, size, .. } = patches;
        let bias = scope.get("bias", &[to])?;
        let weight = Source {
            name: "weight",
            stored: &[to, from, size, size],
            shape: [to, from * size * size],
            arrange: |weight| weight.permute((0, 2, 3, 1)),
        };
        let mut product = self.linear(scope, &weight, Some(bias))?;
        // Rows of patches are filled up, so that products can load them in whole lines.
        let more = geometry::patch_length(from, size) - from * size * size;
        let padded = product.weight.pad_with_zeros(1, 0, more);
        product.weight = padded.map_err(LoadError::Device)?;
        Ok(Conv { product, patches })
    }

    fn depthwise(&self, scope: &Scope<'_>, channels: usize) -> Loaded<Depthwise> {
        let (taps, bias) = scope.taps(channels)?;
        Ok(Depthwise { on: self.clone(), taps, bias })
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
        self.0.kind.size_in_bytes()
    }

    fn keys(&self, k: &Tensor, v: &Tensor, _heads: usize) -> Result<Keys> {
        Ok(Keys { k: k.contiguous()?, v: v.contiguous()? })
    }

    fn attend(&self, q: &Tensor, sequences: &[(&Keys, usize)], heads: usize) -> Result<Tensor> {
        let (rows, d) = q.dims2()?;
        let out = self.fresh((rows, d), q.dtype())?;
        let keys = sequences.iter().map(|(keys, _)| address(&keys.k));
        let values = sequences.iter().map(|(keys, _)| address(&keys.v));
        let lengths = sequences.iter().map(|(keys, _)| keys.k.dim(0));
        let of_row =
            sequences.iter().enumerate().flat_map(|(i, (_, rows))| std::iter::repeat_n(i, *rows));
        let of_row: Vec<usize> = of_row.collect();
        let lengths = lengths.collect::<Result<Vec<_>>>()?;
        let nothing = self.nothing(d)?;
        let [keys, values] =
            [keys.collect::<Result<Vec<_>>>()?, values.collect::<Result<Vec<_>>>()?];
        self.run(
            "sequence_attention",
            geometry::sequence_attention(rows, sequences.len(), heads, d / heads),
            &[
                Arg::Tensor(q),
                Arg::Tensor(&nothing),
                Arg::Tensor(&self.addresses(&keys)?),
                Arg::Tensor(&self.addresses(&values)?),
                Arg::Tensor(&self.ints(&lengths)?),
                Arg::Tensor(&self.ints(&of_row)?),
                Arg::Tensor(&out),
                Arg::int(rows),
                Arg::int(d),
                Arg::int(heads),
            ],
        )?;
        Ok(out)
    }

    fn attend_histories(
        &self,
        layer: usize,
        mut jobs: Vec<&mut Seen>,
        [q, k, v]: [&Tensor; 3],
        heads: usize,
    ) -> Result<Tensor> {
        let (rows, d) = q.dims2()?;
        let mut pool = self.0.pool.lock();
        if layer == 0 {
            for job in &mut jobs {
                job.take_slots(self, &mut pool);
            }
            pool.step = Some(self.step(&jobs)?);
        }
        let arena = pool.arena(self, layer, (d, q.dtype()))?;
        let Some(step) = &pool.step else { return Err(no_step()) };
        let nothing = self.nothing(d)?;
        self.run(
            "history_append",
            geometry::history_append(rows, d),
            &[
                Arg::Tensor(k),
                Arg::Tensor(v),
                Arg::Tensor(&nothing),
                Arg::Tensor(&nothing),
                Arg::Tensor(&arena.k),
                Arg::Tensor(&arena.v),
                Arg::Tensor(&step.slots),
                Arg::int(rows),
                Arg::int(d),
            ],
        )?;
        let out = self.fresh((rows, d), q.dtype())?;
        self.run(
            "history_attention",
            geometry::history_attention(rows, heads, d / heads),
            &[
                Arg::Tensor(q),
                Arg::Tensor(&nothing),
                Arg::Tensor(&arena.k),
                Arg::Tensor(&arena.v),
                Arg::Tensor(&step.seen),
                Arg::Tensor(&step.counts),
                Arg::Tensor(&out),
                Arg::int(rows),
                Arg::int(d),
                Arg::int(heads),
            ],
        )?;
        Ok(out)
    }

    fn logits(&self, head: &Product, hidden: &Tensor, look: Look<'_>) -> Result<()> {
        let logits = head.plain(hidden)?.to_dtype(DType::F32)?;
        let (rows, vocabulary) = logits.dims2()?;
        let width = look.highest.min(vocabulary);
        if width > MOST_HIGHEST {
            let all = logits.broadcast_add(&head.bias)?.flatten_all()?.to_vec1()?;
            (look.at)(Logits::all(&all, vocabulary));
            return Ok(());
        }
        let log_sums = self.fresh(rows, DType::F32)?;
        let (values, ids) =
            (self.fresh((rows, width), DType::F32)?, self.fresh((rows, width), DType::U32)?);
        self.run(
            "top_k",
            geometry::top_k(rows),
            &[
                Arg::Tensor(&logits),
                Arg::Tensor(&head.bias),
                Arg::Tensor(&log_sums),
                Arg::Tensor(&values),
                Arg::Tensor(&ids),
                Arg::int(rows),
                Arg::int(vocabulary),
                Arg::int(width),
            ],
        )?;
        let (values, ids) = (values.to_vec2::<f32>()?, ids.to_vec2::<u32>()?);
        let sorted = ids.into_iter().zip(values).flat_map(|(ids, values)| {
            let mut row: Vec<(u32, f32)> = ids.into_iter().zip(values).collect();
            row.sort_unstable_by_key(|(token, _)| *token);
            row
        });
        let (ids, values): (Vec<u32>, Vec<f32>) = sorted.unzip();
        (look.at)(Logits::highest(&values, &ids, &log_sums.to_vec1::<f32>()?, width));
        Ok(())
    }
}

impl OnDevice {
    /// Whole numbers as the kernels take them.
    fn ints(&self, values: &[usize]) -> Result<Tensor> {
        #[expect(clippy::cast_possible_truncation, reason = "numbers of rows, tokens and slots")]
        let values: Vec<u32> = values.iter().map(|value| *value as u32).collect();
        self.whole(&values)
    }

    fn whole(&self, values: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(values, values.len(), self.device())
    }

    fn addresses(&self, values: &[u64]) -> Result<Tensor> {
        let values: Vec<i64> = values.iter().map(|address| address.cast_signed()).collect();
        Tensor::from_slice(&values, values.len(), self.device())
    }
}

fn no_step() -> candle_core::Error {
    candle_core::Error::Msg("a layer before the first".to_owned()).bt()
}

/// The most of a row's logits that `top_k` finds.
const MOST_HIGHEST: usize = 64;
