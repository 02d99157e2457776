//! Convolutions over grids of tokens, `[B, H, W, C]`.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    Cpu,
    gemm::{Finish, Matrix, Rows, block_rows, padded, prefetch_later},
    scratch::Lines,
};

/// Batch, height, width, channels.
pub(crate) type Grid = (usize, usize, usize, usize);

/// Adds to `x` its depthwise 3x3 convolution with zero padding. `taps` are `[9, C]`.
pub(crate) fn depthwise_residual(
    cpu: Cpu,
    x: &mut [f32],
    (_, h, w, c): Grid,
    taps: &[f32],
    bias: &[f32],
) {
    let size = w * c;
    // Bands of lines. What stands above and below them is kept: other threads change it.
    let band = (x.len() / size).div_ceil(4 * rayon::current_num_threads());
    let mut beside = Lines::floats(2 * size * (x.len() / size).div_ceil(band));
    let beside = beside.as_floats();
    for (n, beside) in beside.chunks_exact_mut(2 * size).enumerate() {
        let lines = [(n * band).checked_sub(1), Some((n + 1) * band)];
        for (line, to) in lines.into_iter().zip(beside.chunks_exact_mut(size)) {
            if let Some(from) = line.and_then(|line| x.get(line * size..(line + 1) * size)) {
                to.copy_from_slice(from);
            }
        }
    }
    let bands = x.par_chunks_mut(band * size).zip(beside.par_chunks(2 * size));
    bands.enumerate().for_each(|(n, (lines, beside))| {
        let mut kept = [Lines::floats(size), Lines::floats(size), Lines::floats(c)];
        let [above, here, zeros] = kept.each_mut().map(Lines::as_floats);
        let (mut above, mut here) = (&mut above[..size], &mut here[..size]);
        zeros.fill(0.0);
        above.copy_from_slice(&beside[..size]);
        for line in 0..lines.len() / size {
            let (out, below) = lines[line * size..].split_at_mut(size);
            here.copy_from_slice(out);
            let (y, (below, next)) = ((n * band + line) % h, below.split_at(size.min(below.len())));
            let under = [
                Some(&*above).filter(|_| y > 0),
                Some(&*here),
                Some(if below.is_empty() { &beside[size..] } else { below }).filter(|_| y + 1 < h),
            ];
            let ahead = next.get(..size).unwrap_or_default();
            cpu.run(DepthwiseLine { lines: under, zeros: &zeros[..c], taps, bias, ahead, out });
            std::mem::swap(&mut above, &mut here);
        }
    });
}

/// A line of the result.
struct DepthwiseLine<'a> {
    /// The line above, this line, the line below.
    lines: [Option<&'a [f32]>; 3],
    /// What stands in a cell outside of the grid.
    zeros: &'a [f32],
    taps: &'a [f32],
    bias: &'a [f32],
    /// What will be needed for the next line.
    ahead: &'a [f32],
    out: &'a mut [f32],
}

/// Columns that are computed together: what they have in common is loaded once.
const TOGETHER: usize = 4;

impl WithSimd for DepthwiseLine<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let size = self.zeros.len();
        let together = self.out.len() / size / TOGETHER * TOGETHER;
        let (wide, rest) = std::mem::take(&mut self.out).split_at_mut(together * size);
        let mut ahead = self.ahead.chunks(TOGETHER * size);
        for (n, out) in wide.chunks_exact_mut(TOGETHER * size).enumerate() {
            prefetch_later(ahead.next().unwrap_or_default());
            self.columns::<S, TOGETHER>(simd, n * TOGETHER, out);
        }
        for (n, out) in rest.chunks_exact_mut(size).enumerate() {
            self.columns::<S, 1>(simd, together + n, out);
        }
    }
}

impl DepthwiseLine<'_> {
    /// `N` columns of the result, from `first` on.
    #[inline(always)]
    fn columns<S: Simd, const N: usize>(&self, simd: S, first: usize, out: &mut [f32]) {
        let Self { lines, zeros, taps, bias, .. } = self;
        let size = zeros.len();
        let cells = lines.map(|line| {
            std::array::from_fn::<_, { TOGETHER + 2 }, _>(|column| {
                let column = (first + column).checked_sub(1).filter(|_| column < N + 2);
                let cell = column
                    .zip(line)
                    .and_then(|(column, line)| line.get(column * size..)?.get(..size));
                S::as_simd_f32s(cell.unwrap_or(zeros))
            })
        });
        let taps: [_; 9] = std::array::from_fn(|tap| S::as_simd_f32s(&taps[tap * size..][..size]));
        let (bias, bias_tail) = S::as_simd_f32s(&bias[..size]);
        let count = bias.len();
        let tap = taps.map(|tap| &tap.0[..count]);
        let cell = cells.map(|line| line.map(|cell| &cell.0[..count]));
        let mut parts = out.chunks_exact_mut(size).map(S::as_mut_simd_f32s);
        let mut out: [_; N] = std::array::from_fn(|_| parts.next().unwrap_or_default());
        for i in 0..count {
            let mut sums: [_; N] =
                std::array::from_fn(|n| simd.add_f32s(cell[1][n + 1][i], bias[i]));
            for (t, tap) in tap.iter().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.mul_add_e_f32s(cell[t / 3][n + t % 3][i], tap[i], *sum);
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                out.0[i] = sum;
            }
        }
        for (n, (_, out)) in out.iter_mut().enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                let cell = |t: usize| cells[t / 3][n + t % 3].1[i];
                let products = taps.iter().enumerate().map(|(t, tap)| cell(t) * tap.1[i]);
                *out = products.fold(cell(4) + bias_tail[i], |sum, x| sum + x);
            }
        }
    }
}

/// A convolution over patches: their pixels side by side, times a matrix.
#[derive(Debug)]
pub(crate) struct PatchConv {
    /// `[outputs, kernel * kernel * C]`, the inner order being row, column, channel.
    pub(crate) matrix: Matrix,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl PatchConv {
    /// Height or width of the result.
    pub(crate) fn side(&self, side: usize) -> usize {
        (side + 2 * self.padding).saturating_sub(self.kernel) / self.stride + 1
    }

    /// `[B, H, W, C] -> [B, H', W', outputs]`
    pub(crate) fn forward(&self, cpu: Cpu, x: &[f32], (b, h, w, c): Grid) -> Vec<f32> {
        let (rows, columns) = (self.side(h), self.side(w));
        let (inputs, outputs) = (self.matrix.inputs(), self.matrix.outputs());
        let mut out = vec![0.0; b * rows * columns * outputs];
        let block = block_rows(b * rows * columns);
        out.par_chunks_mut(block * outputs).enumerate().for_each(|(i, out)| {
            let count = out.len() / outputs;
            let stride = padded(inputs);
            let mut patches = Lines::floats(count * stride);
            for (n, patch) in patches.as_floats().chunks_mut(stride).take(count).enumerate() {
                let at = i * block + n;
                let (image, y, x0) = (at / (rows * columns), at / columns % rows, at % columns);
                for ky in 0..self.kernel {
                    let run = &mut patch[ky * self.kernel * c..][..self.kernel * c];
                    let y = (y * self.stride + ky).checked_sub(self.padding).filter(|y| *y < h);
                    let Some(y) = y else {
                        run.fill(0.0);
                        continue;
                    };
                    let line = &x[(image * h + y) * w * c..][..w * c];
                    for (kx, to) in run.chunks_exact_mut(c).enumerate() {
                        let x = (x0 * self.stride + kx).checked_sub(self.padding);
                        match x.filter(|x| *x < w) {
                            Some(x) => to.copy_from_slice(&line[x * c..][..c]),
                            None => to.fill(0.0),
                        }
                    }
                }
            }
            let patches = Rows::new(patches.as_floats(), stride, count);
            self.matrix.block(cpu, patches, &Finish::default(), out, outputs);
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{assert_close, random};

    #[test]
    fn depthwise_equals_its_definition_on_every_instruction_set() {
        for (b, h, w, c) in [(1, 1, 1, 3), (2, 5, 7, 16), (3, 9, 4, 37), (1, 40, 3, 64)] {
            let (x, taps, bias) = (random(b * h * w * c, 1), random(9 * c, 2), random(c, 3));
            let at = |image: usize, y: usize, x0: usize, channel: usize| {
                let is_inside = (1..=h).contains(&y) && (1..=w).contains(&x0);
                let cell = ((image * h + y.wrapping_sub(1)) * w + x0.wrapping_sub(1)) * c + channel;
                if is_inside { x[cell] } else { 0.0 }
            };
            let mut expected = Vec::new();
            for (i, here) in x.iter().enumerate() {
                let (channel, cell) = (i % c, i / c);
                let (image, y, x0) = (cell / (h * w), cell / w % h, cell % w);
                let products = (0..9).map(|tap| {
                    taps[tap * c + channel] * at(image, y + tap / 3, x0 + tap % 3, channel)
                });
                expected.push(here + bias[channel] + products.sum::<f32>());
            }
            for cpu in Cpu::available() {
                let mut found = x.clone();
                depthwise_residual(cpu, &mut found, (b, h, w, c), &taps, &bias);
                assert_close(&found, &expected, 1e-6, &format!("{} {b}x{h}x{w}x{c}", cpu.name()));
            }
        }
    }
}
