//! Sample pictures, and a loopback HTTP server that serves them, well or badly.

use std::{
    collections::HashSet,
    io::{self, Write},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tiny_http::{Header, Request, Response};

/// Path of a sample picture.
pub fn picture(name: &str) -> PathBuf {
    crate::path("models/tiny/samples").join(name)
}

/// A black picture in true colour, whose file is a hundredth of a percent of its pixels; with a
/// text in its first bytes.
pub fn blank_png(side: u32, text: &str) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        png.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        let body = [kind, data].concat();
        png.extend(&body);
        png.extend(crc32(&body).to_be_bytes());
    };
    let size = side.to_be_bytes();
    chunk(b"IHDR", &[&size[..], &size, &[8, 2, 0, 0, 0]].concat());
    chunk(b"tEXt", &[b"Comment\0", text.as_bytes()].concat());
    chunk(b"IDAT", &zeros_in_zlib(side as usize * (1 + 3 * side as usize)));
    chunk(b"IEND", &[]);
    png
}

/// So many zeros as zlib writes them, in one block of fixed codes: a zero, then copies of it.
fn zeros_in_zlib(count: usize) -> Vec<u8> {
    const LONGEST_COPY: usize = 258;
    let (mut bits, mut filled, mut out) = (0_u32, 0, vec![0x78, 0x01]);
    // Codes as they stand in the stream, their first bit lowest.
    let mut push = |code: u32, length: u32| {
        bits |= code << filled;
        filled += length;
        while filled >= 8 {
            out.push(bits.to_le_bytes()[0]);
            (bits, filled) = (bits >> 8, filled - 8);
        }
    };
    let zero = (0b0000_1100, 8);
    push(0b011, 3);
    push(zero.0, zero.1);
    for _ in 0..(count - 1) / LONGEST_COPY {
        push(0b1010_0011, 8);
        push(0, 5);
    }
    for _ in 0..(count - 1) % LONGEST_COPY {
        push(zero.0, zero.1);
    }
    push(0, 7 + 7);
    // The checksum of zeros: their number, and one.
    out.extend(u16::try_from(count % 65521).unwrap().to_be_bytes());
    out.extend(1_u16.to_be_bytes());
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// An HTTP server on loopback; it lives until the test's process ends.
pub struct Pictures {
    port: u16,
    answered: Arc<AtomicUsize>,
    gates: Arc<Gates>,
    log: Arc<Mutex<Log>>,
}

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Path and query.
    pub url: String,
    /// The header `Authorization`.
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Log {
    asked: Vec<Asked>,
    at_once: usize,
    most_at_once: usize,
}

impl Log {
    /// Notes a request; how many there were before.
    fn begin(&mut self, request: &Request) -> usize {
        let authorization = request.headers().iter().find(|it| it.field.equiv("Authorization"));
        let authorization = authorization.map(|header| header.value.as_str().to_owned());
        self.asked.push(Asked { url: request.url().to_owned(), authorization });
        self.at_once += 1;
        self.most_at_once = self.most_at_once.max(self.at_once);
        self.asked.len() - 1
    }
}

/// What keeps held pictures back: the gates that are open, by name.
#[derive(Default)]
struct Gates {
    open: Mutex<HashSet<String>>,
    changed: Condvar,
}

impl Gates {
    fn open(&self, gate: &str) {
        self.open.lock().unwrap().insert(gate.to_owned());
        self.changed.notify_all();
    }

    fn pass(&self, gate: &str) {
        let open = self.open.lock().unwrap();
        drop(self.changed.wait_while(open, |open| !open.contains(gate)).unwrap());
    }
}

impl Pictures {
    /// Serves `/NAME` (a sample), `/slow/MS/NAME`, `/status/CODE`, `/flaky/N/NAME` (503 for the
    /// first N requests), `/slow/MS/flaky/N/NAME` (both), `/trickle/NAME` (a byte now and then),
    /// `/held/GATE/NAME` (once [`Self::release`] or `/release/GATE` has opened the gate), `/text`,
    /// `/redirect/NAME`, `/away/HOST/NAME` (a redirect to another host) and `/loop`. Queries change
    /// nothing.
    pub fn serve() -> Self {
        let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
        let port = server.server_addr().to_ip().unwrap().port();
        let answered = Arc::new(AtomicUsize::new(0));
        let gates = Arc::<Gates>::default();
        let log = Arc::<Mutex<Log>>::default();
        let (ended, keeping, noting) =
            (Arc::clone(&answered), Arc::clone(&gates), Arc::clone(&log));
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let hit = noting.lock().unwrap().begin(&request);
                let (ended, gates) = (Arc::clone(&ended), Arc::clone(&keeping));
                let log = Arc::clone(&noting);
                thread::spawn(move || {
                    // The client may have gone.
                    let trickled = request.url().strip_prefix("/trickle/").map(picture);
                    let _ = if let Some(path) = trickled {
                        let trickled = trickle(request, &std::fs::read(path).unwrap());
                        log.lock().unwrap().at_once -= 1;
                        trickled
                    } else {
                        let path = request.url().split('?').next().unwrap();
                        let response = respond(path, hit, &gates);
                        // Before the client can know, and ask for the next one.
                        log.lock().unwrap().at_once -= 1;
                        request.respond(response)
                    };
                    ended.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        Self { port, answered, gates, log }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }

    /// Lets the pictures behind a gate go, those too that are asked for later. Without a byte, a
    /// server gives up after 20 s.
    pub fn release(&self, gate: &str) {
        self.gates.open(gate);
    }

    /// Requests so far.
    pub fn hits(&self) -> usize {
        self.log.lock().unwrap().asked.len()
    }

    /// What the requests so far asked for.
    pub fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().asked.clone()
    }

    /// Requests that wait for their answer.
    pub fn at_once(&self) -> usize {
        self.log.lock().unwrap().at_once
    }

    /// The most of them that there have been.
    pub fn most_at_once(&self) -> usize {
        self.log.lock().unwrap().most_at_once
    }

    /// Requests that were answered so far, whether or not somebody was still there to hear it.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::SeqCst)
    }
}

type Body = Response<io::Cursor<Vec<u8>>>;

fn respond(url: &str, hit: usize, gates: &Gates) -> Body {
    let parts: Vec<&str> = url.trim_start_matches('/').split('/').collect();
    match parts[..] {
        ["slow", ms, ref rest @ ..] if !rest.is_empty() => {
            thread::sleep(Duration::from_millis(ms.parse().unwrap()));
            respond(&rest.join("/"), hit, gates)
        }
        ["held", gate, ref rest @ ..] if !rest.is_empty() => {
            gates.pass(gate);
            respond(&rest.join("/"), hit, gates)
        }
        ["release", gate] => {
            gates.open(gate);
            Response::from_string("open")
        }
        ["status", code] => {
            Response::from_string("no").with_status_code(code.parse::<u16>().unwrap())
        }
        ["flaky", n, _] if hit < n.parse().unwrap() => {
            Response::from_string("later").with_status_code(503)
        }
        ["text"] => Response::from_string("this is no picture"),
        ["redirect", name] => redirect(&format!("/{name}")),
        ["loop"] => redirect("/loop"),
        ["away", "file:", ..] => redirect("file:///etc/passwd"),
        ["away", host, name] => redirect(&format!("http://{host}/{name}")),
        [name] | ["flaky", _, name] => sample(name),
        _ => Response::from_string("no").with_status_code(404),
    }
}

/// The head at once, and then a byte at a time, for minutes.
fn trickle(request: Request, bytes: &[u8]) -> io::Result<()> {
    let mut writer = request.into_writer();
    write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len())?;
    for byte in bytes.chunks(1) {
        writer.write_all(byte)?;
        writer.flush()?;
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn redirect(location: &str) -> Body {
    let location = Header::from_bytes("Location", location).unwrap();
    Response::from_string("").with_status_code(302).with_header(location)
}

fn sample(name: &str) -> Body {
    match std::fs::read(picture(name)) {
        Ok(bytes) => Response::from_data(bytes),
        Err(_) => Response::from_string("no").with_status_code(404),
    }
}
