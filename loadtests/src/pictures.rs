//! Sample pictures on a loopback HTTP server, as slow as a scenario wants.
//!
//! Written by hand for one reason: head and body go out in one write. Servers that send them apart
//! without `TCP_NODELAY` make every download wait 40 ms for the client's delayed acknowledgement,
//! which would then be in all figures.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use crate::scenario::Scenario;

/// Serves the scenario's pictures until the process ends; returns the address, with a slash.
pub(crate) fn serve(scenario: &Scenario) -> anyhow::Result<String> {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny/samples");
    let read = |name: &String| anyhow::Ok((name.clone(), std::fs::read(samples.join(name))?));
    let pictures: HashMap<String, Vec<u8>> =
        scenario.pictures.iter().map(read).collect::<Result<_, _>>()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://{}/", listener.local_addr()?);
    let (pictures, pause) = (Arc::new(pictures), Duration::from_millis(scenario.slow_ms));
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let pictures = Arc::clone(&pictures);
            thread::spawn(move || {
                // The client may have gone.
                let _ = answer(client, &pictures, pause);
            });
        }
    });
    Ok(address)
}

fn answer(
    mut client: TcpStream,
    pictures: &HashMap<String, Vec<u8>>,
    pause: Duration,
) -> io::Result<()> {
    let mut lines = BufReader::new(client.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    thread::sleep(pause);
    let name = first.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
    let (status, body) = match pictures.get(name) {
        Some(picture) => ("200 OK", picture.as_slice()),
        None => ("404 Not Found", &b""[..]),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    client.write_all(&[head.as_bytes(), body].concat())
}
