//! Closed loop: a fixed number of jobs in flight.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use crate::{submit, wait};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Jobs in flight, one measurement each
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64")]
    in_flight: Vec<usize>,
    /// Jobs of each measurement, at least as many as are in flight
    #[arg(long, default_value_t = 64)]
    jobs: usize,
    /// Prompt
    #[arg(long, default_value = "<DENSE_REGION_CAPTION>")]
    prompt: String,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 1024)]
    max_tokens: usize,
    /// Pictures, taken in turns
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
}

pub(crate) fn run(client: &redis::Client, args: &Args) -> anyhow::Result<()> {
    let pictures: Vec<Vec<u8>> =
        args.pictures.iter().map(std::fs::read).collect::<Result<_, _>>()?;
    println!("| in flight | pictures/s | tokens/s | beside one at a time |\n|---|---|---|---|");
    let mut alone = None;
    for (run, in_flight) in args.in_flight.iter().enumerate() {
        let jobs = args.jobs.max(*in_flight);
        let (next, tokens) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let start = Instant::now();
        thread::scope(|scope| {
            let worker = || -> anyhow::Result<()> {
                let mut connection = client.get_connection()?;
                loop {
                    let job = next.fetch_add(1, Ordering::Relaxed);
                    if job >= jobs {
                        return Ok(());
                    }
                    let key = format!("load:{run}:{job}");
                    let picture = &pictures[job % pictures.len()];
                    submit(&mut connection, &key, picture, &args.prompt, args.max_tokens)?;
                    tokens.fetch_add(wait(&mut connection, &key)?, Ordering::Relaxed);
                }
            };
            let workers: Vec<_> = (0..*in_flight).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| {
                worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))
            })
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let rate = jobs as f64 / seconds;
        let alone = *alone.get_or_insert(rate);
        let tokens = tokens.into_inner() as f64 / seconds;
        println!("| {in_flight} | {rate:.2} | {tokens:.0} | {:.2}x |", rate / alone);
    }
    Ok(())
}
