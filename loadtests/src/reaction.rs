//! How quickly the server answers.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use crate::{submit, wait};

#[derive(clap::Args)]
pub(crate) struct PingArgs {
    /// Seconds of each half
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Jobs in flight in the second half
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    /// Prompt of the jobs
    #[arg(long, default_value = "<DENSE_REGION_CAPTION>")]
    prompt: String,
    /// Picture of the jobs
    picture: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct WakeArgs {
    /// Jobs, one after the other
    #[arg(long, default_value_t = 5000)]
    jobs: usize,
    /// Picture of the jobs
    picture: PathBuf,
}

/// PING once a millisecond, by the clock: a late reply counts from when its PING was due.
pub(crate) fn ping(client: &redis::Client, args: &PingArgs) -> anyhow::Result<()> {
    let picture = std::fs::read(&args.picture)?;
    println!("| PING, microseconds | p50 | p99 | p99.9 | most |\n|---|---|---|---|---|");
    row("idle", &pings(client, args.seconds)?);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let keep_busy = |worker: usize| -> anyhow::Result<()> {
            let mut connection = client.get_connection()?;
            let mut job = 0;
            while !is_over.load(Ordering::Relaxed) {
                let key = format!("ping:{worker}:{job}");
                submit(&mut connection, &key, &picture, &args.prompt, 1024)?;
                wait(&mut connection, &key)?;
                job += 1;
            }
            Ok(())
        };
        let workers: Vec<_> =
            (0..args.in_flight).map(|worker| scope.spawn(move || keep_busy(worker))).collect();
        thread::sleep(Duration::from_secs(1));
        let busy = pings(client, args.seconds);
        is_over.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))?;
        }
        row(&format!("{} jobs in flight", args.in_flight), &busy?);
        Ok(())
    })
}

fn pings(client: &redis::Client, seconds: u64) -> anyhow::Result<Histogram<u64>> {
    const INTERVAL: Duration = Duration::from_millis(1);
    let mut times = Histogram::new(3)?;
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds);
    let mut connection = client.get_connection()?;
    ping_by_the_clock(
        &mut connection,
        (start, INTERVAL),
        |due| due < end,
        |_due, reply| Ok(times.record(u64::try_from(reply.as_micros())?)?),
    )?;
    Ok(times)
}

/// Sends a PING at every interval from `start` on, as long as `goes_on` for the moment that it is
/// due; `note` hears of the moment and of the reply's time. A late reply counts from when its PING
/// was due.
pub(crate) fn ping_by_the_clock(
    connection: &mut redis::Connection,
    (start, interval): (Instant, Duration),
    goes_on: impl Fn(Instant) -> bool,
    mut note: impl FnMut(Instant, Duration) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut due = start;
    while goes_on(due) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // What the sleep overshot is this machine's scheduler, not the server: count from the
        // later of the two only if this PING is not late because of an earlier one.
        let sent = Instant::now();
        redis::cmd("PING").exec(connection)?;
        let from = if sent - due > interval { due } else { sent };
        note(due, from.elapsed())?;
        due += interval;
    }
    Ok(())
}

/// One job after the other whose answer is in the cache: all that is left is the module itself.
pub(crate) fn wake(client: &redis::Client, args: &WakeArgs) -> anyhow::Result<()> {
    let picture = std::fs::read(&args.picture)?;
    let mut connection = client.get_connection()?;
    let mut times = Histogram::new(3)?;
    for job in 0..=args.jobs {
        let key = format!("wake:{job}");
        let start = Instant::now();
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        command.arg(&key).arg("DATA").arg(&picture).arg("<CAPTION>").exec(&mut connection)?;
        wait(&mut connection, &key)?;
        if job > 0 {
            times.record(u64::try_from(start.elapsed().as_micros())?)?;
        }
    }
    println!(
        "| SUBMIT to answer, microseconds | p50 | p99 | p99.9 | most |\n|---|---|---|---|---|"
    );
    row(&format!("{} cached answers", args.jobs), &times);
    Ok(())
}

fn row(what: &str, times: &Histogram<u64>) {
    let at = |quantile| times.value_at_quantile(quantile);
    println!("| {what} | {} | {} | {} | {} |", at(0.5), at(0.99), at(0.999), times.max());
}
