//! Loading, settings, documentation, models that cannot be loaded.

use std::{collections::HashMap, path::Path};

use florence_tests::{Server, Settings, copy_model, eventually, path, picture};
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
fn a_server_on_which_commands_have_other_names_is_refused() {
    let log = Server::refused(Settings::lines(&["rename-command HSET hashset"]));
    assert!(log.contains("jobs cannot be written without HSET, see rename-command"), "{log}");
    // What no job needs may have another one.
    drop(Server::with(Settings::lines(&["rename-command KEYS \"\""])));
}

#[test]
fn a_second_load_with_a_typing_error_and_an_unload_are_refused() {
    let mut server = Server::start();
    assert!(server.try_call::<()>(&["MODULE", "UNLOAD", "florence"]).is_err());
    assert!(server.is_alive());
    assert_eq!(server.stat("panics"), 0);
}

/// What COMMAND DOCS tells of a command of ours.
fn docs(server: &Server, command: &str) -> HashMap<String, Value> {
    let name = format!("florence.{command}");
    let mut docs: HashMap<String, HashMap<String, Value>> =
        server.call(&["COMMAND", "DOCS", &name]);
    docs.remove(&name).unwrap_or_else(|| panic!("{name}: {docs:?}"))
}

const COMMANDS: [&str; 12] = [
    "submit",
    "get",
    "wait",
    "cancel",
    "retry",
    "jobs",
    "hosts",
    "stats",
    "model",
    "model.change",
    "control",
    "help",
];

#[test]
fn commands_are_documented() {
    let server = Server::start();
    let version =
        |text: &str| -> Vec<u32> { text.split('.').map(|part| part.parse().unwrap()).collect() };
    for name in COMMANDS {
        let docs = docs(&server, name);
        assert!(docs.contains_key("summary") && docs.contains_key("complexity"), "{name}");
        // No command is newer than the module.
        let since: String = redis::from_redis_value(&docs["since"]).unwrap();
        assert!(version(&since) <= version(env!("CARGO_PKG_VERSION")), "{name}: {since}");
    }
    let keys: Vec<String> =
        server.call(&["COMMAND", "GETKEYS", "FLORENCE.WAIT", "a", "b", "c", "10"]);
    assert_eq!(keys, ["a", "b", "c"]);
    let keys: Vec<String> =
        server.call(&["COMMAND", "GETKEYS", "FLORENCE.SUBMIT", "a", "/x.png", "<OD>"]);
    assert_eq!(keys, ["a"]);
    assert!(server.call::<Vec<String>>(&["FLORENCE.HELP"]).len() > 5);
}

/// How clients show arguments: words as they are, values in brackets, alternatives with bars.
fn shown(arguments: &Value, between: &str) -> String {
    let arguments: Vec<HashMap<String, Value>> = redis::from_redis_value(arguments).unwrap();
    let shown: Vec<String> = arguments.iter().map(one_shown).collect();
    shown.join(between)
}

fn one_shown(argument: &HashMap<String, Value>) -> String {
    let text = |field: &str| -> Option<String> {
        Some(redis::from_redis_value(argument.get(field)?).unwrap())
    };
    let (name, kind) = (text("name").unwrap(), text("type").unwrap());
    let flags: Vec<String> = argument
        .get("flags")
        .map(|flags| redis::from_redis_value(flags).unwrap())
        .unwrap_or_default();
    let value = match kind.as_str() {
        "pure-token" => None,
        "oneof" => Some(shown(&argument["arguments"], "|")),
        "block" => Some(shown(&argument["arguments"], " ")),
        _ => Some(name),
    };
    let words: Vec<String> = text("token").into_iter().chain(value).collect();
    let mut all = words.join(" ");
    if flags.iter().any(|flag| flag == "multiple") {
        all = format!("{all} [{all} ...]");
    }
    if flags.iter().any(|flag| flag == "optional") {
        all = format!("[{all}]");
    }
    all
}

#[test]
fn command_docs_tell_the_arguments_that_help_tells() {
    let server = Server::start();
    let help: Vec<String> = server.call(&["FLORENCE.HELP"]);
    // Lines that go on are indented.
    let help = help.join("\n").replace("\n    ", " ");
    let told = |name: &str| {
        let docs = docs(&server, name);
        docs.get("arguments").map(|arguments| shown(arguments, " ")).unwrap_or_default()
    };
    let mut known = 0;
    for line in help.lines() {
        let Some(words) = line.strip_prefix("FLORENCE.") else { continue };
        let (name, arguments) = words.split_once(' ').unwrap_or((words, ""));
        assert_eq!(told(&name.to_lowercase()), arguments, "{name}");
        known += 1;
    }
    // All but CONTROL, which nobody calls.
    assert_eq!(known, COMMANDS.len() - 1, "{help}");
    assert_eq!(told("control"), "channel message");
    // All options are there that the page about the commands has.
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/COMMANDS.md");
    let page = std::fs::read_to_string(page).unwrap();
    let submit = told("submit");
    let (_, table) = page.split_once("| option |").unwrap();
    let rows = table.split("\n\n").next().unwrap().lines().skip(2);
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    let words = cells.flat_map(|cell| cell.split(['`', ',', ' '])).filter(|word| !word.is_empty());
    let options: Vec<&str> = words.collect();
    assert!(options.len() >= 13, "{options:?}");
    for option in options {
        let is_shown = submit.split(['[', ']', '|', ' ']).any(|word| word == option);
        assert!(is_shown, "{option} is not in {submit}");
    }
}

#[test]
fn the_embedded_model_says_what_it_knows() {
    let server = Server::start();
    server.wait_for_model();
    let note = "the embedded tiny model knows coloured shapes and short words; photographs need \
                real weights: florence pull microsoft/Florence-2-base-ft --to DIRECTORY, then \
                florence.model DIRECTORY";
    let model = server.model();
    assert_eq!(model["note"].as_deref(), Some(note));
    assert_eq!(server.log().matches(note).count(), 1, "{}", server.log());
    // A checkpoint of the operator's choice needs no such note.
    let model = tempfile::tempdir().unwrap();
    copy_model(model.path());
    let line = format!("florence.model {}", model.path().display());
    let server = Server::with(Settings::lines(&[&line]));
    server.wait_for_model();
    let model = server.model();
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

/// What the server knows of a command's keys, and what is done with them.
fn keys_and_flags(server: &Server, command: &[&str]) -> Vec<(String, Vec<String>)> {
    server.call(&[&["COMMAND", "GETKEYSANDFLAGS"], command].concat())
}

#[test]
fn keys_that_are_only_read_may_be_read_only() {
    let server = Server::start();
    for (command, keys, flags) in [
        (&["FLORENCE.GET", "a"][..], &["a"][..], &["RO", "access"][..]),
        (&["FLORENCE.WAIT", "a", "b", "c", "1"], &["a", "b", "c"], &["RO", "access"]),
        (&["FLORENCE.CANCEL", "a", "b"], &["a", "b"], &["RW", "access", "update"]),
        (&["FLORENCE.RETRY", "a", "b"], &["a", "b"], &["RW", "access", "update"]),
        (&["FLORENCE.SUBMIT", "a", "/x.png", "<OD>"], &["a"], &["RW", "access", "insert"]),
    ] {
        let known = keys_and_flags(&server, command);
        let names: Vec<&str> = known.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(names, keys, "{command:?}");
        assert!(known.iter().all(|(_, known)| known == flags), "{command:?}: {known:?}");
    }
    let keys = ["%R~job:*", "+florence.get", "+florence.wait", "+florence.cancel"];
    server.call::<()>(&[&["ACL", "SETUSER", "reader"], &keys[..]].concat());
    let may = |command: &[&str]| {
        server.call::<String>(&[&["ACL", "DRYRUN", "reader"], command].concat()) == "OK"
    };
    assert!(may(&["FLORENCE.GET", "job:1"]));
    assert!(may(&["FLORENCE.WAIT", "job:1", "job:2", "1"]));
    assert!(!may(&["FLORENCE.WAIT", "job:1", "other", "1"]));
    assert!(!may(&["FLORENCE.CANCEL", "job:1"]));
}

#[test]
fn categories_of_users_hold_for_our_commands_where_the_server_lets_them() {
    let server = Server::start();
    // Which commands are in it is not told by Redis 7.4.
    if server.try_call::<Vec<String>>(&["ACL", "CAT", "florence"]).is_err() {
        return;
    }
    let refused = |category: &str, command: &[&str]| {
        let rules = ["ACL", "SETUSER", "user", "reset", "~*", "+@all", &format!("-@{category}")];
        server.call::<()>(&rules);
        server.call::<String>(&[&["ACL", "DRYRUN", "user"], command].concat()) != "OK"
    };
    let submit = ["FLORENCE.SUBMIT", "a", "/x.png", "<OD>"];
    let (get, wait) = (["FLORENCE.GET", "a"], ["FLORENCE.WAIT", "a", "1"]);
    assert!(refused("write", &submit) && !refused("read", &submit));
    assert!(refused("write", &["FLORENCE.CANCEL", "a"]));
    assert!(refused("write", &["FLORENCE.RETRY", "a"]));
    assert!(refused("read", &get) && refused("fast", &get) && !refused("write", &get));
    assert!(refused("blocking", &wait) && refused("slow", &wait) && !refused("fast", &wait));
    assert!(refused("dangerous", &["FLORENCE.HOSTS"]));
    assert!(refused("admin", &["FLORENCE.MODEL.CHANGE", "LOAD", "a", "/b"]));
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
            let model = server.model();
            (model["state"].as_deref() == Some("failed")).then(|| model["error"].clone().unwrap())
        });
        assert!(problem.contains(expected), "{problem}");
        let refused = server.error(&["FLORENCE.SUBMIT", "j", "http://127.0.0.1/x", "<OD>"]);
        assert!(refused.starts_with("NOMODEL") && refused.contains(expected), "{refused}");
        assert!(server.log().contains("cannot load model"));
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
fn an_adapter_is_merged_into_the_model_and_what_is_missing_is_told() {
    let fixture = |name: &str| path("engine/tests/fixtures").join(name).display().to_string();
    let adapter = format!("florence.adapter {}", fixture("adapters/tiny"));
    let (plain, adapted) = (Server::start(), Server::with(Settings::lines(&[&adapter])));
    let bytes = std::fs::read(fixture("pictures/00.png")).unwrap();
    let answer = |server: &Server| {
        redis::cmd("FLORENCE.SUBMIT")
            .arg(&["j", "DATA"])
            .arg(&bytes)
            .arg("<OD>")
            .exec(&mut server.connect())
            .unwrap();
        let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", "j", "60"]);
        job["result"].clone().unwrap()
    };
    assert_ne!(answer(&plain), answer(&adapted));
    let model = adapted.model();
    assert_eq!(model["name"].as_deref(), Some("tiny+tiny"));

    let bare = format!("florence.model {}", fixture("random-bare"));
    let tokenizer = format!("florence.tokenizer {}", fixture("random-native"));
    let kept = "florence.keep-packed no";
    let server = Server::with(Settings::lines(&[&bare, &tokenizer, kept]));
    server.wait_for_model();
    assert!(server.log().contains("config.json has no dim_embed"), "{}", server.log());
    let grouped = format!("florence.adapter {}", fixture("adapters/grouped"));
    let native = format!("florence.model {}", fixture("random-native"));
    for (lines, expected) in [
        ([&*bare, kept], "has no tokenizer.json"),
        ([&*native, &*grouped], "convolutions in groups cannot be merged"),
    ] {
        let server = Server::with(Settings::lines(&lines));
        eventually("the model fails", || server.log().contains(expected).then_some(()));
    }
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
#[cfg(target_arch = "x86_64")]
fn a_plan_beside_the_model_says_which_products_are_int8() {
    let model = tempfile::tempdir().unwrap();
    copy_model(model.path());
    let length = std::fs::metadata(model.path().join("model.safetensors")).unwrap().len();
    let product = "vision_tower.blocks.2.0.spatial_block.ffn.fc1.weight";
    let plan = |weights: u64| {
        let plan = format!(
            r#"{{"format": "florence int8 plan 1", "weights": {{"model.safetensors": {weights}}},
                "int8": ["{product}"], "measured": null}}"#
        );
        std::fs::write(model.path().join("florence-int8-plan.json"), plan).unwrap();
    };
    let line = format!("florence.model {}", model.path().display());
    let lines = [&*line, "florence.precision int8"];
    plan(length);
    if !is_x86_feature_detected!("avx2") {
        let server = Server::with(Settings::lines(&lines));
        return eventually("the model fails", || {
            server.log().contains("this processor has no int8 products").then_some(())
        });
    }
    let server = Server::ready(&lines);
    let models = server.models();
    assert!(models.values().all(|model| model["precision"].as_deref() == Some("int8")));
    let maps = std::fs::read_to_string(server.proc().join("maps")).unwrap();
    assert!(maps.contains("/florence-packed-int8.safetensors"), "{}", server.log());
    plan(length + 1);
    let server = Server::with(Settings::lines(&lines));
    eventually("the model fails", || {
        server.log().contains("it was made for other weights").then_some(())
    });
}

#[test]
fn packed_weights_of_a_directory_that_may_not_be_written_to_are_kept_elsewhere() {
    let (model, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    copy_model(model.path());
    std::fs::create_dir(model.path().join("florence-packed-f32.safetensors.lock")).unwrap();
    let line = format!("florence.model {}", model.path().display());
    let server = Server::ready(&[&line]);
    let advice = "florence.packed-directory names a directory";
    assert!(server.log().contains(advice), "{}", server.log());

    let elsewhere = format!("florence.packed-directory {}", state.path().display());
    let server = Server::ready(&[&line, &elsewhere]);
    let maps = std::fs::read_to_string(server.proc().join("maps")).unwrap();
    let file = format!("{}/florence-packed-f32-", state.path().display());
    assert!(maps.contains(&file), "{}", server.log());
    assert!(!server.log().contains(advice), "{}", server.log());
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
