//! Operations on rows: normalisation, softmax, GELU.

use pulp::{Scalar, Simd, WithSimd};

use super::Cpu;

/// Up to a register of floats, the rest 0. A whole register is the common case by far.
#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, from: &[f32]) -> S::f32s {
    match S::as_simd_f32s(from) {
        ([whole], []) => *whole,
        _ => simd.partial_load_f32s(from),
    }
}

/// As many floats as there is room for.
#[inline(always)]
pub(super) fn store<S: Simd>(simd: S, to: &mut [f32], values: S::f32s) {
    match S::as_mut_simd_f32s(to) {
        ([whole], []) => *whole = values,
        (_, to) => simd.partial_store_f32s(to, values),
    }
}

/// `e^x`, within 2 units in the last place; arguments are clamped to what float32 can hold.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding it rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// Minimax polynomial of `(e^r - 1 - r) / r^2` for `|r| <= ln 2 / 2`, highest power first.
    const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let splat = |x| simd.splat_f32s(x);
    let x = simd.min_f32s(simd.max_f32s(x, splat(-87.0)), splat(88.0));
    let rounded = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(rounded, splat(ROUND));
    let r = simd.mul_add_e_f32s(n, splat(-LN2_HIGH), x);
    let r = simd.mul_add_e_f32s(n, splat(-LN2_LOW), r);
    let mut p = splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = simd.mul_add_e_f32s(p, r, splat(*c));
    }
    let y = simd.mul_add_e_f32s(p, simd.mul_f32s(r, r), simd.add_f32s(r, splat(1.0)));
    // n moves to the exponent.
    let shift = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(y), shift))
}

/// The exact GELU, `x (1 + erf(x / sqrt 2)) / 2`, with erf as a rational function (error 4e-7).
#[inline(always)]
pub(super) fn gelu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const NUMERATOR: [f32; 7] = [
        -2.726_142e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const DENOMINATOR: [f32; 5] =
        [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329_5e-3, -1.426_473_9e-2];
    let splat = |x| simd.splat_f32s(x);
    let horner = |coefficients: &[f32], x| {
        coefficients[1..]
            .iter()
            .fold(splat(coefficients[0]), |sum, c| simd.mul_add_e_f32s(sum, x, splat(*c)))
    };
    let t = simd.mul_f32s(x, splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = simd.min_f32s(simd.max_f32s(t, splat(-4.0)), splat(4.0));
    let square = simd.mul_f32s(t, t);
    let erf =
        simd.div_f32s(simd.mul_f32s(t, horner(&NUMERATOR, square)), horner(&DENOMINATOR, square));
    let half = simd.mul_f32s(x, splat(0.5));
    simd.mul_add_e_f32s(half, erf, half)
}

/// Weight and bias of a layer normalisation, with PyTorch's epsilon.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
}

impl Norm {
    /// One row, normalised into `out`.
    #[inline(always)]
    pub(super) fn row<S: Simd>(&self, simd: S, x: &[f32], out: &mut [f32]) {
        let n = x.len() as f32;
        let (head, tail) = S::as_simd_f32s(x);
        let zero = simd.splat_f32s(0.0);
        let sum = head.iter().fold(zero, |sum, x| simd.add_f32s(sum, *x));
        let mean = (simd.reduce_sum_f32s(sum) + tail.iter().sum::<f32>()) / n;
        let means = simd.splat_f32s(mean);
        let squares = head.iter().fold(zero, |sum, x| {
            let difference = simd.sub_f32s(*x, means);
            simd.mul_add_e_f32s(difference, difference, sum)
        });
        let tail_squares: f32 = tail.iter().map(|x| (x - mean) * (x - mean)).sum();
        let variance = (simd.reduce_sum_f32s(squares) + tail_squares) / n;
        let inverse = (variance + 1e-5).sqrt().recip();
        self.scale(simd, x, mean, inverse, out);
    }

    #[inline(always)]
    fn scale<S: Simd>(&self, simd: S, x: &[f32], mean: f32, inverse: f32, out: &mut [f32]) {
        let (x, x_tail) = S::as_simd_f32s(x);
        let (weight, weight_tail) = S::as_simd_f32s(&self.weight);
        let (bias, bias_tail) = S::as_simd_f32s(&self.bias);
        let (out, out_tail) = S::as_mut_simd_f32s(out);
        let (means, inverses) = (simd.splat_f32s(mean), simd.splat_f32s(inverse));
        for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            let normed = simd.mul_f32s(simd.sub_f32s(*x, means), inverses);
            *out = simd.mul_add_e_f32s(normed, *weight, *bias);
        }
        let tails = out_tail.iter_mut().zip(x_tail).zip(weight_tail).zip(bias_tail);
        for (((out, x), weight), bias) in tails {
            *out = (x - mean) * inverse * weight + bias;
        }
    }
}

/// Rows of `norm`'s size at a distance of `stride`, into rows at a distance of `out_stride`.
pub(super) struct LayerNorm<'a> {
    pub(super) norm: &'a Norm,
    pub(super) x: &'a [f32],
    pub(super) stride: usize,
    pub(super) out: &'a mut [f32],
    pub(super) out_stride: usize,
}

impl WithSimd for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let size = self.norm.weight.len();
        for (x, out) in self.x.chunks(self.stride).zip(self.out.chunks_mut(self.out_stride)) {
            self.norm.row(simd, &x[..size], &mut out[..size]);
        }
    }
}

/// All rows of `x`, on all threads.
pub(crate) fn layer_norm(cpu: Cpu, norm: &Norm, x: &[f32]) -> Vec<f32> {
    use rayon::prelude::*;
    const ROWS: usize = 64;
    let size = norm.weight.len();
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(ROWS * size).zip(x.par_chunks(ROWS * size)).for_each(|(out, x)| {
        cpu.run(LayerNorm { norm, x, stride: size, out, out_stride: size });
    });
    out
}

/// Softmax of `scale * x` over the first `size` elements of every row.
pub(super) struct Softmax<'a> {
    pub(super) rows: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) size: usize,
    pub(super) scale: f32,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_mut(self.stride) {
            softmax(simd, &mut row[..self.size], self.scale);
        }
    }
}

/// `e^(scale * x + offset)`. A term below `e^LEAST` of the largest changes no sum of float32; it is
/// kept at that, since numbers below float32's normal range are multiplied very slowly.
#[inline(always)]
fn weight<S: Simd>(simd: S, x: S::f32s, scale: S::f32s, offset: S::f32s) -> S::f32s {
    const LEAST: f32 = -60.0;
    let exponent = simd.mul_add_e_f32s(x, scale, offset);
    exp(simd, simd.max_f32s(exponent, simd.splat_f32s(LEAST)))
}

/// Softmax of `scale * x`.
#[inline(always)]
pub(super) fn softmax<S: Simd>(simd: S, row: &mut [f32], scale: f32) {
    let (head, tail) = S::as_simd_f32s(row);
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let max = simd.reduce_max_f32s(head.iter().fold(lowest, |max, x| simd.max_f32s(max, *x)));
    let max = match row.len().checked_sub(S::F32_LANES) {
        // The last register, of which a part has been seen.
        Some(first) if !tail.is_empty() => {
            max.max(simd.reduce_max_f32s(simd.partial_load_f32s(&row[first..])))
        }
        _ => tail.iter().fold(max, |max, x| max.max(*x)),
    };
    let (scales, offsets) = (simd.splat_f32s(scale), simd.splat_f32s(-max * scale));
    let mut sums = simd.splat_f32s(0.0);
    let (head, tail) = S::as_mut_simd_f32s(row);
    for x in head.iter_mut() {
        *x = weight(simd, *x, scales, offsets);
        sums = simd.add_f32s(sums, *x);
    }
    if !tail.is_empty() {
        let weights = weight(simd, simd.partial_load_f32s(tail), scales, offsets);
        simd.partial_store_f32s(tail, weights);
        // Without what stands for nothing.
        sums = simd.add_f32s(sums, simd.partial_load_f32s(tail));
    }
    let inverses = simd.splat_f32s(simd.reduce_sum_f32s(sums).recip());
    for x in head {
        *x = simd.mul_f32s(*x, inverses);
    }
    if !tail.is_empty() {
        let weights = simd.mul_f32s(simd.partial_load_f32s(tail), inverses);
        simd.partial_store_f32s(tail, weights);
    }
}

/// The logarithm of the sum of the exponentials.
pub(crate) fn log_sum_exp(cpu: Cpu, x: &[f32]) -> f32 {
    cpu.run(LogSumExp(x))
}

struct LogSumExp<'a>(&'a [f32]);

impl WithSimd for LogSumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        // Sums of parts, so that a long row loses no precision.
        const PART: usize = 1024;
        let (head, tail) = S::as_simd_f32s(self.0);
        let lowest = simd.splat_f32s(f32::NEG_INFINITY);
        let max = simd.reduce_max_f32s(head.iter().fold(lowest, |max, x| simd.max_f32s(max, *x)));
        let max = tail.iter().fold(max, |max, x| max.max(*x));
        let maxes = simd.splat_f32s(max);
        let mut sum: f32 = tail.iter().map(|x| exp(Scalar, x - max)).sum();
        for part in head.chunks(PART / S::F32_LANES) {
            let part = part.iter().fold(simd.splat_f32s(0.0), |sum, x| {
                simd.add_f32s(sum, exp(simd, simd.sub_f32s(*x, maxes)))
            });
            sum += simd.reduce_sum_f32s(part);
        }
        max + sum.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{assert_close, random};

    /// Applies a function of registers to every element.
    struct Map<'a, F>(&'a mut [f32], F);

    trait Function {
        fn apply<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s;
    }

    struct Exp;

    impl Function for Exp {
        #[inline(always)]
        fn apply<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s {
            exp(simd, x)
        }
    }

    struct Gelu;

    impl Function for Gelu {
        #[inline(always)]
        fn apply<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s {
            gelu(simd, x)
        }
    }

    impl<F: Function> WithSimd for Map<'_, F> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for x in self.0.chunks_mut(S::F32_LANES) {
                let y = self.1.apply(simd, simd.partial_load_f32s(x));
                simd.partial_store_f32s(x, y);
            }
        }
    }

    #[test]
    fn exp_and_gelu_equal_the_libraries() {
        let x: Vec<f32> = (-8000..8000).map(|i| i as f32 * 0.01).collect();
        for cpu in Cpu::available() {
            let mut y = x.clone();
            cpu.run(Map(&mut y, Exp));
            for (x, y) in x.iter().zip(&y) {
                assert!((y / x.exp() - 1.0).abs() < 3e-7, "{} exp({x}) = {y}", cpu.name());
            }
            let mut y = x.clone();
            cpu.run(Map(&mut y, Gelu));
            for (x, y) in x.iter().zip(&y) {
                let erf = candle_core::cpu::erf::erf_f32(x * std::f32::consts::FRAC_1_SQRT_2);
                let expected = 0.5 * x * (1.0 + erf);
                let error = (y - expected).abs();
                assert!(error <= 3e-7 * x.abs().max(1.0), "{} gelu({x}) = {y}", cpu.name());
            }
        }
    }

    #[test]
    fn softmax_and_norm_equal_their_definitions() {
        for size in [1, 5, 16, 144, 147] {
            let norm = Norm { weight: random(size, 1), bias: random(size, 2) };
            let x = random(70 * size, 3);
            for cpu in Cpu::available() {
                let what = format!("{} {size}", cpu.name());
                let mut found = x.clone();
                cpu.run(Softmax { rows: &mut found, stride: size, size, scale: 3.0 });
                let mut expected = Vec::new();
                for row in x.chunks_exact(size) {
                    let sum: f32 = row.iter().map(|x| (3.0 * x).exp()).sum();
                    expected.extend(row.iter().map(|x| (3.0 * x).exp() / sum));
                }
                assert_close(&found, &expected, 1e-6, &what);
                let mut expected = Vec::new();
                for row in x.chunks_exact(size) {
                    let mean = row.iter().sum::<f32>() / size as f32;
                    let variance =
                        row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / size as f32;
                    let scaled = row.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt());
                    let weights = norm.weight.iter().zip(&norm.bias);
                    expected.extend(scaled.zip(weights).map(|(x, (w, b))| x * w + b));
                }
                assert_close(&layer_norm(cpu, &norm, &x), &expected, 1e-5, &what);
                let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
                let error = f64::from(log_sum_exp(cpu, &x)) - sum.ln();
                assert!(error.abs() < 2e-6, "{what}: {error}");
            }
        }
    }
}
