//! Objects in buckets, as the HTTP requests that read them: Google Cloud Storage and S3.
//!
//! Anyone who may submit a job may name a bucket, so the server's own credentials are used only
//! for the buckets that the operator lists; all others are read as the public reads them.

use std::{
    env,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rusty_s3::{
    Bucket, Credentials, S3Action, UrlStyle,
    actions::{GetObject, ListObjectsV2},
};
use serde::Deserialize;
use ureq::Agent;
use url::Url;

use super::{Download, FetchError, Response};

/// The buckets that are read with the server's credentials: `gs://one s3://two`, or `s3://*`.
#[derive(Debug, Clone, Default)]
pub struct Buckets(Vec<String>);

impl std::str::FromStr for Buckets {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bucket = |word: &str| {
            let (scheme, name) = word.split_once("://")?;
            let scheme = scheme.to_ascii_lowercase();
            let is_bucket = ["gs", "s3"].contains(&scheme.as_str()) && !name.is_empty();
            (is_bucket && !name.contains('/')).then(|| format!("{scheme}://{name}"))
        };
        let bucket = |word| {
            bucket(word).ok_or_else(|| format!("'{word}' is no bucket: gs://NAME or s3://NAME"))
        };
        text.split_whitespace().map(bucket).collect::<Result<_, _>>().map(Self)
    }
}

impl Buckets {
    fn contains(&self, scheme: &str, name: &str) -> bool {
        let is_it = |known: &String| {
            let known = known.strip_prefix(scheme).and_then(|known| known.strip_prefix("://"));
            known.is_some_and(|known| known == "*" || known == name)
        };
        self.0.iter().any(is_it)
    }
}

/// How an object is read.
pub(super) struct Object {
    pub(super) url: Url,
    pub(super) token: Option<String>,
    /// Whether the operator's environment chose the host.
    pub(super) is_trusted: bool,
}

/// What the environment says of both clouds.
pub(super) struct Cloud {
    buckets: Buckets,
    /// For hosts that the environment names.
    pub(super) agent: Agent,
    gs_emulator: Option<Url>,
    gs_key_file: Option<String>,
    /// Host of the machine's metadata server, if it is not the usual one.
    gs_metadata: Option<String>,
    gs_token: Mutex<Option<(String, Instant)>>,
    s3_endpoint: Option<Url>,
    s3_region: String,
    s3_credentials: Option<Credentials>,
}

/// A service account's key file.
#[derive(Deserialize)]
struct ServiceAccount {
    client_email: String,
    private_key: String,
    token_uri: String,
}

#[derive(Deserialize)]
struct Token {
    access_token: String,
    expires_in: u64,
}

fn variable(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()))
}

impl Cloud {
    /// Reads the variables that the clouds' own tools read.
    pub(super) fn from_env(buckets: Buckets, agent: Agent) -> Self {
        let url = |text: String| {
            let text = if text.contains("://") { text } else { format!("http://{text}") };
            Url::parse(&text).ok()
        };
        Self {
            buckets,
            agent,
            gs_emulator: variable(&["STORAGE_EMULATOR_HOST"]).and_then(url),
            gs_key_file: variable(&["GOOGLE_APPLICATION_CREDENTIALS"]),
            gs_metadata: variable(&["GCE_METADATA_HOST"]),
            gs_token: Mutex::new(None),
            s3_endpoint: variable(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]).and_then(url),
            s3_region: variable(&["AWS_REGION", "AWS_DEFAULT_REGION"])
                .unwrap_or_else(|| "us-east-1".to_owned()),
            s3_credentials: Credentials::from_env(),
        }
    }

    /// The request for a `gs` or `s3` URL; `None` for all other URLs. A token is got within the
    /// time of the download.
    pub(super) fn object(
        &self,
        url: &str,
        download: &Download<'_>,
    ) -> Option<Result<Object, FetchError>> {
        let (scheme, rest) = scheme(url)?;
        let parts = rest.split_once('/').filter(|(bucket, object)| {
            // In a URL's path, such parts would lead out of the bucket.
            let is_below = !object.split('/').any(|part| matches!(part, "." | ".."));
            is_name(bucket) && !object.is_empty() && is_below
        });
        Some(match parts {
            Some((bucket, object)) if scheme == "gs" => self.gs(bucket, object, download),
            Some((bucket, object)) => self.s3(bucket, object),
            None => Err(FetchError::BadObject),
        })
    }

    fn gs(
        &self,
        bucket: &str,
        object: &str,
        download: &Download<'_>,
    ) -> Result<Object, FetchError> {
        let object = utf8_percent_encode(object, NON_ALPHANUMERIC);
        self.google(bucket, &format!("o/{object}?alt=media"), download)
    }

    /// A request about a bucket of Google's.
    fn google(
        &self,
        bucket: &str,
        path: &str,
        download: &Download<'_>,
    ) -> Result<Object, FetchError> {
        const GOOGLE: &str = "https://storage.googleapis.com";
        let host = self.gs_emulator.as_ref().map_or(GOOGLE, Url::as_str).trim_end_matches('/');
        let url = Url::parse(&format!("{host}/storage/v1/b/{bucket}/{path}"))
            .map_err(|_error| FetchError::BadObject)?;
        let is_trusted = self.gs_emulator.is_some();
        // An emulator wants no token, unless the environment says where one comes from.
        let has_source = self.gs_key_file.is_some() || self.gs_metadata.is_some();
        let has_token = !is_trusted || has_source;
        let is_ours = self.buckets.contains("gs", bucket);
        let token = (is_ours && has_token).then(|| self.token(download)).transpose()?;
        Ok(Object { url, token, is_trusted })
    }

    /// An access token of the service account, or of the machine; kept until it is about to end.
    /// Nothing is locked while it is asked for, so several downloads may ask at once: each waits for
    /// its own time, and a token server that is silent holds up nobody else.
    fn token(&self, download: &Download<'_>) -> Result<String, FetchError> {
        const MARGIN: Duration = Duration::from_mins(1);
        if let Some((token, until)) = &*self.gs_token.lock()
            && Instant::now() < *until
        {
            return Ok(token.clone());
        }
        let token = match &self.gs_key_file {
            Some(path) => self.token_of_account(path, download)?,
            None => self.token_of_machine(download)?,
        };
        let lifetime = Duration::from_secs(token.expires_in.min(86400)).saturating_sub(MARGIN);
        let until = Instant::now() + lifetime;
        *self.gs_token.lock() = Some((token.access_token.clone(), until));
        Ok(token.access_token)
    }

    /// Trades a signed claim for a token (RFC 7523).
    fn token_of_account(&self, path: &str, download: &Download<'_>) -> Result<Token, FetchError> {
        const SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_only";
        const GRANT: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
        let account = std::fs::read(path).ok();
        let account = account.and_then(|json| serde_json::from_slice::<ServiceAccount>(&json).ok());
        let account = account.ok_or(FetchError::Credentials)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let claim = serde_json::json!({
            "iss": account.client_email,
            "scope": SCOPE,
            "aud": account.token_uri,
            "iat": now,
            "exp": now + 3600,
        });
        let key = jsonwebtoken::EncodingKey::from_rsa_pem(account.private_key.as_bytes())
            .map_err(|_error| FetchError::Credentials)?;
        let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::RS256);
        let signed = jsonwebtoken::encode(&header, &claim, &key)
            .map_err(|_error| FetchError::Credentials)?;
        let form = [("grant_type", GRANT), ("assertion", &signed)];
        let request = download.bounded(self.agent.post(&account.token_uri))?;
        read_token(request.send_form(form))
    }

    /// What a machine or pod in Google's cloud may do.
    fn token_of_machine(&self, download: &Download<'_>) -> Result<Token, FetchError> {
        let host = self.gs_metadata.as_deref().unwrap_or("metadata.google.internal");
        let path = "computeMetadata/v1/instance/service-accounts/default/token";
        let request = download.bounded(self.agent.get(format!("http://{host}/{path}")))?;
        read_token(request.header("Metadata-Flavor", "Google").call())
    }

    /// A signed URL for listed buckets, a plain one for others.
    fn s3(&self, bucket: &str, object: &str) -> Result<Object, FetchError> {
        let (bucket, credentials) = self.amazon(bucket)?;
        Ok(self.s3_object(GetObject::new(&bucket, credentials, object).sign(LIFETIME)))
    }

    fn s3_object(&self, url: Url) -> Object {
        Object { url, token: None, is_trusted: self.s3_endpoint.is_some() }
    }

    /// A bucket, and what opens it if it is listed. Buckets on an endpoint of the environment stand in
    /// the path, as S3-compatible servers have them.
    fn amazon(&self, bucket: &str) -> Result<(Bucket, Option<&Credentials>), FetchError> {
        let amazon = || Url::parse(&format!("https://s3.{}.amazonaws.com", self.s3_region)).ok();
        let endpoint = self.s3_endpoint.clone().or_else(amazon).ok_or(FetchError::BadObject)?;
        // A dot in a name does not go with the certificate of the endpoint.
        let is_in_path = self.s3_endpoint.is_some() || bucket.contains('.');
        let style = if is_in_path { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let is_ours = self.buckets.contains("s3", bucket);
        let credentials = self.s3_credentials.as_ref().filter(|_| is_ours);
        if is_ours && credentials.is_none() {
            return Err(FetchError::Credentials);
        }
        let bucket = Bucket::new(endpoint, style, bucket.to_owned(), self.s3_region.clone())
            .map_err(|_error| FetchError::BadObject)?;
        Ok((bucket, credentials))
    }

    /// The request for a page of what is in a bucket below a prefix, the one after `page`.
    pub(super) fn listing(
        &self,
        prefix: &str,
        page: Option<&str>,
        download: &Download<'_>,
    ) -> Result<(Prefix, Object), FetchError> {
        let (scheme, rest) = scheme(prefix).ok_or(FetchError::BadObject)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_name(bucket) {
            return Err(FetchError::BadObject);
        }
        let object = if scheme == "gs" {
            let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
            let page = page.map_or(String::new(), |it| format!("&pageToken={}", encoded(it)));
            let fields = "fields=nextPageToken,items(name)";
            let path = format!("o?prefix={}&{fields}{page}", encoded(prefix));
            self.google(bucket, &path, download)?
        } else {
            let (bucket, credentials) = self.amazon(bucket)?;
            let mut list = ListObjectsV2::new(&bucket, credentials);
            list.with_prefix(prefix);
            if let Some(page) = page {
                list.with_continuation_token(page);
            }
            self.s3_object(list.sign(LIFETIME))
        };
        Ok((Prefix { scheme, bucket: bucket.to_owned() }, object))
    }
}

/// How long a signed URL may be used.
const LIFETIME: Duration = Duration::from_mins(15);

/// The scheme of a bucket's address, and the rest.
fn scheme(url: &str) -> Option<(&'static str, &str)> {
    let (scheme, rest) = url.trim_start().split_once("://")?;
    let scheme = ["gs", "s3"].into_iter().find(|it| it.eq_ignore_ascii_case(scheme))?;
    Some((scheme, rest))
}

/// Whether it can be a bucket's, and part of a host's name.
fn is_name(bucket: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !bucket.is_empty() && bucket.chars().all(is_plain)
}

/// Where a list is of.
pub(super) struct Prefix {
    scheme: &'static str,
    bucket: String,
}

/// A page of what is in a bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Of objects.
    pub addresses: Vec<String>,
    /// What asks for the next page; `None` on the last one.
    pub next: Option<String>,
}

/// A page as Google tells it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    #[serde(default)]
    items: Vec<Named>,
    next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

impl Prefix {
    /// Reads a page; folders' own names are no objects.
    pub(super) fn read(&self, body: &[u8]) -> Result<Listing, FetchError> {
        let (names, next): (Vec<String>, _) = if self.scheme == "gs" {
            let page: Page =
                serde_json::from_slice(body).map_err(|_error| FetchError::BadListing)?;
            (page.items.into_iter().map(|it| it.name).collect(), page.next_page_token)
        } else {
            let text = str::from_utf8(body).map_err(|_error| FetchError::BadListing)?;
            let page =
                ListObjectsV2::parse_response(text).map_err(|_error| FetchError::BadListing)?;
            let names = page.contents.into_iter().map(|it| it.key);
            (names.collect(), page.next_continuation_token)
        };
        let Self { scheme, bucket } = self;
        let objects = names.into_iter().filter(|name| !name.ends_with('/'));
        let addresses = objects.map(|name| format!("{scheme}://{bucket}/{name}")).collect();
        Ok(Listing { addresses, next })
    }
}

/// Who is refused stays refused; all else may pass.
fn read_token(answer: Result<Response, ureq::Error>) -> Result<Token, FetchError> {
    const MOST: u64 = 64 << 10;
    let read = answer.and_then(|mut answer| {
        if !answer.status().is_success() {
            return Err(ureq::Error::StatusCode(answer.status().as_u16()));
        }
        answer.body_mut().with_config().limit(MOST).read_json()
    });
    read.map_err(|error| match FetchError::of(error) {
        FetchError::Interrupted => FetchError::Interrupted,
        problem @ FetchError::Status(_) if !problem.is_transient() => FetchError::Credentials,
        problem => FetchError::NoToken(Box::new(problem)),
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Authorities, FetchLimits,
            tests::{answers, stalls},
        },
        *,
    };
    use crate::Stop;

    /// A download that may take so long.
    fn within<T>(time: Duration, f: impl FnOnce(&Download<'_>) -> T) -> T {
        f(&Download { limits: &FetchLimits::default(), deadline: Instant::now() + time })
    }

    fn object(cloud: &Cloud, url: &str) -> Option<Result<Object, FetchError>> {
        within(Duration::from_secs(5), |download| cloud.object(url, download))
    }

    fn cloud(buckets: &str) -> Cloud {
        let agent = Agent::new_with_defaults();
        Cloud {
            s3_credentials: Some(Credentials::new("key", "secret")),
            s3_endpoint: None,
            s3_region: "eu-west-1".to_owned(),
            gs_emulator: None,
            gs_key_file: Some("/nowhere".to_owned()),
            ..Cloud::from_env(buckets.parse().unwrap(), agent)
        }
    }

    #[test]
    fn only_listed_buckets_see_credentials() {
        let cloud = cloud("s3://mine gs://mine");
        let s3 = |url: &str| object(&cloud, url).unwrap().unwrap().url.to_string();
        let signed = s3("s3://mine/a/b c.png");
        assert!(signed.starts_with("https://mine.s3.eu-west-1.amazonaws.com/a/b%20c.png?"));
        assert!(signed.contains("X-Amz-Signature="), "{signed}");
        let plain = "https://other.s3.eu-west-1.amazonaws.com/a.png";
        assert_eq!(s3("s3://other/a.png").trim_end_matches('?'), plain);
        let other = object(&cloud, "gs://other/a/b.png").unwrap().unwrap();
        let expected = "https://storage.googleapis.com/storage/v1/b/other/o/a%2Fb%2Epng?alt=media";
        assert_eq!((other.url.as_str(), other.token), (expected, None));
        // The key file is asked for, and not there.
        let mine = object(&cloud, "gs://mine/a.png").unwrap();
        assert!(matches!(mine, Err(FetchError::Credentials)));
    }

    #[test]
    fn a_bucket_cannot_be_made_another_host() {
        let cloud = cloud("");
        for url in ["", "a", "a/", "a:80/x", "a@b/x", "a%2f/x", "/x", "a/../x", "a/..", "a/./x"] {
            let url = format!("s3://{url}");
            assert!(matches!(object(&cloud, &url), Some(Err(FetchError::BadObject))), "{url}");
        }
        for name in ["%2e%2e/x", "a/%2e%2e", "//x", "@evil.example/x", "?x=y", "#x"] {
            for scheme in ["s3", "gs"] {
                let object = object(&cloud, &format!("{scheme}://b/{name}")).unwrap().unwrap();
                let host = object.url.host_str().unwrap();
                assert!(host.ends_with("amazonaws.com") || host.ends_with("googleapis.com"));
                let path = object.url.path();
                assert!(scheme == "s3" || path.starts_with("/storage/v1/b/b/o/"), "{path}");
            }
        }
        assert!(object(&cloud, "https://a/b").is_none());
        assert!("http://x".parse::<Buckets>().is_err() && "s3://a/b".parse::<Buckets>().is_err());
    }

    /// The account of a machine whose metadata server is on this port.
    fn machine(port: u16) -> Cloud {
        let mut cloud = Cloud { gs_key_file: None, ..cloud("gs://mine") };
        cloud.gs_metadata = Some(format!("127.0.0.1:{port}"));
        cloud.agent = Agent::with_parts(
            super::super::config(),
            super::super::connector(&Authorities::default()),
            ureq::unversioned::resolver::DefaultResolver::default(),
        );
        cloud
    }

    const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n";

    #[test]
    fn a_token_server_that_is_silent_holds_up_nobody_for_longer_than_its_own_time() {
        for first in [&b""[..], b"HTTP/1.1 200 OK\r\nX: ", HEAD] {
            let (cloud, start) =
                (machine(stalls(first, Duration::from_millis(50))), Instant::now());
            std::thread::scope(|scope| {
                for time in [200, 300, 400, 500].map(Duration::from_millis) {
                    let cloud = &cloud;
                    scope.spawn(move || {
                        let got = within(time, |download| cloud.object("gs://mine/a", download));
                        let problem = got.unwrap().err().unwrap();
                        assert!(matches!(problem, FetchError::NoToken(_)), "{problem:?}");
                        assert!(problem.is_transient());
                    });
                }
            });
            // One after the other, they would take 1.4 s.
            assert!(start.elapsed() < Duration::from_millis(1200), "{:?}", start.elapsed());
        }
    }

    #[test]
    fn a_request_for_a_token_ends_when_the_download_is_told_to() {
        for first in [&b""[..], HEAD] {
            let (cloud, stop) =
                (machine(stalls(first, Duration::from_millis(50))), Stop::default());
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(200));
                    stop.stop();
                });
                let got = super::super::interrupt::watching(&stop, 0, || {
                    within(Duration::from_secs(30), |all| cloud.object("gs://mine/a", all))
                });
                assert!(matches!(got, Some(Err(FetchError::Interrupted))));
            });
        }
    }

    #[test]
    fn a_refusal_is_for_good_and_a_failure_for_now_and_neither_is_kept() {
        const TOKEN: &str = r#"{"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}"#;
        const ANSWERS: [(u16, &str); 6] =
            [(403, ""), (400, "{}"), (503, ""), (429, ""), (200, "?"), (200, TOKEN)];
        let (port, asked) = answers(&ANSWERS);
        let cloud = machine(port);
        for is_transient in [false, false, true, true, true] {
            let problem = object(&cloud, "gs://mine/a").unwrap().err().unwrap();
            assert_eq!(problem.is_transient(), is_transient, "{problem:?}");
            assert_eq!(matches!(problem, FetchError::Credentials), !is_transient);
        }
        for _ in 0..2 {
            let got = object(&cloud, "gs://mine/a").unwrap().unwrap();
            assert_eq!(got.token.as_deref(), Some("t"));
        }
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 6);
    }
}
