//! Picture bytes to 8-bit RGB, as Pillow's `convert("RGB")` would give it: alpha is dropped, grey
//! is replicated, palettes are looked up. Only the first frame of an animation is read.
//!
//! Sizes are checked on the header, before any pixel memory is claimed, and what decoding will take
//! is reserved. There is one buffer from the decoder's output to RGB.

use std::{
    io::{BufRead, Cursor, Error as IoError, Read, Seek, SeekFrom},
    ops::Deref,
    time::Instant,
};

use image::{
    DynamicImage, ImageDecoder, ImageError as Failure, ImageFormat, ImageReader, Limits, RgbImage,
    error::{DecodingError, ImageFormatHint, ParameterError, ParameterErrorKind},
    metadata::Orientation as Turn,
};

use super::{
    exif,
    formats::{Formats, format_of},
    gif::Gif,
    jpeg::{Jpeg, Refused},
    memory::{self, Inner},
    png::Png,
    resize,
    rgb::to_rgb,
    sniff,
    tiff::Tiff,
    webp::WebP,
};
use crate::{Budget, NoRoom, Reservation, Stop, catch_panic};

/// Why bytes are not a usable picture.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// None of the formats that are allowed.
    #[error("not a picture in a known format ({0})")]
    UnknownFormat(Formats),
    /// A format that the settings leave out.
    #[error("{0} pictures are not allowed here, convert to {1}")]
    NotAllowed(&'static str, Formats),
    /// A format that is known, but not read.
    #[error("{0} pictures are not supported, convert to {1}")]
    Unsupported(&'static str, Formats),
    /// A kind of a format that is read otherwise.
    #[error("this kind of {0} picture is not supported, convert to {1}")]
    UnsupportedKind(&'static str, Formats),
    /// What servers answer with when they have no picture.
    #[error("this is {0}, not a picture")]
    NotPicture(&'static str),
    /// None that a model can take which has pictures as they are.
    #[error(
        "the picture is {width}x{height}, but this model takes pictures as they are: squares of \
         up to {most} pixels"
    )]
    NotResized {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Longest side.
        most: usize,
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
    /// Decoding would take more memory than one picture may.
    #[error("the picture is {width}x{height} and needs {bytes} bytes to decode, more than {limit}")]
    NeedsMemory {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Bytes that decoding would take.
        bytes: u64,
        /// Allowed number of bytes.
        limit: u64,
    },
    /// There was no memory for it in time, or decoding was told to end.
    #[error("the picture was not decoded: {0}")]
    NoRoom(#[from] NoRoom),
    /// The header or the data cannot be decoded.
    #[error("the {format} picture is corrupt or truncated")]
    Corrupt {
        /// Name of the format that the bytes claim to be.
        format: &'static str,
        /// The decoder's own error.
        #[source]
        source: Failure,
    },
}

/// What a decoder may use.
#[derive(Debug, Clone)]
pub struct DecodeLimits {
    /// Most pixels of a picture.
    pub pixels: u64,
    /// Most bytes that decoding one picture may take, its output included, as its header tells.
    pub bytes: u64,
    /// The decoders that may be used at all.
    pub formats: Formats,
    /// Ends the decoding early.
    pub stop: Stop,
    /// What all pictures that are decoded at once may take; none is no limit.
    pub budget: Option<Budget>,
    /// When to give up waiting for room in the budget.
    pub deadline: Option<Instant>,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            pixels: 100_000_000,
            bytes: 1 << 30,
            formats: Formats::default(),
            stop: Stop::default(),
            budget: None,
            deadline: None,
        }
    }
}

/// Whether the EXIF orientation is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orientation {
    /// As stored, like the reference, which turns TIFF alone.
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

/// A decoded picture, and the memory that is reserved for it until it is dropped.
#[derive(Debug)]
pub struct Decoded {
    rgb: Rgb,
    _reserved: Option<Reservation>,
}

impl Decoded {
    /// The picture alone; what was reserved for it is given back.
    pub fn into_rgb(self) -> Rgb {
        self.rgb
    }
}

impl Deref for Decoded {
    type Target = Rgb;

    fn deref(&self) -> &Rgb {
        &self.rgb
    }
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
) -> Result<Decoded, ImageError> {
    let decoded = decode_all(bytes, limits, orientation);
    // A decoder takes the end of its source for damage.
    if decoded.is_err() && limits.stop.is_stopped() {
        return Err(NoRoom::Stopped.into());
    }
    decoded
}

fn decode_all(
    bytes: &[u8],
    limits: &DecodeLimits,
    orientation: Orientation,
) -> Result<Decoded, ImageError> {
    let formats = limits.formats;
    let found = format_of(bytes);
    let (name, format) = found.ok_or_else(|| sniff::refuse(bytes, formats))?;
    if !formats.allow(format) {
        return Err(ImageError::NotAllowed(name, formats));
    }
    guarded(name, format, || decode_as(name, format, bytes, limits, orientation))
}

/// What a decoder makes of a file: one that panics has met damage that it did not expect, which is
/// the picture's fault and no other's.
fn guarded<T>(
    name: &'static str,
    format: ImageFormat,
    f: impl FnOnce() -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    catch_panic(f).unwrap_or_else(|text| {
        Err(ImageError::Corrupt { format: name, source: corrupt(format, text) })
    })
}

fn decode_as(
    name: &'static str,
    format: ImageFormat,
    bytes: &[u8],
    limits: &DecodeLimits,
    orientation: Orientation,
) -> Result<Decoded, ImageError> {
    let formats = limits.formats;
    // Pillow turns TIFF when it opens a file, whether asked or not.
    let orientation = if format == ImageFormat::Tiff { Orientation::Exif } else { orientation };
    let failed = |error: Failure| match error {
        Failure::Unsupported(_) => ImageError::UnsupportedKind(name, formats),
        source => ImageError::Corrupt { format: name, source },
    };
    let (mut decoder, inner) = open(format, bytes, limits, failed)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        let empty = ParameterError::from_kind(ParameterErrorKind::DimensionMismatch);
        return Err(failed(Failure::Parameter(empty)));
    }
    let bytes_per_pixel = decoder.color_type().bytes_per_pixel().into();
    let plan = Plan::new((width, height), bytes_per_pixel, inner, limits, orientation)?;
    let reserve = |budget: &Budget| budget.reserve(plan.claim, &limits.stop, limits.deadline);
    let mut reserved = limits.budget.as_ref().map(reserve).transpose()?;
    if limits.stop.is_stopped() {
        return Err(NoRoom::Stopped.into());
    }
    decoder.set_limits(at_most(plan.inner)).map_err(failed)?;
    let turn = match orientation {
        Orientation::AsStored => None,
        Orientation::Exif => turn(&mut *decoder, format).ok(),
    };
    let rgb = turned(read(decoder, &plan).map_err(failed)?, turn);
    if let Some(reserved) = &mut reserved {
        reserved.shrink_to(plan.rest);
    }
    Ok(Decoded { rgb, _reserved: reserved })
}

/// Whether a picture has an EXIF tag that only [`Orientation::Exif`] turns it by.
pub fn is_turned(bytes: &[u8]) -> bool {
    let Some((name, format)) = format_of(bytes) else {
        return false;
    };
    let failed = |source| ImageError::Corrupt { format: name, source };
    let limits = DecodeLimits::default();
    let turn = guarded(name, format, || {
        let (mut decoder, _) = open(format, bytes, &limits, failed)?;
        turn(&mut *decoder, format).map_err(failed)
    });
    format != ImageFormat::Tiff && turn.is_ok_and(|turn| turn != Turn::NoTransforms)
}

/// How a file says that its picture is to be turned.
fn turn(decoder: &mut dyn ImageDecoder, format: ImageFormat) -> Result<Turn, Failure> {
    if format == ImageFormat::Tiff {
        return decoder.orientation();
    }
    let exif = decoder.exif_metadata()?;
    Ok(exif.map_or(Turn::NoTransforms, |exif| exif::orientation(&exif)))
}

type Opened<'a> = (Box<dyn ImageDecoder + 'a>, Inner);

/// Reads a header: who decodes the picture, and what that takes.
fn open<'a>(
    format: ImageFormat,
    bytes: &'a [u8],
    limits: &'a DecodeLimits,
    failed: impl Fn(Failure) -> ImageError,
) -> Result<Opened<'a>, ImageError> {
    let DecodeLimits { stop, formats, .. } = limits;
    let source = || Source { bytes: Cursor::new(bytes), stop };
    let opened = match format {
        ImageFormat::Jpeg => {
            let jpeg = Jpeg::new(bytes).map_err(|refused| match refused {
                Refused::Unsupported(kind) => ImageError::Unsupported(kind, *formats),
                Refused::Damaged(failure) => failed(failure),
            });
            boxed(jpeg?, Jpeg::inner)
        }
        ImageFormat::Png => boxed(Png::new(source(), bytes).map_err(failed)?, Png::inner),
        ImageFormat::Gif => boxed(Gif::new(source()).map_err(failed)?, Gif::inner),
        ImageFormat::WebP => boxed(WebP::new(bytes, stop).map_err(failed)?, WebP::inner),
        ImageFormat::Tiff => boxed(Tiff::new(bytes, stop).map_err(failed)?, Tiff::inner),
        _ => {
            let mut reader = ImageReader::with_format(source(), format);
            reader.limits(at_most(memory::METADATA));
            let decoder = reader.into_decoder().map_err(failed)?;
            boxed(decoder, |decoder| Inner::rows(decoder.dimensions(), 16))
        }
    };
    Ok(opened)
}

/// What a decoder says of a damaged file.
pub(super) fn corrupt(
    format: ImageFormat,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Failure {
    Failure::Decoding(DecodingError::new(ImageFormatHint::Exact(format), source))
}

fn boxed<'a, D: ImageDecoder + 'a>(decoder: D, inner: impl Fn(&D) -> Inner) -> Opened<'a> {
    let inner = inner(&decoder);
    (Box::new(decoder), inner)
}

/// What decoding a picture takes.
struct Plan {
    pixels: usize,
    /// Bytes of the buffer that takes the decoder's output, and then is made RGB.
    output: usize,
    /// Bytes that the decoder takes besides.
    inner: u64,
    /// Bytes to reserve: what it takes in all, at the worst moment, of the worst of such files.
    claim: u64,
    /// Bytes of what is left, and of what making it the model's input takes.
    rest: u64,
}

impl Plan {
    /// Checks the sizes that the header announces.
    fn new(
        (width, height): (u32, u32),
        bytes_per_pixel: u64,
        inner: Inner,
        limits: &DecodeLimits,
        orientation: Orientation,
    ) -> Result<Self, ImageError> {
        for (width, height) in [(width, height), inner.frame] {
            if Inner::pixels((width, height)) > limits.pixels {
                return Err(ImageError::TooLarge { width, height, limit: limits.pixels });
            }
        }
        let pixels = Inner::pixels((width, height));
        let output = pixels * bytes_per_pixel.max(3);
        let turning = match orientation {
            Orientation::AsStored => 0,
            Orientation::Exif => pixels * 3,
        };
        let rest = pixels * 3 + resize::between(height);
        let peak = (output + inner.bytes).max(output + turning).max(rest);
        let limit = limits.bytes;
        let too_much = ImageError::NeedsMemory { width, height, bytes: peak, limit };
        let sizes = (usize::try_from(pixels), usize::try_from(output));
        match sizes {
            (Ok(pixels), Ok(output)) if peak <= limit => {
                Ok(Self { pixels, output, inner: inner.bytes, claim: peak + inner.codes, rest })
            }
            _ => Err(too_much),
        }
    }
}

fn at_most(bytes: u64) -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(bytes);
    limits
}

/// The decoder's picture as RGB, in the buffer that it was decoded to.
fn read(decoder: impl ImageDecoder, plan: &Plan) -> Result<RgbImage, Failure> {
    let ((width, height), color) = (decoder.dimensions(), decoder.color_type());
    let mut data = vec![0; plan.output];
    decoder.read_image(&mut data[..plan.pixels * usize::from(color.bytes_per_pixel())])?;
    to_rgb(&mut data, plan.pixels, color);
    data.truncate(plan.pixels * 3);
    data.shrink_to_fit();
    Ok(RgbImage::from_raw(width, height, data).expect("three bytes a pixel"))
}

fn turned(mut picture: RgbImage, turn: Option<Turn>) -> Rgb {
    if let Some(turn) = turn.filter(|turn| *turn != Turn::NoTransforms) {
        let mut dynamic = DynamicImage::ImageRgb8(picture);
        dynamic.apply_orientation(turn);
        picture = dynamic.into_rgb8();
    }
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    Rgb { width, height, data: picture.into_raw() }
}

/// Bytes, for as long as nobody says stop: decoders read little by little.
pub(super) struct Source<'a, T> {
    pub(super) bytes: Cursor<T>,
    pub(super) stop: &'a Stop,
}

impl<T> Source<'_, T> {
    fn check(&self) -> Result<(), IoError> {
        if self.stop.is_stopped() { Err(IoError::other("interrupted")) } else { Ok(()) }
    }
}

impl<T: AsRef<[u8]>> Read for Source<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, IoError> {
        self.check()?;
        self.bytes.read(buffer)
    }
}

impl<T: AsRef<[u8]>> BufRead for Source<'_, T> {
    fn fill_buf(&mut self) -> Result<&[u8], IoError> {
        self.check()?;
        self.bytes.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.bytes.consume(count);
    }
}

impl<T: AsRef<[u8]>> Seek for Source<'_, T> {
    fn seek(&mut self, to: SeekFrom) -> Result<u64, IoError> {
        self.bytes.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use image::{ExtendedColorType, ImageEncoder};

    use super::{super::formats::FORMATS, *};

    fn png(pixels: &[u8], color: ExtendedColorType) -> Vec<u8> {
        let mut out = Vec::new();
        image::codecs::png::PngEncoder::new(&mut out).write_image(pixels, 2, 1, color).unwrap();
        out
    }

    fn decoded(bytes: &[u8]) -> Vec<u8> {
        decode(bytes, &DecodeLimits::default(), Orientation::AsStored).unwrap().data.clone()
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
        let grey = RgbImage::from_pixel(5, 4, image::Rgb([90, 90, 90]));
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
    fn errors_name_the_formats_that_are_allowed() {
        let tiff = encoded(4, 3, ImageFormat::Tiff);
        // A start of frame of a kind that nobody writes.
        let lossless = b"\xff\xd8\xff\xc3\0\x0b\x08\0\x01\0\x01\x01\x01\x11\0";
        for (formats, named) in [
            ("png", "PNG"),
            ("webp jpeg", "JPEG or WebP"),
            ("jpeg png webp gif bmp", "JPEG, PNG, WebP, GIF or BMP"),
        ] {
            let limits =
                DecodeLimits { formats: formats.parse().unwrap(), ..DecodeLimits::default() };
            let check = |bytes: &[u8], expected: String| {
                let error = decode(bytes, &limits, Orientation::AsStored).unwrap_err().to_string();
                assert_eq!(error, expected);
            };
            check(b"hello", format!("not a picture in a known format ({named})"));
            check(b"%PDF", format!("PDF pictures are not supported, convert to {named}"));
            check(&tiff, format!("TIFF pictures are not allowed here, convert to {named}"));
            if formats.contains("jpeg") {
                let expected = "Lossless JPEG pictures are not supported, convert to";
                check(lossless, format!("{expected} {named}"));
            }
        }
        for none in ["", " ", "bmpp", "png,jpeg"] {
            assert!(none.parse::<Formats>().is_err(), "{none}");
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
        assert!(is_turned(&bytes) && !is_turned(b"GIF89a"));
        // Behind the rows as well.
        let chunk = bytes.windows(4).position(|it| it == b"eXIf").unwrap() - 4;
        let tag: Vec<u8> = bytes.splice(chunk..chunk + 12 + exif.len(), []).collect();
        assert!(!is_turned(&bytes));
        let end = bytes.len() - 12;
        bytes.splice(end..end, tag);
        assert!(is_turned(&bytes));
    }

    #[test]
    fn bad_bytes_are_named() {
        let limits = DecodeLimits { pixels: 1, ..DecodeLimits::default() };
        let check = |bytes: &[u8], limits, expected: &str| {
            let error = decode(bytes, &limits, Orientation::AsStored).unwrap_err().to_string();
            assert_eq!(error, expected);
        };
        let good = png(&[1; 6], ExtendedColorType::Rgb8);
        let unknown = "not a picture in a known format (JPEG, PNG, WebP, GIF, BMP or TIFF)";
        check(b"", DecodeLimits::default(), "this is an empty file, not a picture");
        check(b"hello", DecodeLimits::default(), unknown);
        check(&good, limits, "the picture is 2x1, more than the limit of 1 pixels");
        let corrupt = "the PNG picture is corrupt or truncated";
        for cut in [9, 20, 40] {
            check(&good[..cut], DecodeLimits::default(), corrupt);
        }
    }

    #[test]
    fn a_decoder_that_panics_has_met_a_corrupt_picture() {
        let found = guarded::<()>("PNG", ImageFormat::Png, || panic!("odd"));
        let error = found.unwrap_err();
        assert_eq!(error.to_string(), "the PNG picture is corrupt or truncated");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("odd"), "{source}");
    }

    /// The `png` crate panics at such a palette.
    #[test]
    fn a_palette_that_ends_within_a_colour_is_damage() {
        let chunk = |kind: &[u8], data: &[u8]| {
            let body = [kind, data].concat();
            let length = u32::try_from(data.len()).unwrap().to_be_bytes();
            [&length, &*body, &crc32fast::hash(&body).to_be_bytes()].concat()
        };
        let file = |color: u8, palette: usize| {
            let header = [0, 0, 0, 1, 0, 0, 0, 1, 8, color, 0, 0, 0];
            let mut rows = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut rows, &[0, 0, 0, 0]).unwrap();
            let parts = [
                b"\x89PNG\r\n\x1a\n".to_vec(),
                chunk(b"IHDR", &header),
                chunk(b"PLTE", &vec![7; palette]),
                chunk(b"IDAT", &rows.finish().unwrap()),
                chunk(b"IEND", b""),
            ];
            decode(&parts.concat(), &DecodeLimits::default(), Orientation::AsStored)
        };
        for palette in [1, 2, 4, 100, 770] {
            let found = file(3, palette);
            assert!(matches!(found, Err(ImageError::Corrupt { .. })), "{palette}: {found:?}");
        }
        assert_eq!(file(3, 6).unwrap().data, [7; 3]);
        // Of colours it is only a suggestion.
        assert_eq!(file(2, 4).unwrap().data, [0; 3]);
    }

    #[test]
    fn a_picture_without_pixels_is_none() {
        let whole = png(&[1; 6], ExtendedColorType::Rgb8);
        for side in [16, 20] {
            let mut png = whole.clone();
            png[side..side + 4].fill(0);
            let sum = crc32fast::hash(&png[12..29]);
            png[29..33].copy_from_slice(&sum.to_be_bytes());
            let error = decode(&png, &DecodeLimits::default(), Orientation::AsStored);
            assert!(matches!(error, Err(ImageError::Corrupt { .. })), "{error:?}");
        }
        // A frame is something on a screen that is nothing.
        let mut gif = encoded(4, 3, ImageFormat::Gif);
        gif[6..10].fill(0);
        assert_eq!(decoded(&gif).len(), 4 * 3 * 3);
    }

    fn encoded(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        RgbImage::new(width, height).write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn what_would_take_too_much_is_refused_by_its_header() {
        let budget = Budget::new(1);
        let check = |bytes: &[u8], pixels, most, expected: &str| {
            let budget = Some(budget.clone());
            let limits = DecodeLimits { pixels, bytes: most, budget, ..DecodeLimits::default() };
            let error = decode(bytes, &limits, Orientation::AsStored).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        let png = encoded(400, 300, ImageFormat::Png);
        check(&png, 120_000, 360_000, "the picture is 400x300 and needs ");
        // A frame may be larger than the screen.
        let mut gif = encoded(400, 300, ImageFormat::Gif);
        gif[6..10].copy_from_slice(&[10, 0, 10, 0]);
        check(&gif, 119_999, 1 << 30, "the picture is 400x300, more than the limit");
        let chunk = |name: &[u8], data: &[u8]| {
            [name, &u32::try_from(data.len()).unwrap().to_le_bytes(), data].concat()
        };
        let picture = chunk(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f");
        let canvas = chunk(b"VP8X", b"\x02\0\0\0\xff\xff\xff\xff\xff\xff");
        let frame = chunk(b"ANMF", &[[0; 16].as_slice(), &picture].concat());
        for (chunks, size) in
            [(picture, "16383x16383"), ([canvas, frame].concat(), "16777216x16777216")]
        {
            let webp = chunk(b"RIFF", &[b"WEBP", chunks.as_slice()].concat());
            let expected = format!("the picture is {size}, more than the limit");
            check(&webp, 100_000_000, 1 << 30, &expected);
        }
        assert_eq!(budget.peak(), 0);
    }

    #[test]
    fn memory_is_held_as_long_as_the_picture_and_waits_end() {
        let budget = Budget::new(1 << 20);
        let png = encoded(1000, 300, ImageFormat::Png);
        let mut limits = DecodeLimits { budget: Some(budget.clone()), ..DecodeLimits::default() };
        let first = decode(&png, &limits, Orientation::AsStored).unwrap();
        // The pixels, and the rows between two passes of a resize.
        assert_eq!(budget.used(), 3 * 1000 * 300 + 3 * 1024 * 300);
        assert!(budget.peak() > budget.used());
        limits.deadline = Some(Instant::now());
        let late = decode(&png, &limits, Orientation::AsStored).unwrap_err();
        assert!(matches!(late, ImageError::NoRoom(NoRoom::Late)), "{late}");
        limits.stop.stop();
        let stopped = decode(&png, &limits, Orientation::AsStored).unwrap_err();
        assert!(matches!(stopped, ImageError::NoRoom(NoRoom::Stopped)), "{stopped}");
        drop(first);
        assert_eq!(budget.used(), 0);
    }
}
