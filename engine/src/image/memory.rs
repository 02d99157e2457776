//! What decoding takes of memory besides the picture that it gives, as the file's header tells.
//!
//! The decoders' own limits leave most of it out. What is said here, and by the files of the formats,
//! is held against what they really take by `engine/tests/memory.rs`.

/// Most bytes of colour profiles and texts, which are read with the header.
pub(super) const METADATA: u64 = 16 << 20;

/// Tables, windows and buffers of any decoder.
const TABLES: u64 = 1 << 20;

/// What a decoder makes on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inner {
    /// Width and height of the picture in the file that is decoded: a frame need not have the size
    /// of the whole.
    pub(super) frame: (u32, u32),
    /// Bytes that the decoder takes besides its output.
    pub(super) bytes: u64,
    /// Bytes that it takes besides if the file was made to that end; usually nearly none of them.
    pub(super) codes: u64,
}

impl Inner {
    pub(super) fn pixels((width, height): (u32, u32)) -> u64 {
        u64::from(width) * u64::from(height)
    }

    /// What any decoder takes, and some rows, given in bytes a column.
    pub(super) fn rows(whole: (u32, u32), bytes: u64) -> Self {
        Self { frame: whole, bytes: TABLES + u64::from(whole.0) * bytes, codes: 0 }
    }

    pub(super) fn and(self, bytes: u64) -> Self {
        Self { bytes: self.bytes + bytes, ..self }
    }
}
