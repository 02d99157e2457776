//! The model: which job should be under which key, and how often each key's jobs have ended.

use std::collections::{BTreeMap, HashMap};

use super::{FINAL, steps::Step};

/// Database and key.
pub(super) type Place = (usize, String);

/// Whether a job has ended, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    No,
    Perhaps,
    Yes,
}

/// What a job asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// The image argument, as GET shows it.
    pub(super) image: String,
    pub(super) picture: usize,
    pub(super) prompt: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) question: Question,
    pub(super) ended: Ended,
    /// What `ended` was when the job came to its key.
    arrived: Ended,
    /// How often a server was killed that may have been running it.
    pub(super) deaths: usize,
    pub(super) story: Vec<String>,
}

/// Which job should be under which key, and how often each key's jobs have ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub(super) jobs: BTreeMap<Place, Job>,
    /// Places in the order in which jobs came to them; the latest jobs are likely to be unfinished.
    pub(super) recent: Vec<Place>,
    /// The fewest and the most ends that the stream may have for a key.
    pub(super) ends: BTreeMap<String, (usize, usize)>,
    /// Every question that was ever asked under a key.
    pub(super) asked: HashMap<String, Vec<Question>>,
    pub(super) is_swapped: bool,
    pub(super) names: usize,
}

impl Model {
    pub(super) fn name(&mut self) -> String {
        self.names += 1;
        format!("k{}", self.names)
    }

    fn arrive(&mut self, place: Place, mut job: Job, note: &str) {
        job.arrived = job.ended;
        job.story.push(note.to_owned());
        self.asked.entry(place.1.clone()).or_default().push(job.question.clone());
        self.recent.push(place.clone());
        self.jobs.insert(place, job);
    }

    /// Takes a job from its place, and counts the end that it may have had there.
    pub(super) fn leave(&mut self, place: &Place) -> Option<Job> {
        let job = self.jobs.remove(place)?;
        let (least, most) = self.ends.entry(place.1.clone()).or_default();
        match (job.arrived, job.ended) {
            (Ended::Yes, _) | (_, Ended::No) => {}
            (Ended::No, Ended::Yes) => {
                *least += 1;
                *most += 1;
            }
            (Ended::Perhaps, _) | (_, Ended::Perhaps) => *most += 1,
        }
        Some(job)
    }

    /// Records a state that was read. False if it is not final although the job had ended.
    pub(super) fn observe(&mut self, place: &Place, state: &str) -> bool {
        let Some(job) = self.jobs.get_mut(place) else { return true };
        if FINAL.contains(&state) {
            job.ended = Ended::Yes;
            return true;
        }
        let is_new = job.ended != Ended::Yes;
        (job.ended, job.arrived) = (Ended::No, Ended::No);
        is_new
    }

    /// From now on it is unknown whether the job has ended.
    pub(super) fn doubt(&mut self, place: &Place) {
        if let Some(job) = self.jobs.get_mut(place).filter(|job| job.ended == Ended::No) {
            job.ended = Ended::Perhaps;
        }
    }

    pub(super) fn apply(&mut self, step: &Step, note: &str) {
        let target = step.target();
        match step {
            Step::Submit { question, .. } => {
                let (question, story) = (question.clone(), vec![]);
                let (ended, arrived) = (Ended::No, Ended::No);
                let job = Job { question, ended, arrived, deaths: 0, story };
                self.arrive(target.unwrap(), job, note);
            }
            Step::Rename { db, from: key, .. } | Step::Move { db, key } => {
                let job = self.leave(&(*db, key.clone())).unwrap();
                self.leave(&target.clone().unwrap());
                self.arrive(target.unwrap(), job, note);
            }
            Step::Copy { db, from, .. } | Step::Clone { db, from, .. } => {
                let job = self.jobs[&(*db, from.clone())].clone();
                self.leave(&target.clone().unwrap());
                self.arrive(target.unwrap(), job, note);
            }
            Step::Restore { job, .. } => {
                self.leave(&target.clone().unwrap());
                self.arrive(target.unwrap(), (**job).clone(), note);
            }
            Step::Swap => {
                let other = |(db, key): Place| (1 - db, key);
                let jobs = std::mem::take(&mut self.jobs).into_iter();
                self.jobs = jobs.map(|(place, job)| (other(place), job)).collect();
                self.recent = self.recent.drain(..).map(other).collect();
                self.is_swapped = !self.is_swapped;
            }
            Step::Edit { key, question, .. } => {
                let job = self.jobs.get_mut(&target.unwrap()).unwrap();
                if job.ended == Ended::No {
                    job.question = question.clone();
                    job.story.push(note.to_owned());
                    self.asked.entry(key.clone()).or_default().push(question.clone());
                }
            }
        }
    }
}
