//! PNG, of which as much is read as Pillow reads: all rows have to be there, but neither what follows
//! them nor the checksums of the chunks that hold them.

use std::io::{BufRead, ErrorKind, Seek};

use image::{ColorType, ImageDecoder, ImageFormat, ImageResult};
use png::{BitDepth, DecodeOptions, Decoder, InterlaceInfo, Reader, Transformations};

use super::{
    decode::corrupt,
    memory::{self, Inner},
};

/// A PNG file whose header has been read.
pub(super) struct Png<R: BufRead + Seek> {
    reader: Reader<R>,
    color: ColorType,
    /// Bytes that texts and the colour profile took.
    metadata: u64,
    /// The EXIF that stands behind the rows.
    exif: Option<Vec<u8>>,
}

impl<R: BufRead + Seek> Png<R> {
    /// Reads a file up to its first row.
    pub(super) fn new(source: R, file: &[u8]) -> ImageResult<Self> {
        let (metadata, exif) = read_chunks(file)
            .ok_or_else(|| corrupt(ImageFormat::Png, "a checksum or palette of the header"))?;
        let mut options = DecodeOptions::default();
        options.set_ignore_crc(true);
        options.set_ignore_adler32(false);
        let mut decoder = Decoder::new_with_options(source, options);
        let bytes = usize::try_from(memory::METADATA).unwrap_or(usize::MAX);
        decoder.set_limits(png::Limits { bytes });
        let header =
            decoder.read_header_info().map_err(|error| corrupt(ImageFormat::Png, error))?;
        let is_deep_grey =
            header.color_type == png::ColorType::Grayscale && header.bit_depth == BitDepth::Sixteen;
        // A colour that is transparent would else make it grey with alpha, which is something else.
        let how = if is_deep_grey {
            Transformations::IDENTITY
        } else {
            Transformations::normalize_to_color8()
        };
        decoder.set_transformations(how);
        let reader = decoder.read_info().map_err(|error| corrupt(ImageFormat::Png, error))?;
        let color = match reader.output_color_type() {
            (png::ColorType::Grayscale, BitDepth::Sixteen) => ColorType::L16,
            (png::ColorType::Grayscale, _) => ColorType::L8,
            (png::ColorType::GrayscaleAlpha, _) => ColorType::La8,
            (png::ColorType::Rgb, _) => ColorType::Rgb8,
            (png::ColorType::Rgba, _) => ColorType::Rgba8,
            (png::ColorType::Indexed, _) => return Err(corrupt(ImageFormat::Png, "no palette")),
        };
        Ok(Self { reader, color, metadata, exif: exif.map(<[u8]>::to_vec) })
    }

    /// What decoding takes: some rows of 16-bit RGBA, before and after they are unfiltered.
    pub(super) fn inner(&self) -> Inner {
        Inner::rows(self.dimensions(), 64).and(self.metadata)
    }

    fn read(&mut self, pixels: &mut [u8]) -> Result<(), png::DecodingError> {
        let (width, height) = self.dimensions();
        let stride = width as usize * usize::from(self.color.bytes_per_pixel());
        let bits = u8::try_from(self.color.bits_per_pixel()).unwrap_or(u8::MAX);
        let rows = rows((width, height), self.reader.info().interlaced);
        let mut read = 0;
        loop {
            match self.reader.next_interlaced_row() {
                Ok(Some(row)) => {
                    match row.interlace() {
                        InterlaceInfo::Adam7(pass) => {
                            png::expand_interlaced_row(pixels, stride, row.data(), pass, bits);
                        }
                        InterlaceInfo::Null(_) => {
                            pixels[read * stride..][..stride].copy_from_slice(row.data());
                        }
                    }
                    read += 1;
                }
                Ok(None) => return Ok(()),
                // All that is missing comes after the rows.
                Err(png::DecodingError::IoError(error))
                    if read == rows && error.kind() == ErrorKind::UnexpectedEof =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl<R: BufRead + Seek> ImageDecoder for Png<R> {
    fn dimensions(&self) -> (u32, u32) {
        self.reader.info().size()
    }

    fn color_type(&self) -> ColorType {
        self.color
    }

    fn exif_metadata(&mut self) -> ImageResult<Option<Vec<u8>>> {
        let before = self.reader.info().exif_metadata.as_ref();
        Ok(before.map(|exif| exif.to_vec()).or_else(|| self.exif.take()))
    }

    fn read_image(mut self, pixels: &mut [u8]) -> ImageResult<()> {
        self.read(pixels).map_err(|error| corrupt(ImageFormat::Png, error))?;
        if self.color == ColorType::L16 {
            for value in pixels.as_chunks_mut().0 {
                *value = u16::from_be_bytes(*value).to_ne_bytes();
            }
        }
        Ok(())
    }

    fn read_image_boxed(self: Box<Self>, pixels: &mut [u8]) -> ImageResult<()> {
        (*self).read_image(pixels)
    }
}

/// Rows that a picture is stored in: of one, or of seven that are interlaced.
fn rows((width, height): (u32, u32), is_interlaced: bool) -> usize {
    const PASSES: [[u32; 4]; 7] = [
        [0, 0, 8, 8],
        [4, 0, 8, 8],
        [0, 4, 4, 8],
        [2, 0, 4, 4],
        [0, 2, 2, 4],
        [1, 0, 2, 2],
        [0, 1, 1, 2],
    ];
    if !is_interlaced {
        return height as usize;
    }
    let rows = |[left, top, across, down]: [u32; 4]| {
        let columns = width.saturating_sub(left).div_ceil(across);
        if columns == 0 { 0 } else { height.saturating_sub(top).div_ceil(down) as usize }
    };
    PASSES.into_iter().map(rows).sum()
}

/// Bytes that texts and the unpacked colour profile may take, and the EXIF behind the rows; none if a
/// checksum before the first row is wrong, or a palette that is looked up ends within a colour, at
/// which the decoder panics.
fn read_chunks(file: &[u8]) -> Option<(u64, Option<&[u8]>)> {
    // Deflate makes at most 1032 bytes of one; a vector that grows has up to twice its content.
    const UNPACKED: u64 = 1032;
    let (mut at, mut bytes, mut is_header, mut exif) = (8, 0_u64, true, None);
    // The header's chunk is the first; after width, height and depth it has the kind of colour.
    let is_indexed = file.get(8 + 8 + 9) == Some(&3);
    let number = |at: usize| Some(u32::from_be_bytes(*file.get(at..)?.first_chunk()?));
    while let (Some(length), Some(kind)) = (number(at), file.get(at + 4..at + 8)) {
        let is_rows = matches!(kind, b"IDAT" | b"fdAT");
        is_header &= !is_rows;
        let end = at.saturating_add(8).saturating_add(length as usize);
        if is_header && let (Some(chunk), Some(sum)) = (file.get(at + 4..end), number(end)) {
            (crc32fast::hash(chunk) == sum).then_some(())?;
        }
        let is_cut = kind == b"PLTE" && is_indexed && !length.is_multiple_of(3);
        (!is_cut).then_some(())?;
        bytes += u64::from(length)
            * match kind {
                _ if is_rows => 0,
                b"iCCP" => UNPACKED,
                _ => 2,
            };
        if kind == b"eXIf" && !is_header && u64::from(length) <= memory::METADATA {
            exif = file.get(at + 8..end);
        }
        at = end.saturating_add(4);
    }
    Some((bytes.min(memory::METADATA), exif))
}
