//! `florence top` against real servers: as text, and in a terminal.

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use florence_tests::{Pictures, Server, eventually};

fn top() -> Command {
    Command::new(env!("CARGO_BIN_EXE_florence"))
}

fn url(server: &Server) -> String {
    format!("redis://127.0.0.1:{}", server.port)
}

/// A server that has answered one question, and failed at another.
fn server() -> Server {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    for (key, image) in [("good", "shapes.png"), ("bad", "status/404")] {
        server.call::<()>(&["FLORENCE.SUBMIT", key, &pictures.url(image), "<OD>"]);
        server.call::<redis::Value>(&["FLORENCE.WAIT", key, "60"]);
    }
    server
}

#[test]
fn without_a_terminal_it_is_printed_once() {
    let server = server();
    let ran = top().args(["top", "--redis", &url(&server)]).output().unwrap();
    let text = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success(), "{text}");
    for part in ["master", "tiny (ready)", "answered 1 ", "failed 1 ", "<OD>", "FETCH"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    // One that does not answer is named, and the others are shown all the same.
    let away = ["--redis", "redis://:secret@127.0.0.1:1"];
    let ran = top().args(["top", "--once", "--redis", &url(&server)]).args(away).output().unwrap();
    let text = String::from_utf8(ran.stdout).unwrap();
    assert_eq!(ran.status.code(), Some(1), "{text}");
    assert!(text.contains("127.0.0.1:1 ") && text.contains("tiny (ready)"), "{text}");
    assert!(!text.contains("secret"), "{text}");
}

#[test]
fn in_a_terminal_it_goes_on_until_q() {
    let server = server();
    // `script` gives it a terminal.
    let command = format!("stty cols 120 rows 50; {} top", env!("CARGO_BIN_EXE_florence"));
    let mut child = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("FLORENCE_REDIS", url(&server))
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let shown = Arc::<Mutex<String>>::default();
    let (seen, mut output) = (Arc::clone(&shown), child.stdout.take().unwrap());
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = output.read(&mut bytes) {
            seen.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    });
    eventually("figures are there", || {
        shown.lock().unwrap().contains("pictures a second").then_some(())
    });
    // What has changed is shown, too.
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    eventually("the pause is told", || shown.lock().unwrap().contains("PAUSED").then_some(()));
    child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    assert!(child.wait().unwrap().success());
}
