//! The network over one backend, and how the engine sees it whatever the backend is.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{
    LoadError,
    backend::{Backend, Loaded},
    bart::{Decoder, Encoder, Memory, embed},
    config::Config,
    davit::DaVit,
    logits::Logits,
    names::{HEAD, TABLES},
    projector::Projector,
    scope::{Scope, Source},
    weights::Weights,
};

/// Florence-2's network; immutable, shared by all requests.
pub(crate) trait Network: Send + Sync {
    /// Pictures, `[B, 3, side, side]`, to visual tokens, `[B, 1 + N, D]`; `seen` is shown the input
    /// and every stage.
    fn visual_tokens(&self, pixels: &Tensor, seen: &mut dyn FnMut(&Tensor)) -> Result<Tensor>;

    /// Pictures that are best encoded together.
    fn pictures_at_once(&self) -> usize;

    /// Visual tokens, `[1 + N, D]`, with a prompt each through the encoder, one sequence after the
    /// other: `[rows, D]`.
    fn encode(&self, sequences: &[(&Tensor, &[u32])]) -> Result<Tensor>;

    /// A decoder without jobs.
    fn decoding(&self) -> Box<dyn Decoding + '_>;

    /// Longest sequence of visual tokens and prompt.
    fn source_limit(&self) -> usize;

    /// Most tokens that can be generated.
    fn target_limit(&self) -> usize;

    /// Bytes of the keys and values of so many tokens that the decoder looks at.
    fn kept_bytes(&self, tokens: usize) -> usize;
}

/// A job of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct JobId(u64);

/// A job's part of a decoder step.
pub(crate) struct Rows {
    pub(crate) job: JobId,
    /// What each row is fed.
    pub(crate) tokens: Vec<u32>,
}

/// Who is lent the logits of all rows of a step.
pub(crate) struct Look<'a> {
    /// How many of the highest of each row are enough.
    pub(crate) highest: usize,
    pub(crate) at: &'a mut dyn FnMut(Logits<'_>),
}

/// Jobs that are decoded together, each with its own encoded picture and what its rows have seen.
pub(crate) trait Decoding: Send {
    /// Takes in sequences of these lengths that were encoded together, `[rows, D]`.
    fn add(&mut self, encoded: &Tensor, lengths: &[usize]) -> Result<Vec<JobId>>;

    /// Feeds the rows of some jobs one token each, and shows what that says of the next ones.
    fn step(&mut self, rows: &[Rows], look: Option<Look<'_>>) -> Result<()>;

    /// A job's row `i` goes on from what its row `parents[i]` has seen.
    fn select(&mut self, job: JobId, parents: &[usize]) -> Result<()>;

    /// Drops a job, if it is there.
    fn remove(&mut self, job: JobId);
}

pub(super) struct Net<B: Backend> {
    backend: B,
    vision: DaVit<B>,
    projector: Projector<B>,
    /// Token embeddings, `[V, D]`, in the numbers of the file.
    shared: Tensor,
    /// Those of the decoder, where they are others.
    answers: Option<Tensor>,
    encoder: Encoder<B>,
    decoder: Decoder<B>,
    lm_head: B::Linear,
}

impl<B: Backend> Net<B> {
    /// `grid` is the height and width of the vision tower's last stage.
    pub(super) fn load(
        backend: B,
        weights: &Weights,
        config: &Config,
        grid: usize,
    ) -> Loaded<Self> {
        let (vision, text) = (&config.vision, &config.text);
        let d = text.d_model;
        let (table, answers, vocabulary) = tables(weights)?;
        let embeddings = |table: &str| weights.get_stored(table, &[vocabulary, d]);
        let answers = answers.map(embeddings).transpose()?;
        // A fine-tuned checkpoint may carry a head of its own: then that one counts.
        let head = if weights.shape(HEAD).is_some() { HEAD } else { table };
        let head = head.trim_end_matches(".weight");
        let bias = match weights.shape("final_logits_bias") {
            Some(_) => Some(weights.get("final_logits_bias", &[1, vocabulary])?),
            None => None,
        };
        let bias = bias.map(|bias| bias.squeeze(0)).transpose().map_err(LoadError::Device)?;
        let head_shape = [vocabulary, d];
        let head_weight = Source::plain("weight", &head_shape);
        let channels = vision.dim_embed.last().copied().unwrap_or_default();
        let scope = |name| Scope::new(weights, name);
        Ok(Self {
            vision: DaVit::load(&backend, &scope("vision_tower"), vision)?,
            projector: Projector::load(&backend, &scope("projector"), channels, d, grid)?,
            shared: embeddings(table)?,
            answers,
            encoder: Encoder::load(&backend, &scope("text.encoder"), text)?,
            decoder: Decoder::load(&backend, &scope("text.decoder"), text)?,
            lm_head: backend.linear(&scope(head), &head_weight, bias)?,
            backend,
        })
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.shared.dims()[0]
    }

    pub(super) fn tables(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.shared).chain(&self.answers)
    }
}

/// The tables that prompts and answers are embedded with, and their rows; the second only where it
/// is another one.
fn tables(weights: &Weights) -> Loaded<(&'static str, Option<&'static str>, usize)> {
    let is_there = |table: &&&str| weights.shape(table).is_some();
    let table = TABLES.iter().find(is_there).unwrap_or(&TABLES[0]);
    let answers = TABLES.last().filter(is_there).filter(|answers| *answers != table);
    let answers = match answers {
        Some(answers) if !weights.are_equal(table, answers)? => Some(*answers),
        _ => None,
    };
    Ok((table, answers, weights.shape(table).map_or(0, |shape| shape[0])))
}

impl<B: Backend> Network for Net<B> {
    fn visual_tokens(&self, pixels: &Tensor, seen: &mut dyn FnMut(&Tensor)) -> Result<Tensor> {
        seen(pixels);
        self.projector.forward(&self.vision.forward(pixels, seen)?)
    }

    fn pictures_at_once(&self) -> usize {
        B::PICTURES
    }

    fn encode(&self, sequences: &[(&Tensor, &[u32])]) -> Result<Tensor> {
        let (mut parts, mut lengths) = (Vec::new(), Vec::new());
        for (visual, prompt) in sequences {
            lengths.push(visual.dim(0)? + prompt.len());
            parts.push((*visual).clone());
            if !prompt.is_empty() {
                parts.push(embed(&self.shared, prompt)?);
            }
        }
        self.encoder.forward(&self.backend, &Tensor::cat(&parts, 0)?, &lengths)
    }

    fn decoding(&self) -> Box<dyn Decoding + '_> {
        Box::new(Jobs { net: self, memories: BTreeMap::new(), added: 0 })
    }

    fn source_limit(&self) -> usize {
        self.encoder.limit()
    }

    fn target_limit(&self) -> usize {
        self.decoder.limit()
    }

    fn kept_bytes(&self, tokens: usize) -> usize {
        self.decoder.kept_bytes(&self.backend, tokens)
    }
}

struct Jobs<'a, B: Backend> {
    net: &'a Net<B>,
    memories: BTreeMap<JobId, Memory<B>>,
    added: u64,
}

impl<B: Backend> Decoding for Jobs<'_, B> {
    fn add(&mut self, encoded: &Tensor, lengths: &[usize]) -> Result<Vec<JobId>> {
        let Net { backend, decoder, .. } = self.net;
        let memories = decoder.memories(backend, encoded, lengths)?;
        let added = memories.into_iter().map(|memory| {
            self.added += 1;
            self.memories.insert(JobId(self.added), memory);
            JobId(self.added)
        });
        Ok(added.collect())
    }

    fn step(&mut self, rows: &[Rows], look: Option<Look<'_>>) -> Result<()> {
        let Net { backend, decoder, shared, answers, lm_head, .. } = self.net;
        let tokens: Vec<u32> = rows.iter().flat_map(|rows| rows.tokens.iter().copied()).collect();
        let mut wanted: BTreeMap<JobId, &mut Memory<B>> =
            self.memories.iter_mut().map(|(job, memory)| (*job, memory)).collect();
        let jobs = rows.iter().map(|Rows { job, tokens }| {
            let memory = wanted.remove(job).ok_or_else(|| unknown(*job))?;
            Ok((memory, tokens.len()))
        });
        let mut jobs = jobs.collect::<Result<Vec<_>>>()?;
        let hidden = decoder.step(
            backend,
            &embed(answers.as_ref().unwrap_or(shared), &tokens)?,
            &mut jobs,
        )?;
        look.map_or(Ok(()), |look| backend.logits(lm_head, &hidden, look))
    }

    fn select(&mut self, job: JobId, parents: &[usize]) -> Result<()> {
        let memory = self.memories.get_mut(&job).ok_or_else(|| unknown(job))?;
        memory.select(parents)
    }

    fn remove(&mut self, job: JobId) {
        self.memories.remove(&job);
    }
}

fn unknown(job: JobId) -> candle_core::Error {
    candle_core::Error::Msg(format!("no job {} in the decoder", job.0)).bt()
}
