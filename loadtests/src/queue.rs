//! A long queue: what a job costs, and whether commands stay as quick as it grows.

use std::{net::TcpListener, time::Instant};

use redis::Connection;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Jobs
    #[arg(long, default_value_t = 1_000_000)]
    jobs: usize,
    /// Commands of a pipeline
    #[arg(long, default_value_t = 1000)]
    pipeline: usize,
}

pub(crate) fn run(client: &redis::Client, args: &Args) -> anyhow::Result<()> {
    let mut connection = client.get_connection()?;
    // A picture server that never answers holds the few jobs that are taken from the queue.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/picture.png", silent.local_addr()?);
    let before: i64 = setting(&mut connection, "florence.max-queue")?.parse()?;
    set(&mut connection, "florence.max-queue", &(args.jobs + 1).to_string())?;
    let base = memory(&mut connection)?;
    println!(
        "| jobs | SUBMIT/s | GET/s | bytes a job, keys | bytes a job, process |\n|---|---|---|---|---|"
    );
    let step = args.jobs.div_ceil(5).max(args.pipeline);
    for first in (0..args.jobs).step_by(step) {
        let last = (first + step).min(args.jobs);
        let submits = pipelined(&mut connection, first..last, args.pipeline, |command, job| {
            command.cmd("FLORENCE.SUBMIT").arg(format!("queue:{job}")).arg(&url).arg("<CAPTION>");
        })?;
        let spread = (last / 20_000).max(1);
        let gets = pipelined(&mut connection, 0..last / spread, args.pipeline, |command, job| {
            command.cmd("FLORENCE.GET").arg(format!("queue:{}", job * spread));
        })?;
        let (keys, process) = memory(&mut connection)?;
        println!(
            "| {last} | {submits:.0} | {gets:.0} | {} | {} |",
            (keys - base.0) / i64::try_from(last)?,
            (process - base.1) / i64::try_from(last)?
        );
    }
    set(&mut connection, "florence.max-queue", &before.to_string())
}

/// Commands a second.
fn pipelined(
    connection: &mut Connection,
    jobs: std::ops::Range<usize>,
    size: usize,
    add: impl Fn(&mut redis::Pipeline, usize),
) -> anyhow::Result<f64> {
    let (start, count) = (Instant::now(), jobs.len());
    let jobs: Vec<usize> = jobs.collect();
    for jobs in jobs.chunks(size) {
        let mut pipeline = redis::pipe();
        for job in jobs {
            add(&mut pipeline, *job);
            pipeline.ignore();
        }
        pipeline.exec(connection)?;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// Bytes that the server has allocated for its data, and those of the process.
fn memory(connection: &mut Connection) -> anyhow::Result<(i64, i64)> {
    let info: String = redis::cmd("INFO").arg("memory").query(connection)?;
    let field = |name: &str| -> anyhow::Result<i64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.unwrap_or_default().trim().parse()?)
    };
    Ok((field("used_memory:")?, field("used_memory_rss:")?))
}

fn setting(connection: &mut Connection, name: &str) -> anyhow::Result<String> {
    let pair: Vec<String> = redis::cmd("CONFIG").arg("GET").arg(name).query(connection)?;
    pair.into_iter().nth(1).ok_or_else(|| anyhow::anyhow!("the server has no {name}"))
}

fn set(connection: &mut Connection, name: &str, value: &str) -> anyhow::Result<()> {
    Ok(redis::cmd("CONFIG").arg("SET").arg(name).arg(value).exec(connection)?)
}
