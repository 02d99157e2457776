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

use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    servers::{self, server::Server, watch::Watch},
    signals::Signals,
};
use guard::{Guard, Peer};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    servers: servers::Args,
    /// Where the page is; other than at loopback it needs a password
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = listen)]
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

/// An address and a port, or a name that has one address or more, of which the first counts.
fn listen(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs().map_err(|error| error.to_string())?.next();
    found.ok_or_else(|| "the name has no address".to_owned())
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
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen at {}", args.listen))?;
    let address = listener.local_addr().context("no address")?;
    let watch = Arc::new(Watch::new(servers));
    watch.start();
    let guard = Guard::new(password, &args.host, args.read_only, address.port());
    let app = Arc::new(App { watch, guard });
    tellln!("http://{address}/");
    let router = routes::router(&app);
    let mut signals = Signals::new()?;
    // Pages that are open keep their connections; nobody waits for them.
    tokio::select! {
        () = answer(listener, router) => Ok(()),
        () = signals.next() => Ok(()),
    }
}

/// Answers whoever connects, so many at a time that descriptors are left for the servers. The head
/// of a request has to come soon: clients that send none would keep others out.
async fn answer(listener: TcpListener, router: Router) {
    const PATIENCE: Duration = Duration::from_secs(10);
    const MOST: usize = 500;
    /// After which there may be room for a connection again.
    const PAUSE: Duration = Duration::from_millis(100);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    let places = Arc::new(Semaphore::new(MOST));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Ok((stream, from)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let router = router.clone().layer(Extension(Peer(from.ip())));
        let service = TowerToHyperService::new(router);
        // Who goes away needs no answer.
        let served = http.serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async {
            drop(served.await);
            drop(place);
        });
    }
}
