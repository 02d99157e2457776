//! redis-py and node-redis, as their users would.
//!
//! node-redis is found in `tests/clients/node_modules`; `make test` installs both.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use florence_tests::{Server, picture, python};

fn run(program: &Path, script: &str) {
    let server = Server::start();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("clients").join(script);
    let output = Command::new(program)
        .arg(script)
        .arg(server.port.to_string())
        .arg(picture("shapes.png"))
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; run `make test`", program.display()));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("all right"), "{out}{err}");
}

#[test]
fn redis_py_submits_and_waits() {
    run(&python(), "client.py");
}

#[test]
fn node_redis_submits_and_waits() {
    run(Path::new("node"), "client.mjs");
}
