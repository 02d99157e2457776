//! What the overview shows, as one JSON object: the servers, and the figures of one or of all.

use serde_json::{Value, json};

use crate::servers::{
    figures::{Histogram, Latencies, PHASES, of_phase},
    watch::{POINT, Watch},
};

/// Of hosts that are downloaded from.
const MOST_HOSTS: usize = 50;

/// The overview of one server, or of all.
pub(super) fn overview(watch: &Watch, one: Option<usize>) -> Value {
    let servers: Vec<Value> = (0..watch.servers.len()).map(|index| server(watch, index)).collect();
    let Some(view) = watch.view(one) else { return json!({ "servers": servers }) };
    let told = &view.told;
    let latencies = told.latencies.as_ref().map(|all| {
        json!({ "phases": phases(all, view.recent.as_ref()), "tasks": tasks(all, view.recent.as_ref()) })
    });
    let ends: Vec<Value> = told.ended()
        .iter()
        .filter(|(_, count)| **count > 0.0)
        .map(|((state, task, code), count)| {
            json!({ "state": state, "task": task, "code": code, "count": count })
        })
        .collect();
    let hosts = told.hosts.as_ref().map(|hosts| &hosts[..hosts.len().min(MOST_HOSTS)]);
    json!({
        "servers": servers,
        "stats": told.stats,
        "latency": latencies,
        "ends": ends,
        "hosts": hosts,
        "point": view.point,
    })
}

/// The last hour.
pub(super) fn history(watch: &Watch, one: Option<usize>) -> Value {
    json!({ "names": POINT, "points": watch.history(one) })
}

fn server(watch: &Watch, index: usize) -> Value {
    let name = watch.servers.get(index).map(|server| server.name.as_str());
    let Some(known) = watch.known(index) else { return Value::Null };
    let Some(told) = &known.told else {
        let error = known.error.as_deref().unwrap_or("not asked yet");
        return json!({ "name": name, "is_up": false, "error": error });
    };
    let info = |name: &str| told.info.get(name);
    let model = |name: &str| told.model.get(name).filter(|text| !text.is_empty());
    let seconds = info("uptime_in_seconds").and_then(|it| it.parse::<f64>().ok());
    json!({
        "name": name,
        "is_up": true,
        "role": told.role(),
        "redis": told.software(),
        "version": info("florence_version"),
        "uptime_ms": told.stats.get("uptime_ms").copied().or(seconds.map(|it| it * 1e3)),
        // Absent where the server cannot be paused.
        "paused": told.stats.get("paused").map(|paused| *paused != 0.0),
        "ping_ms": told.ping_ms,
        "memory": info("used_memory_rss").and_then(|it| it.parse::<f64>().ok()),
        "memory_redis": info("used_memory").and_then(|it| it.parse::<f64>().ok()),
        "memory_most": info("maxmemory").and_then(|it| it.parse::<f64>().ok()),
        "tells_latency": told.latencies.is_some(),
        "tells_hosts": told.hosts.is_some(),
        "model": {
            "state": model("state"), "name": model("name"), "device": model("device"),
            "precision": model("precision"), "kernels": model("kernels"),
            "error": model("error"), "note": model("note"),
        },
    })
}

fn phases(all: &Latencies, recent: Option<&Latencies>) -> Vec<Value> {
    let phases = PHASES.into_iter();
    let row = |phase: &str| {
        row(phase, &of_phase(all, phase), recent.map(|recent| of_phase(recent, phase)).as_ref())
    };
    phases.map(row).collect()
}

/// Whole jobs, by task.
fn tasks(all: &Latencies, recent: Option<&Latencies>) -> Vec<Value> {
    let totals = all.iter().filter(|((phase, _), _)| phase == "total");
    totals
        .map(|(key, histogram)| row(&key.1, histogram, recent.and_then(|recent| recent.get(key))))
        .collect()
}

fn row(name: &str, all: &Histogram, recent: Option<&Histogram>) -> Value {
    let recent = recent.map(Histogram::percentiles);
    json!({ "name": name, "all": all.percentiles(), "recent": recent })
}
