//! Clients that are blocked on keys.

use std::ffi::{c_int, c_longlong, c_void};

use redis_module::{Context, RedisError, RedisResult, RedisString, raw};

use super::{
    ERR,
    callbacks::{guard, handlers},
    reply, string,
};

/// A client that waits; the handle is good until the handler `freed` is called for it.
#[derive(Clone, Copy)]
pub(crate) struct BlockedClient(*mut raw::RedisModuleBlockedClient);

// SAFETY: the handle is only ever used under the server's lock, which makes one thread at a time
// its owner.
unsafe impl Send for BlockedClient {}

/// Blocks the calling client on keys, for ever if `timeout_ms` is 0.
pub(crate) fn block(
    ctx: &Context,
    keys: &[RedisString],
    timeout_ms: i64,
    id: u64,
) -> BlockedClient {
    let mut keys: Vec<*mut raw::RedisModuleString> = keys.iter().map(|key| key.inner).collect();
    BlockedClient(api!(RedisModule_BlockClientOnKeys(
        ctx.get_raw(),
        Some(on_key_ready),
        Some(on_timeout),
        Some(on_free),
        c_longlong::from(timeout_ms),
        keys.as_mut_ptr(),
        c_int::try_from(keys.len()).unwrap_or(c_int::MAX),
        id as *mut c_void,
    )))
}

/// A client that waits for one reply, whenever it comes; dropped, it gets an error.
pub(crate) struct Asking {
    client: *mut raw::RedisModuleBlockedClient,
    has_reply: bool,
}

// SAFETY: the handle has one owner; the server allows its use from any thread.
unsafe impl Send for Asking {}

impl Asking {
    /// Blocks the calling client until there is a reply.
    pub(crate) fn begin(ctx: &Context) -> Self {
        let client = api!(RedisModule_BlockClient(ctx.get_raw(), None, None, None, 0));
        Self { client, has_reply: false }
    }

    pub(crate) fn reply(mut self, reply: RedisResult) {
        self.send(reply);
    }

    fn send(&mut self, reply: RedisResult) {
        self.has_reply = true;
        let raw = api!(RedisModule_GetThreadSafeContext(self.client));
        let ctx = Context::new(raw);
        ctx.reply(reply::send_error(&ctx, reply));
        api!(RedisModule_FreeThreadSafeContext(raw));
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        if !self.has_reply {
            self.send(Err(RedisError::Str("ERR florence internal error")));
        }
        api!(RedisModule_UnblockClient(self.client, std::ptr::null_mut()));
    }
}

/// Ends a client's wait: it is answered null. Under the server's lock only.
pub(crate) fn unblock(client: BlockedClient) {
    api!(RedisModule_UnblockClient(client.0, std::ptr::null_mut()));
}

/// Lets the server ask the clients that are blocked on a key.
pub(crate) fn signal_key(ctx: &Context, key: &[u8]) {
    api!(RedisModule_SignalKeyAsReady(ctx.get_raw(), string(ctx, key).inner));
}

extern "C" fn on_key_ready(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    guard(ERR, || {
        let context = Context::new(ctx);
        let key = api!(RedisModule_GetBlockedClientReadyKey(ctx));
        if key.is_null() {
            return ERR;
        }
        // The server keeps its own reference: this one must be counted too.
        let key = RedisString::new(std::ptr::NonNull::new(ctx), key);
        match (handlers().key_ready)(&context, &key) {
            Some(reply) => context.reply(reply::send_error(&context, reply)) as c_int,
            None => ERR,
        }
    })
}

extern "C" fn on_timeout(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    api!(RedisModule_ReplyWithNull(ctx))
}

extern "C" fn on_free(_ctx: *mut raw::RedisModuleCtx, id: *mut c_void) {
    guard((), || (handlers().freed)(id as u64));
}
