//! The end of a job as news: published, added to a stream, told as a keyspace event, logged.
//!
//! Best effort: the job has ended, whoever hears of it.

mod log;
mod pieces;

use redis_module::{Context, ContextFlags};

use crate::{
    figures,
    job::{
        Job,
        life::{Ended, Follower},
        view,
    },
    server,
    settings::{self, Setting},
};

pub(crate) use log::{tell, tell_rest, warn};
pub(crate) use pieces::{Piece, add as add_piece};

/// Tells the world.
pub(crate) struct News;

impl Follower for News {
    fn ended(&self, ctx: &Context, key: &[u8], end: &Ended<'_>) {
        announce(ctx, key, end);
        count_failure(&pieces::ended(ctx, key, end));
        log::ended(key, end);
        server::notify(ctx, &format!("florence.{}", end.state.name()), key);
    }
}

/// Publishes the job, and adds it to the stream of the settings.
fn announce(ctx: &Context, key: &[u8], end: &Ended<'_>) {
    let is_cluster = ctx.get_flags().contains(ContextFlags::CLUSTER);
    let is_published = settings::PUBLISH.get();
    // In a cluster the stream would be in another slot than the job.
    let stream = Some(settings::STREAM.get()).filter(|name| !name.is_empty() && !is_cluster);
    if !is_published && stream.is_none() {
        return;
    }
    let Ok(map) = Job::look(ctx, &server::string(ctx, key)).map(|job| view::json(key, &job)) else {
        return;
    };
    if is_published {
        let (command, channel) =
            if is_cluster { ("SPUBLISH", shard_channel(key)) } else { ("PUBLISH", channel(key)) };
        count_failure(&server::call(ctx, command, &[&channel, map.as_bytes()]));
    }
    if let Some(stream) = stream {
        let length = settings::STREAM_LENGTH.text();
        let args: [&[u8]; 11] = [
            stream.as_bytes(),
            b"MAXLEN",
            b"~",
            length.as_bytes(),
            b"*",
            b"id",
            key,
            b"state",
            end.state.name().as_bytes(),
            b"job",
            map.as_bytes(),
        ];
        count_failure(&server::call(ctx, "XADD", &args));
    }
}

fn count_failure(result: &Result<(), String>) {
    if result.is_err() {
        figures::UNANNOUNCED.add(1);
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
