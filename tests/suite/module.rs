//! Loading, settings, documentation, models that cannot be loaded.

use std::{collections::HashMap, path::Path};

use florence_tests::{Server, Settings, eventually, picture};
use redis::Value;

#[test]
fn settings_are_read_and_changed_by_config() {
    let server = Server::with(Settings {
        lines: vec!["florence.max-batch 5".to_owned()],
        module_args: vec!["max-queue".to_owned(), "77".to_owned()],
        ..Settings::default()
    });
    let get = |name: &str| -> String {
        let reply: HashMap<String, String> = server.call(&["CONFIG", "GET", name]);
        reply[name].clone()
    };
    assert_eq!((get("florence.max-batch"), get("florence.max-queue")), ("5".into(), "77".into()));
    server.call::<()>(&["CONFIG", "SET", "florence.max-batch", "6"]);
    assert_eq!(get("florence.max-batch"), "6");
    assert!(server.try_call::<()>(&["CONFIG", "SET", "florence.max-batch", "0"]).is_err());
    assert!(server.try_call::<()>(&["CONFIG", "SET", "florence.model", "/x"]).is_err());
}

#[test]
fn a_second_load_with_a_typing_error_and_an_unload_are_refused() {
    let mut server = Server::start();
    assert!(server.try_call::<()>(&["MODULE", "UNLOAD", "florence"]).is_err());
    assert!(server.is_alive());
    assert_eq!(server.stat("panics"), 0);
}

#[test]
fn commands_are_documented() {
    let server = Server::start();
    let names = ["submit", "get", "wait", "cancel", "jobs", "stats", "model", "control", "help"];
    for name in names {
        let name = format!("florence.{name}");
        let docs: HashMap<String, HashMap<String, Value>> =
            server.call(&["COMMAND", "DOCS", &name]);
        assert!(docs[&name].contains_key("summary"), "{name}");
    }
    let keys: Vec<String> =
        server.call(&["COMMAND", "GETKEYS", "FLORENCE.WAIT", "a", "b", "c", "10"]);
    assert_eq!(keys, ["a", "b", "c"]);
    let keys: Vec<String> =
        server.call(&["COMMAND", "GETKEYS", "FLORENCE.SUBMIT", "a", "/x.png", "<OD>"]);
    assert_eq!(keys, ["a"]);
    assert!(server.call::<Vec<String>>(&["FLORENCE.HELP"]).len() > 5);
}

#[test]
fn the_embedded_model_says_what_it_knows() {
    let server = Server::start();
    server.wait_for_model();
    let note = "the embedded tiny model knows coloured shapes and short words; photographs need \
                real weights: florence pull microsoft/Florence-2-base-ft --to DIRECTORY, then \
                florence.model DIRECTORY";
    let model: HashMap<String, Option<String>> = server.call(&["FLORENCE.MODEL"]);
    assert_eq!(model["note"].as_deref(), Some(note));
    assert_eq!(server.log().matches(note).count(), 1, "{}", server.log());
    // A checkpoint of the operator's choice needs no such note.
    let model = tempfile::tempdir().unwrap();
    copy_model(model.path());
    let line = format!("florence.model {}", model.path().display());
    let server = Server::with(Settings::lines(&[&line]));
    server.wait_for_model();
    let model: HashMap<String, Option<String>> = server.call(&["FLORENCE.MODEL"]);
    assert_eq!(model["note"], None);
    assert!(!server.log().contains("photographs"), "{}", server.log());
}

#[test]
fn info_shows_the_counters() {
    let server = Server::start();
    server.wait_for_model();
    let info: String = server.call(&["INFO", "florence"]);
    for line in ["florence_model:ready", "florence_jobs_waiting:0", "florence_panics:0"] {
        assert!(info.contains(line), "{line} is missing in {info}");
    }
}

#[test]
fn users_are_kept_to_their_keys() {
    let server = Server::start();
    server.call::<()>(&["ACL", "SETUSER", "alice", "on", "nopass", "~alice:*", "+@all"]);
    server.call::<()>(&["SET", "secret", "x"]);
    let mut alice = server.connect();
    let _: () = redis::cmd("AUTH").arg("alice").arg("x").query(&mut alice).unwrap();
    let denied = |alice: &mut redis::Connection, args: &[&str]| {
        let reply: redis::RedisResult<Value> = redis::cmd(args[0]).arg(&args[1..]).query(alice);
        let error = reply.unwrap_err().to_string();
        assert!(error.contains("permission") || error.contains("NOPERM"), "{args:?}: {error}");
    };
    denied(&mut alice, &["FLORENCE.GET", "bob:1"]);
    denied(&mut alice, &["FLORENCE.WAIT", "bob:1", "1"]);
    denied(&mut alice, &["FLORENCE.CANCEL", "bob:1"]);
    denied(&mut alice, &["FLORENCE.SUBMIT", "bob:1", "DATA", "x", "<OD>"]);
    denied(&mut alice, &["FLORENCE.SUBMIT", "alice:1", "KEY", "secret", "<OD>"]);
}

fn copy_model(to: &Path) {
    let from = picture("shapes.png").parent().unwrap().parent().unwrap().to_owned();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn a_damaged_model_is_told_and_the_server_lives() {
    let missing: fn(&Path) = |dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    let truncated: fn(&Path) = |dir| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    };
    let misshapen: fn(&Path) = |dir| {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["text_config"]["d_model"] = 64.into();
        std::fs::write(&path, config.to_string()).unwrap();
    };
    for (damage, expected) in [
        (missing, "tokenizer.json"),
        (truncated, "model.safetensors is damaged"),
        (misshapen, "expected ["),
    ] {
        let model = tempfile::tempdir().unwrap();
        copy_model(model.path());
        damage(model.path());
        let line = format!("florence.model {}", model.path().display());
        let server = Server::with(Settings::lines(&[&line]));
        let problem = eventually("the model fails", || {
            let model: HashMap<String, Option<String>> = server.call(&["FLORENCE.MODEL"]);
            (model["state"].as_deref() == Some("failed")).then(|| model["error"].clone().unwrap())
        });
        assert!(problem.contains(expected), "{problem}");
        let refused = server.error(&["FLORENCE.SUBMIT", "j", "http://127.0.0.1/x", "<OD>"]);
        assert!(refused.starts_with("NOMODEL") && refused.contains(expected), "{refused}");
        assert!(server.log().contains("cannot load the model"));
        assert!(server.call::<String>(&["INFO", "florence"]).contains("florence_model:failed"));
    }
}

#[test]
fn a_model_directory_works_like_the_embedded_model() {
    let model = tempfile::tempdir().unwrap();
    copy_model(model.path());
    let line = format!("florence.model {}", model.path().display());
    let (ours, embedded) = (Server::with(Settings::lines(&[&line])), Server::start());
    let bytes = std::fs::read(picture("poster.jpg")).unwrap();
    let answer = |server: &Server| {
        let mut connection = server.connect();
        redis::cmd("FLORENCE.SUBMIT")
            .arg("j")
            .arg("DATA")
            .arg(&bytes)
            .arg("<DETAILED_CAPTION>")
            .exec(&mut connection)
            .unwrap();
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", "j", "60"]);
        job["result"].clone().unwrap()
    };
    assert_eq!(answer(&ours), answer(&embedded));
}

#[test]
fn servers_of_a_host_share_the_packed_weights() {
    let model = tempfile::tempdir().unwrap();
    copy_model(model.path());
    let line = format!("florence.model {}", model.path().display());
    let servers: Vec<Server> = (0..2)
        .map(|_| Server::with(Settings::lines(&[&line, "florence.precision auto"])))
        .collect();
    for server in &servers {
        server.wait_for_model();
        let maps = std::fs::read_to_string(server.proc().join("maps")).unwrap();
        assert!(maps.contains("/florence-packed-"), "{}", server.log());
    }
    let keeps_nothing = [&line, "florence.keep-packed no"];
    let private = Server::with(Settings::lines(&keeps_nothing));
    private.wait_for_model();
    let maps = std::fs::read_to_string(private.proc().join("maps")).unwrap();
    assert!(!maps.contains("/florence-packed-"));
}

#[test]
fn compute_threads_are_pinned_where_the_operator_says() {
    let server = Server::with(Settings::lines(&[
        "florence.threads 3",
        "florence.cpus 0",
        "florence.nice 7",
    ]));
    server.wait_for_model();
    let threads = std::fs::read_dir(server.proc().join("task")).unwrap();
    let compute = threads.filter_map(|thread| {
        let thread = thread.unwrap().path();
        let name = std::fs::read_to_string(thread.join("comm")).unwrap();
        name.trim().strip_prefix("florence-")?.parse::<usize>().ok()?;
        let status = std::fs::read_to_string(thread.join("status")).unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Some(allowed.unwrap().trim().to_owned())
    });
    assert_eq!(compute.collect::<Vec<_>>(), ["0", "0", "0"]);
}
