//! The parts of the network on a device.

use candle_core::{D, DType, Result, Tensor};
use florence_cuda::geometry;

use super::OnDevice;
use crate::model::{
    backend::{Grid, Layer, Linear, OnGrid, Patches, Residual},
    launch::Arg,
};

pub(crate) struct Product {
    pub(super) on: OnDevice,
    /// `[outputs, inputs]`
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
}

pub(crate) struct Norm {
    pub(super) on: OnDevice,
    pub(super) weight: Tensor,
    pub(super) shift: Tensor,
}

pub(crate) struct Mlp {
    pub(super) norm: Option<Norm>,
    pub(super) fc1: Product,
    pub(super) fc2: Product,
}

pub(crate) struct Conv {
    pub(super) product: Product,
    pub(super) patches: Patches,
}

pub(crate) struct Depthwise {
    pub(super) on: OnDevice,
    pub(super) taps: Tensor,
    pub(super) bias: Tensor,
}

/// What both attentions of a block have; `parts` are heads, or groups of channels.
pub(crate) struct Attention {
    pub(super) norm: Norm,
    pub(super) qkv: Product,
    pub(super) proj: Product,
    pub(super) parts: usize,
}

pub(crate) struct Windows {
    pub(super) attention: Attention,
    pub(super) side: usize,
}

pub(crate) struct Channels(pub(super) Attention);

/// Rows of the last dimension.
fn rows(x: &Tensor) -> Result<(usize, usize)> {
    let size = x.dim(D::Minus1)?;
    Ok((x.elem_count() / size.max(1), size))
}

impl Product {
    /// `x W^T`, without the bias: `[.., inputs] -> [rows, outputs]`
    ///
    /// In bfloat16 the order of sums is cuBLAS's choice, which may be another one for another number
    /// of rows; in float32 it is ours, and always the same.
    pub(super) fn plain(&self, x: &Tensor) -> Result<Tensor> {
        let Self { on, weight, .. } = self;
        let x = x.reshape(rows(x)?)?.to_dtype(weight.dtype())?;
        let is_emulated = on.device().is_cpu();
        match weight.dtype() {
            DType::BF16 if is_emulated => {
                // candle has no such product on the host.
                let wide = |x: &Tensor| x.to_dtype(DType::F32);
                wide(&x)?.matmul(&wide(weight)?.t()?)?.to_dtype(DType::BF16)
            }
            DType::F32 if !is_emulated => self.in_float32(&x.contiguous()?),
            _ => x.matmul(&weight.t()?),
        }
    }

    fn in_float32(&self, x: &Tensor) -> Result<Tensor> {
        let Self { on, weight, .. } = self;
        let ((rows, inputs), (outputs, expected)) = (x.dims2()?, weight.dims2()?);
        if inputs != expected || !inputs.is_multiple_of(4) {
            let problem = format!("a product of {inputs} elements with {expected}");
            return Err(candle_core::Error::Msg(problem).bt());
        }
        let (name, launch) = if rows <= geometry::FEW_ROWS {
            ("product_few", geometry::product_few(rows, outputs))
        } else {
            ("product", geometry::product(rows, outputs))
        };
        let out = on.fresh((rows, outputs), DType::F32)?;
        on.run(
            name,
            launch,
            &[
                Arg::Tensor(x),
                Arg::Tensor(weight),
                Arg::Tensor(&out),
                Arg::Size(rows),
                Arg::int(inputs),
                Arg::int(outputs),
            ],
        )?;
        Ok(out)
    }
}

impl Layer for Product {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = self.plain(x)?;
        let (rows, size) = product.dims2()?;
        let sum = self.on.fresh((rows, size), product.dtype())?;
        self.on.run(
            "add_bias",
            geometry::add_bias(rows, size),
            &[
                Arg::Tensor(&product),
                Arg::Tensor(&self.bias),
                Arg::Tensor(&sum),
                Arg::Size(rows),
                Arg::int(size),
            ],
        )?;
        let mut dims = x.dims().to_vec();
        dims.pop();
        dims.push(size);
        sum.reshape(dims)
    }
}

impl Linear for Product {
    fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.on.add(&self.plain(x)?, &self.bias, residual)
    }
}

impl Norm {
    /// The norm in float32, or in the numbers of products.
    fn of(&self, x: &Tensor, kind: DType) -> Result<Tensor> {
        let (on, x) = (&self.on, x.contiguous()?);
        let (rows, size) = rows(&x)?;
        let out = on.fresh(x.shape(), kind)?;
        let nothing = || Arg::Null;
        let is_wide = x.dtype() == DType::F32;
        // Where products are float32 too, either place will do.
        on.run(
            "layer_norm",
            geometry::layer_norm(rows, size),
            &[
                if is_wide { Arg::Tensor(&x) } else { nothing() },
                if is_wide { nothing() } else { Arg::Tensor(&x) },
                nothing(),
                Arg::Tensor(&self.weight),
                Arg::Tensor(&self.shift),
                nothing(),
                if kind == DType::F32 { Arg::Tensor(&out) } else { nothing() },
                if kind == DType::F32 { nothing() } else { Arg::Tensor(&out) },
                Arg::int(rows),
                Arg::int(size),
            ],
        )?;
        Ok(out)
    }
}

impl Layer for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.of(x, DType::F32)
    }
}

impl Residual for Mlp {
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let Self { norm, fc1, fc2 } = self;
        let on = &fc1.on;
        let normed = norm.as_ref().map(|norm| norm.of(&x, on.0.kind)).transpose()?;
        let hidden = fc1.plain(normed.as_ref().unwrap_or(&x))?;
        let (rows, size) = hidden.dims2()?;
        on.run(
            "bias_gelu",
            geometry::bias_gelu(rows, size),
            &[Arg::Tensor(&hidden), Arg::Tensor(&fc1.bias), Arg::Size(rows), Arg::int(size)],
        )?;
        on.add(&fc2.plain(&hidden)?, &fc2.bias, &x)
    }
}

impl Layer for Conv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (Self { product, patches }, x) = (self, x.contiguous()?);
        let (b, h, w, c) = x.dims4()?;
        let Patches { size, stride, padding, to, .. } = *patches;
        let side = |side: usize| (side + 2 * padding).saturating_sub(size) / stride + 1;
        let (rows, columns) = (side(h), side(w));
        let inputs = product.weight.dim(1)?;
        let on = &product.on;
        let flat = on.fresh((b * rows * columns, inputs), on.0.kind)?;
        on.run(
            "patches",
            geometry::patches(b * rows * columns, inputs),
            &[
                Arg::Tensor(&x),
                Arg::Tensor(&flat),
                Arg::int(b),
                Arg::int(h),
                Arg::int(w),
                Arg::int(c),
                Arg::int(size),
                Arg::int(stride),
                Arg::int(padding),
            ],
        )?;
        product.forward(&flat)?.to_dtype(DType::F32)?.reshape((b, rows, columns, to))
    }
}

impl OnGrid for Depthwise {
    fn forward(&self, x: Tensor, (h, w): Grid) -> Result<Tensor> {
        let (Self { on, taps, bias }, x) = (self, x.contiguous()?);
        let (b, _, c) = x.dims3()?;
        let out = on.fresh(x.shape(), DType::F32)?;
        on.run(
            "depthwise",
            geometry::depthwise(b, h, w, c),
            &[
                Arg::Tensor(&x),
                Arg::Tensor(taps),
                Arg::Tensor(bias),
                Arg::Tensor(&out),
                Arg::int(b),
                Arg::int(h),
                Arg::int(w),
                Arg::int(c),
            ],
        )?;
        Ok(out)
    }
}

impl OnGrid for Windows {
    fn forward(&self, x: Tensor, (h, w): Grid) -> Result<Tensor> {
        let (side, Attention { norm, qkv, proj, parts: heads }) = (self.side, &self.attention);
        let (on, (b, n, c)) = (&qkv.on, x.dims3()?);
        let mixed = qkv.plain(&norm.of(&x, on.0.kind)?)?;
        let out = on.fresh((b * n, c), on.0.kind)?;
        on.run(
            "window_attention",
            geometry::window_attention(b, [h, w], side, *heads, c / heads),
            &[
                Arg::Tensor(&mixed),
                Arg::Tensor(&qkv.bias),
                Arg::Tensor(&out),
                Arg::int(b),
                Arg::int(h),
                Arg::int(w),
                Arg::int(c),
                Arg::int(*heads),
                Arg::int(side),
            ],
        )?;
        on.add(&proj.plain(&out)?, &proj.bias, &x)
    }
}

impl OnGrid for Channels {
    fn forward(&self, x: Tensor, _grid: Grid) -> Result<Tensor> {
        let Attention { norm, qkv, proj, parts: groups } = &self.0;
        let (on, (b, n, c)) = (&qkv.on, x.dims3()?);
        let (groups, size) = (*groups, c / groups);
        let (chunk, chunks) = (geometry::CHANNEL_CHUNK, geometry::channel_chunks(n));
        let mixed = qkv.plain(&norm.of(&x, on.0.kind)?)?;
        let partial = on.fresh(vec![b, groups, chunks, size, size], DType::F32)?;
        on.run(
            "channel_scores",
            geometry::channel_scores(b, n, groups, size),
            &[
                Arg::Tensor(&mixed),
                Arg::Tensor(&qkv.bias),
                Arg::Tensor(&partial),
                Arg::int(b),
                Arg::int(n),
                Arg::int(c),
                Arg::int(groups),
                Arg::int(chunk),
            ],
        )?;
        let weights = on.fresh((b, groups, size, size), DType::F32)?;
        on.run(
            "channel_softmax",
            geometry::channel_softmax(b, groups, size),
            &[
                Arg::Tensor(&partial),
                Arg::Tensor(&weights),
                Arg::int(b),
                Arg::int(n),
                Arg::int(groups),
                Arg::int(size),
                Arg::int(chunks),
            ],
        )?;
        let out = on.fresh((b * n, c), on.0.kind)?;
        on.run(
            "channel_apply",
            geometry::channel_apply(b, n, groups, size),
            &[
                Arg::Tensor(&mixed),
                Arg::Tensor(&qkv.bias),
                Arg::Tensor(&weights),
                Arg::Tensor(&out),
                Arg::int(b),
                Arg::int(n),
                Arg::int(c),
                Arg::int(groups),
            ],
        )?;
        on.add(&proj.plain(&out)?, &proj.bias, &x)
    }
}
