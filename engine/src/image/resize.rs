//! Pillow's bicubic resize of 8-bit RGB, byte for byte (Pillow up to 12: horizontal pass first).
//!
//! Each pass is a fixed-point convolution with 22 fractional bits and an 8-bit result; a pass is
//! skipped where that dimension already fits.

use rayon::prelude::*;

use super::Rgb;

const PRECISION: u32 = 22;
const CHANNELS: usize = 3;

/// Stretches a picture to `width` x `height`; the aspect ratio is not kept, as in the reference.
pub fn resize_bicubic(picture: &Rgb, width: usize, height: usize) -> Rgb {
    let wide;
    let picture = if picture.width == width {
        picture
    } else {
        wide = horizontal(picture, &Taps::new(picture.width, width));
        &wide
    };
    if picture.height == height {
        return picture.clone();
    }
    vertical(picture, &Taps::new(picture.height, height))
}

/// For each output position, the first input position and the integer weights from there on.
struct Taps(Vec<(usize, Vec<i32>)>);

impl Taps {
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let filter_scale = scale.max(1.0);
        let support = 2.0 * filter_scale;
        let taps = (0..to).map(|out| {
            let center = (out as f64 + 0.5) * scale;
            let start = truncate(center - support + 0.5);
            let end = truncate(center + support + 0.5).min(from);
            let weights: Vec<f64> =
                (start..end).map(|x| cubic((x as f64 - center + 0.5) / filter_scale)).collect();
            let sum: f64 = weights.iter().sum();
            (start, weights.iter().map(|w| fixed_point(w / sum)).collect())
        });
        Self(taps.collect())
    }
}

/// Toward zero, and never below it.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positions are small and clamped at zero"
)]
fn truncate(x: f64) -> usize {
    x.max(0.0) as usize
}

#[expect(clippy::cast_possible_truncation, reason = "weights are below 2, so below 2^23 here")]
fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// The cubic convolution kernel with a = -0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[expect(clippy::cast_sign_loss, reason = "clamped to 0..=255")]
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION - 1);

fn horizontal(picture: &Rgb, taps: &Taps) -> Rgb {
    let width = taps.0.len();
    let mut data = vec![0; picture.height * width * CHANNELS];
    let rows = picture.data.par_chunks_exact(picture.width * CHANNELS);
    data.par_chunks_exact_mut(width * CHANNELS).zip(rows).for_each(|(out, row)| {
        for ((start, weights), pixel) in taps.0.iter().zip(out.chunks_exact_mut(CHANNELS)) {
            let mut sums = [HALF; CHANNELS];
            let inputs = row[start * CHANNELS..].chunks_exact(CHANNELS);
            for (weight, input) in weights.iter().zip(inputs) {
                for (sum, value) in sums.iter_mut().zip(input) {
                    *sum += i32::from(*value) * weight;
                }
            }
            pixel.copy_from_slice(&sums.map(to_byte));
        }
    });
    Rgb { width, height: picture.height, data }
}

fn vertical(picture: &Rgb, taps: &Taps) -> Rgb {
    let stride = picture.width * CHANNELS;
    let mut data = vec![0; taps.0.len() * stride];
    data.par_chunks_exact_mut(stride).zip(&taps.0).for_each(|(out, (start, weights))| {
        let mut sums = vec![HALF; stride];
        let rows = picture.data[start * stride..].chunks_exact(stride);
        for (weight, row) in weights.iter().zip(rows) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (byte, sum) in out.iter_mut().zip(sums) {
            *byte = to_byte(sum);
        }
    });
    Rgb { width: picture.width, height: taps.0.len(), data }
}
