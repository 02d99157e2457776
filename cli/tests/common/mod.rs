//! `florence web` as a process, and HTTP as bytes: tests say every header themselves.
#![expect(clippy::unwrap_used, clippy::panic, reason = "test helpers")]
#![allow(dead_code, clippy::allow_attributes, reason = "not every test needs every helper")]

pub(crate) mod browser;

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

/// A request, and the answer to it.
pub(crate) fn http(port: u16, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
    let host = format!("127.0.0.1:{port}");
    let named = |name: &str| headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
    let mut head = format!("{line} HTTP/1.1\r\nConnection: close\r\n");
    if !named("content-length") {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    if !named("host") {
        let _ = write!(head, "Host: {host}\r\n");
    }
    for (name, value) in headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    stream.write_all(&[head.as_bytes(), b"\r\n", body].concat()).unwrap();
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).unwrap() > 0, "{line}: no answer: {head}");
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut answer = Answer { status, head, body: Vec::new() };
    match answer.header("content-length").map(|length| length.parse().unwrap()) {
        Some(length) => {
            answer.body = vec![0; length];
            reader.read_exact(&mut answer.body).unwrap();
        }
        None => drop(reader.read_to_end(&mut answer.body).unwrap()),
    }
    answer
}

/// A running page; ended on drop.
pub(crate) struct Page {
    child: Child,
    pub(crate) port: u16,
}

impl Page {
    /// About these servers.
    pub(crate) fn about(servers: &[&florence_tests::Server], args: &[&str]) -> Self {
        let urls: Vec<String> =
            servers.iter().map(|server| format!("redis://127.0.0.1:{}", server.port)).collect();
        let urls: Vec<&str> = urls.iter().flat_map(|url| ["--redis", url]).collect();
        Self::start(&[&urls, args].concat())
    }

    pub(crate) fn start(args: &[&str]) -> Self {
        let listen: &[&str] =
            if args.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let mut child = Command::new(env!("CARGO_BIN_EXE_florence"))
            .arg("web")
            .args(listen)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().trim_end_matches('/').rsplit(':').next().unwrap();
        Self { port: port.parse().unwrap_or_else(|_| panic!("no port in {line:?}")), child }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        http(self.port, &format!("GET {path}"), &[], &[])
    }

    /// What the page itself would send.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = [("Content-Type", "application/json"), ("X-Florence", "1")];
        http(self.port, &format!("POST {path}"), &headers, body.to_string().as_bytes())
    }

    /// The first event of the live overview that `is_meant` accepts.
    pub(crate) fn live(&self, query: &str, is_meant: impl Fn(&Value) -> bool) -> Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let (port, line) = (self.port, format!("GET /api/live{query} HTTP/1.1"));
        write!(stream, "{line}\r\nHost: 127.0.0.1:{port}\r\n\r\n").unwrap();
        for line in BufReader::new(stream).lines() {
            let line = line.unwrap();
            let Some(data) = line.strip_prefix("data: ") else { continue };
            let event: Value = serde_json::from_str(data).unwrap();
            if is_meant(&event) {
                return event;
            }
        }
        panic!("the stream has ended")
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The token of a job's key in a query.
pub(crate) fn query(id: &str) -> String {
    id.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'-' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}
