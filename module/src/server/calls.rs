//! Commands that the module runs, under the server's lock.

use redis_module::{CallOptions, CallOptionsBuilder, CallReply, CallResult, Context};

/// Replicated, as the server's role and state allow it, errors as replies.
fn options() -> CallOptions {
    CallOptionsBuilder::new().script_mode().errors_as_replies().replicate().build()
}

/// Runs a command; its reply.
pub(crate) fn ask<'a>(ctx: &Context, command: &str, args: &[&[u8]]) -> CallResult<'a> {
    ctx.call_ext(command, &options(), args)
}

/// Runs a command; the error is the server's own text.
pub(crate) fn call(ctx: &Context, command: &str, args: &[&[u8]]) -> Result<(), String> {
    let result = ask(ctx, command, args);
    result.map(|_reply| ()).map_err(|error| error.to_utf8_string().unwrap_or_default())
}

/// The integer that a command replies; the error is the server's own text.
pub(crate) fn integer(ctx: &Context, command: &str, args: &[&[u8]]) -> Result<Option<i64>, String> {
    let reply: CallResult<'_> = ask(ctx, command, args);
    match reply {
        Ok(CallReply::I64(number)) => Ok(Some(number.to_i64())),
        Ok(_) => Ok(None),
        Err(error) => Err(error.to_utf8_string().unwrap_or_default()),
    }
}

/// The string that a command replies.
pub(crate) fn bytes(ctx: &Context, command: &str, args: &[&[u8]]) -> Option<Vec<u8>> {
    let reply: CallResult<'_> = ask(ctx, command, args);
    match reply {
        Ok(CallReply::String(text)) => Some(text.as_bytes().to_vec()),
        _ => None,
    }
}
