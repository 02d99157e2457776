//! TIFF as Pillow reads it: turned as its tag says, the bits of its bytes in the order that it tells,
//! a fourth sample of no meaning left out, CMYK and colours that are stored times their alpha in
//! Pillow's arithmetic. What would come out otherwise is refused.

use std::{
    borrow::Cow,
    io::{BufRead, Cursor, Seek},
    ops::Range,
};

use image::{
    ColorType, ExtendedColorType, ImageDecoder, ImageError, ImageFormat, ImageResult, Limits,
    codecs::tiff::TiffDecoder,
    error::{UnsupportedError, UnsupportedErrorKind},
    metadata::Orientation,
};
use tiff::{
    TiffResult,
    decoder::{Decoder, DecodingResult},
    tags::Tag,
};

use super::{
    decode::{Source, corrupt},
    memory::Inner,
};
use crate::Stop;

/// What becomes of samples beside what `image` makes of them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Samples {
    AsStored,
    Cmyk,
    /// Colours times their alpha.
    Associated,
}

/// A TIFF file whose tags have been read.
pub(super) struct Tiff<'a> {
    file: Cow<'a, [u8]>,
    stop: &'a Stop,
    size: (u32, u32),
    color: ColorType,
    turn: Orientation,
    samples: Samples,
    /// Grey of 16 bits whose white is zero.
    is_negative: bool,
    /// Where bytes are whose first bit is the lowest.
    reversed: Vec<Range<usize>>,
    limits: Limits,
}

impl<'a> Tiff<'a> {
    pub(super) fn new(file: &'a [u8], stop: &'a Stop) -> ImageResult<Self> {
        let tags = Tags::read(Source { bytes: Cursor::new(file), stop })
            .map_err(|error| corrupt(ImageFormat::Tiff, error))?;
        let mut file = Cow::from(file);
        if tags.beside == Beside::UnspecifiedFourth {
            say_alpha(&mut file);
        }
        let decoder = TiffDecoder::new(Source { bytes: Cursor::new(&*file), stop })?;
        let color = decoder.color_type();
        let samples = match (decoder.original_color_type(), color) {
            (ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16, _) => Samples::Cmyk,
            (_, ColorType::Rgba8 | ColorType::Rgba16) if tags.beside == Beside::Associated => {
                Samples::Associated
            }
            _ => Samples::AsStored,
        };
        tags.refuse_others(color, samples)?;
        let size = decoder.dimensions();
        Ok(Self {
            file,
            stop,
            size,
            color,
            turn: tags.turn,
            samples,
            is_negative: tags.is_negative && color == ColorType::L16,
            reversed: tags.reversed,
            limits: Limits::no_limits(),
        })
    }

    /// What decoding takes: a strip of another decoder is read into a buffer, and that is copied to
    /// the output. CMYK takes a third more.
    pub(super) fn inner(&self) -> Inner {
        let output = Inner::pixels(self.size) * u64::from(self.color.bytes_per_pixel());
        let copies = [!self.reversed.is_empty(), matches!(self.file, Cow::Owned(_))];
        let copies = copies.into_iter().map(u64::from).sum::<u64>() + 1;
        Inner::rows(self.size, 64).and(self.file.len() as u64 * copies + output * 3)
    }

    /// The file with the first bit of each byte the highest.
    fn in_order(&self) -> Cow<'_, [u8]> {
        let mut file = Cow::from(&*self.file);
        for range in &self.reversed {
            let end = range.end.min(self.file.len());
            if let Some(bytes) = file.to_mut().get_mut(range.start..end) {
                for byte in bytes {
                    *byte = byte.reverse_bits();
                }
            }
        }
        file
    }

    fn read_cmyk(&self, source: impl BufRead + Seek, pixels: &mut [u8]) -> ImageResult<()> {
        let most =
            self.limits.max_alloc.map_or(usize::MAX, |most| most.try_into().unwrap_or(usize::MAX));
        let mut limits = tiff::decoder::Limits::default();
        limits.decoding_buffer_size = most;
        limits.intermediate_buffer_size = most;
        limits.ifd_value_size = most;
        let decoded = Decoder::new(source).and_then(|tiff| tiff.with_limits(limits).read_image());
        let bytes = match decoded.map_err(|error| corrupt(ImageFormat::Tiff, error))? {
            DecodingResult::U8(bytes) => bytes,
            // Of 16 bits the upper, as Pillow has it.
            DecodingResult::U16(words) => words.iter().map(|word| word.to_be_bytes()[0]).collect(),
            _ => return Err(unsupported("CMYK of other samples")),
        };
        let wide = usize::from(self.color.bytes_per_pixel()) / 3;
        let (found, _) = bytes.as_chunks::<4>();
        let wanted = pixels.chunks_exact_mut(3 * wide);
        if found.len() != wanted.len() {
            return Err(corrupt(ImageFormat::Tiff, "samples that are missing"));
        }
        for (pixel, inks) in wanted.zip(found) {
            for (sample, value) in pixel.chunks_exact_mut(wide).zip(of_inks(*inks)) {
                // Of 16 bits `to_rgb` keeps the upper.
                sample.fill(value);
            }
        }
        Ok(())
    }
}

impl ImageDecoder for Tiff<'_> {
    fn dimensions(&self) -> (u32, u32) {
        self.size
    }

    fn color_type(&self) -> ColorType {
        self.color
    }

    fn orientation(&mut self) -> ImageResult<Orientation> {
        Ok(self.turn)
    }

    fn set_limits(&mut self, limits: Limits) -> ImageResult<()> {
        self.limits = limits;
        Ok(())
    }

    fn read_image(self, pixels: &mut [u8]) -> ImageResult<()> {
        let file = self.in_order();
        let source = Source { bytes: Cursor::new(&*file), stop: self.stop };
        if self.samples == Samples::Cmyk {
            return self.read_cmyk(source, pixels);
        }
        let mut decoder = TiffDecoder::new(source)?;
        decoder.set_limits(self.limits.clone())?;
        decoder.read_image(pixels)?;
        match (self.samples, self.color) {
            (Samples::Associated, ColorType::Rgba8) => {
                for pixel in pixels.as_chunks_mut().0 {
                    *pixel = without_alpha(*pixel);
                }
            }
            (Samples::Associated, _) => {
                for pixel in pixels.as_chunks_mut::<8>().0 {
                    let upper =
                        |at: usize| u16::from_ne_bytes([pixel[at], pixel[at + 1]]).to_be_bytes()[0];
                    let plain = without_alpha([upper(0), upper(2), upper(4), upper(6)]);
                    // Of 16 bits `to_rgb` keeps the upper.
                    *pixel =
                        plain.map(|value| [value; 2]).as_flattened().try_into().expect("eight");
                }
            }
            // Pillow shows grey of 16 bits as it is stored.
            _ if self.is_negative => pixels.iter_mut().for_each(|byte| *byte = !*byte),
            _ => {}
        }
        Ok(())
    }

    fn read_image_boxed(self: Box<Self>, pixels: &mut [u8]) -> ImageResult<()> {
        (*self).read_image(pixels)
    }
}

/// The colours of pixels that are red, green and blue.
const RGB: u16 = 2;

/// What the first sample beside the colours is, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    /// An alpha that the colours are multiplied by.
    Associated,
    /// The only one beside red, green and blue, and said to be nothing.
    UnspecifiedFourth,
    Other,
}

/// What `image` does not ask for.
struct Tags {
    compression: u16,
    predictor: u16,
    is_planar: bool,
    is_tiled: bool,
    /// White is zero.
    is_negative: bool,
    /// Of a pixel.
    count: u16,
    beside: Beside,
    turn: Orientation,
    fill_order: u16,
    bits: u16,
    extra: usize,
    reversed: Vec<Range<usize>>,
}

impl Tags {
    fn read(source: impl BufRead + Seek) -> TiffResult<Self> {
        let mut file = Decoder::new(source)?;
        let is_tiled = file.find_tag(Tag::TileOffsets)?.is_some();
        // All of them are 1 where they are not told.
        let mut one = |tag: Tag| {
            let all: Option<Vec<u16>> = file.find_tag_unsigned_vec(tag)?;
            TiffResult::Ok(all.and_then(|all| all.first().copied()).unwrap_or(1))
        };
        let (compression, predictor) = (one(Tag::Compression)?, one(Tag::Predictor)?);
        let (planes, bits) = (one(Tag::PlanarConfiguration)?, one(Tag::BitsPerSample)?);
        let (fill_order, count) = (one(Tag::FillOrder)?, one(Tag::SamplesPerPixel)?);
        let colours = one(Tag::PhotometricInterpretation)?;
        let is_rgb = colours == RGB;
        // One that cannot be read turns nothing.
        let turn = one(Tag::Orientation).ok().and_then(|turn| u8::try_from(turn).ok());
        let extra: Vec<u16> = file.find_tag_unsigned_vec(Tag::ExtraSamples)?.unwrap_or_default();
        let beside = match *extra {
            [1, ..] => Beside::Associated,
            [0 | 3..] if is_rgb && count == 4 => Beside::UnspecifiedFourth,
            _ => Beside::Other,
        };
        let mut reversed = Vec::new();
        if fill_order == 2 {
            for (starts, lengths) in
                [(Tag::StripOffsets, Tag::StripByteCounts), (Tag::TileOffsets, Tag::TileByteCounts)]
            {
                let mut all = |tag| {
                    TiffResult::Ok(file.find_tag_unsigned_vec::<usize>(tag)?.unwrap_or_default())
                };
                let parts = all(starts)?.into_iter().zip(all(lengths)?);
                reversed.extend(parts.map(|(start, length)| start..start.saturating_add(length)));
            }
        }
        Ok(Self {
            compression,
            predictor,
            is_planar: planes == 2,
            is_tiled,
            is_negative: colours == 0,
            count,
            beside,
            turn: turn.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms),
            fill_order,
            bits,
            extra: extra.len(),
            reversed: apart(reversed),
        })
    }

    /// Refuses what Pillow does not read, or `image` would read otherwise.
    fn refuse_others(&self, color: ColorType, samples: Samples) -> ImageResult<()> {
        const LZW_AND_DEFLATE: [u16; 3] = [5, 8, 32946];
        let is_plain_byte = matches!(color, ColorType::L8 | ColorType::Rgb8)
            && matches!(self.bits, 1 | 8)
            && self.extra == 0
            && samples == Samples::AsStored;
        let used = match samples {
            Samples::Cmyk => 4,
            _ => u16::from(color.channel_count()),
        };
        let refused = [
            (matches!(self.compression, 6 | 7), "JPEG inside"),
            (
                self.predictor != 1 && !LZW_AND_DEFLATE.contains(&self.compression),
                "a predictor without LZW or Deflate",
            ),
            (self.is_planar && samples == Samples::Cmyk, "CMYK in planes"),
            (self.is_planar && self.is_tiled, "tiles in planes"),
            (
                // Their decoder leaves the others out first.
                self.count > used && (self.predictor != 1 || self.is_tiled),
                "so many samples in tiles or with a predictor",
            ),
            (
                self.fill_order != 1 && !(self.fill_order == 2 && is_plain_byte),
                "the lowest bit first in such samples",
            ),
            (matches!(color, ColorType::Rgb32F | ColorType::Rgba32F), "samples of 32 bits"),
        ];
        match refused.iter().find(|(is_so, _)| *is_so) {
            Some((_, what)) => Err(unsupported(what)),
            None => Ok(()),
        }
    }
}

/// Says of the sample beside the colours that it is their alpha, which becomes no part of a picture
/// either: one that means nothing is left out by the decoder before it undoes the predictor.
fn say_alpha(file: &mut Cow<'_, [u8]>) {
    const ALPHA: u16 = 2;
    let is_little = file.starts_with(b"II");
    let value = if is_little { ALPHA.to_le_bytes() } else { ALPHA.to_be_bytes() };
    if let Some(at) = place_of(Tag::ExtraSamples, is_little, file)
        && let Some(place) = file.to_mut().get_mut(at..at + value.len())
    {
        place.copy_from_slice(&value);
    }
}

/// Where the value of a tag of the first picture is, if its entry has room for it.
fn place_of(tag: Tag, is_little: bool, file: &[u8]) -> Option<usize> {
    let number = |at: usize, bytes: usize| {
        let bytes = file.get(at..)?.get(..bytes)?;
        let add = |number: usize, byte: &u8| number << 8 | usize::from(*byte);
        Some(if is_little { bytes.iter().rfold(0, add) } else { bytes.iter().fold(0, add) })
    };
    // Of addresses and counts of values, and of the count of entries.
    let (wide, counter) = if number(2, 2)? == 43 { (8, 8) } else { (4, 2) };
    let entries = number(wide, wide)?.checked_add(counter)?;
    let mut places = (0..).map_while(|i: usize| entries.checked_add(i.checked_mul(4 + 2 * wide)?));
    let entry =
        places.find(|entry| number(*entry, 2).is_none_or(|it| it == usize::from(tag.to_u16())))?;
    Some(entry + 4 + wide)
}

/// Ranges that do not overlap, of the same bytes: a file may name one byte ever so often.
fn apart(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut apart: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match apart.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => apart.push(range),
        }
    }
    apart
}

fn unsupported(what: &str) -> ImageError {
    let kind = UnsupportedErrorKind::GenericFeature(what.to_owned());
    ImageError::Unsupported(UnsupportedError::from_format_and_kind(ImageFormat::Tiff.into(), kind))
}

/// Cyan, magenta, yellow and black as Pillow's `convert` has them in RGB.
fn of_inks([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let light = 255 - u16::from(k);
    [c, m, y].map(|ink| {
        let product = u32::from(ink) * u32::from(light) + 128;
        let ink = ((product >> 8) + product) >> 8;
        u8::try_from(u32::from(light).saturating_sub(ink)).unwrap_or(u8::MAX)
    })
}

/// A colour that was stored times its alpha, as Pillow divides it.
fn without_alpha([r, g, b, alpha]: [u8; 4]) -> [u8; 4] {
    let plain = |value: u8| match alpha {
        0 => 0,
        _ => u8::try_from(u16::from(value) * 255 / u16::from(alpha)).unwrap_or(u8::MAX),
    };
    [plain(r), plain(g), plain(b), alpha]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_named_often_are_turned_once() {
        let ranges = vec![5..9, 0..2, 7..12, 2..4, 20..usize::MAX, 0..1];
        assert_eq!(apart(ranges), [0..4, 5..12, 20..usize::MAX]);
    }
}
