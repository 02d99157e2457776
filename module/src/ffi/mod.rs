//! The module's only hand-written unsafe code: what the redis-module crate does not wrap.
//!
//! Raw pointers do not leave this module, but for the opaque [`BlockedClient`]. Every callback that
//! the server makes catches panics: a panic must not unwind into C.
#![expect(unsafe_code, reason = "the Redis module API")]

use std::{
    ffi::{CStr, c_int, c_longlong, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::null_mut,
    sync::OnceLock,
    time::Duration,
};

use redis_module::{Context, RedisString, raw};

use crate::{celery, command, events, state::SHARED, waiters};

/// Valkey's atomic slot migration asks modules for this bit; other servers ignore it.
const HANDLES_SLOT_MIGRATION: c_int = 1 << 5;

/// Calls an API function that [`check_server`] has found.
macro_rules! api {
    ($name:ident ( $($arg:expr),* $(,)? )) => {{
        // SAFETY: reading a pointer that is set once, while the module loads.
        let function = unsafe { raw::$name };
        let function = function.expect("check_server refuses servers without it");
        // SAFETY: the arguments are live objects of the server, used under its lock, as the
        // callers of this module's functions have it: they hold a `Context`.
        unsafe { function($($arg),*) }
    }};
}

mod describe;

pub(crate) use describe::{CommandInfo, KeyBegin, KeySpec, describe};

macro_rules! require {
    ($($name:ident),* $(,)?) => {
        // SAFETY: reading pointers that are set once, while the module loads.
        [$((stringify!($name), unsafe { let pointer = raw::$name; pointer.is_some() })),*]
    };
}

/// Whether the server has all that this module needs.
pub(crate) fn check_server() -> Result<(), String> {
    let needed = require![
        RedisModule_BlockClientOnKeys,
        RedisModule_UnblockClient,
        RedisModule_SignalKeyAsReady,
        RedisModule_GetBlockedClientReadyKey,
        RedisModule_GetBlockedClientPrivateData,
        RedisModule_AvoidReplicaTraffic,
        RedisModule_SetModuleOptions,
        RedisModule_SubscribeToServerEvent,
        RedisModule_SubscribeToKeyspaceEvents,
        RedisModule_SetCommandInfo,
        RedisModule_GetCommand,
        RedisModule_SelectDb,
        RedisModule_GetSelectedDb,
        RedisModule_EventLoopAddOneShot,
        RedisModule_CreateTimer,
        RedisModule_NotifyKeyspaceEvent,
        RedisModule_ReplyWithNull,
        RedisModule_GetRandomBytes,
        RedisModule_RegisterCommandFilter,
        RedisModule_CommandFilterArgsCount,
        RedisModule_CommandFilterArgGet,
        RedisModule_CommandFilterArgReplace,
    ];
    match needed.into_iter().find(|(_, is_there)| !is_there) {
        Some((name, _)) => Err(format!("this server lacks {name}: Redis 7.0 or newer is needed")),
        None => Ok(()),
    }
}

pub(crate) fn set_module_options(ctx: &Context) {
    api!(RedisModule_SetModuleOptions(ctx.get_raw(), HANDLES_SLOT_MIGRATION));
}

/// Keeps candle from starting a pool of its own, whose threads spin: the engine's pool does all.
pub(crate) fn limit_candle() {
    const NAME: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(NAME).is_none() {
        // SAFETY: called from OnLoad, before any thread of ours starts; at start-up the server
        // has no other threads yet, and it does not change its environment later.
        unsafe { std::env::set_var(NAME, "1") };
    }
}

/// Runs `f` and counts a panic instead of letting it into C.
fn guard<T>(fallback: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_panic| {
        crate::state::Counters::add(&SHARED.counters.panics, 1);
        fallback
    })
}

/// `REDISMODULE_OK` and `REDISMODULE_ERR`.
const OK: c_int = 0;
const ERR: c_int = 1;

// Events.

/// Registers for the keyspace and server events that the scheduler lives on.
pub(crate) fn subscribe(ctx: &Context) -> Result<(), String> {
    let wanted = raw::REDISMODULE_NOTIFY_GENERIC
        | raw::REDISMODULE_NOTIFY_STRING
        | raw::REDISMODULE_NOTIFY_HASH
        | raw::REDISMODULE_NOTIFY_EXPIRED
        | raw::REDISMODULE_NOTIFY_EVICTED
        | raw::REDISMODULE_NOTIFY_LOADED;
    subscribe_to_keys(ctx, wanted)?;
    for id in [
        raw::REDISMODULE_EVENT_REPLICATION_ROLE_CHANGED,
        raw::REDISMODULE_EVENT_FLUSHDB,
        raw::REDISMODULE_EVENT_LOADING,
        raw::REDISMODULE_EVENT_SHUTDOWN,
        raw::REDISMODULE_EVENT_SWAPDB,
    ] {
        let event = raw::RedisModuleEvent { id, dataver: 1 };
        let raw_ctx = ctx.get_raw();
        if api!(RedisModule_SubscribeToServerEvent(raw_ctx, event, Some(on_server_event))) != OK {
            return Err(format!("cannot subscribe to server event {id}"));
        }
    }
    Ok(())
}

fn subscribe_to_keys(ctx: &Context, wanted: c_int) -> Result<(), String> {
    let raw_ctx = ctx.get_raw();
    match api!(RedisModule_SubscribeToKeyspaceEvents(raw_ctx, wanted, Some(on_keyspace_event))) {
        OK => Ok(()),
        _ => Err("cannot subscribe to keyspace events".to_owned()),
    }
}

/// Registers for the events of lists too.
pub(crate) fn watch_lists(ctx: &Context) -> Result<(), String> {
    subscribe_to_keys(ctx, raw::REDISMODULE_NOTIFY_LIST)
}

/// The channel that [`divert_publish`] was called for.
static DIVERTED: OnceLock<Vec<u8>> = OnceLock::new();

/// Lets the server run FLORENCE.CONTROL in the place of PUBLISH to a channel; rights are checked
/// after that, of the client.
pub(crate) fn divert_publish(ctx: &Context, channel: Vec<u8>) -> Result<(), String> {
    /// Not for commands of our own.
    const NOT_OURS: c_int = raw::REDISMODULE_CMDFILTER_NOSELF.cast_signed();
    DIVERTED.get_or_init(|| channel);
    let filter = api!(RedisModule_RegisterCommandFilter(ctx.get_raw(), Some(on_command), NOT_OURS));
    if filter.is_null() { Err("cannot register a command filter".to_owned()) } else { Ok(()) }
}

/// Called for every command of every client, so it leaves at the first difference.
extern "C" fn on_command(filter: *mut raw::RedisModuleCommandFilterCtx) {
    guard((), || {
        let arg = |index| {
            RedisString::string_as_slice(api!(RedisModule_CommandFilterArgGet(filter, index)))
        };
        if api!(RedisModule_CommandFilterArgsCount(filter)) == 3
            && arg(0).eq_ignore_ascii_case(b"publish")
            && DIVERTED.get().is_some_and(|channel| arg(1) == channel)
        {
            const COMMAND: &[u8] = b"florence.control";
            let name =
                api!(RedisModule_CreateString(null_mut(), COMMAND.as_ptr().cast(), COMMAND.len()));
            // The server takes the string over.
            api!(RedisModule_CommandFilterArgReplace(filter, 0, name));
        }
    });
}

extern "C" fn on_keyspace_event(
    ctx: *mut raw::RedisModuleCtx,
    kind: c_int,
    event: *const std::ffi::c_char,
    key: *mut raw::RedisModuleString,
) -> c_int {
    guard(OK, || {
        let name = RedisString::string_as_slice(key);
        if kind == raw::REDISMODULE_NOTIFY_LIST {
            celery::list_changed(name);
            return OK;
        }
        // SAFETY: the server passes a C string that lives as long as this call.
        let event = unsafe { CStr::from_ptr(event) };
        events::keyspace(&Context::new(ctx), event.to_bytes(), name);
        OK
    })
}

extern "C" fn on_server_event(
    ctx: *mut raw::RedisModuleCtx,
    event: raw::RedisModuleEvent,
    sub: u64,
    data: *mut c_void,
) {
    const ENDED: u64 = 1;
    guard((), || match (event.id, sub) {
        (raw::REDISMODULE_EVENT_REPLICATION_ROLE_CHANGED, _) => {
            events::role_changed(&Context::new(ctx));
        }
        (raw::REDISMODULE_EVENT_FLUSHDB, ENDED) => {
            // SAFETY: this event's data is this struct, alive as long as this call.
            let db = unsafe { (*data.cast::<raw::RedisModuleFlushInfo>()).dbnum };
            events::flushed((db >= 0).then_some(db));
        }
        (
            raw::REDISMODULE_EVENT_LOADING,
            raw::REDISMODULE_SUBEVENT_LOADING_ENDED | raw::REDISMODULE_SUBEVENT_LOADING_FAILED,
        ) => on_event_loop(&Context::new(ctx), events::role_changed),
        (raw::REDISMODULE_EVENT_LOADING, _) => events::loading_started(),
        (raw::REDISMODULE_EVENT_SHUTDOWN, _) => crate::workers::stop(),
        (raw::REDISMODULE_EVENT_SWAPDB, _) => {
            // SAFETY: as above.
            let swap = unsafe { *data.cast::<raw::RedisModuleSwapDbInfo>() };
            events::swapped(swap.dbnum_first, swap.dbnum_second);
        }
        _ => {}
    });
}

/// Calls `f` from the event loop, as soon as it turns.
pub(crate) fn on_event_loop(ctx: &Context, f: fn(&Context)) {
    ctx.create_timer(Duration::ZERO, |ctx, f: fn(&Context)| guard((), || f(ctx)), f);
}

/// Ends the wait of the event loop, so that what a thread has changed is acted on now.
pub(crate) fn wake_event_loop() {
    extern "C" fn nothing(_data: *mut c_void) {}
    api!(RedisModule_EventLoopAddOneShot(Some(nothing), null_mut()));
}

// Keys and databases.

pub(crate) fn selected_db(ctx: &Context) -> i32 {
    api!(RedisModule_GetSelectedDb(ctx.get_raw()))
}

pub(crate) fn select_db(ctx: &Context, db: i32) {
    if selected_db(ctx) != db {
        api!(RedisModule_SelectDb(ctx.get_raw(), db));
    }
}

/// A string of the server's, of any bytes.
pub(crate) fn string(ctx: &Context, bytes: &[u8]) -> RedisString {
    RedisString::create_from_slice(ctx.get_raw(), bytes)
}

/// Tells subscribers of keyspace events.
pub(crate) fn notify(ctx: &Context, event: &str, key: &[u8]) {
    ctx.notify_keyspace_event(raw::NotifyEvent::MODULE, event, &string(ctx, key));
}

/// Whether a write would break a pause of writes (failover, CLIENT PAUSE): servers abort on it.
pub(crate) fn are_writes_paused() -> bool {
    api!(RedisModule_AvoidReplicaTraffic()) != 0
}

/// Random bytes from the server.
pub(crate) fn random() -> [u8; 10] {
    let mut bytes = [0; 10];
    api!(RedisModule_GetRandomBytes(bytes.as_mut_ptr(), bytes.len()));
    bytes
}

// Blocked clients.

/// A client that waits; the handle is good until [`waiters::remove`] is called for it.
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

/// Ends a client's wait: its timeout callback answers. Under the server's lock only.
pub(crate) fn unblock(client: BlockedClient) {
    api!(RedisModule_UnblockClient(client.0, null_mut()));
}

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
        match command::finished(&context, &key) {
            Some(reply) => context.reply(reply) as c_int,
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
    guard((), || waiters::remove(id as u64));
}
