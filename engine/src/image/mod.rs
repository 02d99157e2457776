//! Bytes to RGB to pixel values, in the arithmetic of Pillow and the reference's processor.

mod decode;
mod formats;
mod gif;
mod jpeg;
mod memory;
mod png;
mod preprocess;
mod resize;
mod rgb;
mod sniff;
mod webp;

pub use decode::{DecodeLimits, Decoded, ImageError, Orientation, Rgb, decode};
pub use formats::Formats;
pub use preprocess::{PixelValues, Preprocessor};
pub use resize::resize_bicubic;
