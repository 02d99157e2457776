//! Replies: errors as clients read them, whose first word is the code, and maps.

use std::{ffi::CString, fmt::Display};

use redis_module::{Context, RedisError, RedisResult, RedisValue, raw};

use super::{one_line, printable};

pub(crate) fn error(code: &str, text: impl Display) -> RedisError {
    RedisError::String(format!("{code} {text}"))
}

/// Sends what is an error, in one line of UTF-8 whatever a client's words in it hold: the crate takes
/// the low byte of each character, and panics if that is zero.
pub(crate) fn send_error(ctx: &Context, reply: RedisResult) -> RedisResult {
    let text = match reply {
        Err(RedisError::String(text)) => text,
        other => return other,
    };
    let text = CString::new(one_line(&text)).unwrap_or_default();
    api!(RedisModule_ReplyWithError(ctx.get_raw(), text.as_ptr()));
    Ok(RedisValue::NoReply)
}

/// Names the argument that is no option, or that lacks its value.
pub(crate) fn syntax(near: &[u8]) -> RedisError {
    error("ERR", format!("syntax error near '{}'", printable(near)))
}

pub(crate) fn not_an_integer(option: &str, min: i64, max: i64) -> RedisError {
    error("ERR", format!("{option} is not an integer from {min} to {max}"))
}

pub(crate) fn bad_prompt(problem: &impl Display) -> RedisError {
    error("BADPROMPT", problem)
}

pub(crate) fn foreign() -> RedisError {
    error("NOTAJOB", "the hash under this key is not a job")
}

pub(crate) fn bulk(text: impl Into<String>) -> RedisValue {
    RedisValue::BulkString(text.into())
}

/// A map that is written as it comes: what is asked for most often. RESP3 map, flat array in RESP2.
pub(crate) struct Map<'a>(&'a Context);

impl<'a> Map<'a> {
    /// Begins the reply to a command: so many entries follow.
    pub(crate) fn begin(ctx: &'a Context, entries: usize) -> Self {
        let entries = std::ffi::c_long::try_from(entries).unwrap_or_default();
        api!(RedisModule_ReplyWithMap(ctx.get_raw(), entries));
        Self(ctx)
    }

    fn string(&self, bytes: &[u8]) {
        let ctx = self.0.get_raw();
        api!(RedisModule_ReplyWithStringBuffer(ctx, bytes.as_ptr().cast(), bytes.len()));
    }

    pub(crate) fn bytes(&self, name: &str, bytes: &[u8]) {
        self.string(name.as_bytes());
        self.string(bytes);
    }

    pub(crate) fn number(&self, name: &str, number: i64) {
        self.string(name.as_bytes());
        api!(RedisModule_ReplyWithLongLong(self.0.get_raw(), number));
    }

    pub(crate) fn null(&self, name: &str) {
        self.string(name.as_bytes());
        api!(RedisModule_ReplyWithNull(self.0.get_raw()));
    }
}

/// A map, by name: RESP3 map, flat array in RESP2.
pub(crate) fn map(entries: impl IntoIterator<Item = (&'static str, RedisValue)>) -> RedisValue {
    RedisValue::OrderedMap(
        entries.into_iter().map(|(name, value)| (name.to_owned().into(), value)).collect(),
    )
}
