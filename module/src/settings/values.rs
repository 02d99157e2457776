//! What texts of settings are parsed to, where the engine has no type for it.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

use florence_engine::{Device, has_cpu};

/// The value is not allowed; the table says what is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotAllowed;

/// CPUs in the order of the setting: `0-3 8`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuList(pub(crate) Vec<usize>);

impl FromStr for CpuList {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let cpus = listed(text).ok_or(NotAllowed)?;
        if cpus.iter().all(|cpu| has_cpu(*cpu)) { Ok(Self(cpus)) } else { Err(NotAllowed) }
    }
}

/// The numbers of a list of CPUs.
fn listed(text: &str) -> Option<Vec<usize>> {
    /// As many as the kernel's set has room for.
    const MOST: usize = 1024;
    let mut cpus = Vec::new();
    for part in text.split([' ', ',']).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) if first <= last && last < MOST => cpus.extend(first..=last),
            _ => return None,
        }
    }
    Some(cpus)
}

/// Where the model runs: `cuda:0 cuda:1`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Devices(pub(crate) Vec<Device>);

impl Default for Devices {
    fn default() -> Self {
        Self(vec![Device::Cpu])
    }
}

impl FromStr for Devices {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let device = |name: &str| name.parse().map_err(|_why| NotAllowed);
        let devices = text.split_whitespace().map(device).collect::<Result<Vec<_>, _>>()?;
        if devices.is_empty() { Err(NotAllowed) } else { Ok(Self(devices)) }
    }
}

/// A model that has a name of its own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) directory: PathBuf,
    pub(crate) adapter: Option<PathBuf>,
}

/// Models by name: `base=/var/lib/florence/base mine=/var/lib/florence/base,/var/lib/florence/mine`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Models(pub(crate) Vec<Named>);

impl FromStr for Models {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let mut models = Vec::<Named>::new();
        for word in text.split_whitespace() {
            let (name, files) = word.split_once('=').ok_or(NotAllowed)?;
            let (directory, adapter) = match files.split_once(',') {
                Some((directory, adapter)) => (directory, Some(PathBuf::from(adapter))),
                None => (files, None),
            };
            let is_known = models.iter().any(|model| model.name == name);
            if is_known || !is_model_name(name) || directory.is_empty() {
                return Err(NotAllowed);
            }
            models.push(Named { name: name.to_owned(), directory: directory.into(), adapter });
        }
        Ok(Self(models))
    }
}

/// Most bytes of a model's name.
pub(crate) const MODEL_BYTES: usize = 253;

/// Whether a model may be called so: in settings and replies it is one word.
pub(crate) fn is_model_name(name: &str) -> bool {
    let is_allowed = |letter: char| letter.is_ascii_alphanumeric() || "._+-".contains(letter);
    (1..=MODEL_BYTES).contains(&name.len()) && name.chars().all(is_allowed)
}

/// Directories that something may be read from.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Roots(pub(crate) Vec<PathBuf>);

impl FromStr for Roots {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let root = |word: &str| {
            let path = PathBuf::from(word);
            if path.is_absolute() && path.is_dir() { Ok(path) } else { Err(NotAllowed) }
        };
        text.split_whitespace().map(root).collect::<Result<_, _>>().map(Self)
    }
}

/// Celery's queues and the tasks that are taken from each: `queue:task queue:task`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Queues(pub(crate) BTreeMap<String, Vec<String>>);

impl FromStr for Queues {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let mut queues: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in text.split_whitespace() {
            match pair.rsplit_once(':') {
                Some((queue, task)) if !queue.is_empty() && !task.is_empty() => {
                    queues.entry(queue.to_owned()).or_default().push(task.to_owned());
                }
                _ => return Err(NotAllowed),
            }
        }
        Ok(Self(queues))
    }
}

/// The parameters of a task of Celery's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parameters {
    /// In their order.
    pub(crate) names: Vec<String>,
    /// Which of them is the picture.
    pub(crate) picture: usize,
    pub(crate) prompt: usize,
    pub(crate) default_prompt: Option<String>,
}

impl Parameters {
    /// Whether a call must give a parameter; those that mean nothing here may be there or not.
    pub(crate) fn is_needed(&self, index: usize) -> bool {
        index == self.picture || index == self.prompt && self.default_prompt.is_none()
    }
}

/// `image_url, prompt=<OD>, user`: picture and prompt come first, unless they are marked, as in
/// `user, question:prompt, path:picture`.
impl FromStr for Parameters {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let (mut names, mut defaults, mut marked) = (Vec::new(), Vec::new(), [None; 2]);
        for parameter in text.split(',') {
            let (name, default) = match parameter.split_once('=') {
                Some((name, default)) => (name, Some(default.trim().to_owned())),
                None => (parameter, None),
            };
            let (name, mark) = name.split_once(':').unwrap_or((name, ""));
            let role = match mark.trim() {
                "" => None,
                "picture" => Some(0),
                "prompt" => Some(1),
                _ => return Err(NotAllowed),
            };
            if let Some(role) = role
                && marked[role].replace(names.len()).is_some()
            {
                return Err(NotAllowed);
            }
            names.push(identifier(name, &names)?);
            defaults.push(default);
        }
        let mut unmarked = (0..names.len()).filter(|index| !marked.contains(&Some(*index)));
        let [picture, prompt] = marked.map(|index| index.or_else(|| unmarked.next()));
        let (picture, prompt) = (picture.ok_or(NotAllowed)?, prompt.ok_or(NotAllowed)?);
        if defaults[picture].is_some() {
            return Err(NotAllowed);
        }
        Ok(Self { names, picture, prompt, default_prompt: defaults.swap_remove(prompt) })
    }
}

/// A name as Python allows them, which is none of those before it.
fn identifier(name: &str, others: &[String]) -> Result<String, NotAllowed> {
    let name = name.trim();
    let is_letter = |letter: char| letter == '_' || letter.is_alphabetic();
    let is_name = name.starts_with(is_letter)
        && name.chars().all(|letter| is_letter(letter) || letter.is_numeric());
    if is_name && !others.iter().any(|other| other == name) {
        Ok(name.to_owned())
    } else {
        Err(NotAllowed)
    }
}

/// How Celery's tasks are called: `(url, task_prompt) tasks.ask(question:prompt, path:picture)`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Signatures {
    by_task: BTreeMap<String, Parameters>,
    others: Parameters,
}

impl Default for Signatures {
    fn default() -> Self {
        let names = ["url", "task_prompt"].map(str::to_owned).to_vec();
        let others = Parameters { names, picture: 0, prompt: 1, default_prompt: None };
        Self { by_task: BTreeMap::new(), others }
    }
}

impl Signatures {
    pub(crate) fn of(&self, task: &str) -> &Parameters {
        self.by_task.get(task).unwrap_or(&self.others)
    }
}

impl FromStr for Signatures {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let (mut signatures, mut rest) = (Self::default(), text.trim());
        while !rest.is_empty() {
            let (signature, next) = rest.split_once(')').ok_or(NotAllowed)?;
            let (task, parameters) = signature.split_once('(').ok_or(NotAllowed)?;
            let parameters = parameters.parse()?;
            if task.is_empty() {
                signatures.others = parameters;
            } else if task.contains(char::is_whitespace) {
                return Err(NotAllowed);
            } else {
                signatures.by_task.insert(task.to_owned(), parameters);
            }
            rest = next.trim_start();
        }
        Ok(signatures)
    }
}

/// Priorities of Celery's that have a list of their own, the most urgent first: `0 3 6 9`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Steps(pub(crate) Vec<i64>);

impl FromStr for Steps {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let step =
            |step: &str| step.parse().ok().filter(|step| (0..=9).contains(step)).ok_or(NotAllowed);
        let mut steps: Vec<i64> = text.split_whitespace().map(step).collect::<Result<_, _>>()?;
        // Messages without a priority have 0, whose list has the queue's own name.
        steps.push(0);
        steps.sort_unstable();
        steps.dedup();
        Ok(Self(steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_listed_singly_and_in_ranges() {
        assert_eq!(listed("1-3 8"), Some(vec![1, 2, 3, 8]));
        assert_eq!(listed("0,2"), Some(vec![0, 2]));
        assert_eq!(listed("1024"), None);
        assert_eq!("".parse(), Ok(CpuList(Vec::new())));
        // No machine of ours has it.
        assert_eq!("1023".parse::<CpuList>(), Err(NotAllowed));
    }

    #[test]
    fn devices_are_listed() {
        assert_eq!("cuda:0 cuda:1".parse(), Ok(Devices(vec![Device::Cuda(0), Device::Cuda(1)])));
        assert_eq!("auto".parse(), Ok(Devices(vec![Device::Auto])));
        for wrong in ["", "gpu", "cuda:x", "cuda:0,cuda:1"] {
            assert_eq!(wrong.parse::<Devices>(), Err(NotAllowed), "{wrong}");
        }
    }

    #[test]
    fn models_are_listed_with_directories_and_adapters() {
        let Models(models) = "a=/x  b.1=/x,/y".parse().unwrap();
        let seen: Vec<_> = models
            .iter()
            .map(|model| (model.name.as_str(), model.directory.to_str(), model.adapter.as_deref()))
            .collect();
        let adapter = std::path::Path::new("/y");
        assert_eq!(seen, [("a", Some("/x"), None), ("b.1", Some("/x"), Some(adapter))]);
        for wrong in ["a", "=/x", "a=", "a b=/x", "a:b=/x", "a=/x a=/y"] {
            assert_eq!(wrong.parse::<Models>(), Err(NotAllowed), "{wrong}");
        }
    }

    #[test]
    fn queues_and_their_tasks_are_listed() {
        let Queues(queues) = "celery:tasks.a  celery:tasks.b a:b:c".parse().unwrap();
        assert_eq!(queues["celery"], ["tasks.a", "tasks.b"]);
        assert_eq!(queues["a:b"], ["c"]);
        assert!("celery".parse::<Queues>().is_err() && ":x".parse::<Queues>().is_err());
    }

    #[test]
    fn signatures_are_listed_for_all_tasks_and_for_some() {
        let signatures: Signatures =
            "(image_url, prompt=<OD>)  tasks.ask( user , question:prompt,path:picture )"
                .parse()
                .unwrap();
        let all = signatures.of("tasks.any");
        assert_eq!(
            (all.names.as_slice(), all.picture, all.prompt),
            (&["image_url".to_owned(), "prompt".to_owned()][..], 0, 1)
        );
        assert_eq!(all.default_prompt.as_deref(), Some("<OD>"));
        let ask = signatures.of("tasks.ask");
        assert_eq!((ask.names.len(), ask.picture, ask.prompt), (3, 2, 1));
        assert!(!ask.is_needed(0) && ask.is_needed(1) && ask.is_needed(2));
        assert_eq!("tasks.a(x,y)".parse::<Signatures>().unwrap().of("b").names[0], "url");
        for wrong in [
            "url, task_prompt",
            "(url)",
            "(url, url)",
            "(url, 1a)",
            "(url, a b)",
            "(url=x, prompt)",
            "(a:picture, b:picture)",
            "(a:image, b)",
            "(a, b",
            "a b(a, b)",
            "()",
        ] {
            assert_eq!(wrong.parse::<Signatures>(), Err(NotAllowed), "{wrong}");
        }
    }

    #[test]
    fn steps_are_those_of_the_clients() {
        assert_eq!("9 3 6".parse(), Ok(Steps(vec![0, 3, 6, 9])));
        assert!("0 10".parse::<Steps>().is_err() && "a".parse::<Steps>().is_err());
    }
}
