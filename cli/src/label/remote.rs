//! Answers by a server: pictures become its jobs, as many as it takes, and their ends are waited for.
//!
//! A job's key is made of what it asks. A run that is repeated finds the jobs of the one before, and
//! the server does nothing twice. Once its end is in the output, a job is deleted; what is asked again
//! in one run, because it has failed or stands there twice, is another job.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use crossbeam_channel::{Receiver, Sender, unbounded};
use florence_engine::Stop;
use parking_lot::Mutex;
use redis::{Client, Cmd, Connection, FromRedisValue, RedisError, RedisResult, Value, cmd};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    flow::{Answers, End, Flow, Part, Ticket},
    record::hex,
};
use crate::{ask::AskArgs, servers::server, source::Place};

/// Jobs that a server is given at once: enough for its batch and for the way there and back.
const AT_ONCE: usize = 128;
/// How long an ended job is kept for a run that comes back, in seconds.
const KEPT: u32 = 86_400;
/// How long an answer is waited for on one connection.
const ANSWER: Duration = Duration::from_secs(10);
/// The same when nothing depends on it any more.
const LAST_ANSWER: Duration = Duration::from_secs(2);

/// What a server says that has no memory, no disk, no replicas or no slots; that may change.
const SHORT: [&str; 5] = ["OOM", "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN"];

pub(super) struct Remote {
    client: Client,
    /// How long a server that does not answer is waited for.
    patience: Duration,
    model: String,
    /// For a prompt each.
    tasks: Vec<String>,
    options: Vec<String>,
    /// How often what makes a key was asked.
    asked: Mutex<HashMap<[u8; 16], u32>>,
    /// Pictures that wait for the ends of their jobs, by key.
    running: Mutex<HashMap<String, Ticket>>,
    /// When a job ended last.
    last_end: Mutex<Instant>,
    /// Jobs whose ends are written.
    ended: (Sender<String>, Receiver<String>),
}

impl Remote {
    pub(super) fn new(
        url: &str,
        patience: Duration,
        tasks: &[String],
        ask: &AskArgs,
    ) -> anyhow::Result<Self> {
        let client = server::client(url)?;
        let (tasks, options) = (tasks.to_vec(), options(ask)?);
        let mut remote = Self {
            client,
            patience,
            model: String::new(),
            tasks,
            options,
            asked: Mutex::default(),
            running: Mutex::default(),
            last_end: Mutex::new(Instant::now()),
            ended: unbounded(),
        };
        // A wrong address is told at once, a server that has just started is waited for.
        connect(&remote.client, ANSWER).context("cannot connect to the server")?;
        remote.model = remote.ask_for_model()?;
        Ok(remote)
    }

    /// The name of the server's default model, once it knows it.
    fn ask_for_model(&self) -> anyhow::Result<String> {
        const PAUSE: Duration = Duration::from_millis(100);
        let (mut link, start) = (self.link(), Instant::now());
        loop {
            let told: HashMap<String, Value> =
                link.call(&cmd("FLORENCE.MODEL"), &Stop::default()).map_err(|error| {
                    anyhow!("the server does not answer FLORENCE.MODEL: {}", words(&error))
                })?;
            if let Some(Ok(Some(name))) = told.get("name").map(Option::from_redis_value) {
                return Ok(name);
            }
            ensure!(start.elapsed() < self.patience, "the server does not tell its model's name");
            thread::sleep(PAUSE);
        }
    }

    fn link(&self) -> Link<'_> {
        Link { remote: self, connection: None }
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    pub(super) fn most(readers: usize) -> usize {
        AT_ONCE.max(2 * readers)
    }

    /// A job's answers are written: it is not needed any more.
    pub(super) fn ended(&self, job: String) {
        let _ = self.ended.0.send(job);
    }

    pub(super) fn run(&self, flow: &Flow<'_>, readers: usize) {
        let is_all_submitted = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| self.collect(flow, &is_all_submitted));
            let read = |_| {
                scope.spawn(|| {
                    let mut link = self.link();
                    flow.read(&mut |ticket, bytes| {
                        self.submit(flow, &mut link, ticket, bytes.as_deref());
                    });
                })
            };
            for reader in (0..readers).map(read).collect::<Vec<_>>() {
                // A reader that has panicked reads no more.
                let _ = reader.join();
            }
            is_all_submitted.store(true, Ordering::SeqCst);
        });
    }

    fn submit(
        &self,
        flow: &Flow<'_>,
        link: &mut Link<'_>,
        mut ticket: Ticket,
        bytes: Option<&[u8]>,
    ) {
        let key = self.key(&ticket);
        let command = self.command(&key, &ticket, bytes);
        let (start, mut refused) = (Instant::now(), 0);
        while let Err(error) = link.call::<Value>(&command, flow.stop) {
            match self.pause(&error, start, refused) {
                Some(_) if flow.stop.is_stopped() => return,
                Some(pause) => thread::sleep(pause),
                None if is_about_all(&error) => return flow.end(lost(&error)),
                None => return flow.end(End::Failed(ticket, words(&error))),
            }
            refused += 1;
        }
        ticket.job = Some(key.clone());
        self.running.lock().insert(key, ticket);
    }

    /// Made of all that the answer depends on.
    fn key(&self, ticket: &Ticket) -> String {
        let mut sha = Sha256::new();
        match (&ticket.sha256, &ticket.item.place) {
            (Some(sha256), _) => sha.update(sha256),
            (None, Place::Address(address)) => sha.update(address),
            (None, _) => sha.update(&ticket.item.name),
        }
        let asked = ticket.prompts(&self.tasks).into_iter();
        let parts = asked.chain(self.options.iter().map(|it| &**it)).chain([&*self.model]);
        for part in parts {
            sha.update([0]);
            sha.update(part);
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&sha.finalize()[..16]);
        let mut key = format!("florence:label:{}", hex(&digest));
        let mut asked = self.asked.lock();
        let before = asked.entry(digest).or_default();
        if *before > 0 {
            let _ = write!(key, "-{before}");
        }
        *before += 1;
        key
    }

    fn command(&self, key: &str, ticket: &Ticket, bytes: Option<&[u8]>) -> Cmd {
        let mut command = cmd("FLORENCE.SUBMIT");
        command.arg(key);
        match (bytes, &ticket.item.place) {
            (Some(bytes), _) => command.arg("DATA").arg(bytes),
            (None, Place::Address(address)) => command.arg(address),
            (None, _) => command.arg(&ticket.item.name),
        };
        match ticket.prompts(&self.tasks)[..] {
            [prompt] => command.arg(prompt),
            ref prompts => command.arg("PROMPTS").arg(prompts.len()).arg(prompts),
        };
        command.arg(&self.options).arg("TTL").arg(KEPT);
        command
    }

    /// Waits for the ends of jobs, until there will be no more.
    fn collect(&self, flow: &Flow<'_>, is_all_submitted: &AtomicBool) {
        // Since when the server refuses to tell.
        let (mut link, mut refused) = (self.link(), None);
        loop {
            let is_last = is_all_submitted.load(Ordering::SeqCst);
            let keys: Vec<String> = self.running.lock().keys().cloned().collect();
            if flow.stop.is_stopped() || (keys.is_empty() && is_last) {
                break;
            }
            if keys.is_empty() {
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            match self.wait(flow, &mut link, &keys) {
                Ok(()) => refused = None,
                Err(error) => {
                    let since = *refused.get_or_insert_with(Instant::now);
                    let Some(pause) = self.pause(&error, since, 0) else {
                        flow.end(lost(&error));
                        break;
                    };
                    thread::sleep(pause);
                }
            }
            if let Some(forget) = self.forget() {
                let _: RedisResult<Value> = link.call(&forget, flow.stop);
            }
        }
        self.running.lock().clear();
    }

    /// Deletes what was ended last, if the server is still there. What stays is gone after its time.
    pub(super) fn tidy(&self) {
        if let Some(forget) = self.forget()
            && let Ok(mut connection) = connect(&self.client, LAST_ANSWER)
        {
            let _: RedisResult<Value> = forget.query(&mut connection);
        }
    }

    /// Hears of the ends of some of the jobs, or for a moment of none.
    fn wait(&self, flow: &Flow<'_>, link: &mut Link<'_>, keys: &[String]) -> RedisResult<()> {
        const MOST_KEYS: usize = 1000;
        const SECONDS: &str = "0.2";
        let keys = &keys[..keys.len().min(MOST_KEYS)];
        let waited: RedisResult<Option<HashMap<String, Value>>> =
            link.call(cmd("FLORENCE.WAIT").arg(keys).arg(SECONDS), flow.stop);
        match waited {
            Ok(Some(job)) => self.end(flow, &job),
            Ok(None) => self.look_for_lost(flow, link, (keys, "EXISTS"))?,
            Err(error) if is_about_key(&error) => {
                self.look_for_lost(flow, link, (keys, "FLORENCE.GET"))?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// How long to wait with what the server has refused for now, so many times since `start`; it is
    /// short of something for as long as it is waited for, unless jobs end meanwhile.
    fn pause(&self, error: &RedisError, start: Instant, refused: u32) -> Option<Duration> {
        const USUAL: Duration = Duration::from_millis(200);
        const MOST: Duration = Duration::from_secs(2);
        match error.code()? {
            "BUSY" => {
                // "queue is full, retry after 120 ms"
                let detail = error.detail().unwrap_or_default();
                let told = detail.split_whitespace().rev().find_map(|word| word.parse().ok());
                Some(told.map_or(USUAL, Duration::from_millis).min(MOST))
            }
            code if SHORT.contains(&code) => {
                let since = start.max(*self.last_end.lock());
                let pause = (USUAL * 2_u32.pow(refused.min(4))).min(MOST);
                (since.elapsed() < self.patience).then_some(pause)
            }
            _ => None,
        }
    }

    fn end(&self, flow: &Flow<'_>, job: &HashMap<String, Value>) {
        let text = |name: &str| {
            job.get(name).and_then(|it| String::from_redis_value(it).ok()).unwrap_or_default()
        };
        let Some(ticket) = self.running.lock().remove(&text("id")) else { return };
        *self.last_end.lock() = Instant::now();
        flow.end(match self.answers(&ticket, &text) {
            Ok(answers) => End::Answered(ticket, answers),
            Err(error) => End::Failed(ticket, format!("{error:#}")),
        });
    }

    fn answers(&self, ticket: &Ticket, text: &dyn Fn(&str) -> String) -> anyhow::Result<Answers> {
        let state = text("state");
        if state == "failed" {
            let error: serde_json::Value = serde_json::from_str(&text("error"))?;
            bail!("{}", error["message"].as_str().unwrap_or("the server tells no reason"));
        }
        ensure!(state == "done", "the job is {state}");
        let result: serde_json::Value =
            serde_json::from_str(&text("result")).context("the answer is not JSON")?;
        let scores: serde_json::Value = serde_json::from_str(&text("scores")).unwrap_or_default();
        let number = |name: &str| text(name).parse().context("the server tells no size");
        let size = (number("width")?, number("height")?);
        let prompts = ticket.prompts(&self.tasks);
        let parts = if let [_] = prompts[..] {
            vec![Part { answer: result, text: text("text"), scores }]
        } else {
            let texts: Vec<String> = serde_json::from_str(&text("text"))?;
            let part = |(i, prompt): (usize, &&str)| {
                let name = florence_engine::prompt::Prompt::parse(
                    prompt,
                    florence_engine::prompt::Prompts::Any,
                )?;
                Ok(Part {
                    answer: json!({ name.name(): result[*prompt] }),
                    text: texts.get(i).cloned().unwrap_or_default(),
                    scores: scores[i].clone(),
                })
            };
            prompts.iter().enumerate().map(part).collect::<anyhow::Result<_>>()?
        };
        Ok(Answers { size, model: text("model"), parts })
    }

    /// Jobs that somebody has deleted, or put something else in the place of, will not end; and
    /// nothing is there that could be deleted.
    fn look_for_lost(
        &self,
        flow: &Flow<'_>,
        link: &mut Link<'_>,
        (keys, command): (&[String], &str),
    ) -> RedisResult<()> {
        for key in keys {
            let reason = match link.call(cmd(command).arg(key), flow.stop) {
                Ok(Value::Nil | Value::Int(0)) => "the job was deleted on the server".to_owned(),
                Ok(_) => continue,
                Err(error) if is_about_key(&error) => words(&error),
                Err(error) => return Err(error),
            };
            if let Some(mut ticket) = self.running.lock().remove(key) {
                ticket.job = None;
                flow.end(End::Failed(ticket, reason));
            }
        }
        Ok(())
    }

    /// Deletes the jobs whose ends are written.
    fn forget(&self) -> Option<Cmd> {
        let keys: Vec<String> = self.ended.1.try_iter().collect();
        (!keys.is_empty()).then(|| cmd("UNLINK").arg(keys).clone())
    }
}

/// What SUBMIT is told of how the model is asked.
fn options(ask: &AskArgs) -> anyhow::Result<Vec<String>> {
    let plain = (ask.no_repeat_ngram, ask.length_penalty, ask.coordinates, ask.decimals);
    ensure!(
        plain == Default::default(),
        "n-grams, length penalty, coordinates and decimals are settings of the server"
    );
    let mut options = vec!["MAXTOKENS".to_owned(), ask.max_new_tokens.to_string()];
    if let Some(beams) = ask.beams {
        options.extend(["BEAMS".to_owned(), beams.to_string()]);
    }
    options.push(if ask.exif { "EXIF" } else { "NOEXIF" }.to_owned());
    Ok(options)
}

/// Whether what lies at a key is at fault.
fn is_about_key(error: &RedisError) -> bool {
    matches!(error.code(), Some("WRONGTYPE" | "NOTAJOB" | "NOJOB"))
}

/// Whether other pictures would fare no better.
fn is_about_all(error: &RedisError) -> bool {
    let is_refusal =
        |code| matches!(code, "NOPERM" | "NOAUTH" | "NOMODEL") || SHORT.contains(&code);
    is_passing(error) || error.code().is_some_and(is_refusal)
}

/// A server's refusal as it says it.
fn words(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some("ERR"), Some(detail)) => detail.to_owned(),
        _ => server::words(error),
    }
}

/// The jobs that it has are found again by the next run.
fn lost(error: &RedisError) -> End {
    let what = if error.code().is_some() { "refuses" } else { "does not answer" };
    End::Lost(format!("the server {what}: {}", words(error)))
}

/// A connection that is made anew when it breaks.
struct Link<'a> {
    remote: &'a Remote,
    connection: Option<Connection>,
}

impl Link<'_> {
    fn call<T: FromRedisValue>(&mut self, command: &Cmd, stop: &Stop) -> RedisResult<T> {
        let start = Instant::now();
        loop {
            let called = self.try_call(command);
            match called {
                // Nothing that is called here does harm when it is called again.
                Err(error) if is_passing(&error) && !stop.is_stopped() => {
                    self.connection = None;
                    if start.elapsed() >= self.remote.patience {
                        return Err(error);
                    }
                    thread::sleep(Duration::from_secs(1));
                }
                called => return called,
            }
        }
    }

    fn try_call<T: FromRedisValue>(&mut self, command: &Cmd) -> RedisResult<T> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(connect(&self.remote.client, ANSWER)?),
        };
        command.query(connection)
    }
}

fn connect(client: &Client, answer: Duration) -> RedisResult<Connection> {
    let connection = client.get_connection_with_timeout(answer)?;
    connection.set_read_timeout(Some(answer))?;
    connection.set_write_timeout(Some(answer))?;
    Ok(connection)
}

/// Whether a connection is broken, or a server is about to be there again.
fn is_passing(error: &RedisError) -> bool {
    error.is_io_error() || matches!(error.code(), Some("LOADING" | "READONLY" | "MASTERDOWN"))
}
