//! The streams of `TOKENS`: a job's text while it is generated, piece by piece, and its end.

use redis_module::{CallReply, Context};

use super::Ended;
use crate::{
    job::{self, Job},
    server,
    settings::{self, Setting},
};

/// What follows in the text of an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'a> {
    /// The job's key.
    pub(crate) job: &'a [u8],
    pub(crate) attempt: i64,
    /// Of a chain, counted from 0.
    pub(crate) step: usize,
    /// Which question of the step.
    pub(crate) index: usize,
    pub(crate) text: &'a str,
}

/// Adds a piece to a stream of the selected database.
pub(crate) fn add(ctx: &Context, stream: &[u8], piece: &Piece<'_>) -> Result<(), String> {
    let Piece { job, attempt, step, index, text } = piece;
    let numbers = (attempt.to_string(), step.to_string(), index.to_string());
    let fields: [&[u8]; 10] = [
        b"job",
        job,
        b"attempt",
        numbers.0.as_bytes(),
        b"step",
        numbers.1.as_bytes(),
        b"index",
        numbers.2.as_bytes(),
        b"text",
        text.as_bytes(),
    ];
    entry(ctx, stream, &fields)
}

/// Adds the end of a job to the stream of its hash, if it has one.
pub(super) fn ended(ctx: &Context, key: &[u8], end: &Ended<'_>) -> Result<(), String> {
    let Ok(job) = Job::look(ctx, &server::string(ctx, key)) else { return Ok(()) };
    let stream: Option<Vec<u8>> = job.bytes("stream", <[u8]>::to_vec);
    // A key is closed before something is written.
    drop(job);
    // As when the text began; the hash may be another by now.
    let Some(stream) = stream.filter(|stream| job::may_tell(ctx, key, stream)) else {
        return Ok(());
    };
    let (attempt, state) = (end.attempts.to_string(), end.state.name().as_bytes());
    let fields: [&[u8]; 6] = [b"job", key, b"attempt", attempt.as_bytes(), b"done", state];
    entry(ctx, &stream, &fields)
}

/// Adds an entry. Old ones go only from a stream that begins with texts: whoever may write a job's
/// hash names its stream, and must not so drop what somebody else keeps.
fn entry(ctx: &Context, stream: &[u8], fields: &[&[u8]]) -> Result<(), String> {
    let length = settings::TOKENS_LENGTH.text();
    let is_long = server::integer(ctx, "XLEN", &[stream])? > Some(settings::TOKENS_LENGTH.signed());
    let trim: &[&[u8]] = if is_long && begins_with_texts(ctx, stream) {
        &[b"MAXLEN", b"~", length.as_bytes()]
    } else {
        &[]
    };
    server::call(ctx, "XADD", &[&[stream], trim, &[b"*"], fields].concat())
}

fn begins_with_texts(ctx: &Context, stream: &[u8]) -> bool {
    let entries = server::ask(ctx, "XRANGE", &[stream, b"-", b"+", b"COUNT", b"1"]);
    let entry = entries.as_ref().ok().and_then(|entries| item(entries, 0));
    let fields = entry.as_ref().and_then(|entry| item(entry, 1));
    let is = |at, name: &[u8]| {
        let field = fields.as_ref().and_then(|fields| item(fields, at));
        matches!(field, Some(CallReply::String(text)) if text.as_bytes() == name)
    };
    is(0, b"job") && is(2, b"attempt")
}

fn item<'a>(reply: &'a CallReply<'_>, at: usize) -> Option<CallReply<'a>> {
    match reply {
        CallReply::Array(items) => items.get(at)?.ok(),
        _ => None,
    }
}
