//! Documentation of commands, as the server keeps it.

use std::{
    ffi::{CStr, CString, c_int},
    ptr::{null, null_mut},
};

use redis_module::{Context, raw};

use super::OK;

/// What COMMAND DOCS and COMMAND INFO tell of a command.
pub(crate) struct CommandInfo {
    pub(crate) name: &'static str,
    pub(crate) summary: &'static str,
    pub(crate) complexity: &'static str,
    pub(crate) arity: i32,
    /// ACL categories beside `@florence`, separated by blanks: those that a command of the server
    /// with its flags is in.
    pub(crate) categories: &'static str,
    /// Where its keys are, if not only where the command table says; copied by the server.
    pub(crate) keys: &'static [KeySpec],
    pub(crate) args: &'static [Arg],
}

/// An argument as COMMAND DOCS tells it.
pub(crate) struct Arg {
    pub(crate) name: &'static CStr,
    pub(crate) kind: ArgKind,
    /// The word before the value, or the word that it is.
    pub(crate) token: Option<&'static CStr>,
    pub(crate) is_optional: bool,
    pub(crate) is_several: bool,
}

pub(crate) enum ArgKind {
    /// A key, that of one of the command's key specs.
    Key(c_int),
    Text,
    Integer,
    Decimal,
    /// Nothing but its token.
    Word,
    OneOf(&'static [Arg]),
    /// All of them, in this order.
    Block(&'static [Arg]),
}

impl Arg {
    pub(crate) const fn new(name: &'static CStr, kind: ArgKind) -> Self {
        Self { name, kind, token: None, is_optional: false, is_several: false }
    }

    /// The same after a word.
    pub(crate) const fn after(mut self, token: &'static CStr) -> Self {
        self.token = Some(token);
        self
    }

    pub(crate) const fn optional(mut self) -> Self {
        self.is_optional = true;
        self
    }

    /// One or more of it.
    pub(crate) const fn several(mut self) -> Self {
        self.is_several = true;
        self
    }

    /// Points into `subargs`, which has to live as long.
    fn raw(&self, subargs: Option<&mut RawArgs>) -> raw::RedisModuleCommandArg {
        use raw::{
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_BLOCK as BLOCK,
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_DOUBLE as DOUBLE,
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_INTEGER as INTEGER,
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_KEY as KEY,
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_ONEOF as ONE_OF,
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_PURE_TOKEN as TOKEN,
            RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_STRING as STRING,
        };
        let (kind, key) = match self.kind {
            ArgKind::Key(spec) => (KEY, spec),
            ArgKind::Text => (STRING, -1),
            ArgKind::Integer => (INTEGER, -1),
            ArgKind::Decimal => (DOUBLE, -1),
            ArgKind::Word => (TOKEN, -1),
            ArgKind::OneOf(_) => (ONE_OF, -1),
            ArgKind::Block(_) => (BLOCK, -1),
        };
        let flag = |is_set, flag: u32| if is_set { flag.cast_signed() } else { 0 };
        raw::RedisModuleCommandArg {
            name: self.name.as_ptr(),
            type_: kind,
            key_spec_index: key,
            token: self.token.map_or(null(), CStr::as_ptr),
            summary: null(),
            since: null(),
            flags: flag(self.is_optional, raw::REDISMODULE_CMD_ARG_OPTIONAL)
                | flag(self.is_several, raw::REDISMODULE_CMD_ARG_MULTIPLE),
            deprecated_since: null(),
            subargs: subargs.map_or(null_mut(), RawArgs::as_mut_ptr),
            display_text: null(),
        }
    }
}

/// Arguments as the server takes them, and all that they point to.
struct RawArgs {
    list: Vec<raw::RedisModuleCommandArg>,
    _inner: Vec<Option<Self>>,
}

impl RawArgs {
    fn new(args: &[Arg]) -> Self {
        let inner = |arg: &Arg| match arg.kind {
            ArgKind::OneOf(args) | ArgKind::Block(args) => Some(Self::new(args)),
            _ => None,
        };
        let mut inner: Vec<Option<Self>> = args.iter().map(inner).collect();
        let raw = args.iter().zip(&mut inner).map(|(arg, inner)| arg.raw(inner.as_mut()));
        // SAFETY: plain numbers and pointers, for which zero is a value; it ends the list.
        let end: raw::RedisModuleCommandArg = unsafe { std::mem::zeroed() };
        let list = raw.chain([end]).collect();
        Self { list, _inner: inner }
    }

    /// Its elements stay where they are, wherever the list is moved.
    fn as_mut_ptr(&mut self) -> *mut raw::RedisModuleCommandArg {
        self.list.as_mut_ptr()
    }
}

/// Keys of a command, the first of which is the argument at a position, or the one after a word.
pub(crate) struct KeySpec {
    pub(crate) begin: KeyBegin,
    /// The last one: 0 is the first itself, -1 the last argument, -2 the one before.
    pub(crate) last: c_int,
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
    /// Something is added, and nothing is read.
    pub(crate) const ADD: u32 = raw::REDISMODULE_CMD_KEY_RW | raw::REDISMODULE_CMD_KEY_INSERT;
    /// What is there is read and changed.
    pub(crate) const CHANGE: u32 = raw::REDISMODULE_CMD_KEY_RW
        | raw::REDISMODULE_CMD_KEY_UPDATE
        | raw::REDISMODULE_CMD_KEY_ACCESS;
    pub(crate) const READ: u32 = raw::REDISMODULE_CMD_KEY_RO | raw::REDISMODULE_CMD_KEY_ACCESS;

    fn raw(&self) -> raw::RedisModuleCommandKeySpec {
        // SAFETY: plain numbers, pointers and unions of them, for which zero is a value.
        let mut spec: raw::RedisModuleCommandKeySpec = unsafe { std::mem::zeroed() };
        spec.flags = u64::from(self.flags);
        spec.find_keys_type = raw::RedisModuleKeySpecFindKeysType_REDISMODULE_KSPEC_FK_RANGE;
        spec.fk.range.lastkey = self.last;
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

/// The module's version that the commands came with.
const SINCE: &CStr = c"0.1.0";

pub(crate) fn describe(ctx: &Context, info: &CommandInfo) -> Result<(), String> {
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (name, summary) = (text(info.name)?, text(info.summary)?);
    let complexity = text(info.complexity)?;
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
    let mut args = RawArgs::new(info.args);
    let raw_info = raw::RedisModuleCommandInfo {
        version: &raw const version,
        summary: summary.as_ptr(),
        complexity: complexity.as_ptr(),
        since: SINCE.as_ptr(),
        history: null_mut(),
        tips: null(),
        arity: info.arity,
        key_specs: if info.keys.is_empty() { null_mut() } else { keys.as_mut_ptr() },
        args: if info.args.is_empty() { null_mut() } else { args.as_mut_ptr() },
    };
    // The server copies what it is given.
    if api!(RedisModule_SetCommandInfo(command, &raw const raw_info)) != OK {
        return Err(format!("cannot describe {}", info.name));
    }
    set_categories(ctx, command, info)
}

/// Whether the server knows categories of modules' commands (7.4, Valkey 8).
pub(crate) fn has_categories() -> bool {
    // SAFETY: reading pointers that are set once, while the module loads.
    let (add, set) =
        unsafe { (raw::RedisModule_AddACLCategory, raw::RedisModule_SetCommandACLCategories) };
    add.is_some() && set.is_some()
}

/// The `@florence` category, and the server's own, where it lets modules say so.
fn set_categories(
    ctx: &Context,
    command: *mut raw::RedisModuleCommand,
    info: &CommandInfo,
) -> Result<(), String> {
    if !has_categories() {
        return Ok(());
    }
    let all = CString::new(format!("florence {}", info.categories)).unwrap_or_default();
    // Adding it twice is refused, harmlessly.
    api!(RedisModule_AddACLCategory(ctx.get_raw(), c"florence".as_ptr()));
    if api!(RedisModule_SetCommandACLCategories(command, all.as_ptr())) == OK {
        return Ok(());
    }
    Err(format!("cannot set the ACL categories of {}", info.name))
}
