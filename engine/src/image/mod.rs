//! Bytes to RGB to pixel values, in the arithmetic of Pillow and the reference's processor.

mod decode;
mod preprocess;
mod resize;

pub use decode::{DecodeLimits, Formats, ImageError, Orientation, Rgb, decode};
pub use preprocess::{PixelValues, Preprocessor};
pub use resize::resize_bicubic;
