//! Numbers of options, and what they may be.

use std::{fmt::Display, ops::RangeInclusive, str::FromStr};

/// Reads a number within a range.
pub(crate) fn within<T: FromStr + PartialOrd + Display + Clone>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| format!("a number from {} to {}", range.start(), range.end()))
    }
}
