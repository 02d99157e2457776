//! Self-attention of the decoder: one query a row, over all that the row has seen.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Cpu, rows::softmax, scratch::Lines};

/// What the rows of one job have seen: keys and values of every layer and step.
///
/// Rows share their past: each is a list of slots, so that a search may drop, keep and double rows
/// without moving any key.
#[derive(Debug, Default)]
pub(crate) struct History {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    rows: Vec<Vec<u32>>,
    slots: u32,
}

impl History {
    /// Gives each of `rows` rows a slot for the coming step.
    pub(crate) fn advance(&mut self, rows: usize) {
        self.rows.resize_with(rows, Vec::new);
        for row in &mut self.rows {
            row.push(self.slots);
            self.slots += 1;
        }
    }

    /// Row `i` goes on from what row `parents[i]` has seen.
    pub(crate) fn select(&mut self, parents: &[usize]) {
        self.rows = parents.iter().map(|parent| self.rows[*parent].clone()).collect();
    }

    /// Adds the rows' keys and values to a layer; attention of the queries, each over its past.
    fn attend(
        &mut self,
        cpu: Cpu,
        layer: usize,
        rows: &mut HistoryRows<'_>,
        heads: usize,
        scale: f32,
    ) {
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, Default::default);
        }
        let (keys, values) = &mut self.layers[layer];
        keys.extend_from_slice(rows.keys);
        values.extend_from_slice(rows.values);
        let d = rows.queries.len() / self.rows.len().max(1);
        let parts = rows.queries.chunks_exact(d).zip(rows.out.chunks_exact_mut(d));
        for ((q, out), slots) in parts.zip(&self.rows) {
            cpu.run(AttendHistory { keys, values, slots, q, heads, scale, out });
        }
    }
}

/// What a job's rows bring to a layer, `[rows, D]` each.
struct HistoryRows<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    out: &'a mut [f32],
}

/// Self-attention of one decoder step: the rows of all jobs, each over its own history. `qkv` are
/// queries, keys and values, `[rows, D]` each.
pub(crate) fn attend_histories(
    cpu: Cpu,
    layer: usize,
    jobs: Vec<&mut History>,
    qkv: [&[f32]; 3],
    d: usize,
    heads: usize,
) -> Vec<f32> {
    let scale = ((d / heads) as f32).sqrt().recip();
    let mut all = vec![0.0; qkv[0].len()];
    let (mut first, mut rest) = (0, all.as_mut_slice());
    let mut parts = Vec::with_capacity(jobs.len());
    for job in jobs {
        let count = job.rows.len() * d;
        let (out, others) = rest.split_at_mut(count);
        let [queries, keys, values] = qkv.map(|x| &x[first..first + count]);
        parts.push((job, HistoryRows { queries, keys, values, out }));
        rest = others;
        first += count;
    }
    parts
        .into_par_iter()
        .for_each(|(job, mut rows)| job.attend(cpu, layer, &mut rows, heads, scale));
    all
}

struct AttendHistory<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    slots: &'a [u32],
    q: &'a [f32],
    heads: usize,
    scale: f32,
    out: &'a mut [f32],
}

impl WithSimd for AttendHistory<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { keys, values, slots, q, heads, scale, out } = self;
        let (d, size) = (q.len(), q.len() / heads);
        let length = slots.len();
        let mut scores = Lines::floats(heads * length);
        let scores = &mut scores.as_floats()[..heads * length];
        for (t, slot) in slots.iter().enumerate() {
            let key = &keys[*slot as usize * d..][..d];
            let heads = key.chunks_exact(size).zip(q.chunks_exact(size));
            for (head, (key, q)) in heads.enumerate() {
                let (key, key_tail) = S::as_simd_f32s(key);
                let (q, q_tail) = S::as_simd_f32s(q);
                let sum = key
                    .iter()
                    .zip(q)
                    .fold(simd.splat_f32s(0.0), |sum, (key, q)| simd.mul_add_e_f32s(*key, *q, sum));
                let tail: f32 = key_tail.iter().zip(q_tail).map(|(key, q)| key * q).sum();
                scores[head * length + t] = simd.reduce_sum_f32s(sum) + tail;
            }
        }
        for scores in scores.chunks_exact_mut(length) {
            softmax(simd, scores, scale);
        }
        out.fill(0.0);
        for (t, slot) in slots.iter().enumerate() {
            let value = &values[*slot as usize * d..][..d];
            let parts = value.chunks_exact(size).zip(out.chunks_exact_mut(size));
            for (head, (value, out)) in parts.enumerate() {
                let weight = scores[head * length + t];
                let weights = simd.splat_f32s(weight);
                let (value, value_tail) = S::as_simd_f32s(value);
                let (out, out_tail) = S::as_mut_simd_f32s(out);
                for (out, value) in out.iter_mut().zip(value) {
                    *out = simd.mul_add_e_f32s(*value, weights, *out);
                }
                for (out, value) in out_tail.iter_mut().zip(value_tail) {
                    *out += value * weight;
                }
            }
        }
    }
}
