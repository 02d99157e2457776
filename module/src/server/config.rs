//! Settings as the server knows them: all are texts to it, and parsed and refused by our table.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use parking_lot::Mutex;
use redis_module::{Context, RedisString, raw};

use super::{ERR, OK, callbacks::guard};
use crate::settings::{self, Setting, TABLE};

/// Registers the table, with `loadmodule` arguments as defaults, and takes over what redis.conf
/// says. `Err(None)` if the server has told the problem itself.
pub(crate) fn register(ctx: &Context, args: &[RedisString]) -> Result<(), Option<String>> {
    // Before the server looks: what it sets to the value that it sees, it does not ask us about.
    let mut defaults = Vec::with_capacity(TABLE.len());
    for setting in TABLE {
        let default = setting.about().default;
        setting.set(default).map_err(Some)?;
        defaults.push(default.to_owned());
    }
    for pair in args.chunks(2) {
        let name = pair[0].to_string_lossy();
        let known = TABLE.iter().position(|setting| setting.about().name == name);
        let Some(index) = known else {
            return Err(Some(format!("unknown module argument '{name}'")));
        };
        let Some(value) = pair.get(1) else {
            return Err(Some(format!("module argument '{name}' has no value")));
        };
        let value = value.to_string_lossy();
        TABLE[index].set(&value).map_err(Some)?;
        defaults[index] = value;
    }
    for (setting, default) in TABLE.iter().zip(&defaults) {
        add(ctx, *setting, default).map_err(Some)?;
    }
    match api!(RedisModule_LoadConfigs(ctx.get_raw())) {
        OK => Ok(()),
        _ => Err(None),
    }
}

fn add(ctx: &Context, setting: &dyn Setting, default: &str) -> Result<(), String> {
    let about = setting.about();
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (name, default) = (text(about.name)?, text(default)?);
    let flags = if setting.can_change() {
        raw::REDISMODULE_CONFIG_DEFAULT
    } else {
        raw::REDISMODULE_CONFIG_IMMUTABLE
    };
    let registered = api!(RedisModule_RegisterStringConfig(
        ctx.get_raw(),
        name.as_ptr(),
        default.as_ptr(),
        flags,
        Some(get),
        Some(set),
        None,
        std::ptr::null_mut(),
    ));
    if registered == OK { Ok(()) } else { Err(format!("cannot register setting {}", about.name)) }
}

/// The name that the server calls a setting by, without the module's.
fn named(name: *const c_char) -> Option<&'static dyn Setting> {
    // SAFETY: the server passes a C string that lives as long as the callback.
    let name = unsafe { CStr::from_ptr(name) }.to_str().ok()?;
    settings::find(name.strip_prefix("florence.").unwrap_or(name))
}

/// The string that [`get`] gave last: the server copies it, and does not free it.
struct Shown(*mut raw::RedisModuleString);

// SAFETY: touched only by the callback, which the server calls on its main thread.
unsafe impl Send for Shown {}

static SHOWN: Mutex<Option<Shown>> = Mutex::new(None);

extern "C" fn get(name: *const c_char, _data: *mut c_void) -> *mut raw::RedisModuleString {
    guard(std::ptr::null_mut(), || {
        let text = named(name).map(Setting::text).unwrap_or_default();
        let new =
            api!(RedisModule_CreateString(std::ptr::null_mut(), text.as_ptr().cast(), text.len()));
        if let Some(Shown(old)) = SHOWN.lock().replace(Shown(new)) {
            api!(RedisModule_FreeString(std::ptr::null_mut(), old));
        }
        new
    })
}

extern "C" fn set(
    name: *const c_char,
    value: *mut raw::RedisModuleString,
    _data: *mut c_void,
    error: *mut *mut raw::RedisModuleString,
) -> c_int {
    guard(ERR, || {
        let value = String::from_utf8_lossy(RedisString::string_as_slice(value));
        let unknown = || Err("no setting of florence has this name".to_owned());
        match named(name).map_or_else(unknown, |setting| setting.set(&value)) {
            Ok(()) => OK,
            Err(problem) => {
                let text = api!(RedisModule_CreateString(
                    std::ptr::null_mut(),
                    problem.as_ptr().cast(),
                    problem.len()
                ));
                // SAFETY: the server passes a place for the error, and takes the string over.
                unsafe { *error = text };
                ERR
            }
        }
    })
}
