//! The pipeline as one value: a picture and a prompt in, an answer out.
//!
//! [`Florence::prepare`] is light and may run on any thread; [`Florence::run`] computes, on the
//! engine's own threads, for one or several prepared pictures together.

use std::{path::Path, time::Instant};

use serde_json::Value;

use crate::{
    Coordinates, Error,
    generate::{self, Decoding, Generated, Rules},
    image::{DecodeLimits, Orientation, PixelValues, Preprocessor, decode},
    kernels::{self, Cpu},
    model::{
        Checkpoint, Compute, Config, GenerationDefaults, GenerationFields, LoadError, Model, Shape,
    },
    postprocess::{Scale, post_process},
    task::{Prompt, PromptError, Task},
    text::Text,
};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A CUDA device by its ordinal; needs the `cuda` feature.
    Cuda(usize),
}

/// In what numbers the model computes on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// float32 throughout: the reference's answers.
    #[default]
    F32,
    /// Matrix products of bfloat16, summed in float32; needs AVX512-BF16.
    Bf16,
    /// The fastest that the processor has and that agrees with float32 (docs/SPEED.md).
    Auto,
}

/// Which code computes on the CPU.
#[derive(Debug, Clone, Copy, Default)]
pub enum Kernels {
    /// This project's, on the best instruction set of the processor.
    #[default]
    Best,
    /// This project's, on a given instruction set.
    On(Cpu),
    /// candle's operations, as on other devices.
    Candle,
}

/// How a checkpoint is loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: Device,
    /// In what numbers it computes.
    pub precision: Precision,
    /// Which code computes on the CPU.
    pub kernels: Kernels,
    /// Compute threads; 0 takes as many as the machine has cores.
    pub threads: usize,
    /// Niceness of the compute threads, 0 to 19.
    pub nice: i32,
}

/// How a picture is read.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrepareOptions {
    /// What the decoder may use.
    pub limits: DecodeLimits,
    /// Whether the EXIF orientation is applied.
    pub orientation: Orientation,
}

/// How an answer is generated; `None` takes the checkpoint's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerateOptions {
    /// Beams; 1 is greedy search.
    pub beams: Option<usize>,
    /// Most tokens of an answer (default 1024, or what the model has positions for).
    pub max_new_tokens: Option<usize>,
    /// No n-gram of this length may occur twice; 0 switches the rule off.
    pub no_repeat_ngram: Option<usize>,
    /// Exponent of the length by which a hypothesis' log-probability is divided.
    pub length_penalty: Option<f32>,
    /// How coordinates are written.
    pub coordinates: Coordinates,
}

/// A picture and a prompt, ready for the model.
#[derive(Debug, Clone)]
pub struct Prepared {
    prompt: Prompt,
    prompt_ids: Vec<u32>,
    pixels: PixelValues,
    size: (usize, usize),
    decode_ms: f64,
    preprocess_ms: f64,
}

impl Prepared {
    /// Ids of the prompt's sentence.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }

    /// The model's input.
    pub fn pixels(&self) -> &PixelValues {
        &self.pixels
    }
}

/// What the vision tower makes of a picture, whatever the prompt; cheap to clone.
#[derive(Debug, Clone)]
pub struct Visual {
    /// `[1, 1 + N, D]`
    tokens: candle_core::Tensor,
    milliseconds: f64,
}

impl Visual {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.tokens.elem_count() * size_of::<f32>()
    }

    /// The same, for a job that did not have to wait for it.
    pub fn reused(&self) -> Self {
        Self { tokens: self.tokens.clone(), milliseconds: 0.0 }
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
    /// For tasks with boxes, one score a box: the geometric mean of the probabilities of its four
    /// location tokens. Empty for other tasks.
    pub scores: Vec<f32>,
    /// Mean log-probability of the tokens, as the search ranks it.
    pub score: f32,
    /// Where the time went.
    pub timings: Timings,
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
    model: Model,
    text: Text,
    preprocessor: Preprocessor,
    generation: GenerationDefaults,
    compute: Compute,
    threads: rayon::ThreadPool,
}

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
        const CONFIG: &str = "config.json";
        const PREPROCESSOR: &str = "preprocessor_config.json";
        const GENERATION: &str = "generation_config.json";
        let inconsistent =
            |file, problem| LoadError::Config { path: checkpoint.path(file), problem };
        let device = match options.device {
            Device::Cpu => candle_core::Device::Cpu,
            Device::Cuda(n) => candle_core::Device::new_cuda(n).map_err(LoadError::Device)?,
        };
        let compute = compute(options)?;
        let threads = thread_pool(options)?;
        let config: Config = checkpoint.read_json(CONFIG)?;
        if let Some(problem) = config.problem() {
            return Err(inconsistent(CONFIG, problem).into());
        }
        let preprocessor: Preprocessor = checkpoint.read_json(PREPROCESSOR)?;
        let side = preprocessor.side().ok_or_else(|| {
            inconsistent(PREPROCESSOR, "the picture size must be a square".to_owned())
        })?;
        let generation: Option<GenerationFields> =
            checkpoint.has(GENERATION).then(|| checkpoint.read_json(GENERATION)).transpose()?;
        let text = Text::load(checkpoint)?;
        let model = threads.install(|| Model::load(checkpoint, &config, side, &device, compute))?;
        let (ids, rows) = (text.vocabulary(), model.vocabulary());
        // The native tokenizer's last id, `<image>`, is only a placeholder.
        if ids > rows + 1 {
            let problem = format!("the tokenizer has {ids} ids, the model only {rows}");
            return Err(inconsistent(CONFIG, problem).into());
        }
        let generation = config.generation(generation);
        let name = checkpoint.name();
        Ok(Self { name, generation, model, text, preprocessor, compute, threads })
    }

    /// Name of the checkpoint's directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network itself; for tests and tools.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the model computes with: `f32 avx512`, `bf16 avx512`, `candle`.
    pub fn arithmetic(&self) -> String {
        match self.compute {
            Compute::Kernels(cpu, kernels::Precision::F32) => format!("f32 {}", cpu.name()),
            Compute::Kernels(cpu, kernels::Precision::Bf16) => format!("bf16 {}", cpu.name()),
            Compute::Candle => "candle".to_owned(),
        }
    }

    /// Most tokens that an answer can have.
    pub fn max_new_tokens(&self) -> usize {
        self.model.target_limit()
    }

    /// Checks and tokenizes a prompt.
    ///
    /// # Errors
    ///
    /// [`PromptError`] says what is wrong with it.
    pub fn check_prompt(&self, prompt: &str) -> Result<(), PromptError> {
        self.encode_prompt(&prompt.parse()?).map(|_ids| ())
    }

    fn encode_prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, PromptError> {
        let ids = self.text.encode(prompt)?;
        let limit = self.model.source_limit().saturating_sub(self.model.visual_length());
        if ids.len() > limit {
            return Err(PromptError::TooLong { found: ids.len(), limit });
        }
        Ok(ids)
    }

    /// Decodes and preprocesses a picture, and tokenizes a prompt.
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
        let prompt: Prompt = prompt.parse()?;
        let prompt_ids = self.encode_prompt(&prompt)?;
        let start = Instant::now();
        let rgb = decode(picture, options.limits, options.orientation)?;
        let decode_ms = milliseconds(start);
        let start = Instant::now();
        let pixels = self.threads.install(|| self.preprocessor.pixel_values(&rgb));
        let preprocess_ms = milliseconds(start);
        let size = (rgb.width, rgb.height);
        Ok(Prepared { prompt, prompt_ids, pixels, size, decode_ms, preprocess_ms })
    }

    /// Answers one prepared picture.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`].
    pub fn run_one(&self, prepared: &Prepared, options: &GenerateOptions) -> Result<Answer, Error> {
        let mut answers = self.run(&[Job { prepared, options }], &|_| false)?;
        answers.pop().flatten().ok_or(Error::Cancelled)
    }

    /// Answers prepared pictures together; their decoder steps are joined, their answers are not
    /// affected by each other. `None` for a job that `stopped` names; it is asked before every step.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`].
    pub fn run(
        &self,
        jobs: &[Job<'_>],
        stopped: &(dyn Fn(usize) -> bool + Sync),
    ) -> Result<Vec<Option<Answer>>, Error> {
        self.threads.install(|| self.run_here(jobs, stopped))
    }

    fn run_here(
        &self,
        jobs: &[Job<'_>],
        stopped: &(dyn Fn(usize) -> bool + Sync),
    ) -> Result<Vec<Option<Answer>>, Error> {
        let mut answers: Vec<Option<Answer>> = jobs.iter().map(|_| None).collect();
        let mut batch = Batch::new(self);
        for (i, Job { prepared, options }) in jobs.iter().enumerate() {
            if !stopped(i) {
                batch.join(i, prepared, &self.visual(prepared)?, options)?;
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

    /// The visual tokens of a prepared picture.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`].
    pub fn visual(&self, prepared: &Prepared) -> Result<Visual, Error> {
        let start = Instant::now();
        let seen = |_: &candle_core::Tensor| {};
        let tokens = self.threads.install(|| self.model.visual_tokens(&prepared.pixels, seen))?;
        Ok(Visual { tokens, milliseconds: milliseconds(start) })
    }

    fn rules(&self, options: &GenerateOptions) -> Rules {
        let wanted = options.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
        let limit = self.model.target_limit();
        let defaults = &self.generation;
        let defaults = GenerationDefaults {
            beams: options.beams.unwrap_or(defaults.beams).max(1),
            no_repeat_ngram: options.no_repeat_ngram.unwrap_or(defaults.no_repeat_ngram),
            length_penalty: options.length_penalty.unwrap_or(defaults.length_penalty),
            ..defaults.clone()
        };
        Rules::new(&defaults, self.model.vocabulary(), wanted.clamp(1, limit))
    }

    fn answer(&self, question: &Question, generated: Generated, timings: Timings) -> Answer {
        let start = Instant::now();
        let text = self.text.decode(&generated.ids);
        let scale = Scale { size: question.size, coordinates: question.coordinates };
        let parsed = post_process(question.task, &text, scale);
        let scores = self.box_scores(&generated, &parsed.boxes);
        Answer {
            text,
            json: parsed.json,
            scores,
            score: generated.score,
            token_ids: generated.ids,
            timings: Timings { postprocess: milliseconds(start), ..timings },
        }
    }

    /// A box's score: `exp` of the mean log-probability of its four location tokens.
    fn box_scores(&self, generated: &Generated, boxes: &[usize]) -> Vec<f32> {
        let locations: Vec<f32> = generated.ids[1..]
            .iter()
            .zip(&generated.token_scores)
            .filter(|(id, _)| self.text.is_location(**id))
            .map(|(_, score)| *score)
            .collect();
        let four = |first: &usize| locations.get(*first..first + 4);
        let score = |four: &[f32]| (four.iter().sum::<f32>() / 4.0).exp();
        boxes.iter().filter_map(four).map(score).collect()
    }
}

/// Jobs that are decoded together, step by step: a job joins when its picture is encoded and
/// leaves when its answer is complete. Answers do not depend on who else is in the batch.
pub struct Batch<'a, T> {
    florence: &'a Florence,
    running: Vec<Running<T>>,
}

struct Running<T> {
    ticket: T,
    decoding: Decoding,
    question: Question,
    timings: Timings,
    joined: Instant,
}

/// What the answer's text is read by.
struct Question {
    task: Task,
    size: (usize, usize),
    coordinates: Coordinates,
}

impl<'a, T> Batch<'a, T> {
    /// An empty batch.
    pub fn new(florence: &'a Florence) -> Self {
        Self { florence, running: Vec::new() }
    }

    /// Encodes a picture and a prompt, and takes the job in; `ticket` comes back with the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`].
    pub fn join(
        &mut self,
        ticket: T,
        prepared: &Prepared,
        visual: &Visual,
        options: &GenerateOptions,
    ) -> Result<(), Error> {
        let florence = self.florence;
        let start = Instant::now();
        let encode = || {
            let encoded = florence.model.encode(&visual.tokens, &prepared.prompt_ids)?;
            florence.model.cross(&encoded)
        };
        let cross = florence.threads.install(encode)?;
        let timings = Timings {
            decode: prepared.decode_ms,
            preprocess: prepared.preprocess_ms,
            vision: visual.milliseconds,
            encoder: milliseconds(start),
            ..Timings::default()
        };
        let question = Question {
            task: prepared.prompt.task,
            size: prepared.size,
            coordinates: options.coordinates,
        };
        let decoding = Decoding::new(&florence.model, cross, florence.rules(options));
        self.running.push(Running { ticket, decoding, question, timings, joined: Instant::now() });
        Ok(())
    }

    /// One token for every job; returns the answers that are complete now.
    ///
    /// # Errors
    ///
    /// [`Error::Compute`]; the jobs are then in no state to go on.
    pub fn step(&mut self) -> Result<Vec<(T, Answer)>, Error> {
        let (florence, running) = (self.florence, &mut self.running);
        let unfinished =
            running.iter_mut().map(|job| &mut job.decoding).filter(|job| !job.is_finished());
        let unfinished: Vec<_> = unfinished.collect();
        if !unfinished.is_empty() {
            florence.threads.install(|| generate::step(&florence.model, unfinished))?;
        }
        let finished = running.extract_if(.., |job| job.decoding.is_finished()).map(|job| {
            let timings = Timings { decoder: milliseconds(job.joined), ..job.timings };
            (job.ticket, florence.answer(&job.question, job.decoding.finish(), timings))
        });
        Ok(finished.collect())
    }

    /// Drops the jobs that `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.running.retain(|job| keep(&job.ticket));
    }

    /// The jobs that are being decoded.
    pub fn tickets(&self) -> impl Iterator<Item = &T> {
        self.running.iter().map(|job| &job.ticket)
    }

    /// Number of jobs that are being decoded.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether there is no job left.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}

/// What a model is to compute with.
fn compute(options: &LoadOptions) -> Result<Compute, Error> {
    let cpu = match (options.device, options.kernels) {
        (Device::Cuda(_), _) | (_, Kernels::Candle) => return Ok(Compute::Candle),
        (_, Kernels::Best) => Cpu::detect(),
        (_, Kernels::On(cpu)) => cpu,
    };
    Ok(Compute::Kernels(
        cpu,
        match options.precision {
            Precision::F32 => kernels::Precision::F32,
            Precision::Bf16 if !cpu.has_bf16() => return Err(Error::NoBf16),
            Precision::Auto if !cpu.has_bf16() => kernels::Precision::F32,
            Precision::Bf16 | Precision::Auto => kernels::Precision::Bf16,
        },
    ))
}

fn thread_pool(options: &LoadOptions) -> Result<rayon::ThreadPool, Error> {
    let nice = options.nice;
    let lower_priority = move |_| {
        // Best effort: without the permission the threads just run at normal priority.
        let _ = rustix::process::setpriority_process(None, nice);
    };
    Ok(rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .thread_name(|i| format!("florence-{i}"))
        .start_handler(lower_priority)
        .build()?)
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
