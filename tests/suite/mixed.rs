//! Everything at once, at random: jobs come in, their keys are renamed, overwritten, copied, moved,
//! restored and changed, while servers die, change roles, reload, save, pause and have their clocks
//! set. Every job ends once, with the answer for its own picture and prompt.
//!
//! One thread does all of it and keeps a model of what is under which key, so the model is exact.
//! What happens is decided by a seed, which is printed: `FLORENCE_CHAOS_SEED=n` runs that one
//! again. Times are not the seed's, so a rare failure may need several runs of it.
//! `make chaos` runs more seeds; `FLORENCE_CHAOS_JOBS` says how many jobs there are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    io::Write,
    sync::OnceLock,
    thread::sleep,
    time::{Duration, Instant},
};

use florence_tests::{Clock, Pictures, Sentinel, Server, Settings, eventually, free_port, picture};
use redis::{Client, Connection, Pipeline, RedisError, RedisResult, Value};

/// Jobs that are submitted with one seed.
const ROUND: usize = 200;
const PICTURES: [&str; 4] = ["poster.jpg", "shapes.png", "sign.png", "tall.png"];
const PROMPTS: [&str; 3] = ["<OD>", "<OCR>", "<CAPTION>"];
const FINAL: [&str; 4] = ["done", "failed", "cancelled", "expired"];
/// The database of the key that says which operation was the last; jobs are in 0 and 1.
const NOTES: usize = 2;
/// Counters that say that something went wrong inside.
const COUNTERS: [&str; 3] = ["leases_recovered", "panics", "threads_restarted"];
/// How long no job may end before those that are left count as stuck.
const STUCK: Duration = Duration::from_secs(25);
/// Longest wait for a reply; a server that is silent for longer hangs.
const SILENCE: Duration = Duration::from_secs(20);
/// How far apart the servers' clocks may be.
const SKEW: i64 = 8;

/// Runs its commands in one go, after it has noted the states of some keys; all of that is also
/// in the note that it leaves, for a client that does not get the reply.
const SCRIPT: &str = "
local at = 2
local function take() at = at + 1 return ARGV[at - 1] end
local states = {}
for i = 1, tonumber(take()) do
  redis.call('SELECT', take())
  states[i] = redis.call('HGET', take(), 'state') or 'none'
end
local final = {done = true, failed = true, cancelled = true, expired = true}
for _ = 1, tonumber(take()) do
  local args = {}
  for i = 1, tonumber(take()) do args[i] = take() end
  if args[1] == 'EDIT' then
    if not final[redis.call('HGET', args[2], 'state')] then
      redis.call('HSET', args[2], 'image', args[3], 'prompt', args[4])
    end
  elseif args[1] == 'CLONE' then
    redis.call('RESTORE', args[3], 0, redis.call('DUMP', args[2]), 'REPLACE')
  else
    redis.call(unpack(args))
  end
end
redis.call('SELECT', 2)
redis.call('SET', 'last', ARGV[1] .. ' ' .. table.concat(states, ' '))
return states
";

/// xorshift64*: good enough, and the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn percent(&mut self, n: usize) -> bool {
        self.below(100) < n
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn pause(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(usize::try_from(most).unwrap()) as u64)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Database and key.
type Place = (usize, String);

/// What is known of a job's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    No,
    Perhaps,
    Yes,
}

/// What a job asks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Question {
    /// As GET shows it.
    image: String,
    picture: usize,
    prompt: usize,
}

#[derive(Debug, Clone)]
struct Job {
    question: Question,
    ended: Ended,
    /// The same at the time when it came under its key.
    arrived: Ended,
    /// How often it may have been at work when a server was killed.
    deaths: usize,
    story: Vec<String>,
}

/// One change of keys.
#[derive(Debug, Clone)]
enum Step {
    Submit {
        key: String,
        question: Question,
        options: Vec<String>,
    },
    Rename {
        db: usize,
        from: String,
        to: String,
    },
    Copy {
        db: usize,
        from: String,
        to_db: usize,
        to: String,
    },
    Move {
        db: usize,
        key: String,
    },
    Swap,
    /// What DUMP gave some time ago, and the job that it was.
    Restore {
        db: usize,
        to: String,
        payload: Vec<u8>,
        job: Box<Job>,
    },
    /// RESTORE of what DUMP gives now; in a script.
    Clone {
        db: usize,
        from: String,
        to: String,
    },
    /// Another picture and prompt, unless the job has ended; in a script.
    Edit {
        db: usize,
        key: String,
        question: Question,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Submit { key, question, options } => {
                let (image, prompt) = (&question.image, PROMPTS[question.prompt]);
                write!(f, "SUBMIT {key} {image} {prompt} {}", options.join(" "))
            }
            Self::Rename { db, from, to } => write!(f, "{db}: RENAME {from} {to}"),
            Self::Copy { db, from, to_db, to } => {
                write!(f, "{db}: COPY {from} {to} DB {to_db} REPLACE")
            }
            Self::Move { db, key } => write!(f, "{db}: MOVE {key} {}", 1 - db),
            Self::Swap => write!(f, "SWAPDB 0 1"),
            Self::Restore { db, to, .. } => write!(f, "{db}: RESTORE {to} of an older DUMP"),
            Self::Clone { db, from, to } => write!(f, "{db}: DUMP {from}, RESTORE {to} REPLACE"),
            Self::Edit { db, key, question } => {
                write!(f, "{db}: HSET {key} {} {}", question.image, PROMPTS[question.prompt])
            }
        }
    }
}

impl Step {
    /// The places whose jobs it reads or ends.
    fn places(&self) -> Vec<Place> {
        match self {
            Self::Submit { .. } | Self::Swap => vec![],
            Self::Rename { db, from, to } | Self::Clone { db, from, to } => {
                vec![(*db, from.clone()), (*db, to.clone())]
            }
            Self::Copy { db, from, to_db, to } => {
                vec![(*db, from.clone()), (*to_db, to.clone())]
            }
            Self::Move { db, key } | Self::Edit { db, key, .. } => vec![(*db, key.clone())],
            Self::Restore { db, to, .. } => vec![(*db, to.clone())],
        }
    }

    /// Where a job is to be afterwards.
    fn target(&self) -> Option<Place> {
        Some(match self {
            Self::Submit { key, .. } => (0, key.clone()),
            Self::Rename { db, to, .. }
            | Self::Clone { db, to, .. }
            | Self::Restore { db, to, .. } => (*db, to.clone()),
            Self::Copy { to_db, to, .. } => (*to_db, to.clone()),
            Self::Move { db, key } => (1 - db, key.clone()),
            Self::Edit { db, key, .. } => (*db, key.clone()),
            Self::Swap => return None,
        })
    }

    fn needs_script(&self) -> bool {
        matches!(self, Self::Clone { .. } | Self::Edit { .. })
    }

    /// The database to select, and the command.
    fn command(&self) -> (usize, Vec<Vec<u8>>) {
        let words = |words: &[&str]| words.iter().map(|word| word.as_bytes().to_vec()).collect();
        match self {
            Self::Submit { key, question, options } => {
                let mut command: Vec<Vec<u8>> = words(&["FLORENCE.SUBMIT", key, &question.image]);
                if question.image == "DATA" {
                    command.push(std::fs::read(picture(PICTURES[question.picture])).unwrap());
                }
                command.push(PROMPTS[question.prompt].into());
                command.extend(options.iter().map(|option| option.clone().into_bytes()));
                (0, command)
            }
            Self::Rename { db, from, to } => (*db, words(&["RENAME", from, to])),
            Self::Copy { db, from, to_db, to } => {
                (*db, words(&["COPY", from, to, "DB", &to_db.to_string(), "REPLACE"]))
            }
            Self::Move { db, key } => (*db, words(&["MOVE", key, &(1 - db).to_string()])),
            Self::Swap => (0, words(&["SWAPDB", "0", "1"])),
            Self::Restore { db, to, payload, .. } => {
                let mut command: Vec<Vec<u8>> = words(&["RESTORE", to, "0"]);
                command.extend([payload.clone(), "REPLACE".into()]);
                (*db, command)
            }
            Self::Clone { db, from, to } => (*db, words(&["CLONE", from, to])),
            Self::Edit { db, key, question } => {
                (*db, words(&["EDIT", key, &question.image, PROMPTS[question.prompt]]))
            }
        }
    }
}

/// What is under which key, and how often each key's jobs have ended.
#[derive(Debug, Clone, Default)]
struct Model {
    jobs: BTreeMap<Place, Job>,
    /// Where jobs came last; the newest are likely to be unfinished.
    recent: Vec<Place>,
    /// The least and the most ends that the stream may have of a key.
    ends: BTreeMap<String, (usize, usize)>,
    /// All that was ever asked under a key.
    asked: HashMap<String, Vec<Question>>,
    is_swapped: bool,
    names: usize,
}

impl Model {
    fn name(&mut self) -> String {
        self.names += 1;
        format!("k{}", self.names)
    }

    fn arrive(&mut self, place: Place, mut job: Job, note: &str) {
        job.arrived = job.ended;
        job.story.push(note.to_owned());
        self.asked.entry(place.1.clone()).or_default().push(job.question.clone());
        self.recent.push(place.clone());
        self.jobs.insert(place, job);
    }

    /// A job is renamed, moved, overwritten or, in the end, looked at.
    fn leave(&mut self, place: &Place) -> Option<Job> {
        let job = self.jobs.remove(place)?;
        let (least, most) = self.ends.entry(place.1.clone()).or_default();
        match (job.arrived, job.ended) {
            (Ended::Yes, _) | (_, Ended::No) => {}
            (Ended::No, Ended::Yes) => {
                *least += 1;
                *most += 1;
            }
            (Ended::Perhaps, _) | (_, Ended::Perhaps) => *most += 1,
        }
        Some(job)
    }

    /// Takes over a state that was read. False if the job had ended before.
    fn observe(&mut self, place: &Place, state: &str) -> bool {
        let Some(job) = self.jobs.get_mut(place) else { return true };
        if FINAL.contains(&state) {
            job.ended = Ended::Yes;
            return true;
        }
        let is_new = job.ended != Ended::Yes;
        (job.ended, job.arrived) = (Ended::No, Ended::No);
        is_new
    }

    /// What cannot be known any more.
    fn doubt(&mut self, place: &Place) {
        if let Some(job) = self.jobs.get_mut(place).filter(|job| job.ended == Ended::No) {
            job.ended = Ended::Perhaps;
        }
    }

    fn apply(&mut self, step: &Step, note: &str) {
        let target = step.target();
        match step {
            Step::Submit { question, .. } => {
                let (question, story) = (question.clone(), vec![]);
                let (ended, arrived) = (Ended::No, Ended::No);
                let job = Job { question, ended, arrived, deaths: 0, story };
                self.arrive(target.unwrap(), job, note);
            }
            Step::Rename { db, from: key, .. } | Step::Move { db, key } => {
                let job = self.leave(&(*db, key.clone())).unwrap();
                self.leave(&target.clone().unwrap());
                self.arrive(target.unwrap(), job, note);
            }
            Step::Copy { db, from, .. } | Step::Clone { db, from, .. } => {
                let job = self.jobs[&(*db, from.clone())].clone();
                self.leave(&target.clone().unwrap());
                self.arrive(target.unwrap(), job, note);
            }
            Step::Restore { job, .. } => {
                self.leave(&target.clone().unwrap());
                self.arrive(target.unwrap(), (**job).clone(), note);
            }
            Step::Swap => {
                let other = |(db, key): Place| (1 - db, key);
                let jobs = std::mem::take(&mut self.jobs).into_iter();
                self.jobs = jobs.map(|(place, job)| (other(place), job)).collect();
                self.recent = self.recent.drain(..).map(other).collect();
                self.is_swapped = !self.is_swapped;
            }
            Step::Edit { key, question, .. } => {
                let job = self.jobs.get_mut(&target.unwrap()).unwrap();
                if job.ended == Ended::No {
                    job.question = question.clone();
                    job.story.push(note.to_owned());
                    self.asked.entry(key.clone()).or_default().push(question.clone());
                }
            }
        }
    }
}

/// How an operation is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Bare,
    Multi,
    Script,
}

/// An operation, ready to be sent.
struct Request {
    number: usize,
    form: Form,
    steps: Vec<Step>,
    /// Whose states come first in the reply.
    watched: Vec<Place>,
    pipeline: Pipeline,
    replies: usize,
    /// Whether a bare operation's reply has the target's state too.
    looks_after: bool,
}

impl Request {
    fn new(number: usize, form: Form, steps: Vec<Step>, model: &Model) -> Self {
        let (mut places, mut is_swapped) = (BTreeSet::new(), false);
        for step in &steps {
            // Where it was when the operation began.
            let origin = |(db, key)| (if is_swapped { 1 - db } else { db }, key);
            places.extend(step.places().into_iter().map(origin));
            is_swapped ^= matches!(step, Step::Swap);
        }
        let watched: Vec<Place> =
            places.into_iter().filter(|place| model.jobs.contains_key(place)).collect();
        let mut pipeline = redis::pipe();
        if form == Form::Script {
            let script = pipeline.cmd("EVAL").arg(SCRIPT).arg(0).arg(number).arg(watched.len());
            for (db, key) in &watched {
                script.arg(*db).arg(key);
            }
            script.arg(2 * steps.len());
            for step in &steps {
                let (db, command) = step.command();
                script.arg(2).arg("SELECT").arg(db).arg(command.len()).arg(command);
            }
            return Self { number, form, steps, watched, pipeline, replies: 1, looks_after: false };
        }
        let state = |pipeline: &mut Pipeline, (db, key): &Place| {
            pipeline.cmd("SELECT").arg(*db).cmd("HGET").arg(key).arg("state");
        };
        for place in &watched {
            state(&mut pipeline, place);
        }
        for step in &steps {
            let (db, command) = step.command();
            let name = String::from_utf8_lossy(&command[0]).into_owned();
            pipeline.cmd("SELECT").arg(db).cmd(&name).arg(&command[1..]);
        }
        let target = steps[0].target().filter(|_| form == Form::Bare);
        if let Some(target) = &target {
            state(&mut pipeline, target);
        }
        pipeline.cmd("SELECT").arg(NOTES).cmd("SET").arg("last").arg(number);
        let mut replies = pipeline.len();
        if form == Form::Multi {
            pipeline.atomic();
            // MULTI and EXEC have replies too.
            replies += 2;
        }
        let looks_after = target.is_some();
        Self { number, form, steps, watched, pipeline, replies, looks_after }
    }

    fn send(&self, connection: &mut Connection) -> RedisResult<()> {
        connection.send_packed_command(&self.pipeline.get_packed_pipeline())
    }

    /// The states of the watched keys before the operation; of a bare one also the target's after.
    fn receive(&self, connection: &mut Connection) -> RedisResult<Vec<String>> {
        let (mut values, mut refused) = (Vec::new(), None);
        for _ in 0..self.replies {
            match connection.recv_response()?.extract_error() {
                Ok(value) => values.push(value),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        if self.form != Form::Bare {
            // EXEC's reply, or the script's.
            let last = values.pop().unwrap_or(Value::Nil);
            values = redis::from_owned_redis_value(last)?;
        }
        let state = |value: Value| {
            let state: Option<String> = redis::from_owned_redis_value(value)?;
            Ok(state.unwrap_or("none".to_owned()))
        };
        if self.form == Form::Script {
            return values.into_iter().map(state).collect();
        }
        // The note's two replies come after it.
        let after = self.looks_after.then(|| values.len() - 3);
        let is_state = |i: usize| (i < 2 * self.watched.len() && i % 2 == 1) || Some(i) == after;
        let values = values.into_iter().enumerate();
        values.filter(|(i, _)| is_state(*i)).map(|(_, value)| state(value)).collect()
    }

    fn note(&self) -> String {
        let steps: Vec<String> = self.steps.iter().map(ToString::to_string).collect();
        format!("{} {:?} {}", self.number, self.form, steps.join("; "))
    }
}

/// The right answers, from a server that nothing else happens to.
fn answers() -> &'static HashMap<(usize, usize), String> {
    static ANSWERS: OnceLock<HashMap<(usize, usize), String>> = OnceLock::new();
    ANSWERS.get_or_init(|| {
        let server = Server::start();
        let mut connection = server.connect();
        let mut answers = HashMap::new();
        for (i, name) in PICTURES.iter().enumerate() {
            let bytes = std::fs::read(picture(name)).unwrap();
            for (j, prompt) in PROMPTS.iter().enumerate() {
                let mut submit = redis::cmd("FLORENCE.SUBMIT");
                submit.arg("*").arg("DATA").arg(&bytes).arg(prompt);
                let key: String = submit.query(&mut connection).unwrap();
                let mut wait = redis::cmd("FLORENCE.WAIT");
                wait.arg(&key).arg(60).exec(&mut connection).unwrap();
                let answer: String = server.call(&["FLORENCE.GET", &key, "RESULT"]);
                answers.insert((i, j), answer);
            }
        }
        let different: BTreeSet<&String> = answers.values().collect();
        assert_eq!(different.len(), answers.len(), "answers can be told apart");
        answers
    })
}

/// The servers, and who of them is the master.
struct Fleet {
    servers: Vec<Server>,
    clocks: Vec<(Clock, i64)>,
    /// What all clocks are ahead by.
    ahead: i64,
    sentinels: Vec<Sentinel>,
    master: usize,
}

impl Fleet {
    /// A master and its replicas.
    fn start(count: usize, lines: &[&str]) -> Self {
        let clocks: Vec<(Clock, i64)> = (0..count).map(|_| (Clock::new(), 0)).collect();
        let ours = ["florence.stream ended", "florence.stream-length 1000000"];
        let servers: Vec<Server> = clocks
            .iter()
            .map(|(clock, _)| {
                let settings = Settings::lines(&[lines, &ours].concat());
                Server::with(Settings { env: clock.env(), ..settings })
            })
            .collect();
        for server in &servers {
            server.wait_for_model();
        }
        let fleet = Self { servers, clocks, ahead: 0, sentinels: vec![], master: 0 };
        fleet.replicas().for_each(|i| fleet.servers[i].follow(&fleet.servers[0]));
        fleet
    }

    fn replicas(&self) -> impl Iterator<Item = usize> + use<> {
        let (count, master) = (self.servers.len(), self.master);
        (0..count).filter(move |i| *i != master)
    }

    fn master(&self) -> &Server {
        &self.servers[self.master]
    }

    /// Whether a replica is in step with the master.
    fn is_linked(&self, replica: usize) -> bool {
        let port = format!("master_port:{}\r", self.master().port);
        let info = self.replication(replica);
        info.is_some_and(|info| info.contains("master_link_status:up") && info.contains(&port))
    }

    /// What a server tells of its role; `None` if it is dead.
    fn replication(&self, server: usize) -> Option<String> {
        let client = Client::open(format!("redis://127.0.0.1:{}", self.servers[server].port));
        let mut connection = client.unwrap().get_connection_with_timeout(SILENCE).ok()?;
        redis::cmd("INFO").arg("replication").query(&mut connection).ok()
    }

    fn is_whole(&self) -> bool {
        self.replicas().all(|i| self.is_linked(i))
    }

    /// Who is the master, as the sentinels say, if it says so too.
    fn find_master(&self) -> Option<usize> {
        let Some(sentinel) = self.sentinels.first() else { return Some(self.master) };
        let port = sentinel.master()?;
        let found = self.servers.iter().position(|server| server.port == port)?;
        self.replication(found)?.contains("role:master").then_some(found)
    }
}

/// What happens to servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    /// In the middle of an operation.
    KillInFlight,
    KillReplica,
    Terminate,
    ShutDown,
    Reload,
    /// The server's own FAILOVER.
    Failover,
    /// The replica becomes the master, by hand, while writes are paused.
    Exchange,
    /// The master becomes a replica of nobody, for a moment.
    Unreachable,
    /// A sentinel promotes a replica of a master that lives.
    Promotion,
}

struct Driver {
    name: &'static str,
    seed: u64,
    random: Random,
    fleet: Fleet,
    model: Model,
    pictures: Pictures,
    connection: Option<Connection>,
    /// Operations so far.
    number: usize,
    /// What DUMP gave, of which job, and how many starts and roles ago.
    shelf: Vec<(Vec<u8>, Job, usize)>,
    epoch: usize,
    /// All that was done, and what the keys were before.
    log: Vec<String>,
    faults: usize,
    problems: Vec<String>,
    counters: BTreeMap<&'static str, i64>,
}

impl Driver {
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

    /// What the log tells of a word.
    fn mentions(&self, word: &str) -> Vec<&str> {
        let is_in = |line: &&str| line.split([' ', ';', '"']).any(|part| part == word);
        self.log.iter().map(String::as_str).filter(is_in).collect()
    }

    fn log_fault(&mut self, fault: &str) {
        self.faults += 1;
        self.log.push(format!("{} FAULT {fault}", self.number));
    }

    /// The master, on a connection that stays until something happens to the master.
    fn connection(&mut self) -> RedisResult<&mut Connection> {
        if self.connection.is_none() {
            let found = eventually("there is a master", || self.fleet.find_master());
            self.accept(found);
            let connection = self.fleet.master().connect();
            connection.set_read_timeout(Some(SILENCE))?;
            self.connection = Some(connection);
        }
        Ok(self.connection.as_mut().unwrap())
    }

    /// Takes a server for the master. Where nothing was done to the one before, the sentinels have
    /// found it too slow, and for the new one it has died.
    fn accept(&mut self, found: usize) {
        if found != self.fleet.master {
            self.log_fault(&format!("the sentinels replace {} by {found}", self.fleet.master));
            self.connection = None;
            self.epoch += 1;
            self.fleet.master = found;
            self.count_deaths();
        }
    }

    fn ask<T: redis::FromRedisValue>(&mut self, args: &[&str]) -> RedisResult<T> {
        florence_tests::call(self.connection()?, args)
    }

    /// Whether an error may be one of a server that is not, or not yet, the master.
    fn is_lost(&self, error: &RedisError) -> bool {
        let code = error.code().unwrap_or_default();
        let is_refused = ["READONLY", "LOADING", "MASTERDOWN", "EXECABORT"].contains(&code);
        !self.fleet.sentinels.is_empty() && (code.is_empty() || is_refused)
    }

    /// Sends an operation, and brings the model up to date. False if it did not take place.
    fn perform(&mut self, steps: Vec<Step>, form: Form) -> bool {
        let request = self.request(steps, form);
        let received = self.connection().and_then(|connection| {
            request.send(connection)?;
            request.receive(connection)
        });
        match received {
            Ok(states) if self.confirm() => self.settle(&request, Some(&states)),
            Err(error) if !self.is_lost(&error) => {
                let place = request.watched.first();
                self.fail(&format!("{}: {error}", request.note()), place)
            }
            _ => return self.look_up(&request),
        }
        true
    }

    fn request(&mut self, steps: Vec<Step>, form: Form) -> Request {
        self.number += 1;
        Request::new(self.number, form, steps, &self.model)
    }

    /// Waits until a replica that could be promoted has the last operation. False if there is
    /// another master meanwhile.
    fn confirm(&mut self) -> bool {
        if self.fleet.sentinels.is_empty() {
            return true;
        }
        let replicas = self.fleet.replicas().count();
        eventually("a replica confirms", || {
            let confirmed = self.ask::<usize>(&["WAIT", &replicas.to_string(), "500"]);
            // While one is away, the other one is the only that can be promoted.
            let enough = confirmed.as_ref().is_ok_and(|confirmed| {
                *confirmed == replicas || *confirmed > 0 && !self.fleet.is_whole()
            });
            if enough {
                return Some(true);
            }
            let is_other = self.fleet.find_master().is_some_and(|found| found != self.fleet.master);
            (confirmed.is_err() || is_other).then_some(false)
        })
    }

    /// Finds out whether an operation took place whose reply was lost.
    fn look_up(&mut self, request: &Request) -> bool {
        let note = eventually("there is a master that answers", || {
            self.connection = None;
            self.ask::<()>(&["SELECT", &NOTES.to_string()]).ok()?;
            // What is read counts only if it stays: something is written, so that it can be
            // confirmed.
            self.ask::<()>(&["SET", "looked", "up"]).ok()?;
            let note = self.ask::<Option<String>>(&["GET", "last"]).ok()?;
            self.confirm().then_some(note)
        });
        let note = note.unwrap_or_default();
        let mut words = note.split(' ').map(str::to_owned);
        if words.next() == Some(request.number.to_string()) {
            let states: Vec<String> = words.filter(|word| !word.is_empty()).collect();
            self.settle(request, Some(&states[..]).filter(|_| request.form == Form::Script));
            return true;
        }
        // A bare one leaves no note of its own; there are only such whose trace is plain.
        let step = &request.steps[0];
        let place = match step {
            Step::Rename { db, from, .. } | Step::Move { db, key: from } => (*db, from.clone()),
            step => step.target().unwrap_or_default(),
        };
        if request.form != Form::Bare {
            return false;
        }
        let exists = self.ask::<()>(&["SELECT", &place.0.to_string()]);
        let exists = exists.and_then(|()| self.ask::<bool>(&["EXISTS", &place.1])).unwrap();
        let has_gone = matches!(step, Step::Rename { .. } | Step::Move { .. });
        let took_place = exists != has_gone;
        if took_place {
            self.settle(request, None);
        }
        took_place
    }

    /// The operation has taken place; these were the states before it, if they are known.
    fn settle(&mut self, request: &Request, states: Option<&[String]>) {
        let note = request.note();
        let before = states.map_or("states unknown".to_owned(), |states| states.join(" "));
        self.log.push(format!("{note} (before, {:?}: {before})", request.watched));
        let is_exact = request.form != Form::Bare;
        for (i, place) in request.watched.iter().enumerate() {
            let Some(states) = states else {
                self.model.doubt(place);
                continue;
            };
            if states[i] == "none" {
                self.fail(&format!("{place:?} is lost, found by {note}"), Some(place));
            }
            let is_steady = self.model.observe(place, &states[i]);
            if !is_steady && self.fleet.sentinels.is_empty() {
                self.problems.push(format!("{place:?} had ended, and has not at {note}"));
            }
            if is_exact || FINAL.contains(&states[i].as_str()) {
                continue;
            }
            // The job that is overwritten may just have ended; of the other one the state after
            // tells, unless it has ended.
            let is_overwritten = request.steps[0].target().as_ref() == Some(place);
            let after = states.last().filter(|_| request.looks_after && !is_overwritten);
            if after.is_none_or(|after| FINAL.contains(&after.as_str())) {
                self.model.doubt(place);
            }
        }
        for step in &request.steps {
            self.model.apply(step, &note);
        }
    }

    fn count_deaths(&mut self) {
        let note = format!("(killed after {})", self.number);
        for job in self.model.jobs.values_mut().filter(|job| job.ended != Ended::Yes) {
            job.deaths += 1;
            job.story.push(note.clone());
        }
    }

    /// A place that has a job, mostly one of those that came last.
    fn some_job(random: &mut Random, model: &Model) -> Option<Place> {
        let exists = |place: &&Place| model.jobs.contains_key(*place);
        let young: Vec<&Place> = model.recent.iter().rev().filter(exists).take(10).collect();
        if young.is_empty() {
            return None;
        }
        if random.percent(85) {
            return Some((*random.pick(&young)).clone());
        }
        model.jobs.keys().nth(random.below(model.jobs.len())).cloned()
    }

    fn question(&mut self, may_be_sent: bool) -> Question {
        let (picture, prompt) =
            (self.random.below(PICTURES.len()), self.random.below(PROMPTS.len()));
        let name = PICTURES[picture];
        let image = match self.random.below(100) {
            0..25 if may_be_sent => "DATA".to_owned(),
            0..70 => {
                let path = format!("slow/{}/{name}", 50 + self.random.below(550));
                self.pictures.url(&path)
            }
            _ => self.pictures.url(name),
        };
        Question { image, picture, prompt }
    }

    /// A change of keys that the model allows.
    fn step(&mut self, model: &mut Model) -> Option<Step> {
        let (db, from) = Self::some_job(&mut self.random, model)?;
        let other = Self::some_job(&mut self.random, model)?;
        // The target: a new key, or one that has a job, in its database if that has to be.
        let to = if self.random.percent(50) && other.0 == db && other.1 != from {
            other.1.clone()
        } else {
            model.name()
        };
        let swap = if model.is_swapped { 85 } else { 95 };
        Some(match self.random.below(100) {
            chance if chance >= swap => Step::Swap,
            0..30 => Step::Rename { db, from, to },
            30..44 if other != (db, from.clone()) => {
                let (to_db, to) = if self.random.percent(60) { other } else { (1 - db, to) };
                Step::Copy { db, from, to_db, to }
            }
            44..54 if !model.jobs.contains_key(&(1 - db, from.clone())) => {
                Step::Move { db, key: from }
            }
            54..68 if !self.shelf.is_empty() => {
                let (payload, mut job, epoch) = self.random.pick(&self.shelf).clone();
                // The run that it may tell of has died with its process, as far as a server sees.
                job.deaths += usize::from(epoch != self.epoch);
                Step::Restore { db, to, payload, job: Box::new(job) }
            }
            54..74 if to != from => Step::Clone { db, from, to },
            _ if model.jobs[&(db, from.clone())].question.image != "DATA" => {
                Step::Edit { db, key: from, question: self.question(false) }
            }
            _ => Step::Rename { db, from, to: model.name() },
        })
    }

    /// A new job.
    fn submission(&mut self) -> Step {
        let (key, question) = (self.model.name(), self.question(true));
        let mut options = vec!["RETRIES".to_owned(), "20".to_owned()];
        let mut option = |name: &str, value: usize| {
            options.extend([name.to_owned(), value.to_string()]);
        };
        if self.random.percent(30) {
            option("PRIORITY", self.random.below(10));
        }
        if self.random.percent(25) {
            option("DELAY", 10 + self.random.below(300));
        }
        if self.random.percent(60) {
            options.push("NOCACHE".to_owned());
        }
        Step::Submit { key, question, options }
    }

    /// One change of keys, or several at once; `None` while there is no job.
    fn plan(&mut self) -> Option<(Vec<Step>, Form)> {
        let mut model = self.model.clone();
        let count = if self.random.percent(30) { 2 + self.random.below(3) } else { 1 };
        let mut steps = Vec::new();
        for _ in 0..count {
            let step = self.step(&mut model)?;
            model.apply(&step, "");
            steps.push(step);
        }
        self.model.names = model.names;
        // Bare is what leaves a trace of its own, or cannot get lost.
        let is_plain = matches!(steps[..], [Step::Rename { .. } | Step::Move { .. }])
            || self.fleet.sentinels.is_empty();
        let form = match self.random.below(100) {
            _ if steps.iter().any(Step::needs_script) => Form::Script,
            0..35 if steps.len() == 1 && is_plain => Form::Bare,
            0..70 => Form::Multi,
            _ => Form::Script,
        };
        Some((steps, form))
    }

    fn submit(&mut self) {
        let step = self.submission();
        let form = *self.random.pick(&[Form::Bare, Form::Bare, Form::Multi, Form::Script]);
        for _ in 0..10 {
            if self.perform(vec![step.clone()], form) {
                return;
            }
        }
        self.fail(&format!("not accepted: {step}"), None);
    }

    /// Keeps what DUMP gives, for later.
    fn dump(&mut self) {
        let Some(place) = Self::some_job(&mut self.random, &self.model) else { return };
        let mut pipeline = redis::pipe();
        pipeline.atomic().cmd("SELECT").arg(place.0).ignore();
        pipeline.cmd("HGET").arg(&place.1).arg("state").cmd("DUMP").arg(&place.1);
        let asked = self.connection().and_then(|connection| pipeline.query(connection));
        let (state, payload): (String, Vec<u8>) = match asked {
            Ok(reply) => reply,
            Err(error) if self.is_lost(&error) => {
                self.connection = None;
                return;
            }
            Err(error) => self.fail(&format!("DUMP {place:?}: {error}"), Some(&place)),
        };
        let mut job = self.model.jobs[&place].clone();
        job.ended = if FINAL.contains(&state.as_str()) { Ended::Yes } else { Ended::No };
        self.shelf.push((payload, job, self.epoch));
        if self.shelf.len() > 6 {
            self.shelf.remove(0);
        }
    }

    /// What happens often, and leaves the server as it is.
    fn disturb(&mut self) {
        match self.random.below(10) {
            0..4 => {
                let pause = (20 + self.random.below(230)).to_string();
                let _ = self.ask::<()>(&["CLIENT", "PAUSE", &pause, "WRITE"]);
            }
            // One may be going on.
            4 => drop(self.ask::<String>(&["BGSAVE"])),
            5 => drop(self.ask::<String>(&["BGREWRITEAOF"])),
            _ => self.set_clocks(false),
        }
    }

    /// Sets a clock forward or back by seconds, or all of them forward by an hour.
    fn set_clocks(&mut self, by_an_hour: bool) {
        for server in &self.fleet.servers {
            // A pause ends at a time of the clock.
            let _ = server.try_call::<()>(&["CLIENT", "UNPAUSE"]);
        }
        if by_an_hour {
            self.fleet.ahead += 3600;
            self.log_fault("all clocks an hour forward");
        } else {
            let i = self.random.below(self.fleet.clocks.len());
            let skew = self.random.below(17);
            self.fleet.clocks[i].1 = i64::try_from(skew).unwrap() - SKEW;
            let fault = format!("clock of {i}: {:+}", self.fleet.clocks[i].1);
            self.log_fault(&fault);
        }
        for (clock, skew) in &self.fleet.clocks {
            clock.set(self.fleet.ahead + skew);
        }
    }

    /// Adds up what a process has counted, before it goes.
    fn note_counters(&mut self, i: usize) {
        let stats = self.fleet.servers[i].try_call::<HashMap<String, i64>>(&["FLORENCE.STATS"]);
        let stats = stats.unwrap_or_default();
        for name in COUNTERS {
            if let Some(count) = stats.get(name) {
                *self.counters.entry(name).or_default() += count;
            }
        }
    }

    /// After the master has gone: it starts again, or a replica takes over and it comes back as
    /// one.
    fn recover(&mut self) {
        let dead = self.fleet.master;
        self.connection = None;
        self.epoch += 1;
        if self.fleet.sentinels.is_empty() {
            self.fleet.servers[dead].restart();
            return;
        }
        self.wait_for_other_master(dead);
        self.fleet.servers[dead].restart();
        self.send_back(dead);
    }

    fn wait_for_other_master(&mut self, old: usize) {
        let start = Instant::now();
        loop {
            if let Some(found) = self.fleet.find_master().filter(|found| *found != old) {
                self.fleet.master = found;
                return;
            }
            if start.elapsed() > STUCK {
                self.fail("no replica is promoted", None);
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// For a moment the old master believes that it is still one.
    fn send_back(&mut self, old: usize) {
        sleep(self.random.pause(600));
        let port = self.fleet.master().port.to_string();
        self.fleet.servers[old].call::<()>(&["REPLICAOF", "127.0.0.1", &port]);
    }

    /// Waits until all servers are in step, and the sentinels content.
    fn wait_until_calm(&mut self) {
        let start = Instant::now();
        loop {
            let port = self.fleet.master().port;
            let is_calm = self.fleet.sentinels.iter().all(|sentinel| sentinel.is_calm(port));
            if is_calm && self.fleet.is_whole() && self.confirm() {
                return;
            }
            if let Some(found) = self.fleet.find_master() {
                self.accept(found);
            }
            if start.elapsed() > STUCK {
                self.fail("the servers are not in step", None);
            }
            sleep(Duration::from_millis(20));
        }
    }

    fn inflict(&mut self, fault: Fault) {
        self.wait_until_calm();
        self.log_fault(&format!("{fault:?} of {}", self.fleet.master));
        let master = self.fleet.master;
        match fault {
            Fault::Kill => {
                self.note_counters(master);
                self.fleet.servers[master].kill();
                self.count_deaths();
                self.recover();
            }
            Fault::KillInFlight => self.kill_in_flight(),
            Fault::KillReplica => {
                let replica = self.fleet.replicas().next().unwrap();
                self.note_counters(replica);
                self.fleet.servers[replica].kill();
                // It comes back as a master of what it had.
                self.fleet.servers[replica].restart();
                self.send_back(replica);
            }
            Fault::Terminate => {
                self.note_counters(master);
                self.fleet.servers[master].terminate();
                // Its replica cannot always be told that it ended in good order.
                if !self.fleet.sentinels.is_empty() {
                    self.count_deaths();
                }
                self.recover();
            }
            Fault::ShutDown => {
                self.note_counters(master);
                self.fleet.servers[master].shut_down(&[]);
                self.recover();
            }
            Fault::Reload => self.fleet.servers[master].call::<()>(&["DEBUG", "RELOAD"]),
            Fault::Failover | Fault::Exchange => self.change_roles(fault),
            Fault::Unreachable => {
                let nobody = free_port().to_string();
                let server = &self.fleet.servers[master];
                server.call::<()>(&["REPLICAOF", "127.0.0.1", &nobody]);
                sleep(self.random.pause(500));
                server.call::<()>(&["REPLICAOF", "NO", "ONE"]);
                self.epoch += 1;
            }
            Fault::Promotion => {
                eventually("a replica is fit", || self.fleet.sentinels[0].fail_over().ok());
                self.connection = None;
                self.epoch += 1;
                self.wait_for_other_master(master);
                self.send_back(master);
            }
        }
    }

    fn kill_in_flight(&mut self) {
        let Some((steps, form)) = self.plan() else { return };
        let form = if form == Form::Bare { Form::Multi } else { form };
        let (master, wait) = (self.fleet.master, self.random.below(2000) as u64);
        self.note_counters(master);
        let request = self.request(steps, form);
        let sent = self.connection().and_then(|connection| request.send(connection));
        sleep(Duration::from_micros(wait));
        self.fleet.servers[master].kill();
        let received = sent.and_then(|()| request.receive(self.connection.as_mut().unwrap()));
        self.recover();
        match received {
            Ok(states) if self.fleet.sentinels.is_empty() => self.settle(&request, Some(&states)),
            _ => drop(self.look_up(&request)),
        }
        self.count_deaths();
    }

    /// Master and replica change places, and no write is lost.
    fn change_roles(&mut self, fault: Fault) {
        let (old, new) = (self.fleet.master, self.fleet.replicas().next().unwrap());
        let [from, to] = [&self.fleet.servers[old], &self.fleet.servers[new]];
        let info = |server: &Server| server.call::<String>(&["INFO", "replication"]);
        if fault == Fault::Failover {
            let port = to.port.to_string();
            eventually("the replica is online", || {
                from.try_call::<()>(&["FAILOVER", "TO", "127.0.0.1", &port]).ok()
            });
        } else {
            from.call::<()>(&["CLIENT", "PAUSE", "20000", "WRITE"]);
            let offset = |server: &Server| {
                let info = info(server);
                info.lines().find(|line| line.starts_with("master_repl_offset")).map(str::to_owned)
            };
            eventually("the replica has all", || (offset(from) == offset(to)).then_some(()));
            to.call::<()>(&["REPLICAOF", "NO", "ONE"]);
            from.call::<()>(&["REPLICAOF", "127.0.0.1", &to.port.to_string()]);
            from.call::<()>(&["CLIENT", "UNPAUSE"]);
        }
        eventually("the roles have changed", || {
            let have_changed =
                info(from).contains("role:slave") && info(to).contains("role:master");
            have_changed.then_some(())
        });
        self.fleet.master = new;
        self.connection = None;
        self.epoch += 1;
    }

    /// Submits so many jobs while everything happens; the faults come at even distances.
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

    /// A job as GET shows it.
    fn job(connection: &mut Connection, place: &Place) -> HashMap<String, Option<String>> {
        let mut both = redis::pipe();
        both.cmd("SELECT").arg(place.0).ignore().cmd("FLORENCE.GET").arg(&place.1);
        let (job,): (Option<HashMap<String, Option<String>>>,) = both.query(connection).unwrap();
        job.unwrap_or_default()
    }

    /// Waits until all jobs have ended, or none does any more. Returns those that have not.
    fn drain(&mut self) -> Vec<Place> {
        let mut open: Vec<Place> = self.model.jobs.keys().cloned().collect();
        let mut connection = self.fleet.master().connect();
        let mut last_end = Instant::now();
        while !open.is_empty() && last_end.elapsed() < STUCK {
            let before = open.len();
            open.retain(|place| {
                let state = Self::job(&mut connection, place).remove("state").flatten();
                state.is_some_and(|state| !FINAL.contains(&state.as_str()))
            });
            if open.len() < before {
                last_end = Instant::now();
            }
            sleep(Duration::from_millis(100));
        }
        open
    }

    fn problem(&mut self, problem: &str, place: &Place) {
        let story = self.model.jobs[place].story.join("\n    ");
        let log = self.mentions(&place.1).join("\n      ");
        self.problems.push(format!("{place:?} {problem}\n    {story}\n      {log}"));
    }

    /// The jobs under their keys. Returns how many were given up with reason.
    fn check_jobs(&mut self) -> usize {
        let mut given_up = 0;
        let mut connection = self.fleet.master().connect();
        let stuck = self.drain();
        let places: Vec<Place> = self.model.jobs.keys().cloned().collect();
        for place in &places {
            let shown = Self::job(&mut connection, place);
            let text = |name: &str| shown.get(name).cloned().flatten().unwrap_or_default();
            let job = &self.model.jobs[place];
            let question = job.question.clone();
            let is_same =
                text("image") == question.image && text("prompt") == PROMPTS[question.prompt];
            if shown.is_empty() {
                self.problem("is lost", place);
            } else if !is_same {
                self.problem(&format!("is another job, not {question:?}: {shown:?}"), place);
            } else if stuck.contains(place) {
                self.problem(&format!("is stuck: {shown:?}"), place);
            } else if text("error").contains("\"CRASH\"") && job.deaths >= 2 {
                given_up += 1;
            } else if text("state") != "done" {
                self.problem(&format!("did not end well: {shown:?}"), place);
            } else if text("result") != answers()[&(question.picture, question.prompt)] {
                let result = text("result");
                self.problem(&format!("has the answer of another: {question:?}: {result}"), place);
            }
            if !stuck.contains(place) {
                let state = text("state");
                self.model.observe(place, &state);
            }
        }
        let master = self.fleet.master();
        let (waiting, active) = (master.stat("jobs_waiting"), master.stat("jobs_active"));
        if (waiting, active) != (0, 0) {
            let problem = format!("{waiting} jobs wait and {active} are active in the end");
            self.problems.push(problem);
        }
        for db in 0..2 {
            redis::cmd("SELECT").arg(db).exec(&mut connection).unwrap();
            let keys: Vec<String> = redis::cmd("KEYS").arg("k*").query(&mut connection).unwrap();
            let unknown = keys.into_iter().filter(|key| !places.contains(&(db, key.clone())));
            self.problems.extend(unknown.map(|key| format!("{key} in {db} is nobody's")));
        }
        given_up
    }

    /// The stream of ended jobs: each end once, each with the right answer.
    fn check_ends(&mut self) -> usize {
        let places: Vec<Place> = self.model.jobs.keys().cloned().collect();
        let mut model = self.model.clone();
        for place in &places {
            model.leave(place);
        }
        let mut ends: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for db in 0..2 {
            let mut connection = self.fleet.master().connect_to(db);
            let mut range = redis::cmd("XRANGE");
            let entries: Vec<(String, HashMap<String, String>)> =
                range.arg("ended").arg("-").arg("+").query(&mut connection).unwrap();
            for (_, entry) in entries {
                ends.entry(entry["id"].clone()).or_default().push(entry["job"].clone());
            }
        }
        for (key, jobs) in &ends {
            let (least, most) = model.ends.get(key).copied().unwrap_or_default();
            if !(least..=most).contains(&jobs.len()) {
                let count = jobs.len();
                let story = self.mentions(key).join("\n    ");
                let problem = format!("{key} ended {count} times, not {least} to {most}");
                self.problems.push(format!("{problem}: {jobs:#?}\n    {story}"));
            }
            let asked = model.asked.get(key).map(Vec::as_slice).unwrap_or_default();
            let wrong = jobs.iter().filter(|job| !is_right(job, asked));
            let told = |job| format!("{key} was told with the answer of another: {job}");
            self.problems.extend(wrong.map(told));
        }
        for (key, (least, _)) in &model.ends {
            if *least > 0 && !ends.contains_key(key) {
                let story = self.mentions(key).join("\n    ");
                let problem = format!("{key} ended {least} times, and the stream has none");
                self.problems.push(format!("{problem}\n    {story}"));
            }
        }
        ends.values().map(Vec::len).sum()
    }

    /// The replicas have what the master has.
    fn check_replicas(&mut self) {
        eventually("the replicas are in step", || self.fleet.is_whole().then_some(()));
        let digests = || -> BTreeSet<String> {
            self.fleet.servers.iter().map(|server| server.call(&["DEBUG", "DIGEST"])).collect()
        };
        let start = Instant::now();
        while digests().len() > 1 {
            if start.elapsed() > Duration::from_secs(10) {
                self.problems.push("replicas differ from their master".to_owned());
                return;
            }
            sleep(Duration::from_millis(100));
        }
    }

    fn check_counters(&mut self) {
        for i in 0..self.fleet.servers.len() {
            self.note_counters(i);
        }
        for name in COUNTERS {
            match self.counters.get(name) {
                Some(0) => {}
                Some(count) => self.problems.push(format!("{name} is {count}")),
                None => self.problems.push(format!("FLORENCE.STATS has no {name}")),
            }
        }
    }
}

/// Whether what the stream tells of a job is the answer to a question asked under its key.
fn is_right(job: &str, asked: &[Question]) -> bool {
    let job: serde_json::Value = serde_json::from_str(job).unwrap();
    let is_its = |question: &Question| {
        let answer = &answers()[&(question.picture, question.prompt)];
        let answer: serde_json::Value = serde_json::from_str(answer).unwrap();
        job["image"] == question.image.as_str()
            && job["prompt"] == PROMPTS[question.prompt]
            && job["result"] == answer
    };
    job["state"] != "done" || asked.iter().any(is_its)
}

/// The seeds of a test, and the jobs of each.
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

/// One seed, from the first job to the last check.
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
        // With and without files, one sentinel and three.
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
