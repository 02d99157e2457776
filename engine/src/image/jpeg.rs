//! JPEG, decoded by libjpeg-turbo as Pillow has it do: the same pixels, and the same files refused.
//!
//! The C code gets a copy of the file, of which everything before the first scan has been read here:
//! only the segments that decoding needs are in it, so neither sizes nor profiles and texts can
//! surprise. One call decodes a picture and cannot be told to stop; the number of scans is bounded.

use image::{ColorType, ImageDecoder, ImageError as Failure, ImageFormat, ImageResult};
use turbojpeg::{Decompressor, Image, PixelFormat};

use super::{decode::corrupt, memory::Inner};

/// Most scans of a file. Encoders make about ten.
const MAX_SCANS: u32 = 200;

const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;
const APP2: u8 = 0xe2;
const APP13: u8 = 0xed;
const APP14: u8 = 0xee;
const START: [u8; 2] = [0xff, 0xd8];
const END: [u8; 2] = [0xff, 0xd9];

/// Why a file is not decoded.
#[derive(Debug)]
pub(super) enum Refused {
    /// It is of this kind.
    Unsupported(&'static str),
    Damaged(Failure),
}

/// A JPEG file whose header has been read.
pub(super) struct Jpeg<'a> {
    file: &'a [u8],
    frame: Frame,
    /// Where the marker of the first scan is.
    scan: usize,
    /// There are further scans, or may be.
    has_scans: bool,
    exif: Option<&'a [u8]>,
}

impl<'a> Jpeg<'a> {
    /// Reads a file up to its first scan.
    pub(super) fn new(file: &'a [u8]) -> Result<Self, Refused> {
        let (mut frame, mut exif) = (None, None);
        for segment in segments(file) {
            let Segment { marker, start, content } = segment;
            match marker {
                0xc0..=0xc2 if frame.is_none() => frame = Some(Frame::read(marker, content)?),
                0xc0..=0xc2 => break,
                0xc3 => return Err(Refused::Unsupported("Lossless JPEG")),
                0xf7 => return Err(Refused::Unsupported("JPEG-LS")),
                0xc5..=0xc7 => return Err(Refused::Unsupported("Hierarchical JPEG")),
                0xc9..=0xcb | 0xcd..=0xcf => {
                    return Err(Refused::Unsupported("Arithmetic-coded JPEG"));
                }
                APP1 => exif = exif.or_else(|| content.strip_prefix(b"Exif\0\0")),
                0xda => {
                    let frame = frame.ok_or_else(bad_header)?;
                    let has_scans = frame.is_progressive || content.first() != Some(&frame.count);
                    return Ok(Self { file, frame, scan: start, has_scans, exif });
                }
                _ => {}
            }
        }
        Err(bad_header())
    }

    /// What decoding takes: a copy of the file, some rows of at most four components at several
    /// stages, and the coefficients of all blocks where one component, or one part of their bits,
    /// comes after the other.
    pub(super) fn inner(&self) -> Inner {
        let coefficients =
            if self.has_scans { self.frame.blocks.saturating_mul(64 * 2) } else { 0 };
        Inner::rows(self.dimensions(), 192).and(self.file.len() as u64 + coefficients)
    }

    /// Whether the file says where its picture ends.
    fn has_end(&self) -> bool {
        self.file[self.scan..].windows(2).rev().any(|two| two == END)
    }

    /// What the C code gets.
    fn file_to_decode(&self, has_end: bool) -> Vec<u8> {
        let mut file = Vec::with_capacity(self.file.len() + 8);
        file.extend(START);
        for Segment { marker, start, content } in segments(self.file) {
            let at = file.len() + 4;
            match marker {
                0xda => break,
                // The frame, codes, quantization, restarts.
                0xc0..=0xc2 | 0xc4 | 0xdb | 0xdd | APP0 | APP14 => {
                    file.extend(&self.file[start..][..4 + content.len()]);
                }
                _ => continue,
            }
            settle(marker, &mut file[at..], self.frame.count);
        }
        let scan = file.len();
        file.extend(&self.file[self.scan..]);
        // Profiles would be kept in memory, and there may be a million of them behind a scan.
        let mut before = 0;
        for byte in &mut file[scan..] {
            if before == 0xff && *byte == APP2 {
                *byte = APP13;
            }
            before = *byte;
        }
        if !has_end {
            file.push(0);
            file.extend(END);
        }
        file
    }

    fn decode(&self, pixels: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let has_end = self.has_end();
        if self.has_scans && !has_end {
            return Err("the scans have no end".into());
        }
        let file = self.file_to_decode(has_end);
        let format = if self.frame.count == 4 { PixelFormat::CMYK } else { PixelFormat::RGB };
        let (width, height) = (usize::from(self.frame.width), usize::from(self.frame.height));
        let image = Image { pixels, width, pitch: width * format.size(), height, format };
        let mut decompressor = Decompressor::new()?;
        decompressor.set_scan_limit(MAX_SCANS)?;
        let said = decompressor.decompress(&file, image);
        let warning = match &said {
            Err(turbojpeg::Error::TurboJpegError(text)) => Some(text.as_str()),
            _ => None,
        };
        if has_end {
            return if warning.is_some_and(is_passed_over) { Ok(()) } else { Ok(said?) };
        }
        // Pillow's decoder reads ahead, and takes a picture whose end it does not see only if it
        // does not get that far: then the byte that stands before our end is left over.
        match warning {
            Some(text) if text.ends_with(LEFT_OVER) => Ok(()),
            _ => Err(said.err().map_or_else(|| "the scan has no end".into(), Into::into)),
        }
    }
}

/// Gives what libjpeg warns of in a header the meaning that it then takes: a JFIF version, and what
/// Adobe's segment says of the colours.
fn settle(marker: u8, content: &mut [u8], count: u8) {
    match (marker, content) {
        (APP0, [b'J', b'F', b'I', b'F', 0, version, ..]) => *version = 1,
        (APP14, [b'A', b'd', b'o', b'b', b'e', _, _, _, _, _, _, transform, ..]) => {
            *transform = match count {
                4 if *transform != 0 => 2,
                _ => (*transform).min(1),
            };
        }
        _ => {}
    }
}

/// What libjpeg says of bytes between the picture and the marker of its end.
const LEFT_OVER: &str = "extraneous bytes before marker 0xd9";

/// Whether Pillow takes a picture of which libjpeg says this: it does where all rows are there,
/// whatever they are. (A failure comes after all warnings, and so is what remains to be read.)
fn is_passed_over(warning: &str) -> bool {
    let warnings =
        ["Corrupt JPEG data", "Inconsistent progression sequence", "Invalid SOS parameters"];
    warnings.iter().any(|start| warning.starts_with(start))
}

impl ImageDecoder for Jpeg<'_> {
    fn dimensions(&self) -> (u32, u32) {
        (self.frame.width.into(), self.frame.height.into())
    }

    /// Four inks become RGB and a byte that is left out later.
    fn color_type(&self) -> ColorType {
        if self.frame.count == 4 { ColorType::Rgba8 } else { ColorType::Rgb8 }
    }

    fn exif_metadata(&mut self) -> ImageResult<Option<Vec<u8>>> {
        Ok(self.exif.map(<[u8]>::to_vec))
    }

    fn read_image(self, pixels: &mut [u8]) -> ImageResult<()> {
        self.decode(pixels).map_err(|error| corrupt(ImageFormat::Jpeg, error))?;
        if self.frame.count == 4 {
            pixels.as_chunks_mut().0.iter_mut().for_each(to_rgb);
        }
        Ok(())
    }

    fn read_image_boxed(self: Box<Self>, pixels: &mut [u8]) -> ImageResult<()> {
        (*self).read_image(pixels)
    }
}

/// Inks to colours as Pillow does it; like Pillow, takes inks for inverted whoever wrote them.
fn to_rgb(pixel: &mut [u8; 4]) {
    let [inks @ .., black] = pixel;
    for ink in inks {
        let product = u32::from(255 - *ink) * u32::from(*black) + 128;
        let part = ((product >> 8) + product) >> 8;
        *ink = u8::try_from(u32::from(*black) - part).unwrap_or(0);
    }
}

fn bad_header() -> Refused {
    Refused::Damaged(corrupt(ImageFormat::Jpeg, "the header is damaged"))
}

/// A start of frame.
struct Frame {
    width: u16,
    height: u16,
    is_progressive: bool,
    /// Components: grey; three colours; four inks.
    count: u8,
    /// Blocks of 64 coefficients, of all components.
    blocks: u64,
}

impl Frame {
    fn read(marker: u8, content: &[u8]) -> Result<Self, Refused> {
        let (head, components) = content.split_first_chunk::<6>().ok_or_else(bad_header)?;
        let [bits, h1, h2, w1, w2, count] = *head;
        match (bits, count) {
            (8, 1 | 3 | 4) => {}
            (12, _) => return Err(Refused::Unsupported("12-bit JPEG")),
            _ => return Err(bad_header()),
        }
        let components = components.as_chunks::<3>().0.get(..usize::from(count));
        let components = components.ok_or_else(bad_header)?;
        let sampling = components
            .iter()
            .map(|[_, both, _]| (u64::from(both >> 4).max(1), u64::from(both & 15).max(1)));
        let across = sampling.clone().map(|(across, _)| across).max().unwrap_or(1);
        let down = sampling.clone().map(|(_, down)| down).max().unwrap_or(1);
        let (height, width) = (u16::from_be_bytes([h1, h2]), u16::from_be_bytes([w1, w2]));
        let units = u64::from(width).div_ceil(8 * across) * u64::from(height).div_ceil(8 * down);
        let blocks = sampling.map(|(across, down)| across * down).sum::<u64>() * units;
        Ok(Self { width, height, is_progressive: marker == 0xc2, count, blocks })
    }
}

/// A marker, and what belongs to it.
struct Segment<'a> {
    marker: u8,
    /// Where the marker's two bytes begin.
    start: usize,
    /// After the length.
    content: &'a [u8],
}

/// What a file begins with, as far as one segment follows on the other.
fn segments(file: &[u8]) -> impl Iterator<Item = Segment<'_>> {
    let mut at = START.len();
    std::iter::from_fn(move || {
        // The first byte of a marker may be there any number of times, and what is none between
        // segments is passed over.
        let rest = file.get(at..)?;
        let is_marker = |pair: &[u8; 2]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff);
        let start = at + rest.array_windows().position(is_marker)?;
        let marker = file[start + 1];
        at = start + 2;
        let content = match marker {
            0x01 | 0xd0..=0xd7 => &[],
            0xc0..=0xc7 | 0xc9..=0xcf | 0xda..=0xdd | 0xe0..=0xef | 0xf7 | 0xfe => {
                let length = u16::from_be_bytes(*file.get(at..)?.first_chunk()?);
                let length = usize::from(length.max(2));
                let content = file.get(at + 2..at + length)?;
                at += length;
                content
            }
            // None of a file that anybody reads, or not here.
            _ => return None,
        };
        Some(Segment { marker, start, content })
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{DynamicImage, ImageBuffer, Rgb};

    use super::*;
    use crate::image::{DecodeLimits, ImageError, Orientation, decode};

    fn file(width: u32, height: u32) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        let value = |x: u32| u8::try_from(x * 37 % 256).unwrap();
        let pixels = ImageBuffer::from_fn(width, height, |x, y| Rgb([value(x), value(y), 90]));
        DynamicImage::ImageRgb8(pixels).write_to(&mut file, ImageFormat::Jpeg).unwrap();
        file.into_inner()
    }

    fn pixels(file: &[u8]) -> Result<Vec<u8>, ImageError> {
        Ok(decode(file, &DecodeLimits::default(), Orientation::AsStored)?.data.clone())
    }

    /// Where a marker of the header is.
    fn find(file: &[u8], marker: u8) -> usize {
        segments(file).find(|segment| segment.marker == marker).unwrap().start
    }

    #[test]
    fn a_picture_that_is_cut_off_is_none() {
        let whole = file(40, 30);
        let expected = pixels(&whole).unwrap();
        for cut in 3..whole.len() {
            let error = pixels(&whole[..cut]).map(drop);
            // Of the last byte only the marker of the end may miss.
            if cut < whole.len() - 2 {
                assert!(matches!(error, Err(ImageError::Corrupt { .. })), "{cut}: {error:?}");
            }
        }
        // Who reads on behind the picture finds that something is missing, as Pillow does.
        let without_end = &whole[..whole.len() - 2];
        let padded = |bytes| pixels(&[without_end, &vec![0; bytes]].concat());
        assert_eq!(padded(8).unwrap(), expected);
        assert_eq!(pixels(&[&whole, b"more".as_slice()].concat()).unwrap(), expected);
        assert_eq!(pixels(&[whole.as_slice(), &whole].concat()).unwrap(), expected);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let whole = file(40, 30);
        let frame = find(&whole, 0xc0);
        let check = |at: usize, byte: u8, expected: &str| {
            let mut file = whole.clone();
            file[at] = byte;
            let error = pixels(&file).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{byte:x}: {error}");
        };
        for (marker, name) in [
            (0xc3, "Lossless JPEG"),
            (0xc6, "Hierarchical JPEG"),
            (0xf7, "JPEG-LS"),
            (0xc9, "Arithmetic-coded JPEG"),
            (0xca, "Arithmetic-coded JPEG"),
        ] {
            check(frame + 1, marker, &format!("{name} pictures are not supported"));
        }
        check(frame + 4, 12, "12-bit JPEG pictures are not supported");
        // Two components; no rows; no such marker.
        let corrupt = "the JPEG picture is corrupt or truncated";
        check(frame + 9, 2, corrupt);
        check(frame + 6, 0, corrupt);
        check(frame + 1, 0x40, corrupt);
    }

    #[test]
    fn only_what_decoding_needs_is_handed_on() {
        let whole = file(40, 30);
        let expected = pixels(&whole).unwrap();
        let segment = |marker: u8, content: &[u8]| {
            let length = u16::try_from(content.len() + 2).unwrap().to_be_bytes();
            [&[0xff, marker], length.as_slice(), content].concat()
        };
        let profile = segment(APP2, b"ICC_PROFILE\0\x07\x03and no more");
        let text = segment(0xfe, &[b'x'; 5000]);
        let newer = segment(APP0, b"JFIF\0\x02\0\0\0\x01\0\x01\0\0");
        let stray = b"\0\0\xff\0\xff\0no segment";
        let more =
            [START.as_slice(), &profile, stray, &text, &newer, &[0xff; 3], &whole[2..]].concat();
        let end = more.len() - 2;
        let more = [&more[..end], &profile.repeat(3), &END].concat();
        let jpeg = Jpeg::new(&more).unwrap();
        let handed = jpeg.file_to_decode(jpeg.has_end());
        assert!(handed.len() < whole.len() + 200);
        assert!(!handed.windows(2).any(|two| two == [0xff, APP2]));
        assert_eq!(pixels(&more).unwrap(), expected);
    }

    #[test]
    fn scans_are_counted() {
        // A grey picture of 8 by 8, progressive, all of it 0: tables of one code of one bit.
        let scans = |count: usize| {
            let mut file = START.to_vec();
            file.extend([0xff, 0xdb, 0, 67, 0]);
            file.extend([1; 64]);
            file.extend([0xff, 0xc2, 0, 11, 8, 0, 8, 0, 8, 1, 1, 0x11, 0]);
            for table in [0, 0x10] {
                file.extend([0xff, 0xc4, 0, 20, table, 1]);
                file.extend([0; 16]);
            }
            file.extend([0xff, 0xda, 0, 8, 1, 1, 0, 0, 0, 0, 0x7f]);
            for _ in 1..count {
                file.extend([0xff, 0xda, 0, 8, 1, 1, 0, 1, 63, 0x10, 0x7f]);
            }
            file.extend(END);
            file
        };
        assert_eq!(pixels(&scans(1)).unwrap(), [128; 192]);
        assert!(pixels(&scans(MAX_SCANS as usize + 1)).is_err());
        let Err(ImageError::Corrupt { source, .. }) = pixels(&scans(2000)) else { panic!() };
        assert!(source.to_string().contains("scans"), "{source}");
    }

    #[test]
    fn exif_turns_a_picture_only_when_asked() {
        let whole = file(40, 30);
        let exif = b"\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let turned = [&whole[..2], exif, &whole[2..]].concat();
        let size = |orientation| {
            let picture = decode(&turned, &DecodeLimits::default(), orientation).unwrap();
            (picture.width, picture.height)
        };
        assert_eq!(size(Orientation::AsStored), (40, 30));
        assert_eq!(size(Orientation::Exif), (30, 40));
    }

    #[test]
    fn inks_become_colours() {
        let check = |inks: [u8; 4], expected: [u8; 3]| {
            let mut pixel = inks;
            to_rgb(&mut pixel);
            assert_eq!(pixel[..3], expected, "{inks:?}");
        };
        check([255; 4], [255; 3]);
        check([0; 4], [0; 3]);
        check([255, 0, 128, 255], [255, 0, 128]);
        check([200, 100, 0, 77], [60, 30, 0]);
    }
}
