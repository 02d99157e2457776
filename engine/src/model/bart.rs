//! BART, the language model: an encoder over visual tokens and prompt, a decoder with caches.
//!
//! Layers are post-norm. A decoder step takes one token per row; rows of several jobs stand side
//! by side, each job with its own encoded picture.

use candle_core::{D, DType, IndexOp, Result, Tensor};

use super::{
    LoadError,
    compute::{Compute, floats, like},
    config::TextConfig,
    layers::{LayerNorm, Linear, Mlp, attend},
    scope::Scope,
};
use crate::kernels::{self, Cpu, History, SequenceKeys};

/// Rows that BART's position tables hold before position 0.
const POSITION_OFFSET: usize = 2;

/// What both sides begin with: positions added to the embeddings, then a norm.
struct Entry {
    positions: Tensor,
    norm: LayerNorm,
}

impl Entry {
    /// The table's length is the checkpoint's own: 1024 positions in most, 4096 in the newer large.
    fn load(scope: &Scope<'_>, d_model: usize) -> std::result::Result<Self, LoadError> {
        let name = "embed_positions.weight";
        let rows = scope.shape(name).and_then(|shape| shape.first().copied());
        let rows = rows.filter(|rows| *rows > POSITION_OFFSET).unwrap_or(1026);
        Ok(Self {
            positions: scope.get(name, &[rows, d_model])?,
            norm: LayerNorm::load(&scope.pp("layernorm_embedding"), d_model)?,
        })
    }

    /// Number of positions.
    fn limit(&self) -> usize {
        self.positions.dims()[0] - POSITION_OFFSET
    }

    /// `[1, S, D] -> [1, S, D]`, tokens standing at the positions 0, 1, ...
    fn sequence(&self, x: &Tensor) -> Result<Tensor> {
        let positions = self.positions.narrow(0, POSITION_OFFSET, x.dim(1)?)?;
        self.norm.forward(&x.broadcast_add(&positions)?)
    }

    /// `[rows, D] -> [rows, D]`, every row standing at a position of its own.
    fn rows(&self, x: &Tensor, positions: impl Iterator<Item = usize>) -> Result<Tensor> {
        #[expect(clippy::cast_possible_truncation, reason = "below the table's length")]
        let rows: Vec<u32> = positions.map(|at| (POSITION_OFFSET + at) as u32).collect();
        self.norm.forward(&(x + embed(&self.positions, &rows)?)?)
    }
}

/// The layers `layers.0`, `layers.1`, .. below a scope.
fn load_layers<T>(
    scope: &Scope<'_>,
    count: usize,
    load: impl Fn(&Scope<'_>) -> std::result::Result<T, LoadError>,
) -> std::result::Result<Vec<T>, LoadError> {
    (0..count).map(|i| load(&scope.pp(format_args!("layers.{i}")))).collect()
}

pub(crate) struct Encoder {
    entry: Entry,
    layers: Vec<EncoderLayer>,
}

struct EncoderLayer {
    attention: Attention,
    attention_norm: LayerNorm,
    mlp: Mlp,
    norm: LayerNorm,
}

impl Encoder {
    pub(crate) fn load(
        scope: &Scope<'_>,
        config: &TextConfig,
    ) -> std::result::Result<Self, LoadError> {
        let (d, heads) = (config.d_model, config.encoder_attention_heads);
        let layers = load_layers(scope, config.encoder_layers, |scope| {
            Ok(EncoderLayer {
                attention: Attention::load(&scope.pp("self_attn"), d, heads)?,
                attention_norm: LayerNorm::load(&scope.pp("self_attn_layer_norm"), d)?,
                mlp: Mlp::load(scope, None, d)?,
                norm: LayerNorm::load(&scope.pp("final_layer_norm"), d)?,
            })
        })?;
        Ok(Self { entry: Entry::load(scope, d)?, layers })
    }

    /// Longest sequence.
    pub(crate) fn limit(&self) -> usize {
        self.entry.limit()
    }

    /// `[1, S, D] -> [1, S, D]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.entry.sequence(x)?;
        for layer in &self.layers {
            let keys = layer.attention.keys(&x)?;
            let mixed = layer.attention.over(&layer.attention.q.forward(&x)?, &keys)?;
            x = layer.attention_norm.forward(&layer.attention.out.forward_add(&mixed, &x)?)?;
            x = layer.norm.forward(&layer.mlp.forward(&x)?)?;
        }
        Ok(x)
    }
}

pub(crate) struct Decoder {
    entry: Entry,
    layers: Vec<DecoderLayer>,
}

struct DecoderLayer {
    attention: Attention,
    attention_norm: LayerNorm,
    cross: Attention,
    cross_norm: LayerNorm,
    mlp: Mlp,
    norm: LayerNorm,
}

/// The encoded picture and prompt as each decoder layer sees them.
pub(crate) struct CrossCache(Vec<Keys>);

/// What the decoder has seen so far of one job's rows.
pub(crate) enum SelfCache {
    Kernel(History),
    /// Per layer, keys and values `[rows, A, T, K]`.
    Candle(Vec<(Tensor, Tensor)>),
}

impl SelfCache {
    /// Keeps and reorders rows: row `i` continues what `parents[i]` has seen.
    pub(crate) fn select(&mut self, parents: &[usize]) -> Result<()> {
        match self {
            Self::Kernel(history) => history.select(parents),
            Self::Candle(layers) => {
                #[expect(clippy::cast_possible_truncation, reason = "a job has few rows")]
                let parents: Vec<u32> = parents.iter().map(|parent| *parent as u32).collect();
                for (k, v) in layers {
                    let parents = Tensor::new(parents.as_slice(), k.device())?;
                    *k = k.index_select(&parents, 0)?;
                    *v = v.index_select(&parents, 0)?;
                }
            }
        }
        Ok(())
    }
}

/// One job's part of a decoder step.
pub(crate) struct StepRows<'a> {
    /// Tokens that the job's rows have been fed.
    pub(crate) position: usize,
    pub(crate) rows: usize,
    pub(crate) cross: &'a CrossCache,
    pub(crate) cache: &'a mut SelfCache,
}

impl Decoder {
    pub(crate) fn load(
        scope: &Scope<'_>,
        config: &TextConfig,
    ) -> std::result::Result<Self, LoadError> {
        let (d, heads) = (config.d_model, config.decoder_attention_heads);
        let layers = load_layers(scope, config.decoder_layers, |scope| {
            Ok(DecoderLayer {
                attention: Attention::load(&scope.pp("self_attn"), d, heads)?,
                attention_norm: LayerNorm::load(&scope.pp("self_attn_layer_norm"), d)?,
                cross: Attention::load(&scope.pp("encoder_attn"), d, heads)?,
                cross_norm: LayerNorm::load(&scope.pp("encoder_attn_layer_norm"), d)?,
                mlp: Mlp::load(scope, None, d)?,
                norm: LayerNorm::load(&scope.pp("final_layer_norm"), d)?,
            })
        })?;
        Ok(Self { entry: Entry::load(scope, d)?, layers })
    }

    /// Most tokens that can be fed, the start token included.
    pub(crate) fn limit(&self) -> usize {
        self.entry.limit()
    }

    /// Keys and values of `encoded`, `[1, S, D]`, computed once per picture and prompt.
    pub(crate) fn cross(&self, encoded: &Tensor) -> Result<CrossCache> {
        let layers = self.layers.iter().map(|layer| layer.cross.keys(encoded));
        Ok(CrossCache(layers.collect::<Result<_>>()?))
    }

    /// An empty cache for a job.
    pub(crate) fn cache(&self) -> SelfCache {
        match self.layers.first().map(|layer| layer.attention.compute) {
            Some(Compute::Kernels(..)) => SelfCache::Kernel(History::default()),
            _ => SelfCache::Candle(Vec::new()),
        }
    }

    /// One token per row: embeddings `[rows, D] -> [rows, D]`, the rows of all jobs in order.
    pub(crate) fn step(&self, embedded: &Tensor, jobs: &mut [StepRows<'_>]) -> Result<Tensor> {
        let positions = jobs.iter().flat_map(|job| std::iter::repeat_n(job.position, job.rows));
        let mut x = self.entry.rows(embedded, positions)?;
        for job in &mut *jobs {
            if let SelfCache::Kernel(history) = job.cache {
                history.advance(job.rows);
            }
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let mixed = layer.attention.over_history(&x, i, jobs)?;
            x = layer.attention_norm.forward(&layer.attention.out.forward_add(&mixed, &x)?)?;
            let mixed = layer.cross.over_pictures(&layer.cross.q.forward(&x)?, i, jobs)?;
            x = layer.cross_norm.forward(&layer.cross.out.forward_add(&mixed, &x)?)?;
            x = layer.norm.forward(&layer.mlp.forward(&x)?)?;
        }
        Ok(x)
    }
}

/// Keys and values of a sequence.
enum Keys {
    Kernel(SequenceKeys),
    /// `[B, A, S, K]` each.
    Candle(Tensor, Tensor),
}

/// Multi-head attention with biases everywhere; queries are scaled by `K^-0.5`.
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: usize,
    compute: Compute,
}

impl Attention {
    fn load(scope: &Scope<'_>, d: usize, heads: usize) -> std::result::Result<Self, LoadError> {
        let projection = |name| Linear::load(&scope.pp(name), d, d);
        Ok(Self {
            q: projection("q_proj")?,
            k: projection("k_proj")?,
            v: projection("v_proj")?,
            out: projection("out_proj")?,
            heads,
            compute: scope.compute(),
        })
    }

    /// Keys and values of a sequence, `[1, S, D]`.
    fn keys(&self, x: &Tensor) -> Result<Keys> {
        let (k, v) = (self.k.forward(x)?, self.v.forward(x)?);
        match self.compute {
            Compute::Kernels(_, precision) => {
                let (d, heads) = (x.dim(D::Minus1)?, self.heads);
                let pack = |k: &[f32], v: &[f32]| SequenceKeys::pack(k, v, d, heads, precision);
                let packed = floats(&k, |k| floats(&v, |v| pack(k, v)));
                Ok(Keys::Kernel(packed??))
            }
            Compute::Candle => Ok(Keys::Candle(self.split(&k)?, self.split(&v)?)),
        }
    }

    /// Attention of the queries, `[1, T, D]`, over a sequence.
    fn over(&self, q: &Tensor, keys: &Keys) -> Result<Tensor> {
        match (self.compute, keys) {
            (Compute::Kernels(cpu, _), Keys::Kernel(keys)) => {
                like(q, floats(q, |q| kernels::attend_sequence(cpu, q, keys))?, q.dim(D::Minus1)?)
            }
            (_, Keys::Candle(k, v)) => self.mix(q, k, v),
            (Compute::Candle, Keys::Kernel(_)) => Err(mixed_up()),
        }
    }

    /// Attention of every job's queries, `[rows, D]`, over its picture.
    fn over_pictures(&self, q: &Tensor, layer: usize, jobs: &[StepRows<'_>]) -> Result<Tensor> {
        if let Compute::Kernels(cpu, _) = self.compute {
            let pictures = jobs.iter().map(|job| match &job.cross.0[layer] {
                Keys::Kernel(keys) => Ok((keys, job.rows)),
                Keys::Candle(..) => Err(mixed_up()),
            });
            let pictures = pictures.collect::<Result<Vec<_>>>()?;
            let mixed = floats(q, |q| kernels::attend_sequences(cpu, q, &pictures))?;
            return like(q, mixed, q.dim(D::Minus1)?);
        }
        let mut first = 0;
        let parts = jobs.iter().map(|job| {
            let q = q.narrow(0, first, job.rows)?.unsqueeze(0)?; // [1, rows, D]
            first += job.rows;
            self.over(&q, &job.cross.0[layer])?.squeeze(0)
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }

    /// Self-attention of every job's rows, `[rows, D]`, over what they have seen and themselves.
    fn over_history(&self, x: &Tensor, layer: usize, jobs: &mut [StepRows<'_>]) -> Result<Tensor> {
        let (q, k, v) = (self.q.forward(x)?, self.k.forward(x)?, self.v.forward(x)?);
        if let Compute::Kernels(cpu, precision) = self.compute {
            return self.over_histories((cpu, precision), [&q, &k, &v], layer, jobs);
        }
        let mut first = 0;
        let mut parts = Vec::with_capacity(jobs.len());
        for job in jobs {
            let SelfCache::Candle(cache) = job.cache else { return Err(mixed_up()) };
            // One token a row: [rows, 1, D].
            let rows = |x: &Tensor| x.narrow(0, first, job.rows)?.unsqueeze(1);
            let (mut k, mut v) = (self.split(&rows(&k)?)?, self.split(&rows(&v)?)?);
            if let Some((past_k, past_v)) = cache.get(layer) {
                k = Tensor::cat(&[past_k, &k], 2)?;
                v = Tensor::cat(&[past_v, &v], 2)?;
            }
            parts.push(self.mix(&rows(&q)?, &k, &v)?.squeeze(1)?);
            cache.splice(layer..(layer + 1).min(cache.len()), [(k, v)]);
            first += job.rows;
        }
        Tensor::cat(&parts, 0)
    }

    fn over_histories(
        &self,
        (cpu, precision): (Cpu, kernels::Precision),
        [q, k, v]: [&Tensor; 3],
        layer: usize,
        jobs: &mut [StepRows<'_>],
    ) -> Result<Tensor> {
        let d = q.dim(D::Minus1)?;
        let histories = jobs.iter_mut().map(|job| match job.cache {
            SelfCache::Kernel(history) => Ok(history),
            SelfCache::Candle(_) => Err(mixed_up()),
        });
        let histories = histories.collect::<Result<Vec<_>>>()?;
        let mixed = floats(q, |q| {
            floats(k, |k| {
                floats(v, |v| {
                    let (qkv, heads) = ([q, k, v], self.heads);
                    kernels::attend_histories(cpu, precision, layer, histories, qkv, d, heads)
                })
            })
        })???;
        like(q, mixed, d)
    }

    /// `[B, T, D] -> [B, A, T, K]`
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        x.reshape((b, t, self.heads, d / self.heads))?.transpose(1, 2)?.contiguous()
    }

    /// Queries `[B, T, D]` over keys and values `[B, A, S, K]`, heads joined: `[B, T, D]`
    fn mix(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let scale = ((q.dim(D::Minus1)? / self.heads) as f64).powf(-0.5);
        let q = self.split(&(q * scale)?)?;
        attend(&q.matmul(&k.t()?)?, v)?.transpose(1, 2)?.flatten_from(2)
    }
}

/// A cache made by another model: no caller can do that.
fn mixed_up() -> candle_core::Error {
    candle_core::Error::Msg("a cache of another device".to_owned()).bt()
}

/// The rows of `table` for `ids`: `[ids, D]`, as float32.
pub(crate) fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.i(&Tensor::new(ids, table.device())?)?.to_dtype(DType::F32)
}
