//! What the server calls: events, the command filter, the event loop.

use std::{
    ffi::{CStr, c_int, c_void},
    ptr::null_mut,
    sync::OnceLock,
    time::Duration,
};

use redis_module::{Context, RedisResult, RedisString, raw};

use super::{Db, OK, catch, databases, hash};

/// What the module does when the server calls. Plain functions, on the main thread or under the
/// server's lock.
pub(crate) struct Handlers {
    /// A hash of the selected database has been written. Others do that often, so it has to be quick.
    pub(crate) hash_changed: fn(&Context, &[u8]),
    /// Something else has happened to a key of the selected database: the event's name, the key.
    pub(crate) key_changed: fn(&Context, &[u8], &[u8]),
    /// A list has changed, where [`watch_lists`] was called.
    pub(crate) list_changed: fn(&[u8]),
    /// The server has become a master or a replica.
    pub(crate) role_changed: fn(&Context),
    /// The link to the master came up, or went down.
    pub(crate) link_changed: fn(&Context, bool),
    pub(crate) loading_started: fn(),
    /// A replica loads data beside those that it has.
    pub(crate) loading_aside: fn(&Context, Aside),
    /// On the first turn of the event loop after loading.
    pub(crate) loading_ended: fn(&Context),
    /// A database was flushed, or all.
    pub(crate) flushed: fn(Option<Db>),
    /// Other numbers lead to two databases.
    pub(crate) swapped: fn(Db, Db),
    /// The server ends in an orderly way.
    pub(crate) shutdown: fn(&Context),
    /// The reply for a blocked client whose key was signalled; `None` lets it wait on.
    pub(crate) key_ready: fn(&Context, &RedisString) -> Option<RedisResult>,
    /// The server is done with a blocked client.
    pub(crate) freed: fn(u64),
}

/// How far a replica is that loads data beside those that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Aside {
    Started,
    Aborted,
    /// The new data have taken the place of the old.
    Completed,
}

static HANDLERS: OnceLock<Handlers> = OnceLock::new();

/// Says what is done when the server calls; before anything that makes it call.
pub(crate) fn install(handlers: Handlers) {
    HANDLERS.get_or_init(|| handlers);
}

pub(super) fn handlers() -> &'static Handlers {
    HANDLERS.get().expect("installed before the server is told to call")
}

/// Runs `f`; a panic does not unwind into C.
pub(super) fn guard<T>(fallback: T, f: impl FnOnce() -> T) -> T {
    catch(|| "a callback of the server".to_owned(), f).unwrap_or(fallback)
}

/// Registers for the keyspace and server events that the queue lives on.
pub(crate) fn subscribe(ctx: &Context) -> Result<(), String> {
    // Not of strings, lists and the like: whoever writes those must not pay for us.
    let wanted = raw::REDISMODULE_NOTIFY_GENERIC
        | raw::REDISMODULE_NOTIFY_HASH
        | raw::REDISMODULE_NOTIFY_EXPIRED
        | raw::REDISMODULE_NOTIFY_EVICTED;
    subscribe_to_keys(ctx, wanted)?;
    let raw_ctx = ctx.get_raw();
    for id in [
        raw::REDISMODULE_EVENT_REPLICATION_ROLE_CHANGED,
        raw::REDISMODULE_EVENT_MASTER_LINK_CHANGE,
        raw::REDISMODULE_EVENT_FLUSHDB,
        raw::REDISMODULE_EVENT_LOADING,
        raw::REDISMODULE_EVENT_SHUTDOWN,
        raw::REDISMODULE_EVENT_SWAPDB,
        raw::REDISMODULE_EVENT_REPL_ASYNC_LOAD,
    ] {
        let event = raw::RedisModuleEvent { id, dataver: 1 };
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

const HASH: c_int = raw::REDISMODULE_NOTIFY_HASH;

extern "C" fn on_keyspace_event(
    ctx: *mut raw::RedisModuleCtx,
    kind: c_int,
    event: *const std::ffi::c_char,
    key: *mut raw::RedisModuleString,
) -> c_int {
    if hash::is_ours(key) {
        return OK;
    }
    guard(OK, || {
        let name = RedisString::string_as_slice(key);
        if kind == HASH {
            (handlers().hash_changed)(&Context::new(ctx), name);
            return OK;
        }
        if kind == raw::REDISMODULE_NOTIFY_LIST {
            (handlers().list_changed)(name);
            return OK;
        }
        // SAFETY: the server passes a C string that lives as long as this call.
        let event = unsafe { CStr::from_ptr(event) };
        (handlers().key_changed)(&Context::new(ctx), event.to_bytes(), name);
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
    let to = handlers();
    guard((), || match (event.id, sub) {
        (raw::REDISMODULE_EVENT_REPLICATION_ROLE_CHANGED, _) => {
            (to.role_changed)(&Context::new(ctx));
        }
        (raw::REDISMODULE_EVENT_MASTER_LINK_CHANGE, sub) => {
            let is_up = sub == raw::REDISMODULE_SUBEVENT_MASTER_LINK_UP;
            (to.link_changed)(&Context::new(ctx), is_up);
        }
        (raw::REDISMODULE_EVENT_FLUSHDB, ENDED) => {
            // SAFETY: this event's data is this struct, alive as long as this call.
            let db = unsafe { (*data.cast::<raw::RedisModuleFlushInfo>()).dbnum };
            (to.flushed)((db >= 0).then(|| databases::numbered(db)));
        }
        (
            raw::REDISMODULE_EVENT_LOADING,
            raw::REDISMODULE_SUBEVENT_LOADING_ENDED | raw::REDISMODULE_SUBEVENT_LOADING_FAILED,
        ) => on_event_loop(&Context::new(ctx), to.loading_ended),
        (raw::REDISMODULE_EVENT_LOADING, _) => (to.loading_started)(),
        (raw::REDISMODULE_EVENT_SHUTDOWN, _) => (to.shutdown)(&Context::new(ctx)),
        (raw::REDISMODULE_EVENT_SWAPDB, _) => {
            // SAFETY: as above.
            let swap = unsafe { *data.cast::<raw::RedisModuleSwapDbInfo>() };
            let (first, second) = (swap.dbnum_first, swap.dbnum_second);
            databases::swap(first, second);
            (to.swapped)(databases::numbered(first), databases::numbered(second));
        }
        (raw::REDISMODULE_EVENT_REPL_ASYNC_LOAD, sub) => {
            let step = match sub {
                raw::REDISMODULE_SUBEVENT_REPL_ASYNC_LOAD_STARTED => Aside::Started,
                raw::REDISMODULE_SUBEVENT_REPL_ASYNC_LOAD_ABORTED => Aside::Aborted,
                _ => Aside::Completed,
            };
            (to.loading_aside)(&Context::new(ctx), step);
        }
        _ => {}
    });
}

/// Calls `f` from the event loop, as soon as it turns.
pub(crate) fn on_event_loop(ctx: &Context, f: fn(&Context)) {
    after(ctx, Duration::ZERO, f);
}

/// Calls `f` from the event loop after some time.
pub(crate) fn after(ctx: &Context, time: Duration, f: fn(&Context)) {
    ctx.create_timer(time, |ctx, f: fn(&Context)| guard((), || f(ctx)), f);
}

/// Ends the wait of the event loop, so that what a thread has changed is acted on now.
pub(crate) fn wake_event_loop() {
    extern "C" fn nothing(_data: *mut c_void) {}
    api!(RedisModule_EventLoopAddOneShot(Some(nothing), null_mut()));
}
