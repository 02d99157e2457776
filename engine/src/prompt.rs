//! Prompts: a task with its text or region, or any other text, which fine-tuned checkpoints are
//! asked. The errors say what is wrong, and what may be meant.

use std::{borrow::Cow, str::FromStr};

use crate::task::{AnswerKind, Input, Task};

/// Most bytes of a prompt: 16 for each of the 1024 positions that the published models have. What
/// looks at a text, the tokenizer above all, takes time for all of it, even if it then is too long.
pub const MAX_PROMPT: usize = 16 << 10;

/// Which prompts are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prompts {
    /// The fifteen tasks only: typing errors are refused.
    #[default]
    Tasks,
    /// Any other text too: the model is given it as it is.
    Any,
}

impl FromStr for Prompts {
    type Err = UnknownPrompts;

    fn from_str(name: &str) -> Result<Self, UnknownPrompts> {
        match name {
            "tasks" => Ok(Self::Tasks),
            "any" => Ok(Self::Any),
            _ => Err(UnknownPrompts),
        }
    }
}

/// There are no such prompts.
#[derive(Debug, thiserror::Error)]
#[error("prompts are tasks or any")]
pub struct UnknownPrompts;

/// Why a prompt is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// There is nothing in it.
    #[error("the prompt is empty: it begins with a task token such as <CAPTION> or <OD>")]
    Empty,
    /// The prompt does not begin with a task token, and others are not taken.
    #[error("unknown task '{found}': {} Other texts are taken where prompts is any", hint(*.near))]
    UnknownTask {
        /// How the prompt begins.
        found: String,
        /// The task that is spelt nearly so.
        near: Option<&'static str>,
    },
    /// There is a task token, but elsewhere.
    #[error("{0} is not at the beginning of the prompt")]
    Misplaced(&'static str),
    /// The task takes no text.
    #[error("{task} takes no text{}", near.map(did_you_mean).unwrap_or_default())]
    NoInputAllowed {
        /// The task's token.
        task: &'static str,
        /// A task that takes such a text.
        near: Option<&'static str>,
    },
    /// The task needs a text.
    #[error("{0} needs a text")]
    InputNeeded(&'static str),
    /// The region is not four location tokens.
    #[error("{0} needs a region <loc_x1><loc_y1><loc_x2><loc_y2> with numbers from 0 to 999")]
    BadRegion(&'static str),
    /// The text contains a string that the tokenizer would read as a special token.
    #[error("the prompt's text must not contain the special token {0}")]
    SpecialToken(String),
    /// The tokenizer gives up.
    #[error("the tokenizer cannot read the prompt")]
    Unreadable,
    /// The prompt is longer than any that a model takes; nothing looks at its text.
    #[error("the prompt has {0} bytes, at most {MAX_PROMPT} are read")]
    TooManyBytes(usize),
    /// The sentence has more tokens than the model has positions for.
    #[error("the prompt has {found} tokens, the model takes at most {limit}")]
    TooLong {
        /// Tokens of the prompt.
        found: usize,
        /// Tokens that fit beside the picture.
        limit: usize,
    },
}

fn did_you_mean(token: &str) -> String {
    format!("; did you mean {token}?")
}

fn hint(near: Option<&str>) -> String {
    near.map_or_else(
        || "a prompt begins with a task token such as <CAPTION> or <OD>.".to_owned(),
        |token| format!("did you mean {token}?"),
    )
}

/// A validated prompt.
///
/// ```
/// use florence_engine::prompt::{Prompt, Prompts};
///
/// let text = "<CAPTION_TO_PHRASE_GROUNDING> a green car";
/// let prompt = Prompt::parse(text, Prompts::Tasks).unwrap();
/// assert_eq!(prompt.name(), "<CAPTION_TO_PHRASE_GROUNDING>");
/// assert_eq!(prompt.sentence(), "Locate the phrases in the caption: a green car");
/// assert!(Prompt::parse("<GENERATE_TAGS>", Prompts::Tasks).is_err());
/// assert!(Prompt::parse("<GENERATE_TAGS>", Prompts::Any).is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// One of the fifteen tasks.
    Task {
        /// The task asked for.
        task: Task,
        /// The text or region after the token, trimmed; empty where the task takes none.
        input: String,
    },
    /// Any other text.
    Free(String),
}

impl Prompt {
    /// Reads a prompt; blanks around a task's are no part of it.
    ///
    /// # Errors
    ///
    /// [`PromptError`] says what is wrong with it.
    pub fn parse(prompt: &str, taken: Prompts) -> Result<Self, PromptError> {
        if prompt.len() > MAX_PROMPT {
            return Err(PromptError::TooManyBytes(prompt.len()));
        }
        let trimmed = prompt.trim();
        if trimmed.is_empty() {
            return Err(PromptError::Empty);
        }
        if let Some(task) = Task::of(trimmed) {
            return Self::of_task(task, trimmed);
        }
        // The reference looks for tokens anywhere, and either fails or takes the rest for a text.
        refuse_tokens(trimmed, None)?;
        match taken {
            Prompts::Any => Ok(Self::Free(prompt.to_owned())),
            Prompts::Tasks => {
                let (found, near) = (beginning(trimmed), near(trimmed).map(Task::token));
                Err(PromptError::UnknownTask { found, near })
            }
        }
    }

    fn of_task(task: Task, prompt: &str) -> Result<Self, PromptError> {
        let token = task.token();
        // Of two tokens the reference refuses one or makes the other the text's task.
        if task.input() == Input::Text {
            refuse_tokens(prompt, Some(task))?;
        }
        // The reference removes every occurrence of the token, then trims.
        let rest = prompt.replace(token, "");
        let input = rest.trim();
        match task.input() {
            Input::None if prompt != token => {
                let near = task.with_input(is_region(input)).map(Task::token);
                return Err(PromptError::NoInputAllowed { task: token, near });
            }
            Input::Text if input.is_empty() => return Err(PromptError::InputNeeded(token)),
            Input::Region if !is_region(input) => return Err(PromptError::BadRegion(token)),
            _ => {}
        }
        Ok(Self::Task { task, input: input.to_owned() })
    }

    /// The text that the model is given.
    pub fn sentence(&self) -> Cow<'_, str> {
        match self {
            Self::Task { task, input } => task.sentence().replace("{input}", input).into(),
            Self::Free(text) => text.into(),
        }
    }

    /// What the prompt's writer has chosen, special tokens of a region aside.
    pub fn text(&self) -> &str {
        match self {
            Self::Task { task, input } if task.input() == Input::Text => input,
            Self::Task { .. } => "",
            Self::Free(text) => text,
        }
    }

    /// The key of the answer's JSON: the task's token, or that which the text begins with, or the
    /// whole text, as callers of the reference's `post_process_generation` name their task.
    pub fn name(&self) -> &str {
        match self {
            Self::Task { task, .. } => task.token(),
            Self::Free(text) => first_token(text).unwrap_or(text),
        }
    }

    /// How the answer is read; without a task it is the text itself, as the reference has it.
    pub fn answer(&self) -> AnswerKind {
        match self {
            Self::Task { task, .. } => task.answer(),
            Self::Free(_) => AnswerKind::Text,
        }
    }
}

/// Refuses a text with the token of a task in it, but for one.
fn refuse_tokens(text: &str, but: Option<Task>) -> Result<(), PromptError> {
    let mut others = Task::ALL.into_iter().filter(|other| Some(*other) != but);
    match others.find(|other| text.contains(other.token())) {
        Some(other) => Err(PromptError::Misplaced(other.token())),
        None => Ok(()),
    }
}

/// `<DocVQA>`, if a text begins with such a token.
fn first_token(text: &str) -> Option<&str> {
    let text = text.trim_start();
    let is_end = |c: char| matches!(c, '<' | '>') || c.is_whitespace();
    let end = text.strip_prefix('<')?.find(is_end)? + 1;
    text[end..].starts_with('>').then(|| &text[..=end])
}

/// How a prompt begins, for an error's text.
fn beginning(prompt: &str) -> String {
    const MOST: usize = 40;
    let beginning: String = first_token(prompt).unwrap_or(prompt).chars().take(MOST).collect();
    beginning.escape_debug().to_string()
}

/// Whether `text` is exactly four tokens `<loc_0>` to `<loc_999>`.
fn is_region(text: &str) -> bool {
    let mut rest = text;
    for _ in 0..4 {
        let Some((number, tail)) = rest.strip_prefix("<loc_").and_then(|tail| tail.split_once('>'))
        else {
            return false;
        };
        let canonical = number.parse::<u16>().is_ok_and(|n| n < 1000 && n.to_string() == number);
        if !canonical {
            return false;
        }
        rest = tail;
    }
    rest.is_empty()
}

/// The task whose token a prompt was perhaps meant to begin with.
fn near(prompt: &str) -> Option<Task> {
    let token = prompt.find('>').map(|end| &prompt[..end]);
    [token, Some(prompt), prompt.split_whitespace().next()]
        .into_iter()
        .flatten()
        .find_map(|spelling| nearest(&plain(spelling)))
}

fn nearest(spelling: &[u8]) -> Option<Task> {
    let near = Task::ALL.into_iter().filter_map(|task| {
        let name = plain(task.token());
        let wrong = distance(spelling, &name);
        // One letter in four may be wrong.
        (wrong <= name.len().div_ceil(4).min(3)).then_some((wrong, task))
    });
    near.min_by_key(|(wrong, _)| *wrong).map(|(_, task)| task)
}

/// Letters, in capitals, and digits; nothing of what is too long to be a token.
fn plain(spelling: &str) -> Vec<u8> {
    const MOST: usize = 64;
    let bytes = if spelling.len() > MOST { &[] } else { spelling.as_bytes() };
    bytes.iter().filter(|byte| byte.is_ascii_alphanumeric()).map(u8::to_ascii_uppercase).collect()
}

/// How many bytes have to be changed, added or dropped to make one of the other.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt: &str, expected: Result<&str, PromptError>) {
        let found = Prompt::parse(prompt, Prompts::Tasks).map(|p| p.sentence().into_owned());
        assert_eq!(found, expected.map(str::to_owned), "{prompt}");
    }

    #[test]
    fn prompts_become_sentences_or_clear_errors() {
        check("<OD>", Ok("Locate the objects with category name in the image."));
        check("<OCR_WITH_REGION>", Ok("What is the text in the image, with regions?"));
        check("", Err(PromptError::Empty));
        check(" \n", Err(PromptError::Empty));
        check("<OPEN_VOCABULARY_DETECTION>wheels", Ok("Locate wheels in the image."));
        check(
            "<OPEN_VOCABULARY_DETECTION> ",
            Err(PromptError::InputNeeded("<OPEN_VOCABULARY_DETECTION>")),
        );
        check(
            "<REGION_TO_CATEGORY><loc_52><loc_332><loc_932><loc_774>",
            Ok("What is the region <loc_52><loc_332><loc_932><loc_774>?"),
        );
        let longest = format!("<CAPTION_TO_PHRASE_GROUNDING>{}", "a".repeat(MAX_PROMPT - 29));
        check(
            &longest,
            Ok(&longest
                .replace("<CAPTION_TO_PHRASE_GROUNDING>", "Locate the phrases in the caption: ")),
        );
        check(&format!("{longest}b"), Err(PromptError::TooManyBytes(MAX_PROMPT + 1)));
        for bad in
            ["", "<loc_52>", "<loc_1><loc_2><loc_3><loc_1000>", "<loc_1><loc_2><loc_3><loc_04>"]
        {
            check(&format!("<REGION_TO_OCR>{bad}"), Err(PromptError::BadRegion("<REGION_TO_OCR>")));
        }
    }

    #[test]
    fn blanks_around_a_task_are_no_error() {
        for task in Task::ALL {
            let text = match task.input() {
                Input::None => "",
                Input::Text => " a red circle",
                Input::Region => "<loc_1><loc_2><loc_3><loc_4>",
            };
            let prompt = format!("{}{text}", task.token());
            let expected = Prompt::parse(&prompt, Prompts::Tasks).unwrap();
            for blank in [format!(" {prompt}"), format!("{prompt} "), format!("\t{prompt}\r\n")] {
                assert_eq!(
                    Prompt::parse(&blank, Prompts::Tasks).as_ref(),
                    Ok(&expected),
                    "{blank:?}"
                );
            }
        }
    }

    /// What the error of a prompt says.
    fn refusal(prompt: &str) -> String {
        Prompt::parse(prompt, Prompts::Tasks).unwrap_err().to_string()
    }

    #[test]
    fn an_error_names_what_is_wrong_and_what_may_be_meant() {
        let region = "<loc_1><loc_2><loc_3><loc_4>";
        for (prompt, expected) in [
            ("<OD> cats", "<OD> takes no text; did you mean <CAPTION_TO_PHRASE_GROUNDING>?"),
            (&format!("<OD>{region}"), "<OD> takes no text; did you mean <REGION_TO_CATEGORY>?"),
            (&format!("<OCR>{region}"), "<OCR> takes no text; did you mean <REGION_TO_OCR>?"),
            ("<CAPTION> cats", "<CAPTION> takes no text"),
            ("<CAPTION_TO_PHRASE_GROUNDING>", "<CAPTION_TO_PHRASE_GROUNDING> needs a text"),
            ("what <OD> says", "<OD> is not at the beginning of the prompt"),
            (
                "<CAPTION_TO_PHRASE_GROUNDING>a car <OD>",
                "<OD> is not at the beginning of the prompt",
            ),
            (
                "<REFERRING_EXPRESSION_SEGMENTATION><CAPTION>",
                "<CAPTION> is not at the beginning of the prompt",
            ),
            (
                "<OPEN_VOCABULARY_DETECTION>a <CAPTION_TO_PHRASE_GROUNDING> b",
                "<CAPTION_TO_PHRASE_GROUNDING> is not at the beginning of the prompt",
            ),
        ] {
            assert_eq!(refusal(prompt), expected);
        }
    }

    /// As the reference has it.
    #[test]
    fn a_tasks_own_token_is_no_part_of_its_text() {
        let twice = "<CAPTION_TO_PHRASE_GROUNDING>a <CAPTION_TO_PHRASE_GROUNDING>b";
        check(twice, Ok("Locate the phrases in the caption: a b"));
    }

    #[test]
    fn near_spellings_are_recognized() {
        for (prompt, near) in [
            ("<od>", "<OD>"),
            ("OD", "<OD>"),
            ("<CAPTOIN>", "<CAPTION>"),
            ("caption", "<CAPTION>"),
            ("<caption> ", "<CAPTION>"),
            ("<Detailed Caption>", "<DETAILED_CAPTION>"),
            ("<MORE-DETAILED-CAPTION>", "<MORE_DETAILED_CAPTION>"),
            ("<OPEN_VOCABULARY_DETECTON> a cat", "<OPEN_VOCABULARY_DETECTION>"),
            ("CAPTION_TO_PHRASE_GROUNDING a cat", "<CAPTION_TO_PHRASE_GROUNDING>"),
            ("<REGION_TO_DESCRIPTON><loc_1><loc_2><loc_3><loc_4>", "<REGION_TO_DESCRIPTION>"),
            ("<OCR_WITH_REGIONS>", "<OCR_WITH_REGION>"),
        ] {
            let text = refusal(prompt);
            assert!(text.contains(&format!("did you mean {near}?")), "{prompt}: {text}");
            assert!(text.ends_with("Other texts are taken where prompts is any"), "{text}");
        }
        for prompt in
            ["hello", "<GENERATE_TAGS>", "x", "What is this?", "<>", "<", &"<OD".repeat(99)]
        {
            let text = refusal(prompt);
            assert!(text.contains("such as <CAPTION> or <OD>. Other texts"), "{prompt}: {text}");
        }
        // A reply of the server's is one line, and not a long one.
        let odd = refusal(&"a\r\n\0".repeat(4000));
        assert!(odd.starts_with("unknown task 'a\\r\\n\\0a") && odd.len() < 250, "{odd}");
    }

    #[test]
    fn any_text_is_a_prompt_where_that_is_allowed() {
        for (prompt, name) in [
            ("<GENERATE_TAGS>", "<GENERATE_TAGS>"),
            ("<MIXED_CAPTION> ", "<MIXED_CAPTION>"),
            ("<DocVQA>What is the date?", "<DocVQA>"),
            (" <DocVQA> Is a < b?", "<DocVQA>"),
            ("describe the picture", "describe the picture"),
            ("<a b>c", "<a b>c"),
            ("<a<b>c", "<a<b>c"),
            ("a <b> c", "a <b> c"),
            ("<CAPTOIN>", "<CAPTOIN>"),
            ("<\u{fc}ber>x", "<\u{fc}ber>"),
        ] {
            let parsed = Prompt::parse(prompt, Prompts::Any).unwrap();
            assert_eq!(parsed, Prompt::Free(prompt.to_owned()));
            assert_eq!((parsed.name(), &*parsed.sentence()), (name, prompt));
            assert_eq!(parsed.answer(), AnswerKind::Text);
            assert!(Prompt::parse(prompt, Prompts::Tasks).is_err(), "{prompt}");
        }
        // Tasks are what they were.
        let any = |prompt: &str| Prompt::parse(prompt, Prompts::Any);
        assert_eq!(any("<OD> "), Ok(Prompt::Task { task: Task::Od, input: String::new() }));
        assert_eq!(any(" "), Err(PromptError::Empty));
        assert_eq!(any("is <OD> here"), Err(PromptError::Misplaced("<OD>")));
        assert!(matches!(any("<OD> cats"), Err(PromptError::NoInputAllowed { .. })));
    }
}
