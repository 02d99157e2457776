//! Hashes, read and written without a command: a command would show what is in them to whoever
//! watches commands (MONITOR, SLOWLOG), and takes longer.

use std::{
    ffi::{CStr, c_char, c_int},
    ptr::null_mut,
    sync::atomic::{AtomicPtr, Ordering},
    time::Duration,
};

use redis_module::{Context, NotifyEvent, RedisString, raw};

use super::{has_type, string};

/// Why a key cannot be read as a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoHash {
    Missing,
    WrongType,
}

/// How a key is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// As a command of a client does.
    AsClient,
    /// It leaves no trace: not in the key's age or frequency, nor in the server's figures, and what
    /// is past its time stays, but in Redis 7.0.
    Unseen,
}

impl Look {
    fn mode(self) -> c_int {
        const UNSEEN: u32 = raw::REDISMODULE_OPEN_KEY_NOTOUCH
            | raw::REDISMODULE_OPEN_KEY_NONOTIFY
            | raw::REDISMODULE_OPEN_KEY_NOSTATS
            | raw::REDISMODULE_OPEN_KEY_NOEXPIRE;
        let mode = match self {
            Self::AsClient => raw::REDISMODULE_READ,
            Self::Unseen if knows_all_modes() => raw::REDISMODULE_READ | UNSEEN,
            // Redis 7.0 counts no hits and misses of those who may write, and what they open
            // counts as changed only where we say so.
            Self::Unseen => raw::REDISMODULE_READ | raw::REDISMODULE_WRITE | UNSEEN,
        };
        c_int::try_from(mode).unwrap_or_default()
    }
}

/// Whether the server knows all ways of opening a key, as the first that can be asked does.
fn knows_all_modes() -> bool {
    // SAFETY: reading a pointer that is set once, while the module loads.
    unsafe {
        let pointer = raw::RedisModule_GetOpenKeyModesAll;
        pointer.is_some()
    }
}

/// A hash, open for reading under the server's lock.
pub(crate) struct Hash(*mut raw::RedisModuleKey);

impl Hash {
    pub(crate) fn open(ctx: &Context, key: &RedisString, look: Look) -> Result<Self, NoHash> {
        let opened = open(ctx, key, look);
        if opened.is_null() {
            return Err(NoHash::Missing);
        }
        let hash = Self(opened);
        if has_type(opened, raw::REDISMODULE_KEYTYPE_HASH) {
            Ok(hash)
        } else if has_type(opened, raw::REDISMODULE_KEYTYPE_EMPTY) {
            Err(NoHash::Missing)
        } else {
            Err(NoHash::WrongType)
        }
    }

    /// What `look` finds in a field's bytes, if there is such a field.
    pub(crate) fn get<T>(&self, field: &str, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.take(field).map(|value| look(value.as_slice()))
    }

    /// A copy of a field's bytes.
    pub(crate) fn take(&self, field: &str) -> Option<Value> {
        with_name(field, |name| {
            const FLAGS: c_int = raw::REDISMODULE_HASH_CFIELDS.cast_signed();
            let mut value: *mut raw::RedisModuleString = null_mut();
            let end: *const c_char = std::ptr::null();
            api!(RedisModule_HashGet(self.0, FLAGS, name.as_ptr(), &raw mut value, end));
            (!value.is_null()).then(|| Value(value))
        })
    }

    /// Whether there is such a field.
    pub(crate) fn has(&self, field: &str) -> bool {
        with_name(field, |name| {
            const FLAGS: c_int =
                (raw::REDISMODULE_HASH_CFIELDS | raw::REDISMODULE_HASH_EXISTS).cast_signed();
            let mut is_there: c_int = 0;
            let end: *const c_char = std::ptr::null();
            api!(RedisModule_HashGet(self.0, FLAGS, name.as_ptr(), &raw mut is_there, end));
            is_there != 0
        })
    }
}

impl Drop for Hash {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// Opens a key to look at it; null if there is none.
pub(super) fn open(ctx: &Context, key: &RedisString, look: Look) -> *mut raw::RedisModuleKey {
    api!(RedisModule_OpenKey(ctx.get_raw(), key.inner, look.mode())).cast()
}

/// Closes a key, if there is one.
pub(super) fn close(opened: *mut raw::RedisModuleKey) {
    api!(RedisModule_CloseKey(opened));
}

/// A copy of a value's bytes that the server has made. Nobody else has it, so it may be read and
/// dropped without the server's lock.
#[derive(Debug)]
pub(crate) struct Value(*mut raw::RedisModuleString);

// SAFETY: nobody else refers to the string, and it is only read.
unsafe impl Send for Value {}
// SAFETY: as above.
unsafe impl Sync for Value {}

impl Value {
    /// Takes over a string that the server has made for us.
    pub(super) fn new(string: *mut raw::RedisModuleString) -> Self {
        Self(string)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        RedisString::string_as_slice(self.0)
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        api!(RedisModule_FreeString(null_mut(), self.0));
    }
}

/// Lends a field's name as a C string.
fn with_name<T>(name: &str, f: impl FnOnce(&CStr) -> T) -> T {
    /// No field of a job has a longer name.
    const MOST: usize = 31;
    let mut buffer = [0; MOST + 1];
    buffer[..name.len()].copy_from_slice(name.as_bytes());
    f(CStr::from_bytes_until_nul(&buffer).unwrap_or_default())
}

/// The key of a change made here that is told just now, of which whoever made it knows.
static OURS: AtomicPtr<raw::RedisModuleString> = AtomicPtr::new(null_mut());

/// Whether an event of this key is of a change made here. Who hears of ours may change other keys.
pub(super) fn is_ours(key: *mut raw::RedisModuleString) -> bool {
    let ours = OURS.load(Ordering::Relaxed);
    let name = RedisString::string_as_slice;
    !ours.is_null() && (ours == key || name(ours) == name(key))
}

/// Sets fields of a hash in the place of HSET: replicas, the append-only file and subscribers of
/// keyspace events hear of one HSET; our own handler of events does not.
///
/// Only where the server takes writes: nothing here asks it.
pub(crate) fn set_fields(ctx: &Context, key: &RedisString, fields: &[(RedisString, RedisString)]) {
    let opened = open_to_write(ctx, key);
    for (field, value) in fields {
        set(opened, field, value.inner);
    }
    close_written(ctx, key, opened);
    let mut command: Vec<&RedisString> = vec![key];
    command.extend(fields.iter().flat_map(|(field, value)| [field, value]));
    ctx.replicate("HSET", command.as_slice());
    tell(ctx, NotifyEvent::HASH, "hset", key);
}

/// Removes fields in the place of HDEL; as [`set_fields`].
pub(crate) fn remove_fields(ctx: &Context, key: &RedisString, fields: &[&str]) {
    /// What the server takes in a value's place to remove a field.
    const NOTHING: *mut raw::RedisModuleString = std::ptr::without_provenance_mut(1);
    let fields: Vec<RedisString> =
        fields.iter().map(|field| string(ctx, field.as_bytes())).collect();
    let opened = open_to_write(ctx, key);
    let removed: c_int = fields.iter().map(|field| set(opened, field, NOTHING)).sum();
    close_written(ctx, key, opened);
    if removed > 0 {
        let mut command: Vec<&RedisString> = vec![key];
        command.extend(&fields);
        ctx.replicate("HDEL", command.as_slice());
        tell(ctx, NotifyEvent::HASH, "hdel", key);
    }
}

/// Lets a key expire in the place of EXPIRE; as [`set_fields`].
pub(crate) fn expire_in(ctx: &Context, key: &RedisString, time: Duration) {
    let time = i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    let at = api!(RedisModule_Milliseconds()).saturating_add(time);
    let opened = open_to_write(ctx, key);
    api!(RedisModule_SetAbsExpire(opened, at));
    close_written(ctx, key, opened);
    ctx.replicate("PEXPIREAT", &[key, &string(ctx, at.to_string().as_bytes())][..]);
    tell(ctx, NotifyEvent::GENERIC, "expire", key);
}

fn open_to_write(ctx: &Context, key: &RedisString) -> *mut raw::RedisModuleKey {
    const MODE: c_int = (raw::REDISMODULE_READ | raw::REDISMODULE_WRITE).cast_signed();
    api!(RedisModule_OpenKey(ctx.get_raw(), key.inner, MODE)).cast()
}

/// How many fields were there already.
fn set(
    opened: *mut raw::RedisModuleKey,
    field: &RedisString,
    value: *mut raw::RedisModuleString,
) -> c_int {
    const NO_FLAGS: c_int = raw::REDISMODULE_HASH_NONE.cast_signed();
    let end: *const c_char = std::ptr::null();
    api!(RedisModule_HashSet(opened, NO_FLAGS, field.inner, value, end))
}

fn close_written(ctx: &Context, key: &RedisString, opened: *mut raw::RedisModuleKey) {
    api!(RedisModule_CloseKey(opened));
    api!(RedisModule_SignalModifiedKey(ctx.get_raw(), key.inner));
}

fn tell(ctx: &Context, class: NotifyEvent, event: &str, key: &RedisString) {
    let before = OURS.swap(key.inner, Ordering::Relaxed);
    ctx.notify_keyspace_event(class, event, key);
    OURS.store(before, Ordering::Relaxed);
}

/// A field's name and its value.
pub(crate) fn field(ctx: &Context, name: &str, value: &[u8]) -> (RedisString, RedisString) {
    (string(ctx, name.as_bytes()), string(ctx, value))
}
