//! What a new job is to answer: checked as far as it can be before anything is stored, then written
//! as the job's first fields.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_engine::task::Prompt;
use redis_module::{Context, RedisError};
use sha2::{Digest, Sha256};

use super::{Fields, record::new_fields, write};
use crate::{
    figures,
    model::{self, Model},
    server::{self, reply},
    settings, source,
};

/// Where the picture comes from.
pub(crate) struct Picture {
    /// As GET shows it: the URI, `DATA`, `KEY name` or `data:image/png`.
    shown: String,
    bytes: Option<Vec<u8>>,
}

impl Picture {
    /// Bytes that come with the request.
    pub(crate) fn sent(shown: String, bytes: Vec<u8>) -> Result<Self, RedisError> {
        let limit = settings::MAX_IMAGE_BYTES.size();
        if bytes.is_empty() {
            return Err(reply::error("ERR", "the image is empty"));
        }
        if bytes.len() > limit {
            let text =
                format!("the image has {} bytes, florence.max-image-bytes is {limit}", bytes.len());
            return Err(reply::error("ERR", text));
        }
        Ok(Self { shown, bytes: Some(bytes) })
    }

    /// What a URI names, if it may be fetched; the bytes of a `data:` URL.
    pub(crate) fn at(uri: String) -> Result<Self, RedisError> {
        if let Some(inline) = source::inline(&uri) {
            let (shown, bytes) = inline?;
            return Self::sent(shown, bytes);
        }
        source::check(&uri)?;
        Ok(Self { shown: uri, bytes: None })
    }
}

/// How a job is to be run; times in milliseconds, but the TTL in seconds.
pub(crate) struct Options {
    pub(crate) priority: i64,
    pub(crate) delay: Option<i64>,
    pub(crate) expires: Option<i64>,
    pub(crate) model: Option<String>,
    pub(crate) timeout: i64,
    pub(crate) retries: i64,
    pub(crate) ttl: i64,
    pub(crate) beams: Option<i64>,
    pub(crate) max_tokens: Option<i64>,
    pub(crate) no_cache: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            priority: 0,
            delay: None,
            expires: None,
            model: None,
            timeout: settings::DEFAULT_TIMEOUT_MS.signed(),
            retries: settings::DEFAULT_RETRIES.signed(),
            ttl: settings::DEFAULT_TTL.signed(),
            beams: None,
            max_tokens: None,
            no_cache: false,
        }
    }
}

/// Checks prompts as far as they can be: the tokenizer is there once the model is.
pub(crate) fn check_prompts(prompts: &[String], wanted: Option<&str>) -> Result<(), RedisError> {
    let model = model::model();
    let florence = match &model {
        Model::Ready(loaded) => Some(&loaded.florence),
        Model::Loading => None,
        Model::Failed(problem) => return Err(reply::error("NOMODEL", problem)),
    };
    if let (Some(wanted), Some(florence)) = (wanted, florence)
        && wanted != florence.name()
    {
        let text = format!("this server's model is {}", florence.name());
        return Err(reply::error("NOMODEL", text));
    }
    prompts.iter().try_for_each(|prompt| {
        let checked = match florence {
            Some(florence) => florence.question(prompt).map(|_question| ()),
            None => prompt.parse::<Prompt>().map(|_prompt| ()),
        };
        checked.map_err(|problem| reply::bad_prompt(&problem))
    })
}

/// The fields of a new job.
pub(crate) fn fields(picture: Picture, prompts: &[String], options: &Options) -> Fields {
    let prompt = match prompts {
        [prompt] => prompt.clone(),
        prompts => serde_json::json!(prompts).to_string(),
    };
    let mut request: Fields = vec![
        ("image", picture.shown.into()),
        ("prompt", prompt.into()),
        ("priority", options.priority.to_string().into()),
        ("timeout", options.timeout.to_string().into()),
        ("retries", options.retries.to_string().into()),
        ("ttl", options.ttl.to_string().into()),
    ];
    let mut number = |name, value: Option<i64>| {
        if let Some(value) = value {
            request.push((name, value.to_string().into()));
        }
    };
    number("beams", options.beams);
    number("maxtokens", options.max_tokens);
    number("nocache", options.no_cache.then_some(1));
    number("delay", options.delay);
    number("expires", options.expires);
    if let Some(model) = &options.model {
        request.push(("wants", model.clone().into()));
    }
    if let Some(bytes) = picture.bytes {
        request.push(("data", bytes));
    }
    let mut digest = Sha256::new();
    for (name, value) in &request {
        digest.update((name.len() as u64).to_le_bytes());
        digest.update(name);
        digest.update((value.len() as u64).to_le_bytes());
        digest.update(value);
    }
    // As text: clients that decode a job's hash expect nothing else.
    let digest = BASE64_STANDARD.encode(&digest.finalize()[..16]);
    let mut fields = vec![("request", digest.into())];
    fields.extend(request);
    fields.push(("submitted_at", server::unix_ms().to_string().into()));
    fields.extend(new_fields());
    fields
}

/// The digest of the request, which [`fields`] puts first.
pub(crate) fn request_of(fields: &Fields) -> &[u8] {
    &fields[0].1
}

/// Stores a new job. Its own keyspace event queues it.
pub(crate) fn store(ctx: &Context, key: &[u8], fields: &Fields) -> Result<(), String> {
    write(ctx, key, fields)?;
    figures::SUBMITTED.add(1);
    Ok(())
}
