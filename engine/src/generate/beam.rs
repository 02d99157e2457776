//! Beam search as in `transformers` 5 (`GenerationMixin._beam_search`), in float32.
//!
//! Each step extends every running hypothesis by every token and keeps the best `2 * beams`
//! candidates. Those among the first `beams` that end become finished hypotheses; the best that
//! do not end go on. With early stopping the search is over once `beams` hypotheses have finished.
//! "Impossible" is a subtracted 1e9, as in the reference: its ties are part of the semantics.

use super::{
    path::Path,
    rules::{Rules, Scores, log_sum},
};
use crate::model::Logits;

const IMPOSSIBLE: f32 = -1e9;

pub(super) struct Beams {
    running: Vec<Path>,
    /// Until hypotheses differ, one row serves them all.
    has_parted: bool,
    running_scores: Vec<f32>,
    finished: Vec<Finished>,
    /// Whether a running hypothesis may still beat the finished ones.
    may_improve: bool,
    is_over: bool,
}

#[derive(Clone)]
struct Finished {
    path: Path,
    score: f32,
    is_done: bool,
}

/// A running hypothesis extended by one token.
#[derive(Clone, Copy)]
struct Candidate {
    parent: usize,
    token: u32,
    /// Of the whole sequence.
    total: f32,
    /// Of the token alone.
    own: f32,
}

impl Beams {
    pub(super) fn new(beams: usize, start: &Path) -> Self {
        let mut running_scores = vec![IMPOSSIBLE; beams];
        running_scores[0] = 0.0;
        let nothing = Finished { path: start.clone(), score: IMPOSSIBLE, is_done: false };
        Self {
            running: vec![start.clone(); beams],
            has_parted: false,
            running_scores,
            finished: vec![nothing; beams],
            may_improve: true,
            is_over: false,
        }
    }

    /// The hypotheses that need a row of logits each.
    pub(super) fn rows(&self) -> &[Path] {
        if self.has_parted { &self.running } else { &self.running[..1] }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.is_over
    }

    pub(super) fn advance(&mut self, rules: &Rules, logits: Logits<'_>) -> Vec<usize> {
        let candidates = self.candidates(rules, logits);
        let length = self.running[0].ids.len() + 1;
        let ends: Vec<bool> = candidates.iter().map(|c| rules.ends(c.token, length)).collect();
        let divisor = generated_divisor(length, rules.length_penalty);

        self.collect_finished(rules, &candidates, &ends, divisor);
        let rows = self.rows().len();
        let mut parents = self.continue_running(&candidates, &ends);
        for parent in &mut parents {
            *parent = (*parent).min(rows - 1);
        }
        self.has_parted |= self.running.iter().any(|path| path.ids != self.running[0].ids);
        parents.truncate(self.rows().len());

        let worst = self.finished.iter().map(|f| f.score).fold(f32::INFINITY, f32::min);
        let best_running = self.running_scores[0] / divisor;
        self.may_improve &=
            self.finished.iter().any(|f| best_running > if f.is_done { worst } else { IMPOSSIBLE });
        let all_done = self.finished.iter().all(|f| f.is_done);
        self.is_over = !self.may_improve
            || (all_done && rules.early_stopping)
            || ends.iter().all(|ends| *ends);
        parents
    }

    /// Extensions that are looked at in a step.
    pub(super) fn wanted(&self) -> usize {
        2 * self.running.len()
    }

    /// The best extensions, best first, lower flat index first among equals.
    fn candidates(&self, rules: &Rules, logits: Logits<'_>) -> Vec<Candidate> {
        let wanted = self.wanted();
        let mut best: Vec<Candidate> = Vec::with_capacity(wanted + 1);
        let rows = logits.each().cycle();
        for (parent, (row, base)) in rows.zip(&self.running_scores).enumerate() {
            let scores = Scores::new(rules, &self.running[parent].ids, log_sum(row));
            for (bound, block) in scores.blocks(row) {
                let least = best.last().filter(|_| best.len() == wanted).map(|last| last.total);
                if least.is_some_and(|least| bound + base <= least) {
                    continue;
                }
                for (token, own) in block {
                    let total = own + base;
                    if best.len() == wanted && best.last().is_some_and(|last| total <= last.total) {
                        continue;
                    }
                    let at = best.partition_point(|kept| kept.total >= total);
                    best.insert(at, Candidate { parent, token, total, own });
                    best.truncate(wanted);
                }
            }
        }
        best
    }

    /// Merges the candidates that end, and rank high enough, into the finished hypotheses.
    fn collect_finished(
        &mut self,
        rules: &Rules,
        candidates: &[Candidate],
        ends: &[bool],
        divisor: f32,
    ) {
        let beams = self.running.len();
        let is_closed = rules.early_stopping && self.finished.iter().all(|f| f.is_done);
        // Candidates that may not finish would only ever tie with the empty slots: leave them out.
        let ending = candidates.iter().zip(ends).take(beams).filter(|(_, ends)| **ends);
        for (candidate, _) in ending {
            let mut score = candidate.total / divisor;
            if is_closed {
                score += IMPOSSIBLE;
            }
            if !self.may_improve {
                score += IMPOSSIBLE;
            }
            let path = self.running[candidate.parent].extended(candidate.token, candidate.own);
            self.finished.push(Finished { path, score, is_done: true });
        }
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(beams);
    }

    /// The best candidates that do not end go on; returns their parents.
    fn continue_running(&mut self, candidates: &[Candidate], ends: &[bool]) -> Vec<usize> {
        let beams = self.running.len();
        let mut next: Vec<(f32, &Candidate)> = candidates
            .iter()
            .zip(ends)
            .map(|(candidate, ends)| {
                (candidate.total + if *ends { IMPOSSIBLE } else { 0.0 }, candidate)
            })
            .collect();
        next.sort_by(|a, b| b.0.total_cmp(&a.0));
        next.truncate(beams);
        self.running =
            next.iter().map(|(_, c)| self.running[c.parent].extended(c.token, c.own)).collect();
        self.running_scores = next.iter().map(|(score, _)| *score).collect();
        next.iter().map(|(_, candidate)| candidate.parent).collect()
    }

    /// What the answer begins with, whatever the next steps bring: all that may become it do. Of
    /// the finished hypotheses only the best may, and every other descends from a running one.
    pub(super) fn settled(&self) -> &[u32] {
        let best = self.finished.first().filter(|best| best.is_done).map(|best| &best.path);
        let first = &best.unwrap_or(&self.running[0]).ids;
        if self.is_over {
            return first;
        }
        let common = |length: usize, path: &Path| {
            let pairs = first[..length].iter().zip(&path.ids);
            pairs.take_while(|(a, b)| a == b).count()
        };
        &first[..self.running.iter().fold(first.len(), common)]
    }

    /// Up to `most` of the finished hypotheses, best first; the best running one if none has
    /// finished.
    pub(super) fn into_best(mut self, most: usize) -> Vec<(Path, f32)> {
        let finished = self.finished.into_iter().filter(|hypothesis| hypothesis.is_done);
        let mut best: Vec<_> = finished.map(|it| (it.path, it.score)).take(most.max(1)).collect();
        if best.is_empty() {
            best.push((self.running.swap_remove(0), self.running_scores[0]));
        }
        best
    }
}

/// `generated^penalty`, where the start token does not count as generated.
fn generated_divisor(length: usize, penalty: f32) -> f32 {
    ((length - 1) as f32).powf(penalty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{self, Cpu};

    fn log_sum_exp(row: &[f32]) -> f32 {
        kernels::log_sum_exp(Cpu::detect(), row)
    }

    #[test]
    fn blocks_that_are_passed_over_hold_no_candidate() {
        const VOCABULARY: usize = 1000;
        let rules = Rules {
            vocabulary: VOCABULARY,
            beams: 3,
            max_length: 100,
            no_repeat_ngram: 2,
            early_stopping: true,
            length_penalty: 1.0,
            sampling: None,
            start: 0,
            eos: 2,
            forced_bos: None,
            forced_eos: None,
        };
        let mut beams = Beams::new(3, &Path::new(0));
        beams.has_parted = true;
        for (i, score) in [-0.5, -0.6, -3.0].into_iter().enumerate() {
            beams.running_scores[i] = score;
            beams.running[i].ids = vec![0, 500, 7, 0]; // 500 may not come again
        }
        let mut seed = 9u32;
        for _ in 0..200 {
            let logits: Vec<f32> = (0..3 * VOCABULARY)
                .map(|i| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Few values, so that there are many ties; the banned token is the best.
                    if i % VOCABULARY == 500 { 90.0 } else { (seed >> 28) as f32 }
                })
                .collect();
            let mut all = Vec::new();
            for (parent, row) in logits.chunks(VOCABULARY).enumerate() {
                let log_sum = log_sum_exp(row);
                let totals = row.iter().map(|x| (x - log_sum) + beams.running_scores[parent]);
                let allowed = (0..).zip(totals).filter(|(token, _)| *token != 500u32);
                all.extend(allowed.map(|(token, total)| (total, parent, token)));
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let found = beams.candidates(&rules, Logits::all(&logits, VOCABULARY));
            let found: Vec<_> = found.iter().map(|c| (c.total, c.parent, c.token)).collect();
            assert_eq!(found, all[..6]);
            // The highest seven of each row have them all, the banned one among them.
            let (mut values, mut ids, mut log_sums) = (Vec::new(), Vec::new(), Vec::new());
            for row in logits.chunks(VOCABULARY) {
                let mut order: Vec<u32> = (0..1000).collect();
                order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
                order.truncate(7);
                order.sort_unstable();
                values.extend(order.iter().map(|id| row[*id as usize]));
                ids.extend(order);
                log_sums.push(log_sum_exp(row));
            }
            let found = beams.candidates(&rules, Logits::highest(&values, &ids, &log_sums, 7));
            let found: Vec<_> = found.iter().map(|c| (c.total, c.parent, c.token)).collect();
            assert_eq!(found, all[..6]);
        }
    }

    #[test]
    fn one_row_serves_all_hypotheses_until_they_part() {
        let rules = Rules {
            vocabulary: 4,
            beams: 3,
            max_length: 9,
            no_repeat_ngram: 0,
            early_stopping: true,
            length_penalty: 1.0,
            sampling: None,
            start: 2,
            eos: 2,
            forced_bos: Some(0),
            forced_eos: None,
        };
        let mut beams = Beams::new(3, &Path::new(2));
        assert_eq!(beams.advance(&rules, Logits::all(&[0.0; 4], 4)), [0]);
        assert_eq!(beams.rows().len(), 1);
        let logits = Logits::all(&[3.0, 2.0, 0.0, 1.0], 4);
        assert_eq!(beams.advance(&rules, logits), [0, 0, 0]);
        let tokens: Vec<_> = beams.rows().iter().map(|path| path.ids[2]).collect();
        assert_eq!(tokens, [0, 1, 3]);
    }
}
