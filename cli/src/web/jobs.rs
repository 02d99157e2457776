//! Jobs as the page shows and changes them: some at a time, each on its own.

use std::collections::BTreeMap;

use redis::{Cmd, RedisResult, Value, cmd};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::{
    list::{ENDED, Row, Wanted, list},
    routes::Refusal,
};
use crate::{
    draw::{self, Findings},
    servers::{
        server::{Key, Server, entries, number, text, words},
        watch::Watch,
    },
};

/// Most jobs that one request names.
pub(super) const MOST_NAMED: usize = 1000;

/// A job that is meant.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Named {
    pub(super) server: usize,
    pub(super) id: Key,
    /// As it was listed.
    #[serde(default)]
    pub(super) state: String,
}

impl Named {
    fn command(&self, name: &str) -> Cmd {
        let mut command = cmd(name);
        command.arg(self.id.bytes());
        command
    }
}

/// Jobs by their server, with their places in the list.
fn by_server(jobs: &[Named]) -> BTreeMap<usize, Vec<(usize, &Named)>> {
    let mut found = BTreeMap::<usize, Vec<(usize, &Named)>>::new();
    for (place, job) in jobs.iter().enumerate() {
        found.entry(job.server).or_default().push((place, job));
    }
    found
}

/// What the servers of jobs answer to a command about each; nothing where they refuse.
pub(super) async fn about_each(
    watch: &Watch,
    jobs: &[Named],
    command: impl Fn(&Named) -> Cmd,
) -> Result<Vec<Value>, Refusal> {
    let mut answers = vec![Value::Nil; jobs.len()];
    for (server, jobs) in by_server(jobs) {
        let commands: Vec<Cmd> = jobs.iter().map(|(_, job)| command(job)).collect();
        let replies = watch.server(server)?.each::<Value>(&commands).await?;
        for ((place, _), reply) in jobs.iter().zip(replies) {
            if let (Ok(reply), Some(answer)) = (reply, answers.get_mut(*place)) {
                *answer = reply;
            }
        }
    }
    Ok(answers)
}

/// What a list shows of jobs; null where there is none any more.
pub(super) async fn rows(watch: &Watch, jobs: &[Named]) -> Result<Vec<serde_json::Value>, Refusal> {
    let is_left_out =
        |name: &str| matches!(name, "result" | "text" | "scores" | "nbest" | "errors" | "id");
    let answers = about_each(watch, jobs, |job| job.command("FLORENCE.GET")).await?;
    Ok(answers.into_iter().map(|answer| shown(answer, is_left_out)).collect())
}

/// The map of FLORENCE.GET as JSON, with the JSON in it unpacked; null if there is no job.
fn shown(reply: Value, is_left_out: impl Fn(&str) -> bool) -> serde_json::Value {
    let mut map = Map::new();
    for (name, value) in entries(reply) {
        if is_left_out(&name) {
            continue;
        }
        let shown = match (&value, name.as_str()) {
            (Value::Int(number), _) => json!(number),
            (Value::Nil, _) => continue,
            (_, "result" | "error" | "errors" | "nbest" | "scores" | "steps") => {
                let text = text(&value);
                serde_json::from_str(&text).unwrap_or(json!(text))
            }
            _ => json!(text(&value)),
        };
        map.insert(name, shown);
    }
    if map.is_empty() { serde_json::Value::Null } else { serde_json::Value::Object(map) }
}

/// What a job was asked for, beside what FLORENCE.GET tells.
const OPTIONS: [&str; 22] = [
    "priority",
    "delay",
    "expires",
    "timeout",
    "retries",
    "ttl",
    "beams",
    "nbest_count",
    "maxtokens",
    "ngram",
    "length_penalty",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "margin",
    "wants",
    "exif",
    "nocache",
    "stream",
    "thumbnail_px",
    "user",
];

/// All of one job.
pub(super) async fn one(server: &Server, job: &Named) -> Result<serde_json::Value, Refusal> {
    let mut options = job.command("HMGET");
    options.arg(&OPTIONS);
    let length = |field: &str| {
        let mut command = job.command("HSTRLEN");
        command.arg(field);
        command
    };
    let commands = [
        job.command("FLORENCE.GET"),
        options,
        job.command("PTTL"),
        length("thumbnail"),
        length("data"),
    ];
    let mut replies = server.each::<Value>(&commands).await?.into_iter();
    let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
    let map = shown(next()?, |_| false);
    if map.is_null() {
        return Err(Refusal::missing("there is no such job (any more)"));
    }
    // These are extras: a user who may not read them sees the rest.
    let options = match next() {
        Ok(Value::Array(values)) => values,
        _ => Vec::new(),
    };
    let options: Map<_, _> = OPTIONS
        .iter()
        .zip(&options)
        .filter(|(_, value)| **value != Value::Nil)
        .map(|(name, value)| ((*name).to_owned(), json!(text(value))))
        .collect();
    let mut count = || next().map(|value| number(&value)).unwrap_or_default();
    let (ttl, thumbnail, data) = (count(), count(), count());
    let marks = marks(&map);
    let labels = size(&map).and_then(|size| draw::labels(&marks, size).ok());
    Ok(json!({
        "options": options,
        "ttl_ms": (ttl > 0.0).then_some(ttl),
        "has_thumbnail": thumbnail > 0.0,
        "has_data": data > 0.0,
        "marks": marks,
        "labels": labels,
        "job": map,
    }))
}

/// What a job's answer, and its question, locate.
pub(super) fn marks(job: &serde_json::Value) -> Findings {
    let mut marks = Findings::read(&job["result"], &job["scores"]);
    if let Some((width, height)) = size(job) {
        let prompts = draw::prompts(job["prompt"].as_str().unwrap_or_default());
        marks.ask(&prompts, (width.into(), height.into()));
    }
    marks
}

/// Width and height of the picture of an answered job.
#[expect(clippy::cast_possible_truncation, reason = "pixels")]
fn size(job: &serde_json::Value) -> Option<(f32, f32)> {
    let side = |name: &str| job[name].as_f64().filter(|side| *side > 0.0);
    Some((side("width")? as f32, side("height")? as f32))
}

/// The map of one job alone.
pub(super) async fn get(server: &Server, job: &Named) -> Result<serde_json::Value, Refusal> {
    let map = shown(server.call(&job.command("FLORENCE.GET")).await?, |_| false);
    if map.is_null() { Err(Refusal::missing("there is no such job (any more)")) } else { Ok(map) }
}

/// What is to be done with jobs.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Retry,
    Cancel,
    Delete,
}

#[derive(Debug, Deserialize)]
pub(super) struct Order {
    action: Action,
    #[serde(default)]
    jobs: Vec<Named>,
    /// All that a list of these would show, in the place of names.
    #[serde(rename = "match")]
    matching: Option<Wanted>,
}

/// What became of an order.
#[derive(Debug, Default, Serialize)]
pub(super) struct Done {
    changed: usize,
    /// Jobs that are gone, or in a state to which it does not apply.
    unchanged: usize,
    refused: usize,
    /// The first reasons.
    errors: Vec<String>,
    /// What to know about it.
    notes: Vec<String>,
}

/// Does what is ordered, one job at a time: a job that cannot be changed leaves the others alone.
pub(super) async fn act(watch: &Watch, mut order: Order) -> Result<Done, Refusal> {
    const AT_ONCE: usize = 200;
    let mut done = Done::default();
    if let Some(mut wanted) = order.matching.take() {
        wanted.all = true;
        let found = list(watch, &wanted).await?;
        if !found.is_complete {
            done.notes.push("there may be more that match".to_owned());
        }
        done.notes.extend(found.notes);
        let named = |Row { server, id, state, .. }| Named { server, id, state };
        order.jobs = found.rows.into_iter().map(named).collect();
    } else if order.jobs.len() > MOST_NAMED {
        return Err(Refusal::bad("too many jobs"));
    }
    for (index, jobs) in by_server(&order.jobs) {
        let server = watch.server(index)?;
        for jobs in jobs.chunks(AT_ONCE) {
            for reply in change(server, order.action, jobs).await? {
                match reply {
                    Ok(0) => done.unchanged += 1,
                    Ok(_) => done.changed += 1,
                    Err(error) => {
                        done.refused += 1;
                        let error = words(&error);
                        if done.errors.len() < 5 && !done.errors.contains(&error) {
                            done.errors.push(error);
                        }
                    }
                }
            }
        }
    }
    Ok(done)
}

async fn change(
    server: &Server,
    action: Action,
    jobs: &[(usize, &Named)],
) -> RedisResult<Vec<RedisResult<i64>>> {
    let name = match action {
        Action::Retry => "FLORENCE.RETRY",
        Action::Cancel => "FLORENCE.CANCEL",
        Action::Delete => return delete(server, jobs).await,
    };
    let commands: Vec<Cmd> = jobs.iter().map(|(_, job)| job.command(name)).collect();
    server.each(&commands).await
}

/// Whether a job is there, and if it had ended when it was listed, has not been asked again.
fn is_as_listed(job: &Named, map: &RedisResult<Value>) -> bool {
    let Ok(map) = map else { return false };
    let state = entries(map.clone()).into_iter().find(|(name, _)| name == "state");
    let had_ended = ENDED.contains(&job.state.as_str());
    state.is_some_and(|(_, state)| !had_ended || text(&state) == job.state)
}

/// Deletes jobs, and no other keys.
async fn delete(server: &Server, jobs: &[(usize, &Named)]) -> RedisResult<Vec<RedisResult<i64>>> {
    let commands: Vec<Cmd> = jobs.iter().map(|(_, job)| job.command("FLORENCE.GET")).collect();
    let maps = server.each::<Value>(&commands).await?;
    let are_meant: Vec<bool> =
        jobs.iter().zip(&maps).map(|((_, job), map)| is_as_listed(job, map)).collect();
    let meant = jobs.iter().zip(&are_meant).filter(|(_, is_meant)| **is_meant);
    let commands: Vec<Cmd> = meant.map(|((_, job), _)| job.command("UNLINK")).collect();
    let mut deleted = server.each::<i64>(&commands).await?.into_iter();
    let reply = |(map, is_meant): (RedisResult<Value>, bool)| match map {
        Ok(_) if is_meant => deleted.next().unwrap_or(Ok(0)),
        Ok(_) => Ok(0),
        Err(error) => Err(error),
    };
    Ok(maps.into_iter().zip(are_meant).map(reply).collect())
}
