//! Documentation of commands, as the server keeps it.

use std::{
    ffi::{CStr, CString, c_int},
    ptr::null_mut,
};

use redis_module::{Context, raw};

use super::OK;

/// What COMMAND DOCS and COMMAND INFO tell of a command.
pub(crate) struct CommandInfo {
    pub(crate) name: &'static str,
    pub(crate) summary: &'static str,
    pub(crate) complexity: &'static str,
    pub(crate) arity: i32,
    /// Where its keys are, if not only where the command table says; copied by the server.
    pub(crate) keys: &'static [KeySpec],
}

/// One key of a command: the argument at a position, or the one after a word.
pub(crate) struct KeySpec {
    pub(crate) begin: KeyBegin,
    pub(crate) flags: u32,
}

pub(crate) enum KeyBegin {
    Position(c_int),
    /// The word is searched from argument 2 on.
    After(&'static CStr),
}

impl KeySpec {
    pub(crate) const WRITE: u32 = raw::REDISMODULE_CMD_KEY_RW
        | raw::REDISMODULE_CMD_KEY_INSERT
        | raw::REDISMODULE_CMD_KEY_ACCESS;
    pub(crate) const READ: u32 = raw::REDISMODULE_CMD_KEY_RO | raw::REDISMODULE_CMD_KEY_ACCESS;

    fn raw(&self) -> raw::RedisModuleCommandKeySpec {
        // SAFETY: plain numbers, pointers and unions of them, for which zero is a value.
        let mut spec: raw::RedisModuleCommandKeySpec = unsafe { std::mem::zeroed() };
        spec.flags = u64::from(self.flags);
        spec.find_keys_type = raw::RedisModuleKeySpecFindKeysType_REDISMODULE_KSPEC_FK_RANGE;
        spec.fk.range.keystep = 1;
        match self.begin {
            KeyBegin::Position(pos) => {
                spec.begin_search_type =
                    raw::RedisModuleKeySpecBeginSearchType_REDISMODULE_KSPEC_BS_INDEX;
                spec.bs.index.pos = pos;
            }
            KeyBegin::After(word) => {
                spec.begin_search_type =
                    raw::RedisModuleKeySpecBeginSearchType_REDISMODULE_KSPEC_BS_KEYWORD;
                spec.bs.keyword.keyword = word.as_ptr();
                spec.bs.keyword.startfrom = 2;
            }
        }
        spec
    }
}

pub(crate) fn describe(ctx: &Context, info: &CommandInfo) -> Result<(), String> {
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (name, summary) = (text(info.name)?, text(info.summary)?);
    let (complexity, since) = (text(info.complexity)?, text("1.0.0")?);
    let command = api!(RedisModule_GetCommand(ctx.get_raw(), name.as_ptr()));
    if command.is_null() {
        return Err(format!("command {} is not registered", info.name));
    }
    // The header's own constant is not linked into a Rust module.
    let version = raw::RedisModuleCommandInfoVersion {
        version: 1,
        sizeof_historyentry: size_of::<raw::RedisModuleCommandHistoryEntry>(),
        sizeof_keyspec: size_of::<raw::RedisModuleCommandKeySpec>(),
        sizeof_arg: size_of::<raw::RedisModuleCommandArg>(),
    };
    // SAFETY: as in `KeySpec::raw`; a spec of zeros ends the list.
    let end: raw::RedisModuleCommandKeySpec = unsafe { std::mem::zeroed() };
    let mut keys: Vec<_> = info.keys.iter().map(KeySpec::raw).chain([end]).collect();
    let raw_info = raw::RedisModuleCommandInfo {
        version: &raw const version,
        summary: summary.as_ptr(),
        complexity: complexity.as_ptr(),
        since: since.as_ptr(),
        history: null_mut(),
        tips: std::ptr::null(),
        arity: info.arity,
        key_specs: if info.keys.is_empty() { null_mut() } else { keys.as_mut_ptr() },
        args: null_mut(),
    };
    // The server copies what it is given.
    if api!(RedisModule_SetCommandInfo(command, &raw const raw_info)) != OK {
        return Err(format!("cannot describe {}", info.name));
    }
    set_category(ctx, command);
    Ok(())
}

/// The `@florence` category, where the server knows module categories (7.4, Valkey 8).
fn set_category(ctx: &Context, command: *mut raw::RedisModuleCommand) {
    // SAFETY: reading pointers that are set once, while the module loads.
    let (add, set) =
        unsafe { (raw::RedisModule_AddACLCategory, raw::RedisModule_SetCommandACLCategories) };
    if let (Some(add), Some(set)) = (add, set) {
        // SAFETY: a live context and command, and C strings; adding it twice is refused, harmlessly.
        unsafe {
            add(ctx.get_raw(), c"florence".as_ptr());
            set(command, c"florence".as_ptr());
        }
    }
}
