//! redis-py and node-redis, as their users would.
//!
//! node-redis is found in `tests/clients/node_modules`; `make test` installs both.

use std::path::Path;

use florence_tests::{Server, picture, python, run_client};

fn run(program: &Path, script: &str) {
    let server = Server::start();
    let shapes = picture("shapes.png").display().to_string();
    run_client(program, script, [server.port.to_string(), shapes]).unwrap();
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
