//! `FLORENCE.CONTROL channel message`: what a PUBLISH to Celery's channel of remote control becomes.
//!
//! It is published all the same, with the rights of the client; then it is acted on.

use redis_module::{CallOptionsBuilder, CallReply, CallResult, Context, RedisResult, RedisValue};

use super::args::Args;
use crate::{celery, server::reply};

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let (channel, message) = (args.next()?, args.next()?);
    args.finish()?;
    let options = CallOptionsBuilder::new().verify_acl().replicate().errors_as_replies().build();
    let reply: CallResult<'_> =
        ctx.call_ext("PUBLISH", &options, &[channel.as_slice(), message.as_slice()][..]);
    match reply {
        Ok(CallReply::I64(receivers)) => {
            celery::published(ctx, channel.as_slice(), message.as_slice());
            Ok(RedisValue::Integer(receivers.to_i64()))
        }
        Ok(_) => Ok(RedisValue::Integer(0)),
        Err(denied) => Err(reply::error("NOPERM", denied.to_utf8_string().unwrap_or_default())),
    }
}
