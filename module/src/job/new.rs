//! What a new job is to answer: checked as far as it can be before anything is stored, then written
//! as the job's first fields.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_engine::{
    Florence, GenerateOptions,
    chain::{Chain, Link, Step},
    generate::Sampling,
    prompt::Prompt,
};
use redis_module::{Context, RedisError, RedisString};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

use super::{Fields, Job, Seen, limits, record::new_fields, steps};
use crate::{
    figures,
    model::{self, Model},
    server::{self, reply},
    settings, source,
};

/// A picture's bytes: ours, or the server's, which are not copied.
pub(crate) enum Bytes {
    Ours(Vec<u8>),
    Servers(RedisString),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Ours(bytes) => bytes,
            Self::Servers(string) => string.as_slice(),
        }
    }
}

/// Where the picture comes from.
pub(crate) struct Picture {
    /// The URI, `DATA`, `KEY name` or `data:image/png`.
    source: String,
    bytes: Option<Bytes>,
}

impl Picture {
    /// Bytes that come with the request.
    pub(crate) fn sent(source: String, bytes: Bytes) -> Result<Self, RedisError> {
        check_size(bytes.as_slice().len())?;
        Ok(Self { source, bytes: Some(bytes) })
    }

    /// What a URI names, if it may be fetched; the bytes of a `data:` URL.
    pub(crate) fn at(uri: &[u8]) -> Result<Self, RedisError> {
        if let Some(inline) = source::inline(uri) {
            let (source, bytes) = inline?;
            return Self::sent(source, Bytes::Ours(bytes));
        }
        Ok(Self { source: source::check(uri)?.to_owned(), bytes: None })
    }

    /// One that cannot be had any more, or not yet: only to know a request for it again.
    pub(crate) fn named(source: &[u8]) -> Self {
        let source = &source[..source.len().min(source::MOST_BYTES)];
        Self { source: String::from_utf8_lossy(source).trim_start().to_owned(), bytes: None }
    }
}

/// Refuses a picture of no bytes, or of too many.
fn check_size(bytes: usize) -> Result<(), RedisError> {
    if bytes == 0 {
        return Err(reply::error("ERR", "the image is empty"));
    }
    source::check_size(bytes)
}

/// How a job is to be run, as far as it is said; times in milliseconds, but the TTL in seconds.
#[derive(Default)]
pub(crate) struct Options {
    pub(crate) priority: i64,
    pub(crate) delay: Option<i64>,
    pub(crate) expires: Option<i64>,
    pub(crate) model: Option<String>,
    pub(crate) timeout: Option<i64>,
    pub(crate) retries: Option<i64>,
    pub(crate) ttl: Option<i64>,
    pub(crate) beams: Option<i64>,
    /// How many of the best beams are told.
    pub(crate) n_best: Option<i64>,
    pub(crate) max_tokens: Option<i64>,
    /// Whether the picture is turned as its EXIF tag says; by default as the setting has it.
    pub(crate) exif: Option<bool>,
    pub(crate) no_cache: bool,
    /// Longer side of the small copy of the picture, 0 for none; by default as the setting has it.
    pub(crate) thumbnail: Option<i64>,
    /// Key of the stream that the text goes to while it is generated.
    pub(crate) stream: Option<Vec<u8>>,
    /// What is asked after the first prompt.
    pub(crate) steps: Vec<Step>,
    pub(crate) margin: Option<i64>,
    pub(crate) length_penalty: Option<f64>,
    pub(crate) ngram: Option<i64>,
    pub(crate) temperature: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) seed: Option<i64>,
}

impl Options {
    /// Whether tokens are drawn by chance.
    fn is_drawn(&self) -> bool {
        self.generate().sampling.is_some()
    }

    /// What of the options has to go together, as the engine has it.
    fn generate(&self) -> GenerateOptions {
        let size = |number: Option<i64>| number.and_then(|number| usize::try_from(number).ok());
        let seed = self.seed.map(i64::unsigned_abs);
        #[expect(clippy::cast_possible_truncation, reason = "the reference's precision")]
        let length_penalty = self.length_penalty.map(|penalty| penalty as f32);
        GenerateOptions {
            beams: size(self.beams),
            n_best: size(self.n_best),
            length_penalty,
            sampling: Sampling::of(self.temperature, size(self.top_k), self.top_p, seed),
            ..GenerateOptions::default()
        }
    }
}

/// What of a request does not go together.
pub(super) fn problem(
    options: &GenerateOptions,
    margin: Option<i64>,
    steps: &[Step],
) -> Option<&'static str> {
    let (is_drawn, has_best) = (options.sampling.is_some(), options.n_best.is_some());
    if margin.is_some() && steps.iter().all(|step| step.link != Link::Crop) {
        return Some("MARGIN is for CROP");
    }
    if has_best && is_drawn {
        return Some("NBEST is for BEAMS: TEMPERATURE, TOPK, TOPP and SEED draw one text");
    }
    if has_best && !steps.is_empty() {
        return Some("NBEST is for questions without THEN, EACH and CROP");
    }
    if is_drawn && options.beams.is_some_and(|beams| beams > 1) {
        return Some("TEMPERATURE, TOPK, TOPP and SEED draw tokens: there are no BEAMS then");
    }
    let has_no_beams = is_drawn || options.beams == Some(1);
    (options.length_penalty.is_some() && has_no_beams).then_some("LENGTHPENALTY is for BEAMS")
}

/// Checks options, prompts and the steps that follow, as far as they can be: the tokenizer is there
/// once the model is, and what is found once it is asked.
pub(crate) fn check(prompts: &[String], options: &Options) -> Result<(), RedisError> {
    let generate = options.generate();
    if let Some(problem) = problem(&generate, options.margin, &options.steps) {
        return Err(reply::error("ERR", problem));
    }
    let chain = Chain {
        prompts: prompts.to_vec(),
        steps: options.steps.clone(),
        margin: 0,
        most_regions: 0,
    };
    limits::check_prompt_bytes(chain.prompt_bytes())?;
    let taken = *settings::PROMPTS.get();
    chain.check(taken).map_err(|problem| reply::bad_prompt(&problem))?;
    let wanted = options.model.as_deref();
    let model = match model::find(wanted) {
        Some(model) => model.model(),
        // Which there are is known once the threads are there.
        None if !model::are_known() => Model::Loading,
        None => {
            let (wanted, names) = (wanted.unwrap_or_default(), model::names());
            let text = format!("there is no model {wanted}; this server has {names}");
            return Err(reply::error("NOMODEL", text));
        }
    };
    let florence = match &model {
        Model::Ready(loaded) => Some(&loaded.florence),
        Model::Loading => None,
        Model::Failed(problem) => return Err(reply::error("NOMODEL", problem)),
    };
    if let Some(problem) = florence.and_then(|florence| too_many_best(florence, &generate)) {
        return Err(reply::error("ERR", problem));
    }
    prompts.iter().try_for_each(|prompt| {
        let checked = match florence {
            Some(florence) => florence.question(prompt, taken).map(|_question| ()),
            None => Prompt::parse(prompt, taken).map(|_prompt| ()),
        };
        checked.map_err(|problem| reply::bad_prompt(&problem))
    })
}

/// What is wrong if more of the best beams are to be told than there are; by default a checkpoint
/// says how many there are.
pub(crate) fn too_many_best(florence: &Florence, options: &GenerateOptions) -> Option<String> {
    let (wanted, beams) = (options.n_best?, florence.beams(options));
    (wanted > beams).then(|| format!("NBEST {wanted} is more than there are BEAMS, {beams}"))
}

/// What makes a hash a new job.
pub(crate) struct New {
    fields: Fields,
    data: Option<Bytes>,
    /// Of what the client has said, and after a point of the picture that came with it: the same
    /// request again is no other job. What nothing was said about is as the settings had it at the
    /// first time.
    digest: String,
}

impl New {
    /// Whether a job was made by this request; or by one that is the same as far as can be told, where
    /// the picture is gone that came with it.
    pub(crate) fn has_made(&self, job: &Job) -> bool {
        let is_same = |known: &[u8]| {
            let rest = known.strip_prefix(self.digest.as_bytes());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"."))
        };
        job.bytes("request", is_same) == Some(true)
    }

    /// Adds a field that is not part of the request.
    pub(crate) fn add(&mut self, name: &'static str, value: impl Into<Vec<u8>>) {
        self.fields.push((name, value.into()));
    }
}

/// The new job of a user; of nobody, if it did not come from a client's command.
pub(crate) fn new(user: &str, picture: Picture, prompts: &[String], options: &Options) -> New {
    let said = said(picture.source, prompts, options);
    let digest = digest(&said, picture.bytes.as_ref().map(Bytes::as_slice));
    let mut fields: Fields = vec![("request", digest.clone().into())];
    fields.extend(said);
    for (name, said, default) in [
        ("timeout", options.timeout, settings::DEFAULT_TIMEOUT_MS.signed()),
        ("retries", options.retries, settings::DEFAULT_RETRIES.signed()),
        ("ttl", options.ttl, settings::DEFAULT_TTL.signed()),
        ("exif", options.exif.map(i64::from), settings::EXIF.get().into()),
    ] {
        if said.is_none() {
            fields.push((name, default.to_string().into()));
        }
    }
    // Another attempt draws the same: it is no part of the request.
    if options.is_drawn() && options.seed.is_none() {
        let seed = u64::from_ne_bytes(server::random()) & u64::from(u32::MAX);
        fields.push(("seed", seed.to_string().into()));
    }
    if !user.is_empty() {
        fields.push(("user", user.into()));
    }
    fields.push(("submitted_at", server::unix_ms().to_string().into()));
    fields.extend(new_fields());
    New { fields, data: picture.bytes, digest }
}

/// What the client has said, as the job's fields.
fn said(source: String, prompts: &[String], options: &Options) -> Fields {
    let prompt = match prompts {
        // One that would be read as a list is written as a list of one.
        [prompt] if serde_json::from_str::<Vec<String>>(prompt).is_err() => prompt.clone(),
        prompts => serde_json::json!(prompts).to_string(),
    };
    let mut said: Fields = vec![("image", source.into()), ("prompt", prompt.into())];
    for (name, number) in [
        ("priority", Some(options.priority)),
        ("timeout", options.timeout),
        ("retries", options.retries),
        ("ttl", options.ttl),
        ("beams", options.beams),
        ("nbest_count", options.n_best),
        ("maxtokens", options.max_tokens),
        ("exif", options.exif.map(i64::from)),
        ("nocache", options.no_cache.then_some(1)),
        ("thumbnail_px", options.thumbnail),
        ("delay", options.delay),
        ("expires", options.expires),
        ("margin", options.margin),
        ("ngram", options.ngram),
        ("top_k", options.top_k),
        ("seed", options.seed),
    ] {
        said.extend(number.map(|number| (name, number.to_string().into())));
    }
    for (name, decimal) in [
        ("length_penalty", options.length_penalty),
        ("temperature", options.temperature),
        ("top_p", options.top_p),
    ] {
        said.extend(decimal.map(|decimal| (name, decimal.to_string().into())));
    }
    if !options.steps.is_empty() {
        said.push(("steps", steps::written(&options.steps).into()));
    }
    said.extend(options.stream.clone().map(|stream| ("stream", stream)));
    said.extend(options.model.clone().map(|model| ("wants", model.into())));
    said
}

fn digest(said: &Fields, data: Option<&[u8]>) -> String {
    let mut digest = Sha256::new();
    for (name, value) in said {
        digest.update((name.len() as u64).to_le_bytes());
        digest.update(name);
        digest.update((value.len() as u64).to_le_bytes());
        digest.update(value);
    }
    // As text: clients that decode a job's hash expect nothing else.
    let text = |digest: &[u8]| BASE64_STANDARD.encode(&digest[..16]);
    let said = text(&digest.finalize());
    // The main thread has no time for more: this one is ten times as fast, and a client that makes
    // two pictures of one digest only deceives itself.
    match data {
        Some(data) => format!("{said}.{}", text(&xxh3_128(data).to_le_bytes())),
        None => said,
    }
}

/// Stores a new job where the server takes writes: nobody else sees what is in it. Gives what the
/// queue is to know.
pub(crate) fn store(ctx: &Context, key: &RedisString, mut new: New) -> Seen {
    let mut fields: Vec<(RedisString, RedisString)> =
        new.fields.iter().map(|(name, value)| server::field(ctx, name, value)).collect();
    // The bytes are given away: another copy of a large picture takes the main thread too long.
    match new.data.take() {
        Some(Bytes::Ours(bytes)) => fields.push(server::field(ctx, "data", &bytes)),
        Some(Bytes::Servers(string)) => fields.push((server::string(ctx, b"data"), string)),
        None => {}
    }
    server::set_fields(ctx, key, &fields);
    figures::SUBMITTED.add(1);
    Job::new(&new.fields).seen(|_token| false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::record::CONTENT;

    #[test]
    fn all_that_is_said_decides_the_answer_or_how_the_job_is_run() {
        const RUN: [&str; 9] = [
            "priority",
            "timeout",
            "retries",
            "ttl",
            "nocache",
            "thumbnail_px",
            "delay",
            "expires",
            "stream",
        ];
        let step = Step { link: Link::Crop, prompt: "<OCR>".to_owned() };
        // An option that is new has to be named here.
        let options = Options {
            priority: 1,
            delay: Some(1),
            expires: Some(1),
            model: Some("tiny".to_owned()),
            timeout: Some(1),
            retries: Some(1),
            ttl: Some(1),
            beams: Some(1),
            n_best: Some(1),
            max_tokens: Some(1),
            exif: Some(true),
            no_cache: true,
            thumbnail: Some(1),
            stream: Some(b"text".to_vec()),
            steps: vec![step],
            margin: Some(1),
            length_penalty: Some(1.0),
            ngram: Some(1),
            temperature: Some(1.0),
            top_k: Some(1),
            top_p: Some(1.0),
            seed: Some(1),
        };
        let said = said("/a.png".to_owned(), &["<OD>".to_owned()], &options);
        let mut names: Vec<&str> = said.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        let mut known = [&CONTENT[..], &RUN].concat();
        known.sort_unstable();
        assert_eq!(names, known);
    }
}
