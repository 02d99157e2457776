//! Chains of questions about one picture, without a serving loop.

use std::sync::Arc;

use super::{Answer, Batch, Florence, GenerateOptions, Picture, Visual};
use crate::{
    Error,
    chain::{Asked, Chain, Run},
    image::Rgb,
    prompt::Prompts,
};

impl Florence {
    /// Asks all questions of a chain, one step after the other.
    ///
    /// # Errors
    ///
    /// [`Error::Prompt`] of what a step makes of an answer, [`Error::Compute`] or [`Error::Device`].
    pub fn run_chain(
        &self,
        picture: &Rgb,
        chain: Chain,
        taken: Prompts,
        options: &GenerateOptions,
    ) -> Result<Run, Error> {
        let mut run = Run::new(chain, taken);
        let mut whole = None;
        while !run.is_over() {
            let visuals = self.seen(picture, run.asks(), &mut whole)?;
            let mut batch = Batch::new(self);
            let mut answers: Vec<Option<Answer>> = visuals.iter().map(|_| None).collect();
            for (i, (asked, visual)) in run.asks().iter().zip(&visuals).enumerate() {
                batch.join(i, &self.question(&asked.prompt, taken)?, visual, options)?;
            }
            while !batch.is_empty() {
                for (i, answer) in batch.step()? {
                    answers[i] = Some(answer);
                }
            }
            run.answered(answers.into_iter().flatten().map(Arc::new));
        }
        Ok(run)
    }

    /// What each question is about, encoded.
    fn seen(
        &self,
        picture: &Rgb,
        asked: &[Asked],
        whole: &mut Option<Visual>,
    ) -> Result<Vec<Visual>, Error> {
        let parts = asked.iter().filter_map(|asked| asked.area);
        let parts = parts.map(|area| self.preprocess(&picture.part(area)));
        let parts = parts.collect::<Result<Vec<Picture>, _>>()?;
        if !parts.is_empty() {
            return self.visuals(&parts.iter().collect::<Vec<_>>());
        }
        let visual = match whole.take() {
            Some(visual) => visual,
            None => self.visual(&self.preprocess(picture)?)?,
        };
        Ok(asked.iter().map(|_| whole.insert(visual.clone()).clone()).collect())
    }
}
