//! What follows a task: callbacks, the rest of its chain, the chord of its group.
//!
//! As a worker does it, for plain signatures. A task that is followed by anything else fails before
//! it runs: nothing is dropped silently.

use redis_module::{CallReply, Context};
use serde_json::{Value, json};

use super::{
    Celery, Task, json,
    message::{Embed, Headers, Signature, is_plain},
    outgoing::new_id,
    result::{self, Exception},
};
use crate::{
    server::{self, ask, bytes, call, in_db},
    settings::{self, Setting},
};

/// Refuses what could not be followed up.
pub(super) fn check(embed: &Embed) -> Result<(), Exception> {
    let Embed { callbacks, errbacks, chain, chord } = embed;
    let lists = [callbacks, errbacks, chain].into_iter().flatten().flatten();
    if lists.chain(chord).all(is_plain) {
        return Ok(());
    }
    let text = "only plain tasks can follow this one, no groups, chords or maps";
    Err(Exception::new("builtins", "NotImplementedError", text))
}

/// After a success: sends its callbacks, and what is next in its chain. Gives what was sent, as the
/// result of the task lists its children.
pub(super) fn follow(ctx: &Context, celery: &Celery, task: &Task, result: &Value) -> Vec<Value> {
    let mut children = Vec::new();
    match task.embed.callbacks.as_deref().unwrap_or_default() {
        [callback] => children.extend(send(ctx, celery, task, callback, (result, &[]))),
        callbacks => children.extend(send_group(ctx, celery, task, callbacks, result)),
    }
    if let Some((next, rest)) = task.embed.chain.as_deref().and_then(<[_]>::split_last) {
        children.extend(send(ctx, celery, task, next, (result, rest)));
    }
    part_of_chord(ctx, celery, task, "SUCCESS", result);
    children
}

/// Sends several callbacks; a worker makes a group of them, and one child.
fn send_group(
    ctx: &Context,
    celery: &Celery,
    task: &Task,
    callbacks: &[Signature],
    result: &Value,
) -> Option<Value> {
    let group = new_id();
    let send = |(index, callback): (usize, &Signature)| {
        let callback = member(callback, &group, index);
        send(ctx, celery, task, &callback, (result, &[]))
    };
    let members: Vec<Value> = callbacks.iter().enumerate().filter_map(send).collect();
    (!members.is_empty()).then(|| json!([[group, null], members]))
}

/// A signature as a member of a group, unless it is one of another.
fn member(signature: &Signature, group: &str, index: usize) -> Signature {
    let mut signature = signature.clone();
    let options = signature.entry("options").or_insert_with(|| json!({}));
    if let Some(options) = options.as_object_mut() {
        options.entry("group_id").or_insert_with(|| group.into());
        options.insert("group_index".to_owned(), index.into());
    }
    signature
}

/// After a failure: fails what would have followed, and sends the errbacks.
pub(super) fn abandon(ctx: &Context, celery: &Celery, task: &Task, exception: &Exception) {
    part_of_chord(ctx, celery, task, "FAILURE", &exception.json());
    let chain = task.embed.chain.iter().flatten().flat_map(parts);
    for skipped in chain.filter_map(|signature| skipped(task, signature)) {
        result::failed_unsent(ctx, celery, skipped.id(), exception);
        part_of_chord(ctx, celery, &skipped, "FAILURE", &exception.json());
    }
    let id = Value::from(task.id());
    for errback in task.embed.errbacks.iter().flatten().filter(|errback| is_plain(errback)) {
        send(ctx, celery, task, errback, (&id, &[]));
    }
}

/// The tasks of a group, or the one that a signature is.
fn parts(signature: &Signature) -> Vec<&Signature> {
    match signature.get("kwargs").and_then(|kwargs| kwargs.get("tasks")?.as_array()) {
        Some(tasks) if signature.get("task").is_some_and(|name| name == "celery.group") => {
            tasks.iter().filter_map(Value::as_object).collect()
        }
        _ => vec![signature],
    }
}

fn option<'a>(signature: &'a Signature, name: &str) -> Option<&'a Value> {
    signature.get("options")?.get(name)
}

/// A task of a chain that will not be sent, as others wait for it.
fn skipped(task: &Task, signature: &Signature) -> Option<Task> {
    let text = |name| Some(option(signature, name)?.as_str()?.to_owned());
    let headers = Headers {
        id: text("task_id")?,
        group: text("group_id"),
        group_index: option(signature, "group_index").and_then(Value::as_f64),
        ..Headers::default()
    };
    let chord = option(signature, "chord").and_then(Value::as_object).cloned();
    let embed = Embed { chord, ..Embed::default() };
    Some(Task { queue: task.queue.clone(), priority: task.priority, headers, embed })
}

/// Sends a signature with its first argument and the chain that it takes along. Gives its task as
/// `AsyncResult.as_tuple` writes one, here without parent and members.
fn send(
    ctx: &Context,
    celery: &Celery,
    task: &Task,
    signature: &Signature,
    (first, chain): (&Value, &[Signature]),
) -> Option<Value> {
    let message = task.sender().message(signature, first, chain);
    if let Err(problem) = celery.send(ctx, &message) {
        let id = server::printable(task.id().as_bytes());
        server::warn(&format!("what follows task {id} is not sent: {problem}"));
        return None;
    }
    Some(json!([[message.id, null], null]))
}

/// Adds a result to those of the task's group; with the last one the chord's callback is sent.
///
/// The keys are those of Celery's workers, so that a group may be shared with them.
pub(super) fn part_of_chord(
    ctx: &Context,
    celery: &Celery,
    task: &Task,
    status: &str,
    result: &Value,
) {
    let (Some(chord), Some(group)) = (&task.embed.chord, &task.headers.group) else { return };
    let part = json::write(&json!([1, task.id(), status, result]));
    let complete = in_db(ctx, celery.backend_db(), || {
        let keys = Group::new(celery, group);
        keys.add(ctx, task, &part);
        keys.take_if_complete(ctx, chord)
    });
    match complete.map(|parts| results(&parts)) {
        None => {}
        Some(Ok(results)) => {
            send(ctx, celery, task, chord, (&results.into(), &[]));
        }
        Some(Err(problem)) => fail_chord(ctx, celery, task, chord, problem),
    }
}

/// Fails the callback of a chord that will not be sent, and sends its errbacks.
fn fail_chord(ctx: &Context, celery: &Celery, task: &Task, chord: &Signature, problem: String) {
    let exception = Exception::new("celery.exceptions", "ChordError", problem);
    let id = option(chord, "task_id").and_then(Value::as_str);
    if let Some(id) = id {
        result::failed_unsent(ctx, celery, id, &exception);
    }
    let errbacks = option(chord, "link_error").and_then(Value::as_array).into_iter().flatten();
    for errback in errbacks.filter_map(Value::as_object).filter(|errback| is_plain(errback)) {
        send(ctx, celery, task, errback, (&json!(id), &[]));
    }
}

/// The keys in which a group collects its results, in the database of results.
struct Group {
    /// Sorted set of the results, by their place in the group.
    parts: String,
    /// How many more the group has than `size` says.
    extra: String,
    size: String,
    /// Which parts have been added.
    seen: String,
    /// Who sends the callback; `done` afterwards.
    claim: String,
}

impl Group {
    fn new(celery: &Celery, id: &str) -> Self {
        let key = |end: &str| format!("{}celery-taskset-meta-{id}{end}", celery.result_prefix);
        let [parts, extra, size, seen, claim] = [".j", ".t", ".s", ".d", ".c"].map(key);
        Self { parts, extra, size, seen, claim }
    }

    fn all(&self) -> [&[u8]; 4] {
        [&self.parts, &self.extra, &self.size, &self.seen].map(String::as_bytes)
    }

    fn add(&self, ctx: &Context, task: &Task, part: &str) {
        let claim = bytes(ctx, "GET", &[self.claim.as_bytes()]);
        if claim.is_some_and(|claim| claim == b"done") {
            return;
        }
        let place = task.headers.group_index.map_or("+inf".to_owned(), |index| index.to_string());
        let name = format!("{}:{place}", task.id());
        let added = server::integer(ctx, "SADD", &[self.seen.as_bytes(), name.as_bytes()]);
        if added == Ok(Some(1)) {
            let args = [self.parts.as_bytes(), place.as_bytes(), part.as_bytes()];
            let _ = call(ctx, "ZADD", &args);
        }
        let expires = settings::CELERY_RESULT_EXPIRES.text();
        for key in self.all().into_iter().filter(|_| expires != "0") {
            let _ = call(ctx, "EXPIRE", &[key, expires.as_bytes()]);
        }
    }

    /// All results, once they are there; the keys are gone then.
    fn take_if_complete(&self, ctx: &Context, chord: &Signature) -> Option<Vec<Vec<u8>>> {
        const DONE_SECONDS: &[u8] = b"300";
        let number = |key: &str| -> Option<i64> {
            String::from_utf8(bytes(ctx, "GET", &[key.as_bytes()])?).ok()?.parse().ok()
        };
        // Celery before 5.1 says it in the signature.
        let size = number(&self.size).or_else(|| chord.get("chord_size")?.as_i64())?;
        let total = size + number(&self.extra).unwrap_or_default();
        if server::integer(ctx, "ZCARD", &[self.parts.as_bytes()]) != Ok(Some(total)) {
            return None;
        }
        let parts = members(ctx, &self.parts);
        let _ = call(ctx, "SETEX", &[self.claim.as_bytes(), DONE_SECONDS, b"done"]);
        let _ = call(ctx, "UNLINK", &self.all());
        Some(parts)
    }
}

/// The results of a group, in its order.
fn members(ctx: &Context, key: &str) -> Vec<Vec<u8>> {
    let reply = ask(ctx, "ZRANGE", &[key.as_bytes(), b"0", b"-1"]);
    let Ok(CallReply::Array(members)) = reply else { return Vec::new() };
    let text = |member| match member {
        Ok(CallReply::String(text)) => Some(text.as_bytes().to_vec()),
        _ => None,
    };
    members.iter().filter_map(text).collect()
}

/// The values of `[1, id, status, result]`, unless one of them is an error.
fn results(members: &[Vec<u8>]) -> Result<Vec<Value>, String> {
    let value = |member: &Vec<u8>| {
        let (_, id, status, result): (i64, Value, String, Value) =
            json::read(&String::from_utf8_lossy(member))
                .map_err(|error| format!("Join error: {error}"))?;
        if status == "SUCCESS" {
            return Ok(result);
        }
        let kind = result["exc_type"].as_str().unwrap_or_default();
        let id = id.as_str().map_or_else(|| id.to_string(), str::to_owned);
        Err(format!("Dependency {id} raised {kind}({})", result["exc_message"][0]))
    };
    members.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_with_an_error_has_no_results() {
        let member =
            |status: &str, result: Value| json!([1, "id", status, result]).to_string().into();
        let good: Vec<u8> = member("SUCCESS", json!({"<OD>": 1}));
        assert_eq!(results(std::slice::from_ref(&good)), Ok(vec![json!({"<OD>": 1})]));
        let error =
            json!({"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"});
        let problem = results(&[good, member("FAILURE", error)]).unwrap_err();
        assert_eq!(problem, "Dependency id raised ValueError(\"no\")");
        assert!(results(&[b"x".to_vec()]).is_err());
    }

    #[test]
    fn parts_of_python_workers_may_hold_what_json_does_not_know() {
        let part = br#"[1, "id", "SUCCESS", [NaN, "\udc80"]]"#;
        let results = results(&[part.to_vec()]).unwrap();
        assert_eq!(json::write(&results.into()), r#"[[NaN,"\udc80"]]"#);
    }

    #[test]
    fn callbacks_become_members_of_one_group() {
        let signature =
            |options: Value| json!({"task": "a", "options": options}).as_object().unwrap().clone();
        let sent = member(&signature(json!({"queue": "q"})), "g", 1);
        assert_eq!(sent["options"], json!({"queue": "q", "group_id": "g", "group_index": 1}));
        let sent = member(&signature(json!({"group_id": "other"})), "g", 0);
        assert_eq!(sent["options"]["group_id"], "other");
    }

    #[test]
    fn only_plain_tasks_may_follow() {
        let embed = |chord: Value| Embed { chord: chord.as_object().cloned(), ..Embed::default() };
        assert!(check(&Embed::default()).is_ok());
        assert!(check(&embed(json!({"task": "app.sum"}))).is_ok());
        assert!(check(&embed(json!({"task": "celery.group"}))).is_err());
    }
}
