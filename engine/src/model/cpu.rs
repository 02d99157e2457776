//! The backend of the processor: parts whose weights are packed for `kernels`.

use candle_core::{CpuStorage, D, Device, InplaceOp1, Layout, Result, Storage, Tensor};

use super::{
    LoadError, Logits,
    backend::{Backend, Grid, History, Layer, Linear, Loaded, OnGrid, Patches, Residual},
    network::Look,
    scope::{Scope, Source},
};
use crate::kernels::{self, Cpu, Precision, SequenceKeys};

/// An instruction set, and the numbers that products are computed in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnCpu(pub(crate) Cpu, pub(crate) Precision);

/// A part, and the instruction set that it runs on.
pub(crate) struct On<T>(Cpu, T);

pub(crate) struct Depthwise {
    /// `[9, C]`, in row-major order.
    taps: Vec<f32>,
    bias: Vec<f32>,
}

/// Queries of a sequence that are so many are divided among the threads.
const MANY_QUERIES: usize = 32;

impl Backend for OnCpu {
    const PICTURES: usize = 1;

    type Linear = On<kernels::Matrix>;
    type Norm = On<kernels::Norm>;
    type Mlp = On<kernels::Mlp>;
    type Conv = On<kernels::PatchConv>;
    type Depthwise = On<Depthwise>;
    type Windows = On<kernels::WindowAttention>;
    type Channels = On<kernels::ChannelAttention>;
    type Keys = SequenceKeys;
    type History = kernels::History;

    fn linear(
        &self,
        scope: &Scope<'_>,
        weight: &Source<'_>,
        bias: Option<Tensor>,
    ) -> Loaded<Self::Linear> {
        Ok(On(self.0, scope.matrix(weight, bias.as_ref(), self.1)?))
    }

    fn norm(&self, scope: &Scope<'_>, size: usize) -> Loaded<Self::Norm> {
        Ok(On(self.0, norm(scope, size)?))
    }

    fn mlp(
        &self,
        scope: &Scope<'_>,
        norm_scope: Option<&Scope<'_>>,
        (size, hidden): (usize, usize),
    ) -> Loaded<Self::Mlp> {
        let norm = norm_scope.map(|scope| norm(scope, size)).transpose()?;
        let fc1 = self.matrix(&scope.pp("fc1"), size, hidden)?;
        let fc2 = self.matrix(&scope.pp("fc2"), hidden, size)?;
        Ok(On(self.0, kernels::Mlp { norm, fc1, fc2 }))
    }

    fn conv(&self, scope: &Scope<'_>, patches: Patches) -> Loaded<Self::Conv> {
        let Patches { from, to, size, stride, padding } = patches;
        let bias = scope.get("bias", &[to])?;
        let stored = [to, from, size, size];
        let weight = Source {
            name: "weight",
            stored: &stored,
            shape: [to, from * size * size],
            arrange: |weight| weight.permute((0, 2, 3, 1)),
        };
        let matrix = scope.matrix(&weight, Some(&bias), self.1)?;
        Ok(On(self.0, kernels::PatchConv { matrix, kernel: size, stride, padding }))
    }

    fn depthwise(&self, scope: &Scope<'_>, channels: usize) -> Loaded<Self::Depthwise> {
        let (taps, bias) = scope.taps(channels)?;
        let part = || Ok(Depthwise { taps: taps.flatten_all()?.to_vec1()?, bias: bias.to_vec1()? });
        Ok(On(self.0, part().map_err(LoadError::Device)?))
    }

    fn windows(
        &self,
        block: &Scope<'_>,
        size: usize,
        heads: usize,
        window: usize,
    ) -> Loaded<Self::Windows> {
        let scope = block.pp("window_attn");
        let part = kernels::WindowAttention {
            norm: norm(&block.pp("norm1"), size)?,
            qkv: self.matrix(&scope.pp("qkv"), size, 3 * size)?,
            proj: self.matrix(&scope.pp("proj"), size, size)?,
            heads,
            window,
        };
        Ok(On(self.0, part))
    }

    fn channels(&self, block: &Scope<'_>, size: usize, groups: usize) -> Loaded<Self::Channels> {
        let scope = block.pp("channel_attn");
        let part = kernels::ChannelAttention {
            norm: norm(&block.pp("norm1"), size)?,
            qkv: self.matrix(&scope.pp("qkv"), size, 3 * size)?,
            proj: self.matrix(&scope.pp("proj"), size, size)?,
            groups,
        };
        Ok(On(self.0, part))
    }

    fn kept_bytes(&self) -> usize {
        if self.1.kept() == Precision::F32 { size_of::<f32>() } else { size_of::<i16>() }
    }

    fn keys(&self, k: &Tensor, v: &Tensor, heads: usize) -> Result<SequenceKeys> {
        let d = k.dim(D::Minus1)?;
        floats(k, |k| floats(v, |v| SequenceKeys::pack(k, v, d, heads, self.1.kept())))?
    }

    fn attend(
        &self,
        q: &Tensor,
        sequences: &[(&SequenceKeys, usize)],
        _heads: usize,
    ) -> Result<Tensor> {
        let d = q.dim(D::Minus1)?;
        let attended = floats(q, |q| {
            let mut rest = q;
            // Those with few queries go together.
            let parts = sequences.chunk_by(|(_, a), (_, b)| *a.max(b) < MANY_QUERIES).map(|part| {
                let rows: usize = part.iter().map(|(_, rows)| rows).sum();
                let (q, next) = rest.split_at(rows * d);
                rest = next;
                match part {
                    [(keys, rows)] if *rows >= MANY_QUERIES => {
                        kernels::attend_sequence(self.0, q, keys)
                    }
                    _ => kernels::attend_sequences(self.0, q, part),
                }
            });
            let mut parts: Vec<Vec<f32>> = parts.collect();
            // One that is all of it need not be copied.
            if parts.len() == 1 { parts.remove(0) } else { parts.concat() }
        })?;
        like(q, attended, d)
    }

    fn attend_histories(
        &self,
        layer: usize,
        jobs: Vec<&mut kernels::History>,
        [q, k, v]: [&Tensor; 3],
        heads: usize,
    ) -> Result<Tensor> {
        let (cpu, precision, d) = (self.0, self.1.kept(), q.dim(D::Minus1)?);
        let attended = floats(q, |q| {
            floats(k, |k| {
                floats(v, |v| {
                    kernels::attend_histories(cpu, precision, layer, jobs, [q, k, v], d, heads)
                })
            })
        })???;
        like(q, attended, d)
    }

    fn logits(&self, head: &On<kernels::Matrix>, hidden: &Tensor, look: Look<'_>) -> Result<()> {
        let On(cpu, matrix) = head;
        let look = |all: &[f32]| (look.at)(Logits::all(all, matrix.outputs()));
        floats(hidden, |hidden| kernels::linear_lent(*cpu, matrix, hidden, look))
    }
}

impl OnCpu {
    /// The packed weights of a linear layer, for kernels that do more than that layer.
    fn matrix(self, scope: &Scope<'_>, from: usize, to: usize) -> Loaded<kernels::Matrix> {
        let bias = scope.get("bias", &[to])?;
        scope.matrix(&Source::plain("weight", &[to, from]), Some(&bias), self.1)
    }
}

fn norm(scope: &Scope<'_>, size: usize) -> Loaded<kernels::Norm> {
    let vector = |name| {
        let tensor = scope.get(name, &[size])?;
        tensor.to_vec1::<f32>().map_err(LoadError::Device)
    };
    Ok(kernels::Norm { weight: vector("weight")?, bias: vector("bias")? })
}

impl Layer for On<kernels::Matrix> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Self(cpu, matrix) = self;
        like(x, floats(x, |x| kernels::linear(*cpu, matrix, x, None))?, matrix.outputs())
    }
}

impl Linear for On<kernels::Matrix> {
    fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let Self(cpu, matrix) = self;
        let y =
            floats(x, |x| floats(residual, |add| kernels::linear(*cpu, matrix, x, Some(add))))??;
        like(x, y, matrix.outputs())
    }
}

impl Layer for On<kernels::Norm> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Self(cpu, norm) = self;
        like(x, floats(x, |x| kernels::layer_norm(*cpu, norm, x))?, norm.weight.len())
    }
}

impl Residual for On<kernels::Mlp> {
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let Self(cpu, mlp) = self;
        changed(&x, |x| mlp.forward(*cpu, x))
    }
}

impl Layer for On<kernels::PatchConv> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (Self(cpu, conv), (b, h, w, c)) = (self, x.dims4()?);
        let y = floats(x, |x| conv.forward(*cpu, x, (b, h, w, c)))?;
        Tensor::from_vec(y, (b, conv.side(h), conv.side(w), ()), x.device())
    }
}

impl OnGrid for On<Depthwise> {
    fn forward(&self, x: Tensor, (h, w): Grid) -> Result<Tensor> {
        let (Self(cpu, Depthwise { taps, bias }), (b, _, c)) = (self, x.dims3()?);
        changed(&x, |x| kernels::depthwise_residual(*cpu, x, (b, h, w, c), taps, bias))
    }
}

impl OnGrid for On<kernels::WindowAttention> {
    fn forward(&self, x: Tensor, (h, w): Grid) -> Result<Tensor> {
        let (Self(cpu, attention), (b, _, c)) = (self, x.dims3()?);
        changed(&x, |x| attention.forward(*cpu, x, (b, h, w, c)))
    }
}

impl OnGrid for On<kernels::ChannelAttention> {
    fn forward(&self, x: Tensor, _grid: Grid) -> Result<Tensor> {
        let (Self(cpu, attention), (_, n, _)) = (self, x.dims3()?);
        changed(&x, |x| attention.forward(*cpu, x, n))
    }
}

impl History for kernels::History {
    fn advance(&mut self, rows: usize) {
        self.advance(rows);
    }

    fn select(&mut self, parents: &[usize]) -> Result<()> {
        self.select(parents);
        Ok(())
    }
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

/// A float32 tensor whose elements `f` changes in their place: fresh memory would have to be cleared
/// for every part of every block.
fn changed(x: &Tensor, f: impl Fn(&mut [f32])) -> Result<Tensor> {
    let x = x.to_device(&Device::Cpu)?.contiguous()?;
    x.inplace_op1(&InPlace(f))?;
    Ok(x)
}

struct InPlace<F>(F);

impl<F: Fn(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "in place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(all), Some((start, end))) => (self.0)(&mut all[start..end]),
            _ => return Err(candle_core::Error::Msg("not a tensor of float32".to_owned()).bt()),
        }
        Ok(())
    }
}

/// A tensor like `x` but with another last dimension.
fn like(x: &Tensor, data: Vec<f32>, last: usize) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    if let Some(size) = dims.last_mut() {
        *size = last;
    }
    Tensor::from_vec(data, dims, &Device::Cpu)
}
