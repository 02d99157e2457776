//! The intake thread: takes messages from the lists of Celery's queues and writes them as jobs.
//!
//! A message is read under the server's lock, unpacked without it, and then removed and written as a
//! job in one lock section: a crash finds it in one place or in the other. What is not ours stays
//! where it is.

use std::{
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use florence_engine::catch_panic;
use redis_module::{Context, RedisError, RedisString};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Celery, FIELD, Task,
    arguments::{self, Arguments},
    canvas, celery, control, events,
    message::{Call, Message},
    outcome,
    passed::Passed,
    result::Exception,
    time,
};
use crate::{
    figures,
    job::{
        Job, JobKey, NoJob, limits,
        new::{self, Options, Picture},
    },
    model::{self, Model},
    news,
    queue::{queue, sync},
    server::{
        self, Leftward, Value, call, can_write, integer, select_db, string, unix_ms, with_server,
    },
    settings,
};

/// How often a full queue, or a server that takes no writes, is looked at again.
const FULL: Duration = Duration::from_millis(100);
/// How often lists are looked at without an event: they may have come from a file or a master.
const IDLE: Duration = Duration::from_secs(1);
/// Messages looked at in one lock section: so many, or so many bytes.
const SLICE: usize = 32;
const SLICE_BYTES: usize = 1 << 20;

/// A look that finds nothing of ours is paid for with so many times its own time: whoever else uses
/// the list is not to wait for us.
const SHARE: u32 = 10;

/// Wakes the thread; full is as good as sent.
static WAKE: LazyLock<(Sender<()>, Receiver<()>)> = LazyLock::new(|| bounded(1));

/// A list has changed.
pub(crate) fn list_changed(name: &[u8]) {
    let Some(celery) = celery() else { return };
    let Some(name) = name.strip_prefix(celery.prefix.as_bytes()) else { return };
    // A name that only begins like a queue's wakes the thread for nothing.
    if celery.queues.keys().any(|queue| name.starts_with(queue.as_bytes())) {
        wake();
    }
}

pub(super) fn wake() {
    let _ = WAKE.0.try_send(());
}

/// The thread's work; returns at once if there is no wire mode.
pub(crate) fn run() {
    let Some(celery) = celery() else { return };
    let mut lists: Vec<List> = celery
        .steps
        .iter()
        .flat_map(|step| celery.queues.iter().map(move |(queue, tasks)| (step, queue, tasks)))
        .map(|(step, queue, tasks)| List {
            key: celery.list(queue, *step),
            queue: queue.clone(),
            tasks: tasks.clone(),
            passed: Passed::default(),
        })
        .collect();
    let mut beat = Instant::now();
    while !queue().is_shut() {
        if Instant::now() >= beat {
            with_server(|ctx| events::heartbeat(ctx, celery));
            beat = Instant::now() + events::HEARTBEAT;
        }
        let (slice, held) = take_slice(celery, &mut lists);
        match slice {
            Slice::Taken => {}
            Slice::Left => thread::sleep(held * SHARE),
            Slice::Refused => thread::sleep(FULL),
            Slice::Empty => {
                thread::sleep(held * SHARE);
                let pause = if queue().room() == 0 { FULL } else { IDLE };
                let _ = WAKE.1.recv_timeout(pause);
            }
        }
    }
}

/// A list of messages; the next one is at its right end.
struct List {
    key: String,
    queue: String,
    tasks: Vec<String>,
    passed: Passed,
}

/// Messages that have not been looked at, from right to left.
struct Unseen {
    messages: Vec<Value>,
    /// So many messages are at the right of them.
    start: usize,
    /// So many have come to the right end since the last look: before what was passed over.
    new: usize,
}

/// What came of a look at the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slice {
    /// Some messages were taken; there may be more.
    Taken,
    /// Some were left for others; there may be more.
    Left,
    Empty,
    /// The server takes no writes just now: a pause, too few replicas, a full disk.
    Refused,
}

/// Looks at some messages of the first list that has any; how long the server was held for that.
fn take_slice(celery: &Celery, lists: &mut [List]) -> (Slice, Duration) {
    let mut held = Duration::ZERO;
    let seen = with_server(|ctx| {
        let start = Instant::now();
        // What was revoked before it was sent is not to be taken.
        if !can_write(ctx) {
            return Err(Slice::Refused);
        }
        if matches!(model::model(), Model::Failed(_)) || control::is_behind() {
            return Err(Slice::Empty);
        }
        select_db(ctx, celery.broker_db());
        let room = queue().room();
        let seen = lists.iter_mut().find_map(|list| {
            let unseen = list.peek(ctx, room.min(SLICE));
            (!unseen.messages.is_empty()).then_some((list, unseen))
        });
        held = start.elapsed();
        seen.ok_or(Slice::Empty)
    });
    let (list, unseen) = match seen {
        Ok(seen) => seen,
        Err(slice) => return (slice, held),
    };
    let found: Vec<_> = unseen
        .messages
        .iter()
        .map(|message| list.unpack_guarded(celery, message.as_slice()))
        .collect();
    if found.iter().all(Found::is_left) {
        // Of no concern to the server: others' messages cost it as little as can be.
        for (i, (message, found)) in unseen.messages.iter().zip(&found).enumerate() {
            list.leave(celery, unseen.start + i, message, found);
        }
        return (Slice::Left, held);
    }
    let slice = with_server(|ctx| {
        if !can_write(ctx) {
            return Slice::Refused;
        }
        select_db(ctx, celery.broker_db());
        take_out(ctx, celery, list, &unseen, found)
    });
    (slice, held)
}

/// Takes what is ours out of its list, and writes it as jobs.
fn take_out(
    ctx: &Context,
    celery: &Celery,
    list: &mut List,
    unseen: &Unseen,
    found: Vec<Found>,
) -> Slice {
    // What others have done meanwhile shows at the next look, but for what they have taken.
    let new = list.follow(ctx);
    if new != unseen.new {
        return Slice::Taken;
    }
    let mut start = list.passed.start(new);
    let there: Vec<Value> = list.from(ctx, start).take(unseen.messages.len()).collect();
    let is = |one: &Value, other: &Value| one.as_slice() == other.as_slice();
    let is_first = |message| there.first().is_some_and(|first| is(message, first));
    let gone = unseen.messages.iter().position(is_first).unwrap_or(unseen.messages.len());
    let left = unseen.messages.iter().zip(found).skip(gone).zip(&there);
    let left: Vec<_> = left
        .take_while(|((message, _), there)| is(message, there))
        .map(|(asked, _)| asked)
        .collect();

    let places = left.iter().enumerate().filter(|(_, (_, found))| !found.is_left());
    let places: Vec<usize> = places.map(|(i, _)| start + i).collect();
    if list.remove(ctx, &places).is_err() {
        return Slice::Refused;
    }
    for (message, found) in left {
        match found {
            Found::Ours(task, wanted) => accept_guarded(ctx, celery, &task, *wanted),
            Found::Rejected(why) => keep_rejected(ctx, celery, list, (message.as_slice(), &why)),
            Found::Left(_) => {
                list.leave(celery, start, message, &found);
                start += 1;
            }
        }
    }
    Slice::Taken
}

/// What a message turned out to be.
enum Found {
    Ours(Box<Task>, Box<Result<Wanted, Exception>>),
    /// It stays in its list.
    Left(Why),
    /// No task at all, which the operator does not want in the list; the text says why not.
    Rejected(String),
}

impl Found {
    fn is_left(&self) -> bool {
        matches!(self, Self::Left(_))
    }
}

/// Why a message stays in its list.
enum Why {
    /// It is of this task, which others take.
    Other(String),
    /// It is no task; the text says why not.
    NoTask(String),
    /// It made us panic, which is in the log.
    Panic,
}

/// A task's arguments, checked.
struct Wanted {
    picture: Picture,
    prompt: String,
    options: Options,
}

impl List {
    /// The next messages that have not been looked at.
    fn peek(&mut self, ctx: &Context, most: usize) -> Unseen {
        let new = if most > 0 { self.follow(ctx) } else { 0 };
        let start = self.passed.start(new);
        let most = if new > 0 { most.min(new) } else { most };
        let (mut messages, mut size) = (Vec::new(), 0);
        let mut unseen = self.from(ctx, start);
        while messages.len() < most && size < SLICE_BYTES {
            let Some(message) = unseen.next() else { break };
            size += message.as_slice().len();
            messages.push(message);
        }
        Unseen { messages, start, new }
    }

    /// Finds what was passed over again; how many messages have come to the right end since.
    fn follow(&mut self, ctx: &Context) -> usize {
        let key = string(ctx, self.key.as_bytes());
        self.passed.follow(|place| {
            Leftward::from(ctx, &key, place).map(|value| (digest(&value), value.as_slice().len()))
        })
    }

    /// The messages from a place on, counted from the right end.
    fn from(&self, ctx: &Context, place: usize) -> Leftward {
        let key: RedisString = string(ctx, self.key.as_bytes());
        Leftward::from(ctx, &key, place)
    }

    /// Takes the messages at these places out of the list.
    ///
    /// The server removes elements by their value, and compares all on the way with it. So those that
    /// go get one value first, and go together, looked for from the nearer end.
    fn remove(&self, ctx: &Context, places: &[usize]) -> Result<(), String> {
        let (Some(first), Some(last)) = (places.first(), places.last()) else { return Ok(()) };
        let key = self.key.as_bytes();
        let value = [&b"florence:taken:"[..], &server::random::<16>()].concat();
        for place in places {
            call(ctx, "LSET", &[key, format!("-{}", place + 1).as_bytes(), &value])?;
        }
        let length = integer(ctx, "LLEN", &[key])?.and_then(|length| usize::try_from(length).ok());
        let is_at_the_left = length.is_some_and(|length| length - first < last + 1);
        let sign = if is_at_the_left { "" } else { "-" };
        call(ctx, "LREM", &[key, format!("{sign}{}", places.len()).as_bytes(), &value])
    }

    /// Passes over a message at this place, and tells why.
    fn leave(&mut self, celery: &Celery, place: usize, message: &Value, found: &Found) {
        if let Found::Left(why) = found {
            tell_left(celery, &self.key, why);
        }
        self.passed.add(place, digest(message));
    }

    /// As [`Self::unpack`]; a message that makes it panic is left where it is, and passed over.
    fn unpack_guarded(&self, celery: &Celery, bytes: &[u8]) -> Found {
        let who = || format!("a message of list {}", server::printable(self.key.as_bytes()));
        server::catch(who, || self.unpack(celery, bytes)).unwrap_or(Found::Left(Why::Panic))
    }

    fn unpack(&self, celery: &Celery, bytes: &[u8]) -> Found {
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(why) if celery.rejects_unknown => return Found::Rejected(why),
            Err(why) => return Found::Left(Why::NoTask(why)),
        };
        let name = message.task().to_owned();
        let is_known = self.tasks.contains(&name);
        let may_be_left = !is_known && !celery.rejects_unknown;
        if may_be_left && !MAPS.contains(&name.as_str()) {
            return Found::Left(Why::Other(name));
        }
        let (queue, priority) = (self.queue.clone(), message.priority());
        let (headers, embed, call) = message.unpack();
        let is_map = !is_known && call.as_ref().is_ok_and(|call| self.is_map_of_ours(call));
        if may_be_left && !is_map {
            return Found::Left(Why::Other(name));
        }
        let task = Task { queue, priority, headers, embed };
        let wanted = if is_known {
            call.and_then(|call| wanted(&task, &call))
        } else if is_map {
            let text = "maps and chunks of this task are not supported: send a group";
            Err(Exception::new("builtins", "NotImplementedError", text))
        } else {
            Err(Exception::new("celery.exceptions", "NotRegistered", name))
        };
        Found::Ours(Box::new(task), Box::new(wanted))
    }

    /// Whether one of [`MAPS`] calls a task that is taken here.
    fn is_map_of_ours(&self, call: &Call) -> bool {
        let inner = call.kwargs.get("task").and_then(|signature| signature.get("task")?.as_str());
        inner.is_some_and(|inner| self.tasks.iter().any(|task| task == inner))
    }
}

/// Celery's own tasks that call another for each of a list; chunks are starmaps.
const MAPS: [&str; 2] = ["celery.map", "celery.starmap"];

/// Of a large message its ends are enough, where Celery has the ids that make it one of its kind.
fn digest(message: &Value) -> u64 {
    const MOST: usize = 1 << 14;
    let bytes = message.as_slice();
    match bytes.len() {
        ..=MOST => xxh3_64(bytes),
        length => {
            let (head, tail) = (&bytes[..MOST / 2], &bytes[length - MOST / 2..]);
            xxh3_64(&[head, tail, &length.to_le_bytes()].concat())
        }
    }
}

/// Counts a message that stays in its list, and tells why; of each other task once.
fn tell_left(celery: &Celery, key: &str, why: &Why) {
    figures::CELERY_LEFT.add(1);
    let key = server::printable(key.as_bytes());
    match why {
        Why::Other(name) => {
            if celery.is_new_other(name) {
                let name = server::printable(name.as_bytes());
                server::tell(&format!("messages of task '{name}' stay in list '{key}' for others"));
            }
        }
        Why::NoTask(why) => news::warn(&format!("a message stays in list '{key}': {why}")),
        Why::Panic => {}
    }
}

/// Checks what a task asks for, as SUBMIT checks its arguments.
fn wanted(task: &Task, call: &Call) -> Result<Wanted, Exception> {
    canvas::check(&task.embed)?;
    let (name, signatures) = (&task.headers.task, settings::CELERY_ARGUMENTS.get());
    let Arguments { picture, prompt } = arguments::bind(name, signatures.of(name), call)?;
    let from_now = |time: &Option<String>| {
        let at = time.as_deref().and_then(time::unix_ms);
        at.map(|at| at.saturating_sub(unix_ms()))
    };
    let mut options = Options {
        // As on the lists of Celery: 0 is the most urgent.
        priority: -task.priority,
        delay: from_now(&task.headers.eta).map(|delay| limits::DELAY.clamp(delay)),
        expires: from_now(&task.headers.expires).map(|left| left.min(limits::EXPIRES.most)),
        ..Options::default()
    };
    if let Some(limit) = task.headers.timelimit() {
        options.timeout = Some(limits::TIMEOUT.clamp(limit));
    }
    let refused = |error: RedisError| Exception::of_reply(&error.to_string());
    let prompts = [prompt];
    new::check(&prompts, &options).map_err(refused)?;
    let [prompt] = prompts;
    let picture = Picture::at(picture.as_bytes()).map_err(refused)?;
    Ok(Wanted { picture, prompt, options })
}

/// As [`accept`]; a task that makes it panic has failed.
fn accept_guarded(ctx: &Context, celery: &Celery, task: &Task, wanted: Result<Wanted, Exception>) {
    let who = || format!("task {}", server::printable(task.id().as_bytes()));
    if server::catch(who, || accept(ctx, celery, task, wanted)).is_none() {
        let exception = Exception::of_reply("INTERNAL internal error");
        let _ = catch_panic(|| refuse(ctx, celery, task, &exception));
    }
}

/// Writes a task's job; or, without one, its end.
fn accept(ctx: &Context, celery: &Celery, task: &Task, wanted: Result<Wanted, Exception>) {
    // Clients choose other names: they would fill the memory.
    if celery.queues.values().flatten().any(|known| *known == task.headers.task) {
        *celery.taken.lock().entry(task.headers.task.clone()).or_default() += 1;
    }
    events::received(ctx, celery, task);
    if celery.revoked.lock().ids.contains(task.id()) {
        return revoke(ctx, celery, task, "revoked");
    }
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(exception) => return refuse(ctx, celery, task, &exception),
    };
    if wanted.options.expires.is_some_and(|expires| expires <= 0) {
        return revoke(ctx, celery, task, "expired");
    }
    let key = task.key();
    let known = Job::look(ctx, &string(ctx, key.as_bytes())).map(|job| job.state.is_final());
    match known {
        Err(NoJob::Missing) => {}
        // The same task again, which is waiting or running.
        Ok(false) => return,
        _ => {
            let _ = call(ctx, "UNLINK", &[key.as_bytes()]);
        }
    }
    let mut job = new::new("", wanted.picture, &[wanted.prompt], &wanted.options);
    job.add(FIELD, json!(task).to_string());
    let key = string(ctx, key.as_bytes());
    let seen = new::store(ctx, &key, job);
    figures::CELERY_TAKEN.add(1);
    sync::created(&JobKey { db: celery.broker_db(), name: key.as_slice().into() }, &seen);
}

/// Ends a task that does not become a job.
fn refuse(ctx: &Context, celery: &Celery, task: &Task, exception: &Exception) {
    figures::CELERY_REFUSED.add(1);
    let id = server::printable(task.id().as_bytes());
    news::warn(&format!("task '{id}' is refused: {}", exception.repr()));
    outcome::failed(ctx, celery, task, exception);
}

/// As [`refuse`], of a task that nobody wants any more.
fn revoke(ctx: &Context, celery: &Celery, task: &Task, reason: &'static str) {
    let id = server::printable(task.id().as_bytes());
    news::tell(&format!("task '{id}' does not become a job: {reason}"));
    outcome::revoked(ctx, celery, task, reason);
}

/// Keeps the latest of what nobody can answer.
fn keep_rejected(ctx: &Context, celery: &Celery, from: &List, (bytes, why): (&[u8], &str)) {
    figures::CELERY_REJECTED.add(1);
    let key = server::printable(from.key.as_bytes());
    news::warn(&format!("a message of list '{key}' is in florence:celery-rejected: {why}"));
    let list = format!("{}florence:celery-rejected", celery.prefix);
    let _ = call(ctx, "LPUSH", &[list.as_bytes(), bytes]);
    let _ = call(ctx, "LTRIM", &[list.as_bytes(), b"0", b"99"]);
}
