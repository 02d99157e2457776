//! Runs a scenario against a server and notes what happened when.
//!
//! One thread submits, by the clock; the ends of jobs are heard of on a subscription, so that no
//! client's own slowness is in the figures. A job's latency counts from the moment it was due, not
//! from when it could be sent.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use redis::Connection;

use crate::{
    pictures,
    reaction::ping_by_the_clock,
    scenario::{Ask, Due, Load, Scenario},
    wire::{Taken, Wire},
};

/// A job's course; times in seconds since the start.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) due: f64,
    pub(crate) prompt: String,
    pub(crate) priority: u8,
    /// From when it was due to the reply of SUBMIT.
    pub(crate) submit: f64,
    pub(crate) end: End,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    /// The queue was full.
    Refused,
    /// It was accepted, and nothing more was heard of it in time.
    Missing,
    Ended {
        at: f64,
        state: String,
        cache: String,
    },
}

/// A look at the server; times in seconds since the start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) at: f64,
    pub(crate) waiting: usize,
    pub(crate) active: usize,
}

/// All that a run came to.
pub(crate) struct Run {
    pub(crate) scenario: Scenario,
    pub(crate) jobs: Vec<Record>,
    pub(crate) samples: Vec<Sample>,
    /// When each PING was due, and how long its reply took from then, in seconds.
    pub(crate) pings: Vec<(f64, f64)>,
}

/// What the threads of a run share.
struct Course {
    start: Instant,
    ends: Mutex<HashMap<usize, End>>,
    ended: AtomicUsize,
    is_over: AtomicBool,
}

impl Course {
    fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// The subscription stands before anything is submitted.
const SETTLE: Duration = Duration::from_millis(100);
const PING_EVERY: Duration = Duration::from_millis(5);
const SAMPLE_EVERY: Duration = Duration::from_millis(200);

pub(crate) fn run(client: &redis::Client, wire: &Wire, scenario: Scenario) -> anyhow::Result<Run> {
    let pictures = pictures::serve(&scenario)?;
    redis::cmd("FLUSHDB").exec(&mut client.get_connection()?)?;
    let mut listener = client.get_connection()?;
    listener.set_read_timeout(Some(Duration::from_millis(200)))?;
    let course = Course {
        start: Instant::now() + SETTLE,
        ends: Mutex::default(),
        ended: AtomicUsize::new(0),
        is_over: AtomicBool::new(false),
    };
    let (jobs, samples, pings) = thread::scope(|scope| {
        let listening = scope.spawn(|| listen(&course, wire, &mut listener));
        let sampling = scope.spawn(|| sample(&course, wire, &mut client.get_connection()?));
        let pinging = scope.spawn(|| ping(&course, &mut client.get_connection()?));
        thread::sleep(SETTLE);
        let jobs = submit_all(&course, wire, (&scenario, &pictures), &mut client.get_connection()?);
        if let Ok(jobs) = &jobs {
            wait_for(&course, &scenario, jobs);
        }
        course.is_over.store(true, Ordering::Relaxed);
        joined(listening)?;
        anyhow::Ok((jobs?, joined(sampling)?, joined(pinging)?))
    })?;
    let ends = course.ends.into_inner().unwrap_or_default();
    let with_end = |(i, job): (usize, Record)| match ends.get(&i) {
        Some(end) => Record { end: end.clone(), ..job },
        None => job,
    };
    let jobs = jobs.into_iter().enumerate().map(with_end).collect();
    Ok(Run { scenario, jobs, samples, pings })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
}

fn submit_all(
    course: &Course,
    wire: &Wire,
    (scenario, pictures): (&Scenario, &str),
    connection: &mut Connection,
) -> anyhow::Result<Vec<Record>> {
    let bar = progress(scenario);
    let mut jobs = Vec::new();
    while let Some(due) = scenario.load.due(jobs.len()) {
        let due = match due {
            Due::At(due) => {
                thread::sleep((course.start + due).saturating_duration_since(Instant::now()));
                due.as_secs_f64()
            }
            Due::WhenFree { until } => {
                let Load::Closed { clients, .. } = scenario.load else { break };
                while jobs.len() - course.ended.load(Ordering::Relaxed) >= clients {
                    thread::sleep(Duration::from_micros(200));
                    anyhow::ensure!(
                        course.start.elapsed() < until + scenario.patience(),
                        "no job ends"
                    );
                }
                if course.start.elapsed() >= until {
                    break;
                }
                course.seconds()
            }
        };
        let Ask { prompt, priority, .. } = scenario.ask(jobs.len());
        let end = match wire.submit(connection, jobs.len(), pictures, scenario)? {
            Taken::Yes => End::Missing,
            Taken::Refused => {
                course.ended.fetch_add(1, Ordering::Relaxed);
                End::Refused
            }
        };
        let submit = course.seconds() - due;
        jobs.push(Record { due, prompt: prompt.to_owned(), priority, submit, end });
        bar.set_position(course.ended.load(Ordering::Relaxed) as u64);
    }
    bar.finish_and_clear();
    Ok(jobs)
}

fn progress(scenario: &Scenario) -> ProgressBar {
    let bar = ProgressBar::new(scenario.load.jobs().unwrap_or_default() as u64);
    let template = "{prefix:14} {bar:30} {pos} of {len} jobs ended, {elapsed}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(scenario.name.clone());
    bar
}

fn wait_for(course: &Course, scenario: &Scenario, jobs: &[Record]) {
    let until = Instant::now() + scenario.patience();
    while course.ended.load(Ordering::Relaxed) < jobs.len() && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
}

/// Notes the ends that the server publishes.
fn listen(course: &Course, wire: &Wire, connection: &mut Connection) -> anyhow::Result<()> {
    let mut subscription = connection.as_pubsub();
    subscription.psubscribe(wire.channels())?;
    while !course.is_over() {
        let message = match subscription.get_message() {
            Ok(message) => message,
            Err(error) if error.is_timeout() => continue,
            Err(error) => return Err(error.into()),
        };
        let at = course.seconds();
        let Some(news) = wire.news(&message.get_payload::<String>()?)? else { continue };
        let end = End::Ended { at, state: news.state, cache: news.cache };
        if let Ok(mut ends) = course.ends.lock() {
            ends.insert(news.job, end);
        }
        course.ended.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn sample(
    course: &Course,
    wire: &Wire,
    connection: &mut Connection,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    while !course.is_over() {
        let (waiting, active) = wire.depth(connection)?;
        samples.push(Sample { at: course.seconds(), waiting, active });
        thread::sleep(SAMPLE_EVERY);
    }
    Ok(samples)
}

fn ping(course: &Course, connection: &mut Connection) -> anyhow::Result<Vec<(f64, f64)>> {
    let (mut pings, clock) = (Vec::new(), (course.start, PING_EVERY));
    ping_by_the_clock(
        connection,
        clock,
        |_due| !course.is_over(),
        |due, reply| {
            pings.push(((due - course.start).as_secs_f64(), reply.as_secs_f64()));
            Ok(())
        },
    )?;
    Ok(pings)
}
