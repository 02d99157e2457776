//! What servers are asked, whoever shows it.
//!
//! - [`server`]: a connection to a server
//! - [`figures`]: histograms and counts
//! - [`watch`]: asks each of them every second, and keeps the last hour

pub(crate) mod figures;
pub(crate) mod server;
pub(crate) mod watch;

use anyhow::{Context, ensure};

use server::Server;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A server; several for masters, replicas, a cluster's nodes. The variable keeps passwords out
    /// of the list of processes, with a blank between URLs
    #[arg(
        long,
        value_name = "URL",
        required = true,
        env = "FLORENCE_REDIS",
        hide_env_values = true,
        value_delimiter = ' '
    )]
    redis: Vec<String>,
}

impl Args {
    /// The servers that are named; none is connected yet.
    pub(crate) fn servers(&self) -> anyhow::Result<Vec<Server>> {
        let mut servers = Vec::<Server>::new();
        for url in &self.redis {
            let server = Server::new(url)?;
            let is_new = servers.iter().all(|known| known.name != server.name);
            ensure!(is_new, "{} is named twice", server.name);
            servers.push(server);
        }
        Ok(servers)
    }
}

/// The server that the environment names, for what asks one.
pub(crate) fn in_environment() -> anyhow::Result<Option<String>> {
    let named = std::env::var("FLORENCE_REDIS").unwrap_or_default();
    let mut urls = named.split_whitespace();
    let first = urls.next().map(str::to_owned);
    ensure!(urls.next().is_none(), "FLORENCE_REDIS names several servers: --redis URL names one");
    Ok(first)
}

/// The threads that ask servers.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_watched_twice_under_one_name() {
        let servers = |urls: [&str; 2]| Args { redis: urls.map(str::to_owned).into() }.servers();
        let error = servers(["redis://a:pw@127.0.0.1/0", "redis://127.0.0.1:6379"]).err().unwrap();
        assert_eq!(error.to_string(), "127.0.0.1:6379 is named twice");
        assert_eq!(servers(["redis://127.0.0.1/1", "redis://127.0.0.1"]).unwrap().len(), 2);
    }
}
