//! Answers by a server: pictures become its jobs, as many as it takes, and their ends are waited for.
//!
//! A job's key is made of what it asks. A run that is repeated finds the jobs of the one before, and
//! the server does nothing twice. Once its end is in the output, a job is deleted; what is asked again
//! in one run, because it has failed or stands there twice, is another job. A job that is gone before
//! its end was heard of, with its server's memory or because another run has deleted it, is submitted
//! again.

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
use redis::{
    Client, Cmd, Connection, FromRedisValue, Pipeline, RedisError, RedisResult, Value, cmd,
};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    flow::{Answers, End, Flow, Part, Ticket},
    record::hex,
};
use crate::{ask::AskArgs, servers::server, source::Place};

/// Jobs that a server is given at once: enough for its batch and for the way there and back.
const AT_ONCE: usize = 128;
/// Most prompts of a job.
const MOST_TASKS: usize = 16;
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
    running: Mutex<HashMap<String, Running>>,
    /// When a job ended last.
    last_end: Mutex<Instant>,
    /// Jobs whose ends are written.
    ended: (Sender<String>, Receiver<String>),
}

/// A picture with a job.
struct Running {
    ticket: Ticket,
    /// How often its job was lost.
    lost: u32,
}

impl Remote {
    pub(super) fn new(
        url: &str,
        patience: Duration,
        tasks: &[String],
        ask: &AskArgs,
    ) -> anyhow::Result<Self> {
        ensure!(
            tasks.len() <= MOST_TASKS,
            "there are more than {MOST_TASKS} tasks, and a job has no more"
        );
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
        // The server may choose another one while we ask.
        remote.options.extend(["MODEL".to_owned(), remote.model.clone()]);
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

    fn submit(&self, flow: &Flow<'_>, link: &mut Link<'_>, ticket: Ticket, bytes: Option<&[u8]>) {
        let key = self.key(&ticket);
        let command = self.command(&key, &ticket, bytes);
        let (start, mut refused) = (Instant::now(), 0);
        while let Err(error) = link.call::<Value>(&command, flow.stop) {
            match self.pause(&error, start, refused) {
                Some(_) if flow.stop.is_stopped() => return,
                Some(pause) => thread::sleep(pause),
                None if is_about_all(&error) => return flow.end(gone(&error)),
                None => return flow.end(End::Failed(ticket, words(&error))),
            }
            refused += 1;
        }
        self.runs(key, Running { ticket, lost: 0 });
    }

    fn runs(&self, key: String, mut running: Running) {
        running.ticket.job = Some(key.clone());
        self.running.lock().insert(key, running);
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
        for part in asked.chain(self.options.iter().map(|it| &**it)) {
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
        // Since when the server refuses to tell, or to take a job again.
        let (mut link, mut lost, mut refused) = (self.link(), Lost::new(), None);
        loop {
            let is_last = is_all_submitted.load(Ordering::SeqCst);
            let keys: Vec<String> = self.running.lock().keys().cloned().collect();
            let is_none = keys.is_empty() && lost.jobs.is_empty();
            if flow.stop.is_stopped() || (is_none && is_last) {
                break;
            }
            if is_none {
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            let heard = self
                .wait(flow, &mut link, &keys, &mut lost)
                .and_then(|()| self.submit_lost(flow, &mut link, &mut lost));
            match heard {
                Ok(()) => refused = None,
                Err(error) => {
                    let since = *refused.get_or_insert_with(Instant::now);
                    let Some(pause) = self.pause(&error, since, 0) else {
                        flow.end(gone(&error));
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
    fn wait(
        &self,
        flow: &Flow<'_>,
        link: &mut Link<'_>,
        keys: &[String],
        lost: &mut Lost,
    ) -> RedisResult<()> {
        const MOST_KEYS: usize = 1000;
        const SECONDS: &str = "0.2";
        /// How often jobs are looked for that are gone.
        const LOOK: Duration = Duration::from_secs(2);
        let keys = &keys[..keys.len().min(MOST_KEYS)];
        if keys.is_empty() {
            return Ok(());
        }
        let waited: RedisResult<Option<HashMap<String, Value>>> =
            link.call(cmd("FLORENCE.WAIT").arg(keys).arg(SECONDS), flow.stop);
        match waited {
            Ok(job) => job.into_iter().for_each(|job| self.end(flow, &job)),
            Err(error) if error.code() == Some("NOJOB") => lost.looked = None,
            Err(error) if is_about_key(&error) => self.look_for_others(flow, link, keys)?,
            Err(error) => return Err(error),
        }
        if lost.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.look_for_lost(flow, link, keys, lost)?;
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
        let Some(Running { ticket, .. }) = self.running.lock().remove(&text("id")) else { return };
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

    /// Where something else was put in the place of a job, it will not end; and nothing is there that
    /// could be deleted.
    fn look_for_others(
        &self,
        flow: &Flow<'_>,
        link: &mut Link<'_>,
        keys: &[String],
    ) -> RedisResult<()> {
        for key in keys {
            match link.call::<Value>(cmd("FLORENCE.GET").arg(key), flow.stop) {
                Ok(_) => {}
                Err(error) if is_about_key(&error) => {
                    if let Some(Running { mut ticket, .. }) = self.running.lock().remove(key) {
                        ticket.job = None;
                        flow.end(End::Failed(ticket, words(&error)));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the jobs that are not there any more from those that run.
    fn look_for_lost(
        &self,
        flow: &Flow<'_>,
        link: &mut Link<'_>,
        keys: &[String],
        lost: &mut Lost,
    ) -> RedisResult<()> {
        /// Who deletes a job again and again means it.
        const MOST: u32 = 3;
        // Those that have ended since are no longer waited for.
        let keys: Vec<&String> = {
            let running = self.running.lock();
            keys.iter().filter(|key| running.contains_key(*key)).collect()
        };
        let mut pipe = redis::pipe();
        for key in &keys {
            pipe.cmd("EXISTS").arg(key);
        }
        let there: Vec<bool> = link.all(&pipe, flow.stop)?;
        lost.looked = Some(Instant::now());
        for (key, _) in keys.into_iter().zip(there).filter(|(_, is_there)| !is_there) {
            let Some(mut running) = self.running.lock().remove(key) else { continue };
            running.ticket.job = None;
            running.lost += 1;
            if running.lost > MOST {
                let reason = "the job was deleted on the server".to_owned();
                flow.end(End::Failed(running.ticket, reason));
            } else {
                lost.jobs.push((key.clone(), running));
            }
        }
        Ok(())
    }

    /// Submits jobs again that were lost, as many as the server takes for now.
    fn submit_lost(
        &self,
        flow: &Flow<'_>,
        link: &mut Link<'_>,
        lost: &mut Lost,
    ) -> RedisResult<()> {
        while let Some((key, running)) = lost.jobs.pop() {
            let bytes = match read_again(flow, &running.ticket) {
                Ok(bytes) => bytes,
                Err(reason) => {
                    flow.end(End::Failed(running.ticket, reason));
                    continue;
                }
            };
            let command = self.command(&key, &running.ticket, bytes.as_deref());
            match link.call::<Value>(&command, flow.stop) {
                Ok(_) => self.runs(key, running),
                Err(error) if self.pause(&error, Instant::now(), 0).is_some() => {
                    lost.jobs.push((key, running));
                    // Jobs that end make room.
                    let is_none = self.running.lock().is_empty();
                    return if is_none { Err(error) } else { Ok(()) };
                }
                Err(error) if is_about_all(&error) => return Err(error),
                Err(error) => flow.end(End::Failed(running.ticket, words(&error))),
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

/// Jobs that were lost.
struct Lost {
    /// They are to be submitted again.
    jobs: Vec<(String, Running)>,
    /// When they were looked for.
    looked: Option<Instant>,
}

impl Lost {
    fn new() -> Self {
        Self { jobs: Vec::new(), looked: Some(Instant::now()) }
    }
}

/// A picture's bytes once more, unless the server reads it itself.
fn read_again(flow: &Flow<'_>, ticket: &Ticket) -> Result<Option<Vec<u8>>, String> {
    let Some(sha256) = ticket.sha256 else { return Ok(None) };
    let bytes = flow.sources.read(&ticket.item.place, flow.stop)?;
    let is_same = <[u8; 32]>::from(Sha256::digest(&bytes)) == sha256;
    is_same.then_some(Some(bytes)).ok_or_else(|| "the file was changed meanwhile".to_owned())
}

/// What SUBMIT is told of how the model is asked.
fn options(ask: &AskArgs) -> anyhow::Result<Vec<String>> {
    let plain = (ask.coordinates, ask.decimals);
    ensure!(plain == Default::default(), "coordinates and decimals are settings of the server");
    let mut options = vec!["MAXTOKENS".to_owned(), ask.max_new_tokens.to_string()];
    if let Some(beams) = ask.beams {
        options.extend(["BEAMS".to_owned(), beams.to_string()]);
    }
    if let Some(length) = ask.no_repeat_ngram {
        options.extend(["NGRAM".to_owned(), length.to_string()]);
    }
    if let Some(penalty) = ask.length_penalty {
        options.extend(["LENGTHPENALTY".to_owned(), penalty.to_string()]);
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
    let is_refusal = |code| {
        matches!(code, "NOPERM" | "NOAUTH" | "NOMODEL" | "BADPROMPT") || SHORT.contains(&code)
    };
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
fn gone(error: &RedisError) -> End {
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
        self.patiently(stop, |connection| command.query(connection))
    }

    /// Several commands in one go.
    fn all<T: FromRedisValue>(&mut self, commands: &Pipeline, stop: &Stop) -> RedisResult<T> {
        self.patiently(stop, |connection| commands.query(connection))
    }

    fn patiently<T>(
        &mut self,
        stop: &Stop,
        call: impl Fn(&mut Connection) -> RedisResult<T>,
    ) -> RedisResult<T> {
        let start = Instant::now();
        loop {
            let called = self.connection().and_then(&call);
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

    fn connection(&mut self) -> RedisResult<&mut Connection> {
        match &mut self.connection {
            Some(connection) => Ok(connection),
            none => Ok(none.insert(connect(&self.remote.client, ANSWER)?)),
        }
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
