//! Kinds of settings: each parses a text once, and gives the value from then on.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::RwLock;

/// When a setting can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    AtStart,
    AnyTime,
}

/// What the table says of a setting.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) name: &'static str,
    pub(crate) default: &'static str,
    pub(crate) change: Change,
    #[cfg_attr(not(test), expect(dead_code, reason = "for the documentation: a test compares"))]
    pub(crate) meaning: &'static str,
}

/// A setting of any kind.
pub(crate) trait Setting: Sync {
    fn about(&self) -> &About;

    /// What a value has to be: "is not ..." in messages.
    fn allowed(&self) -> String;

    /// Takes a value over; the error says why not.
    fn set(&self, text: &str) -> Result<(), String>;

    /// The value, as CONFIG GET shows it.
    fn text(&self) -> String;

    fn can_change(&self) -> bool {
        self.about().change == Change::AnyTime
    }

    fn refuse(&self, text: &str) -> String {
        const MOST: usize = 100;
        let shown: String = text.chars().take(MOST).collect();
        let shown = shown.escape_debug();
        format!("florence.{}: '{shown}' is not {}", self.about().name, self.allowed())
    }
}

/// A whole number in a range. Where the name says bytes, with the units of redis.conf too.
pub(crate) struct Number {
    about: About,
    least: u64,
    most: u64,
    value: AtomicU64,
}

impl Number {
    pub(super) const fn new(about: About, least: u64, most: u64) -> Self {
        Self { about, least, most, value: AtomicU64::new(0) }
    }

    pub(crate) fn get(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }

    /// As [`Self::get`], for sizes.
    pub(crate) fn size(&self) -> usize {
        usize::try_from(self.get()).unwrap_or(usize::MAX)
    }

    /// As [`Self::get`], for arithmetic on fields of jobs.
    pub(crate) fn signed(&self) -> i64 {
        i64::try_from(self.get()).unwrap_or(i64::MAX)
    }

    /// As [`Self::get`], for settings in milliseconds.
    pub(crate) fn milliseconds(&self) -> Duration {
        Duration::from_millis(self.get())
    }

    fn parse(&self, text: &str) -> Option<u64> {
        if !self.about.name.ends_with("-bytes") {
            return text.parse().ok();
        }
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" => 1000,
            "kb" => 1 << 10,
            "m" => 1_000_000,
            "mb" => 1 << 20,
            "g" => 1_000_000_000,
            "gb" => 1 << 30,
            _ => return None,
        };
        digits.parse::<u64>().ok()?.checked_mul(unit)
    }
}

impl Setting for Number {
    fn about(&self) -> &About {
        &self.about
    }

    fn allowed(&self) -> String {
        format!("a whole number from {} to {}", self.least, self.most)
    }

    fn set(&self, text: &str) -> Result<(), String> {
        let number = self.parse(text).filter(|number| (self.least..=self.most).contains(number));
        self.value.store(number.ok_or_else(|| self.refuse(text))?, Ordering::Relaxed);
        Ok(())
    }

    fn text(&self) -> String {
        self.get().to_string()
    }
}

/// Yes or no.
pub(crate) struct Flag {
    about: About,
    value: AtomicBool,
}

impl Flag {
    pub(super) const fn new(about: About) -> Self {
        Self { about, value: AtomicBool::new(false) }
    }

    pub(crate) fn get(&self) -> bool {
        self.value.load(Ordering::Relaxed)
    }

    /// Sets it; the value that it had.
    pub(crate) fn swap(&self, value: bool) -> bool {
        self.value.swap(value, Ordering::Relaxed)
    }
}

impl Setting for Flag {
    fn about(&self) -> &About {
        &self.about
    }

    fn allowed(&self) -> String {
        "yes or no".to_owned()
    }

    fn set(&self, text: &str) -> Result<(), String> {
        let value = match text.to_ascii_lowercase().as_str() {
            "yes" => true,
            "no" => false,
            _ => return Err(self.refuse(text)),
        };
        self.swap(value);
        Ok(())
    }

    fn text(&self) -> String {
        if self.get() { "yes" } else { "no" }.to_owned()
    }
}

/// A text and what it is parsed to.
pub(crate) struct Parsed<T> {
    about: About,
    allowed: &'static str,
    value: RwLock<Option<(String, Arc<T>)>>,
}

impl<T> Parsed<T> {
    pub(super) const fn new(about: About, allowed: &'static str) -> Self {
        Self { about, allowed, value: RwLock::new(None) }
    }
}

impl<T: Default> Parsed<T> {
    pub(crate) fn get(&self) -> Arc<T> {
        self.value.read().as_ref().map(|(_, value)| Arc::clone(value)).unwrap_or_default()
    }
}

impl<T: FromStr + Send + Sync> Setting for Parsed<T> {
    fn about(&self) -> &About {
        &self.about
    }

    fn allowed(&self) -> String {
        self.allowed.to_owned()
    }

    fn set(&self, text: &str) -> Result<(), String> {
        let value = text.parse().map_err(|_why| self.refuse(text))?;
        *self.value.write() = Some((text.to_owned(), Arc::new(value)));
        Ok(())
    }

    fn text(&self) -> String {
        self.value.read().as_ref().map(|(text, _)| text.clone()).unwrap_or_default()
    }
}
