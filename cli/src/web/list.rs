//! Which jobs there are: by state, or found.
//!
//! A list is in the server's own order, as `FLORENCE.JOBS` gives it: those at work, then in the order
//! of their turn, ended ones the newest first; a thousand at most. A search looks at all keys, and
//! says how many it has looked at if there were too many; nobody is to make one again by the clock.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use redis::{Cmd, RedisResult, Value, cmd};
use serde::{Deserialize, Serialize};

use super::routes::Refusal;
use crate::{
    draw,
    servers::{
        server::{Key, Server, entries, number, text, words},
        watch::Watch,
    },
};

const UNFINISHED: [&str; 4] = ["queued", "retrying", "fetching", "running"];
pub(super) const ENDED: [&str; 4] = ["done", "failed", "cancelled", "expired"];

/// Most jobs that `FLORENCE.JOBS` lists.
const LISTED: usize = 1000;
/// How far one search goes.
const MOST_KEYS: usize = 1_000_000;
const MOST_FOUND: usize = 20_000;
const SEARCH_FOR: Duration = Duration::from_secs(10);

/// What a list is to show.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Wanted {
    /// One server; all, if it is missing.
    pub(super) server: Option<usize>,
    /// States, separated by commas, or `all`; those of unfinished jobs, if there are none.
    state: String,
    /// What all keys that are listed begin with.
    prefix: String,
    /// What is looked for.
    q: String,
    field: Field,
    /// All keys are to be looked at, also where nothing is looked for.
    pub(super) all: bool,
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
    /// What keys have to begin with.
    fn start(&self) -> &str {
        if self.field == Field::Key { &self.q } else { &self.prefix }
    }

    fn states(&self) -> Result<Vec<&str>, Refusal> {
        let states: Vec<&str> = match self.state.as_str() {
            "" => return Ok(UNFINISHED.to_vec()),
            "all" => return Ok([UNFINISHED, ENDED].concat()),
            states => states.split(',').collect(),
        };
        match states.iter().find(|state| !UNFINISHED.contains(state) && !ENDED.contains(state)) {
            Some(_) => Err(Refusal::bad("no such state")),
            None => Ok(states),
        }
    }
}

/// A job in a list; the page asks for the details of those that it shows.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) server: usize,
    pub(super) id: Key,
    pub(super) state: String,
    /// When it was submitted, or has ended.
    at: f64,
}

/// The answer to a wish for a list.
#[derive(Debug, Default, Serialize)]
pub(super) struct List {
    pub(super) rows: Vec<Row>,
    /// Nothing was left out.
    pub(super) is_complete: bool,
    /// All keys had to be looked at.
    is_search: bool,
    /// How many were.
    looked_at: usize,
    /// What to know about it.
    pub(super) notes: Vec<String>,
}

/// The jobs that are wanted, of all servers that are meant.
pub(super) async fn list(watch: &Watch, wanted: &Wanted) -> Result<List, Refusal> {
    let states = wanted.states()?;
    let mut list = List { is_complete: true, ..List::default() };
    let is_search = wanted.all || !wanted.q.is_empty();
    let mut is_sorted = true;
    for index in watch.asked(wanted.server) {
        let Some(server) = watch.servers.get(index) else { continue };
        // Nothing is known of one that is away, or has not been asked yet.
        let tells_ended = watch
            .known(index)
            .and_then(|known| known.told.as_ref().map(|told| told.ends.is_some()));
        let may_be_older =
            tells_ended != Some(true) && states.iter().any(|state| ENDED.contains(state));
        if may_be_older && tells_ended.is_some() && !is_search {
            let text = "does not list ended jobs by itself (its module is older): \
                        all of its keys were looked at";
            list.notes.push(format!("{} {text}", server.name));
        }
        list.is_search |= is_search || (may_be_older && tells_ended.is_some());
        let found = if is_search || may_be_older {
            is_sorted = false;
            search(server, index, wanted, &states, &mut list).await
        } else {
            turns(server, index, wanted, &states, &mut list).await
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
async fn turns(
    server: &Server,
    index: usize,
    wanted: &Wanted,
    states: &[&str],
    list: &mut List,
) -> RedisResult<()> {
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
            let mut is_meant = wanted.prefix.is_empty();
            for (name, value) in entries(row) {
                match (name.as_str(), &value) {
                    ("id", Value::BulkString(key)) => {
                        found.id = Key::of(key);
                        is_meant = key.starts_with(wanted.prefix.as_bytes());
                    }
                    ("state", _) => found.state = text(&value),
                    ("finished_at", _) => found.at = number(&value),
                    _ => {}
                }
            }
            list.rows.extend(is_meant.then_some(found));
        }
    }
    Ok(())
}

/// The fields that a search looks at.
const LOOKED_AT: [&str; 9] = [
    "florence",
    "state",
    "prompt",
    "steps",
    "image",
    "error_code",
    "error",
    "submitted_at",
    "finished_at",
];

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
        if !wanted.start().is_empty() {
            scan.arg("MATCH").arg([glob(wanted.start()).as_slice(), b"*"].concat());
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
    let is_in = |text: &String| text.to_lowercase().contains(&sought);
    let has = |name| field(name).is_some_and(|text| is_in(&text));
    let asks = || {
        let prompts = field("prompt").map(|prompt| draw::prompts(&prompt)).unwrap_or_default();
        let steps = field("steps").map(|steps| prompts_of(&steps)).unwrap_or_default();
        prompts.iter().chain(&steps).any(is_in)
    };
    let is_at = || {
        let url = field("image").and_then(|image| url::Url::parse(&image).ok());
        url.is_some_and(|url| url.host_str().is_some_and(|host| host.contains(&sought)))
    };
    let is_key = || key.starts_with(wanted.q.as_bytes());
    let failed = || has("error") || has("error_code");
    let is_meant = match wanted.field {
        Field::Any => sought.is_empty() || is_key() || asks() || is_at() || failed(),
        Field::Key => is_key(),
        Field::Prompt => asks(),
        Field::Host => is_at(),
        Field::Error => failed(),
    };
    let time = |name| field(name).and_then(|time| time.parse().ok());
    let at = time("finished_at").or_else(|| time("submitted_at")).unwrap_or_default();
    is_meant.then(|| Row { server, id: Key::of(key), state, at })
}

/// The prompts of a chain's steps, `[{"then": prompt}, ..]`; none if they are written otherwise.
fn prompts_of(steps: &str) -> Vec<String> {
    let steps: Vec<BTreeMap<String, String>> = serde_json::from_str(steps).unwrap_or_default();
    steps.into_iter().flat_map(BTreeMap::into_values).collect()
}

/// A text as a pattern that matches it alone.
fn glob(text: &str) -> Vec<u8> {
    let is_special = |byte: u8| b"*?[]\\^-".contains(&byte);
    text.bytes()
        .flat_map(|byte| is_special(byte).then_some(b'\\').into_iter().chain([byte]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(state: &str) -> Fields {
        [
            "1",
            state,
            r#"["<OD>","a \"red\" square"]"#,
            r#"[{"each":"<OCR>"},{"crop":"the \"label\""}]"#,
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
            ("a \"RED\"", Field::Prompt),
            ("<ocr>", Field::Prompt),
            ("the \"label", Field::Prompt),
            ("example.com", Field::Host),
            ("answered 404", Field::Error),
            ("fetch", Field::Error),
        ] {
            assert!(is_found(q, field, &["failed"]), "{q}");
            assert!(is_found(q, Field::Any, &["failed"]), "{q}");
        }
        assert!(!is_found("ob:", Field::Key, &["failed"]));
        // Nor is it how they are written.
        assert!(!is_found("\\\"", Field::Any, &["failed"]));
        assert!(!is_found("crop", Field::Any, &["failed"]));
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
