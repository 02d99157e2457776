//! BART, the language model: an encoder over visual tokens and prompt, a decoder with caches.
//!
//! Layers are post-norm. A decoder step takes one token per row; rows of several jobs stand side
//! by side, each job with its own encoded picture.

use candle_core::{D, IndexOp, Module, Result, Tensor};

use super::{
    LoadError,
    config::TextConfig,
    ops::{LayerNorm, Mlp, attend, linear},
    weights::Scope,
};

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

    /// `[.., T, D] -> [.., T, D]`, the first of the `T` tokens standing at position `first`.
    fn forward(&self, x: &Tensor, first: usize) -> Result<Tensor> {
        let t = x.dim(D::Minus2)?;
        let positions = self.positions.narrow(0, POSITION_OFFSET + first, t)?;
        self.norm.forward(&x.broadcast_add(&positions)?)
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
                mlp: Mlp::load(scope, d)?,
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
        let mut x = self.entry.forward(x, 0)?;
        for layer in &self.layers {
            let q = layer.attention.queries(&x)?;
            let (k, v) = layer.attention.keys_values(&x)?;
            let mixed = layer.attention.mix(&q, &k, &v)?;
            x = layer.attention_norm.forward(&(x + mixed)?)?;
            x = layer.norm.forward(&(&x + layer.mlp.forward(&x)?)?)?;
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

/// The encoded picture and prompt as each decoder layer sees them: keys and values `[1, A, S, K]`.
pub(crate) struct CrossCache(Vec<(Tensor, Tensor)>);

/// What the decoder has seen so far: per layer, keys and values `[rows, A, T, K]`.
#[derive(Default)]
pub(crate) struct SelfCache {
    layers: Vec<(Tensor, Tensor)>,
    length: usize,
}

impl SelfCache {
    /// Keeps and reorders rows: row `i` continues what `parents[i]` has seen.
    pub(crate) fn select(&mut self, parents: &Tensor) -> Result<()> {
        for (k, v) in &mut self.layers {
            *k = k.index_select(parents, 0)?;
            *v = v.index_select(parents, 0)?;
        }
        Ok(())
    }
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
                mlp: Mlp::load(scope, d)?,
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
        let layers = self.layers.iter().map(|layer| layer.cross.keys_values(encoded));
        Ok(CrossCache(layers.collect::<Result<_>>()?))
    }

    /// One token per row: embeddings `[rows, D] -> [rows, D]`.
    ///
    /// `jobs` lists, in the order of the rows, every job's picture and its number of rows.
    pub(crate) fn step(
        &self,
        embedded: &Tensor,
        cache: &mut SelfCache,
        jobs: &[(&CrossCache, usize)],
    ) -> Result<Tensor> {
        let mut x = self.entry.forward(&embedded.unsqueeze(1)?, cache.length)?; // [rows, 1, D]
        for (i, layer) in self.layers.iter().enumerate() {
            let q = layer.attention.queries(&x)?;
            let (mut k, mut v) = layer.attention.keys_values(&x)?;
            if let Some((past_k, past_v)) = cache.layers.get(i) {
                k = Tensor::cat(&[past_k, &k], 2)?;
                v = Tensor::cat(&[past_v, &v], 2)?;
            }
            let mixed = layer.attention.mix(&q, &k, &v)?;
            cache.layers.splice(i..(i + 1).min(cache.layers.len()), [(k, v)]);
            x = layer.attention_norm.forward(&(x + mixed)?)?;
            let mixed = layer.cross_attention(&x, i, jobs)?;
            x = layer.cross_norm.forward(&(x + mixed)?)?;
            x = layer.norm.forward(&(&x + layer.mlp.forward(&x)?)?)?;
        }
        cache.length += 1;
        x.squeeze(1)
    }
}

impl DecoderLayer {
    /// `[rows, 1, D] -> [rows, 1, D]`; the rows of a job attend to that job's picture together.
    fn cross_attention(
        &self,
        x: &Tensor,
        layer: usize,
        jobs: &[(&CrossCache, usize)],
    ) -> Result<Tensor> {
        let q = self.cross.project_queries(x)?; // [rows, 1, D]
        let mut mixed = Vec::with_capacity(jobs.len());
        let mut first = 0;
        for (cross, rows) in jobs {
            let q = q.narrow(0, first, *rows)?.transpose(0, 1)?; // [1, rows, D]
            let (k, v) = &cross.0[layer];
            mixed.push(Attention::mix_heads(&self.cross.split(&q)?, k, v)?);
            first += rows;
        }
        self.cross.out.forward(&Tensor::cat(&mixed, 1)?.transpose(0, 1)?)
    }
}

/// Multi-head attention with biases everywhere; queries are scaled by `K^-0.5`.
struct Attention {
    q: candle_nn::Linear,
    k: candle_nn::Linear,
    v: candle_nn::Linear,
    out: candle_nn::Linear,
    heads: usize,
}

impl Attention {
    fn load(scope: &Scope<'_>, d: usize, heads: usize) -> std::result::Result<Self, LoadError> {
        let projection = |name| linear(&scope.pp(name), d, d);
        Ok(Self {
            q: projection("q_proj")?,
            k: projection("k_proj")?,
            v: projection("v_proj")?,
            out: projection("out_proj")?,
            heads,
        })
    }

    /// `[B, T, D] -> [B, A, T, K]`
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        x.reshape((b, t, self.heads, d / self.heads))?.transpose(1, 2)?.contiguous()
    }

    /// `[B, T, D] -> [B, T, D]`
    fn project_queries(&self, x: &Tensor) -> Result<Tensor> {
        let scale = ((x.dim(D::Minus1)? / self.heads) as f64).powf(-0.5);
        self.q.forward(x)? * scale
    }

    /// `[B, T, D] -> [B, A, T, K]`
    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        self.split(&self.project_queries(x)?)
    }

    /// `[B, S, D] -> [B, A, S, K]`, twice
    fn keys_values(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.split(&self.k.forward(x)?)?, self.split(&self.v.forward(x)?)?))
    }

    /// Queries over keys and values, heads joined: `[B, T, D]`
    fn mix_heads(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        attend(&q.matmul(&k.t()?)?, v)?.transpose(1, 2)?.flatten_from(2)
    }

    /// As [`Self::mix_heads`], through the output projection.
    fn mix(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.out.forward(&Self::mix_heads(q, k, v)?)
    }
}

/// The rows of `table` for `ids`: `[ids, D]`.
pub(crate) fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.i(&Tensor::new(ids, table.device())?)
}
