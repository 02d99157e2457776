//! Asks every server how it does, each second, and keeps the last hour of it.
//!
//! The page and Prometheus read what was told last: however many of them look, a server is asked
//! once. What a server does not know, because it is older, or does not tell this user, is absent.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, MutexGuard};
use redis::{RedisResult, Value, cmd};
use serde::Serialize;

use super::{
    figures::{self, Ends, Latencies},
    server::{Server, entries, number, text, words},
};

const EVERY: Duration = Duration::from_secs(1);
/// How many seconds lie between two points of the charts, and between two looks at what changes
/// seldom or takes longer to tell.
pub(crate) const STEP: u64 = 5;
/// An hour of points.
const POINTS: usize = 720;
/// Latencies are told of the last five minutes, too.
const RECENT: usize = 60;

/// What a server has told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    /// Names and numbers of `FLORENCE.STATS`, and `jobs_in_turn`, which wait for nothing else.
    pub(crate) stats: BTreeMap<String, f64>,
    pub(crate) latencies: Option<Latencies>,
    pub(crate) ends: Option<Ends>,
    /// Of `FLORENCE.MODEL`.
    pub(crate) model: BTreeMap<String, String>,
    /// Of `FLORENCE.HOSTS`.
    pub(crate) hosts: Option<Vec<Host>>,
    /// Of `INFO`.
    pub(crate) info: BTreeMap<String, String>,
    pub(crate) ping_ms: f64,
}

/// Downloads from a host.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) downloads: f64,
    pub(crate) failures: f64,
    bytes: f64,
    ms: f64,
}

impl Host {
    fn add(&mut self, other: &Self) {
        self.downloads += other.downloads;
        self.failures += other.failures;
        self.bytes += other.bytes;
        self.ms += other.ms;
    }
}

impl Told {
    pub(crate) fn stat(&self, name: &str) -> f64 {
        self.stats.get(name).copied().unwrap_or_default()
    }

    /// `master` or `replica`, if that is known: INFO may not be for this user.
    pub(crate) fn role(&self) -> Option<&'static str> {
        self.info.get("role").map(|role| if role == "master" { "master" } else { "replica" })
    }

    /// The server's name and version.
    pub(crate) fn software(&self) -> Option<String> {
        let version = |field: &str, name: &str| {
            self.info.get(field).map(|version| format!("{name} {version}"))
        };
        version("valkey_version", "Valkey").or_else(|| version("redis_version", "Redis"))
    }

    /// How jobs ended; of an older server, which does not tell their tasks, by state and code alone.
    pub(crate) fn ended(&self) -> Ends {
        if let Some(ends) = &self.ends {
            return ends.clone();
        }
        let key = |state: &str, code: &str| (state.to_owned(), String::new(), code.to_owned());
        let mut ends = Ends::new();
        for state in ["done", "cancelled", "expired"] {
            ends.insert(key(state, ""), self.stat(&format!("jobs_{state}")));
        }
        for (name, count) in &self.stats {
            if let Some(code) = name.strip_prefix("failed_") {
                ends.insert(key("failed", &code.to_ascii_uppercase()), *count);
            }
        }
        ends
    }

    /// The same of two servers.
    fn add(&mut self, other: &Self) {
        for (name, number) in &other.stats {
            *self.stats.entry(name.clone()).or_default() += number;
        }
        if let Some(latencies) = &other.latencies {
            figures::add(self.latencies.get_or_insert_default(), latencies);
        }
        for (key, count) in other.ends.iter().flatten() {
            *self.ends.get_or_insert_default().entry(key.clone()).or_default() += count;
        }
        for host in other.hosts.iter().flatten() {
            let hosts = self.hosts.get_or_insert_default();
            match hosts.iter_mut().find(|known| known.name == host.name) {
                Some(known) => known.add(host),
                None => hosts.push(host.clone()),
            }
        }
        self.ping_ms = self.ping_ms.max(other.ping_ms);
    }
}

/// A point of the charts: names and numbers, rates by the second.
pub(crate) type Point = [f64; POINT.len()];

pub(crate) const POINT: [&str; 14] = [
    "at", "done", "failed", "waiting", "active", "delayed", "p50", "p95", "p99", "ping", "memory",
    "results", "features", "misses",
];

/// All that is known of one server.
#[derive(Default)]
pub(crate) struct Known {
    /// What it told last, or why it did not.
    pub(crate) told: Option<Told>,
    pub(crate) error: Option<String>,
    /// Tells processes apart: several databases of one server have the same one.
    process: Option<String>,
    pub(crate) points: VecDeque<Point>,
    /// Latencies as they were at the last points.
    earlier: VecDeque<Latencies>,
    /// Counters at the last point.
    counted: Option<(Instant, BTreeMap<String, f64>)>,
}

impl Known {
    fn tell(&mut self, told: Told) {
        self.process = told.info.get("run_id").cloned();
        (self.told, self.error) = (Some(told), None);
    }

    /// The latencies of the last five minutes.
    fn recent(&self) -> Option<Latencies> {
        let now = self.told.as_ref()?.latencies.as_ref()?;
        Some(self.earlier.front().map_or_else(|| now.clone(), |it| figures::since(now, it)))
    }

    /// Notes a point of the charts.
    fn note(&mut self, now: Instant) {
        let Some(told) = &self.told else { return };
        let last_minute = self.earlier.iter().rev().nth(11).or(self.earlier.front());
        let total = told.latencies.as_ref().map(|latencies| {
            let now = figures::of_phase(latencies, "total");
            last_minute.map_or_else(|| now.clone(), |it| now.since(&figures::of_phase(it, "total")))
        });
        let quantiles = total.map_or([None; 3], |total| total.quantiles());
        let [p50, p95, p99] = quantiles.map(|it| it.unwrap_or(f64::NAN));
        let rate = |name: &str| match &self.counted {
            // A server that has started since counts from zero.
            Some((then, counted)) => {
                let before = counted.get(name).copied().unwrap_or_default();
                let new = told.stat(name);
                let grown = if new < before { new } else { new - before };
                grown / now.duration_since(*then).as_secs_f64().max(0.001)
            }
            None => 0.0,
        };
        let memory = told.info.get("used_memory_rss").and_then(|it| it.parse().ok());
        let point = [
            unix_ms(),
            rate("jobs_done"),
            rate("jobs_failed"),
            told.stat("jobs_in_turn"),
            told.stat("jobs_active"),
            told.stat("jobs_delayed"),
            p50,
            p95,
            p99,
            told.ping_ms,
            memory.unwrap_or(f64::NAN),
            rate("cache_results"),
            rate("cache_features"),
            rate("cache_misses"),
        ];
        if let Some(latencies) = &told.latencies {
            keep(&mut self.earlier, latencies.clone(), RECENT);
        }
        self.counted = Some((now, told.stats.clone()));
        keep(&mut self.points, point, POINTS);
    }
}

fn keep<T>(list: &mut VecDeque<T>, new: T, most: usize) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(new);
}

fn unix_ms() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1e3).round()
}

/// The servers, and what is known of them.
pub(crate) struct Watch {
    pub(crate) servers: Vec<Server>,
    known: Vec<Mutex<Known>>,
}

/// No server is known by a number.
pub(crate) struct NoServer;

/// What is known of one server, or of all of them together.
pub(crate) struct View {
    pub(crate) told: Told,
    pub(crate) recent: Option<Latencies>,
    pub(crate) point: Option<Point>,
}

impl Watch {
    pub(crate) fn new(servers: Vec<Server>) -> Self {
        let known = servers.iter().map(|_| Mutex::default()).collect();
        Self { servers, known }
    }

    /// Asks the servers for ever, each in a task of its own: a slow one holds no other up.
    pub(crate) fn start(self: &Arc<Self>) {
        for index in 0..self.servers.len() {
            let watch = Arc::clone(self);
            tokio::spawn(async move {
                let mut ticks = tokio::time::interval(EVERY);
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                for turn in 0_u64.. {
                    ticks.tick().await;
                    watch.look(index, turn).await;
                }
            });
        }
    }

    async fn look(&self, index: usize, turn: u64) {
        let was_lost = self.known(index).is_none_or(|known| known.told.is_none());
        let before = self.known(index).and_then(|known| known.told.clone());
        let is_long_turn = was_lost || turn.is_multiple_of(STEP);
        let Some(server) = self.servers.get(index) else { return };
        let asked = ask(server, before.unwrap_or_default(), is_long_turn).await;
        let Some(mut known) = self.known(index) else { return };
        match asked {
            Ok(told) => {
                known.tell(told);
                if turn.is_multiple_of(STEP) {
                    known.note(Instant::now());
                }
            }
            Err(error) => (known.told, known.error) = (None, Some(words(&error))),
        }
    }

    pub(crate) fn server(&self, index: usize) -> Result<&Server, NoServer> {
        self.servers.get(index).ok_or(NoServer)
    }

    /// What is known of a server.
    pub(crate) fn known(&self, index: usize) -> Option<MutexGuard<'_, Known>> {
        self.known.get(index).map(Mutex::lock)
    }

    /// Whether a server has answered when it was asked last.
    pub(crate) fn tells(&self, index: usize) -> bool {
        self.known(index).is_some_and(|known| known.told.is_some())
    }

    /// The servers that a page about one, or about all, is to ask: replicas know their masters'
    /// jobs, so they are left out where there is a master.
    pub(crate) fn asked(&self, one: Option<usize>) -> Vec<usize> {
        if let Some(one) = one {
            return (0..self.servers.len()).filter(|index| *index == one).collect();
        }
        let is_replica = |index: &usize| {
            let known = self.known(*index);
            known.is_some_and(|it| it.told.as_ref().and_then(Told::role) == Some("replica"))
        };
        let (replicas, masters): (Vec<_>, Vec<_>) = (0..self.servers.len()).partition(is_replica);
        if masters.is_empty() { replicas } else { masters }
    }

    /// Each process once, by the first of these servers that is of it: figures are the process's,
    /// not the database's.
    pub(crate) fn once(&self, servers: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut processes = HashSet::new();
        let mut found = Vec::new();
        for index in servers {
            let process = self.known(index).and_then(|known| known.process.clone());
            if process.is_none_or(|process| processes.insert(process)) {
                found.push(index);
            }
        }
        found
    }

    /// What is known of one server, or of all.
    pub(crate) fn view(&self, one: Option<usize>) -> Option<View> {
        let mut views = Vec::new();
        for index in self.once(self.asked(one).into_iter().filter(|index| self.tells(*index))) {
            let Some(known) = self.known(index) else { continue };
            let Some(told) = known.told.clone() else { continue };
            let point = known.points.back().copied();
            views.push(View { recent: known.recent(), told, point });
        }
        views.into_iter().reduce(|mut whole, view| {
            whole.told.add(&view.told);
            if let Some(recent) = &view.recent {
                figures::add(whole.recent.get_or_insert_default(), recent);
            }
            whole.point = whole.point.zip(view.point).map(|(a, b)| sum(a, b)).or(whole.point);
            whole
        })
    }

    /// The last hour of one server, or of all, the oldest point first.
    pub(crate) fn history(&self, one: Option<usize>) -> Vec<Point> {
        let mut steps: BTreeMap<u64, Point> = BTreeMap::new();
        for index in self.once(self.asked(one)) {
            let Some(known) = self.known(index) else { continue };
            for point in &known.points {
                // Servers are asked at about the same moment.
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a time since 1970"
                )]
                let step = point[0] as u64 / (STEP * 1000);
                steps.entry(step).and_modify(|sum_| *sum_ = sum(*sum_, *point)).or_insert(*point);
            }
        }
        steps.into_values().collect()
    }
}

/// Points of two servers as one: counts add up, of times the longer one counts.
fn sum(a: Point, b: Point) -> Point {
    let mut whole = a;
    for ((sum, other), name) in whole.iter_mut().zip(b).zip(POINT) {
        *sum = match name {
            "at" | "p50" | "p95" | "p99" | "ping" => sum.max(other),
            _ => *sum + other,
        };
    }
    whole
}

/// Asks a server; `before` is what it told last.
async fn ask(server: &Server, before: Told, is_long_turn: bool) -> RedisResult<Told> {
    let start = Instant::now();
    server.call::<Value>(&cmd("PING")).await?;
    let ping_ms = start.elapsed().as_secs_f64() * 1e3;
    let stats = entries(server.call(&cmd("FLORENCE.STATS")).await?);
    let mut stats: BTreeMap<String, f64> =
        stats.into_iter().map(|(name, value)| (name, number(&value))).collect();
    // The server counts delayed jobs among those that wait.
    let figure = |name: &str| stats.get(name).copied().unwrap_or_default();
    let in_turn = figure("jobs_waiting") - figure("jobs_delayed");
    stats.insert("jobs_in_turn".to_owned(), in_turn.max(0.0));
    if !is_long_turn {
        return Ok(Told { stats, ping_ms, ..before });
    }
    let named = |name: &str, arg: &str| {
        let mut command = cmd(name);
        command.arg(arg);
        command
    };
    // Sections of modules are told to who names them.
    let mut info = cmd("INFO");
    info.arg(&["server", "memory", "replication", "florence"]);
    let commands = [
        named("FLORENCE.STATS", "LATENCY"),
        named("FLORENCE.STATS", "JOBS"),
        cmd("FLORENCE.MODEL"),
        cmd("FLORENCE.HOSTS"),
        info,
    ];
    let mut replies = server.each::<Value>(&commands).await?.into_iter();
    let mut next = || replies.next().and_then(Result::ok);
    let latencies = next().map(figures::latencies);
    let ends = next().map(figures::ends);
    let model = next().map(entries).unwrap_or_default();
    let model = model.into_iter().map(|(name, value)| (name, text(&value))).collect();
    let hosts = next().map(hosts);
    let info = text(&next().unwrap_or(Value::Nil));
    let info = info.lines().filter_map(|line| line.split_once(':'));
    let info = info.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Ok(Told { stats, latencies, ends, model, hosts, info, ping_ms })
}

fn hosts(reply: Value) -> Vec<Host> {
    let Value::Array(rows) = reply else { return Vec::new() };
    let host = |row: Value| {
        let mut host = Host::default();
        for (name, value) in entries(row) {
            match name.as_str() {
                "host" => host.name = text(&value),
                "downloads" => host.downloads = number(&value),
                "failures" => host.failures = number(&value),
                "bytes" => host.bytes = number(&value),
                "ms_total" => host.ms = number(&value),
                _ => {}
            }
        }
        host
    };
    rows.into_iter().map(host).collect()
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "counts")]
mod tests {
    use super::*;

    fn told(run_id: &str, role: &str, done: f64) -> Told {
        let info = [("run_id", run_id), ("role", role)];
        Told {
            stats: ["jobs_done", "jobs_in_turn"].map(|name| (name.to_owned(), done)).into(),
            info: info.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            ..Told::default()
        }
    }

    fn watch(servers: &[Told]) -> Watch {
        let server = |_| Server::new("redis://127.0.0.1:1").unwrap();
        let watch = Watch::new(servers.iter().map(server).collect());
        for (index, told) in servers.iter().enumerate() {
            watch.known(index).unwrap().tell(told.clone());
        }
        watch
    }

    #[test]
    fn replicas_and_second_databases_are_not_counted_twice() {
        let servers = [told("a", "master", 5.0), told("a", "master", 5.0), told("b", "slave", 9.0)];
        let watch = watch(&servers);
        assert_eq!(watch.asked(None), [0, 1]);
        assert_eq!(watch.view(None).unwrap().told.stat("jobs_done"), 5.0);
        assert_eq!(watch.view(Some(2)).unwrap().told.stat("jobs_done"), 9.0);
        assert!(watch.view(Some(3)).is_none());
        (0..3).for_each(|index| watch.known(index).unwrap().note(Instant::now()));
        let waiting = |points: Vec<Point>| points.iter().map(|point| point[3]).sum::<f64>();
        assert_eq!(waiting(watch.history(None)), waiting(watch.history(Some(0))));
    }

    #[test]
    fn who_does_not_tell_a_role_is_no_master() {
        assert_eq!(told("a", "slave", 1.0).role(), Some("replica"));
        assert_eq!(Told::default().role(), None);
        assert_eq!(watch(&[Told::default(), told("b", "slave", 1.0)]).asked(None), [0]);
    }

    #[test]
    fn points_are_rates_also_after_a_restart() {
        let mut known = Known { told: Some(told("a", "master", 100.0)), ..Known::default() };
        let start = Instant::now();
        known.note(start);
        assert_eq!(known.points[0][1], 0.0);
        known.told = Some(told("a", "master", 150.0));
        known.note(start + Duration::from_secs(5));
        assert_eq!(known.points[1][1], 10.0);
        known.told = Some(told("b", "master", 20.0));
        known.note(start + Duration::from_secs(10));
        assert_eq!(known.points[2][1], 4.0);
    }

    #[test]
    fn no_more_than_an_hour_is_kept() {
        let mut known = Known { told: Some(told("a", "master", 1.0)), ..Known::default() };
        (0..POINTS + 5).for_each(|_| known.note(Instant::now()));
        assert_eq!(known.points.len(), POINTS);
    }
}
