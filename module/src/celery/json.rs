//! JSON as Python reads and writes it, where that is more than JSON. Pure.
//!
//! Python's texts may hold halves of surrogate pairs: names of files that are no text have them, by
//! `os.fsdecode`. Its numbers may be infinite or none. Neither fits into a [`Value`]: such a half is
//! a private character there, at a fixed distance from its own number, and such a number a text
//! that begins with another; both leave as what they were.

use serde::de::DeserializeOwned;
use serde_json::{Result, Value};

use crate::source::{FIRST_BYTE, byte_of};

/// What a half of a surrogate pair has to be raised by: Python's 0xdc80 is the byte 0x80.
const DISTANCE: u32 = FIRST_BYTE - 0xdc80;
const FIRST_HALF: u32 = 0xd800;
const LAST_HALF: u32 = 0xdfff;
/// Before the name of a number that JSON does not have.
const NUMBER: char = '\u{10f7ff}';
const NUMBERS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Reads JSON; first as what it nearly always is.
pub(super) fn read<T: DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json).or_else(|_odd| serde_json::from_str(&plain(json)))
}

/// Writes what [`read`] has read.
pub(super) fn write(value: &Value) -> String {
    let json = value.to_string();
    if !json.contains(|letter| letter == NUMBER || half(letter).is_some()) {
        return json;
    }
    let quoted = format!("\"{NUMBER}");
    let mut parts = json.split(&quoted);
    let mut written = halves_escaped(parts.next().unwrap_or_default());
    for part in parts {
        // An escaped quotation mark begins no text.
        let number = part.split_once('"').filter(|_| !written.ends_with('\\'));
        let number = number.filter(|(number, _)| NUMBERS.contains(number));
        let Some((number, rest)) = number else {
            written.push_str(&quoted);
            written.push_str(&halves_escaped(part));
            continue;
        };
        written.push_str(number);
        written.push_str(&halves_escaped(rest));
    }
    written
}

/// Whether a text holds a half of a surrogate pair; without `bytes` only one that is no byte of a
/// file's name.
pub(super) fn has_half(text: &str, bytes: bool) -> bool {
    text.chars().any(|letter| half(letter).is_some() && (bytes || byte_of(letter).is_none()))
}

/// The half that a private character stands for.
fn half(letter: char) -> Option<u32> {
    let number = u32::from(letter).checked_sub(DISTANCE)?;
    (FIRST_HALF..=LAST_HALF).contains(&number).then_some(number)
}

fn halves_escaped(json: &str) -> String {
    let escaped =
        |letter| half(letter).map_or(String::from(letter), |half| format!("\\u{half:04x}"));
    json.chars().map(escaped).collect()
}

/// The same JSON without what only Python knows.
fn plain(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    let (mut rest, mut is_text) = (json, false);
    while let Some(at) = rest.find(['"', '\\', 'N', 'I']) {
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        let (taken, written) = match rest.as_bytes() {
            [b'"', ..] => {
                is_text = !is_text;
                (1, "\"".to_owned())
            }
            [b'\\', b'u', ..] if is_text => escape(rest),
            // Whatever is escaped ends no text.
            [b'\\', next, ..] if is_text && next.is_ascii() => (2, rest[..2].to_owned()),
            _ if is_text => (1, rest[..1].to_owned()),
            _ => number(rest, &mut plain),
        };
        plain.push_str(&written);
        rest = &rest[taken..];
    }
    plain.push_str(rest);
    plain
}

/// How long an escape is, and what it is written as; a pair is one escape.
fn escape(rest: &str) -> (usize, String) {
    let unit = |at: usize| {
        let digits = rest.get(at..at + 6)?.strip_prefix("\\u")?;
        u32::from_str_radix(digits, 16).ok()
    };
    match (unit(0), unit(6)) {
        (Some(FIRST_HALF..0xdc00), Some(0xdc00..=LAST_HALF)) => (12, rest[..12].to_owned()),
        (Some(half @ FIRST_HALF..=LAST_HALF), _) => {
            (6, char::from_u32(half + DISTANCE).map(String::from).unwrap_or_default())
        }
        _ => (2, rest[..2].to_owned()),
    }
}

/// As [`escape`], for a number that JSON does not have. Its sign is written already.
fn number(rest: &str, plain: &mut String) -> (usize, String) {
    let Some(name) = NUMBERS.into_iter().find(|name| rest.starts_with(name)) else {
        return (1, rest[..1].to_owned());
    };
    let sign = if plain.ends_with('-') { "-" } else { "" };
    plain.truncate(plain.len() - sign.len());
    (name.len(), format!("\"{NUMBER}{sign}{name}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_python_knows_leaves_as_it_came() {
        for json in [
            r#"{"a":"\udc80","b":["x\ud800y\udfff",-Infinity,NaN,Infinity,"NaN"]}"#,
            r#"["\\udc80 is a text","\"NaN\" too"," \udc80\udc81\ud83d"]"#,
            r#"{"\udc80":1}"#,
        ] {
            assert!(serde_json::from_str::<Value>(json).is_err());
            assert_eq!(write(&read::<Value>(json).unwrap()), json);
        }
        let quoted = write(&Value::from(read::<Value>("[NaN]").unwrap().to_string()));
        assert!(serde_json::from_str::<String>(&quoted).is_ok(), "{quoted}");
        let forged = write(&Value::from(format!("{NUMBER}1, 2")));
        assert!(serde_json::from_str::<String>(&forged).is_ok(), "{forged}");
        let pair: Value = read(r#"["\ud83d\ude00", "\udc80"]"#).unwrap();
        assert_eq!(pair[0], "\u{1f600}");
        assert!(has_half(pair[1].as_str().unwrap(), true));
        assert!(!has_half(pair[1].as_str().unwrap(), false));
        assert!(!has_half(pair[0].as_str().unwrap(), true));
    }

    #[test]
    fn what_python_does_not_know_either_is_refused() {
        for json in
            ["", "{", "[N]", "[Infinit]", r#"["\u12"]"#, r#"["\"#, "[\"\\\u{e9}\"]", "[--NaN]"]
        {
            assert!(read::<Value>(json).is_err(), "{json}");
        }
    }
}
