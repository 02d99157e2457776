//! Messages as Celery's clients push them.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::json;

/// A task of protocol 2 for the list `celery`.
pub fn celery_message(id: &str, task: &str, args: &[&str]) -> String {
    let body =
        json!([args, {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]);
    json!({
        "body": BASE64_STANDARD.encode(body.to_string()),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": id, "eta": null, "expires": null, "retries": 0,
            "timelimit": [null, null], "root_id": id, "parent_id": null, "ignore_result": false},
        "properties": {"correlation_id": id, "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "body_encoding": "base64", "delivery_tag": id},
    })
    .to_string()
}
