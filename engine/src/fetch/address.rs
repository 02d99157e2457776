//! URLs as requests reads them, in the one spelling that hosts and addresses have for the WHATWG:
//! what is checked is what is connected to.

use std::borrow::Cow;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use ureq::http::{HeaderValue, StatusCode, header::LOCATION};
use url::Url;

use super::{FetchError, Response};

/// Longest URL, of redirects too.
const MAX_URL: usize = 8192;

/// An address as requests reads it, for the WHATWG's parser: blanks at its start are nothing, those
/// anywhere else are part of it.
pub fn spelling(address: &str) -> Cow<'_, str> {
    let address = address.trim_start();
    let plain = address.trim_end_matches(|c: char| c <= ' ').len();
    let is_dropped = |at: usize, c: char| at >= plain || matches!(c, '\t' | '\n' | '\r');
    if !address.char_indices().any(|(at, c)| is_dropped(at, c)) {
        return address.into();
    }
    let spelt = address.char_indices().map(|(at, c)| {
        if is_dropped(at, c) { format!("%{:02X}", u32::from(c)) } else { c.to_string() }
    });
    spelt.collect::<String>().into()
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
    let joined = from.join(&text(location)).ok();
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
