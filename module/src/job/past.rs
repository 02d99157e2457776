//! What a job's earlier attempts failed with: its field `errors`, a JSON list.

use serde::{Deserialize, Serialize};

use super::{Failure, Job};

pub(super) const FIELD: &str = "errors";
/// The newest are kept.
const MOST: usize = 10;
/// More bytes than as many errors of ours can have.
const MOST_BYTES: u64 = 65_536;

/// An attempt that another one followed.
#[derive(Debug, Serialize, Deserialize)]
struct Past {
    attempt: i64,
    /// When it ended, in milliseconds since 1970.
    at: i64,
    code: String,
    message: String,
}

/// The list that the hash keeps; anybody may have written there.
fn read(job: &Job) -> Option<Vec<Past>> {
    let is_ours = job.length(FIELD) <= MOST_BYTES;
    serde_json::from_str(&is_ours.then(|| job.text(FIELD)).flatten()?).ok()
}

/// The field with one attempt more, which ended now.
pub(super) fn and(job: &Job, failure: &Failure, at: i64) -> (&'static str, Vec<u8>) {
    let mut attempts = read(job).unwrap_or_default();
    attempts.push(Past {
        attempt: job.number("attempts").unwrap_or_default(),
        at,
        code: failure.code.name().to_owned(),
        message: failure.message.clone(),
    });
    attempts.drain(..attempts.len().saturating_sub(MOST));
    (FIELD, serde_json::json!(attempts).to_string().into())
}

/// The list as clients see it.
pub(super) fn shown(job: &Job) -> Option<String> {
    Some(serde_json::json!(read(job)?).to_string())
}
