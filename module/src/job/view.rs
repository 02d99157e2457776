//! A job as clients see it: FLORENCE.GET's map, and the same as the JSON that is published.

use redis_module::RedisValue;

use super::{Job, State};
use crate::server::reply::{self, bulk};

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

fn entries(job: &Job, progress: &Progress) -> [(&'static str, Shown); 20] {
    let text = |field| Shown::from(job.text(field));
    let number = |field| Shown::from(job.number(field));
    let several = |field| match job.text(field) {
        Some(list) if serde_json::from_str::<Vec<String>>(&list).is_ok() => Shown::Json(list),
        one => one.into(),
    };
    let error = match (job.text("error_code"), job.text("error")) {
        (Some(code), Some(message)) => {
            let is_retryable = job.number("error_retryable") == Some(1);
            Shown::Json(
                serde_json::json!({ "code": code, "message": message, "retryable": is_retryable })
                    .to_string(),
            )
        }
        _ => Shown::Nothing,
    };
    [
        ("state", Shown::Text(progress.state.name().to_owned())),
        ("prompt", several("prompt")),
        ("image", job.shown_image().into()),
        ("result", job.text("result").map_or(Shown::Nothing, Shown::Json)),
        ("text", several("text")),
        ("error", error),
        ("attempts", Shown::Number(job.number("attempts").unwrap_or_default())),
        ("model", text("model")),
        ("submitted_at", number("submitted_at")),
        ("started_at", number("started_at")),
        ("finished_at", number("finished_at")),
        ("queue_ms", number("queue_ms")),
        ("fetch_ms", number("fetch_ms")),
        ("infer_ms", number("infer_ms")),
        ("tokens", progress.tokens.or(job.number("tokens")).into()),
        ("cache", text("cache")),
        ("phase", progress.phase.map(str::to_owned).into()),
        ("position", progress.position.into()),
        ("eta_ms", progress.eta_ms.into()),
        (
            "retry_at",
            if progress.state == State::Retrying { number("retry_at") } else { Shown::Nothing },
        ),
    ]
}

/// The map that FLORENCE.GET and FLORENCE.WAIT reply.
pub(crate) fn map(key: &[u8], job: &Job, progress: &Progress) -> RedisValue {
    let id = ("id", RedisValue::StringBuffer(key.to_vec()));
    let entries = entries(job, progress).map(|(name, shown)| {
        let value = match shown {
            Shown::Nothing => RedisValue::Null,
            Shown::Number(number) => RedisValue::Integer(number),
            Shown::Text(text) | Shown::Json(text) => bulk(text),
        };
        (name, value)
    });
    reply::map([id].into_iter().chain(entries))
}

/// The same of a job that has ended, as a JSON object; what is not known is left out.
pub(crate) fn json(key: &[u8], job: &Job) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
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
