//! The values of string keys.

use std::ffi::c_int;

use redis_module::{Context, RedisError, RedisString, raw};

use super::{has_type, string};

/// Why a key gives no string.
pub(crate) enum NoString {
    Missing,
    WrongType,
    /// The caller does not want one of its size.
    Refused(RedisError),
}

/// A copy of the value of a string key, if its size is accepted.
pub(crate) fn string_of(
    ctx: &Context,
    key: &RedisString,
    accept: impl FnOnce(usize) -> Result<(), RedisError>,
) -> Result<RedisString, NoString> {
    const READ: c_int = raw::REDISMODULE_READ.cast_signed();
    let opened: *mut raw::RedisModuleKey =
        api!(RedisModule_OpenKey(ctx.get_raw(), key.inner, READ)).cast();
    if opened.is_null() {
        return Err(NoString::Missing);
    }
    let value = if has_type(opened, raw::REDISMODULE_KEYTYPE_STRING) {
        let mut length = 0;
        let start = api!(RedisModule_StringDMA(opened, &raw mut length, READ));
        // SAFETY: the server lends so many bytes until the key is closed or written.
        let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), length) };
        accept(length).map(|()| string(ctx, bytes)).map_err(NoString::Refused)
    } else {
        Err(NoString::WrongType)
    };
    api!(RedisModule_CloseKey(opened));
    value
}
