//! Bytes of a picture from an `http(s)` URL, with bounds on time and size.
//!
//! Error texts carry no query string, credential or address: they end up in replies.

mod guard;

use std::time::{Duration, Instant};

use ureq::{
    http::{StatusCode, header::LOCATION},
    unversioned::{resolver::DefaultResolver, transport::DefaultConnector},
};
use url::Url;

pub use guard::AllowedNetworks;
use guard::{GuardedResolver, NotPublic};

/// Longest URL, of redirects too.
const MAX_URL: usize = 8192;

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
    /// Neither `http` nor `https`, no host, or too long.
    #[error("not an http or https URL")]
    BadUrl,
    /// The host's address is not public, nor in a network that is allowed.
    #[error("the host's address is not allowed")]
    Denied,
    /// Too many redirects, or one from `https` to `http`.
    #[error("redirected too often, or from https to http")]
    Redirect,
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
            Self::BadUrl | Self::Denied | Self::Redirect | Self::TooLarge(_) => false,
        }
    }
}

/// A client that keeps connections for the next picture.
pub struct Fetcher {
    agent: ureq::Agent,
    limits: FetchLimits,
}

impl Fetcher {
    /// A client with these limits, for public addresses and the networks that are allowed.
    pub fn new(limits: FetchLimits, allowed: AllowedNetworks) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(limits.connect))
            // Every redirect is checked here.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // A proxy would resolve names itself, past the check.
            .proxy(None)
            .user_agent(concat!("florence/", env!("CARGO_PKG_VERSION")))
            .build();
        let resolver = GuardedResolver { system: DefaultResolver::default(), allowed };
        let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), resolver);
        Self { agent, limits }
    }

    /// Downloads a URL.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    pub fn fetch(&self, url: &str) -> Result<Vec<u8>, FetchError> {
        let deadline = Instant::now() + self.limits.total;
        let mut url = parse(url)?;
        for _ in 0..=self.limits.redirects {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FetchError::Timeout);
            }
            let request = self.agent.get(url.as_str()).config().timeout_global(Some(left)).build();
            let mut response = request.call().map_err(|error| self.explain(error))?;
            if let Some(next) = redirect(&response, &url)? {
                url = next;
                continue;
            }
            let body = response.body_mut().with_config().limit(self.limits.bytes);
            return body.read_to_vec().map_err(|error| self.explain(error));
        }
        Err(FetchError::Redirect)
    }

    fn explain(&self, error: ureq::Error) -> FetchError {
        match error {
            ureq::Error::StatusCode(status) => FetchError::Status(status),
            ureq::Error::BodyExceedsLimit(_) => FetchError::TooLarge(self.limits.bytes),
            ureq::Error::Timeout(_) => FetchError::Timeout,
            ureq::Error::Other(other) if other.is::<NotPublic>() => FetchError::Denied,
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => FetchError::BadUrl,
            other => FetchError::Transport(Box::new(other)),
        }
    }
}

/// A URL in the one spelling that hosts and addresses have for the WHATWG: what is checked is what
/// is connected to.
fn parse(text: &str) -> Result<Url, FetchError> {
    let url = Url::parse(text).ok().filter(|_| text.len() <= MAX_URL);
    let is_http = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    url.filter(is_http).ok_or(FetchError::BadUrl)
}

/// Where a response sends us on to. Credentials of the URL go to its own host only.
fn redirect(
    response: &ureq::http::Response<ureq::Body>,
    from: &Url,
) -> Result<Option<Url>, FetchError> {
    const MOVED: [StatusCode; 5] = [
        StatusCode::MOVED_PERMANENTLY,
        StatusCode::FOUND,
        StatusCode::SEE_OTHER,
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    if !MOVED.contains(&response.status()) {
        return Ok(None);
    }
    let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
    let joined =
        location.and_then(|location| from.join(location).ok()).ok_or(FetchError::BadUrl)?;
    let next = parse(joined.as_str())?;
    if from.scheme() == "https" && next.scheme() == "http" {
        return Err(FetchError::Redirect);
    }
    Ok(Some(next))
}
