//! A small copy of a picture, for people to look at.

use image::{ExtendedColorType, ImageBuffer, codecs::jpeg::JpegEncoder, imageops};

use super::Rgb;

/// A JPEG file of a picture that is at most `side` pixels wide and high, and no larger than the
/// picture itself; none for a picture without pixels.
///
/// On the calling thread alone, and within the memory that decoding has left room for: no row more
/// than the picture has, of at most 1024 pixels.
pub fn thumbnail(picture: &Rgb, side: u32) -> Option<Box<[u8]>> {
    const QUALITY: u8 = 80;
    let (width, height) = (u32::try_from(picture.width).ok()?, u32::try_from(picture.height).ok()?);
    let view = ImageBuffer::<image::Rgb<u8>, &[u8]>::from_raw(width, height, &picture.data)?;
    let longer = width.max(height);
    if longer == 0 || side == 0 {
        return None;
    }
    let scaled = |length: u32| {
        let (length, side) = (u64::from(length), u64::from(side.min(longer)));
        let rounded = (length * side + u64::from(longer) / 2) / u64::from(longer);
        u32::try_from(rounded.max(1)).ok()
    };
    let small = imageops::thumbnail(&view, scaled(width)?, scaled(height)?);
    let mut file = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut file, QUALITY);
    encoder.encode(&small, small.width(), small.height(), ExtendedColorType::Rgb8).ok()?;
    Some(file.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{DecodeLimits, Orientation, decode};

    /// Red on the left, blue on the right.
    fn halves(width: usize, height: usize) -> Rgb {
        let pixel = |i: usize| if i % width < width / 2 { [255, 0, 0] } else { [0, 0, 255] };
        Rgb { width, height, data: (0..width * height).flat_map(pixel).collect() }
    }

    fn copy(picture: &Rgb, side: u32) -> Rgb {
        let file = thumbnail(picture, side).unwrap();
        let decoded = decode(&file, &DecodeLimits::default(), Orientation::AsStored).unwrap();
        (*decoded).clone()
    }

    #[test]
    fn a_copy_shows_the_same_and_keeps_the_shape() {
        let small = copy(&halves(400, 200), 64);
        assert_eq!((small.width, small.height), (64, 32));
        let at = |x: usize, y: usize| &small.data[(y * 64 + x) * 3..][..3];
        for (x, expected) in [(8, [255, 0, 0]), (56, [0, 0, 255])] {
            let is_near = |(found, wanted): (&u8, &i32)| (i32::from(*found) - wanted).abs() < 12;
            assert!(at(x, 16).iter().zip(&expected).all(is_near), "{x}: {:?}", at(x, 16));
        }
    }

    #[test]
    fn the_longer_side_is_what_was_asked_for_and_no_copy_is_larger() {
        for (size, side, expected) in [
            ((100, 300), 100, (33, 100)),
            ((300, 100), 100, (100, 33)),
            ((50, 20), 256, (50, 20)),
            ((1000, 3), 100, (100, 1)),
            ((1, 1), 1, (1, 1)),
            ((1025, 1025), 1024, (1024, 1024)),
        ] {
            let small = copy(&halves(size.0, size.1), side);
            assert_eq!((small.width, small.height), expected, "{size:?} {side}");
        }
        assert_eq!(thumbnail(&halves(10, 10), 0), None);
        assert_eq!(thumbnail(&Rgb { width: 0, height: 0, data: Vec::new() }, 10), None);
    }
}
