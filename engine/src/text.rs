//! The tokenizer: prompt sentences to ids, ids to text.
//!
//! Microsoft's `tokenizer.json` lacks the 1024 tokens that Florence-2 adds to BART's vocabulary;
//! they are added here, in the reference's order, where the file does not have them.

use tokenizers::{AddedToken, DecoderWrapper, Tokenizer};

use crate::{
    model::{Checkpoint, LoadError},
    prompt::{Prompt, PromptError},
};

/// Prompt sentences to token ids and back.
pub(crate) struct Text {
    tokenizer: Tokenizer,
    /// Strings that the tokenizer reads as one special token.
    special: Vec<String>,
    first_location: u32,
}

/// Location bins on each axis.
pub(crate) const BINS: u32 = 1000;

impl Text {
    pub(crate) fn load(checkpoint: Checkpoint<'_>) -> Result<Self, LoadError> {
        const FILE: &str = "tokenizer.json";
        if let Checkpoint::Directory(directory) = checkpoint
            && !checkpoint.has(FILE)
        {
            return Err(LoadError::NoTokenizer(directory.to_owned()));
        }
        let failed = |source| LoadError::Tokenizer { path: checkpoint.path(FILE), source };
        let mut tokenizer = Tokenizer::from_bytes(checkpoint.read(FILE)?).map_err(failed)?;
        let missing: Vec<AddedToken> = florence_tokens()
            .filter(|token| tokenizer.token_to_id(token).is_none())
            .map(|token| AddedToken::from(token, true).normalized(false))
            .collect();
        tokenizer.add_special_tokens(missing).map_err(failed)?;
        let first_location = tokenizer.token_to_id("<loc_0>").unwrap_or_default();
        let special = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect();
        Ok(Self { tokenizer, special, first_location })
    }

    /// Number of ids, added tokens included.
    pub(crate) fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The id of a token.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The ids of a prompt's sentence, between `<s>` and `</s>`.
    ///
    /// User text must not smuggle in special tokens: any string in it that the tokenizer reads as
    /// one is refused. A region has been checked to be four locations.
    pub(crate) fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, PromptError> {
        let text = prompt.text();
        if let Some(found) = self.special.iter().find(|special| text.contains(special.as_str())) {
            return Err(PromptError::SpecialToken(found.clone()));
        }
        let encoding = self
            .tokenizer
            .encode_fast(&*prompt.sentence(), true)
            .map_err(|_unencodable| PromptError::Unreadable)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of ids, special tokens included.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, false).unwrap_or_default()
    }

    /// Text of the next ids of a sequence, which continues that of the ids before; none if it would
    /// end within a character, or if the tokenizer's texts cannot be put together from parts.
    pub(crate) fn piece(&self, ids: &[u32]) -> Option<String> {
        let is_of_bytes =
            matches!(self.tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let text = is_of_bytes.then(|| self.decode(ids))?;
        (!text.is_empty() && !text.ends_with(char::REPLACEMENT_CHARACTER)).then_some(text)
    }

    /// Whether an id is one of the location tokens.
    pub(crate) fn is_location(&self, id: u32) -> bool {
        (self.first_location..self.first_location + BINS).contains(&id)
    }
}

/// The tokens that Florence-2 adds, in its order.
fn florence_tokens() -> impl Iterator<Item = String> {
    let first = ["<od>", "</od>", "<ocr>", "</ocr>"].map(str::to_owned);
    let last = [
        "<cap>",
        "</cap>",
        "<ncap>",
        "</ncap>",
        "<dcap>",
        "</dcap>",
        "<grounding>",
        "</grounding>",
        "<seg>",
        "</seg>",
        "<sep>",
        "<region_cap>",
        "</region_cap>",
        "<region_to_desciption>",
        "</region_to_desciption>",
        "<proposal>",
        "</proposal>",
        "<poly>",
        "</poly>",
        "<and>",
    ]
    .map(str::to_owned);
    first.into_iter().chain((0..BINS).map(|n| format!("<loc_{n}>"))).chain(last)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::prompt::Prompts;

    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        ids_with_special: Vec<u32>,
        decode: String,
    }

    /// The real tokenizer may not be part of the project: `FLORENCE_TOKENIZER_DIR` names it.
    #[test]
    fn the_real_tokenizer_gives_the_references_ids() {
        let Some(directory) = std::env::var_os("FLORENCE_TOKENIZER_DIR").map(PathBuf::from) else {
            return crate::not_run(
                "FLORENCE_TOKENIZER_DIR names no directory with the real tokenizer.json",
            );
        };
        let text = Text::load(Checkpoint::Directory(&directory)).unwrap();
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../tests/fixtures/tokenizer.json")).unwrap();
        assert!(cases.len() >= 32);
        for case in cases {
            let encoding = text.tokenizer.encode_fast(case.text.as_str(), true).unwrap();
            assert_eq!(encoding.get_ids(), case.ids_with_special, "{:?}", case.text);
            assert_eq!(text.decode(&case.ids_with_special), case.decode, "{:?}", case.text);
        }
    }

    #[test]
    fn every_sentence_of_the_embedded_model_survives_a_round() {
        let text = Text::load(Checkpoint::Embedded).unwrap();
        let read = |prompt: &str| Prompt::parse(prompt, Prompts::Any).unwrap();
        for prompt in [
            "<OD>",
            "<OPEN_VOCABULARY_DETECTION> a b",
            "<REGION_TO_OCR><loc_0><loc_1><loc_2><loc_999>",
            "<DocVQA> What's \u{fc}ber 50 %?\n",
            " a plain sentence ",
        ] {
            let prompt = read(prompt);
            let ids = text.encode(&prompt).unwrap();
            assert_eq!(text.decode(&ids), format!("<s>{}</s>", prompt.sentence()));
        }
        let ids = text.encode(&read("<REGION_TO_OCR><loc_0><loc_1><loc_2><loc_999>")).unwrap();
        assert_eq!(ids.iter().filter(|id| text.is_location(**id)).count(), 4);
    }

    #[test]
    fn pieces_end_with_whole_characters_and_make_the_text() {
        let text = Text::load(Checkpoint::Embedded).unwrap();
        let prompt = Prompt::parse("na\u{ef}ve \u{1f600} \u{4e2d}\u{6587}x", Prompts::Any).unwrap();
        let ids = text.encode(&prompt).unwrap();
        let (mut told, mut pieces) = (0, Vec::new());
        for end in 1..=ids.len() {
            if let Some(piece) = text.piece(&ids[told..end]) {
                told = end;
                pieces.push(piece);
            }
        }
        assert_eq!(pieces.concat(), text.decode(&ids));
        // The face has four bytes, which are several ids.
        assert!(pieces.len() > 5 && pieces.len() < ids.len(), "{pieces:?}");
        assert!(pieces.iter().any(|piece| piece.contains('\u{1f600}')), "{pieces:?}");
    }

    #[test]
    fn no_text_of_a_user_becomes_a_special_token() {
        let text = Text::load(Checkpoint::Embedded).unwrap();
        for special in &text.special {
            for prompt in [
                format!("<OPEN_VOCABULARY_DETECTION>a {special}"),
                format!("<DocVQA>a {special}"),
                format!("a{special}"),
                special.clone(),
            ] {
                let prompt = Prompt::parse(&prompt, Prompts::Any).unwrap();
                let refused = text.encode(&prompt).unwrap_err();
                assert!(matches!(refused, PromptError::SpecialToken(_)), "{prompt:?}: {refused}");
            }
        }
        assert!(text.special.len() > 1024);
    }
}
