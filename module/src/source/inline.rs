//! Pictures in their own address: `data:` URLs. The main thread decodes them.

use data_url::DataUrl;
use redis_module::RedisError;

use super::check_size;
use crate::server::reply;

/// Longest media type with its parameters.
const MOST_HEADER: usize = 1024;

/// Media type and bytes of a `data:` URL; `None` for other URLs.
pub(crate) fn inline(uri: &[u8]) -> Option<Result<(String, Vec<u8>), RedisError>> {
    let uri = uri.trim_ascii_start();
    is_inline(uri).then(|| decode(uri))
}

/// Whether an address is a `data:` URL.
pub(crate) fn is_inline(uri: &[u8]) -> bool {
    uri.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"data:"))
}

fn decode(uri: &[u8]) -> Result<(String, Vec<u8>), RedisError> {
    let malformed = || reply::error("ERR", "the data URL is malformed");
    let start = &uri[..uri.len().min(MOST_HEADER)];
    let comma = start.iter().position(|byte| *byte == b',').ok_or_else(malformed)?;
    let (header, body) = uri.split_at(comma + 1);
    let header = std::str::from_utf8(header).map_err(|_error| malformed())?;
    let url = DataUrl::process(header).map_err(|_error| malformed())?;
    let kind = url.mime_type();
    let kind = format!("data:{}/{}", kind.type_, kind.subtype);
    if header.trim_end_matches(',').to_ascii_lowercase().ends_with(";base64") {
        // Before anything is done with them: four letters are three bytes.
        check_size(body.len() / 4 * 3)?;
        if let Ok(bytes) = base64_simd::STANDARD_NO_PAD.decode_to_vec(without_padding(body)) {
            return Ok((kind, bytes));
        }
    }
    // Percent signs, spaces, fragments: few have them, and they take ten times as long.
    check_size_of_odd(body.len())?;
    let uri = std::str::from_utf8(uri).map_err(|_error| malformed())?;
    let url = DataUrl::process(uri).map_err(|_error| malformed())?;
    let (bytes, _fragment) = url.decode_to_vec().map_err(|_error| malformed())?;
    Ok((kind, bytes))
}

fn without_padding(body: &[u8]) -> &[u8] {
    let body = body.trim_ascii_end();
    let padding = body.iter().rev().take_while(|byte| **byte == b'=').count();
    &body[..body.len() - padding]
}

/// Refuses what would take the main thread too long.
fn check_size_of_odd(bytes: usize) -> Result<(), RedisError> {
    const MOST: usize = 4 << 20;
    if bytes <= MOST {
        return Ok(());
    }
    let text = format!("a data URL of more than {MOST} bytes must be plain base64");
    Err(reply::error("ERR", text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_gives_the_same_bytes() {
        for uri in [
            "data:image/png;base64,AAEC/w==",
            "DATA:image/png;base64,AAEC/w",
            " \nData:image/png;base64,AAEC/w==",
            "data:image/png;BASE64,AAEC%2Fw%3D%3D",
            "data:image/png;base64, AA EC/w== ",
            "data:image/png;base64,AAEC/w==#fragment",
            "data:image/png,%00%01%02%FF",
        ] {
            let (kind, bytes) = inline(uri.as_bytes()).unwrap().unwrap();
            assert_eq!(
                (kind.as_str(), bytes.as_slice()),
                ("data:image/png", &[0, 1, 2, 255][..]),
                "{uri}"
            );
        }
        for uri in ["data:", "data:image/png;base64", "data:image/png;base64,A", "data:;base64,!"] {
            assert!(inline(uri.as_bytes()).unwrap().is_err(), "{uri}");
        }
        assert!(inline(b"http://data:x").is_none());
    }
}
