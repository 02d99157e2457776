//! Florence-2's fifteen tasks: token, prompt sentence, what text they take, how the answer is read.
//!
//! A checklist to add a task: a variant, its row in [`Task::spec`], its token in [`Task::ALL`].

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

    /// The task whose token a prompt begins with.
    pub fn of(prompt: &str) -> Option<Self> {
        let prompt = prompt.trim_start();
        Self::ALL.into_iter().find(|task| prompt.starts_with(task.token()))
    }

    /// What the model is asked, `{input}` standing for the text or region.
    pub const fn sentence(self) -> &'static str {
        self.spec().sentence
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

    /// The task that answers alike and takes a text, or a region, where this one takes nothing.
    pub(crate) const fn with_input(self, is_region: bool) -> Option<Self> {
        match (self, is_region) {
            (Self::Od | Self::DenseRegionCaption | Self::RegionProposal, false) => {
                Some(Self::CaptionToPhraseGrounding)
            }
            (Self::Od, true) => Some(Self::RegionToCategory),
            (Self::Ocr | Self::OcrWithRegion, true) => Some(Self::RegionToOcr),
            (
                Self::Caption
                | Self::DetailedCaption
                | Self::MoreDetailedCaption
                | Self::DenseRegionCaption,
                true,
            ) => Some(Self::RegionToDescription),
            _ => None,
        }
    }
}
