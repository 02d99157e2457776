//! Sample pictures, and a loopback HTTP server that serves them, well or badly.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tiny_http::{Header, Response};

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
}

impl Pictures {
    /// Serves `/NAME` (a sample), `/slow/MS/NAME`, `/status/CODE`, `/flaky/N/NAME` (503 for the
    /// first N requests), `/text`, `/redirect/NAME`, `/away/HOST/NAME` (a redirect to
    /// another host) and `/loop`.
    pub fn serve() -> Self {
        let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
        let port = server.server_addr().to_ip().unwrap().port();
        let hits = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&hits);
        thread::spawn(move || {
            for request in server.incoming_requests() {
                let hit = counted.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || {
                    let response = respond(request.url(), hit);
                    // The client may have gone.
                    let _ = request.respond(response);
                });
            }
        });
        Self { port, hits }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }

    /// Requests so far.
    pub fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }
}

type Body = Response<std::io::Cursor<Vec<u8>>>;

fn respond(url: &str, hit: usize) -> Body {
    let parts: Vec<&str> = url.trim_start_matches('/').split('/').collect();
    match parts[..] {
        ["slow", ms, name] => {
            thread::sleep(Duration::from_millis(ms.parse().unwrap()));
            sample(name)
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
