//! `florence top` against real servers: as text, and in a terminal.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::{
    io::{Read, Write},
    process::{Child, Command, Stdio},
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
    assert!(text.contains("tiny (ready)"), "{text}");
    // With the whole reason, for who reads what is printed and for who reads what went wrong.
    let reason = "127.0.0.1:1: Connection refused (os error 111)";
    let error = String::from_utf8(ran.stderr).unwrap();
    for text in [text, error] {
        assert!(text.contains(reason) && !text.contains("secret"), "{text}");
    }
}

/// It runs in a terminal, which `script` gives it; all that it has shown.
fn in_a_terminal(server: &Server, command: &str) -> (Child, Arc<Mutex<String>>) {
    let mut child = Command::new("script")
        .args(["-qec", command, "/dev/null"])
        .env("FLORENCE_REDIS", url(server))
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
    (child, shown)
}

#[test]
fn in_a_terminal_it_goes_on_until_q() {
    let server = server();
    let command = format!("stty cols 120 rows 50; {} top", env!("CARGO_BIN_EXE_florence"));
    let (mut child, shown) = in_a_terminal(&server, &command);
    eventually("figures are there", || {
        shown.lock().unwrap().contains("pictures a second").then_some(())
    });
    // What has changed is shown, too.
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    eventually("the pause is told", || shown.lock().unwrap().contains("PAUSED").then_some(()));
    child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_small_terminal_shows_whole_names_and_scrolls() {
    let server = server();
    let task = "<CAPTION_TO_PHRASE_GROUNDING>";
    let (pictures, prompt) = (Pictures::serve(), format!("{task} a red square"));
    server.call::<()>(&["FLORENCE.SUBMIT", "more", &pictures.url("shapes.png"), &prompt]);
    server.call::<redis::Value>(&["FLORENCE.WAIT", "more", "60"]);
    for (rows, hint, key) in [(60, task, ""), (24, "0 lines above, ", "\x1b[F")] {
        let command = format!("stty cols 80 rows {rows}; {} top", env!("CARGO_BIN_EXE_florence"));
        let (mut child, shown) = in_a_terminal(&server, &command);
        let eventually_shown = |what: &str| {
            eventually(what, || shown.lock().unwrap().contains(what).then_some(()));
        };
        eventually_shown(hint);
        assert_eq!(shown.lock().unwrap().contains("fetched"), rows == 60);
        child.stdin.as_mut().unwrap().write_all(key.as_bytes()).unwrap();
        // To the end of it.
        eventually_shown("fetched");
        child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn signals_leave_the_terminal_as_it_was() {
    let server = server();
    for signal in ["TERM", "HUP", "INT"] {
        let florence = env!("CARGO_BIN_EXE_florence");
        let command = format!("stty cols 80 rows 24; echo pid $$.; exec {florence} top");
        let (mut child, shown) = in_a_terminal(&server, &command);
        let pid = eventually("figures are there", || {
            let shown = shown.lock().unwrap();
            let (_, pid) = shown.split_once("pid ").filter(|it| it.1.contains("pictures"))?;
            Some(pid.split('.').next()?.to_owned())
        });
        assert!(
            Command::new("kill").args([&format!("-{signal}"), &*pid]).status().unwrap().success()
        );
        child.wait().unwrap();
        eventually("the terminal is as it was", || {
            let shown = shown.lock().unwrap();
            (shown.contains("\x1b[?1049l") && shown.contains("\x1b[?25h")).then_some(())
        });
    }
}
