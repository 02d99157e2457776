//! Why an attempt gave no answer, in the words that the job's `error` shows.

use florence_engine::{Error, fetch::FetchError};

use crate::job::Fields;

/// Why an attempt gave no answer, as the job's `error` shows it.
pub(crate) struct Failure {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) is_retryable: bool,
}

impl Failure {
    pub(crate) fn permanent(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), is_retryable: false }
    }

    pub(crate) fn internal() -> Self {
        Self::permanent("INTERNAL", "internal error")
    }

    pub(crate) fn timeout() -> Self {
        Self { is_retryable: true, ..Self::permanent("TIMEOUT", "the attempt took too long") }
    }

    pub(crate) fn fields(&self) -> Fields {
        vec![
            ("error_code", self.code.into()),
            ("error", self.message.clone().into()),
            ("error_retryable", i64::from(self.is_retryable).to_string().into()),
        ]
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (code, is_retryable) = match &error {
            Error::Prompt(_) => ("PROMPT", false),
            Error::Image(_) => ("IMAGE", false),
            Error::Fetch(
                FetchError::BadUrl
                | FetchError::BadObject
                | FetchError::Denied
                | FetchError::DeniedHost,
            ) => ("DENIED", false),
            Error::Fetch(fetch) => ("FETCH", fetch.is_transient()),
            _ => return Self::internal(),
        };
        Self { code, message: error.to_string(), is_retryable }
    }
}
