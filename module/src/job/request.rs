//! What a claimed job is to answer: taken from its hash, which anybody may have written.
//!
//! What SUBMIT would refuse fails as `INVALID`.

use std::{sync::Arc, time::Duration};

use florence_engine::{
    GenerateOptions,
    chain::{Chain, ChainError},
    generate::Sampling,
    image::Orientation,
};

use super::{
    Code, Failure, Job,
    limits::{self, Limit, Range},
    new::problem,
    steps,
};
use crate::{server::Value, settings, source};

#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Whose job it is.
    pub(crate) user: String,
    /// Where the picture comes from, unless it is in `data`.
    pub(crate) image: String,
    pub(crate) data: Option<Arc<[u8]>>,
    pub(crate) chain: Chain,
    /// How the picture is turned.
    pub(crate) orientation: Orientation,
    pub(crate) options: GenerateOptions,
    /// Neither takes nor leaves anything in the caches.
    pub(crate) no_cache: bool,
    /// Key of the stream that the text goes to while it is generated.
    pub(crate) stream: Option<Arc<[u8]>>,
    /// Longer side of the small copy of the picture that the job gets; 0 for none.
    pub(crate) thumbnail: u32,
    pub(crate) timeout: Duration,
    /// The model that the job asks for by name.
    pub(crate) wants: Option<String>,
}

impl Request {
    pub(crate) fn read(job: &Job) -> Result<Self, Failure> {
        // Of no use here, but all of a job is checked before it runs.
        for (field, limit) in [
            ("priority", limits::ANY_PRIORITY),
            ("delay", limits::DELAY),
            ("expires", limits::EXPIRES),
            ("retries", limits::RETRIES),
            ("ttl", limits::TTL),
        ] {
            number(job, field, limit)?;
        }
        let timeout = number(job, "timeout", limits::TIMEOUT)?;
        let timeout = timeout.map_or(settings::DEFAULT_TIMEOUT_MS.get(), i64::unsigned_abs);
        let size = |field, limit| -> Result<Option<usize>, Failure> {
            Ok(number(job, field, limit)?.and_then(|number| usize::try_from(number).ok()))
        };
        let penalty = decimal(job, "length_penalty", limits::LENGTH_PENALTY)?;
        #[expect(clippy::cast_possible_truncation, reason = "the reference's precision")]
        let length_penalty = penalty.map(|penalty| penalty as f32);
        let options = GenerateOptions {
            beams: size("beams", limits::BEAMS)?,
            n_best: size("nbest_count", limits::N_BEST)?,
            max_new_tokens: size("maxtokens", limits::MAX_TOKENS)?,
            no_repeat_ngram: size("ngram", limits::NGRAM)?,
            length_penalty,
            sampling: sampling(job)?,
            coordinates: *settings::COORDINATES.get(),
        };
        let turns = number(job, "exif", limits::EXIF)?.map(|turns| turns == 1);
        let turns = turns.unwrap_or_else(|| settings::EXIF.get());
        let orientation = if turns { Orientation::Exif } else { Orientation::AsStored };
        let thumbnail = number(job, "thumbnail_px", limits::THUMBNAIL)?;
        let thumbnail = thumbnail.map_or(settings::THUMBNAILS.get(), i64::unsigned_abs);
        for (field, most) in [
            ("image", source::MOST_BYTES),
            // As JSON, several prompts take more than they have.
            ("prompt", 8 * limits::PROMPT_BYTES),
            ("steps", 8 * limits::PROMPT_BYTES),
            ("wants", limits::MODEL_BYTES),
            ("stream", limits::STREAM_BYTES),
        ] {
            if job.length(field) > most as u64 {
                return Err(invalid(format!("the job's {field} is too long")));
            }
        }
        if job.bytes("image", source::has_long_host) == Some(true) {
            return Err(invalid("the job's image is too long"));
        }
        let chain = chain(job)?;
        if let Some(problem) = problem(&options, job.number("margin"), &chain.steps) {
            return Err(invalid(problem));
        }
        Ok(Self {
            user: job.user(),
            image: job.text("image").unwrap_or_default(),
            data: None,
            chain,
            orientation,
            options,
            no_cache: job.number("nocache") == Some(1),
            stream: job.bytes("stream", |key| key.into()),
            thumbnail: u32::try_from(thumbnail).unwrap_or_default(),
            timeout: Duration::from_millis(timeout),
            wants: job.text("wants"),
        })
    }

    /// The picture, if it came with the job; the server's own copy, which counts as its memory.
    pub(super) fn read_picture(&self, job: &Job) -> Result<Option<Value>, Failure> {
        let data = job.data();
        let length = data.as_ref().map_or(0, |data| data.as_slice().len());
        if length > settings::MAX_IMAGE_BYTES.size() {
            return Err(invalid("the job's picture is larger than florence.max-image-bytes"));
        }
        let data = data.filter(|_| length > 0);
        let is_missing = self.image.is_empty() || is_sent_along(&self.image);
        if data.is_none() && is_missing {
            return Err(invalid("the job has no picture"));
        }
        if data.is_none() && !source::is_address(&self.image) {
            return Err(invalid("the job's image is no address"));
        }
        Ok(data)
    }
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::permanent(Code::Invalid, message)
}

/// A field's number, if there is one.
fn number(job: &Job, field: &'static str, limit: Limit) -> Result<Option<i64>, Failure> {
    match (job.number(field), job.bytes(field, |_| ())) {
        (Some(number), _) if limit.holds(number) => Ok(Some(number)),
        (None, None) => Ok(None),
        _ => {
            let Limit { least, most, .. } = limit;
            Err(invalid(format!("the job's {field} is not a whole number from {least} to {most}")))
        }
    }
}

/// The same of a number that need not be whole.
fn decimal(job: &Job, field: &'static str, range: Range) -> Result<Option<f64>, Failure> {
    /// No number needs more bytes.
    const MOST: usize = 400;
    match (job.parsed(field, MOST), job.bytes(field, |_| ())) {
        (Some(number), _) if range.holds(number) => Ok(Some(number)),
        (None, None) => Ok(None),
        _ => {
            let Range { least, most, .. } = range;
            Err(invalid(format!("the job's {field} is not a number from {least} to {most}")))
        }
    }
}

/// How tokens are drawn, if one of the options says so.
fn sampling(job: &Job) -> Result<Option<Sampling>, Failure> {
    let temperature = decimal(job, "temperature", limits::TEMPERATURE)?;
    let top_p = decimal(job, "top_p", limits::TOP_P)?;
    let top_k = number(job, "top_k", limits::TOP_K)?;
    let top_k = top_k.and_then(|k| usize::try_from(k).ok());
    let seed = number(job, "seed", limits::SEED)?.map(i64::unsigned_abs);
    Ok(Sampling::of(temperature, top_k, top_p, seed))
}

/// Whether the picture comes with the job: nothing else tells where to find it.
pub(super) fn is_sent_along(image: &str) -> bool {
    image == "DATA" || image.starts_with("KEY ") || source::is_inline(image.as_bytes())
}

/// The prompts, and the steps that follow.
fn chain(job: &Job) -> Result<Chain, Failure> {
    let steps = job.text("steps").map_or(Some(Vec::new()), |text| steps::read(&text));
    let chain = Chain {
        prompts: prompts(job)?,
        steps: steps.ok_or_else(|| invalid("the job's steps are no list of steps"))?,
        margin: number(job, "margin", limits::MARGIN)?
            .and_then(|margin| u32::try_from(margin).ok())
            .unwrap_or_default(),
        most_regions: settings::MAX_REGIONS.size(),
    };
    if chain.prompt_bytes() > limits::PROMPT_BYTES {
        return Err(invalid("the job's prompt is too long"));
    }
    match chain.check(*settings::PROMPTS.get()) {
        // What is taken may have changed since.
        Ok(()) | Err(ChainError::Prompt(_)) => Ok(chain),
        Err(problem) => Err(invalid(format!("the job's steps: {problem}"))),
    }
}

/// One prompt, or with PROMPTS a JSON list of different ones.
fn prompts(job: &Job) -> Result<Vec<String>, Failure> {
    let prompt = job.text("prompt").unwrap_or_default();
    let prompts: Vec<String> = match serde_json::from_str(&prompt) {
        Ok(prompts) => prompts,
        Err(_one) => vec![prompt],
    };
    let count = i64::try_from(prompts.len()).unwrap_or(i64::MAX);
    if !limits::PROMPTS.holds(count) {
        return Err(invalid(format!("the job has {count} prompts, not 1 to 16")));
    }
    let is_twice = |i: usize| prompts[..i].contains(&prompts[i]);
    if (1..prompts.len()).any(is_twice) {
        return Err(invalid("the job has a prompt twice"));
    }
    Ok(prompts)
}
