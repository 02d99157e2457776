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
        self.redis.iter().map(|url| Server::new(url)).collect()
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
