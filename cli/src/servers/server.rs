//! One server that the page is about: its name, and a connection that is made anew when it breaks.

use std::time::Duration;

use anyhow::{Context, ensure};
use futures_util::future::join_all;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use redis::{
    Client, Cmd, ConnectionAddr, FromRedisValue, RedisError, RedisResult, Value,
    aio::MultiplexedConnection,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

const CONNECT_WITHIN: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A key as the page names it: what is no plain text is percent-encoded.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Key(String);

impl Key {
    pub(crate) fn of(name: &[u8]) -> Self {
        const ENCODED: &AsciiSet = &CONTROLS.add(b'%');
        Self(percent_encode(name, ENCODED).to_string())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        percent_decode_str(&self.0).collect()
    }
}

/// Who connects to the server of a URL. The error does not repeat it, because of its password.
pub(crate) fn client(url: &str) -> anyhow::Result<Client> {
    ensure!(url.contains("://"), "a --redis URL begins with redis://, or rediss:// for TLS");
    Client::open(url).context(
        "the --redis URL is not valid (in a password, blanks and # / ? @ : % are written as \
         %20 %23 %2F %3F %40 %3A %25)",
    )
}

/// A server, or one database of it.
pub(crate) struct Server {
    /// Host, port, and the database if it is not 0; never the password.
    pub(crate) name: String,
    /// Options with which redis-cli connects there, but for user and password.
    pub(crate) cli: Vec<String>,
    client: Client,
    connection: Mutex<Option<MultiplexedConnection>>,
}

impl Server {
    /// The server of a URL.
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let client = client(url)?;
        let info = client.get_connection_info();
        let mut cli = Vec::new();
        let mut option = |name: &str, value: String, default: &str| {
            if value != default {
                cli.extend([name.to_owned(), value]);
            }
        };
        let address = match &info.addr {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                ensure!(!host.is_empty(), "a --redis URL names no host");
                option("-h", host.clone(), "127.0.0.1");
                option("-p", port.to_string(), "6379");
                format!("{host}:{port}")
            }
            ConnectionAddr::Unix(path) => {
                option("-s", path.display().to_string(), "");
                path.display().to_string()
            }
        };
        option("-n", info.redis.db.to_string(), "0");
        if matches!(info.addr, ConnectionAddr::TcpTls { .. }) {
            cli.push("--tls".to_owned());
        }
        let name = match info.redis.db {
            0 => address,
            db => format!("{address}/{db}"),
        };
        Ok(Self { name, cli, client, connection: Mutex::new(None) })
    }

    async fn connection(&self) -> RedisResult<MultiplexedConnection> {
        let mut kept = self.connection.lock().await;
        if let Some(connection) = &*kept {
            return Ok(connection.clone());
        }
        let config = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(CONNECT_WITHIN)
            .set_response_timeout(ANSWER_WITHIN);
        let made = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(kept.insert(made).clone())
    }

    /// What a command answers.
    pub(crate) async fn call<T: FromRedisValue>(&self, command: &Cmd) -> RedisResult<T> {
        let mut connection = self.connection().await?;
        let reply = command.query_async(&mut connection).await;
        if let Err(error) = &reply {
            self.forget_if_broken(error).await;
        }
        reply
    }

    /// What each of several commands answers, which are sent together.
    pub(crate) async fn each<T: FromRedisValue>(
        &self,
        commands: &[Cmd],
    ) -> RedisResult<Vec<RedisResult<T>>> {
        let connection = self.connection().await?;
        let replies = join_all(commands.iter().map(|command| {
            let mut connection = connection.clone();
            async move { command.query_async(&mut connection).await }
        }))
        .await;
        if let Some(error) = replies.iter().find_map(|reply| reply.as_ref().err()) {
            self.forget_if_broken(error).await;
        }
        Ok(replies)
    }

    async fn forget_if_broken(&self, error: &RedisError) {
        if error.is_io_error() || error.is_timeout() || error.is_unrecoverable_error() {
            *self.connection.lock().await = None;
        }
    }
}

/// What went wrong, for people: the server's own words, or what happened to the connection.
pub(crate) fn words(error: &RedisError) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        (Some(code), None) => code.to_owned(),
        (None, _) => error.to_string(),
    }
}

/// The entries of a map, as either protocol gives it.
pub(crate) fn entries(value: Value) -> Vec<(String, Value)> {
    match value {
        Value::Map(entries) => {
            entries.into_iter().map(|(name, value)| (text(&name), value)).collect()
        }
        Value::Array(flat) => {
            let mut flat = flat.into_iter();
            std::iter::from_fn(|| Some((text(&flat.next()?), flat.next()?))).collect()
        }
        _ => Vec::new(),
    }
}

/// A value as text; what is not UTF-8 is replaced.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        // INFO is verbatim in RESP3.
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => text.clone(),
        Value::Int(number) => number.to_string(),
        Value::Double(number) => number.to_string(),
        _ => String::new(),
    }
}

/// A value as a number, 0 if it is none.
pub(crate) fn number(value: &Value) -> f64 {
    match value {
        Value::Int(number) => *number as f64,
        Value::Double(number) => *number,
        other => text(other).parse().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_any_bytes_come_back() {
        for key in [&b"florence:01M8"[..], b"100%", b"a b\n", "\u{e9}".as_bytes(), b"\xff\0%41"] {
            let token = Key::of(key);
            assert_eq!(token.bytes(), key, "{token:?}");
            assert!(token.0.is_ascii(), "{token:?}");
        }
        assert_eq!(Key::of(b"florence:{*}:01 <x>").0, "florence:{*}:01 <x>");
    }

    #[test]
    fn a_servers_name_has_no_password() {
        let name = |url| Server::new(url).unwrap().name;
        assert_eq!(name("redis://user:secret@127.0.0.1:6380/3"), "127.0.0.1:6380/3");
        assert_eq!(name("redis://127.0.0.1"), "127.0.0.1:6379");
        for (url, advice) in [
            ("redis://u:secret#w@x", "%23"),
            ("redis://u:secret/w@x", "%23"),
            ("redis//:secret@x", "begins with redis://"),
            (":secret@localhost:6379", "begins with redis://"),
        ] {
            let error = format!("{:#}", Server::new(url).err().unwrap());
            assert!(error.contains(advice) && !error.contains("secret"), "{error}");
        }
        assert_eq!(name("redis://:secret%23%2F@127.0.0.1"), "127.0.0.1:6379");
    }

    #[test]
    fn redis_cli_is_told_what_is_not_its_default() {
        let cli = |url| Server::new(url).unwrap().cli.join(" ");
        assert_eq!(cli("redis://user:secret@127.0.0.1:6379/0"), "");
        assert_eq!(cli("redis://:secret@example.com:6380/3"), "-h example.com -p 6380 -n 3");
        assert_eq!(cli("rediss://127.0.0.1"), "--tls");
        assert_eq!(cli("unix:///run/redis.sock?db=1"), "-s /run/redis.sock -n 1");
    }

    #[test]
    fn replies_of_either_protocol_are_text() {
        let verbatim = Value::VerbatimString {
            format: redis::VerbatimFormat::Text,
            text: "role:slave".to_owned(),
        };
        assert_eq!(text(&verbatim), "role:slave");
        assert_eq!(text(&Value::BulkString(b"role:slave".into())), "role:slave");
    }
}
