//! Bytes of a picture from an `http(s)` URL, with bounds on time and size.
//!
//! Error texts carry no query string, credential or address: they end up in replies.

use std::time::Duration;

/// What a download may use.
#[derive(Debug, Clone, Copy)]
pub struct FetchLimits {
    /// Most bytes of a body.
    pub bytes: u64,
    /// Time to connect.
    pub connect: Duration,
    /// Time for the whole download.
    pub total: Duration,
    /// Redirects to follow.
    pub redirects: u32,
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            bytes: 32 << 20,
            connect: Duration::from_secs(10),
            total: Duration::from_secs(30),
            redirects: 5,
        }
    }
}

/// Why there are no bytes.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Neither `http` nor `https`, or no host.
    #[error("not an http or https URL")]
    BadUrl,
    /// The server answered with an error.
    #[error("the server answered {0}")]
    Status(u16),
    /// The body is larger than allowed.
    #[error("the picture is larger than the limit of {0} bytes")]
    TooLarge(u64),
    /// No answer in time.
    #[error("the server did not answer in time")]
    Timeout,
    /// No connection, or a broken one.
    #[error("the server cannot be reached or broke off")]
    Transport(#[source] Box<ureq::Error>),
}

impl FetchError {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status(status) => matches!(status, 408 | 429 | 500..),
            Self::Timeout | Self::Transport(_) => true,
            Self::BadUrl | Self::TooLarge(_) => false,
        }
    }
}

/// A client that keeps connections for the next picture.
pub struct Fetcher {
    agent: ureq::Agent,
    limits: FetchLimits,
}

impl Fetcher {
    /// A client with these limits.
    pub fn new(limits: FetchLimits) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(limits.connect))
            .timeout_global(Some(limits.total))
            .max_redirects(limits.redirects)
            .user_agent(concat!("florence/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), limits }
    }

    /// Downloads a URL.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    pub fn fetch(&self, url: &str) -> Result<Vec<u8>, FetchError> {
        if !(url.starts_with("http://") || url.starts_with("https://")) {
            return Err(FetchError::BadUrl);
        }
        let mut response = self.agent.get(url).call().map_err(|error| self.explain(error))?;
        response
            .body_mut()
            .with_config()
            .limit(self.limits.bytes)
            .read_to_vec()
            .map_err(|error| self.explain(error))
    }

    fn explain(&self, error: ureq::Error) -> FetchError {
        match error {
            ureq::Error::StatusCode(status) => FetchError::Status(status),
            ureq::Error::BodyExceedsLimit(_) => FetchError::TooLarge(self.limits.bytes),
            ureq::Error::Timeout(_) => FetchError::Timeout,
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => FetchError::BadUrl,
            other => FetchError::Transport(Box::new(other)),
        }
    }
}
