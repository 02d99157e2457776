//! What is checked at the end: jobs, the stream of ended jobs, replicas and counters.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::OnceLock,
    thread::sleep,
    time::{Duration, Instant},
};

use florence_tests::{Server, eventually, picture};
use redis::Connection;

use super::{
    COUNTERS, Driver, FINAL, PICTURES, PROMPTS, STUCK,
    model::{Place, Question},
};

/// The right answers by picture and prompt, from a server that is left alone.
pub(super) fn answers() -> &'static HashMap<(usize, usize), String> {
    static ANSWERS: OnceLock<HashMap<(usize, usize), String>> = OnceLock::new();
    ANSWERS.get_or_init(|| {
        let server = Server::start();
        let mut connection = server.connect();
        let mut answers = HashMap::new();
        for (i, name) in PICTURES.iter().enumerate() {
            let bytes = std::fs::read(picture(name)).unwrap();
            for (j, prompt) in PROMPTS.iter().enumerate() {
                let mut submit = redis::cmd("FLORENCE.SUBMIT");
                submit.arg("*").arg("DATA").arg(&bytes).arg(prompt);
                let key: String = submit.query(&mut connection).unwrap();
                let mut wait = redis::cmd("FLORENCE.WAIT");
                wait.arg(&key).arg(60).exec(&mut connection).unwrap();
                let answer: String = server.call(&["FLORENCE.GET", &key, "RESULT"]);
                answers.insert((i, j), answer);
            }
        }
        let different: BTreeSet<&String> = answers.values().collect();
        assert_eq!(different.len(), answers.len(), "answers can be told apart");
        answers
    })
}

impl Driver {
    /// A job as GET shows it.
    fn job(connection: &mut Connection, place: &Place) -> HashMap<String, Option<String>> {
        let mut both = redis::pipe();
        both.cmd("SELECT").arg(place.0).ignore().cmd("FLORENCE.GET").arg(&place.1);
        let (job,): (Option<HashMap<String, Option<String>>>,) = both.query(connection).unwrap();
        job.unwrap_or_default()
    }

    /// Waits until all jobs have ended, or none has for a while. Returns those that have not.
    fn drain(&mut self) -> Vec<Place> {
        let mut open: Vec<Place> = self.model.jobs.keys().cloned().collect();
        let mut connection = self.fleet.master().connect();
        let mut last_end = Instant::now();
        while !open.is_empty() && last_end.elapsed() < STUCK {
            let before = open.len();
            open.retain(|place| {
                let state = Self::job(&mut connection, place).remove("state").flatten();
                state.is_some_and(|state| !FINAL.contains(&state.as_str()))
            });
            if open.len() < before {
                last_end = Instant::now();
            }
            sleep(Duration::from_millis(100));
        }
        open
    }

    fn problem(&mut self, problem: &str, place: &Place) {
        let story = self.model.jobs[place].story.join("\n    ");
        let log = self.mentions(&place.1).join("\n      ");
        self.problems.push(format!("{place:?} {problem}\n    {story}\n      {log}"));
    }

    /// Checks the jobs under their keys. Returns how many were given up after two kills.
    pub(super) fn check_jobs(&mut self) -> usize {
        let mut given_up = 0;
        let mut connection = self.fleet.master().connect();
        let stuck = self.drain();
        let places: Vec<Place> = self.model.jobs.keys().cloned().collect();
        for place in &places {
            let shown = Self::job(&mut connection, place);
            let text = |name: &str| shown.get(name).cloned().flatten().unwrap_or_default();
            let job = &self.model.jobs[place];
            let question = job.question.clone();
            let is_same =
                text("image") == question.image && text("prompt") == PROMPTS[question.prompt];
            if shown.is_empty() {
                self.problem("is lost", place);
            } else if !is_same {
                self.problem(&format!("is another job, not {question:?}: {shown:?}"), place);
            } else if stuck.contains(place) {
                self.problem(&format!("is stuck: {shown:?}"), place);
            } else if text("error").contains("\"CRASH\"") && job.deaths >= 2 {
                given_up += 1;
            } else if text("state") != "done" {
                self.problem(&format!("did not end well: {shown:?}"), place);
            } else if text("result") != answers()[&(question.picture, question.prompt)] {
                let result = text("result");
                self.problem(&format!("has the answer of another: {question:?}: {result}"), place);
            }
            if !stuck.contains(place) {
                let state = text("state");
                self.model.observe(place, &state);
            }
        }
        let master = self.fleet.master();
        let (waiting, active) = (master.stat("jobs_waiting"), master.stat("jobs_active"));
        if (waiting, active) != (0, 0) {
            let problem = format!("{waiting} jobs wait and {active} are active in the end");
            self.problems.push(problem);
        }
        for db in 0..2 {
            redis::cmd("SELECT").arg(db).exec(&mut connection).unwrap();
            let keys: Vec<String> = redis::cmd("KEYS").arg("k*").query(&mut connection).unwrap();
            let unknown = keys.into_iter().filter(|key| !places.contains(&(db, key.clone())));
            self.problems.extend(unknown.map(|key| format!("{key} in {db} is nobody's")));
        }
        given_up
    }

    /// Checks the stream of ended jobs: each end once, with the right answer. Returns their number.
    pub(super) fn check_ends(&mut self) -> usize {
        let places: Vec<Place> = self.model.jobs.keys().cloned().collect();
        let mut model = self.model.clone();
        for place in &places {
            model.leave(place);
        }
        let mut ends: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for db in 0..2 {
            let mut connection = self.fleet.master().connect_to(db);
            let mut range = redis::cmd("XRANGE");
            let entries: Vec<(String, HashMap<String, String>)> =
                range.arg("ended").arg("-").arg("+").query(&mut connection).unwrap();
            for (_, entry) in entries {
                ends.entry(entry["id"].clone()).or_default().push(entry["job"].clone());
            }
        }
        for (key, jobs) in &ends {
            let (least, most) = model.ends.get(key).copied().unwrap_or_default();
            if !(least..=most).contains(&jobs.len()) {
                let count = jobs.len();
                let story = self.mentions(key).join("\n    ");
                let problem = format!("{key} ended {count} times, not {least} to {most}");
                self.problems.push(format!("{problem}: {jobs:#?}\n    {story}"));
            }
            let asked = model.asked.get(key).map(Vec::as_slice).unwrap_or_default();
            let wrong = jobs.iter().filter(|job| !is_right(job, asked));
            let told = |job| format!("{key} was told with the answer of another: {job}");
            self.problems.extend(wrong.map(told));
        }
        for (key, (least, _)) in &model.ends {
            if *least > 0 && !ends.contains_key(key) {
                let story = self.mentions(key).join("\n    ");
                let problem = format!("{key} ended {least} times, and the stream has none");
                self.problems.push(format!("{problem}\n    {story}"));
            }
        }
        ends.values().map(Vec::len).sum()
    }

    /// Checks that the replicas have the same data as the master.
    pub(super) fn check_replicas(&mut self) {
        eventually("the replicas are in step", || self.fleet.is_whole().then_some(()));
        let digests = || -> BTreeSet<String> {
            self.fleet.servers.iter().map(|server| server.call(&["DEBUG", "DIGEST"])).collect()
        };
        let start = Instant::now();
        while digests().len() > 1 {
            if start.elapsed() > Duration::from_secs(10) {
                self.problems.push("replicas differ from their master".to_owned());
                return;
            }
            sleep(Duration::from_millis(100));
        }
    }

    pub(super) fn check_counters(&mut self) {
        for i in 0..self.fleet.servers.len() {
            self.note_counters(i);
        }
        for name in COUNTERS {
            match self.counters.get(name) {
                Some(0) => {}
                Some(count) => self.problems.push(format!("{name} is {count}")),
                None => self.problems.push(format!("FLORENCE.STATS has no {name}")),
            }
        }
    }
}

/// Whether a job in the stream, if done, has the answer to a question asked under its key.
fn is_right(job: &str, asked: &[Question]) -> bool {
    let job: serde_json::Value = serde_json::from_str(job).unwrap();
    let is_its = |question: &Question| {
        let answer = &answers()[&(question.picture, question.prompt)];
        let answer: serde_json::Value = serde_json::from_str(answer).unwrap();
        job["image"] == question.image.as_str()
            && job["prompt"] == PROMPTS[question.prompt]
            && job["result"] == answer
    };
    job["state"] != "done" || asked.iter().any(is_its)
}
