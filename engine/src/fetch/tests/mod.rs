//! Downloads from servers on loopback: names that answer differently from one moment to the next,
//! servers that are slow; [`http`] is about what they send.

mod http;
mod tls;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tiny_http::{Header, Response, Server};
use ureq::{
    config::Config,
    http::Uri,
    unversioned::{resolver::ResolvedSocketAddrs, transport::NextTimeout},
};

use super::*;

/// A resolver that answers every name so.
struct Answering<F>(F);

impl<F> std::fmt::Debug for Answering<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answering")
    }
}

impl<F: Fn() -> Result<Vec<SocketAddr>, ureq::Error> + Send + Sync + 'static> Resolver
    for Answering<F>
{
    fn resolve(
        &self,
        _uri: &Uri,
        _config: &Config,
        _timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        self.0()?.into_iter().for_each(|address| addresses.push(address));
        Ok(addresses)
    }
}

/// Fetches `path` from a server that counts its requests; `/again` redirects to another name. Names
/// have one list of addresses after the other; 127.0.0.1 stands for what is allowed.
fn fetch(answers: &[&[&str]], path: &str) -> (Result<Vec<u8>, FetchError>, usize, usize) {
    let server = Arc::new(Server::http("0.0.0.0:0").unwrap());
    let port = server.server_addr().to_ip().unwrap().port();
    let hits = Arc::new(AtomicUsize::new(0));
    let (serving, counted) = (Arc::clone(&server), Arc::clone(&hits));
    let thread = thread::spawn(move || {
        for request in serving.incoming_requests() {
            counted.fetch_add(1, Ordering::SeqCst);
            let target = format!("http://second.example:{port}/picture");
            let location = Header::from_bytes("Location", target).unwrap();
            let answer = match request.url() {
                "/again" => Response::from_string("").with_status_code(302).with_header(location),
                _ => Response::from_string("picture"),
            };
            let _ = request.respond(answer);
        }
    });
    let address = |address: &&str| SocketAddr::new(address.parse().unwrap(), port);
    let answers: Vec<Vec<SocketAddr>> =
        answers.iter().map(|list| list.iter().map(address).collect()).collect();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let fetcher = with_resolver(Answering(move || {
        let turn = counted.fetch_add(1, Ordering::SeqCst);
        Ok(answers[turn.min(answers.len() - 1)].clone())
    }));
    let url = format!("http://first.example:{port}{path}");
    let fetched = fetcher.fetch(&url, &FetchLimits::default(), &Stop::default());
    server.unblock();
    thread.join().unwrap();
    (fetched, asked.load(Ordering::SeqCst), hits.load(Ordering::SeqCst))
}

#[test]
fn the_address_that_was_checked_is_the_one_that_is_used() {
    // Asked again, the name would have an inner address: it is not asked again.
    let (fetched, asked, hits) = fetch(&[&["127.0.0.1"], &["127.0.0.2"]], "/picture");
    assert_eq!((fetched.unwrap(), asked, hits), (b"picture".to_vec(), 1, 1));
}

#[test]
fn one_inner_address_spoils_the_name() {
    for answer in [&["127.0.0.1", "127.0.0.2"][..], &["127.0.0.2", "127.0.0.1"], &["::1"]] {
        let (fetched, _, hits) = fetch(&[answer], "/picture");
        assert!(
            matches!(fetched, Err(FetchError::Denied(Rule::AllowNetworks))),
            "{answer:?}: {fetched:?}"
        );
        assert_eq!(hits, 0);
    }
}

#[test]
fn a_redirect_to_a_name_of_an_inner_address_is_not_followed() {
    let (fetched, asked, hits) = fetch(&[&["127.0.0.1"], &["127.0.0.2"]], "/again");
    assert!(matches!(fetched, Err(FetchError::DeniedRedirect(_))), "{fetched:?}");
    assert_eq!((asked, hits), (2, 1));
    let (fetched, _, hits) = fetch(&[&["127.0.0.1"], &["127.0.0.1"]], "/again");
    assert_eq!((fetched.unwrap(), hits), (b"picture".to_vec(), 2));
}

/// A server that takes requests and then says nothing, or a byte now and then.
pub(super) fn stalls(first: &'static [u8], pause: Duration) -> u16 {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(first);
                while stream.write_all(if first.is_empty() { b"" } else { b"x" }).is_ok() {
                    thread::sleep(pause);
                }
            });
        }
    });
    port
}

/// A server that gives one answer after the other, and counts them.
pub(super) fn answers(list: &'static [(u16, &'static str)]) -> (u16, Arc<AtomicUsize>) {
    let server = Server::http("127.0.0.1:0").unwrap();
    let port = server.server_addr().to_ip().unwrap().port();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    thread::spawn(move || {
        for request in server.incoming_requests() {
            let (status, text) = list[counted.fetch_add(1, Ordering::SeqCst)];
            let _ = request.respond(Response::from_string(text).with_status_code(status));
        }
    });
    (port, asked)
}

fn fetcher(rules: AccessRules) -> Fetcher {
    Fetcher::new(rules, Buckets::default(), &Authorities::default())
}

fn with_resolver(resolver: impl Resolver) -> Fetcher {
    let authorities = Authorities::default();
    Fetcher::with_resolver(on_loopback(), Buckets::default(), &authorities, resolver)
}

fn on_loopback() -> AccessRules {
    AccessRules { allow_networks: "127.0.0.1".parse().unwrap(), ..AccessRules::default() }
}

#[test]
fn a_download_ends_soon_after_it_is_told_to() {
    let header = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n";
    for first in [&b""[..], header] {
        let port = stalls(first, Duration::from_millis(50));
        let fetcher = fetcher(on_loopback());
        let stop = Stop::default();
        let (other, start) = (stop.clone(), Instant::now());
        let stopper = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            other.stop();
        });
        let url = format!("http://127.0.0.1:{port}/x.png");
        let fetched = fetcher.fetch(&url, &FetchLimits::default(), &stop);
        assert!(matches!(fetched, Err(FetchError::Interrupted)), "{fetched:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
        stopper.join().unwrap();
    }
}

#[test]
fn a_download_ends_in_time_however_the_server_trickles() {
    // The last is the start of a TLS record of 16 KiB.
    let (head, tls) = (&b"HTTP/1.1 200 OK\r\nX: "[..], &b"\x16\x03\x03\x40\x00"[..]);
    let body = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n";
    for (scheme, first, phase) in [
        ("http", &b""[..], Phase::Answer),
        ("http", head, Phase::Answer),
        ("http", body, Phase::Body),
        ("https", b"", Phase::Connection),
        ("https", tls, Phase::Connection),
    ] {
        let port = stalls(first, Duration::from_millis(20));
        let fetcher = fetcher(on_loopback());
        let limits = FetchLimits { total: Duration::from_millis(400), ..FetchLimits::default() };
        let start = Instant::now();
        let url = format!("{scheme}://127.0.0.1:{port}/x.png");
        let fetched = fetcher.fetch(&url, &limits, &Stop::default());
        let Err(FetchError::Timeout(found)) = fetched else {
            panic!("{scheme} {first:?}: {fetched:?}");
        };
        assert_eq!(found, phase, "{scheme} {first:?}");
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    }
}

#[test]
fn nobody_waits_for_a_name_longer_than_wanted() {
    let fetcher = with_resolver(Answering(|| {
        thread::sleep(Duration::from_secs(20));
        Err(ureq::Error::HostNotFound)
    }));
    let short = FetchLimits { total: Duration::from_millis(300), ..FetchLimits::default() };
    let start = Instant::now();
    let fetched = fetcher.fetch("http://slow.example/", &short, &Stop::default());
    assert!(matches!(fetched, Err(FetchError::Timeout(Phase::Name))), "{fetched:?}");
    let stop = Stop::default();
    stop.stop();
    let fetched = fetcher.fetch("http://slow.example/", &FetchLimits::default(), &stop);
    assert!(matches!(fetched, Err(FetchError::Interrupted)), "{fetched:?}");
    assert!(start.elapsed() < Duration::from_secs(5));
}
