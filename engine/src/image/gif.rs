//! The first picture of a GIF file, put on its screen as Pillow puts it there.

use std::io::Read;

use gif::{ColorOutput, DecodeOptions, Decoder};
use image::{ColorType, ImageDecoder, ImageFormat, ImageResult};

use super::{decode::corrupt, memory::Inner};

/// A GIF file that has been read up to the first pixel.
pub(super) struct Gif<R: Read> {
    decoder: Decoder<R>,
    left: usize,
    top: usize,
    frame: (u32, u32),
    /// Of the palette, what is shown where the frame is not.
    background: u8,
}

impl<R: Read> Gif<R> {
    pub(super) fn new(source: R) -> ImageResult<Self> {
        let mut options = DecodeOptions::new();
        options.set_color_output(ColorOutput::Indexed);
        options.allow_unknown_blocks(true);
        let mut decoder =
            options.read_info(source).map_err(|error| corrupt(ImageFormat::Gif, error))?;
        let frame = decoder.next_frame_info().map_err(|error| corrupt(ImageFormat::Gif, error))?;
        let frame = frame.ok_or_else(|| corrupt(ImageFormat::Gif, "no picture"))?;
        let (left, top) = (frame.left.into(), frame.top.into());
        let background = frame.transparent.unwrap_or(0);
        let frame = (frame.width.into(), frame.height.into());
        Ok(Self { decoder, left, top, frame, background })
    }

    /// What decoding takes: the frame, as places in the palette.
    pub(super) fn inner(&self) -> Inner {
        let rows = Inner::rows(self.dimensions(), 16);
        Inner { frame: self.frame, ..rows }.and(Inner::pixels(self.frame))
    }

    fn read(&mut self, pixels: &mut [u8]) -> Result<(), gif::DecodingError> {
        let mut indices = vec![0; self.decoder.buffer_size()];
        self.decoder.read_into_buffer(&mut indices)?;
        let palette = self.decoder.palette()?.as_chunks::<3>().0;
        let color = |index: u8| palette.get(usize::from(index)).copied().unwrap_or_default();
        let ((width, _), frame_width) = (self.dimensions(), self.frame.0 as usize);
        let screen = pixels.as_chunks_mut::<3>().0;
        if (screen.len() as u64) > Inner::pixels(self.frame) {
            screen.fill(color(self.background));
        }
        let rows = screen.chunks_exact_mut(width as usize).skip(self.top);
        for (row, indices) in rows.zip(indices.chunks_exact(frame_width)) {
            for (pixel, index) in row[self.left..].iter_mut().zip(indices) {
                *pixel = color(*index);
            }
        }
        Ok(())
    }
}

impl<R: Read> ImageDecoder for Gif<R> {
    /// The screen's size; a frame that does not fit makes it larger.
    fn dimensions(&self) -> (u32, u32) {
        let side = |screen: u16, start: usize, length: u32| {
            u32::from(screen).max(u32::try_from(start).unwrap_or(0) + length)
        };
        let (width, height) = self.frame;
        let screen = (self.decoder.width(), self.decoder.height());
        (side(screen.0, self.left, width), side(screen.1, self.top, height))
    }

    fn color_type(&self) -> ColorType {
        ColorType::Rgb8
    }

    fn read_image(mut self, pixels: &mut [u8]) -> ImageResult<()> {
        self.read(pixels).map_err(|error| corrupt(ImageFormat::Gif, error))
    }

    fn read_image_boxed(self: Box<Self>, pixels: &mut [u8]) -> ImageResult<()> {
        (*self).read_image(pixels)
    }
}
