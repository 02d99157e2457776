//! `florence web`: a page about any number of servers, and Prometheus' figures of them.
//!
//! One process beside the servers. [`crate::servers`] asks each of them every second and keeps the last hour;
//! what the page asks besides goes to the server that it is about. The page itself is part of the
//! program.
//!
//! # Layout
//!
//! - [`view`] and [`metrics`] show what servers tell of themselves
//! - [`list`], [`jobs`], [`celery`], [`picture`], [`submit`]: what is asked about jobs
//! - [`guard`]: who may ask; [`routes`]: what can be asked for; [`assets`]: the page

mod assets;
mod celery;
mod guard;
mod jobs;
mod list;
mod metrics;
mod picture;
mod routes;
mod submit;
mod view;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::{Context, ensure};

use crate::servers::{self, server::Server, watch::Watch};
use guard::Guard;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    servers: servers::Args,
    /// Where the page is; other than at loopback it needs a password
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// A file whose first line is the password of the page
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Change nothing
    #[arg(long)]
    read_only: bool,
    /// A name under which the page may be asked for, besides localhost and addresses
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
}

/// What all requests share.
struct App {
    watch: Arc<Watch>,
    guard: Guard,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let password = args.password_file.as_ref().map(|file| -> anyhow::Result<String> {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let line = text.lines().next().unwrap_or_default().to_owned();
        ensure!(!line.is_empty(), "{}: the first line is to be the password", file.display());
        Ok(line)
    });
    let password = password.transpose()?;
    ensure!(
        password.is_some() || args.listen.ip().is_loopback(),
        "{} is not loopback: give --password-file, or listen at 127.0.0.1",
        args.listen
    );
    let servers = args.servers.servers()?;
    servers::runtime()?.block_on(serve(args, password.as_deref(), servers))
}

async fn serve(args: &Args, password: Option<&str>, servers: Vec<Server>) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen at {}", args.listen))?;
    let address = listener.local_addr().context("no address")?;
    let watch = Arc::new(Watch::new(servers));
    watch.start();
    let guard = Guard::new(password, &args.host, args.read_only, address.port());
    let app = Arc::new(App { watch, guard });
    println!("http://{address}/");
    let router = routes::router(&app);
    // Pages that are open keep their connections; nobody waits for them.
    tokio::select! {
        served = async { axum::serve(listener, router).await } => served.context("the page has ended"),
        () = interrupted() => Ok(()),
    }
}

/// Until somebody wants the program to end.
async fn interrupted() {
    let terminated = async {
        let signal = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
        if let Ok(mut signal) = signal {
            signal.recv().await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
    }
}
