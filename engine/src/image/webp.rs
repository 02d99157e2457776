//! The first picture of a WebP file, without its transparency: what Pillow makes of it in RGB.
//!
//! The chunk that holds the picture is decoded as a file of its own. So the colours of an animation's
//! first frame are not mixed with what lies behind it, and a channel of transparency costs nothing.

use std::{
    io::{BufRead, Cursor, Seek},
    iter,
};

use image::{ColorType, ImageDecoder, ImageFormat, ImageResult, Limits, codecs::webp::WebPDecoder};

use super::{
    decode::{Source, corrupt},
    memory::Inner,
};
use crate::Stop;

/// Most bytes of tables that one byte of a lossless WebP can ask for: there may be 65,536 groups of
/// prefix codes, whatever the picture's size, and half a bit adds a symbol, whose two nodes take 32
/// bytes.
const CODES: u64 = 550;

/// What a file says of its first picture.
#[derive(Default)]
struct Found<'a> {
    /// A chunk with its name and length.
    picture: &'a [u8],
    /// Where the picture lies on its canvas.
    corner: (u32, u32),
    canvas: Option<(u32, u32)>,
    is_animated: bool,
    exif: Option<&'a [u8]>,
}

/// A part of a file, as far as it is there.
struct Chunk<'a> {
    name: [u8; 4],
    content: &'a [u8],
    /// With its name and length.
    whole: &'a [u8],
}

fn chunks(mut rest: &[u8]) -> impl Iterator<Item = Chunk<'_>> {
    iter::from_fn(move || {
        let (head, tail) = rest.split_first_chunk::<8>()?;
        let [a, b, c, d, length @ ..] = *head;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        let content = &tail[..length.min(tail.len())];
        let whole = &rest[..head.len() + content.len()];
        rest = tail.get(length.saturating_add(length & 1)..).unwrap_or_default();
        Some(Chunk { name: [a, b, c, d], content, whole })
    })
}

impl<'a> Found<'a> {
    /// Of an animation, the first frame with a picture counts.
    fn read(file: &'a [u8]) -> Self {
        let mut found = Self::default();
        for Chunk { name, content, whole } in chunks(file) {
            match &name {
                b"VP8X" => {
                    let side = |at| Some(u24(content, at)? + 1);
                    found.canvas = side(4).zip(side(7));
                }
                b"VP8 " | b"VP8L" if found.picture.is_empty() => found.picture = whole,
                b"ANMF" if found.picture.is_empty() => {
                    found.is_animated = true;
                    let place = |at| u24(content, at).map(|half| half * 2);
                    found.corner = place(0).zip(place(3)).unwrap_or_default();
                    let parts = content.get(16..).unwrap_or_default();
                    let picture = chunks(parts).find(|it| matches!(&it.name, b"VP8 " | b"VP8L"));
                    found.picture = picture.map_or_else(Default::default, |it| it.whole);
                }
                b"EXIF" => found.exif = Some(content.strip_prefix(b"Exif\0\0").unwrap_or(content)),
                _ => {}
            }
        }
        found
    }
}

fn u24(bytes: &[u8], at: usize) -> Option<u32> {
    let [a, b, c] = *bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes([a, b, c, 0]))
}

/// A WebP file whose header has been read.
pub(super) struct WebP<'a, R: BufRead + Seek> {
    decoder: WebPDecoder<R>,
    canvas: (u32, u32),
    corner: (u32, u32),
    /// Bytes of the chunk that is decoded.
    length: u64,
    is_lossless: bool,
    exif: Option<&'a [u8]>,
}

impl<'a> WebP<'a, Source<'a, Vec<u8>>> {
    pub(super) fn new(file: &'a [u8], stop: &'a Stop) -> ImageResult<Self> {
        let length = file.get(4..8).and_then(|bytes| bytes.first_chunk());
        let length = length.map_or(usize::MAX, |length| u32::from_le_bytes(*length) as usize);
        let chunks = file
            .get(12..length.saturating_add(8))
            .ok_or_else(|| corrupt(ImageFormat::WebP, "cut off"))?;
        let found = Found::read(chunks);
        let picture = found.picture;
        let still = [b"RIFF", &length32(picture.len() + 4), b"WEBP", picture].concat();
        let decoder = WebPDecoder::new(Source { bytes: Cursor::new(still), stop })?;
        let (width, height) = decoder.dimensions();
        let (left, top) = found.corner;
        let canvas = found.canvas.unwrap_or((width, height));
        let fits = left + width <= canvas.0 && top + height <= canvas.1;
        if !fits || !(found.is_animated || canvas == (width, height)) {
            return Err(corrupt(ImageFormat::WebP, "the picture does not fit its canvas"));
        }
        Ok(Self {
            decoder,
            canvas,
            corner: found.corner,
            length: picture.len() as u64,
            is_lossless: picture.starts_with(b"VP8L"),
            exif: found.exif,
        })
    }
}

fn length32(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
}

impl<R: BufRead + Seek> WebP<'_, R> {
    fn is_part(&self) -> bool {
        self.decoder.dimensions() != self.canvas
    }

    /// What decoding takes besides the picture.
    pub(super) fn inner(&self) -> Inner {
        let frame = self.decoder.dimensions();
        let size = Inner::pixels(frame);
        let mut bytes = self.length;
        if self.is_lossless {
            // What transforms and codes have for blocks of 4x4, and RGBA, where it is not the output.
            bytes += size * if self.color_type() == ColorType::Rgba8 { 1 } else { 5 };
        } else {
            // Brightness and colours of whole blocks of 16x16.
            let blocks = |side: u32| u64::from(side.div_ceil(16));
            bytes += blocks(frame.0) * blocks(frame.1) * 384;
        }
        if self.is_part() {
            bytes += size * u64::from(self.color_type().bytes_per_pixel());
        }
        let codes = if self.is_lossless { self.length.saturating_mul(CODES) } else { 0 };
        Inner { frame, codes, ..Inner::rows(self.canvas, 64).and(bytes) }
    }
}

impl<R: BufRead + Seek> ImageDecoder for WebP<'_, R> {
    fn dimensions(&self) -> (u32, u32) {
        self.canvas
    }

    fn color_type(&self) -> ColorType {
        self.decoder.color_type()
    }

    fn exif_metadata(&mut self) -> ImageResult<Option<Vec<u8>>> {
        Ok(self.exif.map(<[u8]>::to_vec))
    }

    fn set_limits(&mut self, limits: Limits) -> ImageResult<()> {
        self.decoder.set_limits(limits)
    }

    fn read_image(self, pixels: &mut [u8]) -> ImageResult<()> {
        if !self.is_part() {
            return self.decoder.read_image(pixels);
        }
        let bytes_per_pixel = usize::from(self.color_type().bytes_per_pixel());
        let row_bytes = |width: u32| width as usize * bytes_per_pixel;
        let (width, height) = self.decoder.dimensions();
        let mut frame = vec![0; row_bytes(width) * height as usize];
        self.decoder.read_image(&mut frame)?;
        let rows = pixels.chunks_exact_mut(row_bytes(self.canvas.0)).skip(self.corner.1 as usize);
        let start = row_bytes(self.corner.0);
        for (row, part) in rows.zip(frame.chunks_exact(row_bytes(width))) {
            row[start..][..part.len()].copy_from_slice(part);
        }
        Ok(())
    }

    fn read_image_boxed(self: Box<Self>, pixels: &mut [u8]) -> ImageResult<()> {
        (*self).read_image(pixels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_in_frames_are_no_pictures() {
        let frame = [&b"ANMF\xff\xff\xff\xff"[..], &[0; 16]].concat();
        let body = frame.repeat(1_000_000);
        let file = [b"RIFF", &length32(body.len() + 4), b"WEBP", &body[..]].concat();
        assert!(WebP::new(&file, &Stop::default()).is_err());
    }
}
