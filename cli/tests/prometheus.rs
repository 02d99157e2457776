//! A real Prometheus reads the figures of `florence web`, loads the alert rules, and knows all that
//! the dashboard asks for.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod common;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use common::{Page, query};
use florence_tests::{Pictures, Server, eventually};
use serde_json::Value;

fn documents() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring")
}

/// A running Prometheus; ended on drop.
struct Prometheus {
    child: Child,
    port: u16,
}

impl Prometheus {
    fn start(directory: &Path, page: u16) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rules = documents().join("alerts.yml");
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n\
             scrape_configs:\n  - job_name: florence\n    static_configs: [{{ targets: [\"127.0.0.1:{page}\"] }}]\n\
             rule_files: [{}]\n",
            rules.display()
        );
        let file = directory.join("prometheus.yml");
        fs::write(&file, config).unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stderr(Stdio::null())
            .spawn()
            .expect("Prometheus is missing: tools/setup.sh tests installs it");
        Self { child, port }
    }

    fn get(&self, path: &str) -> Option<Value> {
        let mut answer = ureq::get(format!("http://127.0.0.1:{}{path}", self.port)).call().ok()?;
        answer.body_mut().read_json().ok()
    }

    /// The samples that an expression gives; `None` if it cannot be evaluated.
    fn ask(&self, expression: &str) -> Option<Vec<Value>> {
        let answer = self.get(&format!("/api/v1/query?query={}", query(expression)))?;
        Some(answer["data"]["result"].as_array()?.clone())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every expression of the dashboard, with what it fills in for its variables.
fn expressions(part: &Value, found: &mut Vec<String>) {
    match part {
        Value::Object(entries) => {
            for (name, value) in entries {
                match value.as_str() {
                    Some(text) if name == "expr" => {
                        found
                            .push(text.replace("$__rate_interval", "30s").replace("$server", ".*"));
                    }
                    _ => expressions(value, found),
                }
            }
        }
        Value::Array(parts) => parts.iter().for_each(|part| expressions(part, found)),
        _ => {}
    }
}

#[test]
fn prometheus_reads_the_figures_and_knows_the_rules_and_the_dashboard() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let shapes = pictures.url("shapes.png");
    let ask = |key: &str, image: &str| {
        server.call::<()>(&["FLORENCE.SUBMIT", key, image, "<OD>", "RETRIES", "0"]);
        server.call::<redis::Value>(&["FLORENCE.WAIT", key, "60"]);
    };
    let page = Page::about(&[&server], &[]);
    let directory = tempfile::tempdir().unwrap();
    let prometheus = Prometheus::start(directory.path(), page.port);
    let is = |expression: &str, expected: &str| {
        let samples = prometheus.ask(expression)?;
        (samples.first()?["value"][1] == expected).then_some(())
    };
    eventually("the target is read", || is("up{job=\"florence\"}", "1"));
    ask("good", &shapes);
    ask("bad", &pictures.url("status/404"));
    let name = format!("127.0.0.1:{}", server.port);
    for figures in [
        format!("florence_up{{server=\"{name}\"}}"),
        "florence_jobs_total{state=\"done\",task=\"<OD>\"}".to_owned(),
        "florence_jobs_total{state=\"failed\",code=\"FETCH\"}".to_owned(),
        "florence_phase_seconds_count{phase=\"total\",task=\"<OD>\"}".to_owned(),
    ] {
        eventually(&figures, || is(&figures, "1"));
    }
    // Every rule is evaluated, and no alert fires that is not meant to.
    let rules = eventually("the rules are evaluated", || {
        let rules = prometheus.get("/api/v1/rules")?["data"]["groups"][0]["rules"].clone();
        let are_known = |rule: &Value| rule["health"] != "unknown";
        rules.as_array().is_some_and(|rules| rules.iter().all(are_known)).then_some(rules)
    });
    for rule in rules.as_array().unwrap() {
        assert_eq!(rule["health"], "ok", "{rule}");
        assert_ne!(rule["state"], "firing", "{rule}");
    }
    let dashboard = fs::read_to_string(documents().join("grafana.json")).unwrap();
    let mut asked = Vec::new();
    expressions(&serde_json::from_str(&dashboard).unwrap(), &mut asked);
    assert!(asked.len() >= 10, "{asked:?}");
    for expression in asked {
        eventually(&expression, || {
            ask("again", &shapes);
            server.call::<()>(&["DEL", "again"]);
            prometheus.ask(&expression).filter(|samples| !samples.is_empty())
        });
    }
    // A server that is lost is told of, and the rule that watches for it sees it.
    drop(server);
    eventually("its loss is told", || is("florence_up", "0"));
    eventually("an alert waits", || {
        let alerts = prometheus.get("/api/v1/alerts")?["data"]["alerts"].clone();
        let is_meant = |alert: &Value| alert["labels"]["alertname"] == "FlorenceDown";
        alerts.as_array()?.iter().any(is_meant).then_some(())
    });
}
