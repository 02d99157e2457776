//! What a picture's address tells: where it leads to, and what of it may be shown.

use std::borrow::Cow;

use florence_engine::fetch::{canonical_host, spelling};
use url::Url;

use super::files;

/// Longest address, in bytes; those of browsers and servers end about there too.
pub(crate) const MOST_BYTES: usize = 8192;
/// Longest name of a host, in bytes: DNS knows no longer one.
pub(crate) const MOST_HOST_BYTES: usize = 253;

/// The schemes that something is downloaded for.
const SCHEMES: [&str; 4] = ["http", "https", "gs", "s3"];

/// Scheme and rest of an address that something is downloaded for.
pub(super) fn remote(uri: &str) -> Option<(&'static str, &str)> {
    let (scheme, rest) = uri.trim_start().split_once("://")?;
    Some((SCHEMES.into_iter().find(|known| known.eq_ignore_ascii_case(scheme))?, rest))
}

/// Whether this is an address at all, whatever is allowed.
pub(crate) fn is_address(uri: &str) -> bool {
    remote(uri).is_some() || files::path(uri).is_some()
}

/// An address as whoever downloads from it reads it.
fn parse(uri: &[u8]) -> Option<(&'static str, Url)> {
    let uri = std::str::from_utf8(uri.get(..uri.len().min(MOST_BYTES))?).ok()?;
    let (scheme, _) = remote(uri)?;
    Some((scheme, Url::parse(&spelling(uri)).ok()?))
}

/// Whether the name of the host is longer than one can be.
pub(crate) fn has_long_host(uri: &[u8]) -> bool {
    parse(uri).is_some_and(|(_, url)| url.host_str().unwrap_or_default().len() > MOST_HOST_BYTES)
}

/// The host that an address leads to, as a browser sees it, or the bucket; empty if it is at hand.
pub(super) fn host(uri: &str) -> String {
    parse(uri.as_bytes()).map(|(scheme, url)| host_of(scheme, &url)).unwrap_or_default()
}

fn host_of(scheme: &str, url: &Url) -> String {
    let host = canonical_host(url.host_str().unwrap_or_default());
    if is_web(scheme) { host.into_owned() } else { format!("{scheme}://{host}") }
}

pub(super) fn is_web(scheme: &str) -> bool {
    matches!(scheme, "http" | "https")
}

/// Host and port that an address leads to, or the bucket; nothing if it is at hand.
pub(crate) fn host_and_port(uri: &[u8]) -> Option<String> {
    let (scheme, url) = parse(uri)?;
    let host = host_of(scheme, &url);
    let host = host.trim_end_matches('.');
    Some(match url.port().filter(|_| is_web(scheme)) {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    })
}

/// An address as it may be shown: without user and password, and without the values of parameters
/// that give access.
pub(crate) fn without_secrets(uri: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = remote(uri) else { return uri.into() };
    let Ok(mut url) = Url::parse(&spelling(uri)) else {
        return format!("{scheme}://REDACTED").into();
    };
    // As it is written, if that is how it is read; else as it is read.
    let is_plain = url.username().is_empty()
        && url.password().is_none()
        && url.host_str().is_some_and(|host| {
            rest.get(..host.len()).is_some_and(|start| start.eq_ignore_ascii_case(host))
        });
    if is_plain {
        return without_access(uri);
    }
    let _ = url.set_username("");
    let _ = url.set_password(None);
    without_access(url.as_str()).into_owned().into()
}

/// A text in which an address may stand behind something else, without what is secret about it.
pub(crate) fn without_secrets_within(text: &str) -> Cow<'_, str> {
    let start_of = |end: usize| {
        let starts =
            SCHEMES.iter().filter_map(|scheme| Some((scheme, end.checked_sub(scheme.len())?)));
        let is_it = |(scheme, start): &(&&str, usize)| {
            text.get(*start..end).is_some_and(|found| found.eq_ignore_ascii_case(scheme))
        };
        starts.filter(is_it).map(|(_, start)| start).next()
    };
    match text.find("://").and_then(start_of) {
        Some(start) if start > 0 => {
            format!("{}{}", &text[..start], without_secrets(&text[start..])).into()
        }
        _ => without_secrets(text),
    }
}

/// Hides the values of parameters that give access, in the query and in the fragment. A name may
/// stand behind a `?` or `;` too, as some write them; a value ends at neither.
fn without_access(uri: &str) -> Cow<'_, str> {
    let Some(start) = uri.find(['?', '#']) else { return uri.into() };
    let (path, parameters) = uri.split_at(start);
    let (mut shown, mut is_hidden) = (path.to_owned(), false);
    for part in parameters.split_inclusive(['?', '&', ';', '#']) {
        let text = part.trim_end_matches(['?', '&', ';', '#']);
        let end = &part[text.len()..];
        match text.split_once('=') {
            _ if is_hidden => {}
            Some((name, _)) if gives_access(name) => {
                shown.extend([name, "=REDACTED"]);
                is_hidden = true;
            }
            _ => shown += text,
        }
        is_hidden &= !end.ends_with(['&', '#']);
        if !is_hidden {
            shown += end;
        }
    }
    shown.into()
}

/// Whether a parameter of this name is a signature, a token or the like: one too many is hidden
/// rather than one too few.
fn gives_access(name: &str) -> bool {
    const PARTS: [&str; 14] = [
        "signature",
        "credential",
        "secret",
        "password",
        "passwd",
        "passphrase",
        "apikey",
        "accesskey",
        "authkey",
        "privatekey",
        "sharedkey",
        "session",
        "hmac",
        "ticket",
    ];
    const ENDS: [&str; 6] = ["token", "sig", "auth", "pwd", "sid", "jwt"];
    // Other words end with these.
    const LAST_WORDS: [&str; 2] = ["key", "pass"];
    // The short ones are those of Alibaba, CloudFront, Akamai, Discord and Facebook.
    const NAMES: [&str; 12] = [
        "sign",
        "policy",
        "keypairid",
        "authorization",
        "cred",
        "creds",
        "hdnea",
        "hdnts",
        "hdntl",
        "gda",
        "hm",
        "oh",
    ];
    let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
    // As in `my-key` and `myKey`.
    let last = name.rsplit(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
    let begins = |pair: &[u8]| pair[0].is_ascii_lowercase() && pair[1].is_ascii_uppercase();
    let start = last.as_bytes().windows(2).rposition(begins).map_or(0, |before| before + 1);
    let last_word = last[start..].to_ascii_lowercase();
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    let name = name.to_ascii_lowercase();
    LAST_WORDS.contains(&last_word.as_str())
        || NAMES.contains(&name.as_str())
        || ENDS.iter().any(|end| name.ends_with(end))
        || PARTS.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gives_access_is_not_shown() {
        for (address, shown) in [
            ("http://a.example/b.png", "http://a.example/b.png"),
            ("https://user:secret@a.example:8443/b.png", "https://a.example:8443/b.png"),
            ("http://a@b:c@d.example", "http://d.example/"),
            (
                "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=abc&x-amz-credential=d#f",
                "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=REDACTED&x-amz-credential=REDACTED#f",
            ),
            (
                "http://u@h/?w=10&API_Key=k&to%6ben=t",
                "http://h/?w=10&API_Key=REDACTED&to%6ben=REDACTED",
            ),
            (
                "http://h/?sig=a&sight=b&key&Key-Pair-Id=c",
                "http://h/?sig=REDACTED&sight=b&key&Key-Pair-Id=REDACTED",
            ),
            (
                "http://h/?author=a&tokens=9&authToken=c",
                "http://h/?author=a&tokens=9&authToken=REDACTED",
            ),
            // A value goes on behind what is no end of it.
            ("http://h/?token=a?b;c&d=e", "http://h/?token=REDACTED&d=e"),
            ("http://h/?a=1;token=b;c=2&d=3#e", "http://h/?a=1;token=REDACTED&d=3#e"),
            ("http://h/?a=1?token=b#c", "http://h/?a=1?token=REDACTED#c"),
            ("http://h/#/?token=a&b=c", "http://h/#/?token=REDACTED&b=c"),
            (
                "http://h/?auth_key=a&hdnea=b&hm=c&oh=d&sign=e&hmac=f&privatekey=g",
                "http://h/?auth_key=REDACTED&hdnea=REDACTED&hm=REDACTED&oh=REDACTED&sign=REDACTED&hmac=REDACTED&privatekey=REDACTED",
            ),
            (
                "http://h/?passphrase=a&session_id=b&ticket=c&sid=d&PHPSESSID=e",
                "http://h/?passphrase=REDACTED&session_id=REDACTED&ticket=REDACTED&sid=REDACTED&PHPSESSID=REDACTED",
            ),
            (
                "http://h/?size=1&monkey=2&keyword=x&design=y&w=3&side=l&ex=4&compass=5",
                "http://h/?size=1&monkey=2&keyword=x&design=y&w=3&side=l&ex=4&compass=5",
            ),
            (
                "http://h/?key=a&KEY=b&my_key=c&myKey=d&MY-KEY=e&pass=f",
                "http://h/?key=REDACTED&KEY=REDACTED&my_key=REDACTED&myKey=REDACTED&MY-KEY=REDACTED&pass=REDACTED",
            ),
            ("http:///user:secret@host/x", "http://host/x"),
            ("http://h/#access_token=a&b=c", "http://h/#access_token=REDACTED&b=c"),
            ("http://h:x/?token=a", "http://REDACTED"),
            ("http://h/a@b?c=d", "http://h/a@b?c=d"),
            ("HTTPS://user:secret@a.example/?Token=c", "https://a.example/?Token=REDACTED"),
            ("HTTP://a.example/?sig=c", "HTTP://a.example/?sig=REDACTED"),
            ("S3://u:p@b/k?key=c", "s3://b/k?key=REDACTED"),
            ("  http://u:p@h/x", "http://h/x"),
            ("\n\tHttp://u:p@h/x y\n", "http://h/x%20y%0A"),
            ("http://u\np@h/x", "http://h/x"),
            ("/a/b?token=c", "/a/b?token=c"),
            ("DATA", "DATA"),
        ] {
            assert_eq!(without_secrets(address), shown);
        }
    }

    #[test]
    fn what_gives_access_is_not_shown_behind_something_else() {
        for (text, shown) in [
            ("http://u:p@h/x", "http://h/x"),
            // As Python writes a line's end.
            ("\\nHTTPS://u:p@h/x", "\\nhttps://h/x"),
            ("\\xa0s3://b/k?sig=c", "\\xa0s3://b/k?sig=REDACTED"),
            ("see http://h/?token=c", "see http://h/?token=REDACTED"),
            ("://u:p@h", "://u:p@h"),
            ("\u{fc}://h", "\u{fc}://h"),
            ("<OD>", "<OD>"),
        ] {
            assert_eq!(without_secrets_within(text), shown);
        }
    }

    #[test]
    fn the_host_and_the_port_are_told() {
        for (address, host) in [
            ("http://u:p@A.example:80/x", Some("a.example")),
            ("https://a.example:443?x", Some("a.example")),
            ("http://127.0.0.1:8000/x", Some("127.0.0.1:8000")),
            ("gs://bucket/x", Some("gs://bucket")),
            ("GS://Bucket/x", Some("gs://Bucket")),
            (" HTTP://A.example:80/x", Some("a.example")),
            ("\nhttps://A.example.:8443/x", Some("a.example:8443")),
            ("data:image/png;base64,http://x", None),
            ("/files/http://x", None),
            ("FILE:///x", None),
            ("DATA", None),
        ] {
            assert_eq!(host_and_port(address.as_bytes()).as_deref(), host, "{address}");
        }
    }
}
