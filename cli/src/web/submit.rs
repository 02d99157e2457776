//! A picture that is tried from the page.

use redis::{Cmd, RedisResult, Value, cmd};
use serde::Deserialize;
use serde_json::json;

use super::routes::Refusal;
use crate::servers::{
    server::{Key, Server},
    watch::Watch,
};

/// The first line of the request; the picture's bytes follow, unless there is an address.
#[derive(Debug, Deserialize)]
struct Asked {
    server: Option<usize>,
    prompts: Vec<String>,
    url: Option<String>,
}

/// What is tried leaves by itself.
const TTL_SECONDS: u32 = 3600;
/// The longer side of what the page shows.
const THUMBNAIL: u32 = 1024;

/// Submits a job, and names it. In a cluster another of the servers may have its slot; of several,
/// one may be away.
pub(super) async fn submit(watch: &Watch, body: &[u8]) -> Result<serde_json::Value, Refusal> {
    let bad = || Refusal::bad("the request cannot be read");
    let end = body.iter().position(|byte| *byte == b'\n').ok_or_else(bad)?;
    let (line, bytes) = body.split_at(end);
    let asked: Asked = serde_json::from_slice(line).map_err(|_unread| bad())?;
    let picture = bytes.get(1..).unwrap_or_default();
    let mut servers = watch.asked(asked.server);
    if asked.server.is_some() {
        servers.extend(watch.asked(None).into_iter().filter(|index| Some(*index) != asked.server));
    }
    let mut refused = None;
    for index in servers {
        match with_thumbnail(watch.server(index)?, &asked, picture).await {
            Ok(key) => return Ok(json!({ "server": index, "id": Key::of(&key) })),
            Err(error) => {
                let is_moved = error.code() == Some("MOVED");
                // What a server does not say is the connection's fault; who chose it is to hear of it.
                // One that says nothing in time may have taken the job.
                let is_away =
                    error.code().is_none() && !error.is_timeout() && asked.server != Some(index);
                if !is_moved && !is_away {
                    return Err(error.into());
                }
                refused = Some(error);
            }
        }
    }
    Err(refused.map_or_else(|| Refusal::bad("there is no such server"), Refusal::from))
}

/// Older servers keep no thumbnails.
async fn with_thumbnail(server: &Server, asked: &Asked, picture: &[u8]) -> RedisResult<Vec<u8>> {
    let mut command = command(asked, picture);
    command.arg("THUMBNAIL").arg(THUMBNAIL);
    match key(server, &command).await {
        Err(error) if error.to_string().contains("THUMBNAIL") => {
            key(server, &self::command(asked, picture)).await
        }
        reply => reply,
    }
}

async fn key(server: &Server, command: &Cmd) -> RedisResult<Vec<u8>> {
    match server.call(command).await? {
        Value::BulkString(key) => Ok(key),
        _ => Ok(Vec::new()),
    }
}

fn command(asked: &Asked, picture: &[u8]) -> Cmd {
    let mut command = cmd("FLORENCE.SUBMIT");
    command.arg("*");
    match &asked.url {
        Some(url) => command.arg(url),
        None => command.arg("DATA").arg(picture),
    };
    match &asked.prompts[..] {
        [prompt] => command.arg(prompt),
        prompts => command.arg("PROMPTS").arg(prompts.len()).arg(prompts),
    };
    command.arg("TTL").arg(TTL_SECONDS);
    command
}
