//! What a job asks for, as figures tell jobs apart: clients choose prompts, so they are no names.

use florence_engine::{chain::Chain, task::Task};

/// One of the fifteen tasks, another text, or several prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked(usize);

/// Beside the tasks.
const OTHERS: [&str; 2] = ["other", "several"];

impl Asked {
    pub(crate) const COUNT: usize = Task::ALL.len() + OTHERS.len();
    const OTHER: Self = Self(Task::ALL.len());
    const SEVERAL: Self = Self(Task::ALL.len() + 1);

    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(Self)
    }

    pub(crate) fn index(self) -> usize {
        self.0
    }

    /// The task's token, `other` or `several`.
    pub(crate) fn name(self) -> &'static str {
        let task = Task::ALL.get(self.0).map(|task| task.token());
        task.or_else(|| OTHERS.get(self.0 - Task::ALL.len()).copied()).unwrap_or_default()
    }

    /// What a job asks for.
    pub(crate) fn of(chain: &Chain) -> Self {
        match &chain.prompts[..] {
            [prompt] if chain.steps.is_empty() => Self::of_one(prompt.as_bytes()),
            _ => Self::SEVERAL,
        }
    }

    /// As [`Self::of`], by the field that keeps one prompt, or a JSON list of several, and by
    /// whether there are steps.
    pub(crate) fn of_field(field: &[u8], has_steps: bool) -> Self {
        let list = || serde_json::from_slice::<Vec<String>>(field).ok();
        let list = field.first().filter(|first| **first == b'[').and_then(|_| list());
        match list.as_deref() {
            _ if has_steps => Self::SEVERAL,
            Some([prompt]) => Self::of_one(prompt.as_bytes()),
            Some(_) => Self::SEVERAL,
            None => Self::of_one(field),
        }
    }

    fn of_one(prompt: &[u8]) -> Self {
        let prompt = prompt.trim_ascii_start();
        let is_of = |task: &Task| prompt.starts_with(task.token().as_bytes());
        Task::ALL.iter().position(is_of).map_or(Self::OTHER, Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_told_apart_by_their_tasks() {
        for (field, name) in [
            ("<OCR>", "<OCR>"),
            (" <OCR_WITH_REGION>", "<OCR_WITH_REGION>"),
            ("<CAPTION_TO_PHRASE_GROUNDING> a car", "<CAPTION_TO_PHRASE_GROUNDING>"),
            ("What is this?", "other"),
            ("", "other"),
            (r#"["<OD>","<OCR>"]"#, "several"),
            (r#"["<OD>"]"#, "<OD>"),
            ("[\"<OD>", "other"),
        ] {
            assert_eq!(Asked::of_field(field.as_bytes(), false).name(), name, "{field}");
            assert_eq!(Asked::of_field(field.as_bytes(), true).name(), "several", "{field}");
        }
        let names: std::collections::BTreeSet<_> = Asked::all().map(Asked::name).collect();
        assert_eq!(names.len(), Asked::COUNT);
    }
}
