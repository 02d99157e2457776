//! What texts of settings are parsed to, where the engine has no type for it.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

use florence_engine::has_cpu;

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

/// Directories that pictures may be read from.
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
    fn queues_and_their_tasks_are_listed() {
        let Queues(queues) = "celery:tasks.a  celery:tasks.b a:b:c".parse().unwrap();
        assert_eq!(queues["celery"], ["tasks.a", "tasks.b"]);
        assert_eq!(queues["a:b"], ["c"]);
        assert!("celery".parse::<Queues>().is_err() && ":x".parse::<Queues>().is_err());
    }

    #[test]
    fn steps_are_those_of_the_clients() {
        assert_eq!("9 3 6".parse(), Ok(Steps(vec![0, 3, 6, 9])));
        assert!("0 10".parse::<Steps>().is_err() && "a".parse::<Steps>().is_err());
    }
}
