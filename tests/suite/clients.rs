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

#[test]
fn the_typed_clients_know_every_code_of_a_failure() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let commands = text("docs/COMMANDS.md");
    let (_, table) = commands.split_once("| code | meaning | retried |\n|---|---|---|\n").unwrap();
    let rows = table.lines().map_while(|line| line.strip_prefix("| `")?.split_once('`'));
    let codes: Vec<&str> = rows.map(|(code, _)| code).collect();
    assert!(codes.len() > 8, "{codes:?}");
    for client in ["clients/python/src/florence_redis/jobs.py", "clients/node/jobs.js"] {
        let client = text(client);
        let is_unknown = |code: &&&str| !client.contains(&format!("code = \"{code}\""));
        let unknown: Vec<_> = codes.iter().filter(is_unknown).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }
}
