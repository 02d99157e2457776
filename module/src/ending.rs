//! How a job ends: its last fields, its time to live, and the news of it.
//!
//! All of it happens in one lock section, which the append-only file and the replicas see as one
//! transaction.

use redis_module::{Context, ContextFlags};

use crate::{
    celery, config, ffi,
    job::{self, Fields, Job, State, call, unix_ms},
    state::{Counters, SHARED},
    view,
};

/// Whether FLORENCE.RETRY may need a submitted picture again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    Keep,
    Drop,
}

/// Ends a job: writes the fields, drops the claim, starts the time to live, tells the world.
pub(crate) fn finish(
    ctx: &Context,
    key: &[u8],
    state: State,
    data: Data,
    mut fields: Fields,
) -> Result<(), String> {
    let name = ffi::string(ctx, key);
    let ttl = Job::open(ctx, &name).ok().and_then(|job| job.number("ttl")).unwrap_or_default();
    fields.push(("finished_at", unix_ms().to_string().into()));
    fields.push(("state", state.name().into()));
    // The state goes first: a claim that is dropped from unfinished work makes it a suspect.
    job::write(ctx, key, &fields)?;
    let mut gone: Vec<&[u8]> = vec![key, b"owner", b"retry_at"];
    if data == Data::Drop {
        gone.push(b"data");
    }
    call(ctx, "HDEL", &gone)?;
    if ttl > 0 {
        call(ctx, "EXPIRE", &[key, ttl.to_string().as_bytes()])?;
    }
    celery::ended(ctx, key);
    announce(ctx, key, state);
    Counters::add(SHARED.counters.ended(state), 1);
    ffi::notify(ctx, &format!("florence.{}", state.name()), key);
    Ok(())
}

/// Publishes the job, and adds it to the stream of the settings. Best effort: the job has ended,
/// whoever hears of it.
fn announce(ctx: &Context, key: &[u8], state: State) {
    let is_cluster = ctx.get_flags().contains(ContextFlags::CLUSTER);
    let is_published = config::flag(&config::PUBLISH);
    // In a cluster the stream would be in another slot than the job.
    let stream = Some(config::text(&config::STREAM)).filter(|name| !name.is_empty() && !is_cluster);
    if !is_published && stream.is_none() {
        return;
    }
    let Ok(map) = Job::open(ctx, &ffi::string(ctx, key)).map(|job| view::json(key, &job)) else {
        return;
    };
    if is_published {
        let (command, channel) =
            if is_cluster { ("SPUBLISH", shard_channel(key)) } else { ("PUBLISH", channel(key)) };
        count_failure(&call(ctx, command, &[&channel, map.as_bytes()]));
    }
    if let Some(stream) = stream {
        let length = config::number(&config::STREAM_LENGTH).to_string();
        let args: [&[u8]; 11] = [
            stream.as_bytes(),
            b"MAXLEN",
            b"~",
            length.as_bytes(),
            b"*",
            b"id",
            key,
            b"state",
            state.name().as_bytes(),
            b"job",
            map.as_bytes(),
        ];
        count_failure(&call(ctx, "XADD", &args));
    }
}

fn count_failure(result: &Result<(), String>) {
    if result.is_err() {
        Counters::add(&SHARED.counters.unannounced, 1);
    }
}

fn channel(key: &[u8]) -> Vec<u8> {
    [b"florence:", key].concat()
}

/// A channel of the key's own slot: the key's hash tag, or the whole key as one.
fn shard_channel(key: &[u8]) -> Vec<u8> {
    let open = key.iter().position(|byte| *byte == b'{');
    let tag = open.and_then(|open| key[open + 1..].iter().position(|byte| *byte == b'}'));
    if tag.is_some_and(|length| length > 0) {
        return channel(key);
    }
    [b"florence:{", key, b"}"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_channel_hashes_like_its_key() {
        assert_eq!(shard_channel(b"job:1"), b"florence:{job:1}");
        assert_eq!(shard_channel(b"{user}:1"), b"florence:{user}:1");
    }
}
