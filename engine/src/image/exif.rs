//! The orientation in a block of EXIF, in every form that Pillow takes it in.

use image::metadata::Orientation;

/// How a picture is to be turned; by nothing, if the block does not say or cannot be read.
pub(super) fn orientation(exif: &[u8]) -> Orientation {
    tag(exif).and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

fn tag(mut exif: &[u8]) -> Option<u8> {
    const ORIENTATION: u16 = 0x112;
    // Some write the prefix that JPEG has before the block also where it has no place.
    while let Some(rest) = exif.strip_prefix(b"Exif\0\0") {
        exif = rest;
    }
    let is_big = match exif.first_chunk()? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let bytes = *exif.get(at..)?.first_chunk()?;
        Some(if is_big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let long = |at: usize| {
        let bytes = *exif.get(at..)?.first_chunk()?;
        Some(if is_big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    let start = long(4)? as usize;
    let entries = (0..usize::from(short(start)?)).map(|i| start.saturating_add(2 + 12 * i));
    let at = entries.into_iter().find(|at| short(*at) == Some(ORIENTATION))?;
    let (kind, count) = (short(at + 2)?, long(at + 4)?);
    let bytes = match kind {
        // Bytes, words and longer ones, with a sign or without.
        1 | 6 => 1,
        3 | 8 => 2,
        4 | 9 => 4,
        _ => return None,
    };
    // Of several values the first counts.
    let value = match count {
        0 => return None,
        _ if u64::from(count) * bytes <= 4 => at + 8,
        _ => long(at + 8)? as usize,
    };
    let value = match bytes {
        1 => u32::from(*exif.get(value)?),
        2 => u32::from(short(value)?),
        _ => long(value)?,
    };
    u8::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_the_tag_is_read() {
        let block = |start: &[u8], entry: &[u8], after: &[u8]| [start, entry, after].concat();
        let (big, little) = (&b"MM\0*\0\0\0\x08\0\x01"[..], &b"II*\0\x08\0\0\0\x01\0"[..]);
        let none = b"\0\0\0\0";
        let short = block(big, b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", none);
        for (exif, turn) in [
            (short.clone(), Orientation::Rotate90),
            ([b"Exif\0\0", &*short].concat(), Orientation::Rotate90),
            (block(little, b"\x12\x01\x03\0\x01\0\0\0\x03\0\0\0", none), Orientation::Rotate180),
            (block(big, b"\x01\x12\0\x04\0\0\0\x01\0\0\0\x08", none), Orientation::Rotate270),
            (
                block(little, b"\x12\x01\x01\0\x01\0\0\0\x02\0\0\0", none),
                Orientation::FlipHorizontal,
            ),
            (block(big, b"\x01\x12\0\x03\0\0\0\x02\0\x06\0\x01", none), Orientation::Rotate90),
            (
                block(big, b"\x01\x12\0\x04\0\0\0\x02\0\0\0\x1a", b"\0\0\0\0\0\0\0\x03\0\0\0\0"),
                Orientation::Rotate180,
            ),
            (block(big, b"\x01\x12\0\x03\0\0\0\x01\0\x09\0\0", none), Orientation::NoTransforms),
            (block(big, b"\x01\x13\0\x03\0\0\0\x01\0\x06\0\0", none), Orientation::NoTransforms),
            (
                block(big, b"\x01\x12\0\x04\0\0\0\x02\xff\xff\xff\xff", none),
                Orientation::NoTransforms,
            ),
            (b"MM\0*\xff\xff\xff\xff".to_vec(), Orientation::NoTransforms),
            (Vec::new(), Orientation::NoTransforms),
        ] {
            assert_eq!(orientation(&exif), turn, "{exif:?}");
        }
    }
}
