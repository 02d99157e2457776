//! Convolutions over grids of tokens, `[B, H, W, C]`.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    Cpu,
    gemm::{Finish, Matrix, Rows, block_rows, padded},
    rows::{load, store},
    scratch::Lines,
};

/// Batch, height, width, channels.
pub(crate) type Grid = (usize, usize, usize, usize);

/// Depthwise 3x3 convolution with zero padding, plus its input. `taps` are `[9, C]`.
pub(crate) fn depthwise_residual(
    cpu: Cpu,
    x: &[f32],
    (_, h, w, c): Grid,
    taps: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(w * c).enumerate().for_each(|(row, out)| {
        let (image, y) = (row / h, row % h);
        let line = |dy: usize| {
            let y = (y + dy).checked_sub(1).filter(|y| *y < h)?;
            Some(&x[(image * h + y) * w * c..][..w * c])
        };
        cpu.run(DepthwiseRow { lines: [line(0), line(1), line(2)], size: c, taps, bias, out });
    });
    out
}

struct DepthwiseRow<'a> {
    /// The line above, this line, the line below.
    lines: [Option<&'a [f32]>; 3],
    size: usize,
    taps: &'a [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for DepthwiseRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { lines, size, taps, bias, out } = self;
        let width = out.len() / size;
        for (column, out) in out.chunks_exact_mut(size).enumerate() {
            // Inputs and taps under the kernel; outside of the grid there are none.
            let mut under: [(&[f32], &[f32]); 9] = [(&[], &[]); 9];
            let mut count = 0;
            for (dy, line) in lines.iter().enumerate() {
                for dx in 0..3 {
                    let at = (column + dx).wrapping_sub(1);
                    if let Some(line) = line.filter(|_| at < width) {
                        let tap = 3 * dy + dx;
                        under[count] = (&line[at * size..][..size], &taps[tap * size..][..size]);
                        count += 1;
                    }
                }
            }
            let here = lines[1].map_or(&[][..], |line| &line[column * size..][..size]);
            for at in (0..size).step_by(S::F32_LANES) {
                let end = (at + S::F32_LANES).min(size);
                let load = |slice: &[f32]| load(simd, &slice[at..end]);
                let mut sum = simd.add_f32s(load(here), load(bias));
                for (pixel, tap) in &under[..count] {
                    sum = simd.mul_add_e_f32s(load(pixel), load(tap), sum);
                }
                store(simd, &mut out[at..end], sum);
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
