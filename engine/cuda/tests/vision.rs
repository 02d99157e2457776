//! The vision tower's kernels: patches, depthwise convolution, attention in windows and across
//! channels.

mod common;

use common::{
    Number, assert_near, dot, in_both_orders, input, int, made, output, plus, unwritten, values,
    weighed,
};
use florence_cuda::geometry;
use half::bf16;

/// How near attentions come: a score is off by some of its steps, its exponential by as much,
/// relative to it.
const NEAR: f64 = 3e-5;

/// A grid of tokens: pictures, height, width, channels.
type Grid = (usize, usize, usize, usize);

/// The element of a grid, zero outside; `y` and `x_` count from so many rows and columns before it.
fn at(x: &[f32], (_, h, w, c): Grid, padding: usize, [b, y, x_, channel]: [usize; 4]) -> f64 {
    let inside = |i: usize, size| i.checked_sub(padding).filter(|i| *i < size);
    let (Some(y), Some(x_)) = (inside(y, h), inside(x_, w)) else { return 0.0 };
    x[((b * h + y) * w + x_) * c + channel].value()
}

fn patches<T: Number>(grid: Grid, [size, stride, padding]: [usize; 3]) {
    let (b, h, w, c) = grid;
    let x = made::<f32>(1, b * h * w * c);
    let out_of = |n: usize| (n + 2 * padding - size) / stride + 1;
    let (rows, length) = (b * out_of(h) * out_of(w), geometry::patch_length(c, size));
    let out = in_both_orders::<T, _>(|run| {
        let mut out = unwritten::<T>(rows * length);
        let (grid, patch) = ([b, h, w, c].map(int), [size, stride, padding].map(int));
        let args = [vec![input(&x), output(&mut out)], grid.to_vec(), patch.to_vec()].concat();
        run("patches", geometry::patches(rows, length), &args);
        out
    });
    let mut exact = Vec::with_capacity(out.len());
    for patch in 0..rows {
        let (picture, position) =
            (patch / (out_of(h) * out_of(w)), patch % (out_of(h) * out_of(w)));
        let (top, left) = (position / out_of(w) * stride, position % out_of(w) * stride);
        for i in 0..length {
            let (y, x_) = (i / c / size + top, i / c % size + left);
            let inside = i < size * size * c;
            exact.push(if inside { at(&x, grid, padding, [picture, y, x_, i % c]) } else { 0.0 });
        }
    }
    assert_near(&out, &exact, 0.0);
}

#[test]
fn patches_are_the_convolutions_inputs() {
    for (grid, patch) in [
        ((2, 9, 13, 3), [7, 4, 3]),
        ((1, 21, 5, 3), [7, 4, 3]),
        ((2, 7, 5, 32), [3, 2, 1]),
        ((1, 6, 8, 96), [3, 2, 1]),
        ((3, 1, 1, 8), [3, 2, 1]),
        ((1, 4, 4, 128), [1, 1, 0]),
    ] {
        patches::<f32>(grid, patch);
        patches::<bf16>(grid, patch);
    }
}

#[test]
fn depthwise_adds_what_is_around() {
    for grid in [(1, 1, 1, 32), (2, 7, 5, 96), (1, 3, 17, 128), (3, 9, 8, 8), (1, 2, 25, 1024)] {
        let (b, h, w, c) = grid;
        let (x, taps) = (made::<f32>(1, b * h * w * c), made::<f32>(2, 9 * c));
        let bias = made::<f32>(3, c);
        let out = in_both_orders::<f32, _>(|run| {
            let mut out = unwritten::<f32>(x.len());
            let pointers = vec![input(&x), input(&taps), input(&bias), output(&mut out)];
            let args = [pointers, [b, h, w, c].map(int).to_vec()].concat();
            run("depthwise", geometry::depthwise(b, h, w, c), &args);
            out
        });
        let exact: Vec<f64> = (0..x.len())
            .map(|i| {
                let (channel, position) = (i % c, i / c);
                let (x_, y, picture) = (position % w, position / w % h, position / w / h);
                let around = |tap: usize| {
                    let index = [picture, y + tap / 3, x_ + tap % 3, channel];
                    taps[tap * c + channel].value() * at(&x, grid, 1, index)
                };
                x[i].value() + bias[channel].value() + (0..9).map(around).sum::<f64>()
            })
            .collect();
        assert_near(&out, &exact, 1e-6);
    }
}

/// Queries, keys and values of a grid's tokens, and their bias.
struct Qkv<T> {
    grid: Grid,
    tokens: Vec<T>,
    bias: Vec<f32>,
}

impl<T: Number> Qkv<T> {
    fn made(grid: Grid) -> Self {
        let (b, h, w, c) = grid;
        // Scores are to differ by more than one.
        let wide = |x: f32| T::round(x * 3.0);
        let tokens = made::<f32>(1, b * h * w * 3 * c).into_iter().map(wide).collect();
        Self { grid, tokens, bias: made::<f32>(2, 3 * c) }
    }

    /// Query, key or value, `part` 0 to 2, of channels from `first`: of a token, or of a padded
    /// cell.
    fn of(&self, token: Option<usize>, part: usize, first: usize, k: usize) -> Vec<f64> {
        let c = self.grid.3;
        let at = part * c + first;
        let bias = values(&self.bias[at..at + k]);
        token.map_or(bias.clone(), |token| {
            plus(&values(&self.tokens[token * 3 * c + at..token * 3 * c + at + k]), &bias)
        })
    }

    /// One picture of all.
    fn picture(&self, i: usize) -> Self {
        let (b, h, w, c) = self.grid;
        let size = self.tokens.len() / b;
        let tokens = self.tokens[i * size..(i + 1) * size].to_vec();
        Self { grid: (1, h, w, c), tokens, bias: self.bias.clone() }
    }

    fn in_windows(&self, heads: usize, window: usize) -> Vec<T> {
        let (b, h, w, c) = self.grid;
        in_both_orders::<T, _>(|run| {
            let mut out = unwritten::<T>(b * h * w * c);
            let pointers = vec![input(&self.tokens), input(&self.bias), output(&mut out)];
            let args = [pointers, [b, h, w, c, heads, window].map(int).to_vec()].concat();
            let launch = geometry::window_attention(b, [h, w], window, heads, c / heads);
            run("window_attention", launch, &args);
            out
        })
    }

    /// The formula of [`Qkv::in_windows`].
    fn in_windows_exactly(&self, heads: usize, window: usize) -> Vec<f64> {
        let (b, h, w, c) = self.grid;
        let k = c / heads;
        let mut out = vec![f64::NAN; b * h * w * c];
        for token in 0..b * h * w {
            let (x, y, picture) = (token % w, token / w % h, token / w / h);
            let (top, left) = (y / window * window, x / window * window);
            let cells: Vec<Option<usize>> = (0..window * window)
                .map(|cell| (top + cell / window, left + cell % window))
                .map(|(y, x)| (y < h && x < w).then_some((picture * h + y) * w + x))
                .collect();
            for head in 0..heads {
                let all = |part| -> Vec<Vec<f64>> {
                    cells.iter().map(|cell| self.of(*cell, part, head * k, k)).collect()
                };
                let query = self.of(Some(token), 0, head * k, k);
                let scores: Vec<f64> =
                    all(1).iter().map(|key| dot(&query, key) / (k as f64).sqrt()).collect();
                let at = token * c + head * k;
                out[at..at + k].copy_from_slice(&weighed(&scores, &all(2)));
            }
        }
        out
    }

    fn across_channels(&self, groups: usize) -> Vec<T> {
        let (b, h, w, c) = self.grid;
        let (n, k) = (h * w, c / groups);
        let (chunk, chunks) = (geometry::CHANNEL_CHUNK, geometry::channel_chunks(n));
        let partial = in_both_orders::<T, _>(|run| {
            let mut partial = unwritten::<f32>(b * groups * chunks * k * k);
            let pointers = vec![input(&self.tokens), input(&self.bias), output(&mut partial)];
            let args = [pointers, [b, n, c, groups, chunk].map(int).to_vec()].concat();
            run("channel_scores", geometry::channel_scores(b, n, groups, k), &args);
            partial
        });
        let weights = in_both_orders::<f32, _>(|run| {
            let mut weights = unwritten::<f32>(b * groups * k * k);
            let pointers = vec![input(&partial), output(&mut weights)];
            let args = [pointers, [b, n, groups, k, chunks].map(int).to_vec()].concat();
            run("channel_softmax", geometry::channel_softmax(b, groups, k), &args);
            weights
        });
        in_both_orders::<T, _>(|run| {
            let mut out = unwritten::<T>(b * n * c);
            let inputs = vec![input(&self.tokens), input(&self.bias), input(&weights)];
            let sizes = [b, n, c, groups].map(int).to_vec();
            let args = [inputs, vec![output(&mut out)], sizes].concat();
            run("channel_apply", geometry::channel_apply(b, n, groups, k), &args);
            out
        })
    }

    /// The formula of [`Qkv::across_channels`].
    fn across_channels_exactly(&self, groups: usize) -> Vec<f64> {
        let (b, h, w, c) = self.grid;
        let (n, k) = (h * w, c / groups);
        let mut out = vec![f64::NAN; b * n * c];
        for (picture, group) in (0..b).flat_map(|b| (0..groups).map(move |g| (b, g))) {
            // [K, N], a channel's tokens in a row
            let all = |part| -> Vec<Vec<f64>> {
                let tokens: Vec<Vec<f64>> = (0..n)
                    .map(|token| self.of(Some(picture * n + token), part, group * k, k))
                    .collect();
                (0..k).map(|i| tokens.iter().map(|token| token[i]).collect()).collect()
            };
            let (queries, keys, values) = (all(0), all(1), all(2));
            for (i, query) in queries.iter().enumerate() {
                let scores: Vec<f64> =
                    keys.iter().map(|key| dot(query, key) / (n as f64).sqrt()).collect();
                for (token, x) in weighed(&scores, &values).into_iter().enumerate() {
                    out[(picture * n + token) * c + group * k + i] = x;
                }
            }
        }
        out
    }
}

fn windows<T: Number>(grid: Grid, heads: usize, window: usize) {
    let qkv = Qkv::<T>::made(grid);
    assert_near(&qkv.in_windows(heads, window), &qkv.in_windows_exactly(heads, window), NEAR);
}

#[test]
fn window_attention_is_the_formula() {
    for (grid, heads, window) in [
        ((2, 7, 9, 32), 4, 5),
        ((1, 5, 5, 8), 1, 5),
        ((1, 1, 1, 32), 1, 5),
        ((1, 13, 12, 96), 3, 12),
        ((2, 12, 25, 128), 4, 12),
        ((1, 7, 4, 256), 4, 5),
        ((1, 14, 3, 128), 2, 12),
        ((1, 6, 6, 36), 1, 3),
        ((1, 20, 18, 4), 1, 18),
    ] {
        windows::<f32>(grid, heads, window);
        windows::<bf16>(grid, heads, window);
    }
}

fn channels<T: Number>(grid: Grid, groups: usize) {
    let qkv = Qkv::<T>::made(grid);
    assert_near(&qkv.across_channels(groups), &qkv.across_channels_exactly(groups), NEAR);
}

#[test]
fn channel_attention_is_the_formula() {
    for (grid, groups) in [
        ((1, 1, 1, 32), 1),
        ((2, 7, 5, 96), 3),
        ((1, 16, 16, 32), 4),
        ((2, 19, 27, 128), 4),
        ((1, 24, 24, 256), 8),
        ((1, 9, 7, 128), 2),
        ((1, 3, 3, 1024), 32),
        ((1, 6, 11, 36), 1),
    ] {
        channels::<f32>(grid, groups);
        channels::<bf16>(grid, groups);
    }
}

fn alone<T: Number>() {
    let qkv = Qkv::<T>::made((3, 17, 18, 96));
    let size = 17 * 18 * 96;
    let (windows, channels) = (qkv.in_windows(3, 12), qkv.across_channels(3));
    for i in 0..3 {
        let at = i * size..(i + 1) * size;
        assert_eq!(qkv.picture(i).in_windows(3, 12), windows[at.clone()]);
        assert_eq!(qkv.picture(i).across_channels(3), channels[at]);
    }
}

#[test]
fn a_picture_is_seen_alone_as_in_company() {
    alone::<f32>();
    alone::<bf16>();
}
