//! `/metrics`: what the servers told last, in Prometheus' text format.
//!
//! Figures add up over servers: those of a process are told once, however many of its databases are
//! watched, and unfinished jobs by masters alone, since their replicas have the same ones.

use std::fmt::Write;

use crate::servers::{
    figures::Histogram,
    watch::{Told, Watch},
};

/// One server's figures, by its name.
struct Of<'a> {
    server: &'a str,
    told: &'a Told,
    /// Whether another server that is watched has the same jobs.
    is_copy: bool,
}

/// Counters of STATS that are told under other names, or by `FLORENCE.STATS JOBS`.
const COUNTERS: [(&str, &str, &str); 12] = [
    (
        "attempts_retried",
        "florence_attempts_retried_total",
        "Attempts that failed and were made again.",
    ),
    (
        "submits_refused",
        "florence_submits_refused_total",
        "Jobs that SUBMIT refused because there was no room.",
    ),
    ("jobs_submitted", "florence_jobs_submitted_total", "Jobs that were submitted."),
    ("answers_dropped", "florence_answers_dropped_total", "Answers whose job was gone."),
    ("panics", "florence_panics_total", "Faults that were caught."),
    (
        "threads_restarted",
        "florence_threads_restarted_total",
        "Threads that had ended and were started again.",
    ),
    (
        "leases_recovered",
        "florence_leases_recovered_total",
        "Jobs that counted as worked on although nobody did.",
    ),
    ("decoder_steps", "florence_decoder_steps_total", "Steps of the decoder."),
    (
        "celery_left",
        "florence_celery_messages_left_total",
        "Messages of Celery's that stay in their lists.",
    ),
    (
        "celery_refused",
        "florence_celery_messages_refused_total",
        "Messages of Celery's that were answered with an error at once.",
    ),
    (
        "celery_rejected",
        "florence_celery_messages_rejected_total",
        "Messages of Celery's that were set aside.",
    ),
    (
        "jobs_unannounced",
        "florence_jobs_unannounced_total",
        "Ends of jobs that could not be published.",
    ),
];

/// Figures of STATS that are one metric.
struct Group {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    /// What tells them apart.
    label: &'static str,
    /// Names in STATS, with the label's values.
    figures: &'static [(&'static str, &'static str)],
    /// Whether it tells of jobs that replicas have, too.
    is_of_data: bool,
}

const GROUPS: [Group; 4] = [
    Group {
        name: "florence_queue_depth",
        kind: "gauge",
        help: "Unfinished jobs.",
        label: "state",
        figures: &[
            ("jobs_in_turn", "waiting"),
            ("jobs_delayed", "delayed"),
            ("jobs_active", "active"),
        ],
        is_of_data: true,
    },
    Group {
        name: "florence_cache_lookups_total",
        kind: "counter",
        help: "Jobs by what the caches spared them.",
        label: "verdict",
        figures: &[
            ("cache_results", "result"),
            ("cache_features", "features"),
            ("cache_misses", "miss"),
        ],
        is_of_data: false,
    },
    Group {
        name: "florence_cache_bytes",
        kind: "gauge",
        help: "What the caches hold.",
        label: "cache",
        figures: &[("cache_result_bytes", "results"), ("cache_feature_bytes", "features")],
        is_of_data: false,
    },
    Group {
        name: "florence_engine_memory_bytes",
        kind: "gauge",
        help: "What the engine holds beside the server's own memory.",
        label: "kind",
        figures: &[
            ("memory_weights_mapped", "weights_mapped"),
            ("memory_weights_packed", "weights_packed"),
            ("memory_caches", "caches"),
            ("memory_work", "work"),
            ("memory_work_peak", "work_peak"),
            ("memory_kv_cache", "kv_cache"),
            ("memory_kv_cache_peak", "kv_cache_peak"),
        ],
        is_of_data: false,
    },
];

/// The text that Prometheus reads.
pub(super) fn text(watch: &Watch) -> String {
    let mut told = Vec::new();
    let mut page = Page::default();
    page.head("florence_up", "gauge", "Whether the server answers.");
    for (index, server) in watch.servers.iter().enumerate() {
        let last = watch.known(index).and_then(|known| known.told.clone());
        let is_up = f64::from(u8::from(last.is_some()));
        page.sample("florence_up", &[("server", &server.name)], is_up);
        told.extend(last.map(|last| (index, last)));
    }
    let processes = watch.once(told.iter().map(|(index, _)| *index));
    let with_jobs = watch.asked(None);
    let mut servers = Vec::new();
    for (index, told) in told.iter().filter(|(index, _)| processes.contains(index)) {
        let Some(server) = watch.servers.get(*index) else { continue };
        servers.push(Of { server: &server.name, told, is_copy: !with_jobs.contains(index) });
    }
    page.servers(&servers);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.text, "{name}{{{}}} {value}", labels.join(","));
    }

    /// A metric of which every server has one figure, or none.
    fn one(
        &mut self,
        servers: &[Of<'_>],
        (name, kind, help): (&str, &str, &str),
        value: impl Fn(&Told) -> Option<f64>,
    ) {
        self.head(name, kind, help);
        for of in servers {
            if let Some(value) = value(of.told) {
                self.sample(name, &[("server", of.server)], value);
            }
        }
    }

    fn servers(&mut self, servers: &[Of<'_>]) {
        const INFO: &str = "florence_server_info";
        self.head(INFO, "gauge", "Always 1; the role that the server has.");
        for of in servers {
            if let Some(role) = of.told.role() {
                self.sample(INFO, &[("server", of.server), ("role", role)], 1.0);
            }
        }
        self.one(
            servers,
            ("florence_ping_seconds", "gauge", "How long the server took to answer PING."),
            |told| Some(told.ping_ms / 1e3),
        );
        self.one(
            servers,
            ("florence_model_ready", "gauge", "Whether the model is loaded."),
            |told| Some(f64::from(u8::from(told.model.get("state")? == "ready"))),
        );
        self.one(
            servers,
            ("florence_paused", "gauge", "Whether nothing new is started."),
            |told| told.stats.get("paused").copied(),
        );
        self.one(
            servers,
            ("florence_uptime_seconds", "gauge", "How long the module has been loaded."),
            |told| told.stats.get("uptime_ms").map(|ms| ms / 1e3),
        );
        self.one(
            servers,
            ("florence_redis_memory_bytes", "gauge", "The memory of the server's process."),
            |told| told.info.get("used_memory_rss")?.parse().ok(),
        );
        for (stat, name, help) in COUNTERS {
            self.one(servers, (name, "counter", help), |told| told.stats.get(stat).copied());
        }
        for group in &GROUPS {
            self.head(group.name, group.kind, group.help);
            for of in servers.iter().filter(|of| !(group.is_of_data && of.is_copy)) {
                for (stat, value) in group.figures {
                    if let Some(figure) = of.told.stats.get(*stat) {
                        let labels = [("server", of.server), (group.label, value)];
                        self.sample(group.name, &labels, *figure);
                    }
                }
            }
        }
        self.ends(servers);
        self.latencies(servers);
    }

    fn ends(&mut self, servers: &[Of<'_>]) {
        const NAME: &str = "florence_jobs_total";
        self.head(NAME, "counter", "Jobs that have ended, by how.");
        for of in servers {
            for ((state, task, code), count) in &of.told.ended() {
                let labels =
                    [("server", of.server), ("state", state), ("task", task), ("code", code)];
                self.sample(NAME, &labels, *count);
            }
        }
    }

    fn latencies(&mut self, servers: &[Of<'_>]) {
        self.head("florence_phase_seconds", "histogram", "How long the phases of jobs took.");
        for of in servers {
            for ((phase, task), histogram) in of.told.latencies.iter().flatten() {
                self.histogram(
                    &[("server", of.server), ("phase", phase), ("task", task)],
                    histogram,
                );
            }
        }
    }

    fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        for (bound, count) in &histogram.buckets {
            let bound =
                if bound.is_finite() { (bound / 1e3).to_string() } else { "+Inf".to_owned() };
            let labels = [labels, &[("le", bound.as_str())]].concat();
            self.sample("florence_phase_seconds_bucket", &labels, *count);
        }
        self.sample("florence_phase_seconds_sum", labels, histogram.sum_ms / 1e3);
        self.sample("florence_phase_seconds_count", labels, histogram.count);
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "counts")]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_break_out() {
        let mut page = Page::default();
        page.sample("x", &[("task", "a\"} 1\nb\\")], 2.5);
        assert_eq!(page.text, "x{task=\"a\\\"} 1\\nb\\\\\"} 2.5\n");
    }

    #[test]
    fn a_histogram_ends_with_infinity() {
        let mut page = Page::default();
        let histogram = Histogram {
            count: 3.0,
            sum_ms: 1500.0,
            buckets: vec![(5.0, 1.0), (f64::INFINITY, 3.0)],
        };
        page.histogram(&[("phase", "total")], &histogram);
        let expected = "florence_phase_seconds_bucket{phase=\"total\",le=\"0.005\"} 1\n\
            florence_phase_seconds_bucket{phase=\"total\",le=\"+Inf\"} 3\n\
            florence_phase_seconds_sum{phase=\"total\"} 1.5\n\
            florence_phase_seconds_count{phase=\"total\"} 3\n";
        assert_eq!(page.text, expected);
    }

    #[test]
    fn documents_and_dashboards_name_figures_that_there_are() {
        let servers = [Of { server: "x", told: &Told::default(), is_copy: false }];
        let mut page = Page::default();
        page.head("florence_up", "gauge", "");
        page.servers(&servers);
        let heads = page.text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let names: Vec<&str> = heads.filter_map(|head| head.split(' ').next()).collect();
        let documents = [
            include_str!("../../../docs/monitoring/alerts.yml"),
            include_str!("../../../docs/monitoring/grafana.json"),
            include_str!("../../../docs/WEB.md"),
        ];
        let is_letter = |letter: char| letter.is_ascii_lowercase() || letter == '_';
        for text in documents {
            for part in text.split("florence_").skip(1) {
                let end = part.find(|letter| !is_letter(letter)).unwrap_or(part.len());
                let name = format!("florence_{}", &part[..end]);
                let name = name.strip_suffix("_bucket").unwrap_or(&name);
                assert!(names.contains(&name), "{name} is not told");
            }
        }
        let told = documents[2];
        for name in names.iter().filter(|name| !name.starts_with("florence_celery")) {
            assert!(told.contains(name), "{name} is not documented");
        }
    }

    #[test]
    fn older_servers_tell_ends_by_code() {
        let stats = [("jobs_done", 7.0), ("failed_fetch", 2.0)];
        let told =
            Told { stats: stats.map(|(name, n)| (name.to_owned(), n)).into(), ..Told::default() };
        let ends = told.ended();
        assert_eq!(ends[&("done".to_owned(), String::new(), String::new())], 7.0);
        assert_eq!(ends[&("failed".to_owned(), String::new(), "FETCH".to_owned())], 2.0);
    }
}
