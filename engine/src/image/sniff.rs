//! What bytes are that are no picture which is read, by how they begin.

use super::{Formats, ImageError};

/// Formats that are not read.
const OTHERS: &[(&[u8], &str)] = &[
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\x01\0", "ICO"),
    (b"qoif", "QOI"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
];

const BASE64: &str = "base64 text";
const CONVERTED: &str = "a file that was converted as if it were text";

/// What a picture may have become on its way.
const ACCIDENTS: &[(&[u8], &str)] = &[
    (b"data:", "a data: URL"),
    (b"/9j/", BASE64),
    (b"iVBORw0KGgo", BASE64),
    (b"R0lGOD", BASE64),
    (b"UklGR", BASE64),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"\x89PNG\n", CONVERTED),
    (b"\xc2\x89PNG", CONVERTED),
    (b"\xef\xbf\xbdPNG", CONVERTED),
    (b"\xc3\xbf\xc3\x98", CONVERTED),
    (b"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", CONVERTED),
];

/// Why these bytes are refused.
pub(super) fn refuse(bytes: &[u8], formats: Formats) -> ImageError {
    let find = |known: &[(&[u8], &'static str)]| {
        known.iter().find(|(start, _)| bytes.starts_with(start)).map(|(_, name)| *name)
    };
    if let Some(name) = container(bytes).or_else(|| find(OTHERS)) {
        return ImageError::Unsupported(name, formats);
    }
    if bytes.is_empty() {
        return ImageError::NotPicture("an empty file");
    }
    if let Some(name) = find(ACCIDENTS) {
        return ImageError::NotPicture(name);
    }
    match text(bytes) {
        Some("SVG") => ImageError::Unsupported("SVG", formats),
        Some(name) => ImageError::NotPicture(name),
        None => ImageError::UnknownFormat(formats),
    }
}

/// The format of an ISO media file, by the brands of its first box: AVIF and HEIC share one.
fn container(bytes: &[u8]) -> Option<&'static str> {
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    let size = usize::try_from(u32::from_be_bytes(*size)).ok()?.min(bytes.len());
    let brands = rest.get(..size.checked_sub(4)?)?.strip_prefix(b"ftyp")?;
    let has = |names: &[&[u8]]| brands.chunks_exact(4).any(|brand| names.contains(&brand));
    let is_film = |brand: &[u8]| {
        [b"iso", b"mp4", b"3gp", b"3g2"].iter().any(|start| brand.starts_with(*start))
    };
    if has(&[b"avif", b"avis"]) {
        Some("AVIF")
    } else if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]) {
        Some("HEIC")
    } else if has(&[b"crx "]) {
        Some("CR3")
    } else if has(&[b"qt  ", b"M4V ", b"avc1", b"dash", b"f4v "])
        || brands.chunks_exact(4).any(is_film)
    {
        Some("Video")
    } else {
        Some("ISO media")
    }
}

/// Kinds of texts that servers answer with in place of pictures.
fn text(bytes: &[u8]) -> Option<&'static str> {
    const LOOKED_AT: usize = 4096;
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(LOOKED_AT)]).to_ascii_lowercase();
    let mut rest = start.trim_start_matches('\u{feff}').trim_start();
    if rest.starts_with(['{', '[']) && !start.contains(['\0', '\u{fffd}']) {
        return Some("JSON");
    }
    // What may stand before the root element.
    while let Some((_, after)) = [("<?", "?>"), ("<!--", "-->")]
        .iter()
        .find_map(|(open, close)| rest.strip_prefix(open)?.split_once(close))
    {
        rest = after.trim_start();
    }
    if let Some(after) = rest.strip_prefix("<!doctype") {
        rest = after.trim_start();
        if rest.starts_with("html") {
            return Some("HTML");
        }
        // Declarations of its own stand in brackets.
        let end = rest.find(['[', '>'])?;
        let end = if rest[end..].starts_with('[') { rest.find("]>")? + 1 } else { end };
        rest = rest[end + 1..].trim_start();
    }
    let name =
        rest.strip_prefix('<')?.split(|c: char| c.is_whitespace() || "/>".contains(c)).next()?;
    let is_name = name.starts_with(|c: char| c.is_alphabetic() || c == '_');
    match name.rsplit(':').next()? {
        "svg" => Some("SVG"),
        // What an answer of a web server, or of a program behind it, may begin with.
        "html" | "head" | "body" | "script" | "style" | "title" | "meta" | "link" | "div"
        | "span" | "center" | "h1" | "h2" | "h3" | "p" | "br" | "hr" | "b" | "i" | "strong"
        | "font" | "a" | "img" | "pre" | "code" | "table" | "form" | "ul" | "ol" | "iframe" => {
            Some("HTML")
        }
        _ => is_name.then_some("XML"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_picture_is_named() {
        for (bytes, expected) in [
            ("<svg xmlns='http://www.w3.org/2000/svg'/>", Some("SVG")),
            ("<?xml version='1.0'?>\n<!-- drawn -->\n<svg:svg>", Some("SVG")),
            (
                "<?xml version='1.0'?><!DOCTYPE svg PUBLIC \"-//W3C\" \"http://x/svg.dtd\">\n<svg>",
                Some("SVG"),
            ),
            ("<!DOCTYPE svg [<!ENTITY a \"b\">]><svg/>", Some("SVG")),
            (
                "<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'><svg/></html>",
                Some("HTML"),
            ),
            ("\u{feff} \n<!DOCTYPE HTML><html><body><svg>", Some("HTML")),
            ("<HTML><HEAD>", Some("HTML")),
            ("<h1>Not Found</h1>", Some("HTML")),
            ("<br />\n<b>Warning</b>: Undefined variable", Some("HTML")),
            ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", Some("XML")),
            ("<Error/>", Some("XML")),
            ("{\"error\": \"not found\"}", Some("JSON")),
            ("[1]", Some("JSON")),
            ("{\0", None),
            ("<<<", None),
            ("<3", None),
            ("<!doctype x", None),
            ("<?xml", None),
            ("not found", None),
            ("", None),
        ] {
            assert_eq!(text(bytes.as_bytes()), expected, "{bytes}");
        }
        let refused = |bytes: &[u8]| refuse(bytes, Formats::default()).to_string();
        assert_eq!(refused(b"<p>no</p>"), "this is HTML, not a picture");
        assert!(refused(b"\0\0\0\x10ftypavif\0\0\0\0mif1").starts_with("AVIF pictures are not"));
        assert!(refused(b"\0\0\0\x10ftypisom\0\0\0\0mp41").starts_with("Video pictures are not"));
        assert!(refused(b"\0\0\0\x10ftypcrx \0\0\0\0isom").starts_with("CR3 pictures are not"));
        assert!(refused(b"\0\0\0\x0cftypwhat").starts_with("ISO media pictures are not"));
        assert!(refused(b"%PDF-1.4").starts_with("PDF pictures are not"));
        for (bytes, name) in [
            (&b""[..], "an empty file"),
            (b"/9j/4AAQSkZJRgABAQ", BASE64),
            (b"data:image/png;base64,iVBORw0KGgo", "a data: URL"),
            ("\u{89}PNG\r\n".as_bytes(), CONVERTED),
            (String::from_utf8_lossy(b"\xff\xd8\xff\xe0").as_bytes(), CONVERTED),
        ] {
            assert_eq!(refused(bytes), format!("this is {name}, not a picture"));
        }
    }
}
