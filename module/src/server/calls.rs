//! Commands that the module runs, under the server's lock.

use redis_module::{CallOptions, CallOptionsBuilder, CallReply, CallResult, Context, ContextFlags};

/// A write that the server has not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It makes none just now: a pause, too few replicas, a full disk, another role.
    All,
    /// It does not make this one: the key's slot is another node's, say.
    This,
}

impl Refused {
    /// What an error reply to a write tells.
    pub(crate) fn of(error: &str) -> Self {
        const FOR_ALL: [&str; 4] = ["NOREPLICAS", "MISCONF", "READONLY", "MASTERDOWN"];
        let code = error.split(' ').next().unwrap_or_default();
        // That error has no code of its own.
        let is_for_all = FOR_ALL.contains(&code) || error.contains("while the cluster is down");
        if is_for_all { Self::All } else { Self::This }
    }
}

/// Replicated, as the server's role and state allow it, errors as replies.
fn options() -> CallOptions {
    CallOptionsBuilder::new().script_mode().errors_as_replies().replicate().build()
}

/// Runs a command; its reply, or the server's own text of the error.
pub(crate) fn ask<'a>(
    ctx: &Context,
    command: &str,
    args: &[&[u8]],
) -> Result<CallReply<'a>, String> {
    let reply: CallResult<'a> = ctx.call_ext(command, &options(), args);
    reply.map_err(|error| error.to_utf8_string().unwrap_or_default())
}

/// Whether a user may run a command with these arguments.
pub(crate) fn may_run(ctx: &Context, user: &[u8], command: &[&[u8]]) -> bool {
    let options = CallOptionsBuilder::new().errors_as_replies().build();
    let args = [&[b"DRYRUN", user], command].concat();
    let reply: CallResult<'_> = ctx.call_ext("ACL", &options, args.as_slice());
    matches!(reply, Ok(CallReply::String(text)) if text.as_bytes() == b"OK")
}

/// Runs a command whose reply does not matter.
pub(crate) fn call(ctx: &Context, command: &str, args: &[&[u8]]) -> Result<(), String> {
    ask(ctx, command, args).map(|_reply| ())
}

/// Without these no job can be written; nor does the append-only file or a replica hear of one.
const NEEDED: [&str; 5] = ["HSET", "HDEL", "PEXPIREAT", "PERSIST", "UNLINK"];

/// Refuses a server on which commands have other names (`rename-command`).
pub(crate) fn check_commands(ctx: &Context) -> Result<(), String> {
    let args = [&["INFO"], NEEDED.as_slice()].concat();
    let args: Vec<&[u8]> = args.iter().map(|name| name.as_bytes()).collect();
    // Where COMMAND has another name itself, nobody can tell.
    let Ok(CallReply::Array(found)) = ask(ctx, "COMMAND", &args) else { return Ok(()) };
    let known = found.iter().map(|entry| matches!(entry, Ok(CallReply::Array(_))));
    let missing: Vec<&str> =
        NEEDED.iter().zip(known).filter(|(_, is_known)| !is_known).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("jobs cannot be written without {}, see rename-command", missing.join(", ")))
}

/// The integer that a command replies.
pub(crate) fn integer(ctx: &Context, command: &str, args: &[&[u8]]) -> Result<Option<i64>, String> {
    Ok(match ask(ctx, command, args)? {
        CallReply::I64(number) => Some(number.to_i64()),
        _ => None,
    })
}

/// The string that a command replies.
pub(crate) fn bytes(ctx: &Context, command: &str, args: &[&[u8]]) -> Option<Vec<u8>> {
    match ask(ctx, command, args) {
        Ok(CallReply::String(text)) => Some(text.as_bytes().to_vec()),
        _ => None,
    }
}

/// Whether two keys are in one slot, so that one node has both; they are where there is no cluster.
pub(crate) fn share_slot(ctx: &Context, one: &[u8], other: &[u8]) -> bool {
    let slot = |key| integer(ctx, "CLUSTER", &[b"KEYSLOT", key]).ok().flatten();
    !ctx.get_flags().contains(ContextFlags::CLUSTER)
        || slot(one).is_some_and(|slot_of_one| slot(other) == Some(slot_of_one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_to_all_is_told_from_what_is_refused_to_one() {
        assert_eq!(Refused::of("NOREPLICAS Not enough good replicas to write."), Refused::All);
        let down = "ERR Can not execute a command 'hset' while the cluster is down";
        assert_eq!(Refused::of(down), Refused::All);
        let other = "ERR Attempted to access a non local key in a cluster node";
        assert_eq!(Refused::of(other), Refused::This);
    }
}
