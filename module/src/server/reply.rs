//! Errors as clients read them: the first word is the code.

use florence_engine::task::PromptError;
use redis_module::{RedisError, RedisValue};

pub(crate) fn error(code: &str, text: impl std::fmt::Display) -> RedisError {
    RedisError::String(format!("{code} {text}"))
}

pub(crate) fn syntax() -> RedisError {
    RedisError::Str("ERR syntax error")
}

pub(crate) fn not_an_integer(option: &str, min: i64, max: i64) -> RedisError {
    error("ERR", format!("{option} is not an integer from {min} to {max}"))
}

pub(crate) fn bad_prompt(problem: &PromptError) -> RedisError {
    error("BADPROMPT", problem)
}

pub(crate) fn foreign() -> RedisError {
    error("NOTAJOB", "the hash under this key is not a job")
}

pub(crate) fn bulk(text: impl Into<String>) -> RedisValue {
    RedisValue::BulkString(text.into())
}

/// A map, by name: RESP3 map, flat array in RESP2.
pub(crate) fn map(entries: impl IntoIterator<Item = (&'static str, RedisValue)>) -> RedisValue {
    RedisValue::OrderedMap(
        entries.into_iter().map(|(name, value)| (name.to_owned().into(), value)).collect(),
    )
}
