//! Bytes to RGB to pixel values, in the arithmetic of Pillow and the reference's processor.

mod area;
mod decode;
mod exif;
mod formats;
mod gif;
mod jpeg;
mod memory;
mod png;
mod preprocess;
mod resize;
mod rgb;
mod sniff;
mod thumbnail;
mod tiff;
mod webp;

pub use area::Area;
pub use decode::{DecodeLimits, Decoded, ImageError, Orientation, Rgb, decode, is_turned};
pub use formats::Formats;
pub use preprocess::{PixelValues, Preprocessor};
pub use resize::resize_bicubic;
pub use thumbnail::thumbnail;
