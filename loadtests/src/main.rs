//! `florence-load`: measures a running Redis with the Florence module, as its clients see it.
//!
//! Every measurement empties the selected database first. Figures go to docs/SPEED.md.
#![expect(clippy::print_stdout, reason = "a command-line tool")]

mod drive;
mod pictures;
mod queue;
mod reaction;
mod report;
mod scenario;
mod throughput;
mod wire;

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand};
use redis::Connection;
use wire::Wire;

/// Load on a Redis with the Florence module.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// The server
    #[arg(long, default_value = "redis://127.0.0.1:6379/9")]
    url: String,
    /// Send scenarios to this queue of Celery, as this task, instead of by FLORENCE.SUBMIT
    #[arg(long, value_name = "QUEUE:TASK")]
    celery: Option<String>,
    /// Seconds to wait for a model
    #[arg(long, default_value_t = 120)]
    patience: u64,
    /// Allow the selected database to be emptied
    #[arg(long)]
    flush: bool,
    #[command(subcommand)]
    measurement: Measurement,
}

impl Cli {
    fn wire(&self) -> anyhow::Result<Wire> {
        match &self.celery {
            None => Ok(Wire::Florence),
            Some(_) if !matches!(self.measurement, Measurement::Scenario(_)) => {
                anyhow::bail!("only scenarios can be sent to Celery")
            }
            Some(setting) => Wire::celery(setting),
        }
    }
}

#[derive(Subcommand)]
enum Measurement {
    /// Runs scenarios, each described by a file of loadtests/scenarios.
    Scenario(ScenarioArgs),
    /// Pictures a second with so many jobs in flight.
    Throughput(throughput::Args),
    /// Latency of PING on an idle server and while the engine is busy.
    Ping(reaction::PingArgs),
    /// Time from SUBMIT to the reply of WAIT for answers that cost nothing (cached).
    Wake(reaction::WakeArgs),
    /// Memory a job, and rates of SUBMIT and GET, as the queue grows.
    Queue(queue::Args),
}

#[derive(clap::Args)]
struct ScenarioArgs {
    /// Scenarios
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Write a page with plots
    #[arg(long)]
    html: Option<PathBuf>,
    /// Write the figures as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

fn scenarios(client: &redis::Client, wire: &Wire, args: &ScenarioArgs) -> anyhow::Result<()> {
    let scenarios = args.files.iter().map(|file| scenario::Scenario::read(file));
    let mut runs = Vec::new();
    for scenario in scenarios.collect::<Result<Vec<_>, _>>()? {
        let run = drive::run(client, wire, scenario)?;
        let summary = report::Summary::of(&run);
        println!("{}", summary.table());
        runs.push((run, summary));
    }
    if let Some(path) = &args.html {
        report::write_page(path, &runs)?;
    }
    if let Some(path) = &args.json {
        let summaries: Vec<_> = runs.iter().map(|(_, summary)| summary).collect();
        std::fs::write(path, serde_json::to_string_pretty(&summaries)?)?;
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    anyhow::ensure!(cli.flush, "the measurements empty {}: say --flush", cli.url);
    let client = redis::Client::open(cli.url.as_str())?;
    let mut connection = client.get_connection()?;
    redis::cmd("FLUSHDB").exec(&mut connection)?;
    let wire = cli.wire()?;
    wire.wait_until_ready(&mut connection, Duration::from_secs(cli.patience))?;
    match cli.measurement {
        Measurement::Scenario(args) => scenarios(&client, &wire, &args),
        Measurement::Throughput(args) => throughput::run(&client, &args),
        Measurement::Ping(args) => reaction::ping(&client, &args),
        Measurement::Wake(args) => reaction::wake(&client, &args),
        Measurement::Queue(args) => queue::run(&client, &args),
    }?;
    redis::cmd("FLUSHDB").exec(&mut connection)?;
    Ok(())
}

/// Submits a picture that is computed whatever the caches hold.
fn submit(
    connection: &mut Connection,
    key: &str,
    picture: &[u8],
    prompt: &str,
    max_tokens: usize,
) -> redis::RedisResult<()> {
    let mut command = redis::cmd("FLORENCE.SUBMIT");
    command.arg(key).arg("DATA").arg(picture).arg(prompt);
    command.arg("NOCACHE").arg("MAXTOKENS").arg(max_tokens).exec(connection)
}

/// Waits for a job to be done; the number of its tokens.
fn wait(connection: &mut Connection, key: &str) -> anyhow::Result<usize> {
    let job: std::collections::HashMap<String, Option<String>> =
        redis::cmd("FLORENCE.WAIT").arg(key).arg(600).query(connection)?;
    anyhow::ensure!(job["state"].as_deref() == Some("done"), "{key}: {job:?}");
    Ok(job["tokens"].as_deref().unwrap_or_default().parse()?)
}
