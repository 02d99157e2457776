//! Bytes of a picture from `http(s)`, `gs` and `s3` URLs, with bounds on time, speed and size.
//!
//! Error texts carry no query string, credential or address: they end up in replies.

mod cloud;
mod guard;
mod interrupt;
#[cfg(test)]
mod tests;

use std::{
    io::Read,
    sync::Arc,
    time::{Duration, Instant},
};

use ureq::{
    Agent, RequestBuilder,
    http::{StatusCode, header::LOCATION},
    unversioned::resolver::{DefaultResolver, Resolver},
};
use url::Url;

pub use cloud::Buckets;
use cloud::Cloud;
pub use guard::{AccessRules, Hosts, Networks};
use guard::{GuardedResolver, NotPublic};
use interrupt::{Interrupted, Watched};

use crate::Stop;

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
    /// Time to the first byte of an answer.
    pub first_byte: Duration,
    /// Least bytes a second, after [`SPEED_GRACE`].
    pub speed: u64,
    /// Whose download it is: nobody's look-ups keep those of others from theirs.
    pub asker: u64,
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            bytes: 32 << 20,
            connect: Duration::from_secs(10),
            total: Duration::from_secs(30),
            redirects: 5,
            first_byte: Duration::from_secs(20),
            speed: 1024,
            asker: 0,
        }
    }
}

/// Why there are no bytes.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Neither `http` nor `https`, no host, or too long.
    #[error("not an http or https URL")]
    BadUrl,
    /// A host that the settings deny.
    #[error("the host is not allowed")]
    DeniedHost,
    /// A bucket's name or object is malformed.
    #[error("not a URL of a bucket's object")]
    BadObject,
    /// There are no credentials, or the token server refused them.
    #[error("the server has no valid credentials for the bucket")]
    Credentials,
    /// No access token for the bucket, for now.
    #[error("the server that gives access to the bucket does not answer as it should")]
    NoToken(#[source] Box<FetchError>),
    /// Slower than allowed.
    #[error("the server sent too slowly")]
    TooSlow,
    /// The host's address is not public, nor in a network that is allowed.
    #[error("the host's address is not allowed")]
    Denied,
    /// A redirect to what is not allowed.
    #[error(transparent)]
    DeniedRedirect(Box<FetchError>),
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
    /// The caller asked for the download to stop.
    #[error("the download was interrupted")]
    Interrupted,
    /// No connection, or a broken one.
    #[error("the server cannot be reached or broke off")]
    Transport(#[source] Box<ureq::Error>),
}

impl FetchError {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status(status) => matches!(status, 408 | 429 | 500..),
            Self::Timeout
            | Self::Transport(_)
            | Self::TooSlow
            | Self::NoToken(_)
            | Self::Interrupted => true,
            Self::BadUrl
            | Self::BadObject
            | Self::Credentials
            | Self::Denied
            | Self::DeniedHost
            | Self::DeniedRedirect(_)
            | Self::Redirect
            | Self::TooLarge(_) => false,
        }
    }
}

/// Time before the speed of a download counts.
const SPEED_GRACE: Duration = Duration::from_secs(5);

/// A client that keeps connections for the next picture.
pub struct Fetcher {
    agent: Agent,
    rules: Arc<AccessRules>,
    cloud: Cloud,
}

impl Fetcher {
    /// A client with these rules, which reads these buckets with the credentials that
    /// the environment names.
    pub fn new(rules: AccessRules, buckets: Buckets) -> Self {
        Self::with_resolver(rules, buckets, DefaultResolver::default())
    }

    fn with_resolver(rules: AccessRules, buckets: Buckets, resolver: impl Resolver) -> Self {
        let rules = Arc::new(rules);
        let resolver =
            GuardedResolver { system: Watched::new(resolver), rules: Arc::clone(&rules) };
        let agent = Agent::with_parts(config(), interrupt::connector(), resolver);
        // Where the operator's own environment points to may be anywhere.
        let resolver = Watched::new(DefaultResolver::default());
        let trusted = Agent::with_parts(config(), interrupt::connector(), resolver);
        Self { agent, rules, cloud: Cloud::from_env(buckets, trusted) }
    }

    /// Whether a host may be asked for pictures, as far as its name tells.
    pub fn permits_host(&self, host: &str) -> bool {
        self.rules.permit_host(host)
    }

    /// Downloads a URL, unless it is told to stop.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    pub fn fetch(
        &self,
        url: &str,
        limits: &FetchLimits,
        stop: &Stop,
    ) -> Result<Vec<u8>, FetchError> {
        interrupt::watching(stop, limits.asker, || self.fetch_watched(url, limits))
    }

    fn fetch_watched(&self, url: &str, limits: &FetchLimits) -> Result<Vec<u8>, FetchError> {
        let download = Download { limits, deadline: Instant::now() + limits.total };
        if let Some(object) = self.cloud.object(url, &download) {
            let object = object?;
            let agent = if object.is_trusted { &self.cloud.agent } else { &self.agent };
            let response = download.get(agent, &object.url, object.token.as_deref())?;
            if !response.status().is_success() {
                return Err(FetchError::Status(response.status().as_u16()));
            }
            return download.read(response);
        }
        let mut url = parse(url)?;
        for hop in 0..=limits.redirects {
            let response = self.get(&download, &url).map_err(|error| match error {
                FetchError::Denied | FetchError::DeniedHost if hop > 0 => {
                    FetchError::DeniedRedirect(Box::new(error))
                }
                error => error,
            })?;
            if let Some(next) = redirect(&response, &url)? {
                url = next;
                continue;
            }
            return download.read(response);
        }
        Err(FetchError::Redirect)
    }

    fn get(&self, download: &Download<'_>, url: &Url) -> Result<Response, FetchError> {
        if !self.permits_host(url.host_str().unwrap_or_default()) {
            return Err(FetchError::DeniedHost);
        }
        download.get(&self.agent, url, None)
    }
}

/// One download, redirects and all.
struct Download<'a> {
    limits: &'a FetchLimits,
    deadline: Instant,
}

impl Download<'_> {
    fn get(&self, agent: &Agent, url: &Url, token: Option<&str>) -> Result<Response, FetchError> {
        let mut request = self.bounded(agent.get(url.as_str()))?;
        if let Some(token) = token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request.call().map_err(|error| self.explain(error))
    }

    /// A request that ends with the download's time, its body included.
    fn bounded<B>(&self, request: RequestBuilder<B>) -> Result<RequestBuilder<B>, FetchError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(FetchError::Timeout);
        }
        Ok(request
            .config()
            .timeout_global(Some(left))
            .timeout_connect(Some(self.limits.connect))
            .timeout_recv_response(Some(self.limits.first_byte))
            .build())
    }

    fn read(&self, mut response: Response) -> Result<Vec<u8>, FetchError> {
        let limit = self.limits.bytes;
        // One byte more tells a body that is too large from one that just fits.
        let mut body = response.body_mut().with_config().limit(limit + 1).reader();
        let (start, mut bytes, mut chunk) = (Instant::now(), Vec::new(), vec![0; 64 << 10]);
        loop {
            let count = body.read(&mut chunk).map_err(|error| self.explain(error.into()))?;
            if count == 0 {
                return Ok(bytes);
            }
            bytes.extend_from_slice(&chunk[..count]);
            if bytes.len() as u64 > limit {
                return Err(FetchError::TooLarge(limit));
            }
            let time = start.elapsed();
            if time > SPEED_GRACE && (bytes.len() as u64) < self.limits.speed * time.as_secs() {
                return Err(FetchError::TooSlow);
            }
        }
    }

    fn explain(&self, error: ureq::Error) -> FetchError {
        match error {
            ureq::Error::StatusCode(status) => FetchError::Status(status),
            // What reading a body meets comes wrapped.
            ureq::Error::Io(error) if is_wrapped(&error) => match error.downcast() {
                Ok(inner) => self.explain(inner),
                Err(error) => FetchError::Transport(Box::new(error.into())),
            },
            ureq::Error::BodyExceedsLimit(_) => FetchError::TooLarge(self.limits.bytes),
            ureq::Error::Timeout(_) => FetchError::Timeout,
            ureq::Error::Other(other) if other.is::<NotPublic>() => FetchError::Denied,
            ureq::Error::Other(other) if other.is::<Interrupted>() => FetchError::Interrupted,
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => FetchError::BadUrl,
            other => FetchError::Transport(Box::new(other)),
        }
    }
}

type Response = ureq::http::Response<ureq::Body>;

fn config() -> ureq::config::Config {
    Agent::config_builder()
        // Every redirect is checked here.
        .max_redirects(0)
        .max_redirects_will_error(false)
        // A proxy would resolve names itself, past the check.
        .proxy(None)
        .user_agent(concat!("florence/", env!("CARGO_PKG_VERSION")))
        .build()
}

fn is_wrapped(error: &std::io::Error) -> bool {
    error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<ureq::Error>)
}

/// A URL in the one spelling that hosts and addresses have for the WHATWG: what is checked is what
/// is connected to.
fn parse(text: &str) -> Result<Url, FetchError> {
    let url = Url::parse(text).ok().filter(|_| text.len() <= MAX_URL);
    let is_http = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    url.filter(is_http).ok_or(FetchError::BadUrl)
}

/// Where a response sends us on to. Credentials of the URL go to its own host only.
fn redirect(response: &Response, from: &Url) -> Result<Option<Url>, FetchError> {
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
