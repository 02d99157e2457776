//! The hashes that are there, slice by slice.

use std::ffi::c_void;

use redis_module::{Context, RedisString, raw};

use super::{Db, callbacks::guard, has_type, select_db};

/// A walk over the hashes of a database.
///
/// Keys that are there throughout are found; others may be, or not.
pub(crate) struct Scan {
    db: Db,
    cursor: *mut raw::RedisModuleScanCursor,
}

// SAFETY: the cursor is only ever used under the server's lock.
unsafe impl Send for Scan {}

impl Scan {
    pub(crate) fn new(db: Db) -> Self {
        Self { db, cursor: api!(RedisModule_ScanCursorCreate()) }
    }

    /// The hashes among the next keys, of which there are about so many; `None` at the end.
    pub(crate) fn next(&mut self, ctx: &Context, about: usize) -> Option<Vec<Vec<u8>>> {
        select_db(ctx, self.db);
        let mut found: Vec<Vec<u8>> = Vec::new();
        let mut is_over = false;
        // A call looks at a bucket of the table: about one key.
        for _ in 0..about {
            if is_over {
                break;
            }
            let data: *mut Vec<Vec<u8>> = &raw mut found;
            let more =
                api!(RedisModule_Scan(ctx.get_raw(), self.cursor, Some(on_key), data.cast()));
            is_over = more == 0;
        }
        (!found.is_empty() || !is_over).then_some(found)
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        api!(RedisModule_ScanCursorDestroy(self.cursor));
    }
}

extern "C" fn on_key(
    _ctx: *mut raw::RedisModuleCtx,
    name: *mut raw::RedisModuleString,
    key: *mut raw::RedisModuleKey,
    found: *mut c_void,
) {
    guard((), || {
        if !key.is_null() && !has_type(key, raw::REDISMODULE_KEYTYPE_HASH) {
            return;
        }
        // SAFETY: `next` passes its list, and waits.
        let found = unsafe { &mut *found.cast::<Vec<Vec<u8>>>() };
        found.push(RedisString::string_as_slice(name).to_vec());
    });
}
