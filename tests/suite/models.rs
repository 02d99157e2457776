//! Several models in one server, loaded and exchanged while it runs.

use std::{
    collections::HashMap,
    fs,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use florence_tests::{Pictures, Server, Settings, call, copy_model, eventually, path, picture};

type Job = HashMap<String, Option<String>>;

fn directory(name: &str) -> String {
    path(name).display().to_string()
}

fn tiny() -> String {
    directory("models/tiny")
}

fn random() -> String {
    directory("engine/tests/fixtures/random-native")
}

fn adapter() -> String {
    directory("engine/tests/fixtures/adapters/tiny")
}

/// A server whose models may be exchanged.
fn server(lines: &[&str]) -> Server {
    let temporary = std::env::temp_dir();
    let roots = format!("florence.model-roots \"{} {}\"", directory(""), temporary.display());
    Server::ready(&[&[&roots, "florence.keep-packed no"], lines].concat())
}

/// A job about a picture, with these options.
fn submit(server: &Server, key: &str, options: &[&str]) {
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg(key).arg("DATA").arg(fs::read(picture("shapes.png")).unwrap()).arg("<OD>");
    submit.arg(options).exec(&mut server.connect()).unwrap();
}

fn wait(server: &Server, key: &str) -> Job {
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "120"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}\n{}", server.job(key), server.log()))
}

/// The answer of a job, and which model gave it.
fn answer(server: &Server, key: &str, options: &[&str]) -> (String, String) {
    submit(server, key, options);
    let mut job = wait(server, key);
    assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    let mut take = |field: &str| job.remove(field).flatten().unwrap();
    (take("result"), take("model"))
}

#[test]
fn jobs_choose_among_the_models_of_the_settings() {
    let models = format!("florence.models \"one={} two={}\"", tiny(), random());
    let server = Server::with(Settings::lines(&[&models, "florence.keep-packed no"]));
    // Their names are known before they are loaded: such jobs wait.
    submit(&server, "early", &["MODEL", "two"]);
    assert_eq!(wait(&server, "early")["model"].as_deref(), Some("two"));
    let (one, name) = answer(&server, "one", &[]);
    assert_eq!(name, "one", "the first is the default");
    // The same picture and question: neither gets what the other said.
    let (two, name) = answer(&server, "two", &["MODEL", "two"]);
    assert_eq!(name, "two");
    assert_ne!(one, two);
    assert_eq!(answer(&server, "again", &["MODEL", "one"]), (one, "one".to_owned()));
    assert_eq!(server.job("again")["cache"].as_deref(), Some("result"));
    let refused = server.error(&["FLORENCE.SUBMIT", "x", "DATA", "x", "<OD>", "MODEL", "three"]);
    assert_eq!(refused, "NOMODEL there is no model three; this server has one, two");

    let told = server.models();
    assert_eq!(told["one"]["directory"], Some(tiny()));
    assert_eq!(
        [&told["one"], &told["two"]].map(|model| model["default"].as_deref()),
        [Some("1"), Some("0")]
    );
    let info: String = server.call(&["INFO", "florence"]);
    assert!(info.contains("florence_model_1:name=two,state=ready,default=0"), "{info}");
    assert_eq!((server.stat("models"), server.stat("engines_ready")), (2, 2));
}

#[test]
fn the_model_of_the_settings_stays_the_default_and_adapters_have_names_of_their_own() {
    let models = format!("florence.models mine={},{}", tiny(), adapter());
    let server = server(&[&format!("florence.model {}", tiny()), &models]);
    eventually("both are ready", || (server.stat("engines_ready") == 2).then_some(()));
    let (plain, name) = answer(&server, "plain", &[]);
    assert_eq!(name, "tiny");
    let (mine, name) = answer(&server, "mine", &["MODEL", "mine"]);
    assert_eq!(name, "mine");
    assert_ne!(plain, mine);
    assert_eq!(server.models()["mine"]["adapter"], Some(adapter()));
}

#[test]
fn a_model_is_loaded_beside_the_others_and_leaves_again() {
    let server = server(&[]);
    let weights = || server.stat("memory_weights_packed");
    let before = weights();
    server.call::<()>(&["FLORENCE.MODEL", "LOAD", "other", &random()]);
    assert!(weights() > before);
    assert_eq!(answer(&server, "a", &["MODEL", "other"]).1, "other");
    assert_eq!(answer(&server, "b", &[]).1, "tiny");

    let refused = server.error(&["FLORENCE.MODEL", "UNLOAD", "tiny"]);
    assert!(refused.starts_with("NOMODEL tiny is the default model"), "{refused}");
    server.call::<()>(&["FLORENCE.MODEL", "DEFAULT", "other"]);
    assert_eq!(answer(&server, "c", &["NOCACHE"]).1, "other");
    server.call::<()>(&["FLORENCE.MODEL", "DEFAULT", "tiny"]);

    // Jobs that wait for a model end with it.
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    submit(&server, "late", &["MODEL", "other"]);
    server.call::<()>(&["FLORENCE.MODEL", "UNLOAD", "other"]);
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "no"]);
    let late = wait(&server, "late");
    assert_eq!(late["state"].as_deref(), Some("failed"), "{late:?}");
    assert!(late["error"].as_deref().unwrap().contains("NOMODEL"), "{late:?}");
    eventually("its memory is back", || {
        (weights() == before && server.stat("models_leaving") == 0).then_some(())
    });
    let refused = server.error(&["FLORENCE.MODEL", "DEFAULT", "other"]);
    assert_eq!(refused, "NOMODEL there is no model other, only tiny");
    assert_eq!((server.stat("panics"), server.stat("leases_recovered")), (0, 0));
}

#[test]
fn a_model_that_cannot_be_loaded_changes_nothing() {
    let server = server(&[]);
    let (expected, _) = answer(&server, "before", &[]);
    let broken = tempfile::tempdir().unwrap();
    let broken = broken.path().display().to_string();
    let (tiny, outside, grouped) =
        (tiny(), "/usr/share".to_owned(), directory("engine/tests/fixtures/adapters/grouped"));
    for (args, expected) in [
        (&["new", &outside][..], "DENIED /usr/share is no directory below florence.model-roots"),
        (&["new", "relative"], "is no absolute path"),
        (&["new", "/no/where"], "DENIED"),
        // A letter whose low byte is zero.
        (&["new", "/\u{4e00}"], "DENIED /\u{4e00} is no directory below"),
        (&["new", &broken], "config.json"),
        (&["tiny", &broken], "config.json"),
        (&["tiny", &tiny, "ADAPTER", &grouped], ""),
        (&["new", &tiny, "ADAPTER", &outside], "DENIED"),
        (&["new", &tiny, "PRECISION", "f64"], "unknown precision 'f64'"),
        (&["new", &tiny, "TWICE"], "syntax error"),
        (&["two words", &tiny], "a model's name has letters"),
        (&["new"], "wrong number"),
    ] {
        let refused = server.error(&[&["FLORENCE.MODEL", "LOAD"], args].concat());
        assert!(refused.contains(expected), "{args:?}: {refused}");
    }
    assert_eq!(server.models().len(), 1);
    assert_eq!(answer(&server, "after", &["NOCACHE"]).0, expected);
    eventually("nothing is left of them", || (server.stat("models_leaving") == 0).then_some(()));

    // Loading takes its time, which a transaction does not have.
    let mut connection = server.connect();
    let mut transaction = redis::pipe();
    transaction.atomic().cmd("FLORENCE.MODEL").arg(&["LOAD", "new", &tiny]);
    let refused = transaction.query::<Vec<String>>(&mut connection).unwrap_err().to_string();
    assert!(refused.contains("cannot be loaded in a transaction"), "{refused}");
}

#[test]
fn a_model_that_is_being_loaded_may_be_unloaded_but_is_not_the_default() {
    let server = server(&[]);
    // Opening a pipe waits for its other end.
    let slow = tempfile::tempdir().unwrap();
    copy_model(slow.path());
    let config = slow.path().join("config.json");
    fs::remove_file(&config).unwrap();
    assert!(Command::new("mkfifo").arg(&config).status().unwrap().success());
    thread::scope(|scope| {
        let loading = scope.spawn(|| {
            server.error(&["FLORENCE.MODEL", "LOAD", "slow", slow.path().to_str().unwrap()])
        });
        eventually("it is loading", || server.models().contains_key("slow").then_some(()));
        submit(&server, "early", &["MODEL", "slow"]);
        assert_eq!(server.state("early"), "queued");
        let refused = server.error(&["FLORENCE.MODEL", "DEFAULT", "slow"]);
        assert_eq!(refused, "NOMODEL model slow is not ready");
        let refused = server.error(&["FLORENCE.MODEL", "LOAD", "other", &random()]);
        assert_eq!(refused, "ERR another model is being loaded");
        server.call::<()>(&["FLORENCE.MODEL", "UNLOAD", "slow"]);
        assert!(wait(&server, "early")["error"].as_deref().unwrap().contains("NOMODEL"));
        fs::write(&config, fs::read(path("models/tiny/config.json")).unwrap()).unwrap();
        assert_eq!(loading.join().unwrap(), "ERR it was unloaded before it was ready");
    });
    eventually("it is gone", || (server.stat("models_leaving") == 0).then_some(()));
    assert_eq!(answer(&server, "after", &[]).1, "tiny");
}

#[test]
fn only_who_has_the_right_changes_models() {
    let server = server(&[]);
    server.call::<()>(&["ACL", "SETUSER", "guest", "on", ">pw", "~*", "+@all", "-@admin"]);
    server.call::<()>(&[
        "ACL",
        "SETUSER",
        "ops",
        "on",
        ">pw",
        "-@all",
        "+florence.model.change",
        "+config|set",
    ]);
    let (tiny, mut guest, mut ops) =
        (tiny(), server.connect_as("guest", "pw"), server.connect_as("ops", "pw"));
    let told: HashMap<String, redis::Value> = call(&mut guest, &["FLORENCE.MODEL"]).unwrap();
    assert!(told.contains_key("models"));
    for args in [
        &["FLORENCE.MODEL", "LOAD", "x", &tiny][..],
        &["FLORENCE.MODEL", "UNLOAD", "tiny"],
        &["FLORENCE.MODEL", "DEFAULT", "tiny"],
        &["FLORENCE.MODEL.CHANGE", "DEFAULT", "tiny"],
    ] {
        let refused = call::<()>(&mut guest, args).unwrap_err().to_string();
        assert!(refused.to_lowercase().contains("noperm"), "{args:?}: {refused}");
    }
    call::<()>(&mut ops, &["FLORENCE.MODEL.CHANGE", "LOAD", "x", &tiny]).unwrap();
    assert_eq!(server.models().len(), 2);
}

#[test]
fn models_are_exchanged_under_load_and_no_job_is_lost_or_mixed() {
    const JOBS: usize = 400;
    const EXCHANGES: usize = 8;
    let server = server(&["florence.threads 2"]);
    let (tiny, adapter) = (tiny(), adapter());
    let load = |options: &[&str]| {
        let args = [&["FLORENCE.MODEL", "LOAD", "m", &tiny], options].concat();
        server.call::<()>(&args);
    };
    let changed = ["ADAPTER", adapter.as_str()];
    load(&changed);
    let second = answer(&server, "second", &["MODEL", "m", "NOCACHE"]).0;
    load(&[]);
    let first = answer(&server, "first", &["MODEL", "m", "NOCACHE"]).0;
    assert_ne!(first, second);

    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..JOBS {
                submit(&server, &format!("job:{i}"), &["MODEL", "m", "NOCACHE"]);
            }
            for i in 0..JOBS {
                wait(&server, &format!("job:{i}"));
            }
            is_over.store(true, Ordering::Relaxed);
        });
        for i in 0.. {
            load(if i % 2 == 0 { &changed } else { &[] });
            if i >= EXCHANGES && is_over.load(Ordering::Relaxed) {
                break;
            }
        }
    });
    let mut seen = [0; 2];
    for i in 0..JOBS {
        let job = server.job(&format!("job:{i}"));
        assert_eq!(
            (job["state"].as_deref(), job["attempts"].as_deref()),
            (Some("done"), Some("1"))
        );
        let result = job["result"].as_ref().unwrap();
        let which = [&first, &second].iter().position(|answer| *answer == result);
        seen[which.unwrap_or_else(|| panic!("neither model said {result}"))] += 1;
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    eventually("those before are gone", || (server.stat("models_leaving") == 0).then_some(()));
    assert_eq!((server.stat("panics"), server.stat("leases_recovered")), (0, 0));
}

#[test]
fn downloads_for_a_slow_model_do_not_starve_another() {
    let (models, pictures) = (format!("florence.models slow={}", tiny()), Pictures::serve());
    let model = format!("florence.model {}", tiny());
    let lines = ["florence.max-batch 4", "florence.prepare-threads 2", &model, &models];
    let server = server(&lines);
    eventually("both are ready", || (server.stat("engines_ready") == 2).then_some(()));
    let url = pictures.url("shapes.png");
    let slow = ["MODEL", "slow", "BEAMS", "16", "NGRAM", "1", "MAXTOKENS", "200"];
    for i in 0..120 {
        let key = format!("slow:{i}");
        let submit = ["FLORENCE.SUBMIT", &key, &url, "<OD>", "NOCACHE"];
        server.call::<()>(&[&submit, &slow[..]].concat());
    }
    for i in 0..5 {
        let key = format!("quick:{i}");
        server.call::<()>(&["FLORENCE.SUBMIT", &key, &url, "<OD>", "NOCACHE", "TIMEOUT", "20000"]);
        let job = wait(&server, &key);
        assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
    }
    assert_eq!(server.state("slow:119"), "queued", "the slow ones were over before");
}

#[test]
fn a_slow_model_does_not_starve_another() {
    let models = format!("florence.models slow={}", tiny());
    let model = format!("florence.model {}", tiny());
    let server = server(&["florence.max-batch 4", "florence.prepare-threads 2", &model, &models]);
    eventually("both are ready", || (server.stat("engines_ready") == 2).then_some(()));
    let slow = ["MODEL", "slow", "NOCACHE", "BEAMS", "16", "NGRAM", "1", "MAXTOKENS", "200"];
    let start = Instant::now();
    for i in 0..60 {
        submit(&server, &format!("slow:{i}"), &slow);
    }
    for i in 0..5 {
        assert_eq!(answer(&server, &format!("quick:{i}"), &["NOCACHE"]).1, "tiny");
    }
    let (quick, is_queued) = (start.elapsed(), server.state("slow:59") == "queued");
    assert!(is_queued, "the slow ones were over before the quick ones, after {quick:?}");
    for i in 0..60 {
        assert_eq!(wait(&server, &format!("slow:{i}"))["model"].as_deref(), Some("slow"));
    }
}
