//! Messages of Celery's protocol 2 in kombu's envelopes, as they are written. Pure.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{
    json,
    message::{Headers, Signature, is_true, priority, text},
    time::in_seconds,
};

/// An envelope around a body, for queues (`exchange` empty), events and replies.
pub(crate) fn envelope(headers: &Value, exchange: &str, routing_key: &str, body: &Value) -> Value {
    json!({
        "body": BASE64_STANDARD.encode(json::write(body)),
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
    /// The id of its task.
    pub(crate) id: String,
    pub(crate) queue: String,
    pub(crate) priority: i64,
    pub(crate) json: String,
}

/// Who a signature is sent by: its messages show it, and share its queue unless they name one.
pub(crate) struct Sender<'a> {
    pub(crate) headers: &'a Headers,
    pub(crate) queue: &'a str,
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
        let text = |name: &str| option(name).and_then(text);
        let seconds = |name: &str| option(name).and_then(Value::as_f64);
        let field = |name: &str| signature.get(name).cloned();
        let mut args: Vec<Value> = match signature.get("args") {
            Some(Value::Array(args)) => args.clone(),
            _ => Vec::new(),
        };
        if !signature.get("immutable").is_some_and(is_true) {
            args.insert(0, first.clone());
        }
        let kwargs = field("kwargs").filter(Value::is_object).unwrap_or_else(|| json!({}));
        let id = text("task_id").unwrap_or_else(new_id);
        let odd_id = option("task_id").filter(|id| id.is_object()).cloned();
        let sender = self.headers;
        let headers = json!({
            "lang": "py",
            "task": field("task"),
            "id": odd_id.unwrap_or_else(|| id.as_str().into()),
            "shadow": option("shadow"),
            "eta": seconds("countdown").map(in_seconds).or_else(|| text("eta")),
            "expires": seconds("expires").map(in_seconds).or_else(|| text("expires")),
            "group": option("group_id"),
            "group_index": option("group_index"),
            "retries": 0,
            "timelimit": [option("time_limit"), option("soft_time_limit")],
            "root_id": sender.root_id.as_ref().unwrap_or(&sender.id),
            "parent_id": sender.id,
            "argsrepr": json::write(&args.clone().into()),
            "kwargsrepr": json::write(&kwargs),
            "origin": "florence",
            "ignore_result": option("ignore_result").is_some_and(is_true),
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
        let queue = text("queue").or_else(|| text("routing_key"));
        let queue = queue.unwrap_or_else(|| self.queue.to_owned());
        let priority = option("priority").and_then(priority).unwrap_or_default();
        let mut message = envelope(&headers, "", &queue, &json!([args, kwargs, embed]));
        message["properties"]["priority"] = priority.into();
        Outgoing { id, queue, priority, json: json::write(&message) }
    }
}

/// A new random id, as Celery's are.
pub(crate) fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::celery::{message::Message, time::unix_ms};

    #[test]
    fn a_signature_becomes_a_message_that_can_be_read_again() {
        let headers = Headers { id: "parent".to_owned(), ..Headers::default() };
        let sender = Sender { headers: &headers, queue: "celery" };
        let Value::Object(signature) = json!({
            "task": "app.save", "args": [7], "kwargs": {"x": 1}, "immutable": false,
            "options": {"task_id": "child", "queue": "other", "link": [{"task": "app.more"}],
                "countdown": 5},
        }) else {
            unreachable!()
        };
        let rest = [json!({"task": "app.last"}).as_object().unwrap().clone()];
        let outgoing = sender.message(&signature, &json!({"<OD>": []}), &rest);
        assert_eq!((outgoing.queue.as_str(), outgoing.priority), ("other", 0));
        let (headers, embed, call) = Message::parse(outgoing.json.as_bytes()).unwrap().unpack();
        assert_eq!((headers.id.as_str(), outgoing.id.as_str()), ("child", "child"));
        assert_eq!(headers.parent_id.as_deref(), Some("parent"));
        assert!(headers.eta.as_deref().and_then(unix_ms).is_some());
        assert_eq!(call.unwrap().args, [json!({"<OD>": []}), json!(7)]);
        assert_eq!(embed.callbacks.unwrap()[0]["task"], "app.more");
        assert_eq!(embed.chain.unwrap(), rest);

        let immutable = json!({"task": "app.save", "immutable": true});
        let outgoing = sender.message(immutable.as_object().unwrap(), &json!(1), &[]);
        let (_, _, call) = Message::parse(outgoing.json.as_bytes()).unwrap().unpack();
        assert!(call.unwrap().args.is_empty());
    }
}
