//! Pillow's bicubic resize of 8-bit RGB, byte for byte (Pillow up to 12: horizontal pass first).
//!
//! Each pass is a fixed-point convolution with 22 fractional bits and an 8-bit result; a pass is
//! skipped where that dimension already fits. Of a tall picture, only some rows at a time are
//! between the two.

use rayon::prelude::*;

use super::Rgb;

const PRECISION: u32 = 22;
const CHANNELS: usize = 3;

/// Most bytes between the two passes.
const BETWEEN: usize = 16 << 20;

/// Bytes that resizing a picture of this height takes, for a square of up to 1024 pixels a side.
pub(super) fn between(height: u32) -> u64 {
    (u64::from(height) * 1024 * CHANNELS as u64).min(BETWEEN as u64)
}

/// Stretches a picture to `width` x `height`; the aspect ratio is not kept, as in the reference.
pub fn resize_bicubic(picture: &Rgb, width: usize, height: usize) -> Rgb {
    resize_within(picture, width, height, BETWEEN)
}

fn resize_within(picture: &Rgb, width: usize, height: usize, between: usize) -> Rgb {
    let across = (picture.width != width).then(|| Taps::new(picture.width, width));
    let down = (picture.height != height).then(|| Taps::new(picture.height, height));
    let mut data = vec![0; width * height * CHANNELS];
    match (across, down) {
        (None, None) => data.copy_from_slice(&picture.data),
        (Some(across), None) => horizontal(&picture.data, picture.width, &across, &mut data),
        (None, Some(down)) => vertical(&picture.data, 0, &down.0, &mut data),
        (Some(across), Some(down)) => both(picture, &across, &down, (&mut data, between)),
    }
    Rgb { width, height, data }
}

/// Both passes, by as many output rows at once as `between` bytes of input rows suffice for.
fn both(picture: &Rgb, across: &Taps, down: &Taps, (mut out, between): (&mut [u8], usize)) {
    let stride = across.0.len() * CHANNELS;
    let end = |(start, weights): &(usize, Vec<i32>)| start + weights.len();
    // Rows of the picture from `first` on that have gone through the first pass.
    let (mut first, mut rows) = (0, Vec::new());
    let mut taps = down.0.as_slice();
    while let Some((start, _)) = taps.first() {
        let fits = |tap: &&(usize, Vec<i32>)| (end(tap) - start) * stride <= between;
        let (now, later) = taps.split_at(taps.iter().take_while(fits).count().max(1));
        rows.drain(..(start - first) * stride);
        first = *start;
        let ready = rows.len();
        let ends = now.last().map_or(first, end);
        rows.resize((ends - first) * stride, 0);
        let source = (first + ready / stride) * picture.width * CHANNELS;
        horizontal(&picture.data[source..], picture.width, across, &mut rows[ready..]);
        let (done, rest) = out.split_at_mut(now.len() * stride);
        vertical(&rows, first, now, done);
        (out, taps) = (rest, later);
    }
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

/// Fills `out` with the first rows of a picture.
fn horizontal(rows: &[u8], width: usize, taps: &Taps, out: &mut [u8]) {
    let rows = rows.par_chunks_exact(width * CHANNELS);
    out.par_chunks_exact_mut(taps.0.len() * CHANNELS).zip(rows).for_each(|(out, row)| {
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
}

/// Fills `out` with a row for each of the taps; `rows` are the picture's from `first` on.
fn vertical(rows: &[u8], first: usize, taps: &[(usize, Vec<i32>)], out: &mut [u8]) {
    let stride = out.len() / taps.len();
    out.par_chunks_exact_mut(stride).zip(taps).for_each(|(out, (start, weights))| {
        let mut sums = vec![HALF; stride];
        let rows = rows[(start - first) * stride..].chunks_exact(stride);
        for (weight, row) in weights.iter().zip(rows) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (byte, sum) in out.iter_mut().zip(sums) {
            *byte = to_byte(sum);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_the_same_by_however_many_rows_it_is_resized() {
        let (width, height) = (37, 211);
        let value = |i: usize| u8::try_from((i * i * 31 + i * 7) % 251).unwrap();
        let data = (0..width * height * CHANNELS).map(value).collect();
        let picture = Rgb { width, height, data };
        for (width, height) in [(8, 8), (50, 16), (16, 300), (37, 9), (9, 211), (37, 211)] {
            let whole = resize_within(&picture, width, height, usize::MAX);
            for between in [0, 1000, 10_000] {
                assert_eq!(resize_within(&picture, width, height, between), whole);
            }
        }
    }
}
