//! The loop over made-up time: a machine that takes as long as it says, and fails where it is told.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use super::{
    machine::{Machine, RequestId},
    *,
};
use crate::image::Orientation;

const MS: Duration = Duration::from_millis(1);
/// How long the machine takes for a picture, a prompt and a step.
const VISION: Duration = Duration::from_millis(80);
const ENCODER: Duration = Duration::from_millis(0);
const STEP: Duration = Duration::from_millis(4);

/// Questions with these ids are trouble.
const FAILS: u32 = 666;
const PANICS: u32 = 667;
const PANICS_IN_ENCODER: u32 = 668;
/// With this one the machine is lost for all others too.
const LOSES: u32 = 669;

/// What happened, in order.
type Diary = Rc<RefCell<Vec<String>>>;

struct Fake {
    now: Rc<Cell<Instant>>,
    diary: Diary,
    /// Requests in the batch: the question's id, and steps until its answer.
    running: Vec<(RequestId, u32, u32)>,
    steps: u32,
    /// Digits that were told.
    told: BTreeMap<RequestId, usize>,
    pictures_at_once: usize,
    is_lost: bool,
}

impl Fake {
    fn spend(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }
}

impl Machine for Fake {
    fn now(&self) -> Instant {
        self.now.get()
    }

    fn pictures_at_once(&self) -> usize {
        self.pictures_at_once
    }

    fn visuals(&mut self, pictures: &[&Picture]) -> Result<Vec<Visual>, Error> {
        self.spend(VISION);
        let count =
            if pictures.len() == 1 { String::new() } else { format!(" {}", pictures.len()) };
        self.diary.borrow_mut().push(format!("vision{count}"));
        Ok(pictures.iter().map(|_| Visual::made_up()).collect())
    }

    fn kv_cache_bytes(&self, question: &Question, _options: &GenerateOptions) -> u64 {
        question.id().into()
    }

    fn join(
        &mut self,
        id: RequestId,
        question: &Question,
        _visual: &Visual,
        _options: &GenerateOptions,
    ) -> Result<(), Error> {
        self.spend(ENCODER);
        assert_ne!(question.id(), PANICS_IN_ENCODER, "in the encoder");
        self.running.push((id, question.id(), self.steps));
        Ok(())
    }

    fn step(&mut self) -> Result<Vec<(RequestId, Answer)>, Error> {
        self.spend(STEP);
        self.diary.borrow_mut().push(format!("step {}", self.running.len()));
        if self.running.iter().any(|(_, question, _)| *question == FAILS) {
            return Err(Error::Cancelled);
        }
        self.is_lost |= self.running.iter().any(|(_, question, _)| *question == LOSES);
        if self.is_lost {
            return Err(Error::Cancelled);
        }
        assert!(self.running.iter().all(|(_, question, _)| *question != PANICS), "in a step");
        for request in &mut self.running {
            request.2 -= 1;
        }
        let answered = self.running.extract_if(.., |request| request.2 == 0);
        Ok(answered.map(|(id, question, _)| (id, Answer::made_up(question))).collect())
    }

    /// A digit of the question's id each step.
    fn tell(&mut self, wanted: &dyn Fn(RequestId) -> bool, tell: &mut dyn FnMut(RequestId, &str)) {
        for (id, question, left) in self.running.iter().filter(|(id, ..)| wanted(*id)) {
            let (text, step) = (question.to_string(), (self.steps - left) as usize);
            // One that listens late is told from the beginning.
            let told = self.told.entry(*id).or_default();
            if let Some(more) = text.get(*told..step) {
                tell(*id, more);
                *told = step;
            }
        }
    }

    fn retain(&mut self, keep: &dyn Fn(RequestId) -> bool) {
        self.running.retain(|(id, ..)| keep(*id));
    }

    fn check(&mut self) -> Result<(), Error> {
        if self.is_lost { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn clear(&mut self) {
        self.running.clear();
        self.told.clear();
    }
}

/// An asker with a name, which writes into the diary how it fares.
struct Client {
    name: &'static str,
    wants: Rc<Cell<Wants>>,
    diary: Diary,
    listens: bool,
    has_ended: Cell<bool>,
    waited: Rc<Cell<Duration>>,
}

impl Client {
    fn write(&self, text: &str) {
        self.diary.borrow_mut().push(format!("{}: {text}", self.name));
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !self.has_ended.get() {
            self.write("dropped");
        }
    }
}

impl Asker for Client {
    fn wants(&self, _now: Instant) -> Wants {
        self.wants.get()
    }

    fn started(&self) {
        self.write("started");
    }

    fn generated(&self, _tokens: u32) {}

    fn waited(&self, time: Duration) {
        self.waited.set(self.waited.get() + time);
    }

    fn listens(&self) -> bool {
        self.listens
    }

    fn told(&self, question: usize, piece: &str) {
        self.write(&format!("{question} {piece}"));
    }

    fn answered(self, served: Served) {
        let answers: Vec<&str> = served.answers.iter().map(|answer| answer.text.as_str()).collect();
        self.write(&format!("{} {:?}", answers.join(","), served.verdict));
        self.has_ended.set(true);
    }

    fn failed(self, failure: Failure, _time: Duration) {
        self.write(&match failure {
            Failure::Failed(_) => "failed".to_owned(),
            Failure::Panicked(text) => format!("panicked {}", text.lines().next().unwrap()),
            other => format!("{other:?}"),
        });
        self.has_ended.set(true);
    }
}

/// A watch with a fixed room, which counts.
struct Onlooker {
    most: usize,
    kv_cache: Budget,
    stumbles: Cell<u32>,
    answers: Cell<usize>,
}

impl Watch for Onlooker {
    fn most(&self) -> usize {
        self.most
    }

    fn kv_cache(&self) -> &Budget {
        &self.kv_cache
    }

    fn turned(&self, turn: &Turn) {
        self.answers.set(self.answers.get() + turn.answers);
    }

    fn stumbled(&self, _failure: &Failure) {
        self.stumbles.set(self.stumbles.get() + 1);
    }
}

/// A loop with its machine, its askers, and what comes in.
struct Bench {
    diary: Diary,
    wants: Vec<Rc<Cell<Wants>>>,
    arrivals: VecDeque<Work<Client>>,
    pictures_at_once: usize,
    /// Until an answer is complete.
    steps: u32,
}

impl Bench {
    fn new() -> Self {
        Self {
            diary: Diary::default(),
            wants: Vec::new(),
            arrivals: VecDeque::new(),
            pictures_at_once: 1,
            steps: 3,
        }
    }

    /// A job with questions about a picture.
    fn job(&mut self, name: &'static str, picture: &str, questions: &[u32]) -> &mut Work<Client> {
        let wants = Rc::new(Cell::new(Wants::Answers));
        self.wants.push(Rc::clone(&wants));
        let (diary, has_ended) = (Rc::clone(&self.diary), Cell::new(false));
        let waited = Rc::default();
        let asker = Client { name, wants, diary, listens: false, has_ended, waited };
        let options = GenerateOptions::default();
        let picture = PictureKey::new("", picture.as_bytes(), Orientation::AsStored);
        let part = |id: &u32| {
            let question = Question::made_up(*id);
            Part { keys: Keys::new(picture, &question, &options), picture: 0, question }
        };
        let parts = questions.iter().map(part).collect();
        let inputs = vec![Input::Picture(Picture::made_up())];
        self.arrivals.push_back(Work { asker, parts, inputs, options, is_shared: true });
        self.arrivals.back_mut().unwrap()
    }

    fn machine(&self) -> Fake {
        Fake {
            now: Rc::new(Cell::new(Instant::now())),
            diary: Rc::clone(&self.diary),
            running: Vec::new(),
            steps: self.steps,
            told: BTreeMap::new(),
            pictures_at_once: self.pictures_at_once,
            is_lost: false,
        }
    }

    /// Turns the loop `turns` times, or until it has nothing to do; `between` may change wishes.
    fn turn(&mut self, onlooker: &Onlooker, turns: usize, mut between: impl FnMut(usize)) {
        let caches = Caches::new(1 << 20, 1 << 20);
        let mut serving = Serving::new(self.machine(), &caches, onlooker);
        for i in 0..turns {
            if serving.is_idle() && self.arrivals.is_empty() {
                return;
            }
            serving.turn(&mut || self.arrivals.pop_front());
            if serving.take_lost().is_some() {
                return;
            }
            between(i);
        }
    }

    fn diary(&self) -> Vec<String> {
        self.diary.borrow().clone()
    }

    /// What the askers wrote.
    fn heard(&self) -> Vec<String> {
        self.diary().into_iter().filter(|line| line.contains(':')).collect()
    }
}

fn onlooker(most: usize) -> Onlooker {
    let kv_cache = Budget::new(u64::MAX);
    Onlooker { most, kv_cache, stumbles: Cell::new(0), answers: Cell::new(0) }
}

#[test]
fn jobs_join_while_others_are_decoded() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[1]);
    bench.job("b", "2", &[2]);
    let watch = onlooker(16);
    bench.turn(&watch, 50, |_| {});
    // 80 ms of vision owe 10 ms of steps, which are three, before the next picture.
    let expected = [
        "a: started",
        "vision",
        "step 1",
        "step 1",
        "step 1",
        "a: 1 Miss",
        "b: started",
        "vision",
        "step 1",
        "step 1",
        "step 1",
        "b: 2 Miss",
    ];
    assert_eq!(bench.diary(), expected);
    assert_eq!(watch.answers.get(), 2);
    assert_eq!(4 * MS, STEP);
}

#[test]
fn what_others_take_is_told_as_waiting() {
    let mut bench = Bench { steps: 9, ..Bench::new() };
    let waited = [("a", "1", 1), ("b", "2", 2)].map(|(name, picture, question)| {
        Rc::clone(&bench.job(name, picture, &[question]).asker.waited)
    });
    bench.turn(&onlooker(16), 50, |_| {});
    // Three steps each are its own; `a` waits for the picture of `b`, and both have half of six steps.
    assert_eq!(waited.map(|time| time.get()), [VISION + 3 * STEP, 3 * STEP]);
}

#[test]
fn a_job_of_several_questions_does_not_wait_for_itself() {
    let mut bench = Bench::new();
    let waited = Rc::clone(&bench.job("a", "1", &[1, 2, 3]).asker.waited);
    bench.turn(&onlooker(16), 50, |_| {});
    assert_eq!(waited.get(), Duration::ZERO);
}

#[test]
fn a_batch_that_begins_again_is_each_ones_own_time() {
    let mut bench = Bench { steps: 9, ..Bench::new() };
    let waited = [("a", "1", 1), ("b", "2", FAILS)].map(|(name, picture, question)| {
        Rc::clone(&bench.job(name, picture, &[question]).asker.waited)
    });
    bench.turn(&onlooker(16), 50, |_| {});
    // Half of the step that fails; then `b` waits for all of `a`, and `a` for the one step of `b`.
    assert_eq!(waited.map(|time| time.get()), [VISION + STEP / 2 + STEP, STEP / 2 + 9 * STEP]);
}

#[test]
fn those_who_ask_the_same_need_no_room_and_wait_for_no_step() {
    let mut bench = Bench { steps: 9, ..Bench::new() };
    for name in ["a", "b", "c", "d"] {
        bench.job(name, "1", &[7]);
    }
    let mut watch = onlooker(16);
    watch.kv_cache = Budget::new(7);
    bench.turn(&watch, 4, |_| {});
    // `a` owes some steps for its picture; those who ask the same are all there after them.
    let steps = bench.diary().iter().take_while(|line| *line != "d: started").count();
    assert_eq!(bench.diary()[steps - 2..=steps], ["b: started", "c: started", "d: started"]);
}

#[test]
fn jobs_whose_keys_and_values_have_no_room_wait_for_it() {
    let mut bench = Bench::new();
    for (name, picture, bytes) in [("a", "1", 6), ("b", "2", 4), ("c", "3", 1), ("d", "4", 50)] {
        bench.job(name, picture, &[bytes]);
    }
    let mut watch = onlooker(16);
    watch.kv_cache = Budget::new(10);
    // Long enough that all would be decoded together.
    bench.steps = 100;
    bench.turn(&watch, 1000, |_| {});
    let together = |line: &String| line.strip_prefix("step ").map(|count| count.parse().unwrap());
    let most: Option<usize> = bench.diary().iter().filter_map(together).max();
    assert_eq!(most, Some(2));
    // The last is larger than all the room, and has the machine for itself.
    assert_eq!(watch.kv_cache.peak(), 50);
    assert_eq!(watch.kv_cache.used(), 0);
    let ends: Vec<String> = bench.heard().into_iter().filter(|it| it.ends_with("Miss")).collect();
    assert_eq!(ends, ["a: 6 Miss", "b: 4 Miss", "c: 1 Miss", "d: 50 Miss"]);
}

/// A watch that writes what it counts into the diary.
struct Bookkeeper(Diary);

impl Watch for Bookkeeper {
    fn most(&self) -> usize {
        16
    }

    fn turned(&self, turn: &Turn) {
        self.0.borrow_mut().push(format!("counted {}", turn.answers));
    }

    fn stumbled(&self, _failure: &Failure) {}
}

#[test]
fn an_answer_is_counted_before_it_is_told() {
    let mut bench = Bench::new();
    bench.steps = 1;
    bench.job("a", "1", &[1]);
    let (caches, watch) = (Caches::new(1 << 20, 1 << 20), Bookkeeper(Rc::clone(&bench.diary)));
    Serving::new(bench.machine(), &caches, &watch).turn(&mut || bench.arrivals.pop_front());
    assert_eq!(bench.diary(), ["a: started", "vision", "step 1", "counted 1", "a: 1 Miss"]);
}

#[test]
fn pictures_are_encoded_together_where_the_machine_likes_it() {
    let mut bench = Bench::new();
    bench.pictures_at_once = 3;
    // The second picture is asked for twice; the last one is not shared with it.
    for (name, picture, id) in [("a", "1", 1), ("b", "2", 2), ("c", "2", 3), ("d", "3", 4)] {
        bench.job(name, picture, &[id]);
    }
    bench.job("e", "2", &[5]).is_shared = false;
    bench.turn(&onlooker(16), 50, |_| {});
    let visions: Vec<String> =
        bench.diary().into_iter().filter(|line| line.starts_with("vision")).collect();
    assert_eq!(visions, ["vision 2", "vision 2"]);
    let mut ends: Vec<String> =
        bench.heard().into_iter().filter(|line| !line.contains("started")).collect();
    ends.sort();
    assert_eq!(ends, ["a: 1 Miss", "b: 2 Miss", "c: 3 Features", "d: 4 Miss", "e: 5 Miss"]);
}

#[test]
fn the_batch_takes_no_more_than_there_is_room_for() {
    let mut bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.job(name, "same picture", &[name.as_bytes()[0].into()]);
    }
    bench.turn(&onlooker(2), 50, |_| {});
    assert!(bench.diary().contains(&"step 2".to_owned()));
    assert!(!bench.diary().contains(&"step 3".to_owned()));
    let visions = bench.diary().iter().filter(|line| *line == "vision").count();
    assert_eq!(visions, 1, "the picture is encoded once");
}

#[test]
fn the_same_question_is_asked_once_and_answers_all() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[7]);
    bench.job("b", "1", &[7]);
    bench.job("c", "1", &[7]).is_shared = false;
    bench.turn(&onlooker(16), 50, |_| {});
    let mut ends: Vec<String> =
        bench.heard().into_iter().filter(|line| !line.contains("started")).collect();
    ends.sort();
    // The third neither takes nor shares.
    assert_eq!(ends, ["a: 7 Miss", "b: 7 Result", "c: 7 Miss"]);
    assert_eq!(bench.diary().iter().filter(|line| *line == "vision").count(), 2);
}

#[test]
fn several_questions_share_their_picture_and_end_together() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[1, 2, 3]);
    bench.turn(&onlooker(16), 50, |_| {});
    assert_eq!(bench.heard(), ["a: started", "a: 1,2,3 Miss"]);
    assert_eq!(bench.diary().iter().filter(|line| *line == "vision").count(), 1);
}

#[test]
fn what_is_not_wanted_any_more_ends_before_the_next_step() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[1]);
    bench.job("b", "1", &[2]);
    bench.job("late", "1", &[3]);
    let (a, late) = (Rc::clone(&bench.wants[0]), Rc::clone(&bench.wants[2]));
    bench.turn(&onlooker(16), 50, |turn| {
        if turn == 0 {
            a.set(Wants::Nothing);
            late.set(Wants::TooLate);
        }
    });
    let heard = bench.heard();
    assert!(heard.contains(&"a: Cancelled".to_owned()), "{heard:?}");
    assert!(heard.contains(&"b: 2 Features".to_owned()), "{heard:?}");
}

#[test]
fn one_that_fails_takes_no_other_along() {
    for (trouble, told) in [(FAILS, "bad: failed"), (PANICS, "bad: panicked in a step")] {
        let mut bench = Bench::new();
        bench.job("a", "1", &[1]);
        bench.job("bad", "1", &[trouble]);
        bench.job("b", "1", &[2]);
        let watch = onlooker(16);
        bench.turn(&watch, 50, |_| {});
        let mut ends: Vec<String> =
            bench.heard().into_iter().filter(|line| !line.contains("started")).collect();
        ends.sort();
        assert_eq!(ends, ["a: 1 Miss", "b: 2 Features", told]);
        assert_eq!(watch.stumbles.get(), 1);
    }
}

#[test]
fn an_encoder_that_panics_loses_nobody() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[1]);
    bench.job("bad", "2", &[PANICS_IN_ENCODER]);
    bench.job("b", "3", &[2]);
    bench.turn(&onlooker(16), 50, |_| {});
    let heard = bench.heard();
    assert!(heard.iter().any(|line| line.starts_with("bad: panicked")), "{heard:?}");
    for end in ["a: 1 Miss", "b: 2 Miss"] {
        assert!(heard.contains(&end.to_owned()), "{heard:?}");
    }
    assert!(!heard.iter().any(|line| line.contains("dropped")), "{heard:?}");
}

#[test]
fn a_machine_that_is_lost_fails_its_jobs_and_leaves_the_rest_to_another() {
    let mut bench = Bench::new();
    for (name, id) in [("a", 1), ("bad", LOSES), ("b", 2), ("c", 3), ("d", 4)] {
        bench.job(name, "1", &[id]);
    }
    bench.turn(&onlooker(3), 50, |_| {});
    let ends = |bench: &Bench| -> Vec<String> {
        let mut ends = bench.heard();
        ends.retain(|line| !line.contains("started"));
        ends.sort();
        ends
    };
    // The first was answered before the others came.
    assert_eq!(ends(&bench), ["a: 1 Miss", "b: failed", "bad: failed", "c: failed"]);
    // The other loop's machine is sound.
    bench.turn(&onlooker(3), 50, |_| {});
    assert_eq!(ends(&bench)[4..], ["d: 4 Miss"]);
}

#[test]
fn who_listens_hears_each_answer_once_and_in_order() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[123, 456]).asker.listens = true;
    bench.job("b", "1", &[789]);
    bench.turn(&onlooker(16), 50, |_| {});
    let heard = bench.heard();
    let of = |name: &str, question: &str| -> Vec<String> {
        let start = format!("{name}: {question} ");
        heard.iter().filter_map(|line| line.strip_prefix(&start).map(str::to_owned)).collect()
    };
    assert_eq!(
        (of("a", "0"), of("a", "1")),
        (vec!["1".into(), "2".into(), "3".into()], vec!["4".to_owned(), "5".into(), "6".into()])
    );
    assert!(of("b", "0").is_empty(), "{heard:?}");
    assert!(heard.contains(&"a: 123,456 Miss".to_owned()), "{heard:?}");
}

#[test]
fn who_joins_a_request_hears_first_what_is_known_of_it() {
    let mut bench = Bench::new();
    bench.steps = 6;
    for name in ["a", "b", "c", "d"] {
        bench.job(name, "1", &[123_456]).asker.listens = name != "c";
    }
    let mut later = bench.arrivals.split_off(1);
    let mut last = later.split_off(2);
    let caches = Caches::new(1 << 20, 1 << 20);
    let watch = onlooker(16);
    let mut serving = Serving::new(bench.machine(), &caches, &watch);
    // Three steps before the others are let in.
    for _ in 0..3 {
        serving.turn(&mut || bench.arrivals.pop_front());
    }
    for _ in 0..3 {
        serving.turn(&mut || later.pop_front());
    }
    serving.turn(&mut || last.pop_front());
    let heard = bench.heard();
    let of = |name: &str| -> Vec<&str> {
        let start = format!("{name}: 0 ");
        heard.iter().filter_map(|line| line.strip_prefix(&start)).collect()
    };
    assert_eq!(of("a"), ["1", "2", "3", "4", "5", "6"]);
    assert_eq!(of("b"), ["123", "4", "5", "6"]);
    assert!(of("c").is_empty());
    // From the cache all at once.
    assert_eq!(of("d"), ["123456"]);
}

#[test]
fn an_answer_that_is_begun_again_is_told_on_from_where_it_was() {
    let mut bench = Bench::new();
    bench.steps = 6;
    bench.job("a", "1", &[123_456]).asker.listens = true;
    bench.job("bad", "1", &[FAILS]).asker.listens = true;
    let mut bad = bench.arrivals.split_off(1);
    let caches = Caches::new(1 << 20, 1 << 20);
    let watch = onlooker(16);
    let mut serving = Serving::new(bench.machine(), &caches, &watch);
    for _ in 0..3 {
        serving.turn(&mut || bench.arrivals.pop_front());
    }
    serving.turn(&mut || bad.pop_front());
    let mut heard = bench.heard();
    heard.retain(|line| !line.contains("started"));
    let expected = ["a: 0 1", "a: 0 2", "a: 0 3", "bad: failed", "a: 0 456", "a: 123456 Miss"];
    assert_eq!(heard, expected);
}

#[test]
fn a_loop_that_ends_drops_its_askers_which_hear_of_it() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[1]);
    bench.turn(&onlooker(16), 1, |_| {});
    assert_eq!(bench.heard(), ["a: started", "a: dropped"]);
}

#[test]
fn a_job_without_questions_is_answered_at_once() {
    let mut bench = Bench::new();
    bench.job("a", "1", &[]);
    bench.turn(&onlooker(16), 1, |_| {});
    assert_eq!(bench.heard(), ["a: started", "a:  Result"]);
}
