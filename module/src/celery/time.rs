//! Times as Python writes and reads them.

use jiff::{
    Timestamp,
    civil::Time,
    fmt::temporal::Pieces,
    tz::{Offset, TimeZone},
};

/// A time as milliseconds since 1970.
pub(crate) fn unix_ms(iso: &str) -> Option<i64> {
    timestamp(iso).map(Timestamp::as_millisecond)
}

/// A time, as [`now`] writes it.
pub(crate) fn normal(time: &str) -> Option<String> {
    timestamp(time).map(iso)
}

/// A time as a worker reads it: one without an offset is in UTC, whatever the project's timezone.
fn timestamp(iso: &str) -> Option<Timestamp> {
    const DATE: usize = "2026-11-26".len();
    // Any letter may stand between date and time.
    let is_spaced = iso.as_bytes().get(4) == Some(&b'-');
    let between = iso.get(DATE..).filter(|_| is_spaced).and_then(|rest| rest.chars().next());
    let iso = match between {
        Some(letter) => format!("{}T{}", &iso[..DATE], &iso[DATE + letter.len_utf8()..]),
        None => iso.to_owned(),
    };
    // Names of zones are no part of ISO 8601.
    let pieces = Pieces::parse(&iso).ok().filter(|_| !iso.contains('['))?;
    let offset = pieces.to_numeric_offset().unwrap_or(Offset::UTC);
    let time = pieces.date().to_datetime(pieces.time().unwrap_or(Time::midnight()));
    TimeZone::fixed(offset).to_timestamp(time).ok()
}

pub(crate) fn now() -> String {
    in_seconds(0.0)
}

/// The time in so many seconds.
pub(crate) fn in_seconds(seconds: f64) -> String {
    let delay = jiff::SignedDuration::try_from_secs_f64(seconds).unwrap_or_default();
    iso(Timestamp::now().checked_add(delay).unwrap_or(Timestamp::MAX))
}

/// As Python's `isoformat` writes it.
fn iso(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_python() {
        let now = now();
        assert!(now.ends_with("+00:00") && now.len() == 32, "{now}");
        assert!(unix_ms(&now).is_some());
        for (iso, expected) in [
            ("1970-01-01T02:00:01+02:00", Some(1000)),
            ("1970-01-01T00:00:01.5", Some(1500)),
            ("1970-01-01 00:00", Some(0)),
            ("1970-01-01x00:00:02Z", Some(2000)),
            ("1970-01-02", Some(86_400_000)),
            ("19700101T000003", Some(3000)),
            ("1970-01-01T00:00-0030", Some(1_800_000)),
            ("tomorrow", None),
            ("", None),
            ("1970-01-01T00:00:01[Europe/Berlin]", None),
            ("1970-\u{e9}\u{e9}\u{e9}\u{e9}", None),
        ] {
            assert_eq!(unix_ms(iso), expected, "{iso}");
        }
    }
}
