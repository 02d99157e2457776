//! Who may ask, and from where.
//!
//! - The `Host` must be an address, `localhost` or a name that was given: a page elsewhere whose name
//!   comes to resolve to this machine is refused.
//! - With a password, everything but `/healthz` and `/readyz` needs it: as HTTP's basic
//!   authentication, or once, for a cookie that scripts cannot read and other sites do not send.
//! - What changes something must say so in a header of ours, which other sites cannot set, and come
//!   from this origin if it says where it comes from.
//! - Nothing of a page may come from elsewhere, run inline, or be framed.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
        header::{
            AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, COOKIE, HOST, ORIGIN,
            REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{App, assets, routes::Refusal};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

/// The header of whatever changes something.
const OURS: &str = "x-florence";

const SESSION: Duration = Duration::from_hours(12);
const MOST_SESSIONS: usize = 1000;
/// What a wrong password costs.
const PENALTY: Duration = Duration::from_millis(500);
/// Wrong passwords of one address that are waited for at a time; meanwhile it is refused whatever it
/// sends.
const MOST_WRONG: usize = 8;

/// Whom a connection is from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) IpAddr);

type Hash = [u8; 32];

fn hash(text: &str) -> Hash {
    Sha256::digest(text.as_bytes()).into()
}

pub(super) struct Guard {
    /// Hashes are compared, so that the time it takes tells nothing.
    password: Option<Hash>,
    /// Names besides `localhost`.
    names: Vec<String>,
    pub(super) is_read_only: bool,
    /// Cookies are not apart by port: two pages on one host have cookies of different names.
    cookie: String,
    sessions: Mutex<VecDeque<(Hash, Instant)>>,
    /// Wrong passwords that are waited for, by who gave them.
    wrong: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Guard {
    pub(super) fn new(
        password: Option<&str>,
        names: &[String],
        is_read_only: bool,
        port: u16,
    ) -> Self {
        Self {
            password: password.map(hash),
            names: names.iter().map(|name| name.to_ascii_lowercase()).collect(),
            is_read_only,
            cookie: format!("florence-{port}"),
            sessions: Mutex::default(),
            wrong: Arc::default(),
        }
    }

    /// Whether a `Host` is one that nobody else's name can resolve to.
    fn is_ours(&self, host: &str) -> bool {
        let name = host.rsplit_once(':').map_or(host, |(name, port)| {
            if port.bytes().all(|digit| digit.is_ascii_digit()) { name } else { host }
        });
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let address = name.trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || address.parse::<IpAddr>().is_ok() || self.names.contains(&name)
    }

    /// Who guesses is slowed down; whoever has the password waits for nobody else.
    async fn is_password(&self, guess: &str, Peer(from): Peer) -> Result<bool, Refusal> {
        {
            let mut wrong = self.wrong.lock();
            let guesses = wrong.get(&from).copied().unwrap_or_default();
            if guesses >= MOST_WRONG {
                let text = "too many wrong passwords; try again in a moment";
                return Err(Refusal(StatusCode::TOO_MANY_REQUESTS, text.to_owned()));
            }
            if self.password == Some(hash(guess)) {
                return Ok(true);
            }
            wrong.insert(from, guesses + 1);
        }
        // Whoever goes away meanwhile has not saved the time.
        let wrong = Arc::clone(&self.wrong);
        let penalty = tokio::spawn(async move {
            tokio::time::sleep(PENALTY).await;
            let mut wrong = wrong.lock();
            if let Some(guesses) = wrong.get_mut(&from) {
                *guesses -= 1;
                if *guesses == 0 {
                    wrong.remove(&from);
                }
            }
        });
        drop(penalty.await);
        Ok(false)
    }

    /// Whether a request shows who it is from.
    pub(super) async fn is_known(&self, headers: &HeaderMap, from: Peer) -> Result<bool, Refusal> {
        if self.password.is_none() || self.has_session(headers) {
            return Ok(true);
        }
        match basic(headers) {
            Some(password) => self.is_password(&password, from).await,
            None => Ok(false),
        }
    }

    fn has_session(&self, headers: &HeaderMap) -> bool {
        let Some(token) = self.token(headers) else { return false };
        let (token, now) = (hash(token), Instant::now());
        let mut sessions = self.sessions.lock();
        sessions.retain(|(_, until)| *until > now);
        sessions.iter().any(|(known, _)| *known == token)
    }

    fn token<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        let cookies = headers.get_all(COOKIE).into_iter().filter_map(|it| it.to_str().ok());
        let mut cookies = cookies.flat_map(|line| line.split(';'));
        cookies.find_map(|cookie| cookie.trim().strip_prefix(&self.cookie)?.strip_prefix('='))
    }

    /// A cookie for who knows the password.
    pub(super) async fn log_in(
        &self,
        guess: &str,
        from: Peer,
        is_https: bool,
    ) -> Result<String, Refusal> {
        if !self.is_password(guess, from).await? {
            return Err(Refusal(StatusCode::UNAUTHORIZED, "the password is wrong".to_owned()));
        }
        let token = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let mut sessions = self.sessions.lock();
        if sessions.len() == MOST_SESSIONS {
            sessions.pop_front();
        }
        sessions.push_back((hash(&token), Instant::now() + SESSION));
        let (name, age) = (&self.cookie, SESSION.as_secs());
        let secure = if is_https { "; Secure" } else { "" };
        Ok(format!("{name}={token}; HttpOnly; SameSite=Strict; Path=/; Max-Age={age}{secure}"))
    }

    /// Ends a session; the cookie that takes its place.
    pub(super) fn log_out(&self, headers: &HeaderMap) -> String {
        if let Some(token) = self.token(headers).map(hash) {
            let mut sessions = self.sessions.lock();
            sessions.retain(|(known, _)| *known != token);
        }
        format!("{}=; HttpOnly; SameSite=Strict; Path=/; Max-Age=0", self.cookie)
    }

    pub(super) fn has_password(&self) -> bool {
        self.password.is_some()
    }
}

/// The password of HTTP's basic authentication, whatever the user's name.
fn basic(headers: &HeaderMap) -> Option<String> {
    let (scheme, code) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let bytes = BASE64_STANDARD.decode(code.trim()).ok()?;
    let text = String::from_utf8(bytes).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    Some(text.split_once(':')?.1.to_owned())
}

/// Why a request is refused before anybody looks at what it wants.
fn refusal(guard: &Guard, request: &Request) -> Option<Refusal> {
    let headers = request.headers();
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if !guard.is_ours(host) {
        let text = "this is not known as a name of this page; --host allows it";
        return Some(Refusal(StatusCode::MISDIRECTED_REQUEST, text.to_owned()));
    }
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return None;
    }
    let origin = headers.get(ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    let is_same = origin.is_none_or(|origin| {
        origin.split_once("://").is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(host))
    });
    let site = headers.get("sec-fetch-site").and_then(|site| site.to_str().ok());
    let is_same_site = site.is_none_or(|site| matches!(site, "same-origin" | "none"));
    let is_meant = headers.contains_key(OURS);
    (!is_same || !is_same_site || !is_meant).then(|| {
        Refusal(StatusCode::FORBIDDEN, format!("a change needs the header {OURS}, from this page"))
    })
}

/// Stands before everything.
pub(super) async fn check(
    State(app): State<Arc<App>>,
    Extension(from): Extension<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let answer = match refusal(&app.guard, &request) {
        Some(refusal) => refusal.into_response(),
        None => answer(&app, from, request, next).await,
    };
    dressed(answer)
}

async fn answer(app: &App, from: Peer, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let is_open = matches!(path, "/healthz" | "/readyz" | "/api/login") || assets::is_open(path);
    let is_known = is_open
        || match app.guard.is_known(request.headers(), from).await {
            Ok(is_known) => is_known,
            Err(refusal) => return refusal.into_response(),
        };
    match path {
        _ if is_known => next.run(request).await,
        "/" => (StatusCode::UNAUTHORIZED, assets::login()).into_response(),
        // The page asks for the password itself; programs are told how they can.
        path if path.starts_with("/api/") => {
            Refusal(StatusCode::UNAUTHORIZED, "log in first".to_owned()).into_response()
        }
        _ => {
            let ask = [(WWW_AUTHENTICATE, "Basic realm=\"florence\"")];
            (StatusCode::UNAUTHORIZED, ask, "the password is missing or wrong\n").into_response()
        }
    }
}

/// Refuses changes where there are to be none.
pub(super) async fn writable(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if app.guard.is_read_only {
        let text = "this page was started with --read-only";
        return Refusal(StatusCode::FORBIDDEN, text.to_owned()).into_response();
    }
    next.run(request).await
}

/// The headers of every answer.
fn dressed(mut answer: Response<Body>) -> Response {
    let headers = answer.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    answer
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use futures_util::future::join_all;

    use super::*;

    #[test]
    fn only_names_that_cannot_be_rebound_are_ours() {
        let guard = Guard::new(None, &["Florence.Example.com".to_owned()], false, 80);
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:8080",
            "[::1]:8080",
            "[::1]",
            "10.0.0.1",
            "florence.example.com",
            "FLORENCE.example.com.:443",
        ] {
            assert!(guard.is_ours(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"] {
            assert!(!guard.is_ours(host), "{host}");
        }
    }

    fn peer(last: u8) -> Peer {
        Peer([127, 0, 0, last].into())
    }

    #[tokio::test]
    async fn who_guesses_keeps_nobody_else_out() {
        let guard = Guard::new(Some("secret"), &[], false, 8080);
        let wrong = join_all((0..30).map(|_| guard.is_password("wrong", peer(1))));
        let is_over = AtomicBool::default();
        let right = async {
            // Nor can one of them be right that comes from there.
            assert!(guard.is_password("secret", peer(1)).await.is_err());
            let is_right = guard.is_password("secret", peer(2)).await;
            (is_right, is_over.load(Relaxed))
        };
        let wrong = async {
            let answers = wrong.await;
            is_over.store(true, Relaxed);
            answers
        };
        let (wrong, (is_right, was_late)) = tokio::join!(wrong, right);
        assert!(is_right.unwrap() && !was_late);
        let (waited, refused): (Vec<_>, Vec<_>) = wrong.into_iter().partition(Result::is_ok);
        assert_eq!((waited.len(), refused.len()), (MOST_WRONG, 30 - MOST_WRONG));
        assert!(waited.into_iter().all(|is_right| !is_right.unwrap()));
        assert!(guard.is_password("secret", peer(1)).await.unwrap());
        assert!(guard.wrong.lock().is_empty());
    }

    #[tokio::test]
    async fn a_session_lasts_until_it_is_ended() {
        let guard = Guard::new(Some("secret"), &[], false, 8080);
        let wrong = guard.log_in("wrong", peer(1), false).await;
        assert_eq!(wrong.unwrap_err().0, StatusCode::UNAUTHORIZED);
        let cookie = guard.log_in("secret", peer(1), true).await.unwrap();
        assert!(cookie.contains("HttpOnly; SameSite=Strict") && cookie.ends_with("; Secure"));
        let sent = cookie.split(';').next().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(COOKIE, format!("other=1; {sent}").parse().unwrap());
        assert!(guard.is_known(&headers, peer(1)).await.unwrap());
        assert!(guard.log_out(&headers).contains("Max-Age=0"));
        assert!(!guard.is_known(&headers, peer(1)).await.unwrap());
    }
}
