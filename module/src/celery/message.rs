//! Messages of Celery's protocol 2 in kombu's envelopes, read and written. Pure.
//!
//! A message is a JSON object `{body, content-type, content-encoding, headers, properties}`; the
//! body, in base64, is `[args, kwargs, embed]`. Source: the protocol's page in Celery's manual.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A signature: a task that somebody wants to be sent later.
pub(crate) type Signature = Map<String, Value>;

/// What a message says of its task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Headers {
    pub(crate) id: String,
    pub(crate) task: String,
    /// Times are ISO 8601.
    pub(crate) eta: Option<String>,
    pub(crate) expires: Option<String>,
    pub(crate) retries: Option<i64>,
    /// Hard and soft, in seconds.
    pub(crate) timelimit: Option<Vec<Option<f64>>>,
    pub(crate) ignore_result: Option<bool>,
    pub(crate) group: Option<String>,
    pub(crate) group_index: Option<i64>,
    pub(crate) root_id: Option<String>,
    pub(crate) parent_id: Option<String>,
    pub(crate) argsrepr: Option<String>,
    pub(crate) kwargsrepr: Option<String>,
    #[serde(skip_serializing)]
    pub(crate) compression: Option<String>,
}

impl Headers {
    /// The shorter time limit, in milliseconds.
    pub(crate) fn timelimit(&self) -> Option<i64> {
        let limits = self.timelimit.iter().flatten().flatten();
        #[expect(clippy::cast_possible_truncation, reason = "saturates")]
        let limits = limits.map(|seconds| (seconds * 1000.0) as i64);
        limits.filter(|limit| *limit > 0).min()
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

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Properties {
    priority: Option<i64>,
    body_encoding: Option<String>,
}

/// A message, its body still packed.
#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    body: String,
    #[serde(rename = "content-type", default)]
    content_type: String,
    pub(crate) headers: Headers,
    #[serde(default)]
    properties: Properties,
}

/// A message's body.
#[derive(Debug, Deserialize)]
pub(crate) struct Body(pub(crate) Vec<Value>, pub(crate) Map<String, Value>, pub(crate) Embed);

impl Message {
    /// Reads an envelope; `None` for what is no task of protocol 2.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let message: Self = serde_json::from_slice(bytes).ok()?;
        let Headers { id, task, .. } = &message.headers;
        let is_task = !id.is_empty() && id.len() <= 255 && !task.is_empty();
        is_task.then_some(message)
    }

    /// 0 is the most urgent, as kombu has it on Redis.
    pub(crate) fn priority(&self) -> i64 {
        self.properties.priority.unwrap_or_default().clamp(0, 9)
    }

    /// Unpacks the body; nothing but plain JSON is.
    pub(crate) fn body(&self) -> Result<Body, String> {
        if self.content_type != "application/json" {
            return Err(format!("the content type is '{}', not JSON", self.content_type));
        }
        if let Some(compression) = &self.headers.compression {
            return Err(format!("the body is compressed with {compression}"));
        }
        let json = match self.properties.body_encoding.as_deref() {
            Some("base64") => {
                BASE64_STANDARD.decode(&self.body).map_err(|error| error.to_string())?
            }
            _ => self.body.clone().into_bytes(),
        };
        serde_json::from_slice(&json).map_err(|error| format!("the body is malformed: {error}"))
    }
}

/// An envelope around a body, for queues (`exchange` empty), events and replies.
pub(crate) fn envelope(headers: &Value, exchange: &str, routing_key: &str, body: &Value) -> Value {
    json!({
        "body": BASE64_STANDARD.encode(body.to_string()),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": headers["id"],
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": { "exchange": exchange, "routing_key": routing_key },
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": new_id(),
        },
    })
}

/// A message for a queue.
pub(crate) struct Outgoing {
    pub(crate) queue: String,
    pub(crate) priority: i64,
    pub(crate) json: String,
}

/// Who a signature is sent by: its messages show it, and share its queue unless they name one.
pub(crate) struct Sender<'a> {
    pub(crate) headers: &'a Headers,
    pub(crate) queue: &'a str,
    pub(crate) priority: i64,
}

impl Sender<'_> {
    /// The message that a signature makes, its first argument `first` unless it is immutable.
    pub(crate) fn message(
        &self,
        signature: &Signature,
        first: &Value,
        chain: &[Signature],
    ) -> Outgoing {
        let option = |name: &str| signature.get("options").and_then(|options| options.get(name));
        let text = |name: &str| option(name).and_then(Value::as_str);
        let seconds = |name: &str| option(name).and_then(Value::as_f64);
        let field = |name: &str| signature.get(name).cloned();
        let mut args: Vec<Value> = match signature.get("args") {
            Some(Value::Array(args)) => args.clone(),
            _ => Vec::new(),
        };
        if signature.get("immutable") != Some(&Value::Bool(true)) {
            args.insert(0, first.clone());
        }
        let kwargs = field("kwargs").filter(Value::is_object).unwrap_or_else(|| json!({}));
        let id = text("task_id").map_or_else(new_id, str::to_owned);
        let sender = self.headers;
        let headers = json!({
            "lang": "py",
            "task": field("task"),
            "id": id,
            "shadow": option("shadow"),
            "eta": seconds("countdown").map(in_seconds).or_else(|| text("eta").map(str::to_owned)),
            "expires": seconds("expires").map(in_seconds)
                .or_else(|| text("expires").map(str::to_owned)),
            "group": option("group_id"),
            "group_index": option("group_index"),
            "retries": 0,
            "timelimit": [option("time_limit"), option("soft_time_limit")],
            "root_id": sender.root_id.as_ref().unwrap_or(&sender.id),
            "parent_id": sender.id,
            "argsrepr": Value::from(args.clone()).to_string(),
            "kwargsrepr": kwargs.to_string(),
            "origin": "florence",
            "ignore_result": option("ignore_result").and_then(Value::as_bool).unwrap_or_default(),
            "replaced_task_nesting": 0,
            "stamped_headers": null,
            "stamps": {},
        });
        let list = |name: &str| match option(name) {
            Some(Value::Array(list)) => Some(Value::from(list.clone())),
            Some(Value::Object(one)) => Some(json!([one])),
            _ => None,
        };
        let chain = if chain.is_empty() { list("chain") } else { Some(json!(chain)) };
        let embed = json!({
            "callbacks": list("link"),
            "errbacks": list("link_error"),
            "chain": chain,
            "chord": option("chord"),
        });
        let queue = text("queue").or(text("routing_key")).unwrap_or(self.queue);
        let priority = option("priority").and_then(Value::as_i64).unwrap_or(self.priority);
        let mut message = envelope(&headers, "", queue, &json!([args, kwargs, embed]));
        message["properties"]["priority"] = priority.into();
        Outgoing { queue: queue.to_owned(), priority, json: message.to_string() }
    }
}

/// Whether a signature is one plain task: Celery builds groups, chords and the like of others.
pub(crate) fn is_plain(signature: &Signature) -> bool {
    let text = |name: &str| signature.get(name).and_then(Value::as_str);
    text("task").is_some_and(|task| !task.starts_with("celery."))
}

/// A time as milliseconds since 1970.
pub(crate) fn unix_ms(iso: &str) -> Option<i64> {
    iso.parse::<Timestamp>().ok().map(Timestamp::as_millisecond)
}

/// Now, as Python's `isoformat` writes it.
pub(crate) fn now() -> String {
    in_seconds(0.0)
}

fn in_seconds(seconds: f64) -> String {
    let delay = jiff::SignedDuration::try_from_secs_f64(seconds).unwrap_or_default();
    let time = Timestamp::now().checked_add(delay).unwrap_or(Timestamp::MAX);
    time.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00").to_string()
}

/// A new random id, as Celery's are.
pub(crate) fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As celery 5.7.0 sends it.
    const CAPTURED: &str = r#"{"body": "W1siaHR0cDovL2gvYS5qcGciXSwgeyJ0YXNrX3Byb21wdCI6ICI8T0Q+In0sIHsiY2FsbGJhY2tzIjogbnVsbCwgImVycmJhY2tzIjogbnVsbCwgImNoYWluIjogbnVsbCwgImNob3JkIjogbnVsbH1d", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", "task": "tasks.inference_task", "id": "4f1e", "shadow": null, "eta": null, "expires": "2026-11-26T01:00:00.250000+00:00", "group": null, "group_index": null, "retries": 0, "timelimit": [null, 2.5], "root_id": "4f1e", "parent_id": null, "argsrepr": "('http://h/a.jpg',)", "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}}, "properties": {"correlation_id": "4f1e", "reply_to": "x", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "celery"}, "priority": 6, "body_encoding": "base64", "delivery_tag": "t"}}"#;

    #[test]
    fn a_captured_message_is_read() {
        let message = Message::parse(CAPTURED.as_bytes()).unwrap();
        assert_eq!(message.headers.task, "tasks.inference_task");
        assert_eq!(message.priority(), 6);
        assert_eq!(message.headers.timelimit(), Some(2500));
        let expires = message.headers.expires.as_deref().and_then(unix_ms);
        assert_eq!(expires, Some(1_795_654_800_250));
        let Body(args, kwargs, embed) = message.body().unwrap();
        assert_eq!((&args[0], &kwargs["task_prompt"]), (&json!("http://h/a.jpg"), &json!("<OD>")));
        assert!(embed.chain.is_none());
    }

    #[test]
    fn other_contents_are_refused_and_never_unpacked() {
        let pickle = CAPTURED.replace("application/json", "application/x-python-serialize");
        let error = Message::parse(pickle.as_bytes()).unwrap().body().unwrap_err();
        assert!(error.contains("x-python-serialize"), "{error}");
        let packed = CAPTURED.replace("\"shadow\"", "\"compression\": \"zlib\", \"shadow\"");
        assert!(Message::parse(packed.as_bytes()).unwrap().body().is_err());
        assert!(Message::parse(b"{\"headers\": {}}").is_none());
        assert!(Message::parse(b"hello").is_none());
    }

    #[test]
    fn a_signature_becomes_a_message_that_can_be_read_again() {
        let headers = Headers { id: "parent".to_owned(), ..Headers::default() };
        let sender = Sender { headers: &headers, queue: "celery", priority: 3 };
        let Value::Object(signature) = json!({
            "task": "app.save", "args": [7], "kwargs": {"x": 1}, "immutable": false,
            "options": {"task_id": "child", "queue": "other", "link": [{"task": "app.more"}],
                "countdown": 5},
        }) else {
            unreachable!()
        };
        let rest = [json!({"task": "app.last"}).as_object().unwrap().clone()];
        let outgoing = sender.message(&signature, &json!({"<OD>": []}), &rest);
        assert_eq!((outgoing.queue.as_str(), outgoing.priority), ("other", 3));
        let message = Message::parse(outgoing.json.as_bytes()).unwrap();
        assert_eq!(message.headers.id, "child");
        assert_eq!(message.headers.parent_id.as_deref(), Some("parent"));
        assert!(message.headers.eta.as_deref().and_then(unix_ms).is_some());
        let Body(args, _, embed) = message.body().unwrap();
        assert_eq!(args, [json!({"<OD>": []}), json!(7)]);
        assert_eq!(embed.callbacks.unwrap()[0]["task"], "app.more");
        assert_eq!(embed.chain.unwrap(), rest);

        let immutable = json!({"task": "app.save", "immutable": true});
        let outgoing = sender.message(immutable.as_object().unwrap(), &json!(1), &[]);
        let Body(args, ..) = Message::parse(outgoing.json.as_bytes()).unwrap().body().unwrap();
        assert!(args.is_empty());
    }

    #[test]
    fn times_are_those_of_python() {
        let now = now();
        assert!(now.ends_with("+00:00") && now.len() == 32, "{now}");
        assert!(unix_ms(&now).is_some());
        assert_eq!(unix_ms("1970-01-01T02:00:01+02:00"), Some(1000));
        assert_eq!(unix_ms("tomorrow"), None);
    }
}
