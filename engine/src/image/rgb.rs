//! Pixels of every kind that decoders give, as 8-bit RGB, without a second buffer.
//!
//! Of 16 bits the upper 8 are kept, but 16-bit grey is cut off at 255: so Pillow has it.

use image::ColorType;

/// Makes pixels of a colour type RGB where they are.
pub(super) fn to_rgb(data: &mut [u8], pixels: usize, color: ColorType) {
    let half = |a, b| {
        let [upper, _] = u16::from_ne_bytes([a, b]).to_be_bytes();
        upper
    };
    match color {
        ColorType::L8 => repack(data, pixels, |[grey]| [grey; 3]),
        ColorType::La8 => repack(data, pixels, |[grey, _]| [grey; 3]),
        ColorType::Rgba8 => repack(data, pixels, |[r, g, b, _]| [r, g, b]),
        ColorType::L16 => repack(data, pixels, |[a, b]| {
            let value = u16::from_ne_bytes([a, b]);
            [u8::try_from(value).unwrap_or(u8::MAX); 3]
        }),
        ColorType::La16 => repack(data, pixels, |[a, b, _, _]| [half(a, b); 3]),
        ColorType::Rgb16 => {
            repack(data, pixels, |[a, b, c, d, e, f]| [half(a, b), half(c, d), half(e, f)]);
        }
        ColorType::Rgba16 => {
            repack(data, pixels, |[a, b, c, d, e, f, _, _]| [half(a, b), half(c, d), half(e, f)]);
        }
        // RGB already; floats, which TIFF alone has, are refused.
        _ => {}
    }
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

    const PIXELS: usize = 16 * 4097;

    /// What becomes of samples where they are.
    fn in_place<T: bytemuck::Pod>(samples: &[T], color: ColorType) -> Vec<u8> {
        let mut data = bytemuck::cast_slice(samples).to_vec();
        data.resize(data.len().max(3 * PIXELS), 0);
        to_rgb(&mut data, PIXELS, color);
        data.truncate(3 * PIXELS);
        data
    }

    #[test]
    fn pixels_of_every_kind_become_rgb_where_they_are_as_with_a_copy() {
        let bytes = |size: usize| (0..=u8::MAX).chain(3..=200).cycle().take(PIXELS * size);
        macro_rules! check {
            ($color:ident, $variant:ident, $samples:expr) => {
                let samples: Vec<_> = $samples;
                let found = in_place(&samples, ColorType::$color);
                let picture = image::ImageBuffer::from_raw(16, 4097, samples).unwrap();
                let expected = DynamicImage::$variant(picture).into_rgb8().into_raw();
                assert!(found == expected, "{}", stringify!($color));
            };
        }
        check!(L8, ImageLuma8, bytes(1).collect());
        check!(La8, ImageLumaA8, bytes(2).collect());
        check!(Rgb8, ImageRgb8, bytes(3).collect());
        check!(Rgba8, ImageRgba8, bytes(4).collect());
    }

    #[test]
    fn of_sixteen_bits_the_upper_are_kept_and_grey_is_cut_off() {
        let words: Vec<u16> = (0..=u16::MAX).cycle().take(PIXELS * 4).collect();
        let upper = |value: u16| u8::try_from(value >> 8).unwrap();
        for (color, channels) in
            [(ColorType::La16, 2), (ColorType::Rgb16, 3), (ColorType::Rgba16, 4)]
        {
            let pixels = words[..channels * PIXELS].chunks(channels);
            let expected: Vec<u8> = pixels
                .flat_map(|p| if channels == 2 { [p[0]; 3] } else { [p[0], p[1], p[2]] })
                .map(upper)
                .collect();
            assert!(in_place(&words[..channels * PIXELS], color) == expected, "{color:?}");
        }
        let grey = in_place(&words[..PIXELS], ColorType::L16);
        let expected = words[..PIXELS].iter().flat_map(|value| [(*value).min(255) as u8; 3]);
        assert!(grey.into_iter().eq(expected));
    }
}
