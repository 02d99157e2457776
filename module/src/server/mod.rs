//! The server's module API: all that the redis-module crate does not wrap, and the
//! module's only hand-written unsafe code.
//!
//! Raw pointers do not leave this folder, but for the opaque [`BlockedClient`]. Every callback that
//! the server makes catches panics: a panic must not unwind into C. What the callbacks do is said
//! once, by [`install`].
//!
//! - `callbacks`: events, the command filter, the event loop
//! - `blocked`: blocked clients
//! - `calls`: commands, under the server's lock
//! - `clock`: milliseconds since 1970 that never step back
//! - `config`: settings as the server knows them
//! - `databases`: databases by their content, whatever SWAPDB does
//! - `describe`: documentation of commands
//! - `hash`: hashes, read and written without commands
//! - `list`: lists, read in place
//! - `reply`: errors and maps as clients read them
//! - `scan`: the keys that are there
//! - `strings`: the values of string keys
#![expect(unsafe_code, reason = "the Redis module API")]

use std::{ffi::c_int, thread, time::Duration};

use florence_engine::catch_panic;
use redis_module::{Context, ContextFlags, MODULE_CONTEXT, RedisString, raw};
use sha2::{Digest, Sha256};

use crate::figures;

/// Calls an API function that [`check`] has found.
macro_rules! api {
    ($name:ident ( $($arg:expr),* $(,)? )) => {{
        // SAFETY: reading a pointer that is set once, while the module loads.
        let function = unsafe { raw::$name };
        let function = function.expect("check refuses servers without it");
        // SAFETY: the arguments are live objects of the server, used under its lock, as the
        // callers of this folder's functions have it: they hold a `Context`.
        unsafe { function($($arg),*) }
    }};
}

mod blocked;
mod callbacks;
mod calls;
mod clock;
mod config;
mod databases;
mod describe;
mod hash;
mod list;
pub(crate) mod reply;
mod scan;
mod strings;

pub(crate) use blocked::{Asking, BlockedClient, block, signal_key, unblock};
pub(crate) use callbacks::{
    Aside, Handlers, after, divert_publish, install, on_event_loop, subscribe, wake_event_loop,
    watch_lists,
};
pub(crate) use calls::{Refused, ask, bytes, call, check_commands, integer, may_run, share_slot};
pub(crate) use clock::unix_ms;
pub(crate) use config::register as register_settings;
pub(crate) use databases::{
    Db, has_db, has_keys, in_db, in_each_db, numbered, select_db, selected_db,
};
pub(crate) use describe::{Arg, ArgKind, CommandInfo, KeyBegin, KeySpec, describe, has_categories};
pub(crate) use hash::{Hash, Look, NoHash, Value, expire_in, field, remove_fields, set_fields};
pub(crate) use list::Leftward;
pub(crate) use scan::Scan;
pub(crate) use strings::{NoString, string_of};

macro_rules! require {
    ($($name:ident),* $(,)?) => {
        // SAFETY: reading pointers that are set once, while the module loads.
        [$((stringify!($name), unsafe { let pointer = raw::$name; pointer.is_some() })),*]
    };
}

/// Whether the server has all that this module needs.
pub(crate) fn check() -> Result<(), String> {
    let needed = require![
        RedisModule_BlockClient,
        RedisModule_BlockClientOnKeys,
        RedisModule_GetThreadSafeContext,
        RedisModule_FreeThreadSafeContext,
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
        RedisModule_OpenKey,
        RedisModule_CloseKey,
        RedisModule_KeyType,
        RedisModule_HashGet,
        RedisModule_ListGet,
        RedisModule_StringDMA,
        RedisModule_HashSet,
        RedisModule_FreeString,
        RedisModule_SignalModifiedKey,
        RedisModule_SetAbsExpire,
        RedisModule_Milliseconds,
        RedisModule_SelectDb,
        RedisModule_GetSelectedDb,
        RedisModule_DbSize,
        RedisModule_EventLoopAddOneShot,
        RedisModule_CreateTimer,
        RedisModule_NotifyKeyspaceEvent,
        RedisModule_ReplyWithNull,
        RedisModule_ReplyWithMap,
        RedisModule_ReplyWithStringBuffer,
        RedisModule_ReplyWithLongLong,
        RedisModule_GetRandomBytes,
        RedisModule_GetClientId,
        RedisModule_GetClientUserNameById,
        RedisModule_GetCurrentUserName,
        RedisModule_RegisterCommandFilter,
        RedisModule_CommandFilterArgsCount,
        RedisModule_CommandFilterArgGet,
        RedisModule_CommandFilterArgReplace,
        RedisModule_RegisterStringConfig,
        RedisModule_LoadConfigs,
        RedisModule_Scan,
        RedisModule_ScanCursorCreate,
        RedisModule_ScanCursorDestroy,
    ];
    match needed.into_iter().find(|(_, is_there)| !is_there) {
        Some((name, _)) => Err(format!("this server lacks {name}: Redis 7.0 or newer is needed")),
        None => Ok(()),
    }
}

pub(crate) fn set_options(ctx: &Context) {
    /// What we open to look at is not changed; [`set_fields`] tells of what is.
    const TELLS_CHANGES: c_int = raw::REDISMODULE_OPTION_NO_IMPLICIT_SIGNAL_MODIFIED.cast_signed();
    /// A replica may go on to answer from its old data while it loads the new.
    const HANDLES_ASYNC_LOADING: c_int =
        raw::REDISMODULE_OPTIONS_HANDLE_REPL_ASYNC_LOAD.cast_signed();
    /// Valkey's atomic slot migration asks modules for this bit; other servers ignore it.
    const HANDLES_SLOT_MIGRATION: c_int = 1 << 5;
    let options = TELLS_CHANGES | HANDLES_ASYNC_LOADING | HANDLES_SLOT_MIGRATION;
    api!(RedisModule_SetModuleOptions(ctx.get_raw(), options));
}

/// Keeps candle from starting a pool of its own, whose threads spin: the engine's pool does all.
pub(crate) fn limit_candle() {
    const NAME: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(NAME).is_none() {
        // SAFETY: called from OnLoad, before any thread of ours starts; at start-up the server
        // has no other threads yet, and it does not change its environment later. Where it is loaded
        // at run time, the server's own threads do not read the environment.
        unsafe { std::env::set_var(NAME, "1") };
    }
}

/// `REDISMODULE_OK` and `REDISMODULE_ERR`.
const OK: c_int = 0;
const ERR: c_int = 1;

// The lock.

/// Runs `f` under the server's lock.
pub(crate) fn with_server<T>(f: impl FnOnce(&Context) -> T) -> T {
    let guard = MODULE_CONTEXT.lock();
    let result = f(&guard);
    drop(guard);
    // The lock is unfair: without a pause a busy thread could keep the main thread from it.
    thread::sleep(Duration::from_micros(1));
    result
}

/// Whether this server may write now: a master, loaded, not paused.
pub(crate) fn can_write(ctx: &Context) -> bool {
    let flags = ctx.get_flags();
    flags.contains(ContextFlags::MASTER)
        && !flags.contains(ContextFlags::LOADING)
        && !are_writes_paused()
}

/// Whether a write would break a pause of writes (failover, CLIENT PAUSE): servers abort on it.
fn are_writes_paused() -> bool {
    api!(RedisModule_AvoidReplicaTraffic()) != 0
}

// Strings, events, the log.

/// Whether an open key is of a type, as the API numbers them; servers may have types that are not
/// known here.
fn has_type(key: *mut raw::RedisModuleKey, kind: isize) -> bool {
    isize::try_from(api!(RedisModule_KeyType(key))) == Ok(kind)
}

/// A string of the server's, of any bytes.
pub(crate) fn string(ctx: &Context, bytes: &[u8]) -> RedisString {
    RedisString::create_from_slice(ctx.get_raw(), bytes)
}

/// Tells subscribers of keyspace events.
pub(crate) fn notify(ctx: &Context, event: &str, key: &[u8]) {
    ctx.notify_keyspace_event(raw::NotifyEvent::MODULE, event, &string(ctx, key));
}

/// Random bytes from the server.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    api!(RedisModule_GetRandomBytes(bytes.as_mut_ptr(), bytes.len()));
    bytes
}

/// The user on whose behalf a command runs; none, if another module runs it on its own.
pub(crate) fn user(ctx: &Context) -> Option<RedisString> {
    let raw_ctx = ctx.get_raw();
    let id = api!(RedisModule_GetClientId(raw_ctx));
    let name = api!(RedisModule_GetClientUserNameById(raw_ctx, id));
    if !name.is_null() {
        return Some(RedisString::from_redis_module_string(std::ptr::null_mut(), name));
    }
    // A script's own client has the user of its caller. Of others the server must not be asked: the
    // client of a module has no user, and it does not look.
    ctx.get_flags().contains(ContextFlags::LUA).then(|| ctx.get_current_user())
}

/// Most bytes of a name, of a user or of ours, that jobs keep.
pub(crate) const NAME_BYTES: usize = 255;

/// The user's name as jobs have it, and what is counted and kept apart for each: one that is long, or
/// no text, is its digest.
pub(crate) fn user_name(ctx: &Context) -> String {
    let Some(user) = user(ctx) else { return String::new() };
    let name = user.as_slice();
    let text = std::str::from_utf8(name).ok().filter(|text| text.len() <= NAME_BYTES);
    text.map_or_else(|| format!("sha256:{:x}", Sha256::digest(name)), str::to_owned)
}

/// A line of the server's log; from any thread, with or without the lock.
pub(crate) fn warn(text: &str) {
    MODULE_CONTEXT.log_warning(&line(text));
}

/// As [`warn`], for what is no cause for concern.
pub(crate) fn tell(text: &str) {
    MODULE_CONTEXT.log_notice(&line(text));
}

/// Runs `f`; a panic is counted and logged as one of `who`, and `None`.
pub(crate) fn catch<T>(who: impl FnOnce() -> String, f: impl FnOnce() -> T) -> Option<T> {
    let text = match catch_panic(f) {
        Ok(result) => return Some(result),
        Err(text) => text,
    };
    figures::PANICS.add(1);
    warn(&format!("{} panicked: {text}", who()));
    None
}

/// A text as one line, whatever a client's words in it hold.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// A text as the log shows it.
fn line(text: &str) -> String {
    format!("florence: {}", one_line(text))
}

/// A key as log lines show it.
pub(crate) fn printable(key: &[u8]) -> String {
    const MOST: usize = 100;
    let text = String::from_utf8_lossy(key);
    let shown: String = text.chars().take(MOST).collect();
    shown.escape_debug().to_string()
}
