//! Picture bytes to 8-bit RGB, as Pillow's `convert("RGB")` would give it: alpha is dropped, grey
//! is replicated, palettes are looked up. Only the first frame of an animation is read.
//!
//! Sizes are checked on the header, before any pixel memory is claimed.

use std::io::{BufRead, Cursor, Error as IoError, Read, Seek, SeekFrom};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::Stop;

/// Why bytes are not a usable picture.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// None of the formats that are read.
    #[error("not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)")]
    UnknownFormat,
    /// A format that the settings leave out.
    #[error("{0} pictures are not allowed here")]
    NotAllowed(&'static str),
    /// A format that is known, but not read.
    #[error("{0} pictures are not supported, convert to JPEG, PNG or WebP")]
    Unsupported(&'static str),
    /// Much longer than wide, or the other way: nothing could be seen of it.
    #[error("the picture is {width}x{height}, narrower than 1 to {MAX_ASPECT}")]
    Narrow {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// The header announces more pixels than allowed.
    #[error("the picture is {width}x{height}, more than the limit of {limit} pixels")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Allowed number of pixels.
        limit: u64,
    },
    /// The header or the data cannot be decoded.
    #[error("the {format} picture is corrupt or truncated")]
    Corrupt {
        /// Name of the format that the bytes claim to be.
        format: &'static str,
        /// The decoder's own error.
        #[source]
        source: image::ImageError,
    },
}

/// Most times that a picture is as long as wide.
const MAX_ASPECT: u32 = 200;

/// What a decoder may use.
#[derive(Debug, Clone)]
pub struct DecodeLimits {
    /// Most pixels of a picture.
    pub pixels: u64,
    /// Most bytes a decoder may claim.
    pub bytes: u64,
    /// The decoders that may be used at all.
    pub formats: Formats,
    /// Ends the decoding early.
    pub stop: Stop,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            pixels: 100_000_000,
            bytes: 1 << 30,
            formats: Formats::default(),
            stop: Stop::default(),
        }
    }
}

const FORMATS: [(&str, ImageFormat); 6] = [
    ("JPEG", ImageFormat::Jpeg),
    ("PNG", ImageFormat::Png),
    ("WebP", ImageFormat::WebP),
    ("GIF", ImageFormat::Gif),
    ("BMP", ImageFormat::Bmp),
    ("TIFF", ImageFormat::Tiff),
];

/// Some of the formats that are read; by default all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats([bool; FORMATS.len()]);

impl Default for Formats {
    fn default() -> Self {
        Self([true; FORMATS.len()])
    }
}

impl std::str::FromStr for Formats {
    type Err = String;

    /// Names, separated by spaces: `jpeg png`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut formats = Self([false; FORMATS.len()]);
        for word in text.split_whitespace() {
            let found = FORMATS.iter().position(|(name, _)| name.eq_ignore_ascii_case(word));
            formats.0[found.ok_or_else(|| format!("'{word}' is no format that is read"))?] = true;
        }
        Ok(formats)
    }
}

/// Whether the EXIF orientation is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orientation {
    /// As stored, like the reference.
    #[default]
    AsStored,
    /// Turned as the EXIF tag says; boxes then refer to the turned picture.
    Exif,
}

/// An RGB picture, rows from the top, three bytes a pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

/// Decodes the first frame of a picture.
///
/// # Errors
///
/// See [`ImageError`].
pub fn decode(
    bytes: &[u8],
    limits: &DecodeLimits,
    orientation: Orientation,
) -> Result<Rgb, ImageError> {
    let source = Source { bytes: Cursor::new(bytes), stop: &limits.stop };
    let reader = ImageReader::new(source)
        .with_guessed_format()
        .map_err(|_error| ImageError::UnknownFormat)?;
    let unknown = || unsupported(bytes).map_or(ImageError::UnknownFormat, ImageError::Unsupported);
    let is_it = |(_, format): &(&str, ImageFormat)| reader.format() == Some(*format);
    let found = FORMATS.iter().position(is_it).ok_or_else(unknown)?;
    let format = FORMATS[found].0;
    if !limits.formats.0[found] {
        return Err(ImageError::NotAllowed(format));
    }
    let corrupt = |source| ImageError::Corrupt { format, source };
    let mut decoder = reader.into_decoder().map_err(corrupt)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > limits.pixels {
        return Err(ImageError::TooLarge { width, height, limit: limits.pixels });
    }
    if width.max(height) / MAX_ASPECT > width.min(height) {
        return Err(ImageError::Narrow { width, height });
    }
    let mut memory = Limits::default();
    memory.max_alloc = Some(limits.bytes);
    decoder.set_limits(memory).map_err(corrupt)?;
    let turn = match orientation {
        Orientation::AsStored => None,
        Orientation::Exif => decoder.orientation().ok(),
    };
    let mut picture = DynamicImage::from_decoder(decoder).map_err(corrupt)?;
    if let Some(turn) = turn {
        picture.apply_orientation(turn);
    }
    let rgb = picture.into_rgb8();
    Ok(Rgb { width: rgb.width() as usize, height: rgb.height() as usize, data: rgb.into_raw() })
}

/// The bytes, for as long as nobody says stop: decoders read little by little.
struct Source<'a> {
    bytes: Cursor<&'a [u8]>,
    stop: &'a Stop,
}

impl Source<'_> {
    fn check(&self) -> Result<(), IoError> {
        if self.stop.is_stopped() { Err(IoError::other("interrupted")) } else { Ok(()) }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, IoError> {
        self.check()?;
        self.bytes.read(buffer)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> Result<&[u8], IoError> {
        self.check()?;
        self.bytes.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.bytes.consume(count);
    }
}

impl Seek for Source<'_> {
    fn seek(&mut self, to: SeekFrom) -> Result<u64, IoError> {
        self.bytes.seek(to)
    }
}

/// Formats that people have and that no decoder here reads, by their first bytes.
fn unsupported(bytes: &[u8]) -> Option<&'static str> {
    if let Some(name) = container(bytes) {
        return Some(name);
    }
    let known: [(&[u8], &str); 7] = [
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cJXL ", "JPEG XL"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"%PDF", "PDF"),
        (b"<svg", "SVG"),
        (b"<?xml", "SVG"),
        (b"8BPS", "Photoshop"),
    ];
    known.iter().find(|(start, _)| bytes.starts_with(start)).map(|(_, name)| *name)
}

/// The format of an ISO media file, by the brands of its first box: AVIF and HEIC share one.
fn container(bytes: &[u8]) -> Option<&'static str> {
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    let size = usize::try_from(u32::from_be_bytes(*size)).ok()?.min(bytes.len());
    let brands = rest.get(..size.checked_sub(4)?)?.strip_prefix(b"ftyp")?;
    let has = |names: &[&[u8]]| brands.chunks_exact(4).any(|brand| names.contains(&brand));
    if has(&[b"avif", b"avis"]) {
        Some("AVIF")
    } else if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]) {
        Some("HEIC")
    } else {
        Some("Video")
    }
}

#[cfg(test)]
mod tests {
    use image::{ExtendedColorType, ImageEncoder};

    use super::*;

    fn png(pixels: &[u8], color: ExtendedColorType) -> Vec<u8> {
        let mut out = Vec::new();
        image::codecs::png::PngEncoder::new(&mut out).write_image(pixels, 2, 1, color).unwrap();
        out
    }

    fn decoded(bytes: &[u8]) -> Vec<u8> {
        decode(bytes, &DecodeLimits::default(), Orientation::AsStored).unwrap().data
    }

    #[test]
    fn alpha_is_dropped_and_grey_replicated_as_pillow_does() {
        let rgba = png(&[10, 20, 30, 0, 40, 50, 60, 128], ExtendedColorType::Rgba8);
        assert_eq!(decoded(&rgba), [10, 20, 30, 40, 50, 60]);
        let grey = png(&[7, 200], ExtendedColorType::L8);
        assert_eq!(decoded(&grey), [7, 7, 7, 200, 200, 200]);
        let grey_alpha = png(&[7, 0, 200, 255], ExtendedColorType::La8);
        assert_eq!(decoded(&grey_alpha), [7, 7, 7, 200, 200, 200]);
    }

    #[test]
    fn every_format_is_read() {
        let grey = image::RgbImage::from_pixel(5, 4, image::Rgb([90, 90, 90]));
        for (name, format) in FORMATS {
            let mut bytes = Cursor::new(Vec::new());
            grey.write_to(&mut bytes, format).unwrap();
            let rgb = decode(bytes.get_ref(), &DecodeLimits::default(), Orientation::AsStored);
            let rgb = rgb.unwrap();
            assert_eq!((rgb.width, rgb.height), (5, 4), "{format:?}");
            assert!(rgb.data.iter().all(|value| value.abs_diff(90) <= 1), "{format:?}");
            let formats = "jpeg png WEBP gif bmp".parse().unwrap();
            let limits = DecodeLimits { formats, ..DecodeLimits::default() };
            let fewer = decode(bytes.get_ref(), &limits, Orientation::AsStored);
            assert_eq!(fewer.is_ok(), name != "TIFF", "{name}");
        }
    }

    #[test]
    fn exif_turns_a_picture_only_when_asked() {
        // A 2x1 PNG with an eXIf chunk that says "turn by a quarter".
        let pixels = [10, 20, 30, 40, 50, 60];
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        let exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        encoder.set_exif_metadata(exif.to_vec()).unwrap();
        encoder.write_image(&pixels, 2, 1, ExtendedColorType::Rgb8).unwrap();
        let size = |orientation| {
            let rgb = decode(&bytes, &DecodeLimits::default(), orientation).unwrap();
            (rgb.width, rgb.height)
        };
        assert_eq!(size(Orientation::AsStored), (2, 1));
        assert_eq!(size(Orientation::Exif), (1, 2));
    }

    #[test]
    fn bad_bytes_are_named() {
        let limits = DecodeLimits { pixels: 1, ..DecodeLimits::default() };
        let check = |bytes: &[u8], limits, expected: &str| {
            let error = decode(bytes, &limits, Orientation::AsStored).unwrap_err().to_string();
            assert_eq!(error, expected);
        };
        let good = png(&[1; 6], ExtendedColorType::Rgb8);
        let unknown = "not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)";
        check(b"", DecodeLimits::default(), unknown);
        check(b"hello", DecodeLimits::default(), unknown);
        check(&good, limits, "the picture is 2x1, more than the limit of 1 pixels");
        let corrupt = "the PNG picture is corrupt or truncated";
        for cut in [9, 20, 40] {
            check(&good[..cut], DecodeLimits::default(), corrupt);
        }
    }
}
