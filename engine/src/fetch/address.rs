//! URLs as requests reads them, in the one spelling that hosts and addresses have for the WHATWG:
//! what is checked is what is connected to.

use std::{borrow::Cow, ffi::OsString, os::unix::ffi::OsStringExt as _, path::PathBuf};

use percent_encoding::{
    AsciiSet, CONTROLS, percent_decode, percent_decode_str, percent_encode, utf8_percent_encode,
};
use ureq::http::{HeaderValue, StatusCode, header::LOCATION};
use url::{ParseError, Url};

use super::{FetchError, Response};

/// Longest URL, of redirects too.
const MAX_URL: usize = 8192;

/// What a path must not have as it is, by RFC 3986.
const NO_PATH: &AsciiSet = &NO_QUERY.add(b'?');
const NO_QUERY: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'<')
    .add(b'>')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// An address as requests reads it, for the WHATWG's parser: blanks at its start are nothing, those
/// anywhere else are part of it, and a backslash is none of the slashes behind the host.
pub fn spelling(address: &str) -> Cow<'_, str> {
    let address = address.trim_start();
    let web = address
        .split_once(':')
        .filter(|(scheme, _)| ["http", "https"].iter().any(|web| web.eq_ignore_ascii_case(scheme)));
    match web {
        Some((_, rest)) => {
            let host = rest.trim_start_matches(['/', '\\']);
            let end = host.find(['/', '\\', '?', '#']).unwrap_or(host.len());
            let (start, resource) = address.split_at(address.len() - host.len() + end);
            let slash = if resource.starts_with('\\') { "/" } else { "" };
            format!("{}{slash}{}", without_blanks(start), encoded(resource)).into()
        }
        None => without_blanks(address),
    }
}

/// The path that a `file:` URL of this machine names, decoded. `#` and `?` are letters of the name.
pub fn file_of_url(url: &[u8]) -> Option<PathBuf> {
    let (scheme, rest) = url.split_at_checked(b"file:".len())?;
    let path = match rest.strip_prefix(b"//") {
        None => rest,
        Some(rest) => {
            let (host, path) = rest.split_at(rest.iter().position(|byte| *byte == b'/')?);
            let is_here = host.is_empty() || host.eq_ignore_ascii_case(b"localhost");
            is_here.then_some(path)?
        }
    };
    let is_whole = scheme.eq_ignore_ascii_case(b"file:") && path.starts_with(b"/");
    is_whole.then(|| OsString::from_vec(percent_decode(path).collect()).into())
}

/// A text whose blanks the WHATWG's parser does not drop.
fn without_blanks(text: &str) -> Cow<'_, str> {
    let plain = text.trim_end_matches(|c: char| c <= ' ').len();
    let is_dropped = |at: usize, c: char| at >= plain || matches!(c, '\t' | '\n' | '\r');
    if !text.char_indices().any(|(at, c)| is_dropped(at, c)) {
        return text.into();
    }
    let spelt = text.char_indices().map(|(at, c)| {
        if is_dropped(at, c) { format!("%{:02X}", u32::from(c)) } else { c.to_string() }
    });
    spelt.collect::<String>().into()
}

/// Path, query and fragment as requests sends them.
fn encoded(resource: &str) -> String {
    let (rest, fragment) = resource.split_once('#').unzip();
    let rest = rest.unwrap_or(resource);
    let (path, query) = rest.split_once('?').unzip();
    let mut all = encoded_part(path.unwrap_or(rest), NO_PATH);
    for (mark, part) in [('?', query), ('#', fragment)] {
        if let Some(part) = part {
            all.push(mark);
            all += &encoded_part(part, NO_QUERY);
        }
    }
    all
}

/// Where one `%` of a part begins no escape, none of them does.
fn encoded_part(part: &str, not: &'static AsciiSet) -> String {
    let is_escape = |after: &str| {
        after.as_bytes().first_chunk::<2>().is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
    };
    let part = if part.split('%').skip(1).all(is_escape) {
        Cow::from(part)
    } else {
        part.replace('%', "%25").into()
    };
    utf8_percent_encode(&part, not).to_string()
}

pub(super) fn parse(address: &str) -> Result<Url, FetchError> {
    let url = Url::parse(&spelling(address)).ok().filter(|_| address.len() <= MAX_URL);
    let is_http = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    url.filter(is_http).ok_or(FetchError::BadUrl)
}

/// Where a response sends us on to; one that does not say where is the answer itself.
pub(super) fn redirect(response: &Response, from: &Url) -> Result<Option<Url>, FetchError> {
    const MOVED: [StatusCode; 5] = [
        StatusCode::MOVED_PERMANENTLY,
        StatusCode::FOUND,
        StatusCode::SEE_OTHER,
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    let location = response.headers().get(LOCATION).filter(|location| !location.is_empty());
    let Some(location) = location.filter(|_| MOVED.contains(&response.status())) else {
        return Ok(None);
    };
    let joined = from.join(&reference(&text(location))).ok();
    let next = joined.and_then(|next| parse(next.as_str()).ok());
    let mut next = next.ok_or(FetchError::BadRedirect)?;
    if from.scheme() == "https" && next.scheme() == "http" {
        return Err(FetchError::Downgrade);
    }
    let has_user = !next.username().is_empty() || next.password().is_some();
    if !has_user && is_same_place(from, &next) {
        // They hold only what has been read as a URL.
        let _ = next.set_username(from.username());
        let _ = next.set_password(from.password());
    }
    Ok(Some(next))
}

/// An address, or one that is relative to another, as requests reads it.
fn reference(location: &str) -> Cow<'_, str> {
    let location = location.trim_start();
    match Url::parse(location) {
        Err(ParseError::RelativeUrlWithoutBase) if location.starts_with("//") => {
            spelling(&format!("http:{location}"))["http:".len()..].to_owned().into()
        }
        Err(ParseError::RelativeUrlWithoutBase) => encoded(location).into(),
        _ => spelling(location),
    }
}

/// A header's text: UTF-8, or bytes that go back as they came.
fn text(value: &HeaderValue) -> Cow<'_, str> {
    const NOT_ASCII: &AsciiSet = CONTROLS;
    match std::str::from_utf8(value.as_bytes()) {
        Ok(text) => text.into(),
        Err(_other) => percent_encode(value.as_bytes(), NOT_ASCII).into(),
    }
}

/// Whether the credentials for one URL are for another one too: the same host and port, also by
/// `https` instead of `http`.
fn is_same_place(from: &Url, next: &Url) -> bool {
    let is_upgrade = (from.scheme(), next.scheme()) == ("http", "https")
        && (from.port(), next.port()) == (None, None);
    from.host() == next.host() && (from.origin() == next.origin() || is_upgrade)
}

/// What user and password of a URL are sent as: decoded, in Latin-1 as requests sends them, or
/// where it cannot in UTF-8.
pub(super) fn credentials(url: &Url) -> Option<Vec<u8>> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let decoded = |text: &str| -> Vec<u8> {
        let bytes = percent_decode_str(text).collect::<Vec<u8>>();
        let latin = str::from_utf8(&bytes).ok().and_then(|text| {
            text.chars().map(|c| u8::try_from(c).ok()).collect::<Option<Vec<u8>>>()
        });
        latin.unwrap_or(bytes)
    };
    let password = url.password().unwrap_or_default();
    Some([&decoded(url.username())[..], b":", &decoded(password)].concat())
}

/// The URL that is asked for: without credentials, and without what only its user is told.
pub(super) fn target(url: &Url) -> Url {
    let mut target = url.clone();
    // Only what has no host has no place for them.
    let _ = target.set_username("");
    let _ = target.set_password(None);
    target.set_fragment(None);
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What requests 2.34.2 with urllib3 2.8.0 asks for.
    #[test]
    fn paths_and_queries_are_encoded_as_requests_encodes_them() {
        for (address, asked) in [
            ("/100%.png", "/100%25.png"),
            ("/a%zz.png", "/a%25zz.png"),
            ("/a%20b%zz", "/a%2520b%25zz"),
            ("/a%", "/a%25"),
            ("/a%4", "/a%254"),
            ("/a\\b.png", "/a%5Cb.png"),
            ("/\\b", "/%5Cb"),
            ("\\b", "/%5Cb"),
            ("\\@b/c", "/%5C@b/c"),
            ("/a\\..\\b", "/a%5C..%5Cb"),
            ("/.\\b/../c", "/c"),
            ("/a|b^c[1]{1}`\"<d>", "/a%7Cb%5Ec%5B1%5D%7B1%7D%60%22%3Cd%3E"),
            ("/a b\tc\u{7f}\u{e4}", "/a%20b%09c%7F%C3%A4"),
            ("/a'b(c)!*;:@&=+$,~d", "/a'b(c)!*;:@&=+$,~d"),
            ("?f={1}", "/?f=%7B1%7D"),
            ("/?[1]a|b^`a\\b\"<>", "/?%5B1%5Da%7Cb%5E%60a%5Cb%22%3C%3E"),
            ("/?a%zz&b=%20", "/?a%25zz&b=%2520"),
            ("/?a?b/c&\u{e4}=\u{f6}", "/?a?b/c&%C3%A4=%C3%B6"),
            ("/a%zz?b=%20", "/a%25zz?b=%20"),
            ("/a%20?b=%zz", "/a%20?b=%25zz"),
            ("/x?a#b?c#d|%", "/x?a#b?c%23d%7C%25"),
            ("//x//y", "//x//y"),
        ] {
            let url = parse(&format!("http://h.example{address}")).unwrap();
            assert_eq!(url.as_str(), format!("http://h.example{asked}"), "{address}");
            let again = parse(url.as_str()).unwrap();
            assert_eq!(again, url, "{address}");
        }
        // Keys of buckets are encoded when they are asked for.
        assert_eq!(spelling("s3://b/a\\b%|"), "s3://b/a\\b%|");
    }

    #[test]
    fn redirects_are_read_so_too() {
        let from = Url::parse("http://a.example/b/c").unwrap();
        for (location, next) in [
            ("d%.png", "http://a.example/b/d%25.png"),
            ("/d\\e|", "http://a.example/d%5Ce%7C"),
            // Else this would be another host.
            ("/\\d.example/e", "http://a.example/%5Cd.example/e"),
            ("\\\\d.example/e", "http://a.example/b/%5C%5Cd.example/e"),
            ("//d.example\\e", "http://d.example/%5Ce"),
            ("?{d}", "http://a.example/b/c?%7Bd%7D"),
            ("HTTPS://d.example/e^", "https://d.example/e%5E"),
        ] {
            assert_eq!(from.join(&reference(location)).unwrap().as_str(), next, "{location}");
        }
    }
}
