//! What a decoder takes of memory besides the picture that it gives, as the file's header tells.
//!
//! The decoders' own limits leave most of it out. What is said here is held against what they really
//! take by `engine/tests/memory.rs`. A file whose header cannot be followed gets the worst case: its
//! decoder may be more forgiving.

use image::ImageFormat;

use super::jpeg::Jpeg;

/// What is known of a picture before it is decoded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) format: ImageFormat,
    pub(super) width: u32,
    pub(super) height: u32,
    /// Of the decoder's output.
    pub(super) bytes_per_pixel: u64,
}

/// What a decoder makes on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inner {
    /// Width and height of the largest picture in the file that is decoded: a frame need not have
    /// the size of the whole.
    pub(super) frame: (u32, u32),
    /// Bytes that the decoder takes besides its output.
    pub(super) bytes: u64,
    /// Bytes that it takes besides if the file was made to that end; usually nearly none of them.
    pub(super) codes: u64,
}

/// Tables, windows and buffers of any decoder.
const TABLES: u64 = 1 << 20;

/// Most bytes of colour profiles and texts, which are read with the header.
pub(super) const METADATA: u64 = 16 << 20;

fn pixels((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

/// What decoding takes besides its output.
pub(super) fn inner(header: Header, file: &[u8]) -> Inner {
    let whole = (header.width, header.height);
    let (size, length) = (pixels(whole), file.len() as u64);
    let rows = |count: u64| TABLES + u64::from(header.width) * count;
    let plain = |bytes| Inner { frame: whole, bytes, codes: 0 };
    match header.format {
        // Some rows of 16-bit RGBA, before and after they are unfiltered.
        ImageFormat::Png => plain(rows(64) + png_metadata(file)),
        // A copy of the file, and some rows of at most four components at several stages. Whoever
        // has this header has read the file's.
        ImageFormat::Jpeg => {
            let coefficients = Jpeg::new(file).map_or(0, |jpeg| jpeg.coefficients());
            plain(rows(192) + length + coefficients)
        }
        ImageFormat::Bmp => plain(rows(16)),
        // It reads a strip of another decoder into a buffer, and copies that to its output. CMYK
        // takes a third more.
        ImageFormat::Tiff => plain(rows(64) + length + size * header.bytes_per_pixel * 3),
        ImageFormat::Gif => gif(whole, file, rows(16)),
        _ => webp(header, file, rows(64)),
    }
}

fn u16_le(file: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?))
}

fn u24_le(file: &[u8], at: usize) -> Option<u32> {
    let [a, b, c] = *file.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes([a, b, c, 0]))
}

fn u32_be(file: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*file.get(at..)?.first_chunk()?))
}

/// Texts and an unpacked colour profile.
fn png_metadata(file: &[u8]) -> u64 {
    // Deflate makes at most 1032 bytes of one; a vector that grows has up to twice its content.
    const UNPACKED: u64 = 1032;
    let (mut at, mut bytes) = (8, 0_u64);
    while let (Some(length), Some(kind)) = (u32_be(file, at), file.get(at + 4..at + 8)) {
        bytes += u64::from(length)
            * match kind {
                b"IDAT" | b"fdAT" => 0,
                b"iCCP" => UNPACKED,
                _ => 2,
            };
        at = at.saturating_add(length as usize).saturating_add(12);
    }
    bytes.min(METADATA)
}

/// The first frame, as palette entries; one that does not fill the screen's width is decoded apart.
fn gif(whole: (u32, u32), file: &[u8], rows: u64) -> Inner {
    let (corner, frame) = gif_frame(file).unwrap_or(((0, 0), whole));
    let (left, top) = corner;
    let fits = left == 0 && frame.0 == whole.0 && top + frame.1 <= whole.1;
    Inner { frame, bytes: rows + pixels(frame) * if fits { 1 } else { 5 }, codes: 0 }
}

/// Where the first frame lies, and how large it is.
fn gif_frame(file: &[u8]) -> Option<((u32, u32), (u32, u32))> {
    let flags = *file.get(10)?;
    let palette = if flags & 0x80 == 0 { 0 } else { 3 * (2 << (flags & 7)) };
    let mut at = 13 + palette;
    loop {
        match *file.get(at)? {
            0x2c => break,
            // An extension: a label, and blocks up to an empty one.
            0x21 => {
                at += 2;
                while let length @ 1.. = *file.get(at)? {
                    at += 1 + usize::from(length);
                }
                at += 1;
            }
            _ => return None,
        }
    }
    let number = |i: usize| u16_le(file, at + 1 + 2 * i).map(u32::from);
    Some(((number(0)?, number(1)?), (number(2)?, number(3)?)))
}

/// Most bytes of tables that one byte of a lossless WebP can ask for: there may be 65,536 groups of
/// prefix codes, whatever the picture's size, and half a bit adds a symbol, whose two nodes take 32
/// bytes.
const WEBP_CODES: u64 = 550;

/// What a WebP file has, in its first frame or as a whole.
#[derive(Debug, Clone, Copy, Default)]
struct WebP {
    is_animated: bool,
    has_lossy: bool,
    /// Bytes of lossless data, of the alpha channel too.
    lossless: u64,
    has_alpha_chunk: bool,
    /// The largest of the frames that its chunks announce.
    frame: (u32, u32),
}

impl WebP {
    fn announce(&mut self, frame: (u32, u32)) {
        if pixels(frame) > pixels(self.frame) {
            self.frame = frame;
        }
    }

    /// Reads chunks; of those of an animation, the first frame's.
    fn chunks(&mut self, mut rest: &[u8]) {
        while let Some((head, tail)) = rest.split_first_chunk::<8>() {
            let [a, b, c, d, length @ ..] = *head;
            let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
            let chunk = &tail[..length.min(tail.len())];
            match &[a, b, c, d] {
                b"VP8 " => {
                    self.has_lossy = true;
                    let side = |at| u16_le(chunk, at).map_or(0, |side| u32::from(side & 0x3fff));
                    self.announce((side(6), side(8)));
                }
                b"VP8L" => self.lossless += chunk.len() as u64,
                b"ALPH" => {
                    self.has_alpha_chunk = true;
                    self.lossless += chunk.len() as u64;
                }
                b"ANMF" if !self.is_animated => {
                    self.is_animated = true;
                    let side = |at| u24_le(chunk, at).map_or(0, |side| side + 1);
                    self.announce((side(6), side(9)));
                    self.chunks(chunk.get(16..).unwrap_or_default());
                }
                _ => {}
            }
            rest = tail.get(length.saturating_add(length & 1)..).unwrap_or_default();
        }
    }
}

fn webp(header: Header, file: &[u8], rows: u64) -> Inner {
    let whole = (header.width, header.height);
    let mut found = WebP { frame: whole, ..WebP::default() };
    found.chunks(file.get(12..).unwrap_or_default());
    let (whole, size) = (pixels(whole), pixels(found.frame));
    let mut bytes = rows + file.len() as u64;
    if found.lossless > 0 {
        // What transforms and codes have for blocks of 4x4, and RGBA, where it is not the output.
        let is_output = header.bytes_per_pixel == 4 && !found.has_alpha_chunk;
        bytes += size * if is_output || found.is_animated { 1 } else { 5 };
    }
    if found.has_lossy {
        // Brightness and colours of whole blocks of 16x16.
        let blocks = |side: u32| u64::from(side.div_ceil(16));
        bytes += blocks(found.frame.0) * blocks(found.frame.1) * 384;
    }
    if found.has_alpha_chunk {
        bytes += size;
    }
    if found.is_animated {
        // The frame, and the canvas that it is put on.
        bytes += (size + whole) * 4;
    }
    Inner { frame: found.frame, bytes, codes: found.lossless.saturating_mul(WEBP_CODES) }
}
