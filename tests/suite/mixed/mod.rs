//! Jobs are submitted, and their keys renamed, copied, moved, restored and edited at random, while
//! servers die, change roles, reload and have their clocks set. One thread does all of it and keeps
//! an exact model: every job must end once, with the answer for its own picture and prompt.

mod check;
mod faults;
mod fleet;
mod model;
mod random;
mod requests;
mod steps;

use std::{
    collections::BTreeMap,
    io::Write,
    thread::sleep,
    time::{Duration, Instant},
};

use florence_tests::{Pictures, Sentinel};
use redis::Connection;

use check::answers;
use faults::Fault;
use fleet::Fleet;
use model::{Job, Model, Place};
use random::Random;
use requests::Form;
use steps::Step;

/// Jobs submitted per seed.
const ROUND: usize = 200;
const PICTURES: [&str; 4] = ["poster.jpg", "shapes.png", "sign.png", "tall.png"];
const PROMPTS: [&str; 3] = ["<OD>", "<OCR>", "<CAPTION>"];
const FINAL: [&str; 4] = ["done", "failed", "cancelled", "expired"];
/// Counters that stay at zero unless something goes wrong inside the server.
const COUNTERS: [&str; 3] = ["leases_recovered", "panics", "threads_restarted"];
/// If no job ends for this long, the remaining ones count as stuck; also how long the servers may
/// take to get in sync.
const STUCK: Duration = Duration::from_secs(25);
/// Longest wait for a reply; a server that is silent for longer counts as hung.
const SILENCE: Duration = Duration::from_secs(20);

/// The run of one seed.
struct Driver {
    name: &'static str,
    seed: u64,
    random: Random,
    fleet: Fleet,
    model: Model,
    pictures: Pictures,
    connection: Option<Connection>,
    /// Number of operations so far.
    number: usize,
    /// Older DUMP payloads, each with its job and the epoch that it is from.
    shelf: Vec<(Vec<u8>, Job, usize)>,
    /// Goes up whenever the master restarts or changes its role.
    epoch: usize,
    /// Every fault, and every operation with the states that its keys had before.
    log: Vec<String>,
    faults: usize,
    problems: Vec<String>,
    counters: BTreeMap<&'static str, i64>,
}

impl Driver {
    /// Submits `count` jobs amid everything else, with the faults spread evenly among them.
    fn run(&mut self, count: usize, mut faults: Vec<Fault>) {
        self.random.shuffle(&mut faults);
        let (mut submitted, mut dealt) = (0, 0);
        let jump = self.random.below(count);
        while submitted < count {
            match self.random.below(100) {
                0..42 => {
                    self.submit();
                    submitted += 1;
                    if submitted == jump {
                        self.set_clocks(true);
                    }
                }
                42..84 => {
                    if let Some((steps, form)) = self.plan() {
                        self.perform(steps, form);
                    }
                }
                84..90 => self.dump(),
                90..95 => self.disturb(),
                _ => sleep(self.random.pause(100)),
            }
            if dealt < faults.len() && submitted * (faults.len() + 1) >= count * (dealt + 1) {
                self.inflict(faults[dealt]);
                dealt += 1;
            }
            sleep(self.random.pause(12));
        }
        if self.model.is_swapped {
            self.perform(vec![Step::Swap], Form::Multi);
        }
    }

    fn fail(&self, problem: &str, place: Option<&Place>) -> ! {
        let job = place.and_then(|place| self.model.jobs.get(place));
        let mut text = problem.to_owned();
        text += &job.map(|job| job.story.join("\n    ")).unwrap_or_default();
        text += "\n  ";
        text += &self.mentions("FAULT").join("\n  ");
        text += "\n";
        text += &self.problems.join("\n");
        for (i, server) in self.fleet.servers.iter().enumerate() {
            if self.fleet.replication(i).is_none() {
                let log = server.log();
                let last: Vec<&str> = log.lines().rev().take(60).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                text = [&text, "a server does not answer:", &last.join("\n")].join("\n");
            }
        }
        if let Some(sentinel) = self.fleet.sentinels.first() {
            text = [&text, "a sentinel:", &sentinel.log()].join("\n");
        }
        panic!("chaos, {}, seed {}: {text}", self.name, self.seed)
    }

    /// The lines of the log that contain a word.
    fn mentions(&self, word: &str) -> Vec<&str> {
        let is_in = |line: &&str| line.split([' ', ';', '"']).any(|part| part == word);
        self.log.iter().map(String::as_str).filter(is_in).collect()
    }

    fn log_fault(&mut self, fault: &str) {
        self.faults += 1;
        self.log.push(format!("{} FAULT {fault}", self.number));
    }
}

/// The seeds to run, and the number of jobs for each.
///
/// The seed, which is printed, decides what happens: `FLORENCE_CHAOS_SEED=n` runs that one again.
/// It does not decide the timing, so it may take several runs to reproduce a rare failure.
/// `make chaos` runs more seeds; `FLORENCE_CHAOS_JOBS` sets the number of jobs.
fn rounds() -> (Vec<u64>, usize) {
    let jobs = crate::chaos::jobs();
    let count = jobs.min(ROUND);
    let seed = std::env::var("FLORENCE_CHAOS_SEED").ok();
    let seeds = match seed.map(|seed| seed.parse().expect("a number")) {
        Some(seed) => vec![seed],
        None => (1..=jobs.div_ceil(count) as u64).collect(),
    };
    (seeds, count)
}

/// Runs one seed, from the first job to the last check.
fn round(name: &'static str, seed: u64, count: usize, fleet: Fleet, faults: Vec<Fault>) {
    let (start, random) = (Instant::now(), Random::new(seed));
    println!("chaos, {name}: seed {seed} begins");
    let mut driver = Driver {
        name,
        seed,
        random,
        fleet,
        model: Model::default(),
        pictures: Pictures::serve(),
        connection: None,
        number: 0,
        shelf: vec![],
        epoch: 0,
        log: vec![],
        faults: 0,
        problems: vec![],
        counters: BTreeMap::new(),
    };
    answers();
    driver.run(count, faults);
    let given_up = driver.check_jobs();
    let ends = driver.check_ends();
    driver.check_replicas();
    driver.check_counters();
    println!(
        "chaos, {name}, seed {seed}: {count} jobs submitted, {} operations, {} faults in {:.0} s: \
         {} keys, {ends} ends, {given_up} given up after two kills, {} problems",
        driver.number,
        driver.faults,
        start.elapsed().as_secs_f64(),
        driver.model.jobs.len(),
        driver.problems.len()
    );
    if !driver.problems.is_empty() {
        driver.fail(&format!("{} problems", driver.problems.len()), None);
    }
}

#[test]
fn every_job_ends_once_with_its_own_pictures_answer_in_mixed_chaos() {
    let (seeds, count) = rounds();
    for seed in seeds {
        let fleet = Fleet::start(2, &["appendonly yes", "appendfsync always"]);
        let faults = vec![
            Fault::Kill,
            Fault::KillInFlight,
            Fault::KillInFlight,
            Fault::KillReplica,
            Fault::Terminate,
            Fault::ShutDown,
            Fault::Reload,
            Fault::Failover,
            Fault::Exchange,
            Fault::Exchange,
            Fault::Unreachable,
            Fault::Unreachable,
        ];
        round("mixed, one server and its stand-in", seed, count, fleet, faults);
    }
}

#[test]
fn every_job_ends_once_with_its_own_pictures_answer_in_mixed_chaos_under_sentinel() {
    let (seeds, count) = rounds();
    for seed in seeds {
        // With and without an append-only file, with one sentinel and with three.
        let lines: &[&str] = match seed % 2 {
            0 => &[],
            _ => &["appendonly yes", "appendfsync everysec"],
        };
        let mut fleet = Fleet::start(3, lines);
        match Sentinel::watch(&fleet.servers[0], if seed % 4 < 2 { 3 } else { 1 }) {
            Ok(sentinels) => fleet.sentinels = sentinels,
            Err(why) => {
                let why = format!("\nNOT RUN: this server has no Sentinel: {why}\n");
                std::io::stderr().write_all(why.as_bytes()).unwrap();
                return;
            }
        }
        let faults = vec![
            Fault::Kill,
            Fault::KillInFlight,
            Fault::Terminate,
            Fault::Reload,
            Fault::Promotion,
            Fault::Promotion,
        ];
        round("mixed, under Sentinel", seed, count, fleet, faults);
    }
}
