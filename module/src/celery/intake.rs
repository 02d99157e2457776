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
use redis_module::{Context, RedisError};
use serde_json::{Map, Value, json};

use super::{
    Celery, FIELD, Task, canvas, celery, events,
    message::{self, Body, Message},
    outcome,
    result::Exception,
};
use crate::{
    job::{
        Job, JobKey, NoJob, limits,
        new::{self, Options, Picture},
    },
    model::{self, Model},
    queue::{queue, sync},
    server::{self, bytes, call, can_write, integer, select_db, string, unix_ms, with_server},
};

/// How often a full queue, or a server that takes no writes, is looked at again.
const FULL: Duration = Duration::from_millis(100);
/// How often lists are looked at without an event: they may have come from a file or a master.
const IDLE: Duration = Duration::from_secs(1);
/// Messages looked at in one lock section: so many, or so many bytes.
const SLICE: usize = 32;
const SLICE_BYTES: usize = 1 << 20;

/// Wakes the thread; full is as good as sent.
static WAKE: LazyLock<(Sender<()>, Receiver<()>)> = LazyLock::new(|| bounded(1));

/// A list has changed.
pub(crate) fn list_changed(name: &[u8]) {
    let Some(celery) = celery() else { return };
    let Some(name) = name.strip_prefix(celery.prefix.as_bytes()) else { return };
    // A name that only begins like a queue's wakes the thread for nothing.
    if celery.queues.keys().any(|queue| name.starts_with(queue.as_bytes())) {
        let _ = WAKE.0.try_send(());
    }
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
            passed: 0,
            last_passed: Vec::new(),
        })
        .collect();
    let mut beat = Instant::now();
    while !queue().is_shut() {
        if Instant::now() >= beat {
            with_server(|ctx| events::heartbeat(ctx, celery));
            beat = Instant::now() + events::HEARTBEAT;
        }
        match take_slice(celery, &mut lists) {
            Slice::Taken => {}
            Slice::Refused => thread::sleep(FULL),
            Slice::Empty => {
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
    /// So many messages at the right end are not ours.
    passed: usize,
    /// The leftmost of them, by which they are found when others take from the right.
    last_passed: Vec<u8>,
}

/// What came of a look at the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slice {
    /// Some messages were taken or passed over; there may be more.
    Taken,
    Empty,
    /// The server takes no writes just now: a pause, too few replicas, a full disk.
    Refused,
}

/// Looks at some messages of the first list that has any.
fn take_slice(celery: &Celery, lists: &mut [List]) -> Slice {
    let seen = with_server(|ctx| {
        if !can_write(ctx) || matches!(model::model(), Model::Failed(_)) {
            return None;
        }
        select_db(ctx, celery.broker_db());
        let room = queue().room();
        lists.iter_mut().find_map(|list| {
            let messages = list.peek(ctx, room.min(SLICE));
            (!messages.is_empty()).then_some((list, messages))
        })
    });
    let Some((list, messages)) = seen else { return Slice::Empty };
    let unpacked: Vec<_> =
        messages.iter().map(|bytes| list.unpack_guarded(celery, bytes)).collect();
    with_server(|ctx| {
        if !can_write(ctx) {
            return Slice::Refused;
        }
        select_db(ctx, celery.broker_db());
        for (bytes, found) in messages.iter().zip(unpacked) {
            if matches!(found, Found::Foreign) {
                list.pass(bytes);
                continue;
            }
            match integer(ctx, "LREM", &[list.key.as_bytes(), b"-1", bytes]) {
                Ok(Some(1)) => {}
                // Somebody else has taken it meanwhile.
                Ok(_) => {
                    list.passed = 0;
                    return Slice::Taken;
                }
                Err(_refused) => return Slice::Refused,
            }
            match found {
                Found::Ours(task, wanted) => accept_guarded(ctx, celery, &task, *wanted),
                Found::Rejected(bytes) => keep_rejected(ctx, celery, bytes),
                Found::Foreign => {}
            }
        }
        Slice::Taken
    })
}

/// What a message turned out to be.
enum Found<'a> {
    Ours(Box<Task>, Box<Result<Wanted, Exception>>),
    /// Left to others.
    Foreign,
    /// No task at all.
    Rejected(&'a [u8]),
}

/// A task's arguments, checked.
struct Wanted {
    picture: Picture,
    prompt: String,
    options: Options,
}

impl List {
    /// The next messages that have not been passed over.
    fn peek(&mut self, ctx: &Context, most: usize) -> Vec<Vec<u8>> {
        let key = self.key.as_bytes();
        let count = |command, args: &[&[u8]]| {
            integer(ctx, command, args).ok().flatten().and_then(|count| usize::try_from(count).ok())
        };
        let length = count("LLEN", &[key]).unwrap_or_default();
        // Those left of what was passed over; all, if others have taken that.
        let new = match self.passed {
            0 => length,
            _ => count("LPOS", &[key, &self.last_passed]).unwrap_or(length),
        };
        self.passed = length - new;
        let (mut messages, mut size) = (Vec::new(), 0);
        while messages.len() < most.min(new) && size < SLICE_BYTES {
            let index = format!("-{}", self.passed + messages.len() + 1);
            let Some(bytes) = bytes(ctx, "LINDEX", &[key, index.as_bytes()]) else { break };
            size += bytes.len();
            messages.push(bytes);
        }
        messages
    }

    fn pass(&mut self, bytes: &[u8]) {
        self.passed += 1;
        bytes.clone_into(&mut self.last_passed);
    }

    /// As [`Self::unpack`]; a message that makes it panic is left where it is, and passed over.
    fn unpack_guarded<'a>(&self, celery: &Celery, bytes: &'a [u8]) -> Found<'a> {
        let who = || format!("a message of list {}", self.key);
        server::catch(who, || self.unpack(celery, bytes)).unwrap_or(Found::Foreign)
    }

    fn unpack<'a>(&self, celery: &Celery, bytes: &'a [u8]) -> Found<'a> {
        let Some(message) = Message::parse(bytes) else {
            return if celery.rejects_unknown { Found::Rejected(bytes) } else { Found::Foreign };
        };
        let is_known = self.tasks.contains(&message.headers.task);
        if !is_known && !celery.rejects_unknown {
            return Found::Foreign;
        }
        let body = message.body();
        let priority = message.priority();
        let name = message.headers.task.clone();
        let mut task = Task {
            queue: self.queue.clone(),
            priority,
            headers: message.headers,
            embed: message::Embed::default(),
        };
        let wanted = match body {
            Err(problem) => Err(Exception::new("kombu.exceptions", "ContentDisallowed", problem)),
            Ok(Body(args, kwargs, embed)) => {
                task.embed = embed;
                if is_known {
                    wanted(&task, &args, &kwargs)
                } else {
                    Err(Exception::new("celery.exceptions", "NotRegistered", name))
                }
            }
        };
        Found::Ours(Box::new(task), Box::new(wanted))
    }
}

/// Checks what a task asks for, as SUBMIT checks its arguments.
fn wanted(task: &Task, args: &[Value], kwargs: &Map<String, Value>) -> Result<Wanted, Exception> {
    canvas::check(&task.embed)?;
    let [picture, prompt] = arguments(&task.headers.task, args, kwargs)
        .map_err(|problem| Exception::new("builtins", "TypeError", problem))?;
    let from_now = |time: &Option<String>| {
        let at = time.as_deref().and_then(message::unix_ms);
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
        options.timeout = limits::TIMEOUT.clamp(limit);
    }
    let refused = |error: RedisError| Exception::of_reply(&error.to_string());
    let prompts = [prompt];
    new::check_prompts(&prompts, None).map_err(refused)?;
    let [prompt] = prompts;
    let picture = Picture::at(picture.as_bytes()).map_err(refused)?;
    Ok(Wanted { picture, prompt, options })
}

/// Binds `(url, task_prompt)` as Python would.
fn arguments(
    task: &str,
    args: &[Value],
    kwargs: &Map<String, Value>,
) -> Result<[String; 2], String> {
    const NAMES: [&str; 2] = ["url", "task_prompt"];
    let function = task.rsplit('.').next().unwrap_or(task);
    if args.len() > NAMES.len() {
        let given = args.len();
        return Err(format!("{function}() takes 2 positional arguments but {given} were given"));
    }
    if let Some(name) = kwargs.keys().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(format!("{function}() got an unexpected keyword argument '{name}'"));
    }
    let mut bound = NAMES.map(|_| String::new());
    for (i, name) in NAMES.into_iter().enumerate() {
        let value = match (args.get(i), kwargs.get(name)) {
            (Some(_), Some(_)) => {
                return Err(format!("{function}() got multiple values for argument '{name}'"));
            }
            (Some(value), None) | (None, Some(value)) => value,
            (None, None) => {
                return Err(format!(
                    "{function}() missing 1 required positional argument: '{name}'"
                ));
            }
        };
        value.as_str().ok_or_else(|| format!("{name} must be a string"))?.clone_into(&mut bound[i]);
    }
    Ok(bound)
}

/// As [`accept`]; a task that makes it panic has failed.
fn accept_guarded(ctx: &Context, celery: &Celery, task: &Task, wanted: Result<Wanted, Exception>) {
    let who = || format!("task {}", server::printable(task.id().as_bytes()));
    if server::catch(who, || accept(ctx, celery, task, wanted)).is_none() {
        let exception = Exception::of_reply("INTERNAL internal error");
        let _ = catch_panic(|| outcome::failed(ctx, celery, task, &exception));
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
        return outcome::revoked(ctx, celery, task, "revoked");
    }
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(exception) => return outcome::failed(ctx, celery, task, &exception),
    };
    if wanted.options.expires.is_some_and(|expires| expires <= 0) {
        return outcome::revoked(ctx, celery, task, "expired");
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
    sync::created(&JobKey { db: celery.broker_db(), name: key.as_slice().into() }, &seen);
}

/// Keeps the latest of what nobody can answer.
fn keep_rejected(ctx: &Context, celery: &Celery, bytes: &[u8]) {
    server::warn("a message that is no Celery task is in florence:celery-rejected");
    let list = format!("{}florence:celery-rejected", celery.prefix);
    let _ = call(ctx, "LPUSH", &[list.as_bytes(), bytes]);
    let _ = call(ctx, "LTRIM", &[list.as_bytes(), b"0", b"99"]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_bound_as_python_binds_them() {
        let bind = |args: Value, kwargs: Value| {
            let args = args.as_array().unwrap().clone();
            arguments("app.f", &args, kwargs.as_object().unwrap())
        };
        let both = ["a".to_owned(), "b".to_owned()];
        assert_eq!(bind(json!(["a", "b"]), json!({})), Ok(both.clone()));
        assert_eq!(bind(json!(["a"]), json!({"task_prompt": "b"})), Ok(both.clone()));
        assert_eq!(bind(json!([]), json!({"task_prompt": "b", "url": "a"})), Ok(both));
        for (args, kwargs, error) in [
            (json!(["a"]), json!({}), "f() missing 1 required positional argument: 'task_prompt'"),
            (
                json!(["a", "b", "c"]),
                json!({}),
                "f() takes 2 positional arguments but 3 were given",
            ),
            (json!(["a"]), json!({"url": "a"}), "f() got multiple values for argument 'url'"),
            (json!([]), json!({"x": 1}), "f() got an unexpected keyword argument 'x'"),
            (json!([1, "b"]), json!({}), "url must be a string"),
        ] {
            assert_eq!(bind(args, kwargs).unwrap_err(), error);
        }
    }
}
