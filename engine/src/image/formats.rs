//! The formats that are read, and which of them are allowed.

use std::fmt;

use image::ImageFormat;

pub(super) const FORMATS: [(&str, ImageFormat); 6] = [
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

/// `JPEG, PNG or WebP`.
impl fmt::Display for Formats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let allowed = FORMATS.iter().zip(self.0).filter(|(_, allowed)| *allowed);
        let names: Vec<&str> = allowed.map(|((name, _), _)| *name).collect();
        match names.split_last() {
            Some((last, others)) if !others.is_empty() => {
                write!(f, "{} or {last}", others.join(", "))
            }
            _ => f.write_str(&names.concat()),
        }
    }
}

impl std::str::FromStr for Formats {
    type Err = String;

    /// Names, separated by spaces: `jpeg png`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Err("no format is named".to_owned());
        }
        let mut formats = Self([false; FORMATS.len()]);
        for word in text.split_whitespace() {
            let found = FORMATS.iter().position(|(name, _)| name.eq_ignore_ascii_case(word));
            formats.0[found.ok_or_else(|| format!("'{word}' is no format that is read"))?] = true;
        }
        Ok(formats)
    }
}

/// The format that bytes begin like, if it is read, with its name.
pub(super) fn format_of(bytes: &[u8]) -> Option<(&'static str, ImageFormat)> {
    // TIFF with offsets of 64 bits, which `image` reads and does not recognize.
    let is_big = [&b"II\x2b\0"[..], b"MM\0\x2b"].iter().any(|start| bytes.starts_with(start));
    let format = if is_big { Some(ImageFormat::Tiff) } else { image::guess_format(bytes).ok() };
    FORMATS.into_iter().find(|(_, read)| Some(*read) == format)
}

impl Formats {
    pub(super) fn allow(self, format: ImageFormat) -> bool {
        FORMATS.iter().zip(self.0).any(|((_, read), allowed)| allowed && *read == format)
    }
}
