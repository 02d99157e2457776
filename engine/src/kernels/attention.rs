//! Attention: within windows of a grid, across channels, and over sequences.
//!
//! Scores of one head exist for one block of rows at a time, in a buffer of the thread.

use rayon::prelude::*;

use super::{
    Cpu, Precision,
    conv::Grid,
    gemm::{Finish, Matrix, Panels, Rows, Then, block_rows, padded, product},
    rows::{LayerNorm, Norm, Softmax},
    scratch::{Line, Lines, WIDTH},
};

/// Packs `x`, rows at a distance of `stride`, as panels whose columns are its columns.
fn pack_columns(x: &[f32], stride: usize, rows: usize, columns: usize, lines: &mut [Line]) {
    for (panel, lines) in lines.chunks_mut(rows).enumerate() {
        let first = panel * WIDTH;
        let width = WIDTH.min(columns - first);
        for (row, line) in lines.iter_mut().enumerate() {
            line.0[..width].copy_from_slice(&x[row * stride + first..][..width]);
            line.0[width..].fill(0.0);
        }
    }
}

/// Packs `x`, rows at a distance of `stride`, as panels whose columns are its rows.
fn pack_rows(x: &[f32], stride: usize, rows: usize, columns: usize, lines: &mut [Line]) {
    for (panel, lines) in lines.chunks_mut(columns).enumerate() {
        let first = panel * WIDTH;
        let width = WIDTH.min(rows - first);
        if width < WIDTH {
            lines.fill(Line::default());
        }
        for row in 0..width {
            let x = &x[(first + row) * stride..][..columns];
            for (line, x) in lines.iter_mut().zip(x) {
                line.0[row] = *x;
            }
        }
    }
}

fn panels(columns: usize) -> usize {
    columns.div_ceil(WIDTH)
}

/// Keys and values of one head, as operands.
#[derive(Clone, Copy)]
struct Head<'a> {
    /// `[size, length]`
    keys: &'a [Line],
    /// `[length, size]`
    values: &'a [Line],
    length: usize,
    size: usize,
}

impl Head<'_> {
    /// `softmax(scale * q k^T) v` for a block of queries.
    fn attend(&self, cpu: Cpu, q: Rows<'_>, scale: f32, out: &mut [f32], out_stride: usize) {
        let keys = Panels { lines: self.keys, steps: self.size, columns: self.length };
        let values = Panels { lines: self.values, steps: self.length, columns: self.size };
        weigh(
            (cpu, scale),
            (q.count, self.length),
            |scores, stride| product(cpu, q, keys, scores, stride),
            |weights| product(cpu, weights, values, out, out_stride),
        );
    }
}

/// What all attention has in common: scores of `count` queries over `length` keys, as `score`
/// writes them at the distance it is given, become weights for `mix`.
fn weigh(
    (cpu, scale): (Cpu, f32),
    (count, length): (usize, usize),
    score: impl FnOnce(&mut [f32], usize),
    mix: impl FnOnce(Rows<'_>),
) {
    let stride = padded(length);
    let mut scores = Lines::floats(count * stride);
    let scores = scores.as_floats();
    score(scores, stride);
    cpu.run(Softmax { rows: &mut scores[..count * stride], stride, size: length, scale });
    mix(Rows::new(scores, stride, count));
}

/// `x + proj(attention(qkv(norm(x))))` within square windows of the grid.
#[derive(Debug)]
pub(crate) struct WindowAttention {
    pub(crate) norm: Norm,
    pub(crate) qkv: Matrix,
    pub(crate) proj: Matrix,
    pub(crate) heads: usize,
    /// Height and width of a window.
    pub(crate) window: usize,
}

impl WindowAttention {
    /// In its place. The grid is padded with zeros, after the norm, to whole windows.
    pub(crate) fn forward(&self, cpu: Cpu, x: &mut [f32], (b, h, w, c): Grid) {
        let side = self.window;
        let (rows, columns) = (h.div_ceil(side), w.div_ceil(side));
        // The lines of every window.
        let mut windows: Vec<Vec<&mut [f32]>> = Vec::new();
        windows.resize_with(b * rows * columns, Vec::new);
        for (line, x) in x.chunks_exact_mut(w * c).enumerate() {
            let first = (line / h * rows + line % h / side) * columns;
            for (part, window) in x.chunks_mut(side * c).zip(&mut windows[first..]) {
                window.push(part);
            }
        }
        windows.into_par_iter().for_each(|window| self.window(cpu, window, c));
    }

    fn window(&self, cpu: Cpu, lines: Vec<&mut [f32]>, c: usize) {
        let cells = self.window * self.window;
        let stride = padded(c);
        let mut tokens = Lines::floats(cells * stride);
        let tokens = tokens.as_floats();
        let mut line_tokens = tokens[..cells * stride].chunks_exact_mut(self.window * stride);
        for x in &lines {
            let Some(out) = line_tokens.next() else { break };
            let (out, beyond) = out.split_at_mut(x.len() / c * stride);
            cpu.run(LayerNorm { norm: &self.norm, x, stride: c, out, out_stride: stride });
            beyond.fill(0.0);
        }
        line_tokens.for_each(|beyond| beyond.fill(0.0));

        let wide = padded(3 * c);
        let mut qkv = Lines::floats(cells * wide);
        let qkv = qkv.as_floats();
        self.qkv.block(cpu, Rows::new(tokens, stride, cells), &Finish::default(), qkv, wide);
        let size = c / self.heads;
        let scale = (size as f32).sqrt().recip();
        let (mut keys, mut values) =
            (Lines::new(panels(cells) * size), Lines::new(panels(size) * cells));
        for head in 0..self.heads {
            let at = head * size;
            pack_rows(&qkv[c + at..], wide, cells, size, &mut keys);
            pack_columns(&qkv[2 * c + at..], wide, cells, size, &mut values);
            let head = Head { keys: &keys, values: &values, length: cells, size };
            head.attend(cpu, Rows::new(&qkv[at..], wide, cells), scale, &mut tokens[at..], stride);
        }
        // The projection's result takes the place of the queries.
        self.proj.block(cpu, Rows::new(tokens, stride, cells), &Finish::default(), qkv, wide);
        let results = qkv.chunks(self.window * wide);
        for (x, results) in lines.into_iter().zip(results) {
            for (x, y) in x.chunks_exact_mut(c).zip(results.chunks(wide)) {
                for (x, y) in x.iter_mut().zip(y) {
                    *x += y;
                }
            }
        }
    }
}

/// `x + proj(attention(qkv(norm(x))))`, attention being across the channels of each group.
#[derive(Debug)]
pub(crate) struct ChannelAttention {
    pub(crate) norm: Norm,
    pub(crate) qkv: Matrix,
    pub(crate) proj: Matrix,
    pub(crate) groups: usize,
}

impl ChannelAttention {
    /// `[B, N, C]` in its place, with `tokens` being `N`.
    pub(crate) fn forward(&self, cpu: Cpu, x: &mut [f32], tokens: usize) {
        for picture in x.chunks_exact_mut(tokens * self.proj.outputs()) {
            self.picture(cpu, picture, tokens);
        }
    }

    fn picture(&self, cpu: Cpu, x: &mut [f32], tokens: usize) {
        // Fixed, unlike the blocks of other kernels: the sums of scores follow it.
        const BLOCK: usize = 144;
        let c = self.proj.outputs();
        let size = c / self.groups;
        let mut values = Lines::floats(x.len());
        let values = &mut values.as_floats()[..x.len()];
        let partial: Vec<Vec<f32>> = x
            .par_chunks(BLOCK * c)
            .zip(values.par_chunks_mut(BLOCK * c))
            .map(|(x, values)| self.scores(cpu, x, values))
            .collect();
        let mut scores = vec![0.0; self.groups * size * size];
        for partial in partial {
            for (sum, x) in scores.iter_mut().zip(partial) {
                *sum += x;
            }
        }
        let scale = (tokens as f32).sqrt().recip();
        cpu.run(Softmax { rows: &mut scores, stride: size, size, scale });
        let mut lines = vec![Line::default(); self.groups * panels(size) * size];
        let groups = lines.chunks_exact_mut(panels(size) * size);
        for (scores, lines) in scores.chunks_exact(size * size).zip(groups) {
            pack_rows(scores, size, size, size, lines);
        }
        x.par_chunks_mut(BLOCK * c).zip(values.par_chunks(BLOCK * c)).for_each(|(x, values)| {
            let (count, stride) = (x.len() / c, padded(c));
            let mut mixed = Lines::floats(count * stride);
            let mixed = mixed.as_floats();
            for (group, lines) in lines.chunks_exact(panels(size) * size).enumerate() {
                let at = group * size;
                let panels = Panels { lines, steps: size, columns: size };
                let values = Rows::new(&values[at..], c, count);
                product(cpu, values, panels, &mut mixed[at..], stride);
            }
            let onto = Finish { then: Then::Add, ..Finish::default() };
            self.proj.block(cpu, Rows::new(mixed, stride, count), &onto, x, c);
        });
    }

    /// A block's part of `q^T k` of every group; keeps its values.
    fn scores(&self, cpu: Cpu, x: &[f32], values: &mut [f32]) -> Vec<f32> {
        let c = self.proj.outputs();
        let size = c / self.groups;
        let (count, stride, wide) = (x.len() / c, padded(c), padded(3 * c));
        let mut normed = Lines::floats(count * stride);
        let mut qkv = Lines::floats(count * wide);
        let (normed, qkv) = (normed.as_floats(), qkv.as_floats());
        cpu.run(LayerNorm { norm: &self.norm, x, stride: c, out: normed, out_stride: stride });
        self.qkv.block(cpu, Rows::new(normed, stride, count), &Finish::default(), qkv, wide);
        for (to, from) in values.chunks_exact_mut(c).zip(qkv.chunks(wide)) {
            to.copy_from_slice(&from[2 * c..3 * c]);
        }
        let mut scores = vec![0.0; self.groups * size * size];
        let mut keys = Lines::new(panels(size) * count);
        for (group, scores) in scores.chunks_exact_mut(size * size).enumerate() {
            let at = group * size;
            pack_columns(&qkv[c + at..], wide, count, size, &mut keys);
            let queries = Rows { data: &qkv[at..], stride: 1, step: wide, count: size };
            let keys = Panels { lines: &keys, steps: count, columns: size };
            product(cpu, queries, keys, scores, size);
        }
        scores
    }
}

/// Keys and values of a sequence, packed per head.
#[derive(Debug)]
pub(crate) struct SequenceKeys {
    /// Per head, keys `[S, K]` and transposed values `[K, S]`.
    heads: Vec<(Matrix, Matrix)>,
    size: usize,
}

impl SequenceKeys {
    /// Packs keys and values, both `[S, D]`.
    pub(crate) fn pack(
        keys: &[f32],
        values: &[f32],
        d: usize,
        heads: usize,
        precision: Precision,
    ) -> Self {
        let (length, size) = (keys.len() / d, d / heads);
        let floats = |head: usize| {
            let at = head * size;
            let mut lines = vec![Line::default(); panels(length) * size];
            pack_rows(&keys[at..], d, length, size, &mut lines);
            let keys = Matrix::of_panels(lines, size, length);
            let mut lines = vec![Line::default(); panels(size) * length];
            pack_columns(&values[at..], d, length, size, &mut lines);
            (keys, Matrix::of_panels(lines, length, size))
        };
        let units = |head: usize| {
            let at = head * size;
            let mut rows = Vec::with_capacity(length * size);
            for row in keys.chunks_exact(d) {
                rows.extend_from_slice(&row[at..at + size]);
            }
            let mut columns = vec![0.0; length * size];
            for (i, row) in values.chunks_exact(d).enumerate() {
                for (k, value) in row[at..at + size].iter().enumerate() {
                    columns[k * length + i] = *value;
                }
            }
            let keys = Matrix::pack(&rows, None, size, precision);
            (keys, Matrix::pack(&columns, None, length, precision))
        };
        let head = |head| if precision == Precision::F32 { floats(head) } else { units(head) };
        Self { heads: (0..heads).into_par_iter().map(head).collect(), size }
    }

    /// `softmax(q k^T / sqrt(K)) v` of one head for a block of queries.
    fn attend(&self, cpu: Cpu, head: usize, q: Rows<'_>, out: &mut [f32], out_stride: usize) {
        let (keys, values) = &self.heads[head];
        weigh(
            (cpu, (self.size as f32).sqrt().recip()),
            (q.count, keys.outputs()),
            |scores, stride| keys.block(cpu, q, &Finish::default(), scores, stride),
            |weights| values.block(cpu, weights, &Finish::default(), out, out_stride),
        );
    }
}

/// Attention of every query, `[T, D]`, over a sequence.
pub(crate) fn attend_sequence(cpu: Cpu, q: &[f32], sequence: &SequenceKeys) -> Vec<f32> {
    /// Queries whose scores are there at a time: they pass the cache several times.
    const PART: usize = 48;
    let size = sequence.size;
    let d = sequence.heads.len() * size;
    let mut out = vec![0.0; q.len()];
    let block = block_rows(q.len() / d);
    out.par_chunks_mut(block * d).zip(q.par_chunks(block * d)).for_each(|(out, q)| {
        for head in 0..sequence.heads.len() {
            let at = head * size;
            for (q, out) in q.chunks(PART * d).zip(out.chunks_mut(PART * d)) {
                let rows = Rows::new(&q[at..], d, q.len() / d);
                sequence.attend(cpu, head, rows, &mut out[at..], d);
            }
        }
    });
    out
}

/// Attention of a few queries each over sequences of their own: `jobs` lists, in the order of the
/// rows of `q`, every sequence and its number of rows.
pub(crate) fn attend_sequences(cpu: Cpu, q: &[f32], jobs: &[(&SequenceKeys, usize)]) -> Vec<f32> {
    let mut firsts = Vec::with_capacity(jobs.len());
    let mut first = 0;
    for (sequence, rows) in jobs {
        firsts.extend((0..sequence.heads.len()).map(|head| (*sequence, head, first, *rows)));
        first += rows;
    }
    let attend = |(sequence, head, first, rows): (&SequenceKeys, usize, usize, usize)| {
        let (d, size) = (sequence.heads.len() * sequence.size, sequence.size);
        let mut out = vec![0.0; rows * size];
        let q = Rows::new(&q[first * d + head * size..], d, rows);
        sequence.attend(cpu, head, q, &mut out, size);
        HeadPart { first, head, out }
    };
    let parts = firsts.into_par_iter().map(attend).collect();
    let (heads, size) = jobs.first().map_or((1, 1), |(keys, _)| (keys.heads.len(), keys.size));
    join_heads(parts, q.len(), heads * size, size)
}

/// What a head makes of some rows, `[rows, K]`.
pub(super) struct HeadPart {
    pub(super) first: usize,
    pub(super) head: usize,
    pub(super) out: Vec<f32>,
}

/// All heads side by side: `[rows, D]`, `length` floats in all.
pub(super) fn join_heads(parts: Vec<HeadPart>, length: usize, d: usize, size: usize) -> Vec<f32> {
    let mut all = vec![0.0; length];
    for HeadPart { first, head, out } in parts {
        for (row, out) in out.chunks_exact(size).enumerate() {
            all[(first + row) * d + head * size..][..size].copy_from_slice(out);
        }
    }
    all
}
