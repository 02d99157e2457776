//! What the server tells of itself: latencies by phase and task, ends by state, task and code, the
//! lines of INFO; and that docs/METRICS.md names all of it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use florence_tests::{Pictures, Server, celery_message, eventually, picture};
use redis::{FromRedisValue, Value, from_redis_value};

const BOUNDS: [i64; 16] =
    [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, -1];
const PHASES: [&str; 6] = ["queue", "fetch", "prepare", "encode", "generate", "total"];

type Map = HashMap<String, Value>;

fn get<T: FromRedisValue>(map: &Map, name: &str) -> T {
    from_redis_value(&map[name]).unwrap_or_else(|error| panic!("{name} of {map:?}: {error}"))
}

/// A histogram as it is told.
#[derive(Debug, PartialEq)]
struct Histogram {
    count: i64,
    sum_ms: i64,
    buckets: Vec<(i64, i64)>,
}

/// All histograms, by phase and task.
fn latencies(server: &Server) -> BTreeMap<(String, String), Histogram> {
    let told: Vec<Map> = server.call(&["FLORENCE.STATS", "LATENCY"]);
    let histogram = |map: &Map| {
        let histogram = Histogram {
            count: get(map, "count"),
            sum_ms: get(map, "sum_ms"),
            buckets: get(map, "buckets"),
        };
        assert_eq!(map.len(), 5, "{map:?}");
        ((get(map, "phase"), get(map, "task")), histogram)
    };
    let count = told.len();
    let known: BTreeMap<_, _> = told.iter().map(histogram).collect();
    assert_eq!(known.len(), count, "one is told twice: {told:?}");
    known
}

/// Jobs that have ended: state, task, code, and how many.
fn ends(server: &Server) -> BTreeSet<(String, String, String, i64)> {
    let told: Vec<Map> = server.call(&["FLORENCE.STATS", "JOBS"]);
    let end =
        |map: &Map| (get(map, "state"), get(map, "task"), get(map, "code"), get(map, "count"));
    told.iter().map(end).collect()
}

fn submit(server: &Server, key: &str, image: &str, rest: &[&str]) {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, image], rest].concat());
}

fn wait(server: &Server, key: &str) -> HashMap<String, Option<String>> {
    let job: Option<HashMap<String, Option<String>>> = server.call(&["FLORENCE.WAIT", key, "30"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)))
}

fn with_samples(lines: &[&str]) -> Server {
    let roots = picture("shapes.png").parent().unwrap().display().to_string();
    let roots = format!("florence.file-roots {roots}");
    Server::ready(&[lines, &[&roots]].concat())
}

#[test]
fn every_phase_of_a_job_is_in_the_histogram_of_its_task() {
    let (server, pictures) = (with_samples(&["florence.prompts any"]), Pictures::serve());
    assert!(latencies(&server).is_empty());
    let file = picture("shapes.png").display().to_string();
    submit(&server, "slow", &pictures.url("slow/150/shapes.png"), &["<OD>"]);
    submit(&server, "file", &file, &["<CAPTION>"]);
    submit(&server, "several", &pictures.url("sign.png"), &["PROMPTS", "2", "<OCR>", "<OD>"]);
    submit(&server, "other", &pictures.url("tall.png"), &["What is this?"]);
    let phrase = "<CAPTION_TO_PHRASE_GROUNDING> a red circle";
    submit(&server, "phrase", &pictures.url("poster.jpg"), &[phrase]);
    let tasks = [
        ("slow", "<OD>"),
        ("file", "<CAPTION>"),
        ("several", "several"),
        ("other", "other"),
        ("phrase", "<CAPTION_TO_PHRASE_GROUNDING>"),
    ];
    for (key, _) in tasks {
        assert_eq!(wait(&server, key)["state"].as_deref(), Some("done"), "{key}");
    }
    let told = latencies(&server);
    assert_eq!(told.len(), PHASES.len() * tasks.len(), "{:?}", told.keys());
    for ((phase, task), histogram) in &told {
        assert_eq!(histogram.count, 1, "{phase} {task}");
        let bounds: Vec<i64> = histogram.buckets.iter().map(|(bound, _)| *bound).collect();
        assert_eq!(bounds, BOUNDS);
        let counts: Vec<i64> = histogram.buckets.iter().map(|(_, count)| *count).collect();
        assert!(counts.is_sorted() && counts.last() == Some(&1), "{phase} {task}: {counts:?}");
        // The sum is in the first bucket that counts it.
        let first = counts.iter().position(|count| *count == 1).unwrap();
        let least = if first == 0 { 0 } else { BOUNDS[first - 1] };
        let most = if BOUNDS[first] < 0 { i64::MAX } else { BOUNDS[first] };
        assert!((least..=most).contains(&histogram.sum_ms), "{phase} {task}: {histogram:?}");
    }
    let sum = |phase: &str, task: &str| told[&(phase.to_owned(), task.to_owned())].sum_ms;
    assert!((150..30_000).contains(&sum("fetch", "<OD>")));
    assert!(sum("fetch", "<CAPTION>") < 150);
    for (_, task) in tasks {
        let parts: i64 = PHASES[..5].iter().map(|phase| sum(phase, task)).sum();
        let total = sum("total", task);
        // Each part is rounded down, and the total is of whole milliseconds.
        assert!(parts <= total + 5, "{task}: {parts} of {total}");
    }
    // Of a known answer there is nothing to encode and to generate.
    submit(&server, "again", &file, &["<CAPTION>"]);
    assert_eq!(wait(&server, "again")["cache"].as_deref(), Some("result"));
    let told = latencies(&server);
    let count = |phase: &str| told[&(phase.to_owned(), "<CAPTION>".to_owned())].count;
    assert_eq!(PHASES.map(count), [2, 2, 2, 1, 1, 2]);
}

#[test]
fn a_delay_is_no_part_of_a_latency() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    submit(&server, "job", &pictures.url("sign.png"), &["<OCR>", "DELAY", "1500"]);
    wait(&server, "job");
    let told = latencies(&server);
    for phase in ["queue", "total"] {
        let histogram = &told[&(phase.to_owned(), "<OCR>".to_owned())];
        assert!(histogram.sum_ms < 1500, "{phase}: {histogram:?}");
    }
}

#[test]
fn times_that_others_write_spoil_no_latency() {
    let server = Server::ready(&[]);
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    for (key, submitted) in [("a", None), ("b", Some("0")), ("c", Some("-9223372036854775808"))] {
        let mut write = redis::cmd("HSET");
        write.arg(key).arg("florence").arg(1).arg("state").arg("queued").arg("prompt").arg("<OCR>");
        write.arg("image").arg("DATA").arg("data").arg(&bytes).arg("nocache").arg(1);
        if let Some(submitted) = submitted {
            write.arg("submitted_at").arg(submitted);
        }
        write.exec(&mut server.connect()).unwrap();
        wait(&server, key);
    }
    let told = latencies(&server);
    let phases: Vec<&str> = told.keys().map(|(phase, _)| phase.as_str()).collect();
    assert_eq!(phases, ["encode", "generate", "prepare"]);
    let generate = &told[&("generate".to_owned(), "<OCR>".to_owned())];
    assert_eq!(generate.count, 3);
}

#[test]
fn failed_downloads_take_their_time_and_no_answer_has_no_total() {
    let (server, pictures) = (Server::ready(&["florence.retry-delay-ms 1"]), Pictures::serve());
    let url = pictures.url("slow/60/status/503");
    submit(&server, "job", &url, &["<OCR>", "RETRIES", "2"]);
    assert_eq!(wait(&server, "job")["state"].as_deref(), Some("failed"));
    let told = latencies(&server);
    let phases: Vec<(&str, i64)> =
        told.iter().map(|((phase, _), histogram)| (phase.as_str(), histogram.count)).collect();
    assert_eq!(phases, [("fetch", 3), ("queue", 3)]);
    assert!(told.values().next().unwrap().sum_ms >= 180);
}

#[test]
fn ends_are_counted_by_state_task_and_code() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    assert!(ends(&server).is_empty());
    for key in ["a", "b"] {
        submit(&server, key, &pictures.url("sign.png"), &["<OCR>"]);
        wait(&server, key);
    }
    submit(&server, "c", &pictures.url("status/404"), &["<OD>"]);
    submit(&server, "d", &pictures.url("text"), &["PROMPTS", "2", "<OD>", "<OCR>"]);
    submit(&server, "e", &pictures.url("sign.png"), &["<OCR>", "DELAY", "600000"]);
    submit(&server, "f", &pictures.url("sign.png"), &["<OCR>", "DELAY", "9000", "EXPIRES", "10"]);
    server.call::<()>(&["FLORENCE.CANCEL", "e"]);
    for key in ["c", "d", "f"] {
        wait(&server, key);
    }
    // What others wrote, and nobody can read.
    server.call::<()>(&["HSET", "g", "florence", "1", "state", "queued", "prompt", "[\"x"]);
    wait(&server, "g");
    let expected = [
        ("done", "<OCR>", "", 2),
        ("failed", "<OD>", "FETCH", 1),
        ("failed", "several", "IMAGE", 1),
        ("cancelled", "<OCR>", "", 1),
        ("expired", "<OCR>", "", 1),
        ("failed", "other", "INVALID", 1),
    ];
    let owned = |(state, task, code, count): (&str, &str, &str, i64)| {
        (state.to_owned(), task.to_owned(), code.to_owned(), count)
    };
    assert_eq!(ends(&server), expected.into_iter().map(owned).collect());
}

#[test]
fn messages_of_celerys_are_counted_by_what_becomes_of_them() {
    let server = with_samples(&["florence.celery-queues celery:tasks.ask"]);
    let file = picture("sign.png").display().to_string();
    for (id, task, prompt) in
        [("a", "tasks.ask", "<OCR>"), ("b", "tasks.ask", "<NONE>"), ("c", "tasks.other", "<OCR>")]
    {
        let message = celery_message(id, task, &[&file, prompt]);
        server.call::<()>(&["LPUSH", "celery", &message]);
    }
    eventually("each message has been looked at", || {
        let counts =
            ["celery_taken", "celery_refused", "celery_left"].map(|name| server.stat(name));
        (counts == [1, 1, 1]).then_some(())
    });
}

fn info(server: &Server) -> HashMap<String, String> {
    let info: String = server.call(&["INFO", "florence"]);
    let lines = info.lines().filter_map(|line| line.trim().split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[test]
fn info_has_percentiles_as_the_servers_own_latencystats_have_them() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    submit(&server, "job", &pictures.url("slow/150/sign.png"), &["<OCR_WITH_REGION>"]);
    wait(&server, "job");
    let (info, told) = (info(&server), latencies(&server));
    for ((phase, task), histogram) in told {
        let task = task.trim_matches(['<', '>']);
        let line = &info[&format!("florence_latency_percentiles_usec_{phase}_{task}")];
        let parts: Vec<(&str, f64)> = line
            .split(',')
            .map(|part| part.split_once('=').unwrap())
            .map(|(name, value)| (name, value.parse().unwrap()))
            .collect();
        assert_eq!(
            parts.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
            ["p50", "p99", "p99.9"]
        );
        // All of them are in the one bucket that counts.
        let first = histogram.buckets.iter().position(|(_, count)| *count == 1).unwrap();
        let least = if first == 0 { 0 } else { BOUNDS[first - 1] } as f64 * 1000.0;
        let most = BOUNDS[first] as f64 * 1000.0;
        assert!(parts.iter().all(|(_, value)| (least..=most).contains(value)), "{phase}: {line}");
    }
}

#[test]
fn uptime_and_pause_are_told() {
    let server = Server::ready(&[]);
    let first = server.stat("uptime_ms");
    assert!((1..600_000).contains(&first), "{first}");
    assert!(server.stat("uptime_ms") >= first);
    assert_eq!(info(&server)["florence_paused"], "0");
    assert_eq!(server.stat("paused"), 0);
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    assert_eq!(info(&server)["florence_paused"], "1");
    assert_eq!(server.stat("paused"), 1);
    assert_eq!(server.stat("model_ready"), 1);
}

#[test]
fn all_that_tells_a_version_tells_the_same() {
    let server = Server::start();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(info(&server)["florence_version"], version);
    let parts: Vec<i64> = version.split('.').map(|part| part.parse().unwrap()).collect();
    let number = parts[0] * 10_000 + parts[1] * 100 + parts[2];
    let modules: Vec<Map> = server.call(&["MODULE", "LIST"]);
    let ours = modules.iter().find(|module| get::<String>(module, "name") == "florence").unwrap();
    assert_eq!(get::<i64>(ours, "ver"), number);
}

/// The rows of the tables of docs/METRICS.md below a heading: name, type, unit.
fn documented(heading: &str) -> Vec<[String; 3]> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/METRICS.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let row = |line: &str| -> [String; 3] {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        assert!(cells.len() == 4 && !cells[3].is_empty(), "{line}");
        [cells[0].trim_matches('`').to_owned(), cells[1].to_owned(), cells[2].to_owned()]
    };
    rows.map(row).collect()
}

fn names(heading: &str) -> Vec<String> {
    documented(heading).into_iter().map(|[name, ..]| name).collect()
}

#[test]
fn the_documentation_names_what_a_server_tells() {
    let server = Server::ready(&["florence.retain-bytes 1mb"]);
    let pictures = Pictures::serve();
    submit(&server, "job", &pictures.url("sign.png"), &["<OCR>"]);
    wait(&server, "job");
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let stats: HashMap<String, i64> = server.call(&["FLORENCE.STATS"]);
    assert_eq!(sorted(names("FLORENCE.STATS")), sorted(stats.into_keys().collect()));
    // INFO has the same under longer names, and what is in the table of its own.
    let info = info(&server).into_keys().filter(|name| !name.contains("percentiles"));
    let shared = names("FLORENCE.STATS").into_iter().map(|name| format!("florence_{name}"));
    let expected = shared.chain(names("INFO florence"));
    assert_eq!(sorted(info.collect()), sorted(expected.collect()));
    // Every histogram and every count of ends, by the fields of their rows.
    for (command, heading) in
        [("LATENCY", "FLORENCE.STATS LATENCY"), ("JOBS", "FLORENCE.STATS JOBS")]
    {
        let told: Vec<Map> = server.call(&["FLORENCE.STATS", command]);
        let fields: Vec<String> = told[0].keys().cloned().collect();
        assert_eq!(sorted(fields), sorted(names(heading)), "{command}");
    }
    let model: HashMap<String, Value> = server.call(&["FLORENCE.MODEL"]);
    assert_eq!(sorted(model.into_keys().collect()), sorted(names("FLORENCE.MODEL")));
    let hosts: Vec<Map> = server.call(&["FLORENCE.HOSTS"]);
    let fields: Vec<String> = hosts[0].keys().cloned().collect();
    assert_eq!(sorted(fields), sorted(names("FLORENCE.HOSTS")));
}

#[test]
fn types_and_units_are_those_that_names_and_values_show() {
    let server = Server::ready(&["florence.retain-bytes 1mb"]);
    let pictures = Pictures::serve();
    let stats = || -> HashMap<String, i64> { server.call(&["FLORENCE.STATS"]) };
    let before = stats();
    for i in 0..3 {
        let key = i.to_string();
        submit(&server, &key, &pictures.url("sign.png"), &["<OCR>", "THUMBNAIL", "32"]);
        wait(&server, &key);
    }
    let after = stats();
    for [name, kind, unit] in documented("FLORENCE.STATS") {
        let expected = if name.contains("_ms") {
            "milliseconds"
        } else if name.contains("bytes") || name.starts_with("memory") {
            "bytes"
        } else if name == "paused" || name == "model_ready" {
            "0 or 1"
        } else {
            unit.as_str()
        };
        assert_eq!(unit, expected, "{name}");
        assert!(["counter", "gauge"].contains(&kind.as_str()), "{name}: {kind}");
        assert!(kind == "gauge" || after[&name] >= before[&name], "{name} is no counter");
        let is_total = name.ends_with("_total") || name.starts_with("failed_");
        assert!(!is_total || kind == "counter", "{name}: {kind}");
    }
}
