//! Florence-2's fifteen tasks: token, prompt sentence, what text they take, how the answer is read.
//!
//! A checklist to add a task: a variant, its row in [`Task::spec`], its token in [`Task::ALL`].

use std::str::FromStr;

/// What a task's prompt carries besides the task token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Nothing: the prompt is the token alone.
    None,
    /// Free text, such as a caption or an object's name.
    Text,
    /// One region as four location tokens, `<loc_x1><loc_y1><loc_x2><loc_y2>`.
    Region,
}

/// How the answer's text is turned into JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerKind {
    /// The text itself.
    Text,
    /// Labels followed by boxes.
    LabelledBoxes,
    /// Boxes without labels.
    Boxes,
    /// Phrases of a given caption, followed by boxes.
    Phrases,
    /// Words followed by quadrilaterals.
    Quads,
    /// Polygons without labels.
    Polygons,
    /// Labelled boxes, or labelled polygons if any `<poly>` appears.
    BoxesOrPolygons,
}

/// Most bytes of a prompt: 16 for each of the 1024 positions that the published models have. What
/// looks at a text, the tokenizer above all, takes time for all of it, even if it then is too long.
pub const MAX_PROMPT: usize = 16 << 10;

/// A Florence-2 task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are the names of Florence-2's task tokens")]
pub enum Task {
    Ocr,
    OcrWithRegion,
    Caption,
    DetailedCaption,
    MoreDetailedCaption,
    Od,
    DenseRegionCaption,
    RegionProposal,
    CaptionToPhraseGrounding,
    ReferringExpressionSegmentation,
    RegionToSegmentation,
    OpenVocabularyDetection,
    RegionToCategory,
    RegionToDescription,
    RegionToOcr,
}

struct Spec {
    token: &'static str,
    sentence: &'static str,
    input: Input,
    answer: AnswerKind,
}

const fn spec(
    token: &'static str,
    sentence: &'static str,
    input: Input,
    answer: AnswerKind,
) -> Spec {
    Spec { token, sentence, input, answer }
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 15] = [
        Self::Caption,
        Self::DetailedCaption,
        Self::MoreDetailedCaption,
        Self::Od,
        Self::DenseRegionCaption,
        Self::RegionProposal,
        Self::Ocr,
        Self::OcrWithRegion,
        Self::CaptionToPhraseGrounding,
        Self::ReferringExpressionSegmentation,
        Self::RegionToSegmentation,
        Self::OpenVocabularyDetection,
        Self::RegionToCategory,
        Self::RegionToDescription,
        Self::RegionToOcr,
    ];

    #[rustfmt::skip]
    const fn spec(self) -> Spec {
        use AnswerKind as A;
        match self {
            Self::Ocr => spec("<OCR>", "What is the text in the image?", Input::None, A::Text),
            Self::OcrWithRegion => spec("<OCR_WITH_REGION>", "What is the text in the image, with regions?", Input::None, A::Quads),
            Self::Caption => spec("<CAPTION>", "What does the image describe?", Input::None, A::Text),
            Self::DetailedCaption => spec("<DETAILED_CAPTION>", "Describe in detail what is shown in the image.", Input::None, A::Text),
            Self::MoreDetailedCaption => spec("<MORE_DETAILED_CAPTION>", "Describe with a paragraph what is shown in the image.", Input::None, A::Text),
            Self::Od => spec("<OD>", "Locate the objects with category name in the image.", Input::None, A::LabelledBoxes),
            Self::DenseRegionCaption => spec("<DENSE_REGION_CAPTION>", "Locate the objects in the image, with their descriptions.", Input::None, A::LabelledBoxes),
            Self::RegionProposal => spec("<REGION_PROPOSAL>", "Locate the region proposals in the image.", Input::None, A::Boxes),
            Self::CaptionToPhraseGrounding => spec("<CAPTION_TO_PHRASE_GROUNDING>", "Locate the phrases in the caption: {input}", Input::Text, A::Phrases),
            Self::ReferringExpressionSegmentation => spec("<REFERRING_EXPRESSION_SEGMENTATION>", "Locate {input} in the image with mask", Input::Text, A::Polygons),
            Self::RegionToSegmentation => spec("<REGION_TO_SEGMENTATION>", "What is the polygon mask of region {input}", Input::Region, A::Polygons),
            Self::OpenVocabularyDetection => spec("<OPEN_VOCABULARY_DETECTION>", "Locate {input} in the image.", Input::Text, A::BoxesOrPolygons),
            Self::RegionToCategory => spec("<REGION_TO_CATEGORY>", "What is the region {input}?", Input::Region, A::Text),
            Self::RegionToDescription => spec("<REGION_TO_DESCRIPTION>", "What does the region {input} describe?", Input::Region, A::Text),
            Self::RegionToOcr => spec("<REGION_TO_OCR>", "What text is in the region {input}?", Input::Region, A::Text),
        }
    }

    /// The task's token, such as `<OD>`; also the key of the answer's JSON.
    pub const fn token(self) -> &'static str {
        self.spec().token
    }

    /// What the prompt carries besides the token.
    pub const fn input(self) -> Input {
        self.spec().input
    }

    /// How the answer is read.
    pub const fn answer(self) -> AnswerKind {
        self.spec().answer
    }
}

/// Why a prompt is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// The prompt does not begin with a task token.
    #[error("unknown task: a prompt begins with a task token such as <CAPTION> or <OD>")]
    UnknownTask,
    /// The task takes no text.
    #[error("{0} takes no text")]
    NoInputAllowed(&'static str),
    /// The task needs text or a region.
    #[error("{0} needs text after the token")]
    InputNeeded(&'static str),
    /// The region is not four location tokens.
    #[error("{0} needs a region <loc_x1><loc_y1><loc_x2><loc_y2> with numbers from 0 to 999")]
    BadRegion(&'static str),
    /// The text contains a string that the tokenizer would read as a special token.
    #[error("the text of {0} must not contain the special token {1}")]
    SpecialToken(&'static str, String),
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

/// A validated prompt.
///
/// ```
/// use florence_engine::task::{Prompt, Task};
///
/// let prompt: Prompt = "<CAPTION_TO_PHRASE_GROUNDING> a green car".parse().unwrap();
/// assert_eq!(prompt.task, Task::CaptionToPhraseGrounding);
/// assert_eq!(prompt.sentence(), "Locate the phrases in the caption: a green car");
/// assert!("<OD> cats".parse::<Prompt>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The task asked for.
    pub task: Task,
    /// The text or region after the token, trimmed; empty where the task takes none.
    pub input: String,
}

impl Prompt {
    /// The sentence that the model is given in place of the task token.
    pub fn sentence(&self) -> String {
        self.task.spec().sentence.replace("{input}", &self.input)
    }
}

impl FromStr for Prompt {
    type Err = PromptError;

    fn from_str(prompt: &str) -> Result<Self, PromptError> {
        if prompt.len() > MAX_PROMPT {
            return Err(PromptError::TooManyBytes(prompt.len()));
        }
        let task = Task::ALL
            .into_iter()
            .find(|task| prompt.starts_with(task.token()))
            .ok_or(PromptError::UnknownTask)?;
        let token = task.token();
        // The reference removes every occurrence of the token, then trims.
        let rest = prompt.replace(token, "");
        let input = rest.trim();
        match task.input() {
            Input::None if prompt != token => return Err(PromptError::NoInputAllowed(token)),
            Input::Text | Input::Region if input.is_empty() => {
                return Err(PromptError::InputNeeded(token));
            }
            Input::Region if !is_region(input) => return Err(PromptError::BadRegion(token)),
            _ => {}
        }
        Ok(Self { task, input: input.to_owned() })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt: &str, expected: Result<&str, PromptError>) {
        let found = prompt.parse::<Prompt>().map(|p| p.sentence());
        assert_eq!(found, expected.map(str::to_owned), "{prompt}");
    }

    #[test]
    fn prompts_become_sentences_or_clear_errors() {
        check("<OD>", Ok("Locate the objects with category name in the image."));
        check("<OD> ", Err(PromptError::NoInputAllowed("<OD>")));
        check("<OCR_WITH_REGION>", Ok("What is the text in the image, with regions?"));
        check("hello", Err(PromptError::UnknownTask));
        check("", Err(PromptError::UnknownTask));
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
        for bad in ["<loc_52>", "<loc_1><loc_2><loc_3><loc_1000>", "<loc_1><loc_2><loc_3><loc_04>"]
        {
            check(&format!("<REGION_TO_OCR>{bad}"), Err(PromptError::BadRegion("<REGION_TO_OCR>")));
        }
    }
}
