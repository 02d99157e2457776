//! Text generation: greedy and beam search over the decoder, several jobs side by side.
//!
//! The search itself ([`Search`]) is pure and sees only logits; this file runs the network for it.
//! Rows of all jobs make one decoder step together. A job's rows never see another job's.

mod beam;
mod rules;
mod search;

use candle_core::{Result, Tensor};

pub use rules::Rules;
pub use search::{Generated, Search};

use crate::model::{CrossCache, Model, SelfCache};

/// A job to decode: its encoded picture and its rules.
pub(crate) struct Decoding {
    pub(crate) cross: CrossCache,
    pub(crate) rules: Rules,
}

/// Decodes all jobs to their end; `None` for a job that `stopped` names, asked before every step.
pub(crate) fn generate(
    model: &Model,
    jobs: &[Decoding],
    stopped: &dyn Fn(usize) -> bool,
) -> Result<Vec<Option<Generated>>> {
    let mut searches: Vec<Option<Search>> =
        jobs.iter().map(|job| Some(Search::new(job.rules.clone()))).collect();
    let mut results: Vec<Option<Generated>> = jobs.iter().map(|_| None).collect();
    let mut active: Vec<usize> = (0..jobs.len()).collect();
    let mut cache = SelfCache::default();
    while !active.is_empty() {
        let logits = step(model, jobs, &searches, &active, &mut cache)?;
        let (mut parents, mut first) = (Vec::new(), 0);
        let mut still = Vec::with_capacity(active.len());
        for job in active {
            let Some(search) = &mut searches[job] else { continue };
            let (rows, vocabulary) = (search.rows(), model.vocabulary());
            let span = first * vocabulary..(first + rows) * vocabulary;
            let chosen = search.advance(logits.as_ref().map(|logits| &logits[span]));
            if stopped(job) {
                searches[job] = None;
            } else if search.is_finished() {
                results[job] = searches[job].take().map(Search::finish);
            } else {
                parents.extend(chosen.into_iter().map(|parent| first + parent));
                still.push(job);
            }
            first += rows;
        }
        active = still;
        let is_unchanged = parents.iter().copied().eq(0..first);
        if !is_unchanged && !active.is_empty() {
            #[expect(clippy::cast_possible_truncation, reason = "a batch has few rows")]
            let parents: Vec<u32> = parents.into_iter().map(|parent| parent as u32).collect();
            cache.select(&Tensor::new(parents, model.device())?)?;
        }
    }
    Ok(results)
}

/// The logits of all rows, one after the other; `None` where every row's next token is forced.
fn step(
    model: &Model,
    jobs: &[Decoding],
    searches: &[Option<Search>],
    active: &[usize],
    cache: &mut SelfCache,
) -> Result<Option<Vec<f32>>> {
    let live = || active.iter().filter_map(|job| Some((*job, searches[*job].as_ref()?)));
    let tokens: Vec<u32> = live().flat_map(|(_, search)| search.last_tokens()).collect();
    let pictures: Vec<_> = live().map(|(job, search)| (&jobs[job].cross, search.rows())).collect();
    let hidden = model.decode_step(&tokens, cache, &pictures)?;
    if live().all(|(_, search)| search.is_forced()) {
        return Ok(None);
    }
    model.logits(&hidden)?.flatten_all()?.to_vec1().map(Some)
}
