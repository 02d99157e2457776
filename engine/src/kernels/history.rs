//! Self-attention of the decoder: one query a row, over all that the row has seen.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    Cpu, Precision,
    attention::{HeadPart, join_heads},
    gemm::prefetch,
    past::Past,
    rows::{softmax, store},
    scratch::{Line, Lines, WIDTH},
};

/// What the rows of one job have seen: keys and values of every layer, head and step.
#[derive(Debug, Default)]
pub(crate) struct History {
    layers: Vec<Vec<Head>>,
    past: Past,
    /// Slots that have been made, and those of them that no row needs.
    slots: u32,
    free: Vec<u32>,
}

/// Keys and values of a head.
#[derive(Debug, Clone)]
enum Head {
    Floats { keys: Floats, values: Floats },
    Wholes { keys: Wholes, values: Wholes },
}

impl Head {
    fn new(precision: Precision, size: usize) -> Self {
        if precision == Precision::F32 || !size.is_multiple_of(2) {
            return Self::Floats { keys: Floats::default(), values: Floats::default() };
        }
        Self::Wholes { keys: Wholes::default(), values: Wholes::default() }
    }
}

impl History {
    /// Gives each of `rows` rows a slot for the coming step.
    pub(crate) fn advance(&mut self, rows: usize) {
        let Self { past, slots, free, .. } = self;
        past.advance(rows, || {
            free.pop().unwrap_or_else(|| {
                *slots += 1;
                *slots - 1
            })
        });
    }

    /// Row `i` goes on from what row `parents[i]` has seen.
    pub(crate) fn select(&mut self, parents: &[usize]) {
        self.free.extend(self.past.select(parents));
    }

    /// The heads of a layer, and every row's slots.
    fn layer(&mut self, layer: usize, heads: usize, empty: &Head) -> (&mut [Head], &[Vec<u32>]) {
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, Vec::new);
        }
        self.layers[layer].resize(heads, empty.clone());
        (&mut self.layers[layer], self.past.rows())
    }
}

/// Self-attention of one decoder step: the rows of all jobs, each over its own history. `qkv` are
/// queries, keys and values, `[rows, D]` each. What is kept is int16 unless `precision` is float32.
pub(crate) fn attend_histories(
    cpu: Cpu,
    precision: Precision,
    layer: usize,
    jobs: Vec<&mut History>,
    qkv: [&[f32]; 3],
    d: usize,
    heads: usize,
) -> Vec<f32> {
    let (size, mut first, mut tasks) = (d / heads, 0, Vec::new());
    let empty = Head::new(precision, size);
    for job in jobs {
        let (heads, rows) = job.layer(layer, heads, &empty);
        tasks.extend(heads.iter_mut().enumerate().map(|(i, head)| (head, i, first, rows)));
        first += rows.len();
    }
    let attend = |(head, i, first, rows): (&mut Head, usize, usize, &[Vec<u32>])| {
        let qkv = qkv.map(|x| &x[first * d + i * size..]);
        let out = match head {
            Head::Floats { keys, values } => attend_head(cpu, keys, values, rows, qkv, (d, size)),
            Head::Wholes { keys, values } => attend_head(cpu, keys, values, rows, qkv, (d, size)),
        };
        HeadPart { first, head: i, out }
    };
    let parts = tasks.into_par_iter().map(attend).collect();
    join_heads(parts, qkv[0].len(), d, size)
}

/// Adds the rows' keys and values to what a head keeps; attention of the queries, `[rows, K]`.
/// Rows of `qkv` have `size` floats at a distance of `stride`.
fn attend_head<K: Kept>(
    cpu: Cpu,
    keys: &mut K,
    values: &mut K,
    rows: &[Vec<u32>],
    [q, k, v]: [&[f32]; 3],
    (stride, size): (usize, usize),
) -> Vec<f32> {
    for (kept, new) in [(&mut *keys, k), (&mut *values, v)] {
        for (row, slots) in new.chunks(stride).zip(rows) {
            let slot = slots.last().map_or(0, |slot| *slot as usize);
            kept.keep(slot, &row[..size]);
        }
    }
    let mut out = vec![0.0; rows.len() * size];
    cpu.run(AttendHead { keys: &*keys, values: &*values, rows, q, stride, out: &mut out });
    out
}

/// Rows of `K` numbers in whole cache lines, and how they become floats.
trait Kept {
    /// Into how many registers of floats a register unpacks: the row's first half and its second.
    const PARTS: usize;

    /// Keeps a row in a slot, in the place of what may have been there.
    fn keep(&mut self, slot: usize, row: &[f32]);
    fn lines(&self) -> &[Line];
    fn unpack<S: Simd>(simd: S, register: S::f32s) -> [S::f32s; 2];

    /// What a unit of a row is worth.
    fn unit(&self, slot: u32) -> f32;
}

/// The lines of a slot, for rows of so many numbers.
fn lines_of(kept: &mut Vec<Line>, slot: usize, numbers: usize) -> &mut [Line] {
    let lines = numbers.div_ceil(WIDTH);
    let end = (slot + 1) * lines;
    if kept.len() < end {
        kept.resize(end, Line::default());
    }
    &mut kept[end - lines..end]
}

#[derive(Debug, Default, Clone)]
struct Floats(Vec<Line>);

impl Kept for Floats {
    const PARTS: usize = 1;

    fn keep(&mut self, slot: usize, row: &[f32]) {
        for (line, part) in lines_of(&mut self.0, slot, row.len()).iter_mut().zip(row.chunks(WIDTH))
        {
            line.0[..part.len()].copy_from_slice(part);
        }
    }

    #[inline(always)]
    fn lines(&self) -> &[Line] {
        &self.0
    }

    #[inline(always)]
    fn unpack<S: Simd>(_simd: S, register: S::f32s) -> [S::f32s; 2] {
        [register; 2]
    }

    #[inline(always)]
    fn unit(&self, _slot: u32) -> f32 {
        1.0
    }
}

/// int16, every row in units of its own, plus 32,768: of a pair, the low half is a number of the
/// row's first half, the high half one of its second.
#[derive(Debug, Default, Clone)]
struct Wholes {
    pairs: Vec<Line>,
    units: Vec<f32>,
}

/// As bits of a float32, a whole number from 0 to 65,535 beside them is that much more; adding it
/// as a float32 rounds to whole numbers.
const WHOLE: f32 = 8_388_608.0;
/// What zero is as int16.
const ZERO: f32 = 32_768.0;

impl Kept for Wholes {
    const PARTS: usize = 2;

    fn keep(&mut self, slot: usize, row: &[f32]) {
        let most = row.iter().fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
        let unit = most / (ZERO - 1.0);
        let inverse = unit.recip();
        let whole = |x: f32| (x * inverse + (WHOLE + ZERO)).to_bits() & 0xffff;
        let (low, high) = row.split_at(row.len() / 2);
        let lines = lines_of(&mut self.pairs, slot, low.len()).iter_mut();
        for (line, (low, high)) in lines.zip(low.chunks(WIDTH).zip(high.chunks(WIDTH))) {
            for ((pair, x), y) in line.0.iter_mut().zip(low).zip(high) {
                *pair = f32::from_bits(whole(*x) | whole(*y) << 16);
            }
        }
        if self.units.len() <= slot {
            self.units.resize(slot + 1, 0.0);
        }
        self.units[slot] = unit;
    }

    #[inline(always)]
    fn lines(&self) -> &[Line] {
        &self.pairs
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, register: S::f32s) -> [S::f32s; 2] {
        let pairs = simd.transmute_u32s_f32s(register);
        let whole = simd.transmute_u32s_f32s(simd.splat_f32s(WHOLE));
        let zero = simd.splat_f32s(WHOLE + ZERO);
        let low = simd.or_u32s(simd.and_u32s(pairs, simd.splat_u32s(0xffff)), whole);
        let high = simd.or_u32s(simd.wrapping_dyn_shr_u32s(pairs, simd.splat_u32s(16)), whole);
        [
            simd.sub_f32s(simd.transmute_f32s_u32s(low), zero),
            simd.sub_f32s(simd.transmute_f32s_u32s(high), zero),
        ]
    }

    #[inline(always)]
    fn unit(&self, slot: u32) -> f32 {
        self.units[slot as usize]
    }
}

/// Attention of one head of a job, every row over its slots.
struct AttendHead<'a, K> {
    keys: &'a K,
    values: &'a K,
    rows: &'a [Vec<u32>],
    /// Of every row `K` floats, at a distance of `stride`.
    q: &'a [f32],
    stride: usize,
    /// `[rows, K]`
    out: &'a mut [f32],
}

/// Rows that are computed together.
const GROUP: usize = 3;

impl<K: Kept> WithSimd for AttendHead<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for first in (0..self.rows.len()).step_by(GROUP) {
            match self.rows.len() - first {
                1 => self.group::<S, 1>(simd, first),
                2 => self.group::<S, 2>(simd, first),
                _ => self.group::<S, GROUP>(simd, first),
            }
        }
    }
}

impl<K: Kept> AttendHead<'_, K> {
    /// Some rows together: what they have in common, their past up to some step, is read once.
    #[inline(always)]
    fn group<S: Simd, const ROWS: usize>(&mut self, simd: S, first: usize) {
        let Self { keys, values, rows, q, stride, out } = self;
        let size = out.len() / rows.len();
        let (part, scale) = (size / K::PARTS, (size as f32).sqrt().recip());
        let lines = part.div_ceil(WIDTH); // of a row as it is kept
        let wide = lines * K::PARTS * WIDTH; // floats of a row that is unpacked
        let length = rows[first].len();
        let mut room = Lines::floats(ROWS * (wide + length.next_multiple_of(WIDTH)));
        let (queries, scores) = room.as_floats().split_at_mut(ROWS * wide);
        queries.fill(0.0);
        let mut slots: [&[u32]; ROWS] = [&[]; ROWS];
        for (r, query) in queries.chunks_exact_mut(wide).enumerate() {
            slots[r] = &rows[first + r];
            let q = &q[(first + r) * *stride..][..size];
            for (to, from) in query.chunks_exact_mut(lines * WIDTH).zip(q.chunks_exact(part)) {
                to[..part].copy_from_slice(from);
            }
        }
        let mut common = 0;
        while common < length && slots.iter().all(|row| row[common] == slots[0][common]) {
            common += 1;
        }

        let row = lines * WIDTH / S::F32_LANES; // in registers
        let (queries, _) = S::as_simd_f32s(queries);
        let kept = S::as_simd_f32s(bytemuck::cast_slice(keys.lines())).0;
        for t in 0..common {
            let slot = slots[0][t];
            ask_ahead(kept, slots[0], t, row);
            let mut products = [0.0; ROWS];
            dot::<S, K, ROWS>(simd, &kept[slot as usize * row..][..row], queries, &mut products);
            for (r, product) in products.iter().enumerate() {
                scores[r * length + t] = product * keys.unit(slot);
            }
        }
        for (r, slots) in slots.iter().enumerate() {
            let queries = &queries[r * row * K::PARTS..][..row * K::PARTS];
            for (t, slot) in slots.iter().enumerate().skip(common) {
                ask_ahead(kept, slots, t, row);
                let mut product = [0.0];
                dot::<S, K, 1>(simd, &kept[*slot as usize * row..][..row], queries, &mut product);
                scores[r * length + t] = product[0] * keys.unit(*slot);
            }
            let scores = &mut scores[r * length..][..length];
            softmax(simd, scores, scale);
            // From here on a weight is in the units of its value.
            for (weight, slot) in scores.iter_mut().zip(*slots) {
                *weight *= values.unit(*slot);
            }
        }

        let kept = S::as_simd_f32s(bytemuck::cast_slice(values.lines())).0;
        for at in 0..row {
            // These sums stay in registers while the slots pass by.
            let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
            for t in 0..common {
                ask_ahead(kept, slots[0], t, row);
                let parts = K::unpack(simd, kept[slots[0][t] as usize * row + at]);
                for (r, sums) in sums.iter_mut().enumerate() {
                    add::<S, K>(simd, sums, &parts, scores[r * length + t]);
                }
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weights = &scores[r * length..][..length];
                for (t, (slot, weight)) in slots[r].iter().zip(weights).enumerate().skip(common) {
                    ask_ahead(kept, slots[r], t, row);
                    let parts = K::unpack(simd, kept[*slot as usize * row + at]);
                    add::<S, K>(simd, sums, &parts, *weight);
                }
                let out = &mut out[(first + r) * size..][..size];
                for (sum, out) in sums.iter().zip(out.chunks_exact_mut(part)) {
                    let at = (at * S::F32_LANES).min(part);
                    let end = (at + S::F32_LANES).min(part);
                    store(simd, &mut out[at..end], *sum);
                }
            }
        }
    }
}

/// Asks for the row of a slot some steps after `t`: it may be anywhere, and the processor cannot
/// know. A row is `row` registers.
#[inline(always)]
fn ask_ahead<T>(kept: &[T], slots: &[u32], t: usize, row: usize) {
    const AHEAD: usize = 12;
    if let Some(slot) = slots.get(t + AHEAD) {
        prefetch(&kept[*slot as usize * row..][..row]);
    }
}

/// The products of some unpacked queries with a row.
#[inline(always)]
fn dot<S: Simd, K: Kept, const ROWS: usize>(
    simd: S,
    row: &[S::f32s],
    queries: &[S::f32s],
    products: &mut [f32; ROWS],
) {
    let mut sums = [simd.splat_f32s(0.0); ROWS];
    let wide = row.len() * K::PARTS;
    assert_eq!(queries.len(), ROWS * wide, "queries of another size");
    for (at, register) in row.iter().enumerate() {
        let parts = K::unpack(simd, *register);
        for (part, x) in parts.iter().take(K::PARTS).enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                let q = queries[r * wide + part * row.len() + at];
                *sum = simd.mul_add_e_f32s(*x, q, *sum);
            }
        }
    }
    for (product, sum) in products.iter_mut().zip(sums) {
        *product = simd.reduce_sum_f32s(sum);
    }
}

#[inline(always)]
fn add<S: Simd, K: Kept>(simd: S, sums: &mut [S::f32s; 2], parts: &[S::f32s; 2], weight: f32) {
    let weight = simd.splat_f32s(weight);
    for (sum, part) in sums.iter_mut().zip(parts).take(K::PARTS) {
        *sum = simd.mul_add_e_f32s(*part, weight, *sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{assert_close, random};

    #[test]
    fn rows_attend_to_what_they_have_seen_whatever_is_kept_how() {
        let (d, heads) = (72, 3);
        for cpu in Cpu::available() {
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Int16, 1e-3)] {
                let (mut history, mut seen) = (History::default(), vec![Vec::new(); 4]);
                for step in 0..20 {
                    let rows = 4;
                    history.advance(rows);
                    let [q, k, v] = [1, 2, 3].map(|seed| random(rows * d, 10 * step + seed));
                    for (row, seen) in seen.iter_mut().enumerate() {
                        seen.push((k[row * d..][..d].to_vec(), v[row * d..][..d].to_vec()));
                    }
                    let qkv = [&q[..], &k, &v];
                    let jobs = vec![&mut history];
                    let found = attend_histories(cpu, precision, 0, jobs, qkv, d, heads);
                    let expected = plain(&q, &seen, d, heads);
                    let what = format!("{} {precision:?} step {step}", cpu.name());
                    assert_close(&found, &expected, tolerance, &what);
                    let parents = [2, 0, 0, 3];
                    history.select(&parents);
                    seen = parents.iter().map(|parent| seen[*parent].clone()).collect();
                }
            }
        }
    }

    /// What each row has seen, keys and values; attention in float64.
    fn plain(q: &[f32], seen: &[Vec<(Vec<f32>, Vec<f32>)>], d: usize, heads: usize) -> Vec<f32> {
        let size = d / heads;
        let mut out = vec![0.0; q.len()];
        for (row, seen) in seen.iter().enumerate() {
            for head in 0..heads {
                let at = row * d + head * size;
                let weights = seen.iter().map(|(k, _)| {
                    let k = &k[head * size..][..size];
                    let dot = q[at..at + size].iter().zip(k).map(|(q, k)| f64::from(q * k));
                    (dot.sum::<f64>() / (size as f64).sqrt()).exp()
                });
                let weights: Vec<f64> = weights.collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..size {
                    let parts = weights.iter().zip(seen);
                    let mixed = parts.map(|(w, (_, v))| w / sum * f64::from(v[head * size + i]));
                    #[expect(clippy::cast_possible_truncation, reason = "the result's type")]
                    let mixed = mixed.sum::<f64>() as f32;
                    out[at + i] = mixed;
                }
            }
        }
        out
    }
}
