//! Jobs as the page lists, shows and changes them.
//!
//! A list is in the server's own order, as `FLORENCE.JOBS` gives it: those at work, then in the order
//! of their turn, ended ones the newest first; a thousand at most. A search looks at all keys, and
//! says how many it has looked at if there were too many.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use redis::{Cmd, RedisResult, Value, cmd};
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::{
    routes::Refusal,
    server::{Key, Server, entries, number, text, words},
    watch::Watch,
};
use crate::draw::{self, Findings};

const UNFINISHED: [&str; 4] = ["queued", "retrying", "fetching", "running"];
const ENDED: [&str; 4] = ["done", "failed", "cancelled", "expired"];

/// Most jobs that `FLORENCE.JOBS` lists.
const LISTED: usize = 1000;
/// How far one search goes.
const MOST_KEYS: usize = 1_000_000;
const MOST_FOUND: usize = 20_000;
const SEARCH_FOR: Duration = Duration::from_secs(10);
/// Most jobs that one request names.
pub(super) const MOST_NAMED: usize = 1000;

/// What a list is to show.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Wanted {
    /// One server; all, if it is missing.
    pub(super) server: Option<usize>,
    /// States, separated by commas; those of unfinished jobs, if there are none.
    state: String,
    /// What is looked for.
    q: String,
    field: Field,
    /// All keys are to be looked at, also where nothing is looked for.
    all: bool,
}

/// Where it is looked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Field {
    #[default]
    Any,
    /// At the key's start.
    Key,
    Prompt,
    Host,
    Error,
}

impl Wanted {
    fn states(&self) -> Result<Vec<&str>, Refusal> {
        if self.state.is_empty() {
            return Ok(UNFINISHED.to_vec());
        }
        let states: Vec<&str> = self.state.split(',').collect();
        match states.iter().find(|state| !UNFINISHED.contains(state) && !ENDED.contains(state)) {
            Some(_) => Err(Refusal::bad("no such state")),
            None => Ok(states),
        }
    }
}

/// A job in a list; the page asks for the details of those that it shows.
#[derive(Debug, Serialize)]
struct Row {
    server: usize,
    id: Key,
    state: String,
    /// When it was submitted, or has ended.
    at: f64,
}

/// The answer to a wish for a list.
#[derive(Debug, Default, Serialize)]
pub(super) struct List {
    rows: Vec<Row>,
    /// Nothing was left out.
    is_complete: bool,
    /// Keys that a search has looked at.
    looked_at: usize,
    /// What to know about it.
    notes: Vec<String>,
}

/// The jobs that are wanted, of all servers that are meant.
pub(super) async fn list(watch: &Watch, wanted: &Wanted) -> Result<List, Refusal> {
    let states = wanted.states()?;
    let mut list = List { is_complete: true, ..List::default() };
    let is_search = wanted.all || !wanted.q.is_empty();
    let mut is_sorted = true;
    for index in watch.asked(wanted.server) {
        let Some(server) = watch.servers.get(index) else { continue };
        let tells_ended = watch
            .known(index)
            .and_then(|known| known.told.as_ref().map(|told| told.ends.is_some()))
            .unwrap_or_default();
        let is_older = !tells_ended && states.iter().any(|state| ENDED.contains(state));
        if is_older && !is_search {
            let text = "does not list ended jobs by itself (its module is older): \
                        all of its keys were looked at";
            list.notes.push(format!("{} {text}", server.name));
        }
        let found = if is_search || is_older {
            is_sorted = false;
            search(server, index, wanted, &states, &mut list).await
        } else {
            turns(server, index, &states, &mut list).await
        };
        if let Err(error) = found {
            list.notes.push(format!("{}: {}", server.name, words(&error)));
            list.is_complete = false;
        }
    }
    if !is_sorted {
        list.rows.sort_by(|a, b| b.at.total_cmp(&a.at));
    }
    Ok(list)
}

/// What `FLORENCE.JOBS` lists.
async fn turns(server: &Server, index: usize, states: &[&str], list: &mut List) -> RedisResult<()> {
    let command = |state: Option<&str>| {
        let mut command = cmd("FLORENCE.JOBS");
        command.arg("COUNT").arg(LISTED);
        if let Some(state) = state {
            command.arg("STATE").arg(state);
        }
        command
    };
    let commands: Vec<Cmd> = if states == UNFINISHED {
        vec![command(None)]
    } else {
        states.iter().map(|state| command(Some(state))).collect()
    };
    for reply in server.each::<Vec<Value>>(&commands).await? {
        let rows = reply?;
        list.is_complete &= rows.len() < LISTED;
        for row in rows {
            let mut found = Row { server: index, id: Key::of(b""), state: String::new(), at: 0.0 };
            for (name, value) in entries(row) {
                match (name.as_str(), &value) {
                    ("id", Value::BulkString(key)) => found.id = Key::of(key),
                    ("state", _) => found.state = text(&value),
                    ("finished_at", _) => found.at = number(&value),
                    _ => {}
                }
            }
            list.rows.push(found);
        }
    }
    Ok(())
}

/// The fields that a search looks at.
const LOOKED_AT: [&str; 8] =
    ["florence", "state", "prompt", "image", "error_code", "error", "submitted_at", "finished_at"];

type Fields = Vec<Option<Vec<u8>>>;

/// Looks at every job of a database.
async fn search(
    server: &Server,
    index: usize,
    wanted: &Wanted,
    states: &[&str],
    list: &mut List,
) -> RedisResult<()> {
    let (start, mut cursor, mut seen) = (Instant::now(), 0_u64, HashSet::new());
    let before = list.rows.len();
    loop {
        let mut scan = cmd("SCAN");
        scan.arg(cursor).arg("COUNT").arg(1000).arg("TYPE").arg("hash");
        if wanted.field == Field::Key {
            scan.arg("MATCH").arg([glob(&wanted.q).as_slice(), b"*"].concat());
        }
        let (next, keys): (u64, Vec<Vec<u8>>) = server.call(&scan).await?;
        let keys: Vec<Vec<u8>> = keys.into_iter().filter(|key| seen.insert(key.clone())).collect();
        list.looked_at += keys.len();
        let commands: Vec<Cmd> = keys
            .iter()
            .map(|key| {
                let mut command = cmd("HMGET");
                command.arg(key).arg(&LOOKED_AT);
                command
            })
            .collect();
        let replies = server.each::<Fields>(&commands).await?;
        for (key, fields) in keys.iter().zip(replies) {
            // A key may be of another type by now, or not for this user.
            let Ok(fields) = fields else { continue };
            list.rows.extend(matching(index, key, &fields, wanted, states));
        }
        cursor = next;
        let is_too_much = list.looked_at > MOST_KEYS
            || list.rows.len() - before > MOST_FOUND
            || start.elapsed() > SEARCH_FOR;
        if cursor == 0 {
            return Ok(());
        }
        if is_too_much {
            let text = format!("{}: only {} keys were looked at", server.name, seen.len());
            list.notes.push(text);
            list.is_complete = false;
            return Ok(());
        }
    }
}

/// The row of a job, if it is one that is wanted.
fn matching(
    server: usize,
    key: &[u8],
    fields: &Fields,
    wanted: &Wanted,
    states: &[&str],
) -> Option<Row> {
    let field = |name: &str| {
        let i = LOOKED_AT.iter().position(|field| *field == name)?;
        Some(String::from_utf8_lossy(fields.get(i)?.as_ref()?).into_owned())
    };
    let state = field("state").filter(|state| states.contains(&state.as_str()))?;
    field("florence").filter(|version| version == "1")?;
    let sought = wanted.q.to_lowercase();
    let has = |name| field(name).is_some_and(|text| text.to_lowercase().contains(&sought));
    let is_at = || {
        let url = field("image").and_then(|image| url::Url::parse(&image).ok());
        url.is_some_and(|url| url.host_str().is_some_and(|host| host.contains(&sought)))
    };
    let is_key = || key.starts_with(wanted.q.as_bytes());
    let failed = || has("error") || has("error_code");
    let is_meant = match wanted.field {
        Field::Any => sought.is_empty() || is_key() || has("prompt") || is_at() || failed(),
        Field::Key => is_key(),
        Field::Prompt => has("prompt"),
        Field::Host => is_at(),
        Field::Error => failed(),
    };
    let time = |name| field(name).and_then(|time| time.parse().ok());
    let at = time("finished_at").or_else(|| time("submitted_at")).unwrap_or_default();
    is_meant.then(|| Row { server, id: Key::of(key), state, at })
}

/// A text as a pattern that matches it alone.
fn glob(text: &str) -> Vec<u8> {
    let is_special = |byte: u8| b"*?[]\\^-".contains(&byte);
    text.bytes()
        .flat_map(|byte| is_special(byte).then_some(b'\\').into_iter().chain([byte]))
        .collect()
}

/// A job that is meant.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Named {
    pub(super) server: usize,
    pub(super) id: Key,
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

/// What a list shows of jobs; null where there is none any more.
pub(super) async fn rows(watch: &Watch, jobs: &[Named]) -> Result<Vec<serde_json::Value>, Refusal> {
    let mut rows = vec![serde_json::Value::Null; jobs.len()];
    for (server, jobs) in by_server(jobs) {
        let server = watch.server(server)?;
        let commands: Vec<Cmd> = jobs.iter().map(|(_, job)| job.command("FLORENCE.GET")).collect();
        for ((place, _), reply) in jobs.iter().zip(server.each::<Value>(&commands).await?) {
            let (Ok(reply), Some(row)) = (reply, rows.get_mut(*place)) else { continue };
            *row = shown(reply, |name| matches!(name, "result" | "text" | "scores" | "id"));
        }
    }
    Ok(rows)
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
            (_, "result" | "error" | "scores") => {
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
const OPTIONS: [&str; 12] = [
    "priority",
    "delay",
    "expires",
    "timeout",
    "retries",
    "ttl",
    "beams",
    "maxtokens",
    "wants",
    "exif",
    "nocache",
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
    Ok(json!({
        "options": options,
        "ttl_ms": (ttl > 0.0).then_some(ttl),
        "has_thumbnail": thumbnail > 0.0,
        "has_data": data > 0.0,
        "marks": marks(&map),
        "job": map,
    }))
}

/// What a job's answer, and its question, locate.
pub(super) fn marks(job: &serde_json::Value) -> Findings {
    let mut marks = Findings::read(&job["result"], &job["scores"]);
    let size = (&job["width"], &job["height"]);
    if let (Some(width), Some(height)) = (size.0.as_f64(), size.1.as_f64()) {
        let prompts = draw::prompts(job["prompt"].as_str().unwrap_or_default());
        marks.ask(&prompts, (width, height));
    }
    marks
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
}

/// Does what is ordered, one job at a time: a job that cannot be changed leaves the others alone.
pub(super) async fn act(watch: &Watch, mut order: Order) -> Result<Done, Refusal> {
    const AT_ONCE: usize = 200;
    if let Some(wanted) = order.matching.take() {
        let found = list(watch, &Wanted { all: true, ..wanted }).await?;
        order.jobs =
            found.rows.into_iter().map(|row| Named { server: row.server, id: row.id }).collect();
    } else if order.jobs.len() > MOST_NAMED {
        return Err(Refusal::bad("too many jobs"));
    }
    let mut done = Done::default();
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

/// Deletes jobs, and no other keys.
async fn delete(server: &Server, jobs: &[(usize, &Named)]) -> RedisResult<Vec<RedisResult<i64>>> {
    let commands: Vec<Cmd> = jobs.iter().map(|(_, job)| job.command("FLORENCE.GET")).collect();
    let are_jobs = server.each::<Value>(&commands).await?;
    let mut replies = Vec::new();
    for ((_, job), is_job) in jobs.iter().zip(are_jobs) {
        replies.push(match is_job {
            Ok(Value::Nil) => Ok(0),
            Ok(_) => server.call(&job.command("UNLINK")).await,
            Err(error) => Err(error),
        });
    }
    Ok(replies)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(state: &str) -> Fields {
        [
            "1",
            state,
            "<OD>",
            "https://user:pw@Img.Example.com/a.png?sig=x",
            "FETCH",
            "the server answered 404",
            "5",
            "9",
        ]
        .map(|text| Some(text.as_bytes().to_vec()))
        .into()
    }

    fn is_found(q: &str, field: Field, states: &[&str]) -> bool {
        let wanted = Wanted { q: q.to_owned(), field, ..Wanted::default() };
        matching(0, b"job:1", &fields("failed"), &wanted, states).is_some()
    }

    #[test]
    fn a_search_looks_where_it_is_told_to() {
        assert!(is_found("", Field::Any, &["failed"]));
        assert!(!is_found("", Field::Any, &["done"]));
        for (q, field) in [
            ("job:", Field::Key),
            ("<od", Field::Prompt),
            ("example.com", Field::Host),
            ("answered 404", Field::Error),
            ("fetch", Field::Error),
        ] {
            assert!(is_found(q, field, &["failed"]), "{q}");
            assert!(is_found(q, Field::Any, &["failed"]), "{q}");
        }
        assert!(!is_found("ob:", Field::Key, &["failed"]));
        // Nobody finds out a signature by guessing at it.
        assert!(!is_found("sig=x", Field::Any, &["failed"]));
        assert!(!is_found("user", Field::Any, &["failed"]));
    }

    #[test]
    fn other_hashes_are_not_found() {
        let mut other = fields("failed");
        other[0] = None;
        assert!(matching(0, b"job", &other, &Wanted::default(), &["failed"]).is_none());
    }

    #[test]
    fn a_prefix_matches_itself_alone() {
        assert_eq!(glob("a*[b]?\\"), b"a\\*\\[b\\]\\?\\\\");
        assert_eq!(glob("job:1"), b"job:1");
    }
}
