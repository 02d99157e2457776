//! What a picture's address tells: where it leads to, and what of it may be shown.

use std::borrow::Cow;

/// Longest address, in bytes; those of browsers and servers end about there too.
pub(crate) const MOST_BYTES: usize = 8192;
/// Longest name of a host, in bytes: DNS knows no longer one.
pub(crate) const MOST_HOST_BYTES: usize = 253;

/// The schemes that something is downloaded for.
const SCHEMES: [&str; 4] = ["http", "https", "gs", "s3"];

/// Scheme and rest of an address that something is downloaded for.
pub(super) fn remote(uri: &str) -> Option<(&'static str, &str)> {
    let (scheme, rest) = uri.split_once("://")?;
    Some((SCHEMES.into_iter().find(|known| *known == scheme)?, rest))
}

/// User and password, then host and port, then the rest.
fn parts(rest: &str) -> (&str, &str, &str) {
    let end = rest.find(['/', '\\', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    (user, host, path)
}

/// Whether the name of the host is longer than one can be.
pub(crate) fn has_long_host(uri: &[u8]) -> bool {
    host_and_port(uri).is_some_and(|host| {
        let is_port = |port: &&str| port.bytes().all(|byte| byte.is_ascii_digit());
        let name = host.rsplit_once(':').filter(|(_, port)| is_port(port)).map(|(name, _)| name);
        name.unwrap_or(&host).len() > MOST_HOST_BYTES
    })
}

/// Host and port that an address leads to, or the bucket; nothing if it is at hand.
pub(crate) fn host_and_port(uri: &[u8]) -> Option<String> {
    let start = &uri[..uri.len().min(MOST_BYTES)];
    let start = String::from_utf8_lossy(start);
    let (scheme, rest) = remote(&start)?;
    let (_, host, _) = parts(rest);
    let host: String = host.chars().take(2 * MOST_HOST_BYTES).collect::<String>().to_lowercase();
    Some(match scheme {
        "http" => host.strip_suffix(":80").unwrap_or(&host).to_owned(),
        "https" => host.strip_suffix(":443").unwrap_or(&host).to_owned(),
        _ => format!("{scheme}://{host}"),
    })
}

/// An address as it may be shown: without user and password, and without the values of parameters
/// that give access.
pub(crate) fn without_secrets(uri: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = remote(uri) else { return uri.into() };
    let (user, host, path) = parts(rest);
    let (path, fragment) = path.split_at(path.find('#').unwrap_or(path.len()));
    let Some((path, query)) = path.split_once('?') else {
        return if user.is_empty() {
            uri.into()
        } else {
            format!("{scheme}://{host}{path}{fragment}").into()
        };
    };
    let parameter = |parameter: &str| match parameter.split_once('=') {
        Some((name, _)) if gives_access(name) => format!("{name}=REDACTED"),
        _ => parameter.to_owned(),
    };
    let query: Vec<String> = query.split('&').map(parameter).collect();
    format!("{scheme}://{host}{path}?{}{fragment}", query.join("&")).into()
}

/// Whether a parameter of this name is a signature, a token or the like.
fn gives_access(name: &str) -> bool {
    const PARTS: [&str; 7] =
        ["signature", "credential", "secret", "password", "passwd", "apikey", "accesskey"];
    const NAMES: [&str; 9] =
        ["sig", "key", "pwd", "pass", "policy", "keypairid", "auth", "authorization", "jwt"];
    let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    let name = name.to_ascii_lowercase();
    NAMES.contains(&name.as_str())
        || name.ends_with("token")
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
            ("http://a@b:c@d.example", "http://d.example"),
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
            ("http://h/a@b?c=d", "http://h/a@b?c=d"),
            ("/a/b?token=c", "/a/b?token=c"),
            ("DATA", "DATA"),
        ] {
            assert_eq!(without_secrets(address), shown);
        }
    }

    #[test]
    fn the_host_and_the_port_are_told() {
        for (address, host) in [
            ("http://u:p@A.example:80/x", Some("a.example")),
            ("https://a.example:443?x", Some("a.example")),
            ("http://127.0.0.1:8000/x", Some("127.0.0.1:8000")),
            ("gs://bucket/x", Some("gs://bucket")),
            ("data:image/png;base64,http://x", None),
            ("/files/http://x", None),
            ("DATA", None),
        ] {
            assert_eq!(host_and_port(address.as_bytes()).as_deref(), host, "{address}");
        }
    }
}
