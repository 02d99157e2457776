//! Picture files of every kind, against what Pillow makes of them.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers")]

mod common;

use florence_engine::image::{DecodeLimits, ImageError, Orientation, decode};
use sha2::{Digest, Sha256};

/// Holds a pack of files against what stands in it, but for kinds that are not the same everywhere.
fn assert_as_in(pack: &str, at_least: usize, is_defined: impl Fn(&str) -> bool) {
    let pack = std::fs::read(common::path(pack)).unwrap();
    let (mut rest, mut names, mut differ) = (pack.as_slice(), Vec::new(), Vec::new());
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let line = std::str::from_utf8(&rest[..end]).unwrap();
        let [name, length, expected] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let (file, next) = rest[end + 1..].split_at(length.parse().unwrap());
        rest = next;
        let found = match decode(file, &DecodeLimits::default(), Orientation::AsStored) {
            Ok(picture) => format!("{:x}", Sha256::digest(&picture.data)),
            Err(ImageError::Unsupported(..) | ImageError::UnsupportedKind(..)) => {
                "unsupported".to_owned()
            }
            // Where so much is missing that nobody can tell what it was.
            Err(
                ImageError::Corrupt { .. }
                | ImageError::UnknownFormat(_)
                | ImageError::NotPicture(_),
            ) => "error".to_owned(),
            Err(other) => panic!("{name}: {other}"),
        };
        if found != expected && is_defined(name) {
            differ.push(format!("{name}, file {}: {found}, not {expected}", names.len()));
        }
        names.push(name);
    }
    assert!(names.len() >= at_least, "{}", names.len());
    assert!(differ.is_empty(), "{differ:#?}");
}

#[test]
fn pixels_and_refusals_of_jpeg_equal_pillows() {
    // Coefficients out of range overflow in the vector code, on each architecture in a way of its
    // own; the pack was made on x86.
    assert_as_in("jpegs.pack", 700, |name| name != "changed" || cfg!(target_arch = "x86_64"));
}

#[test]
fn pixels_and_refusals_of_other_formats_equal_pillows() {
    assert_as_in("pictures.pack", 400, |_| true);
}
