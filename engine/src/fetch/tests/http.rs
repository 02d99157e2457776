//! What servers send, well or badly: redirects, credentials, encodings, and ends that come too soon.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use parking_lot::Mutex;

use super::{
    super::{AccessRules, FetchError, FetchLimits},
    Answering, fetcher, on_loopback, with_resolver,
};
use crate::Stop;

/// A server that answers the bytes that a function makes of its port and a request's head, and
/// closes the connection after each answer.
struct Canned {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

/// The head of a request; `None` at the connection's end.
fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    Some(String::from_utf8(head).unwrap())
}

impl Canned {
    fn serve(answer: impl Fn(u16, &str) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heads = Arc::<Mutex<Vec<String>>>::default();
        let noted = Arc::clone(&heads);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(head) = read_head(&mut stream) else { continue };
                let answer = answer(port, head.split(' ').nth(1).unwrap());
                noted.lock().push(head);
                let _ = stream.write_all(&answer);
            }
        });
        Self { port, heads }
    }

    fn fetch(&self, path: &str) -> Result<Vec<u8>, FetchError> {
        fetch(&format!("http://127.0.0.1:{}{path}", self.port))
    }

    /// The targets of the requests so far.
    fn targets(&self) -> Vec<String> {
        self.heads.lock().iter().map(|head| head.split(' ').nth(1).unwrap().to_owned()).collect()
    }

    /// The value of a header of the last request.
    fn last(&self, name: &str) -> Option<String> {
        let heads = self.heads.lock();
        let mut lines = heads.last()?.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    }
}

fn fetch(url: &str) -> Result<Vec<u8>, FetchError> {
    let fetcher = fetcher(on_loopback());
    let limits = FetchLimits { total: Duration::from_secs(10), ..FetchLimits::default() };
    fetcher.fetch(url, &limits, &Stop::default())
}

fn answer(status: &str, headers: &[(&str, &[u8])], body: &[u8]) -> Vec<u8> {
    let mut answer =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len()).into_bytes();
    for (name, value) in headers {
        answer.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
    }
    answer.extend(b"\r\n");
    answer.extend(body);
    answer
}

#[test]
fn redirects_lead_where_requests_follows_them() {
    for (location, target) in [
        (&b"/b.png"[..], "/b.png"),
        (b"b.png", "/dir/b.png"),
        (b"../b.png", "/b.png"),
        (b"?b=c", "/dir/start?b=c"),
        (b"//127.0.0.1:PORT/b.png", "/b.png"),
        (b"HTTP://127.0.0.1:PORT/b.png", "/b.png"),
        (b"http://127.0.0.1:PORT/b.png#part", "/b.png"),
        (b"  /b.png  ", "/b.png"),
        (b"/a b.png", "/a%20b.png"),
        ("/b\u{fc}cher.png".as_bytes(), "/b%C3%BCcher.png"),
        (b"/%C3%BC.png", "/%C3%BC.png"),
        // What is not UTF-8 goes back as it came.
        (b"/b\xfccher.png", "/b%FCcher.png"),
    ] {
        let server = Canned::serve(move |port, target| {
            let text = String::from_utf8_lossy(location);
            let location = if text.contains("PORT") {
                text.replace("PORT", &port.to_string()).into_bytes()
            } else {
                location.to_vec()
            };
            match target {
                "/dir/start" => answer("302 Found", &[("Location", &location)], b"moved"),
                _ => answer("200 OK", &[], b"picture"),
            }
        });
        let fetched = server.fetch("/dir/start");
        let shown = String::from_utf8_lossy(location);
        assert_eq!(fetched.unwrap(), b"picture", "{shown}");
        assert_eq!(server.targets(), ["/dir/start", target], "{shown}");
    }
}

#[test]
fn an_answer_that_redirects_nowhere_is_the_picture_itself() {
    const EMPTY: &[(&str, &[u8])] = &[("Location", b"")];
    for headers in [&[], EMPTY] {
        let server = Canned::serve(move |_, _| answer("302 Found", headers, b"picture"));
        assert_eq!(server.fetch("/").unwrap(), b"picture");
        let server = Canned::serve(move |_, _| answer("302 Found", headers, b""));
        let fetched = server.fetch("/");
        assert!(matches!(fetched, Err(FetchError::Status(302))), "{fetched:?}");
    }
}

#[test]
fn a_picture_behind_many_redirects_is_found() {
    let server = Canned::serve(|_, target| {
        let number: u32 = target.trim_start_matches('/').parse().unwrap();
        let next = format!("/{}", number + 1).into_bytes();
        match number {
            30 => answer("200 OK", &[], b"picture"),
            _ => answer("301 Moved", &[("Location", &next)], b""),
        }
    });
    assert_eq!(server.fetch("/0").unwrap(), b"picture");
}

#[test]
fn user_and_password_are_sent_as_they_are_meant() {
    let server = Canned::serve(|port, target| {
        let location = |host: &str| format!("http://{host}:{port}/b").into_bytes();
        match target {
            "/same" => answer("302 Found", &[("Location", &location("127.0.0.1"))], b""),
            "/other" => answer("302 Found", &[("Location", &location("localhost"))], b""),
            "/relative" => answer("302 Found", &[("Location", b"b")], b""),
            _ => answer("200 OK", &[], b"picture"),
        }
    });
    for (user, path, sent) in [
        ("user:password", "/a", Some("dXNlcjpwYXNzd29yZA==")),
        ("us%40er:p%3Aw%2F", "/a", Some("dXNAZXI6cDp3Lw==")),
        ("u:p@ss", "/a", Some("dTpwQHNz")),
        ("u:100%", "/a", Some("dToxMDAl")),
        (":pw", "/a", Some("OnB3")),
        ("u:", "/a", Some("dTo=")),
        // Latin-1, as requests has it; what is not in Latin-1, requests cannot send.
        ("u:%C3%A9", "/a", Some("dTrp")),
        ("u:%E2%82%AC", "/a", Some("dTrigqw=")),
        ("user:password", "/same", Some("dXNlcjpwYXNzd29yZA==")),
        ("user:password", "/relative", Some("dXNlcjpwYXNzd29yZA==")),
        ("user:password", "/other", None),
    ] {
        let url = format!("http://{user}@127.0.0.1:{}{path}", server.port);
        let rules = AccessRules {
            allow_networks: "127.0.0.1 ::1".parse().unwrap(),
            ..AccessRules::default()
        };
        let fetcher = fetcher(rules);
        let fetched = fetcher.fetch(&url, &FetchLimits::default(), &Stop::default());
        assert_eq!(fetched.unwrap(), b"picture", "{user} {path}");
        let sent = sent.map(|sent| format!("Basic {sent}"));
        assert_eq!(server.last("authorization"), sent, "{user} {path}");
    }
}

#[test]
fn addresses_are_read_as_requests_reads_them() {
    let server = Canned::serve(|_, _| answer("200 OK", &[], b"picture"));
    for (url, target) in [
        ("HTTP://127.0.0.1:PORT/x.png", "/x.png"),
        ("  http://127.0.0.1:PORT/x.png", "/x.png"),
        ("\n\thttp://127.0.0.1:PORT/x.png", "/x.png"),
        ("\u{a0}Http://127.0.0.1:PORT/x.png", "/x.png"),
        ("http://127.0.0.1:PORT/x.png ", "/x.png%20"),
        ("http://127.0.0.1:PORT/x.png\n", "/x.png%0A"),
        ("http://127.0.0.1:PORT/a\nb\tc", "/a%0Ab%09c"),
        ("http://127.0.0.1:PORT/x.png?a=b ", "/x.png?a=b%20"),
        ("http://127.0.0.1:PORT/x.png#f ", "/x.png"),
    ] {
        let fetched = fetch(&url.replace("PORT", &server.port.to_string()));
        assert_eq!(fetched.unwrap(), b"picture", "{url:?}");
        assert_eq!(server.targets().last().map(String::as_str), Some(target), "{url:?}");
    }
    for url in ["http://127.0.0.1:PORT ", "http:// 127.0.0.1:PORT/", "http://127.0.0.1\n:PORT/"] {
        let fetched = fetch(&url.replace("PORT", &server.port.to_string()));
        assert!(matches!(fetched, Err(FetchError::BadUrl)), "{url:?}: {fetched:?}");
    }
}

fn packed<W: Write>(
    start: impl Fn(Vec<u8>) -> W,
    end: impl Fn(W) -> Vec<u8>,
    bytes: &[u8],
) -> Vec<u8> {
    let mut encoder = start(Vec::new());
    encoder.write_all(bytes).unwrap();
    end(encoder)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    packed(|to| GzEncoder::new(to, Compression::fast()), |it| it.finish().unwrap(), bytes)
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    packed(|to| ZlibEncoder::new(to, Compression::fast()), |it| it.finish().unwrap(), bytes)
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    packed(|to| DeflateEncoder::new(to, Compression::fast()), |it| it.finish().unwrap(), bytes)
}

fn fetch_encoded(encoding: &'static str, body: Vec<u8>) -> Result<Vec<u8>, FetchError> {
    let headers = [("Content-Encoding", encoding.as_bytes())];
    Canned::serve(move |_, _| answer("200 OK", &headers, &body)).fetch("/")
}

#[test]
fn every_encoding_that_requests_knows_is_undone() {
    let picture: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
    let two = [gzip(&picture[..1000]), gzip(&picture[1000..])].concat();
    let padded = [gzip(&picture), b"\0\0\0\0".to_vec()].concat();
    for (encoding, body) in [
        ("gzip", gzip(&picture)),
        ("GZIP", gzip(&picture)),
        ("x-gzip", gzip(&picture)),
        ("X-GZip", gzip(&picture)),
        ("gzip", two),
        ("gzip", padded),
        ("deflate", zlib(&picture)),
        ("Deflate", deflate(&picture)),
        ("deflate, gzip", gzip(&zlib(&picture))),
        ("gzip,gzip", gzip(&gzip(&picture))),
        ("identity, gzip", gzip(&picture)),
        // What is none: then the bytes are the picture's.
        ("identity", picture.clone()),
        ("binary", picture.clone()),
        ("", picture.clone()),
    ] {
        let fetched =
            fetch_encoded(encoding, body).unwrap_or_else(|error| panic!("{encoding}: {error}"));
        assert!(fetched == picture, "{encoding}: {} bytes", fetched.len());
    }
}

#[test]
fn what_is_packed_is_bounded_at_every_step() {
    let bomb = gzip(&gzip(&vec![0; 40 << 20]));
    let fetched = fetch_encoded("gzip, gzip", bomb);
    assert!(matches!(fetched, Err(FetchError::TooLarge(_))), "{fetched:?}");
    // Members of next to nothing, as many as fit.
    for member in [gzip(b""), gzip(b"x")] {
        let start = Instant::now();
        let many = member.repeat((30 << 20) / member.len());
        let fetched = fetch_encoded("gzip", many.clone());
        assert!(matches!(fetched, Err(FetchError::Damaged)), "{fetched:?}");
        let fetched = fetch_encoded("gzip, gzip", gzip(&many));
        assert!(matches!(fetched, Err(FetchError::Damaged)), "{fetched:?}");
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    }
    let fetched = fetch_encoded("gzip, gzip, gzip, gzip, gzip, gzip", b"x".to_vec());
    assert!(fetched.is_err(), "{fetched:?}");
}

#[test]
fn a_download_that_breaks_off_is_no_picture() {
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let packed = gzip(&[7; 5000]);
    let half = &packed[..packed.len() / 2];
    for (what, sent) in [
        ("shorter than told", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npicture".to_vec()),
        ("nothing at all", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n".to_vec()),
        ("no last chunk", [&chunked[..], b"7\r\npicture\r\n"].concat()),
        ("half a chunk", [&chunked[..], b"70\r\npicture"].concat()),
        ("no chunk", [&chunked[..], b"zz\r\npicture\r\n0\r\n\r\n"].concat()),
        ("a chunk without end", [&chunked[..], b"4\r\npicture\r\n0\r\n\r\n"].concat()),
        ("half of gzip", answer("200 OK", &[("Content-Encoding", b"gzip")], half)),
        ("no gzip", answer("200 OK", &[("Content-Encoding", b"gzip")], b"picture")),
        (
            "half of zlib",
            answer("200 OK", &[("Content-Encoding", b"deflate")], &zlib(&[7; 5000])[..9]),
        ),
    ] {
        let fetched = Canned::serve(move |_, _| sent.clone()).fetch("/");
        assert!(fetched.as_ref().is_err_and(FetchError::is_transient), "{what}: {fetched:?}");
    }
}

/// A server that closes each connection at its second request, as one does that has just decided to.
fn forgetful(answers: &'static [u8]) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            counted.fetch_add(1, Ordering::SeqCst);
            thread::spawn(move || {
                read_head(&mut stream).unwrap();
                stream.write_all(answers).unwrap();
                read_head(&mut stream);
            });
        }
    });
    (port, connections)
}

#[test]
fn a_kept_connection_that_has_gone_stale_costs_no_attempt() {
    let (port, connections) = forgetful(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture");
    let fetcher = fetcher(on_loopback());
    let url = format!("http://127.0.0.1:{port}/");
    for expected in 1..=3 {
        let fetched = fetcher.fetch(&url, &FetchLimits::default(), &Stop::default());
        assert_eq!(fetched.unwrap(), b"picture");
        assert_eq!(connections.load(Ordering::SeqCst), expected);
    }
    // A new connection that is closed is no stale one.
    let (port, connections) = forgetful(b"");
    let closed = fetcher.fetch(
        &format!("http://127.0.0.1:{port}/"),
        &FetchLimits { total: Duration::from_secs(1), ..FetchLimits::default() },
        &Stop::default(),
    );
    assert!(closed.is_err());
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

/// A server that takes connections and breaks them off, after these bytes.
fn resets(bytes: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // What is unread at the end makes it a reset.
            stream.read_exact(&mut [0; 10]).unwrap();
            stream.write_all(bytes).unwrap();
            // The client reads what has come before it learns of the reset.
            thread::sleep(Duration::from_millis(100));
        }
    });
    port
}

#[test]
fn failures_are_told_apart() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let refused = fetch(&format!("http://127.0.0.1:{unused}/"));
    assert!(matches!(refused, Err(FetchError::Refused)), "{refused:?}");
    for (bytes, expected) in [
        (&b""[..], "the server closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nConte", "the server closed the connection without an answer"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npic",
            "the download broke off before its end",
        ),
        // Of no known length: its end would be the connection's, but for the reset.
        (b"HTTP/1.1 200 OK\r\n\r\npic", "the download broke off before its end"),
        (b"220 mail.example ready\r\n", "the server's answer cannot be read as HTTP"),
    ] {
        let fetched = fetch(&format!("http://127.0.0.1:{}/", resets(bytes)));
        let error = fetched.unwrap_err();
        assert_eq!(error.to_string(), expected, "{}", String::from_utf8_lossy(bytes));
        assert!(error.is_transient());
    }
    let nobody = Answering(|| Err(io::Error::other("failed to lookup address information").into()));
    let fetched =
        with_resolver(nobody).fetch("http://a.example/", &FetchLimits::default(), &Stop::default());
    assert!(matches!(fetched, Err(FetchError::NoHost)), "{fetched:?}");
}

#[test]
fn a_body_of_no_known_length_ends_with_the_connection() {
    let server = Canned::serve(|_, _| b"HTTP/1.1 200 OK\r\n\r\npicture".to_vec());
    assert_eq!(server.fetch("/").unwrap(), b"picture");
    let server = Canned::serve(|_, _| b"HTTP/1.0 200 OK\r\n\r\npicture".to_vec());
    assert_eq!(server.fetch("/").unwrap(), b"picture");
}
