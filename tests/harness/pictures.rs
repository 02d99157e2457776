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
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tiny/samples")
        .join(name)
        .canonicalize()
        .unwrap()
}

/// An HTTP server on loopback; it lives until the test's process ends.
pub struct Pictures {
    port: u16,
    hits: Arc<AtomicUsize>,
    answered: Arc<AtomicUsize>,
    gates: Arc<Gates>,
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
    /// `/redirect/NAME`, `/away/HOST/NAME` (a redirect to another host) and `/loop`.
    pub fn serve() -> Self {
        let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
        let port = server.server_addr().to_ip().unwrap().port();
        let hits = Arc::new(AtomicUsize::new(0));
        let answered = Arc::new(AtomicUsize::new(0));
        let gates = Arc::<Gates>::default();
        let (counted, ended) = (Arc::clone(&hits), Arc::clone(&answered));
        let keeping = Arc::clone(&gates);
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let hit = counted.fetch_add(1, Ordering::SeqCst);
                let (ended, gates) = (Arc::clone(&ended), Arc::clone(&keeping));
                thread::spawn(move || {
                    // The client may have gone.
                    let trickled = request.url().strip_prefix("/trickle/").map(picture);
                    let _ = if let Some(path) = trickled {
                        trickle(request, &std::fs::read(path).unwrap())
                    } else {
                        let response = respond(request.url(), hit, &gates);
                        request.respond(response)
                    };
                    ended.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        Self { port, hits, answered, gates }
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
        self.hits.load(Ordering::SeqCst)
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
