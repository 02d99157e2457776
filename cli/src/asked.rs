//! Pictures and prompts that a model is asked in several numbers.

use std::path::Path;

use anyhow::{Context, ensure};
use florence_engine::{Answer, Florence, Prepared, Stop, fetch::Authorities, image::decode};

use crate::{
    ask::AskArgs,
    source::{Item, Sources},
    whole::is_same,
};

#[derive(clap::Args)]
pub(crate) struct AskedArgs {
    #[command(flatten)]
    pub(crate) ask: AskArgs,
    /// Task token, such as `<OD>`, followed by its text where the task takes one; may be repeated
    #[arg(long = "task", default_value = "<OD>", value_name = "PROMPT")]
    pub(crate) tasks: Vec<String>,
    /// Most pictures that are asked about
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Pictures, and whatever else label takes
    #[arg(required = true, value_name = "PICTURE")]
    pictures: Vec<String>,
}

/// A picture and a prompt.
pub(crate) struct Question {
    pub(crate) picture: usize,
    pub(crate) prompt: String,
}

/// All that is asked.
pub(crate) struct Asked {
    pub(crate) items: Vec<(Item, Vec<u8>)>,
    pub(crate) questions: Vec<Question>,
}

impl AskedArgs {
    /// Every picture that can be read with every task; the others are told about.
    pub(crate) fn read(&self) -> anyhow::Result<Asked> {
        self.ask.check()?;
        let sources = Sources::new(&self.pictures, None, &Authorities::default())?;
        let (mut items, mut list) = (Vec::new(), sources.list());
        while items.len() < self.limit
            && let Some(listed) = list.next()
        {
            let read =
                listed.map_err(|error| (error.name, error.reason)).and_then(|item| {
                    match self.picture(&sources, &item) {
                        Ok(bytes) => Ok((item, bytes)),
                        Err(reason) => Err((item.name, reason)),
                    }
                });
            match read {
                Ok(read) => items.push(read),
                Err((name, reason)) => eprintln!("{name}: {reason}"),
            }
        }
        ensure!(!items.is_empty(), "there is no picture to ask about");
        let question = |picture| {
            self.tasks.iter().map(move |prompt| Question { picture, prompt: prompt.clone() })
        };
        let questions = (0..items.len()).flat_map(question).collect();
        Ok(Asked { items, questions })
    }

    /// Whether a file has a picture, or lists some.
    pub(crate) fn reads(&self, asked: &Asked, file: &Path) -> bool {
        let named = self.pictures.iter().map(Path::new);
        let mut files = named.chain(asked.items.iter().filter_map(|(item, _)| item.place.file()));
        files.any(|it| is_same(it, file))
    }

    /// A picture's bytes, if it can be decoded.
    fn picture(&self, sources: &Sources, item: &Item) -> Result<Vec<u8>, String> {
        let bytes = sources.read(&item.place, &Stop::default())?;
        let prepare = self.ask.prepare();
        let decoded = decode(&bytes, &prepare.limits, prepare.orientation);
        decoded.map(drop).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    pub(crate) fn prepared(
        &self,
        florence: &Florence,
        asked: &Asked,
        question: &Question,
    ) -> anyhow::Result<Prepared> {
        let (item, bytes) = &asked.items[question.picture];
        let prepared = florence.prepare(bytes, &question.prompt, &self.ask.prepare());
        prepared.with_context(|| item.name.clone())
    }

    pub(crate) fn answer(
        &self,
        florence: &Florence,
        prepared: &Prepared,
    ) -> anyhow::Result<Answer> {
        Ok(florence.run_one(prepared, &self.ask.generate())?)
    }
}
