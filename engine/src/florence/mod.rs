//! The pipeline as one value: a picture and a prompt in, an answer out.
//!
//! [`Florence::prepare`] is light and may run on any thread; [`Florence::run`] computes, on the
//! engine's own threads, for one or several prepared pictures together.

mod answer;
mod batch;
mod chained;
mod files;
mod followed;
mod load;
#[cfg(test)]
mod made_up;
mod options;

use std::{sync::Arc, time::Instant};

use quick_cache::sync::Cache;

use crate::{
    Error,
    generate::Rules,
    image::{PixelValues, Preprocessor, Rgb, decode},
    model::{Compute, GenerationDefaults, Kept, MAX_BEAMS, Model},
    prompt::{Prompt, PromptError, Prompts},
    task::AnswerKind,
    text::Text,
};

use answer::Reading;
pub use answer::{Answer, Ranked, Timings};
pub use batch::Batch;
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

/// Answers have at most this many tokens unless the caller says otherwise.
const MAX_NEW_TOKENS: usize = 1024;

impl Florence {
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
        let rows = self.beams(options) * self.rules(options).max_length;
        let tokens = self.model.visual_length() + question.ids.len() + rows;
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
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
