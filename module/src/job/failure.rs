//! Why an attempt gave no answer, in the words that the job's `error` shows.
//!
//! The words are for clients: what went on inside is for the log.

use florence_engine::{
    Error,
    fetch::{FetchError, TlsFault},
    image::ImageError,
};

use super::Fields;
use crate::{
    figures::{self, Counter},
    source::{self, SourceError},
};

/// The first word of an error, by which programs tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    Fetch,
    Denied,
    Image,
    Prompt,
    Timeout,
    Crash,
    Internal,
    /// The hash asks for what SUBMIT would refuse.
    Invalid,
    NoModel,
}

impl Code {
    pub(crate) const ALL: [Self; 9] = [
        Self::Fetch,
        Self::Denied,
        Self::Image,
        Self::Prompt,
        Self::Timeout,
        Self::Crash,
        Self::Internal,
        Self::Invalid,
        Self::NoModel,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fetch => "FETCH",
            Self::Denied => "DENIED",
            Self::Image => "IMAGE",
            Self::Prompt => "PROMPT",
            Self::Timeout => "TIMEOUT",
            Self::Crash => "CRASH",
            Self::Internal => "INTERNAL",
            Self::Invalid => "INVALID",
            Self::NoModel => "NOMODEL",
        }
    }

    /// Counts the jobs that failed so.
    pub(crate) fn counter(self) -> &'static Counter {
        match self {
            Self::Fetch => &figures::FAILED_FETCH,
            Self::Denied => &figures::FAILED_DENIED,
            Self::Image => &figures::FAILED_IMAGE,
            Self::Prompt => &figures::FAILED_PROMPT,
            Self::Timeout => &figures::FAILED_TIMEOUT,
            Self::Crash => &figures::FAILED_CRASH,
            Self::Internal => &figures::FAILED_INTERNAL,
            Self::Invalid => &figures::FAILED_INVALID,
            Self::NoModel => &figures::FAILED_NOMODEL,
        }
    }
}

/// Why an attempt gave no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) is_retryable: bool,
}

impl Failure {
    pub(crate) fn permanent(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), is_retryable: false }
    }

    pub(crate) fn internal() -> Self {
        Self::permanent(Code::Internal, "internal error")
    }

    pub(crate) fn timeout() -> Self {
        Self { is_retryable: true, ..Self::permanent(Code::Timeout, "the attempt took too long") }
    }

    pub(super) fn fields(&self) -> Fields {
        vec![
            ("error_code", self.code.name().into()),
            ("error", self.message.clone().into()),
            ("error_retryable", i64::from(self.is_retryable).to_string().into()),
        ]
    }
}

/// Errors that are nobody's but ours have no words for clients.
impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let code = match error {
            Error::Image(ImageError::NoRoom(_)) => return Self::timeout(),
            Error::Fetch(error) => return error.into(),
            // There may be room again by then, or another engine takes it.
            Error::Device(_) => {
                let failure = Self::permanent(Code::Internal, error.to_string());
                return Self { is_retryable: true, ..failure };
            }
            Error::Prompt(_) => Code::Prompt,
            Error::Image(_) => Code::Image,
            _ => return Self::internal(),
        };
        Self::permanent(code, error.to_string())
    }
}

/// Where a setting decides, the words name it.
impl From<&FetchError> for Failure {
    fn from(error: &FetchError) -> Self {
        match error {
            FetchError::Denied(rule) => Self::permanent(Code::Denied, source::denial(*rule)),
            FetchError::DeniedRedirect(aim) => {
                let Self { message, .. } = Self::from(&**aim);
                Self::permanent(Code::Denied, format!("{message} (after a redirect)"))
            }
            FetchError::BadUrl | FetchError::BadObject | FetchError::BadRedirect => {
                Self::permanent(Code::Denied, error.to_string())
            }
            FetchError::Tls(TlsFault::UnknownAuthority | TlsFault::SelfSigned) => {
                let message = format!("{error}; florence.ca-file can name others to trust");
                Self::permanent(Code::Fetch, message)
            }
            _ => Self {
                is_retryable: error.is_transient(),
                ..Self::permanent(Code::Fetch, error.to_string())
            },
        }
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Fetch(error) => Self::from(&error),
            SourceError::NotBelowRoot => Self::permanent(Code::Denied, error.to_string()),
            SourceError::Missing
            | SourceError::Unreadable
            | SourceError::NotRegular
            | SourceError::TooLarge(_) => Self::permanent(Code::Fetch, error.to_string()),
        }
    }
}
