//! The pipeline as one value: a picture and a prompt in, an answer out.
//!
//! [`Florence::prepare`] is light and may run on any thread; [`Florence::run`] computes, on the
//! engine's own threads, for one or several prepared pictures together.

mod batch;
mod chained;
mod files;
mod followed;
#[cfg(test)]
mod made_up;
mod options;

use std::{ops::Range, path::Path, sync::Arc, time::Instant};

use quick_cache::sync::Cache;
use serde_json::Value;

use crate::{
    Error,
    generate::{Generated, Rules},
    image::{PixelValues, Preprocessor, Rgb, decode},
    model::{Checkpoint, Compute, GenerationDefaults, Kept, MAX_BEAMS, Model, Shape, Target},
    postprocess::{Decimals, Parsed, Scale, Scored, post_process},
    prompt::{Prompt, PromptError, Prompts},
    task::AnswerKind,
    text::Text,
};

pub use batch::Batch;
use files::{CONFIG, Files, GENERATION, PREPROCESSOR, inconsistent};
pub use followed::{Followed, Part};
pub use options::{
    Device, GenerateOptions, Kernels, LoadOptions, Precision, PrepareOptions, TokenIds, has_cpu,
};

/// A decoded picture as the model's input.
#[derive(Debug, Clone)]
pub struct Picture {
    pixels: PixelValues,
    size: (usize, usize),
    decode_ms: f64,
    preprocess_ms: f64,
}

/// A checked and tokenized prompt.
#[derive(Debug, Clone)]
pub struct Question {
    /// The key of the answer's JSON.
    name: Arc<str>,
    answer: AnswerKind,
    /// Whether it is one of the fifteen.
    is_task: bool,
    ids: Vec<u32>,
}

impl Question {
    /// All that the answer depends on, but for the picture: the tokens, and how the text is read.
    pub(crate) fn identity(&self) -> (&str, &[u32]) {
        (&self.name, &self.ids)
    }
}

/// A picture and a prompt, ready for the model.
#[derive(Debug, Clone)]
pub struct Prepared {
    picture: Picture,
    question: Question,
}

impl Prepared {
    /// Ids of the prompt's sentence.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.question.ids
    }

    /// The model's input.
    pub fn pixels(&self) -> &PixelValues {
        &self.picture.pixels
    }

    /// The picture alone.
    pub fn picture(&self) -> &Picture {
        &self.picture
    }

    /// The prompt alone.
    pub fn question(&self) -> &Question {
        &self.question
    }
}

/// What the vision tower makes of a picture, whatever the prompt; cheap to clone.
#[derive(Debug, Clone)]
pub struct Visual {
    /// `[1, 1 + N, D]`
    tokens: Kept,
    /// The picture's own size.
    size: (usize, usize),
    timings: Timings,
}

impl Visual {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.tokens.bytes()
    }

    /// The same, for a job that did not have to wait for it.
    #[must_use]
    pub fn reused(&self) -> Self {
        Self { timings: Timings::default(), ..self.clone() }
    }
}

/// One entry of [`Florence::run`].
#[derive(Debug)]
pub struct Job<'a> {
    /// The picture and the prompt.
    pub prepared: &'a Prepared,
    /// How the answer is generated.
    pub options: &'a GenerateOptions,
}

/// What the model says of a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The generated text, special tokens included.
    pub text: String,
    /// The generated ids, start and end token included.
    pub token_ids: Vec<u32>,
    /// The reference's JSON: `{"<OD>": {"bboxes": .., "labels": ..}}`.
    pub json: Value,
    /// One score a label (a box without one counts as labelled), or one for a text: the geometric
    /// mean of the probabilities of its location tokens, or of all the text's tokens.
    pub scores: Vec<f32>,
    /// Width and height of the picture, to which coordinates refer.
    pub size: (usize, usize),
    /// Mean log-probability of the tokens, as the search ranks it.
    pub score: f32,
    /// The best texts that the search has found, this one first, where they were asked for.
    pub n_best: Vec<Ranked>,
    /// Where the time went.
    pub timings: Timings,
}

/// One of several texts that a search has found.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// As an answer's.
    pub score: f32,
    /// As an answer's.
    pub text: String,
    /// As an answer's.
    pub token_ids: Vec<u32>,
    /// As an answer's.
    pub json: Value,
}

impl Ranked {
    /// The JSON with coordinates of so many decimals.
    pub fn rounded(&self, decimals: Decimals) -> Value {
        decimals.round(&self.json)
    }

    /// As one entry of the list of the best: `score`, `text`, and the JSON as `result`.
    pub fn told(&self, decimals: Decimals) -> Value {
        let result = self.rounded(decimals);
        serde_json::json!({ "score": self.score, "text": self.text, "result": result })
    }
}

impl Answer {
    /// The JSON with coordinates of so many decimals.
    pub fn rounded(&self, decimals: Decimals) -> Value {
        decimals.round(&self.json)
    }
}

/// Milliseconds per stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Timings {
    pub decode: f64,
    pub preprocess: f64,
    pub vision: f64,
    pub encoder: f64,
    pub decoder: f64,
    pub postprocess: f64,
}

/// A loaded checkpoint with all that surrounds the network.
pub struct Florence {
    name: String,
    is_embedded: bool,
    remarks: Vec<String>,
    model: Arc<Model>,
    text: Arc<Text>,
    preprocessor: Preprocessor,
    generation: GenerationDefaults,
    compute: Compute,
    device: String,
    /// Whether another value has loaded the weights.
    shares_weights: bool,
    threads: rayon::ThreadPool,
    /// Prompts that were asked lately: most servers see the same few all day.
    questions: Cache<String, Question>,
}

/// What whoever asks the embedded model has to know.
const EMBEDDED_NOTE: &str = "the embedded tiny model knows coloured shapes and short words; \
    photographs need real weights: florence pull microsoft/Florence-2-base-ft";

/// Prompts that are kept.
const QUESTIONS: usize = 1024;

/// Answers have at most this many tokens unless the caller says otherwise.
const MAX_NEW_TOKENS: usize = 1024;

impl Florence {
    /// Loads a checkpoint directory of either layout.
    ///
    /// # Errors
    ///
    /// [`Error::Load`] names the file or tensor that is missing, damaged or misshapen.
    pub fn load(directory: &Path, options: &LoadOptions) -> Result<Self, Error> {
        Self::from_checkpoint(Checkpoint::Directory(directory), options)
    }

    /// Loads `models/tiny`, which is part of the library and needs no files.
    ///
    /// # Errors
    ///
    /// As [`Self::load`], but only for a lack of memory, threads or the device.
    pub fn embedded(options: &LoadOptions) -> Result<Self, Error> {
        Self::from_checkpoint(Checkpoint::Embedded, options)
    }

    /// A model of a published size with made-up weights, to measure speed without any file.
    ///
    /// # Errors
    ///
    /// As [`Self::embedded`].
    pub fn synthetic(shape: Shape, options: &LoadOptions) -> Result<Self, Error> {
        Self::from_checkpoint(Checkpoint::Synthetic(shape), options)
    }

    fn from_checkpoint(checkpoint: Checkpoint<'_>, options: &LoadOptions) -> Result<Self, Error> {
        checkpoint.check_model()?;
        let (found, _) = options.device.settled();
        let device = found.open()?;
        let compute = options.compute(found)?;
        let threads = options.thread_pool()?;
        let Files { config, generation, preprocessor, text, mut remarks } =
            Files::read(checkpoint, options)?;
        let side = preprocessor.side().ok_or_else(|| {
            inconsistent(checkpoint, PREPROCESSOR, "the picture size must be a square".to_owned())
        })?;
        let adapter = options.adapter.as_deref();
        let target = Target {
            device: &device,
            compute,
            keep_packed: options.keep_packed,
            packed_directory: options.packed_directory.as_deref(),
            adapter,
            int8: &options.int8,
        };
        let load = || Model::load(checkpoint, &config, side, &target);
        let model = Arc::new(compute.here(&threads, load)?);
        if !model.told().is_empty() {
            remarks.push(format!(
                "{CONFIG} has no {}: what the tensors' shapes and Florence-2's own values give is \
                 taken",
                model.told().join(", ")
            ));
        }
        let (ids, rows) = (text.vocabulary(), model.vocabulary());
        // The native tokenizer's last id, `<image>`, is only a placeholder.
        if ids > rows + 1 {
            let problem = format!("the tokenizer has {ids} ids, the model only {rows}");
            return Err(inconsistent(checkpoint, CONFIG, problem).into());
        }
        let mut generation = config.generation(generation);
        if let (Some(bos), Some(eos)) = (text.id("<s>"), text.id("</s>"))
            && let Some(given) = generation.other_ids(bos, eos)
        {
            if options.token_ids == TokenIds::Tokenizer {
                generation.take_ids(bos, eos);
            } else {
                remarks.push(format!(
                    "{given} are given for answers, where the tokenizer has <s> as {bos} and </s> \
                     as {eos}; token-ids tokenizer takes these"
                ));
            }
        }
        if let Some(problem) = generation.problem(rows) {
            let problem =
                format!("of the settings for generation, here or in {GENERATION}, {problem}");
            return Err(inconsistent(checkpoint, CONFIG, problem).into());
        }
        let name = named(checkpoint, adapter);
        let questions = Cache::new(QUESTIONS);
        let is_embedded = matches!(checkpoint, Checkpoint::Embedded);
        Ok(Self {
            name,
            is_embedded,
            remarks,
            model,
            text: Arc::new(text),
            preprocessor,
            generation,
            compute,
            device: found.describe(&device),
            shares_weights: false,
            threads,
            questions,
        })
    }

    /// The same model for another thread, on compute threads of its own: on a processor both share
    /// the weights.
    ///
    /// # Errors
    ///
    /// [`Error::Threads`].
    pub fn another(&self, options: &LoadOptions) -> Result<Self, Error> {
        Ok(Self {
            name: self.name.clone(),
            is_embedded: self.is_embedded,
            remarks: Vec::new(),
            model: Arc::clone(&self.model),
            text: Arc::clone(&self.text),
            preprocessor: self.preprocessor.clone(),
            generation: self.generation.clone(),
            compute: self.compute,
            device: self.device.clone(),
            shares_weights: true,
            threads: options.thread_pool()?,
            questions: Cache::new(QUESTIONS),
        })
    }

    /// Name of the checkpoint's directory, and of the adapter's: `base+adapter`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the checkpoint's files leave out or contradict, and what was taken instead.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// What its users have to know of the model.
    pub fn note(&self) -> Option<&'static str> {
        self.is_embedded.then_some(EMBEDDED_NOTE)
    }

    /// The network itself; for tests and tools.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Where the model runs: `cpu`, or `cuda:0` and the GPU's name and memory.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether it is [`Self::another`].
    pub fn shares_weights(&self) -> bool {
        self.shares_weights
    }

    /// What the model computes with: `f32 avx512`, `bf16 avx512`, `candle`.
    pub fn arithmetic(&self) -> String {
        match self.compute {
            Compute::Kernels(cpu, precision) => format!("{} {}", precision.name(), cpu.name()),
            Compute::Device(kind) => format!("{} cuda", kind.as_str()),
            Compute::Reference => "candle".to_owned(),
        }
    }

    /// The name of a model before it is loaded: as [`Self::name`] tells it afterwards. Without a
    /// directory, that of the embedded one.
    pub fn name_of(directory: Option<&Path>, adapter: Option<&Path>) -> String {
        named(directory.map_or(Checkpoint::Embedded, Checkpoint::Directory), adapter)
    }

    /// Asks about a blank picture, to see that the whole of the network works.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`], and [`Error::Unusable`] for an answer without
    /// probabilities.
    pub fn try_out(&self) -> Result<(), Error> {
        let side = self.preprocessor.side().unwrap_or_default();
        let blank = Rgb { width: side, height: side, data: vec![0; 3 * side * side] };
        let question = self.question("<CAPTION>", Prompts::Tasks)?;
        let prepared = Prepared { picture: self.preprocess(&blank)?, question };
        let options = GenerateOptions { max_new_tokens: Some(4), ..GenerateOptions::default() };
        let answer = self.run_one(&prepared, &options)?;
        if answer.score.is_finite() { Ok(()) } else { Err(Error::Unusable) }
    }

    /// Whether the device still works.
    ///
    /// # Errors
    ///
    /// [`Error::Device`], if it will not before the process has let go of it.
    pub fn check(&self) -> Result<(), Error> {
        self.compute(|| self.model.check())
    }

    /// Runs the network: on a processor in the compute threads, for a device in the calling one.
    fn compute<T: Send>(
        &self,
        f: impl FnOnce() -> candle_core::Result<T> + Send,
    ) -> Result<T, Error> {
        let done = self.compute.here(&self.threads, f);
        done.map_err(|problem| match self.compute {
            Compute::Device(_) => Error::Device(problem),
            Compute::Kernels(..) | Compute::Reference => Error::Compute(problem),
        })
    }

    /// Most tokens that an answer can have.
    pub fn max_new_tokens(&self) -> usize {
        self.model.target_limit()
    }

    /// Bytes that the keys and values of an answer take at most, where no beams share any.
    pub fn kv_cache_bytes(&self, question: &Question, options: &GenerateOptions) -> u64 {
        let Rules { beams, max_length, .. } = self.rules(options);
        let tokens = self.model.visual_length() + question.ids.len() + beams * max_length;
        self.model.kept_bytes(tokens) as u64
    }

    /// Checks and tokenizes a prompt.
    ///
    /// # Errors
    ///
    /// [`PromptError`] says what is wrong with it.
    pub fn question(&self, prompt: &str, taken: Prompts) -> Result<Question, PromptError> {
        // What is taken may have changed since.
        let is_taken = |question: &Question| question.is_task || taken == Prompts::Any;
        if let Some(question) = self.questions.get(prompt).filter(is_taken) {
            return Ok(question);
        }
        let question = self.new_question(prompt, taken)?;
        self.questions.insert(prompt.to_owned(), question.clone());
        Ok(question)
    }

    fn new_question(&self, prompt: &str, taken: Prompts) -> Result<Question, PromptError> {
        let prompt = Prompt::parse(prompt, taken)?;
        let ids = self.text.encode(&prompt)?;
        let limit = self.model.source_limit().saturating_sub(self.model.visual_length());
        if ids.len() > limit {
            return Err(PromptError::TooLong { found: ids.len(), limit });
        }
        let is_task = matches!(prompt, Prompt::Task { .. });
        Ok(Question { name: prompt.name().into(), answer: prompt.answer(), is_task, ids })
    }

    /// Decodes and preprocesses a picture.
    ///
    /// # Errors
    ///
    /// [`Error::Image`].
    pub fn picture(&self, bytes: &[u8], options: &PrepareOptions) -> Result<Picture, Error> {
        let start = Instant::now();
        let rgb = decode(bytes, &options.limits, options.orientation)?;
        let decode_ms = milliseconds(start);
        Ok(Picture { decode_ms, ..self.preprocess(&rgb)? })
    }

    /// Preprocesses a picture that somebody else has decoded.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotResized`](crate::image::ImageError::NotResized), if the checkpoint takes
    /// pictures as they are and this one is none that it can take.
    pub fn preprocess(&self, picture: &Rgb) -> Result<Picture, Error> {
        let start = Instant::now();
        let pixels = self.threads.install(|| self.preprocessor.pixel_values(picture))?;
        let size = (picture.width, picture.height);
        Ok(Picture { pixels, size, decode_ms: 0.0, preprocess_ms: milliseconds(start) })
    }

    /// Both of a job's parts.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] or [`Error::Prompt`].
    pub fn prepare(
        &self,
        picture: &[u8],
        prompt: &str,
        options: &PrepareOptions,
    ) -> Result<Prepared, Error> {
        let question = self.question(prompt, options.prompts)?;
        Ok(Prepared { picture: self.picture(picture, options)?, question })
    }

    /// Answers one prepared picture.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`].
    pub fn run_one(&self, prepared: &Prepared, options: &GenerateOptions) -> Result<Answer, Error> {
        let mut answers = self.run(&[Job { prepared, options }], &|_| false)?;
        answers.pop().flatten().ok_or(Error::Cancelled)
    }

    /// Answers prepared pictures together; their decoder steps are joined, their answers are not
    /// affected by each other. `None` for a job that `stopped` names; it is asked before every step.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`].
    pub fn run(
        &self,
        jobs: &[Job<'_>],
        stopped: &(dyn Fn(usize) -> bool + Sync),
    ) -> Result<Vec<Option<Answer>>, Error> {
        let mut answers: Vec<Option<Answer>> = jobs.iter().map(|_| None).collect();
        let mut batch = Batch::new(self);
        for (i, Job { prepared, options }) in jobs.iter().enumerate() {
            if !stopped(i) {
                let visual = self.visual(&prepared.picture)?;
                batch.join(i, &prepared.question, &visual, options)?;
            }
        }
        while !batch.is_empty() {
            batch.retain(|i| !stopped(*i));
            for (i, answer) in batch.step()? {
                answers[i] = Some(answer);
            }
        }
        Ok(answers)
    }

    /// The visual tokens of a picture.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`].
    pub fn visual(&self, picture: &Picture) -> Result<Visual, Error> {
        self.visuals(&[picture])?.pop().ok_or(Error::Cancelled)
    }

    /// The visual tokens of several pictures, in their order; those of one size that stand together
    /// are encoded together.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`] or [`Error::Device`].
    pub fn visuals(&self, pictures: &[&Picture]) -> Result<Vec<Visual>, Error> {
        let mut visuals = Vec::with_capacity(pictures.len());
        for group in pictures.chunk_by(|a, b| a.pixels.side == b.pixels.side) {
            visuals.extend(self.visuals_of_one_size(group)?);
        }
        Ok(visuals)
    }

    fn visuals_of_one_size(&self, pictures: &[&Picture]) -> Result<Vec<Visual>, Error> {
        let start = Instant::now();
        let seen = |_: &candle_core::Tensor| {};
        let pixels: Vec<&PixelValues> = pictures.iter().map(|picture| &picture.pixels).collect();
        let encode = || {
            let tokens = self.model.visual_tokens(&pixels, seen)?;
            // Each of its own, so that none keeps the others.
            let one = |i| tokens.narrow(0, i, 1)?.force_contiguous();
            (0..pictures.len()).map(one).collect::<candle_core::Result<Vec<_>>>()
        };
        let tokens = self.compute(encode)?;
        let vision = milliseconds(start) / pictures.len() as f64;
        let visual = |(tokens, picture): (candle_core::Tensor, &&Picture)| {
            let timings = Timings {
                decode: picture.decode_ms,
                preprocess: picture.preprocess_ms,
                vision,
                ..Timings::default()
            };
            Visual { tokens: Kept::new(tokens), size: picture.size, timings }
        };
        Ok(tokens.into_iter().zip(pictures).map(visual).collect())
    }

    /// How many pictures are best encoded together.
    pub fn pictures_at_once(&self) -> usize {
        self.model.pictures_at_once()
    }

    /// How many beams there are with these options.
    pub fn beams(&self, options: &GenerateOptions) -> usize {
        let rules = self.rules(options);
        if rules.sampling.is_some() { 1 } else { rules.beams }
    }

    fn rules(&self, options: &GenerateOptions) -> Rules {
        let wanted = options.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
        let limit = self.model.target_limit();
        let defaults = &self.generation;
        let defaults = GenerationDefaults {
            beams: options.beams.unwrap_or(defaults.beams).clamp(1, MAX_BEAMS),
            no_repeat_ngram: options.no_repeat_ngram.unwrap_or(defaults.no_repeat_ngram),
            length_penalty: options.length_penalty.unwrap_or(defaults.length_penalty),
            ..defaults.clone()
        };
        let rules = Rules::new(&defaults, self.model.vocabulary(), wanted.clamp(1, limit));
        Rules { sampling: options.sampling.clone(), ..rules }
    }

    /// The answer is the first of the best; all of them are told if they are `wanted`.
    fn answer(
        &self,
        reading: &Reading,
        (best, wanted): (Vec<Generated>, bool),
        timings: Timings,
    ) -> Answer {
        let start = Instant::now();
        let mut scores = Vec::new();
        let ranked = |(i, generated): (usize, Generated)| {
            let text = self.text.decode(&generated.ids);
            let Parsed { json, scored } = post_process(reading.answer, &text, reading.scale);
            if i == 0 {
                scores = self.scores(&generated, &scored);
            }
            let json = serde_json::json!({ &*reading.name: json });
            Ranked { score: generated.score, text, token_ids: generated.ids, json }
        };
        let mut best: Vec<Ranked> = best.into_iter().enumerate().map(ranked).collect();
        let n_best = if wanted { best.clone() } else { Vec::new() };
        let Ranked { score, text, token_ids, json } = best.swap_remove(0);
        Answer {
            text,
            json,
            scores,
            size: reading.scale.size,
            score,
            token_ids,
            n_best,
            timings: Timings { postprocess: milliseconds(start), ..timings },
        }
    }

    /// The geometric means of the probabilities of tokens.
    fn scores(&self, generated: &Generated, scored: &Scored) -> Vec<f32> {
        let all = &generated.token_scores;
        match scored {
            Scored::Text => vec![mean(all)],
            Scored::Locations(ranges) => {
                let tokens = generated.ids[1..].iter().zip(all);
                let is_location = |(id, _): &(&u32, &f32)| self.text.is_location(**id);
                let locations: Vec<f32> = tokens.filter(is_location).map(|(_, s)| *s).collect();
                let score = |range: &Range<usize>| locations.get(range.clone()).map_or(0.0, mean);
                ranges.iter().map(score).collect()
            }
        }
    }
}

/// The name of a checkpoint with an adapter.
fn named(checkpoint: Checkpoint<'_>, adapter: Option<&Path>) -> String {
    let adapter = adapter.map(|adapter| format!("+{}", Checkpoint::Directory(adapter).name()));
    checkpoint.name() + &adapter.unwrap_or_default()
}

/// `exp` of the mean of log-probabilities; nothing has no probability.
fn mean(scores: &[f32]) -> f32 {
    if scores.is_empty() {
        return 0.0;
    }
    (scores.iter().sum::<f32>() / scores.len() as f32).exp()
}

/// How the answer's text is to be read.
struct Reading {
    name: Arc<str>,
    answer: AnswerKind,
    scale: Scale,
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
