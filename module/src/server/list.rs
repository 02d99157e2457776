//! Lists, read in place: a command finds each element anew, and counts it in the server's figures.

use std::ffi::c_long;

use redis_module::{Context, RedisString, raw};

use super::{
    Look, Value, has_type,
    hash::{close, open},
};

/// The elements of a list from right to left, read under the server's lock while the list does not
/// change. The first one is found as quickly as the server can, the others lie beside it.
pub(crate) struct Leftward {
    key: *mut raw::RedisModuleKey,
    /// Counted from the right end.
    next: usize,
}

impl Leftward {
    /// From the element on that has so many at its right; a key that is no list has none.
    pub(crate) fn from(ctx: &Context, key: &RedisString, right_of_it: usize) -> Self {
        Self { key: open(ctx, key, Look::Unseen), next: right_of_it }
    }
}

impl Iterator for Leftward {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        if self.key.is_null() || !has_type(self.key, raw::REDISMODULE_KEYTYPE_LIST) {
            return None;
        }
        // -1 is the last one.
        let index = -1 - c_long::try_from(self.next).ok()?;
        let element = api!(RedisModule_ListGet(self.key, index));
        self.next += 1;
        (!element.is_null()).then(|| Value::new(element))
    }
}

impl Drop for Leftward {
    fn drop(&mut self) {
        close(self.key);
    }
}
