//! What a run came to: a table for the terminal, JSON, and a page with plots.

use std::{collections::BTreeMap, path::Path};

use hdrhistogram::Histogram;
use plotters::prelude::*;
use serde::Serialize;

use crate::drive::{End, Record, Run};

/// A run in figures.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) scenario: String,
    pub(crate) about: String,
    pub(crate) jobs: usize,
    /// By state; `refused` and `missing` besides those of the server.
    pub(crate) ends: BTreeMap<String, usize>,
    /// What the caches spared, by verdict.
    pub(crate) cache: BTreeMap<String, usize>,
    /// Answers a second, from the first job's due time to the last answer.
    pub(crate) answers_per_second: f64,
    pub(crate) latency_ms: Percentiles,
    /// Where the scenario has several.
    pub(crate) latency_ms_by_prompt: BTreeMap<String, Percentiles>,
    pub(crate) latency_ms_by_priority: BTreeMap<u8, Percentiles>,
    pub(crate) submit_ms: Percentiles,
    pub(crate) ping_ms: Percentiles,
    pub(crate) most_waiting: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) most: f64,
}

impl Percentiles {
    /// Of times in seconds, in milliseconds.
    fn of(seconds: impl Iterator<Item = f64>) -> Self {
        const MOST: u64 = 86_400_000_000;
        let mut histogram =
            Histogram::<u64>::new_with_max(MOST, 3).expect("three digits and a day are allowed");
        for seconds in seconds {
            #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "a time")]
            histogram.saturating_record((seconds * 1e6).max(0.0) as u64);
        }
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), most: at(1.0) }
    }
}

/// From when a job was due to its answer.
fn latency(job: &Record) -> Option<f64> {
    match &job.end {
        End::Ended { at, state, .. } if state == "done" => Some(at - job.due),
        _ => None,
    }
}

fn by<K: Ord + Clone>(jobs: &[Record], key: impl Fn(&Record) -> K) -> BTreeMap<K, Percentiles> {
    let mut groups: BTreeMap<K, Vec<f64>> = BTreeMap::new();
    for job in jobs {
        groups.entry(key(job)).or_default().extend(latency(job));
    }
    if groups.len() < 2 {
        return BTreeMap::new();
    }
    groups.into_iter().map(|(key, times)| (key, Percentiles::of(times.into_iter()))).collect()
}

impl Percentiles {
    fn cells(self, between: &str) -> String {
        let Self { p50, p90, p99, p999, most } = self;
        [p50, p90, p99, p999, most].map(|time| format!("{time:.1}")).join(between)
    }
}

impl Summary {
    pub(crate) fn of(run: &Run) -> Self {
        let (mut ends, mut cache) = (BTreeMap::new(), BTreeMap::new());
        let mut last = 0.0f64;
        for job in &run.jobs {
            let state = match &job.end {
                End::Refused => "refused",
                End::Missing => "missing",
                End::Ended { at, state, cache: verdict } => {
                    last = last.max(*at);
                    *cache.entry(verdict.clone()).or_default() += 1;
                    state
                }
            };
            *ends.entry(state.to_owned()).or_default() += 1;
        }
        let answers = ends.get("done").copied().unwrap_or_default();
        Self {
            scenario: run.scenario.name.clone(),
            about: run.scenario.about.clone(),
            jobs: run.jobs.len(),
            ends,
            cache,
            answers_per_second: if last > 0.0 { answers as f64 / last } else { 0.0 },
            latency_ms: Percentiles::of(run.jobs.iter().filter_map(latency)),
            latency_ms_by_prompt: by(&run.jobs, |job| job.prompt.clone()),
            latency_ms_by_priority: by(&run.jobs, |job| job.priority),
            submit_ms: Percentiles::of(run.jobs.iter().map(|job| job.submit)),
            ping_ms: Percentiles::of(run.pings.iter().map(|(_, time)| *time)),
            most_waiting: run.samples.iter().map(|sample| sample.waiting).max().unwrap_or(0),
        }
    }

    /// Rows of figures: name, percentiles.
    fn rows(&self) -> Vec<(String, Percentiles)> {
        let mut rows = vec![("answer".to_owned(), self.latency_ms)];
        let prompts = self.latency_ms_by_prompt.iter();
        rows.extend(prompts.map(|(prompt, times)| (format!("answer to {prompt}"), *times)));
        let priorities = self.latency_ms_by_priority.iter();
        rows.extend(priorities.map(|(n, times)| (format!("answer at priority {n}"), *times)));
        rows.push(("reply of SUBMIT".to_owned(), self.submit_ms));
        rows.push(("reply of PING".to_owned(), self.ping_ms));
        rows
    }

    fn counts(&self) -> String {
        let list = |counts: &BTreeMap<String, usize>| {
            let parts = counts.iter().map(|(name, count)| format!("{count} {name}"));
            parts.collect::<Vec<_>>().join(", ")
        };
        format!(
            "{} jobs: {}; cache: {}; {:.1} answers a second; at most {} waiting",
            self.jobs,
            list(&self.ends),
            list(&self.cache),
            self.answers_per_second,
            self.most_waiting
        )
    }

    /// For the terminal, and for Markdown.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("{}: {}\n{}\n\n", self.scenario, self.about, self.counts());
        text += "| ms | p50 | p90 | p99 | p99.9 | most |\n|---|---|---|---|---|---|\n";
        for (name, times) in self.rows() {
            text.extend(["| ", &name, " | ", &times.cells(" | "), " |\n"]);
        }
        text
    }
}

/// Values over time, one of each second.
type Series = Vec<(f64, f64)>;

/// A plot: its title and unit, its lines with their names.
type Plot = (&'static str, &'static str, Vec<(&'static str, Series)>);

fn plots(run: &Run) -> Vec<Plot> {
    let ended = |job: &Record| match &job.end {
        End::Ended { at, .. } => Some(*at),
        _ => None,
    };
    let answers: Vec<(f64, f64)> =
        run.jobs.iter().filter_map(|job| Some((ended(job)?, 1.0))).collect();
    let due: Vec<(f64, f64)> = run.jobs.iter().map(|job| (job.due, 1.0)).collect();
    let latencies: Vec<(f64, f64)> =
        run.jobs.iter().filter_map(|job| Some((ended(job)?, latency(job)?))).collect();
    let count = |values: &[f64]| values.len() as f64;
    let quantile = |values: &[f64], pick: fn(Percentiles) -> f64| {
        pick(Percentiles::of(values.iter().copied()))
    };
    let p50 = |values: &[f64]| quantile(values, |times| times.p50);
    let p99 = |values: &[f64]| quantile(values, |times| times.p99);
    let depth = |pick: fn(&crate::drive::Sample) -> usize| -> Series {
        run.samples.iter().map(|sample| (sample.at, pick(sample) as f64)).collect()
    };
    vec![
        (
            "Jobs",
            "a second",
            vec![("due", seconds(&due, count)), ("ended", seconds(&answers, count))],
        ),
        (
            "Time to the answer",
            "ms",
            vec![("p50", seconds(&latencies, p50)), ("p99", seconds(&latencies, p99))],
        ),
        (
            "Jobs in the server",
            "",
            vec![("waiting", depth(|s| s.waiting)), ("at work", depth(|s| s.active))],
        ),
        ("PING", "ms", vec![("p50", seconds(&run.pings, p50)), ("p99", seconds(&run.pings, p99))]),
    ]
}

/// One value of all that fell into each second.
fn seconds(events: &[(f64, f64)], value: impl Fn(&[f64]) -> f64) -> Series {
    let mut buckets: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (at, x) in events {
        #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "a time")]
        buckets.entry(at.max(0.0) as u64).or_default().push(*x);
    }
    let Some(last) = buckets.keys().next_back().copied() else { return Vec::new() };
    (0..=last)
        .map(|second| (second as f64, value(buckets.get(&second).map_or(&[], Vec::as_slice))))
        .collect()
}

const SIZE: (u32, u32) = (560, 260);

fn draw(title: &str, unit: &str, lines: &[(&'static str, Series)]) -> anyhow::Result<String> {
    let mut svg = String::new();
    let most = |pick: fn(&(f64, f64)) -> f64| {
        lines.iter().flat_map(|(_, line)| line).map(pick).fold(1e-3, f64::max)
    };
    let (end, top) = (most(|point| point.0).max(1.0), most(|point| point.1) * 1.05);
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 16))
            .margin(8)
            .x_label_area_size(32)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..end, 0.0..top)?;
        chart.configure_mesh().x_desc("seconds").y_desc(unit).light_line_style(WHITE).draw()?;
        for (i, (name, line)) in lines.iter().enumerate() {
            let color = [RGBColor(31, 119, 180), RGBColor(214, 110, 20)][i % 2];
            chart
                .draw_series(LineSeries::new(line.iter().copied(), color.stroke_width(2)))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK.mix(0.3))
            .background_style(WHITE)
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

/// A page with all runs, which needs nothing but itself.
pub(crate) fn write_page(path: &Path, runs: &[(Run, Summary)]) -> anyhow::Result<()> {
    let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
    let mut page = "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Florence under load\
        </title><style>body{font:15px/1.5 system-ui,sans-serif;max-width:1160px;margin:2em auto;\
        padding:0 1em;color:#222}table{border-collapse:collapse}td,th{padding:.2em .9em;\
        text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
        </style><h1>Florence under load</h1>"
        .to_owned();
    for (run, summary) in runs {
        let (name, about) = (escape(&summary.scenario), escape(&summary.about));
        let counts = escape(&summary.counts());
        page.extend(["<h2>", &name, "</h2><p>", &about, "<br>", &counts, "</p>"]);
        page += "<table><tr><th>ms</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>most</th></tr>";
        for (name, times) in summary.rows() {
            let cells = times.cells("</td><td>");
            page.extend(["<tr><td>", &escape(&name), "</td><td>", &cells, "</td></tr>"]);
        }
        page += "</table><p>";
        for (title, unit, lines) in plots(run) {
            page += &draw(title, unit, &lines)?;
        }
        page += "</p>";
    }
    std::fs::write(path, page)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{drive::Sample, scenario::Scenario};

    fn run() -> Run {
        let scenario: Scenario =
            toml::from_str("about = 'a < b'\nload.burst = { jobs = 4 }").expect("a scenario");
        let job = |due: f64, prompt: &str, end: End| Record {
            due,
            prompt: prompt.to_owned(),
            priority: 0,
            submit: 0.001,
            end,
        };
        let done = |at| End::Ended { at, state: "done".to_owned(), cache: "miss".to_owned() };
        Run {
            scenario,
            jobs: vec![
                job(0.0, "<OD>", done(0.5)),
                job(1.0, "<OCR>", done(4.0)),
                job(1.0, "<OD>", End::Refused),
                job(2.0, "<OD>", End::Missing),
            ],
            samples: vec![Sample { at: 0.1, waiting: 3, active: 1 }],
            pings: vec![(0.0, 0.002), (1.0, 0.004)],
        }
    }

    #[test]
    fn latencies_count_from_when_a_job_was_due() {
        let summary = Summary::of(&run());
        assert!((summary.latency_ms.p50 - 500.0).abs() < 1.0, "{summary:?}");
        assert!((summary.latency_ms.most - 3000.0).abs() < 2.0);
        assert!((summary.answers_per_second - 0.5).abs() < 1e-9);
        let ends: Vec<_> = summary.ends.iter().map(|(end, n)| (end.as_str(), *n)).collect();
        assert_eq!(ends, [("done", 2), ("missing", 1), ("refused", 1)]);
        assert_eq!(summary.latency_ms_by_prompt.len(), 2);
        assert!(summary.latency_ms_by_priority.is_empty() && summary.most_waiting == 3);
        assert!(summary.table().contains("| answer to <OCR> | 3000."));
    }

    #[test]
    fn the_page_needs_nothing_but_itself() {
        let (run, path) = (run(), std::env::temp_dir().join("florence-load-page.html"));
        let summary = Summary::of(&run);
        write_page(&path, &[(run, summary)]).expect("a page");
        let page = std::fs::read_to_string(&path).expect("the page");
        assert_eq!(page.matches("<svg").count(), 4);
        assert!(page.contains("a &lt; b") && !page.contains("src="));
    }
}
