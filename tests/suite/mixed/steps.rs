//! Changes to the keys: what they are, and how they are chosen at random.

use std::fmt;

use florence_tests::picture;

use super::{
    Driver, PICTURES, PROMPTS,
    model::{Job, Model, Place, Question},
    random::Random,
    requests::Form,
};

/// One change to the keys.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Submit {
        key: String,
        question: Question,
        options: Vec<String>,
    },
    Rename {
        db: usize,
        from: String,
        to: String,
    },
    Copy {
        db: usize,
        from: String,
        to_db: usize,
        to: String,
    },
    Move {
        db: usize,
        key: String,
    },
    Swap,
    /// RESTORE of an earlier DUMP; `job` is as it was then.
    Restore {
        db: usize,
        to: String,
        payload: Vec<u8>,
        job: Box<Job>,
    },
    /// RESTORE of a fresh DUMP; only in a script.
    Clone {
        db: usize,
        from: String,
        to: String,
    },
    /// Sets another picture and prompt, unless the job has ended; only in a script.
    Edit {
        db: usize,
        key: String,
        question: Question,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Submit { key, question, options } => {
                let (image, prompt) = (&question.image, PROMPTS[question.prompt]);
                write!(f, "SUBMIT {key} {image} {prompt} {}", options.join(" "))
            }
            Self::Rename { db, from, to } => write!(f, "{db}: RENAME {from} {to}"),
            Self::Copy { db, from, to_db, to } => {
                write!(f, "{db}: COPY {from} {to} DB {to_db} REPLACE")
            }
            Self::Move { db, key } => write!(f, "{db}: MOVE {key} {}", 1 - db),
            Self::Swap => write!(f, "SWAPDB 0 1"),
            Self::Restore { db, to, .. } => write!(f, "{db}: RESTORE {to} of an older DUMP"),
            Self::Clone { db, from, to } => write!(f, "{db}: DUMP {from}, RESTORE {to} REPLACE"),
            Self::Edit { db, key, question } => {
                write!(f, "{db}: HSET {key} {} {}", question.image, PROMPTS[question.prompt])
            }
        }
    }
}

impl Step {
    /// The places whose jobs it reads, changes or removes.
    pub(super) fn places(&self) -> Vec<Place> {
        match self {
            Self::Submit { .. } | Self::Swap => vec![],
            Self::Rename { db, from, to } | Self::Clone { db, from, to } => {
                vec![(*db, from.clone()), (*db, to.clone())]
            }
            Self::Copy { db, from, to_db, to } => {
                vec![(*db, from.clone()), (*to_db, to.clone())]
            }
            Self::Move { db, key } | Self::Edit { db, key, .. } => vec![(*db, key.clone())],
            Self::Restore { db, to, .. } => vec![(*db, to.clone())],
        }
    }

    /// Where a job must be afterwards.
    pub(super) fn target(&self) -> Option<Place> {
        Some(match self {
            Self::Submit { key, .. } => (0, key.clone()),
            Self::Rename { db, to, .. }
            | Self::Clone { db, to, .. }
            | Self::Restore { db, to, .. } => (*db, to.clone()),
            Self::Copy { to_db, to, .. } => (*to_db, to.clone()),
            Self::Move { db, key } => (1 - db, key.clone()),
            Self::Edit { db, key, .. } => (*db, key.clone()),
            Self::Swap => return None,
        })
    }

    fn needs_script(&self) -> bool {
        matches!(self, Self::Clone { .. } | Self::Edit { .. })
    }

    /// The database to select, and the command to send.
    pub(super) fn command(&self) -> (usize, Vec<Vec<u8>>) {
        let words = |words: &[&str]| words.iter().map(|word| word.as_bytes().to_vec()).collect();
        match self {
            Self::Submit { key, question, options } => {
                let mut command: Vec<Vec<u8>> = words(&["FLORENCE.SUBMIT", key, &question.image]);
                if question.image == "DATA" {
                    command.push(std::fs::read(picture(PICTURES[question.picture])).unwrap());
                }
                command.push(PROMPTS[question.prompt].into());
                command.extend(options.iter().map(|option| option.clone().into_bytes()));
                (0, command)
            }
            Self::Rename { db, from, to } => (*db, words(&["RENAME", from, to])),
            Self::Copy { db, from, to_db, to } => {
                (*db, words(&["COPY", from, to, "DB", &to_db.to_string(), "REPLACE"]))
            }
            Self::Move { db, key } => (*db, words(&["MOVE", key, &(1 - db).to_string()])),
            Self::Swap => (0, words(&["SWAPDB", "0", "1"])),
            Self::Restore { db, to, payload, .. } => {
                let mut command: Vec<Vec<u8>> = words(&["RESTORE", to, "0"]);
                command.extend([payload.clone(), "REPLACE".into()]);
                (*db, command)
            }
            Self::Clone { db, from, to } => (*db, words(&["CLONE", from, to])),
            Self::Edit { db, key, question } => {
                (*db, words(&["EDIT", key, &question.image, PROMPTS[question.prompt]]))
            }
        }
    }
}

impl Driver {
    /// A place that has a job, usually one of the latest.
    pub(super) fn some_job(random: &mut Random, model: &Model) -> Option<Place> {
        let exists = |place: &&Place| model.jobs.contains_key(*place);
        let young: Vec<&Place> = model.recent.iter().rev().filter(exists).take(10).collect();
        if young.is_empty() {
            return None;
        }
        if random.percent(85) {
            return Some((*random.pick(&young)).clone());
        }
        model.jobs.keys().nth(random.below(model.jobs.len())).cloned()
    }

    fn question(&mut self, may_be_sent: bool) -> Question {
        let (picture, prompt) =
            (self.random.below(PICTURES.len()), self.random.below(PROMPTS.len()));
        let name = PICTURES[picture];
        let image = match self.random.below(100) {
            0..25 if may_be_sent => "DATA".to_owned(),
            0..70 => {
                let path = format!("slow/{}/{name}", 50 + self.random.below(550));
                self.pictures.url(&path)
            }
            _ => self.pictures.url(name),
        };
        Question { image, picture, prompt }
    }

    /// A random change that the model allows.
    fn step(&mut self, model: &mut Model) -> Option<Step> {
        let (db, from) = Self::some_job(&mut self.random, model)?;
        let other = Self::some_job(&mut self.random, model)?;
        // The target: a new key, or one in the same database that has a job.
        let to = if self.random.percent(50) && other.0 == db && other.1 != from {
            other.1.clone()
        } else {
            model.name()
        };
        let swap = if model.is_swapped { 85 } else { 95 };
        Some(match self.random.below(100) {
            chance if chance >= swap => Step::Swap,
            0..30 => Step::Rename { db, from, to },
            30..44 if other != (db, from.clone()) => {
                let (to_db, to) = if self.random.percent(60) { other } else { (1 - db, to) };
                Step::Copy { db, from, to_db, to }
            }
            44..54 if !model.jobs.contains_key(&(1 - db, from.clone())) => {
                Step::Move { db, key: from }
            }
            54..68 if !self.shelf.is_empty() => {
                let (payload, mut job, epoch) = self.random.pick(&self.shelf).clone();
                // If the payload is from an earlier epoch and tells of a run, the server takes that
                // run for one that was killed.
                job.deaths += usize::from(epoch != self.epoch);
                Step::Restore { db, to, payload, job: Box::new(job) }
            }
            54..74 if to != from => Step::Clone { db, from, to },
            _ if model.jobs[&(db, from.clone())].question.image != "DATA" => {
                Step::Edit { db, key: from, question: self.question(false) }
            }
            _ => Step::Rename { db, from, to: model.name() },
        })
    }

    /// A new job.
    pub(super) fn submission(&mut self) -> Step {
        let (key, question) = (self.model.name(), self.question(true));
        let mut options = vec!["RETRIES".to_owned(), "20".to_owned()];
        let mut option = |name: &str, value: usize| {
            options.extend([name.to_owned(), value.to_string()]);
        };
        if self.random.percent(30) {
            option("PRIORITY", self.random.below(10));
        }
        if self.random.percent(25) {
            option("DELAY", 10 + self.random.below(300));
        }
        if self.random.percent(60) {
            options.push("NOCACHE".to_owned());
        }
        Step::Submit { key, question, options }
    }

    /// One change to the keys, or several at once; `None` while there is no job.
    pub(super) fn plan(&mut self) -> Option<(Vec<Step>, Form)> {
        let mut model = self.model.clone();
        let count = if self.random.percent(30) { 2 + self.random.below(3) } else { 1 };
        let mut steps = Vec::new();
        for _ in 0..count {
            let step = self.step(&mut model)?;
            model.apply(&step, "");
            steps.push(step);
        }
        self.model.names = model.names;
        // Bare only if its effect shows that it took place, or if no reply can get lost.
        let is_plain = matches!(steps[..], [Step::Rename { .. } | Step::Move { .. }])
            || self.fleet.sentinels.is_empty();
        let form = match self.random.below(100) {
            _ if steps.iter().any(Step::needs_script) => Form::Script,
            0..35 if steps.len() == 1 && is_plain => Form::Bare,
            0..70 => Form::Multi,
            _ => Form::Script,
        };
        Some((steps, form))
    }
}
