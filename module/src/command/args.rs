//! A cursor over a command's arguments; mistakes become the error replies Redis users know.

use redis_module::{RedisError, RedisString};

use crate::{
    job::limits::{KEYS, Limit, Range},
    server::reply,
};

pub(crate) struct Args {
    left: std::vec::IntoIter<RedisString>,
}

impl Args {
    /// The arguments after the command's name.
    pub(crate) fn new(args: Vec<RedisString>) -> Self {
        let mut left = args.into_iter();
        left.next();
        Self { left }
    }

    pub(crate) fn next(&mut self) -> Result<RedisString, RedisError> {
        self.left.next().ok_or(RedisError::WrongArity)
    }

    /// The next argument, if there is one.
    pub(crate) fn option(&mut self) -> Option<RedisString> {
        self.left.next()
    }

    /// All arguments that are left, but no more keys than a command may have; `others` are none.
    pub(crate) fn keys(&mut self, others: usize) -> Result<Vec<RedisString>, RedisError> {
        let keys = self.left.len().saturating_sub(others);
        if keys == 0 {
            return Err(RedisError::WrongArity);
        }
        if keys > KEYS {
            return Err(reply::error("ERR", format!("too many keys: {keys}, more than {KEYS}")));
        }
        Ok(self.left.by_ref().take(keys).collect())
    }

    /// Refuses what is left over.
    pub(crate) fn finish(&mut self) -> Result<(), RedisError> {
        self.left.next().map_or(Ok(()), |arg| Err(reply::syntax(arg.as_slice())))
    }

    /// The value after an option.
    pub(crate) fn value(&mut self, option: &str) -> Result<RedisString, RedisError> {
        self.left.next().ok_or_else(|| reply::syntax(option.as_bytes()))
    }

    /// The integer after an option.
    pub(crate) fn integer(&mut self, option: &str, min: i64, max: i64) -> Result<i64, RedisError> {
        let value = self.value(option)?;
        let value = value.parse_integer().ok();
        value
            .filter(|value| (min..=max).contains(value))
            .ok_or_else(|| reply::not_an_integer(option, min, max))
    }

    /// The number after an option, which need not be whole.
    pub(crate) fn ranged(&mut self, range: Range) -> Result<f64, RedisError> {
        let value = self.value(range.option)?.parse_float().ok();
        value.filter(|value| range.holds(*value)).ok_or_else(|| {
            let Range { option, least, most } = range;
            reply::error("ERR", format!("{option} is not a number from {least} to {most}"))
        })
    }

    /// The integer after an option that has a limit.
    pub(crate) fn limited(&mut self, limit: Limit) -> Result<i64, RedisError> {
        self.integer(limit.option, limit.least, limit.most)
    }
}

/// Whether an argument is a word, in any case.
pub(crate) fn is_word(arg: &RedisString, word: &str) -> bool {
    arg.as_slice().eq_ignore_ascii_case(word.as_bytes())
}

/// Text of an argument.
pub(crate) fn utf8(arg: &RedisString, what: &str) -> Result<String, RedisError> {
    String::from_utf8(arg.as_slice().to_vec())
        .map_err(|_not_text| reply::error("ERR", format!("{what} is not valid UTF-8")))
}
