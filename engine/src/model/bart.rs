//! BART, the language model: an encoder over visual tokens and prompt, a decoder with caches.
//!
//! Layers are post-norm. Rows of several sequences stand one after the other: in the encoder all
//! tokens of each, in a decoder step one token of each row, each job with its own encoded picture.

use candle_core::{DType, IndexOp, Result, Tensor};

use super::{
    backend::{Backend, History, Layer, Linear, Loaded, Residual},
    config::TextConfig,
    scope::{Scope, Source},
};

/// Rows that BART's position tables hold before position 0.
const POSITION_OFFSET: usize = 2;

/// What both sides begin with: positions added to the embeddings, then a norm.
struct Entry<B: Backend> {
    positions: Tensor,
    norm: B::Norm,
}

impl<B: Backend> Entry<B> {
    /// The table's length is the checkpoint's own: 1024 positions in most, 4096 in the newer large.
    fn load(backend: &B, scope: &Scope<'_>, d_model: usize) -> Loaded<Self> {
        let name = "embed_positions.weight";
        let rows = scope.shape(name).and_then(|shape| shape.first().copied());
        let rows = rows.filter(|rows| *rows > POSITION_OFFSET).unwrap_or(1026);
        Ok(Self {
            positions: scope.get(name, &[rows, d_model])?,
            norm: backend.norm(&scope.pp("layernorm_embedding"), d_model)?,
        })
    }

    /// Number of positions.
    fn limit(&self) -> usize {
        self.positions.dims()[0] - POSITION_OFFSET
    }

    /// Numbers of a row.
    fn size(&self) -> usize {
        self.positions.dims()[1]
    }

    /// `[rows, D] -> [rows, D]`, every row standing at a position of its own.
    fn forward(&self, x: &Tensor, positions: impl Iterator<Item = usize>) -> Result<Tensor> {
        #[expect(clippy::cast_possible_truncation, reason = "below the table's length")]
        let rows: Vec<u32> = positions.map(|at| (POSITION_OFFSET + at) as u32).collect();
        self.norm.forward(&(x + embed(&self.positions, &rows)?)?)
    }
}

/// The layers `layers.0`, `layers.1`, .. below a scope.
fn load_layers<T>(
    scope: &Scope<'_>,
    count: usize,
    load: impl Fn(&Scope<'_>) -> Loaded<T>,
) -> Loaded<Vec<T>> {
    (0..count).map(|i| load(&scope.pp(format_args!("layers.{i}")))).collect()
}

pub(crate) struct Encoder<B: Backend> {
    entry: Entry<B>,
    layers: Vec<EncoderLayer<B>>,
}

struct EncoderLayer<B: Backend> {
    attention: Attention<B>,
    attention_norm: B::Norm,
    mlp: B::Mlp,
    norm: B::Norm,
}

impl<B: Backend> Encoder<B> {
    pub(crate) fn load(backend: &B, scope: &Scope<'_>, config: &TextConfig) -> Loaded<Self> {
        let (d, heads) = (config.d_model, config.encoder_attention_heads);
        let layers = load_layers(scope, config.encoder_layers, |scope| {
            Ok(EncoderLayer {
                attention: Attention::load(backend, &scope.pp("self_attn"), d, heads)?,
                attention_norm: backend.norm(&scope.pp("self_attn_layer_norm"), d)?,
                mlp: backend.mlp(scope, None, (d, scope.hidden(d)))?,
                norm: backend.norm(&scope.pp("final_layer_norm"), d)?,
            })
        })?;
        Ok(Self { entry: Entry::load(backend, scope, d)?, layers })
    }

    /// Longest sequence.
    pub(crate) fn limit(&self) -> usize {
        self.entry.limit()
    }

    /// Sequences of these lengths, one after the other: `[rows, D] -> [rows, D]`
    pub(crate) fn forward(&self, backend: &B, x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let mut x = self.entry.forward(x, lengths.iter().flat_map(|length| 0..*length))?;
        for layer in &self.layers {
            let attention = &layer.attention;
            let keys = attention.keys(backend, &x, lengths)?;
            let keys: Vec<_> = keys.iter().zip(lengths.iter().copied()).collect();
            let mixed = backend.attend(&attention.q.forward(&x)?, &keys, attention.heads)?;
            x = layer.attention_norm.forward(&attention.out.forward_add(&mixed, &x)?)?;
            x = layer.norm.forward(&layer.mlp.forward(x)?)?;
        }
        Ok(x)
    }
}

pub(crate) struct Decoder<B: Backend> {
    entry: Entry<B>,
    layers: Vec<DecoderLayer<B>>,
}

struct DecoderLayer<B: Backend> {
    attention: Attention<B>,
    attention_norm: B::Norm,
    cross: Attention<B>,
    cross_norm: B::Norm,
    mlp: B::Mlp,
    norm: B::Norm,
}

/// What a job's rows look at.
pub(crate) struct Memory<B: Backend> {
    /// The encoded picture and prompt as each layer sees them.
    cross: Vec<B::Keys>,
    seen: B::History,
    /// Tokens that the rows have been fed.
    position: usize,
}

impl<B: Backend> Memory<B> {
    /// Keeps and reorders rows: row `i` continues what `parents[i]` has seen.
    pub(crate) fn select(&mut self, parents: &[usize]) -> Result<()> {
        self.seen.select(parents)
    }
}

impl<B: Backend> Decoder<B> {
    pub(crate) fn load(backend: &B, scope: &Scope<'_>, config: &TextConfig) -> Loaded<Self> {
        let (d, heads) = (config.d_model, config.decoder_attention_heads);
        let layers = load_layers(scope, config.decoder_layers, |scope| {
            Ok(DecoderLayer {
                attention: Attention::load(backend, &scope.pp("self_attn"), d, heads)?,
                attention_norm: backend.norm(&scope.pp("self_attn_layer_norm"), d)?,
                cross: Attention::load(backend, &scope.pp("encoder_attn"), d, heads)?,
                cross_norm: backend.norm(&scope.pp("encoder_attn_layer_norm"), d)?,
                mlp: backend.mlp(scope, None, (d, scope.hidden(d)))?,
                norm: backend.norm(&scope.pp("final_layer_norm"), d)?,
            })
        })?;
        Ok(Self { entry: Entry::load(backend, scope, d)?, layers })
    }

    /// Most tokens that can be fed, the start token included.
    pub(crate) fn limit(&self) -> usize {
        self.entry.limit()
    }

    /// Bytes of the keys and values of so many tokens, in all layers.
    pub(crate) fn kept_bytes(&self, backend: &B, tokens: usize) -> usize {
        2 * self.layers.len() * self.entry.size() * backend.kept_bytes() * tokens
    }

    /// Memories of sequences of these lengths that have been encoded together, `[rows, D]`.
    pub(crate) fn memories(
        &self,
        backend: &B,
        encoded: &Tensor,
        lengths: &[usize],
    ) -> Result<Vec<Memory<B>>> {
        let new =
            |_: &usize| Memory { cross: Vec::new(), seen: B::History::default(), position: 0 };
        let mut memories: Vec<Memory<B>> = lengths.iter().map(new).collect();
        for layer in &self.layers {
            let keys = layer.cross.keys(backend, encoded, lengths)?;
            for (memory, keys) in memories.iter_mut().zip(keys) {
                memory.cross.push(keys);
            }
        }
        Ok(memories)
    }

    /// One token per row: embeddings `[rows, D] -> [rows, D]`, the rows of all jobs in order.
    pub(crate) fn step(
        &self,
        backend: &B,
        embedded: &Tensor,
        jobs: &mut [(&mut Memory<B>, usize)],
    ) -> Result<Tensor> {
        let positions =
            jobs.iter().flat_map(|(memory, rows)| std::iter::repeat_n(memory.position, *rows));
        let mut x = self.entry.forward(embedded, positions)?;
        for (memory, rows) in &mut *jobs {
            memory.seen.advance(*rows);
            memory.position += 1;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let Attention { q, k, v, out, heads } = &layer.attention;
            let (q, k, v) = (q.forward(&x)?, k.forward(&x)?, v.forward(&x)?);
            let seen = jobs.iter_mut().map(|(memory, _)| &mut memory.seen).collect();
            let mixed = backend.attend_histories(i, seen, [&q, &k, &v], *heads)?;
            x = layer.attention_norm.forward(&out.forward_add(&mixed, &x)?)?;
            let pictures: Vec<_> =
                jobs.iter().map(|(memory, rows)| (&memory.cross[i], *rows)).collect();
            let mixed =
                backend.attend(&layer.cross.q.forward(&x)?, &pictures, layer.cross.heads)?;
            x = layer.cross_norm.forward(&layer.cross.out.forward_add(&mixed, &x)?)?;
            x = layer.norm.forward(&layer.mlp.forward(x)?)?;
        }
        Ok(x)
    }
}

/// Multi-head attention with biases everywhere.
struct Attention<B: Backend> {
    q: B::Linear,
    k: B::Linear,
    v: B::Linear,
    out: B::Linear,
    heads: usize,
}

impl<B: Backend> Attention<B> {
    fn load(backend: &B, scope: &Scope<'_>, d: usize, heads: usize) -> Loaded<Self> {
        let projection = |name| {
            let scope = scope.pp(name);
            let bias = scope.get("bias", &[d])?;
            backend.linear(&scope, &Source::plain("weight", &[d, d]), Some(bias))
        };
        Ok(Self {
            q: projection("q_proj")?,
            k: projection("k_proj")?,
            v: projection("v_proj")?,
            out: projection("out_proj")?,
            heads,
        })
    }

    /// Keys and values of sequences of these lengths, `[rows, D]`.
    fn keys(&self, backend: &B, x: &Tensor, lengths: &[usize]) -> Result<Vec<B::Keys>> {
        let (k, v) = (self.k.forward(x)?, self.v.forward(x)?);
        let mut first = 0;
        let keys = lengths.iter().map(|length| {
            let part = |x: &Tensor| x.narrow(0, first, *length);
            let keys = backend.keys(&part(&k)?, &part(&v)?, self.heads);
            first += length;
            keys
        });
        keys.collect()
    }
}

/// The rows of `table` for `ids`: `[ids, D]`, as float32.
pub(crate) fn embed(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.i(&Tensor::new(ids, table.device())?)?.to_dtype(DType::F32)
}
