//! Pixels of every kind that decoders give, as 8-bit RGB, without a second buffer.

use image::ColorType;

/// Makes pixels of a colour type RGB where they are. Rounds as [`image::DynamicImage::into_rgb8`] does.
pub(super) fn to_rgb(data: &mut [u8], pixels: usize, color: ColorType) {
    let half = |a, b| {
        let value = (u32::from(u16::from_ne_bytes([a, b])) + 128) / 257;
        u8::try_from(value).unwrap_or(u8::MAX)
    };
    match color {
        ColorType::L8 => repack(data, pixels, |[grey]| [grey; 3]),
        ColorType::La8 => repack(data, pixels, |[grey, _]| [grey; 3]),
        ColorType::Rgb8 => {}
        ColorType::Rgba8 => repack(data, pixels, |[r, g, b, _]| [r, g, b]),
        ColorType::L16 => repack(data, pixels, |[a, b]| [half(a, b); 3]),
        ColorType::La16 => repack(data, pixels, |[a, b, _, _]| [half(a, b); 3]),
        ColorType::Rgb16 => {
            repack(data, pixels, |[a, b, c, d, e, f]| [half(a, b), half(c, d), half(e, f)]);
        }
        ColorType::Rgba16 => {
            repack(data, pixels, |[a, b, c, d, e, f, _, _]| [half(a, b), half(c, d), half(e, f)]);
        }
        ColorType::Rgb32F => repack(data, pixels, |pixel: [u8; 12]| float(&pixel)),
        _ => repack(data, pixels, |pixel: [u8; 16]| float(&pixel)),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=255")]
fn float(pixel: &[u8]) -> [u8; 3] {
    let (channels, _) = pixel.as_chunks();
    let byte = |i: usize| {
        let value = f32::from_ne_bytes(channels[i]);
        // As `image` has it: what is no number is white.
        let value = if value < 1.0 { value.max(0.0) } else { 1.0 };
        (value * 255.0).round() as u8
    };
    [byte(0), byte(1), byte(2)]
}

/// Makes pixels of N bytes such of three. Those that grow are moved from the last to the first, so
/// that none is written over before it is read.
fn repack<const N: usize>(data: &mut [u8], pixels: usize, convert: impl Fn([u8; N]) -> [u8; 3]) {
    let mut one = |i: usize| {
        let (chunks, _) = data[N * i..].as_chunks();
        let pixel = convert(chunks[0]);
        data[3 * i..][..3].copy_from_slice(&pixel);
    };
    if N < 3 { (0..pixels).rev().for_each(&mut one) } else { (0..pixels).for_each(&mut one) }
}

#[cfg(test)]
mod tests {
    use image::DynamicImage;

    use super::*;

    #[test]
    fn pixels_of_every_kind_become_rgb_where_they_are_as_with_a_copy() {
        let (width, height) = (16, 4097);
        let pixels = (width * height) as usize;
        let bytes = |size: usize| (0..=u8::MAX).chain(3..=200).cycle().take(pixels * size);
        let words: Vec<u16> = (0..=u16::MAX).cycle().take(pixels * 4).collect();
        let floats = |count: usize| {
            let odd = [f32::NAN, -1.0, 0.0, 1.0, 1.5, f32::INFINITY, 0.5, 127.5 / 255.0];
            (0..pixels * count).map(move |i| if i < 8 { odd[i] } else { i as f32 / 250_000.0 })
        };
        macro_rules! check {
            ($color:ident, $variant:ident, $samples:expr) => {
                let samples: Vec<_> = $samples;
                let mut data: Vec<u8> = samples.iter().flat_map(|s| s.to_ne_bytes()).collect();
                let picture = image::ImageBuffer::from_raw(width, height, samples).unwrap();
                let expected = DynamicImage::$variant(picture).into_rgb8().into_raw();
                data.resize(data.len().max(3 * pixels), 0);
                to_rgb(&mut data, pixels, ColorType::$color);
                assert!(data[..3 * pixels] == expected, "{}", stringify!($color));
            };
        }
        check!(L8, ImageLuma8, bytes(1).collect());
        check!(La8, ImageLumaA8, bytes(2).collect());
        check!(Rgb8, ImageRgb8, bytes(3).collect());
        check!(Rgba8, ImageRgba8, bytes(4).collect());
        check!(L16, ImageLuma16, words[..pixels].to_vec());
        check!(La16, ImageLumaA16, words[..2 * pixels].to_vec());
        check!(Rgb16, ImageRgb16, words[..3 * pixels].to_vec());
        check!(Rgba16, ImageRgba16, words.clone());
        check!(Rgb32F, ImageRgb32F, floats(3).collect());
        check!(Rgba32F, ImageRgba32F, floats(4).collect());
    }
}
