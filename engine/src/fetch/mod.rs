//! Bytes of a picture from `http(s)`, `gs` and `s3` URLs, with bounds on time, speed and size.
//!
//! Error texts carry no query string, credential or address: they end up in replies.
//!
//! - `address`: how a URL is read, and where redirects lead
//! - `guard`: which hosts and addresses may be asked
//! - `interrupt`: connections that end when told to
//! - `tls`: whom secure connections trust
//! - `coding`: what servers do to a body's bytes
//! - `cloud`: buckets
//! - `error`: why there are no bytes

mod address;
mod cloud;
mod coding;
mod error;
mod guard;
mod interrupt;
#[cfg(test)]
mod tests;
mod tls;

use std::{
    io::Read,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ureq::{
    Agent, Proxy, RequestBuilder,
    http::StatusCode,
    unversioned::{
        resolver::{DefaultResolver, Resolver},
        transport::{ConnectProxyConnector, Connector, Transport},
    },
};
use url::Url;

use address::{credentials, parse, redirect, target};
pub use address::{file_of_url, spelling};
pub use cloud::{Buckets, Listing};
use cloud::{Cloud, Object};
pub use error::{FetchError, Phase, Rule};
use guard::GuardedResolver;
pub use guard::{AccessRules, Hosts, Networks, canonical_host};
use interrupt::Watched;
use tls::Secure;
pub use tls::{Authorities, TlsFault};

use crate::Stop;

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
    /// Least bytes a second, after a few.
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
            redirects: 30,
            first_byte: Duration::from_secs(20),
            speed: 1024,
            asker: 0,
        }
    }
}

/// A client that keeps connections for the next picture.
pub struct Fetcher {
    agent: Agent,
    rules: Arc<AccessRules>,
    cloud: Cloud,
}

impl Fetcher {
    /// A client with these rules, which reads these buckets with the credentials that
    /// the environment names, and trusts these authorities too.
    pub fn new(rules: AccessRules, buckets: Buckets, authorities: &Authorities) -> Self {
        Self::with_resolver(rules, buckets, authorities, DefaultResolver::default())
    }

    fn with_resolver(
        rules: AccessRules,
        buckets: Buckets,
        authorities: &Authorities,
        resolver: impl Resolver,
    ) -> Self {
        let rules = Arc::new(rules);
        let resolver =
            GuardedResolver { system: Watched::new(resolver), rules: Arc::clone(&rules) };
        let agent = Agent::with_parts(config(), connector(authorities), resolver);
        // Where the operator's own environment points to may be anywhere.
        let resolver = Watched::new(DefaultResolver::default());
        let trusted = Agent::with_parts(config(), connector(authorities), resolver);
        Self { agent, rules, cloud: Cloud::from_env(buckets, trusted) }
    }

    /// The rule by which a host may not be asked for pictures, as far as its name tells.
    pub fn rule_against(&self, host: &str) -> Option<Rule> {
        self.rules.rule_against(host)
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
            return self.object(&download, &object?);
        }
        let mut url = parse(url)?;
        for hop in 0..=limits.redirects {
            let response = self.get(&download, &url).map_err(|error| match error {
                FetchError::Denied(_) if hop > 0 => FetchError::DeniedRedirect(Box::new(error)),
                error => error,
            })?;
            if let Some(next) = redirect(&response, &url)? {
                url = next;
                continue;
            }
            return download.read(response);
        }
        Err(FetchError::Redirects(limits.redirects))
    }

    /// A page of what is in a bucket below a prefix, `s3://bucket/folder/`: the first one, or that
    /// which a page before it names.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    pub fn list(
        &self,
        prefix: &str,
        page: Option<&str>,
        limits: &FetchLimits,
        stop: &Stop,
    ) -> Result<Listing, FetchError> {
        interrupt::watching(stop, limits.asker, || {
            let download = Download { limits, deadline: Instant::now() + limits.total };
            let (prefix, object) = self.cloud.listing(prefix, page, &download)?;
            prefix.read(&self.object(&download, &object)?)
        })
    }

    fn object(&self, download: &Download<'_>, object: &Object) -> Result<Vec<u8>, FetchError> {
        let agent = if object.is_trusted { &self.cloud.agent } else { &self.agent };
        let response = download.get(agent, &object.url, object.token.as_deref())?;
        if !response.status().is_success() {
            return Err(FetchError::Status(response.status().as_u16()));
        }
        download.read(response)
    }

    fn get(&self, download: &Download<'_>, url: &Url) -> Result<Response, FetchError> {
        match self.rule_against(url.host_str().unwrap_or_default()) {
            Some(rule) => Err(FetchError::Denied(rule)),
            None => download.get(&self.agent, url, None),
        }
    }
}

/// One download, redirects and all.
struct Download<'a> {
    limits: &'a FetchLimits,
    deadline: Instant,
}

impl Download<'_> {
    /// Asks for a URL. A kept connection that the server has closed meanwhile is no answer: then a
    /// new one is made.
    fn get(&self, agent: &Agent, url: &Url, token: Option<&str>) -> Result<Response, FetchError> {
        let basic = || credentials(url).map(|it| format!("Basic {}", BASE64_STANDARD.encode(it)));
        let authorization = token.map(|token| format!("Bearer {token}")).or_else(basic);
        let request = || {
            let request = self.bounded(agent.get(target(url).as_str()))?;
            Ok(match &authorization {
                Some(authorization) => request.header("Authorization", authorization),
                None => request,
            })
        };
        interrupt::begin();
        let mut answer = request()?.call();
        if answer.as_ref().is_err_and(error::is_closed) && !interrupt::has_connected() {
            answer = request()?.config().max_idle_age(Duration::ZERO).build().call();
        }
        answer.map_err(FetchError::of)
    }

    /// A request that ends with the download's time, its body included.
    fn bounded<B>(&self, request: RequestBuilder<B>) -> Result<RequestBuilder<B>, FetchError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(FetchError::Timeout(interrupt::phase()));
        }
        Ok(request
            .config()
            .timeout_global(Some(left))
            .timeout_connect(Some(self.limits.connect))
            .timeout_recv_response(Some(self.limits.first_byte))
            .build())
    }

    fn read(&self, response: Response) -> Result<Vec<u8>, FetchError> {
        let (head, body) = response.into_parts();
        interrupt::enter(Phase::Body);
        let mut body = coding::decoded(&head.headers, body.into_reader(), self.limits.bytes)
            .map_err(|error| FetchError::of(error.into()))?;
        let (mut pace, mut bytes) = (Pace::new(self.limits.speed), Vec::new());
        let mut chunk = vec![0; 64 << 10];
        loop {
            let count = receive(&mut *body, &mut chunk)?;
            bytes.extend_from_slice(&chunk[..count]);
            match count {
                // What has no body has no picture; an error was told of before.
                0 if bytes.is_empty() && head.status != StatusCode::OK => {
                    return Err(FetchError::Status(head.status.as_u16()));
                }
                0 => return Ok(bytes),
                _ if pace.is_too_slow(count) => return Err(FetchError::TooSlow),
                _ => {}
            }
        }
    }
}

/// Reads some of a body, as `Read` does.
///
/// # Errors
///
/// See [`FetchError`].
pub fn receive(body: &mut dyn Read, chunk: &mut [u8]) -> Result<usize, FetchError> {
    interrupt::enter(Phase::Body);
    body.read(chunk).map_err(|error| FetchError::of(error.into()))
}

/// Whether bytes come as fast as they must, on average; at first they may be slow.
pub struct Pace {
    start: Instant,
    least: u64,
    bytes: u64,
}

impl Pace {
    /// So many bytes a second, from now on.
    pub fn new(least: u64) -> Self {
        Self { start: Instant::now(), least, bytes: 0 }
    }

    /// Counts bytes that have come.
    pub fn is_too_slow(&mut self, count: usize) -> bool {
        /// Time before the speed counts.
        const GRACE: Duration = Duration::from_secs(5);
        self.bytes += count as u64;
        let time = self.start.elapsed();
        time > GRACE && self.bytes < self.least * time.as_secs()
    }
}

/// A client for what the operator asks for: any host, by the proxies of the environment.
pub struct Client(Agent);

/// Without a byte for so long, a client of the operator's gives up.
const SILENCE: Duration = Duration::from_secs(15);

impl Client {
    /// A client that trusts these authorities too.
    pub fn new(authorities: &Authorities) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(Proxy::try_from_env())
            .timeout_resolve(Some(SILENCE))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .accept_encoding("identity")
            .user_agent(USER_AGENT)
            .build();
        let connector = ConnectProxyConnector::default().chain(connector(authorities));
        Self(Agent::with_parts(config, connector, Watched::new(DefaultResolver::default())))
    }

    /// Asks for a URL; an answer that tells of an error is an answer.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    pub fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response, FetchError> {
        interrupt::begin();
        let request = headers
            .iter()
            .fold(self.0.get(url), |request, (name, value)| request.header(*name, *value));
        request.call().map_err(FetchError::of)
    }
}

/// An answer's head, and its body to read.
pub type Response = ureq::http::Response<ureq::Body>;

const USER_AGENT: &str = concat!("florence/", env!("CARGO_PKG_VERSION"));

/// TCP, watched, then TLS.
fn connector<In: Transport>(authorities: &Authorities) -> impl Connector<In> + use<In> {
    interrupt::Connect.chain(Secure::new(authorities.clone()))
}

fn config() -> ureq::config::Config {
    Agent::config_builder()
        // Every redirect is checked here.
        .max_redirects(0)
        .max_redirects_will_error(false)
        // A proxy would resolve names itself, past the check.
        .proxy(None)
        .accept_encoding(coding::ACCEPTED)
        .user_agent(USER_AGENT)
        .build()
}
