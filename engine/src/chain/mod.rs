//! Several questions about one picture: some at once, then others about what was found.
//!
//! Pure: [`Run::asks`] says what is to be asked, [`Run::answered`] takes the answers. Who asks, the
//! serving loop or the command line, is of no matter here.

use std::{str::FromStr, sync::Arc};

use serde_json::{Map, Value, json};

use crate::{
    Answer, Coordinates, Decimals,
    image::Area,
    postprocess::{Scale, post_process},
    prompt::{Prompt, PromptError, Prompts},
    task::{AnswerKind, Input, Task},
};

/// Most steps of a chain, the first question counted.
pub const MOST_STEPS: usize = 4;

/// Most parts of a picture that are asked about at a time: each is a picture of its own in memory.
const PARTS_AT_ONCE: usize = 8;

/// What stands for the text, or the label, of the answer before.
const PLACE: &str = "{}";

/// What a step asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// The picture again.
    Then,
    /// Each region of the answer before, in the picture.
    Each,
    /// Each region of the answer before, cut out as a picture of its own.
    Crop,
}

impl Link {
    const ALL: [Self; 3] = [Self::Then, Self::Each, Self::Crop];

    /// The link's name, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Then => "then",
            Self::Each => "each",
            Self::Crop => "crop",
        }
    }

    /// The link of a name, in letters of any size.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|link| link.name().eq_ignore_ascii_case(name))
    }
}

/// A question that follows another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What it is about.
    pub link: Link,
    /// The prompt; `{}` in it stands for what was found.
    pub prompt: String,
}

/// As on a command line: `EACH <REGION_TO_OCR>`.
impl FromStr for Step {
    type Err = ChainError;

    fn from_str(text: &str) -> Result<Self, ChainError> {
        let (link, prompt) = text.trim_start().split_once(' ').ok_or(ChainError::NoLink)?;
        let link = Link::named(link).ok_or(ChainError::NoLink)?;
        Ok(Self { link, prompt: prompt.to_owned() })
    }
}

/// Why a chain is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A step does not begin with its link.
    #[error("a step is THEN, EACH or CROP, and a prompt")]
    NoLink,
    /// It has too many steps.
    #[error("a chain has at most {MOST_STEPS} steps, this one has {0}")]
    TooLong(usize),
    /// Steps follow one question.
    #[error("steps follow one prompt, not several")]
    SeveralPrompts,
    /// Every region would be asked the same.
    #[error(
        "EACH asks about regions: {0} takes none, nor {{}} for a label; CROP asks about parts of the picture"
    )]
    NoRegion(String),
    /// The task asks about a region of a picture, the part is a picture.
    #[error("{0} needs a region: EACH asks it about each")]
    RegionNeeded(&'static str),
    /// A prompt is.
    #[error(transparent)]
    Prompt(#[from] PromptError),
}

/// Where something was found, in pixels of the whole picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Region {
    /// Left, top, right, bottom.
    edges: [f64; 4],
    label: String,
}

/// A question.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// As the model is asked.
    pub prompt: String,
    /// The part of the picture that it is about; none if it is about the whole.
    pub area: Option<Area>,
    region: Option<Region>,
}

/// Prompts, and the steps that follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// What is asked first, all at once.
    pub prompts: Vec<String>,
    /// What is asked then, one after the other.
    pub steps: Vec<Step>,
    /// How much more than a region CROP cuts out on each side, in percent of its size.
    pub margin: u32,
    /// Most regions of a step.
    pub most_regions: usize,
}

impl Chain {
    /// Bytes of all prompts together.
    pub fn prompt_bytes(&self) -> usize {
        let steps = self.steps.iter().map(|step| &step.prompt);
        self.prompts.iter().chain(steps).map(String::len).sum()
    }

    /// Checks the steps as far as they can be without answers.
    ///
    /// # Errors
    ///
    /// [`ChainError`] says what is wrong with which.
    pub fn check(&self, taken: Prompts) -> Result<(), ChainError> {
        let count = self.steps.len() + 1;
        if count > MOST_STEPS {
            return Err(ChainError::TooLong(count));
        }
        if count > 1 && self.prompts.len() != 1 {
            return Err(ChainError::SeveralPrompts);
        }
        self.steps.iter().try_for_each(|step| step.check(taken))
    }
}

impl Step {
    fn check(&self, taken: Prompts) -> Result<(), ChainError> {
        let task = Task::of(&self.prompt);
        let asks_region = task.is_some_and(|task| task.input() == Input::Region);
        match self.link {
            Link::Each if !asks_region && !self.prompt.contains(PLACE) => {
                return Err(ChainError::NoRegion(self.prompt.trim().to_owned()));
            }
            Link::Crop if let Some(task) = task.filter(|_| asks_region) => {
                return Err(ChainError::RegionNeeded(task.token()));
            }
            _ => {}
        }
        // As long as nobody knows what will be found, errors show the prompt as it is written.
        let sample = Region { edges: [0.0; 4], label: PLACE.to_owned() };
        Prompt::parse(&self.about(&sample, (1, 1)), taken)?;
        Ok(())
    }

    /// The prompt that asks about a region of a picture of this size.
    fn about(&self, region: &Region, size: (usize, usize)) -> String {
        let asks_region = Task::of(&self.prompt).is_some_and(|task| task.input() == Input::Region);
        if self.link == Link::Each && asks_region {
            let place = locations(region.edges, size);
            let has_place = self.prompt.contains(PLACE);
            return if has_place {
                self.prompt.replace(PLACE, &place)
            } else {
                format!("{}{place}", self.prompt.trim_end())
            };
        }
        self.prompt.replace(PLACE, &region.label)
    }
}

/// A region as location tokens: the thousandths of the picture that its edges lie in.
fn locations(edges: [f64; 4], (width, height): (usize, usize)) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "brought into range"
    )]
    let bin = |(i, edge): (usize, f64)| {
        let size = if i % 2 == 0 { width } else { height };
        let bin = (edge * 1000.0 / size as f64).floor().clamp(0.0, 999.0) as u32;
        format!("<loc_{bin}>")
    };
    edges.into_iter().enumerate().map(bin).collect()
}

/// The questions of a step, and the answers so far.
#[derive(Debug, Default)]
struct Stage {
    asked: Vec<Asked>,
    answers: Vec<Arc<Answer>>,
    /// Regions that were not asked about.
    left_out: usize,
}

impl Stage {
    fn is_over(&self) -> bool {
        self.answers.len() == self.asked.len()
    }

    fn entries(&self) -> impl Iterator<Item = (&Asked, &Answer)> {
        self.asked.iter().zip(self.answers.iter().map(|answer| &**answer))
    }
}

/// A chain that is being answered.
#[derive(Debug)]
pub struct Run {
    chain: Chain,
    taken: Prompts,
    stages: Vec<Stage>,
}

impl Run {
    /// None of its questions is answered.
    pub fn new(chain: Chain, taken: Prompts) -> Self {
        let ask = |prompt: &String| Asked { prompt: prompt.clone(), area: None, region: None };
        let first = Stage { asked: chain.prompts.iter().map(ask).collect(), ..Stage::default() };
        Self { chain, taken, stages: vec![first] }
    }

    /// What is to be asked now: questions about the whole picture, or about a few parts of it.
    /// Nothing once all is answered.
    pub fn asks(&self) -> &[Asked] {
        let Some(stage) = self.stages.last() else { return &[] };
        let left = stage.asked.get(stage.answers.len()..).unwrap_or_default();
        let is_of_parts = left.first().is_some_and(|asked| asked.area.is_some());
        if is_of_parts { &left[..left.len().min(PARTS_AT_ONCE)] } else { left }
    }

    /// Where the first of these questions stands: its step, and its place in the step.
    pub fn place(&self) -> (usize, usize) {
        let answered = self.stages.last().map_or(0, |stage| stage.answers.len());
        (self.stages.len() - 1, answered)
    }

    /// Whether parts of the picture may be asked about.
    pub fn needs_parts(&self) -> bool {
        self.chain.steps.iter().any(|step| step.link == Link::Crop)
    }

    /// Whether other questions follow the first ones.
    pub fn is_chain(&self) -> bool {
        !self.chain.steps.is_empty()
    }

    /// Whether no step follows those that are asked now.
    pub fn is_in_last_step(&self) -> bool {
        self.stages.len() > self.chain.steps.len()
    }

    /// Whether all is answered.
    pub fn is_over(&self) -> bool {
        self.asks().is_empty()
    }

    /// The answers to what [`Self::asks`] told.
    pub fn answered(&mut self, answers: impl IntoIterator<Item = Arc<Answer>>) {
        let Some(stage) = self.stages.last_mut() else { return };
        let left = stage.asked.len() - stage.answers.len();
        stage.answers.extend(answers.into_iter().take(left));
        while self.stages.last().is_some_and(Stage::is_over)
            && let Some(step) = self.chain.steps.get(self.stages.len() - 1)
        {
            self.stages.push(self.stage(step));
        }
    }

    /// Width and height of the whole picture.
    fn size(&self) -> (usize, usize) {
        let first = self.stages.first().and_then(|stage| stage.answers.first());
        first.map(|answer| answer.size).unwrap_or_default()
    }

    /// What a step asks after the last one.
    fn stage(&self, step: &Step) -> Stage {
        let Some(last) = self.stages.last() else { return Stage::default() };
        let size = self.size();
        if step.link == Link::Then {
            let texts: Vec<String> =
                last.entries().map(|(asked, answer)| text(self.kind(asked), answer)).collect();
            let text =
                texts.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(", ");
            let prompt = step.prompt.replace(PLACE, &text);
            let is_empty = text.is_empty() && step.prompt.contains(PLACE);
            let asked = (!is_empty).then_some(Asked { prompt, area: None, region: None });
            return Stage { asked: asked.into_iter().collect(), ..Stage::default() };
        }
        let regions: Vec<Region> = last
            .entries()
            .flat_map(|(asked, answer)| regions(self.kind(asked), asked, answer))
            .collect();
        let count = regions.len();
        let asked: Vec<Asked> = regions
            .into_iter()
            .filter_map(|region| self.about(step, region, size))
            .take(self.chain.most_regions)
            .collect();
        Stage { left_out: count - asked.len(), asked, answers: Vec::new() }
    }

    /// The question about a region; none if there is nothing to ask, or nothing to cut out.
    fn about(&self, step: &Step, region: Region, size: (usize, usize)) -> Option<Asked> {
        let area = match step.link {
            Link::Crop => {
                let [left, top, right, bottom] = region.edges;
                let margin = f64::from(self.chain.margin) / 100.0;
                let (x, y) = ((right - left) * margin, (bottom - top) * margin);
                Some(Area::within([left - x, top - y, right + x, bottom + y], size)?)
            }
            _ => None,
        };
        let prompt = step.about(&region, size);
        Prompt::parse(&prompt, self.taken).ok()?;
        Some(Asked { prompt, area, region: Some(region) })
    }

    fn kind(&self, asked: &Asked) -> AnswerKind {
        let prompt = Prompt::parse(&asked.prompt, self.taken);
        prompt.map_or(AnswerKind::Text, |prompt| prompt.answer())
    }

    /// All that was answered: of one prompt the reference's JSON, of several by prompt, of a chain
    /// step by step.
    pub fn told(&self, decimals: Decimals) -> Told {
        let answers = || self.stages.iter().flat_map(|stage| &stage.answers);
        let tokens = answers().map(|answer| answer.token_ids.len()).sum();
        let (json, text, scores) = match (&self.stages[..], &self.chain.steps[..]) {
            ([stage], []) => at_once(stage, decimals),
            (stages, steps) => step_by_step(stages, &self.chain.prompts, steps, decimals),
        };
        let best = |answer: &Arc<Answer>| {
            answer.n_best.iter().map(|one| one.told(decimals)).collect::<Value>()
        };
        let is_wanted = !self.is_chain() && answers().any(|answer| !answer.n_best.is_empty());
        let n_best = is_wanted.then(|| answers().map(best).collect());
        Told { json, text, scores, n_best, tokens, size: self.size() }
    }
}

/// What is told of all answers together.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// The answers.
    pub json: Value,
    /// The model's raw texts: one, or a list.
    pub text: Value,
    /// Their scores: a list, or a list of lists.
    pub scores: Value,
    /// The best texts of each question, a list of lists, where they were asked for; a chain has none.
    pub n_best: Option<Value>,
    /// Number of generated ids.
    pub tokens: usize,
    /// Width and height of the picture.
    pub size: (usize, usize),
}

fn at_once(stage: &Stage, decimals: Decimals) -> (Value, Value, Value) {
    if let [answer] = &stage.answers[..] {
        return (answer.rounded(decimals), json!(answer.text), json!(answer.scores));
    }
    let result = |(asked, answer): (&Asked, &Answer)| {
        // The reference's object has one entry, named by the task.
        let mut answer = answer.rounded(decimals);
        let value = answer.as_object_mut().and_then(|object| object.values_mut().next());
        (asked.prompt.clone(), value.map(Value::take).unwrap_or_default())
    };
    let json: Map<_, _> = stage.entries().map(result).collect();
    let texts = stage.answers.iter().map(|answer| json!(answer.text)).collect();
    let scores = stage.answers.iter().map(|answer| json!(answer.scores)).collect();
    (Value::Object(json), texts, scores)
}

fn step_by_step(
    stages: &[Stage],
    prompts: &[String],
    steps: &[Step],
    decimals: Decimals,
) -> (Value, Value, Value) {
    let first = prompts.iter().map(|prompt| (None, prompt));
    let steps = first.chain(steps.iter().map(|step| (Some(step.link), &step.prompt)));
    let (mut told, mut texts, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for ((link, prompt), stage) in steps.zip(stages) {
        let mut entry = Map::new();
        entry.insert("prompt".to_owned(), json!(prompt));
        if let Some(link @ (Link::Each | Link::Crop)) = link {
            let found = stage.entries().map(|(asked, answer)| {
                let region = asked.region.as_ref();
                json!({
                    "region": region.map(|region| decimals.round(&json!(region.edges))),
                    "label": region.map(|region| &region.label),
                    "answer": decimals.round(&in_whole(asked, answer)),
                })
            });
            entry.insert(link.name().to_owned(), found.collect());
            entry.insert("left_out".to_owned(), json!(stage.left_out));
            texts.push(stage.answers.iter().map(|answer| json!(answer.text)).collect());
            scores.push(stage.answers.iter().map(|answer| json!(answer.scores)).collect());
        } else {
            let asked = stage.asked.first().filter(|asked| asked.prompt != *prompt);
            if let Some(asked) = asked {
                entry.insert("asked".to_owned(), json!(asked.prompt));
            }
            let answer = stage.answers.first();
            let json = answer.map(|answer| answer.rounded(decimals));
            entry.insert("answer".to_owned(), json.unwrap_or_default());
            texts.push(answer.map(|answer| json!(answer.text)).unwrap_or_default());
            scores.push(answer.map(|answer| json!(answer.scores)).unwrap_or_default());
        }
        told.push(Value::Object(entry));
    }
    (json!({ "steps": told }), Value::Array(texts), Value::Array(scores))
}

/// An answer's JSON with the coordinates of the whole picture.
fn in_whole(asked: &Asked, answer: &Answer) -> Value {
    let mut json = answer.json.clone();
    if let Some(area) = asked.area {
        shift(&mut json, area.origin());
    }
    json
}

/// Moves all coordinates: lists of numbers `x, y, x, y, ..`.
fn shift(json: &mut Value, (x, y): (usize, usize)) {
    match json {
        Value::Array(list) if list.first().is_some_and(Value::is_number) => {
            for (i, number) in list.iter_mut().enumerate() {
                let by = if i % 2 == 0 { x } else { y };
                *number = match number.as_u64() {
                    Some(whole) => json!(whole + by as u64),
                    None => json!(number.as_f64().unwrap_or_default() + by as f64),
                };
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|item| shift(item, (x, y))),
        Value::Object(map) => map.values_mut().for_each(|value| shift(value, (x, y))),
        _ => {}
    }
}

/// The text of an answer: of one that locates something its labels.
fn text(kind: AnswerKind, answer: &Answer) -> String {
    let value = answer.json.as_object().and_then(|object| object.values().next());
    if let (AnswerKind::Text, Some(text)) = (kind, value.and_then(Value::as_str)) {
        return without_locations(text);
    }
    let whole = Asked { prompt: String::new(), area: None, region: None };
    let labels = regions(kind, &whole, answer).into_iter().map(|region| region.label);
    labels.filter(|label| !label.is_empty()).collect::<Vec<_>>().join(", ")
}

/// Some texts end with the region that they are about.
fn without_locations(text: &str) -> String {
    let mut parts = text.split("<loc_");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once('>').map_or(part, |(_number, rest)| rest));
    }
    plain.trim().to_owned()
}

/// What an answer locates, as boxes around it, in pixels of the whole picture.
fn regions(kind: AnswerKind, asked: &Asked, answer: &Answer) -> Vec<Region> {
    let scale = Scale { size: answer.size, coordinates: Coordinates::Float };
    let mut json = post_process(kind, &answer.text, scale).json;
    if let Some(area) = asked.area {
        shift(&mut json, area.origin());
    }
    let mut found = Vec::new();
    for (places, labels) in [
        ("bboxes", "labels"),
        ("bboxes", "bboxes_labels"),
        ("quad_boxes", "labels"),
        ("polygons", "labels"),
        ("polygons", "polygons_labels"),
    ] {
        let (Some(places), Some(labels)) = (json[places].as_array(), json[labels].as_array())
        else {
            continue;
        };
        for (place, label) in places.iter().zip(labels) {
            let label = label.as_str().unwrap_or_default().to_owned();
            found.extend(around(place).map(|edges| Region { edges, label }));
        }
    }
    found
}

/// The box around all points of a shape; none if it has none.
fn around(shape: &Value) -> Option<[f64; 4]> {
    match shape.as_array()?.as_slice() {
        list @ [first, ..] if first.is_number() => {
            let at = |i: usize| list.iter().skip(i).step_by(2).filter_map(Value::as_f64);
            let (least, most) = (f64::INFINITY, f64::NEG_INFINITY);
            let edges = [
                at(0).fold(least, f64::min),
                at(1).fold(least, f64::min),
                at(0).fold(most, f64::max),
                at(1).fold(most, f64::max),
            ];
            edges.iter().all(|edge| edge.is_finite()).then_some(edges)
        }
        list => list
            .iter()
            .filter_map(around)
            .reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3])]),
    }
}

#[cfg(test)]
mod tests;
