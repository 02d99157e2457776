//! Messages of Celery's protocol 2 in kombu's envelopes, as they are read. Pure.
//!
//! A message is a JSON object `{body, content-type, content-encoding, headers, properties}`; the
//! body, in base64, is `[args, kwargs, embed]`. Source: the protocol's page in Celery's manual. What
//! a worker takes is taken, whatever the form; what it refuses gets the worker's error.

use std::borrow::Cow;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{json, result::Exception, time};
use crate::job::limits;

/// A signature: a task that somebody wants to be sent later.
pub(crate) type Signature = Map<String, Value>;

/// Whether a signature is one plain task: Celery builds groups, chords and the like of others.
pub(crate) fn is_plain(signature: &Signature) -> bool {
    let text = |name: &str| signature.get(name).and_then(Value::as_str);
    text("task").is_some_and(|task| !task.starts_with("celery."))
}

/// What a message says of its task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Headers {
    pub(crate) id: String,
    /// The id as it came, if that was no text: its client expects a UUID again.
    pub(crate) odd_id: Option<Value>,
    pub(crate) task: String,
    /// Times are ISO 8601.
    pub(crate) eta: Option<String>,
    pub(crate) expires: Option<String>,
    /// A number, most often.
    pub(crate) retries: Value,
    /// Hard and soft, in seconds.
    pub(crate) timelimit: Option<[Option<f64>; 2]>,
    pub(crate) ignore_result: Option<bool>,
    pub(crate) group: Option<String>,
    pub(crate) group_index: Option<f64>,
    pub(crate) root_id: Option<String>,
    pub(crate) parent_id: Option<String>,
    pub(crate) argsrepr: Option<String>,
    pub(crate) kwargsrepr: Option<String>,
}

impl Headers {
    /// Reads the headers of a message; the error is the one that its task ends with.
    fn read(
        id: String,
        task: String,
        headers: &Map<String, Value>,
    ) -> (Self, Result<(), Exception>) {
        let field = |name: &str| headers.get(name).unwrap_or(&Value::Null);
        let [eta, expires] = ["eta", "expires"].map(|name| time(name, field(name)));
        let limits = limits(field("timelimit"));
        let problem = [eta.as_ref().err(), expires.as_ref().err(), limits.as_ref().err()];
        let problem = problem.into_iter().flatten().next().cloned();
        let headers = Self {
            id,
            odd_id: headers.get("id").filter(|id| !id.is_string()).cloned(),
            task,
            eta: eta.unwrap_or_default(),
            expires: expires.unwrap_or_default(),
            retries: field("retries").clone(),
            timelimit: limits.unwrap_or_default(),
            ignore_result: Some(is_true(field("ignore_result"))),
            group: text(field("group")),
            group_index: field("group_index").as_f64(),
            root_id: text(field("root_id")),
            parent_id: text(field("parent_id")),
            argsrepr: text(field("argsrepr")),
            kwargsrepr: text(field("kwargsrepr")),
        };
        (headers, problem.map_or(Ok(()), Err))
    }

    /// The shorter time limit, in milliseconds.
    pub(crate) fn timelimit(&self) -> Option<i64> {
        let limits = self.timelimit.iter().flatten().flatten();
        #[expect(clippy::cast_possible_truncation, reason = "saturates")]
        let limits = limits.map(|seconds| (seconds * 1000.0) as i64);
        limits.filter(|limit| *limit > 0).min()
    }
}

/// What a worker says of a message that it cannot read.
fn invalid(text: impl Into<String>) -> Exception {
    Exception::new("celery.exceptions", "InvalidTaskError", text)
}

/// Whether Python takes a value for true.
pub(super) fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A text, or what kombu writes where Python has a UUID or a time.
pub(crate) fn text(value: &Value) -> Option<String> {
    if let Value::String(text) = value {
        return Some(text.clone());
    }
    let inner = value.get("__value__")?;
    match value.get("__type__")?.as_str()? {
        "uuid" => {
            let id = uuid::Uuid::try_parse(inner.get("hex")?.as_str()?).ok()?;
            Some(id.to_string())
        }
        "datetime" => inner.as_str().map(str::to_owned),
        _ => None,
    }
}

/// A priority, as kombu takes one.
#[expect(clippy::cast_possible_truncation, reason = "it is a digit")]
pub(super) fn priority(value: &Value) -> Option<i64> {
    let number = match value {
        Value::String(text) => text.trim().parse().ok(),
        number => number.as_f64(),
    };
    number.map(|number: f64| number.clamp(0.0, 9.0) as i64)
}

/// A time of the headers, with its offset.
fn time(name: &str, value: &Value) -> Result<Option<String>, Exception> {
    if value.is_null() {
        return Ok(None);
    }
    let time = text(value).as_deref().and_then(time::normal);
    let name = if name == "eta" { "ETA" } else { name };
    let invalid = || invalid(format!("invalid {name} value {}", json::write(value)));
    time.map(Some).ok_or_else(invalid)
}

/// The hard and the soft time limit.
fn limits(value: &Value) -> Result<Option<[Option<f64>; 2]>, Exception> {
    if !is_true(value) {
        return Ok(None);
    }
    let limit = |limit: &Value| limit.is_null() || limit.is_number();
    match value.as_array().map(Vec::as_slice) {
        Some([hard, soft]) if limit(hard) && limit(soft) => {
            Ok(Some([hard.as_f64(), soft.as_f64()]))
        }
        _ => Err(invalid(format!("invalid timelimit value {}", json::write(value)))),
    }
}

/// What follows a task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Embed {
    /// Each gets the result.
    pub(crate) callbacks: Option<Vec<Signature>>,
    /// Each gets the id of the task that failed.
    pub(crate) errbacks: Option<Vec<Signature>>,
    /// The last one is next, and takes the others along.
    pub(crate) chain: Option<Vec<Signature>>,
    /// Gets the results of the task's whole group.
    pub(crate) chord: Option<Signature>,
}

impl Embed {
    fn read(value: Value) -> Result<Self, Exception> {
        if !is_true(&value) {
            return Ok(Self::default());
        }
        let Value::Object(mut fields) = value else {
            return Err(invalid("what follows the task is not a mapping"));
        };
        // What is false follows nothing, as null does.
        fields.retain(|_, value| is_true(value));
        // What the error says may quote arguments.
        serde_json::from_value(Value::Object(fields))
            .map_err(|_quoting| invalid("what follows the task is malformed"))
    }
}

/// A message that names a task and its id; what else it says is still packed.
#[derive(Debug)]
pub(crate) struct Message {
    id: String,
    task: String,
    envelope: Map<String, Value>,
}

/// What a task is called with.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) args: Vec<Value>,
    pub(crate) kwargs: Map<String, Value>,
}

/// Bytes of an id: with what is before it, it is a key.
const ID_BYTES: usize = limits::KEY_BYTES / 2;

impl Message {
    /// Reads an envelope; the error says why it is no task of protocol 2.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let envelope: Value = json::read(&String::from_utf8_lossy(bytes))
            .map_err(|error| format!("it is no JSON: {error}"))?;
        // What else it is nobody is told: it may be a secret.
        let Value::Object(envelope) = envelope else {
            return Err("it is no JSON object".to_owned());
        };
        let header = |name: &str| text(envelope.get("headers")?.get(name)?);
        let text = |name: &str| header(name).filter(|text| !text.is_empty());
        let task = text("task").ok_or("its headers name no task")?;
        let id = text("id").ok_or("its headers have no id")?;
        if id.len() > ID_BYTES {
            return Err(format!("its id has more than {ID_BYTES} bytes"));
        }
        Ok(Self { id, task, envelope })
    }

    pub(crate) fn task(&self) -> &str {
        &self.task
    }

    fn property(&self, name: &str) -> Option<&Value> {
        self.envelope.get("properties")?.get(name)
    }

    /// 0 is the most urgent, as kombu has it on Redis.
    pub(crate) fn priority(&self) -> i64 {
        self.property("priority").and_then(priority).unwrap_or_default()
    }

    /// Unpacks headers and body; with the error that the task ends with, if that cannot be done.
    pub(crate) fn unpack(mut self) -> (Headers, Embed, Result<Call, Exception>) {
        let body = self.body();
        let headers = match self.envelope.get_mut("headers").map(Value::take) {
            Some(Value::Object(headers)) => headers,
            _ => Map::new(),
        };
        let (headers, read) = Headers::read(self.id, self.task, &headers);
        let [args, kwargs, embed] = match body {
            Ok(parts) => parts,
            Err(problem) => return (headers, Embed::default(), Err(problem)),
        };
        match Embed::read(embed) {
            Ok(embed) => (headers, embed, read.and_then(|()| Call::read(args, kwargs))),
            Err(problem) => (headers, Embed::default(), Err(problem)),
        }
    }

    /// The three parts of the body; nothing but plain JSON is unpacked.
    fn body(&self) -> Result<[Value; 3], Exception> {
        let disallowed = |text| Exception::new("kombu.exceptions", "ContentDisallowed", text);
        let undecodable = |error: String| {
            let text = format!("the body is malformed: {error}");
            Exception::new("kombu.exceptions", "DecodeError", text)
        };
        let field =
            |name: &str| self.envelope.get(name).and_then(Value::as_str).unwrap_or_default();
        let content_type = field("content-type");
        if content_type != "application/json" {
            return Err(disallowed(format!("the content type is '{content_type}', not JSON")));
        }
        let compression =
            self.envelope.get("headers").and_then(|headers| headers.get("compression"));
        if let Some(compression) = compression.filter(|compression| is_true(compression)) {
            let name = text(compression).unwrap_or_else(|| compression.to_string());
            return Err(disallowed(format!("the body is compressed with {name}")));
        }
        let json = match self.property("body_encoding").and_then(Value::as_str) {
            Some("base64") => BASE64_STANDARD
                .decode(field("body"))
                .map_err(|error| undecodable(error.to_string()))?
                .into(),
            _ => Cow::Borrowed(field("body").as_bytes()),
        };
        let json = std::str::from_utf8(&json).map_err(|error| undecodable(error.to_string()))?;
        let body: Value = json::read(json).map_err(|error| undecodable(error.to_string()))?;
        let parts = match body {
            Value::Array(parts) => parts.try_into().ok(),
            _ => None,
        };
        parts.ok_or_else(|| invalid("the body is not [args, kwargs, embed]"))
    }
}

impl Call {
    fn read(args: Value, kwargs: Value) -> Result<Self, Exception> {
        let Value::Object(kwargs) = kwargs else {
            return Err(invalid("Task keyword arguments is not a mapping"));
        };
        let Value::Array(args) = args else {
            return Err(Exception::new("builtins", "TypeError", "the arguments are not a list"));
        };
        Ok(Self { args, kwargs })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As celery 5.7.0 sends it.
    const CAPTURED: &str = r#"{"body": "W1siaHR0cDovL2gvYS5qcGciXSwgeyJ0YXNrX3Byb21wdCI6ICI8T0Q+In0sIHsiY2FsbGJhY2tzIjogbnVsbCwgImVycmJhY2tzIjogbnVsbCwgImNoYWluIjogbnVsbCwgImNob3JkIjogbnVsbH1d", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", "task": "tasks.inference_task", "id": "4f1e", "shadow": null, "eta": null, "expires": "2026-11-26T01:00:00.250000+00:00", "group": null, "group_index": null, "retries": 0, "timelimit": [null, 2.5], "root_id": "4f1e", "parent_id": null, "argsrepr": "('http://h/a.jpg',)", "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "4f1e", "reply_to": "x", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "celery"}, "priority": 6, "body_encoding": "base64", "delivery_tag": "t"}}"#;

    fn captured(from: &str, to: &str) -> Message {
        Message::parse(CAPTURED.replace(from, to).as_bytes()).unwrap()
    }

    /// The error that a changed message's task ends with.
    fn problem(from: &str, to: &str) -> String {
        let (_, _, call) = captured(from, to).unpack();
        call.unwrap_err().repr()
    }

    #[test]
    fn a_captured_message_is_read() {
        let message = captured("", "");
        assert_eq!((message.task(), message.priority()), ("tasks.inference_task", 6));
        let (headers, embed, call) = message.unpack();
        assert_eq!(headers.timelimit(), Some(2500));
        assert_eq!(headers.expires.as_deref().and_then(time::unix_ms), Some(1_795_654_800_250));
        let Call { args, kwargs } = call.unwrap();
        assert_eq!((&args[0], &kwargs["task_prompt"]), (&json!("http://h/a.jpg"), &json!("<OD>")));
        assert!(embed.chain.is_none());
    }

    #[test]
    fn other_contents_are_refused_and_never_unpacked() {
        let error = problem("application/json", "application/x-python-serialize");
        assert!(error.starts_with("ContentDisallowed(") && error.contains("x-python"), "{error}");
        let error = problem("\"shadow\"", "\"compression\": \"zlib\", \"shadow\"");
        assert!(error.starts_with("ContentDisallowed(") && error.contains("zlib"), "{error}");
    }

    #[test]
    fn what_is_no_task_of_protocol_2_says_why() {
        let long = json!({"headers": {"task": "t", "id": "x".repeat(ID_BYTES + 1)}}).to_string();
        for (bytes, why) in [
            (&b"hello"[..], "it is no JSON: "),
            (b"\"http://h/?token=x\"", "it is no JSON object"),
            (b"[1]", "it is no JSON object"),
            (b"{\"headers\": {}}", "name no task"),
            (b"{\"headers\": null, \"properties\": {}}", "name no task"),
            (b"{\"headers\": {\"task\": 7, \"id\": \"x\"}}", "name no task"),
            (b"{\"headers\": {\"task\": \"t\", \"id\": \"\"}}", "no id"),
            (b"{\"headers\": {\"task\": \"t\", \"id\": 5}}", "no id"),
            (long.as_bytes(), "4096 bytes"),
        ] {
            let problem = Message::parse(bytes).unwrap_err();
            assert!(problem.contains(why) && !problem.contains("token"), "{problem}");
        }
    }

    #[test]
    fn headers_are_read_in_every_form_that_a_worker_takes() {
        let long = "x".repeat(300);
        let id = r#""id": {"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000005"}}"#;
        for (from, to) in [
            ("\"retries\": 0", "\"retries\": 0.0"),
            ("\"retries\": 0", "\"retries\": null"),
            ("\"retries\": 0", "\"retries\": \"3\""),
            ("\"group_index\": null", "\"group_index\": 1.0"),
            ("\"ignore_result\": false", "\"ignore_result\": 0"),
            ("\"ignore_result\": false", "\"ignore_result\": null"),
            ("[null, 2.5]", "null"),
            ("[null, 2.5]", "[]"),
            ("[null, 2.5]", "[2, null]"),
            ("\"id\": \"4f1e\"", &format!("\"id\": \"{long}\"")),
            ("\"id\": \"4f1e\"", id),
            ("\"shadow\": null", "\"shadow\": \"\\udc80\""),
            ("('http://h/a.jpg',)", "('/a\\udc80.jpg',)"),
            ("\"priority\": 6", "\"priority\": 6.0"),
            ("\"priority\": 6", "\"priority\": \"6\""),
            ("\"parent_id\": null", "\"parent_id\": 5"),
            ("\"stamps\": {}", "\"stamps\": NaN"),
            ("\"stamps\": {}", "\"stamps\": {}, \"stamps\": {}"),
        ] {
            let message = captured(from, to);
            assert_eq!(message.priority(), 6, "{to}");
            let (_, _, call) = message.unpack();
            assert!(call.is_ok(), "{to}: {call:?}");
        }
        let bytes = [&CAPTURED.as_bytes()[..1], b"\"x\": \"\xff\", ", &CAPTURED.as_bytes()[1..]];
        assert!(Message::parse(&bytes.concat()).is_ok(), "bytes that are no text are replaced");
    }

    #[test]
    fn headers_that_a_worker_refuses_get_its_error() {
        for (from, to, error) in [
            ("\"eta\": null", "\"eta\": \"soon\"", "InvalidTaskError(\"invalid ETA value"),
            ("\"eta\": null", "\"eta\": 5", "InvalidTaskError(\"invalid ETA value 5"),
            ("\"2026-11-26T01:00:00.250000+00:00\"", "\"\"", "invalid expires value"),
            ("[null, 2.5]", "[1]", "invalid timelimit value [1]"),
            ("[null, 2.5]", "[\"1\", null]", "invalid timelimit value"),
        ] {
            let found = problem(from, to);
            assert!(found.contains(error), "{to}: {found}");
        }
    }

    /// What becomes of a body.
    fn unpacked(body: &str) -> (Embed, Result<Call, Exception>) {
        let (start, rest) = CAPTURED.split_once("\"body\": \"").unwrap();
        let (_, rest) = rest.split_once('"').unwrap();
        let body = BASE64_STANDARD.encode(body);
        let message = format!("{start}\"body\": \"{body}\"{rest}");
        let (_, embed, call) = Message::parse(message.as_bytes()).unwrap().unpack();
        (embed, call)
    }

    #[test]
    fn what_is_false_follows_nothing() {
        for embed in ["null", "{}", "[]", "0", "{\"callbacks\": [], \"chord\": 0, \"x\": 1}"] {
            let (embed, call) = unpacked(&format!("[[\"a\"], {{}}, {embed}]"));
            assert!(call.is_ok() && embed.callbacks.is_none() && embed.chord.is_none());
        }
    }

    #[test]
    fn bodies_that_a_worker_refuses_get_its_error() {
        for (body, error) in [
            ("[1", "DecodeError"),
            ("", "DecodeError"),
            ("{}", "InvalidTaskError"),
            ("[[], {}]", "InvalidTaskError"),
            ("[[], {}, null, null]", "InvalidTaskError"),
            ("[[], null, null]", "InvalidTaskError(\"Task keyword arguments is not a mapping"),
            ("[null, {}, null]", "TypeError"),
            ("[[], {}, 1]", "InvalidTaskError"),
            ("[[], {}, {\"callbacks\": [1]}]", "InvalidTaskError"),
        ] {
            let found = unpacked(body).1.unwrap_err().repr();
            assert!(found.starts_with(error), "{body}: {found}");
        }
        // What is to follow is known by then.
        let (embed, call) = unpacked("[null, {}, {\"errbacks\": [{\"task\": \"a\"}]}]");
        assert!(call.is_err() && embed.errbacks.is_some());
    }
}
