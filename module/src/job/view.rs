//! A job as clients see it: FLORENCE.GET's map, and the same as the JSON that is published.

use redis_module::Context;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use super::{Job, State, past, steps};
use crate::server::reply;

/// What an entry of the map is.
enum Shown {
    Nothing,
    Text(String),
    Number(i64),
    /// Text in a reply, itself in JSON.
    Json(String),
}

impl From<Option<String>> for Shown {
    fn from(text: Option<String>) -> Self {
        text.map_or(Self::Nothing, Self::Text)
    }
}

impl From<Option<i64>> for Shown {
    fn from(number: Option<i64>) -> Self {
        number.map_or(Self::Nothing, Self::Number)
    }
}

/// What the queue knows of a job.
pub(crate) struct Progress {
    /// Where the job stands: a claim that nobody holds any more waits again.
    pub(crate) state: State,
    pub(crate) phase: Option<&'static str>,
    pub(crate) tokens: Option<i64>,
    pub(crate) position: Option<i64>,
    pub(crate) eta_ms: Option<i64>,
}

impl Progress {
    /// Of a job about which there is no more to know than its hash says.
    pub(crate) fn at(state: State) -> Self {
        Self { state, phase: None, tokens: None, position: None, eta_ms: None }
    }
}

/// What a job's map tells, but for its key. What cannot be there yet is not looked for.
fn entries(job: &Job, progress: &Progress) -> [(&'static str, Shown); 28] {
    let attempts = job.number("attempts").unwrap_or_default();
    let (is_tried, is_done) = (attempts > 0, job.state == State::Done);
    let text = |is_there: bool, field| is_there.then(|| job.text(field)).flatten();
    let number = |is_there: bool, field| Shown::from(is_there.then(|| job.number(field)).flatten());
    let steps = job.text("steps").filter(|text| steps::read(text).is_some());
    [
        ("attempts", Shown::Number(attempts)),
        ("cache", text(is_done, "cache").into()),
        ("due_at", job.due_at().into()),
        ("error", if is_done { Shown::Nothing } else { error(job) }),
        ("errors", past::shown(job).map_or(Shown::Nothing, Shown::Json)),
        ("eta_ms", progress.eta_ms.into()),
        ("fetch_ms", number(is_tried, "fetch_ms")),
        ("finished_at", number(job.state.is_final(), "finished_at")),
        ("height", number(is_done, "height")),
        ("image", job.shown_image().into()),
        ("infer_ms", number(is_tried, "infer_ms")),
        ("model", text(is_done, "model").into()),
        ("nbest", own_json(text(is_done, "nbest"))),
        ("phase", progress.phase.map(str::to_owned).into()),
        ("position", progress.position.into()),
        ("prompt", one_or_list::<String>(text(true, "prompt"))),
        ("queue_ms", number(is_tried, "queue_ms")),
        ("result", own_json(text(is_done, "result"))),
        ("retry_at", number(progress.state == State::Retrying, "retry_at")),
        ("scores", own_json(text(is_done, "scores"))),
        ("started_at", number(is_tried, "started_at")),
        ("state", Shown::Text(progress.state.name().to_owned())),
        ("steps", steps.map_or(Shown::Nothing, Shown::Json)),
        ("stream", text(true, "stream").into()),
        ("submitted_at", number(true, "submitted_at")),
        ("text", one_or_list::<Value>(text(is_done, "text"))),
        ("tokens", if is_done { job.number("tokens") } else { progress.tokens }.into()),
        ("width", number(is_done, "width")),
    ]
}

/// What we have written as JSON; anybody may have written something else there.
fn own_json(text: Option<String>) -> Shown {
    let is_json = |text: &str| serde_json::from_str::<IgnoredAny>(text).is_ok();
    match text {
        Some(json) if is_json(&json) => Shown::Json(json),
        other => other.into(),
    }
}

/// Several prompts and their texts are JSON lists; a raw text begins with a token.
fn one_or_list<T: DeserializeOwned>(text: Option<String>) -> Shown {
    let is_list = |text: &str| serde_json::from_str::<Vec<T>>(text).is_ok();
    match text {
        Some(list) if list.starts_with('[') && is_list(&list) => Shown::Json(list),
        one => one.into(),
    }
}

fn error(job: &Job) -> Shown {
    let (Some(code), Some(message)) = (job.text("error_code"), job.text("error")) else {
        return Shown::Nothing;
    };
    let is_retryable = job.number("error_retryable") == Some(1);
    let error = serde_json::json!({ "code": code, "message": message, "retryable": is_retryable });
    Shown::Json(error.to_string())
}

/// Replies the map of FLORENCE.GET and FLORENCE.WAIT.
pub(crate) fn reply(ctx: &Context, key: &[u8], job: &Job, progress: &Progress) {
    let entries = entries(job, progress);
    let map = reply::Map::begin(ctx, entries.len() + 1);
    let mut has_id = false;
    for (name, shown) in entries {
        // By name.
        if !has_id && name > "id" {
            map.bytes("id", key);
            has_id = true;
        }
        match shown {
            Shown::Nothing => map.null(name),
            Shown::Number(number) => map.number(name, number),
            Shown::Text(text) | Shown::Json(text) => map.bytes(name, text.as_bytes()),
        }
    }
}

/// The same of a job that has ended, as a JSON object; what is not known is left out.
pub(crate) fn json(key: &[u8], job: &Job) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let mut json = format!("{{\"id\":{}", quoted(&String::from_utf8_lossy(key)));
    for (name, shown) in entries(job, &Progress::at(job.state)) {
        let value = match shown {
            Shown::Nothing => continue,
            Shown::Number(number) => number.to_string(),
            Shown::Text(text) => quoted(&text),
            Shown::Json(json) => json,
        };
        json.extend([",\"", name, "\":", &value]);
    }
    json.push('}');
    json
}
