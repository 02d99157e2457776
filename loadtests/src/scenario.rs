//! A scenario: what a load test asks for, as a small TOML file says it.

use std::{path::Path, time::Duration};

use anyhow::Context;
use serde::Deserialize;

/// A load and what its jobs are like.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// The file's name, without its ending.
    #[serde(skip)]
    pub(crate) name: String,
    /// One sentence for the report.
    pub(crate) about: String,
    pub(crate) load: Load,
    /// Asked in turns.
    #[serde(default = "caption")]
    pub(crate) prompts: Vec<String>,
    /// Given in turns.
    #[serde(default = "ordinary")]
    pub(crate) priorities: Vec<u8>,
    /// Sample pictures, taken in turns; every job takes the next picture and the next prompt once
    /// all pictures have been asked the present one.
    #[serde(default = "samples")]
    pub(crate) pictures: Vec<String>,
    /// How long the picture server takes for every picture.
    #[serde(default)]
    pub(crate) slow_ms: u64,
    /// Whether answers and encoded pictures may come from the server's caches.
    #[serde(default)]
    pub(crate) cache: bool,
    #[serde(default)]
    pub(crate) max_tokens: Option<usize>,
    #[serde(default)]
    pub(crate) beams: Option<usize>,
    /// What follows the prompt: words such as `THEN` and prompts, in turns.
    #[serde(default)]
    pub(crate) steps: Vec<String>,
    /// The models that are asked, in turns; none is the server's default.
    #[serde(default)]
    pub(crate) models: Vec<String>,
    /// Whether the text of each job goes to a stream while it is generated.
    #[serde(default)]
    pub(crate) stream: bool,
    /// How long the last jobs are waited for.
    #[serde(default = "patience")]
    pub(crate) patience_seconds: u64,
}

/// When jobs come in.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Load {
    /// At a fixed rate, whatever the server does.
    Open { rate: f64, seconds: f64 },
    /// As soon as one of so many clients has its answer.
    Closed { clients: usize, seconds: f64 },
    /// All at once.
    Burst { jobs: usize },
}

fn caption() -> Vec<String> {
    vec!["<CAPTION>".to_owned()]
}

fn ordinary() -> Vec<u8> {
    vec![0]
}

fn samples() -> Vec<String> {
    ["shapes.png", "sign.png", "poster.jpg", "tall.png"].map(str::to_owned).to_vec()
}

fn patience() -> u64 {
    120
}

/// What one job asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask<'a> {
    pub(crate) picture: &'a str,
    pub(crate) prompt: &'a str,
    pub(crate) priority: u8,
}

impl Scenario {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let mut scenario: Self =
            toml::from_str(&text).with_context(|| path.display().to_string())?;
        scenario.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let lists = [scenario.prompts.len(), scenario.priorities.len(), scenario.pictures.len()];
        anyhow::ensure!(!lists.contains(&0), "{}: a list is empty", path.display());
        Ok(scenario)
    }

    /// What the job of a number asks for.
    pub(crate) fn ask(&self, job: usize) -> Ask<'_> {
        let pictures = self.pictures.len();
        Ask {
            picture: &self.pictures[job % pictures],
            prompt: &self.prompts[job / pictures % self.prompts.len()],
            priority: self.priorities[job % self.priorities.len()],
        }
    }

    pub(crate) fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_seconds)
    }
}

impl Load {
    /// When the job of a number is due after the start; `None` after the last one.
    pub(crate) fn due(self, job: usize) -> Option<Due> {
        if self.jobs().is_some_and(|jobs| job >= jobs) {
            return None;
        }
        Some(match self {
            Self::Open { rate, .. } => Due::At(Duration::from_secs_f64(job as f64 / rate)),
            Self::Closed { seconds, .. } => {
                Due::WhenFree { until: Duration::from_secs_f64(seconds) }
            }
            Self::Burst { .. } => Due::At(Duration::ZERO),
        })
    }

    /// Jobs in all, where that is known before.
    pub(crate) fn jobs(self) -> Option<usize> {
        match self {
            #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "a count")]
            Self::Open { rate, seconds } => Some((rate * seconds).ceil().max(0.0) as usize),
            Self::Closed { .. } => None,
            Self::Burst { jobs } => Some(jobs),
        }
    }
}

/// When a job is to be submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    At(Duration),
    /// As soon as a client is free, but not after a moment.
    WhenFree {
        until: Duration,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scenarios_of_the_project_are_well_formed() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut count = 0;
        for entry in std::fs::read_dir(directory).expect("scenarios") {
            let path = entry.expect("an entry").path();
            let scenario = Scenario::read(&path).expect("a scenario");
            assert!(!scenario.about.is_empty() && scenario.load.due(0).is_some(), "{path:?}");
            count += 1;
        }
        assert!(count >= 8);
    }

    #[test]
    fn pictures_and_prompts_are_taken_in_turns() {
        let text = "about = 'x'\nprompts = ['<OD>', '<OCR>']\npictures = ['a', 'b']\n\
            load.open = { rate = 2, seconds = 2 }";
        let scenario: Scenario = toml::from_str(text).expect("a scenario");
        let asks: Vec<_> = (0..5).map(|job| scenario.ask(job)).collect();
        let pairs: Vec<_> = asks.iter().map(|ask| (ask.picture, ask.prompt)).collect();
        let expected =
            [("a", "<OD>"), ("b", "<OD>"), ("a", "<OCR>"), ("b", "<OCR>"), ("a", "<OD>")];
        assert_eq!(pairs, expected);
        assert_eq!(scenario.load.jobs(), Some(4));
        assert_eq!(scenario.load.due(3), Some(Due::At(Duration::from_millis(1500))));
    }

    #[test]
    fn a_typing_error_is_told() {
        let text = "about = 'x'\nload.burst = { job = 2 }";
        let error = toml::from_str::<Scenario>(text).expect_err("a typing error").to_string();
        assert!(error.contains("job"), "{error}");
    }
}
