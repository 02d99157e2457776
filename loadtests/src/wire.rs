//! How jobs are sent and how their ends are heard of: by the commands of the module, or as messages
//! of Celery, which its Python workers take as well.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use redis::Connection;
use serde_json::json;

use crate::scenario::{Ask, Scenario};

/// Keys and ids of jobs begin so.
const PREFIX: &str = "load:";

/// The protocol of a run.
#[derive(Debug, Clone)]
pub(crate) enum Wire {
    Florence,
    /// A queue of Celery, and the name of the task that is sent to it.
    Celery {
        queue: String,
        task: String,
    },
}

/// How a job has ended, as it was published.
pub(crate) struct News {
    pub(crate) job: usize,
    pub(crate) state: String,
    pub(crate) cache: String,
}

/// What was said to a submission.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Yes,
    /// There is no room.
    Refused,
}

impl Wire {
    /// `queue:task`
    pub(crate) fn celery(setting: &str) -> anyhow::Result<Self> {
        let (queue, task) = setting.rsplit_once(':').context("--celery wants queue:task")?;
        Ok(Self::Celery { queue: queue.to_owned(), task: task.to_owned() })
    }

    /// Waits until a model is there to answer.
    pub(crate) fn wait_until_ready(
        &self,
        connection: &mut Connection,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let until = Instant::now() + patience;
        if let Self::Celery { queue, task } = self {
            // A worker answers this with an error as soon as it has loaded the model.
            let ask = Ask { picture: "", prompt: "", priority: 0 };
            push(connection, (queue, task), "ready", "/", ask)?;
        }
        while Instant::now() < until {
            match self {
                Self::Florence => {
                    let model: HashMap<String, redis::Value> =
                        redis::cmd("FLORENCE.MODEL").query(connection)?;
                    let text = |field: &str| -> Option<String> {
                        model.get(field).and_then(|text| redis::from_redis_value(text).ok())
                    };
                    match text("state").as_deref() {
                        Some("ready") => return Ok(()),
                        Some("failed") => bail!("no model: {:?}", text("error")),
                        _ => {}
                    }
                }
                Self::Celery { .. } => {
                    let key = format!("celery-task-meta-{PREFIX}ready");
                    let meta: Option<String> = redis::cmd("GET").arg(key).query(connection)?;
                    let is_over = |meta: &String| {
                        ["SUCCESS", "FAILURE"].iter().any(|status| meta.contains(status))
                    };
                    if meta.as_ref().is_some_and(is_over) {
                        return Ok(());
                    }
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("nobody answers")
    }

    /// Submits the job of a number; the pictures' address ends with a slash.
    pub(crate) fn submit(
        &self,
        connection: &mut Connection,
        job: usize,
        pictures: &str,
        scenario: &Scenario,
    ) -> anyhow::Result<Taken> {
        let ask = scenario.ask(job);
        if let Self::Celery { queue, task } = self {
            push(connection, (queue, task), &job.to_string(), pictures, ask)?;
            return Ok(Taken::Yes);
        }
        let Ask { picture, prompt, priority } = ask;
        let mut command = redis::cmd("FLORENCE.SUBMIT");
        command.arg(format!("{PREFIX}{job}")).arg(format!("{pictures}{picture}"));
        command.arg(prompt).arg(&scenario.steps).arg("PRIORITY").arg(priority);
        if !scenario.cache {
            command.arg("NOCACHE");
        }
        if let Some(tokens) = scenario.max_tokens {
            command.arg("MAXTOKENS").arg(tokens);
        }
        if let Some(beams) = scenario.beams {
            command.arg("BEAMS").arg(beams);
        }
        if let Some(model) = scenario.models.get(job % scenario.models.len().max(1)) {
            command.arg("MODEL").arg(model);
        }
        if scenario.stream {
            command.arg("TOKENS").arg(format!("{PREFIX}stream"));
        }
        match command.query::<String>(connection) {
            Ok(_key) => Ok(Taken::Yes),
            Err(error) if error.code() == Some("BUSY") => Ok(Taken::Refused),
            Err(error) => Err(error.into()),
        }
    }

    /// The channels that ends of jobs are published on.
    pub(crate) fn channels(&self) -> String {
        match self {
            Self::Florence => format!("florence:{PREFIX}*"),
            Self::Celery { .. } => format!("celery-task-meta-{PREFIX}*"),
        }
    }

    /// What a published message tells of one of our jobs; nothing unless it has ended.
    pub(crate) fn news(&self, payload: &str) -> anyhow::Result<Option<News>> {
        let told: serde_json::Value = serde_json::from_str(payload)?;
        let text = |name: &str| told[name].as_str().unwrap_or_default().to_owned();
        let (id, state, cache) = match self {
            Self::Florence => (text("id"), text("state"), text("cache")),
            Self::Celery { .. } => {
                let state = match told["status"].as_str() {
                    Some("SUCCESS") => "done",
                    Some("FAILURE") => "failed",
                    Some("REVOKED") => "cancelled",
                    _ => return Ok(None),
                };
                (text("task_id"), state.to_owned(), "unknown".to_owned())
            }
        };
        let job = id.strip_prefix(PREFIX).and_then(|number| number.parse().ok());
        Ok(job.map(|job| News { job, state, cache }))
    }

    /// Jobs that wait, and that are worked on.
    pub(crate) fn depth(&self, connection: &mut Connection) -> anyhow::Result<(usize, usize)> {
        match self {
            Self::Florence => {
                let stats: HashMap<String, redis::Value> =
                    redis::cmd("FLORENCE.STATS").query(connection)?;
                let number = |name: &str| match stats.get(name) {
                    Some(redis::Value::Int(number)) => usize::try_from(*number).unwrap_or_default(),
                    _ => 0,
                };
                Ok((number("jobs_waiting"), number("jobs_active")))
            }
            Self::Celery { queue, .. } => {
                let mut waiting = 0;
                for list in lists(queue) {
                    waiting += redis::cmd("LLEN").arg(list).query::<usize>(connection)?;
                }
                Ok((waiting, redis::cmd("HLEN").arg("unacked").query(connection)?))
            }
        }
    }
}

/// Pushes a message of protocol 2 to a queue's list.
fn push(
    connection: &mut Connection,
    (queue, task): (&str, &str),
    name: &str,
    pictures: &str,
    ask: Ask<'_>,
) -> anyhow::Result<()> {
    let id = format!("{PREFIX}{name}");
    let url = format!("{pictures}{}", ask.picture);
    // Ours are more urgent the higher they are, Celery's on Redis the lower.
    let priority = 9 - ask.priority;
    let embed = json!({ "callbacks": null, "errbacks": null, "chain": null, "chord": null });
    let body = json!([[url, ask.prompt], {}, embed]);
    let message = json!({
        "body": BASE64_STANDARD.encode(body.to_string()),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py", "task": task, "id": id, "shadow": null, "eta": null, "expires": null,
            "group": null, "group_index": null, "retries": 0, "timelimit": [null, null],
            "root_id": id, "parent_id": null, "argsrepr": "()", "kwargsrepr": "{}",
            "origin": "florence-load", "ignore_result": false, "replaced_task_nesting": 0,
            "stamped_headers": null, "stamps": {},
        },
        "properties": {
            "correlation_id": id, "reply_to": "", "delivery_mode": 2,
            "delivery_info": { "exchange": "", "routing_key": queue },
            "priority": priority, "body_encoding": "base64", "delivery_tag": id,
        },
    });
    let list = lists(queue)[usize::from(priority / 3)].clone();
    redis::cmd("LPUSH").arg(list).arg(message.to_string()).exec(connection)?;
    Ok(())
}

/// The lists of a queue, the most urgent first.
fn lists(queue: &str) -> [String; 4] {
    [0, 3, 6, 9].map(|step| match step {
        0 => queue.to_owned(),
        step => format!("{queue}\x06\x16{step}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_in_both_protocols() {
        let told = r#"{"id":"load:7","state":"done","cache":"miss"}"#;
        let news = Wire::Florence.news(told).expect("JSON").expect("an end");
        assert_eq!((news.job, news.state.as_str(), news.cache.as_str()), (7, "done", "miss"));

        let celery = Wire::celery("a:b:tasks.x").expect("a queue and a task");
        assert_eq!(celery.channels(), "celery-task-meta-load:*");
        let told = |status: &str| format!(r#"{{"status":"{status}","task_id":"load:8"}}"#);
        assert!(celery.news(&told("STARTED")).expect("JSON").is_none());
        let news = celery.news(&told("FAILURE")).expect("JSON").expect("an end");
        assert_eq!((news.job, news.state.as_str()), (8, "failed"));
        assert!(Wire::celery("queue").is_err());
    }
}
