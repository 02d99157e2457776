//! Settings that are refused: in one line, which names the setting, the value and what is allowed.

use std::collections::HashMap;

use florence_tests::{Server, Settings};

/// A setting, a bad value, and what the message must say is allowed.
type Bad = (&'static str, &'static str, &'static [&'static str]);

const NUMBER: &[&str] = &["is not a whole number from 1 to 64"];
const DIRECTORIES: &[&str] = &["absolute paths of directories that are there"];
const YES_OR_NO: &[&str] = &["yes", "no"];

/// These may be changed while the server runs.
const CHANGEABLE: [Bad; 19] = [
    ("max-batch", "0", NUMBER),
    ("max-batch", "65", NUMBER),
    ("max-batch", "abc", NUMBER),
    ("max-batch", "1.5", NUMBER),
    ("max-batch", "99999999999999999999", NUMBER),
    ("default-retries", "-1", &["is not a whole number from 0 to 100"]),
    ("max-image-bytes", "1", &["is not a whole number from 1024 to 536870912"]),
    ("publish", "maybe", YES_OR_NO),
    ("publish", "1", YES_OR_NO),
    ("file-roots", "relative/path", DIRECTORIES),
    ("file-roots", "/nowhere/to/be/found", DIRECTORIES),
    ("file-roots", "/dev/null", DIRECTORIES),
    ("decimals", "10", &["all", "from 0 to 9"]),
    ("decimals", "-1", &["all", "from 0 to 9"]),
    ("prompts", "all", &["tasks or any"]),
    ("paused", "1", YES_OR_NO),
    ("max-regions", "257", &["is not a whole number from 1 to 256"]),
    ("thumbnails", "1025", &["is not a whole number from 0 to 1024"]),
    ("ended-jobs", "-1", &["is not a whole number from 0 to 1000000"]),
];

/// These are read at the start only.
const FIXED: [Bad; 19] = [
    ("threads", "1025", &["is not a whole number from 0 to 1024"]),
    ("nice", "20", &["is not a whole number from 0 to 19"]),
    ("precision", "f64", &["f32", "bf16", "auto"]),
    ("coordinates", "both", &["float", "int"]),
    ("cpus", "x", &["CPU"]),
    ("cpus", "3-1", &["CPU"]),
    ("cpus", "1023", &["CPUs of this machine"]),
    ("cpus", "0-1023", &["CPUs of this machine"]),
    ("allow-networks", "nonsense", &["network"]),
    ("deny-networks", "10.0.0.0/99", &["network"]),
    ("allow-hosts", "a_host/with/path", &["host"]),
    ("image-formats", "bmpp", &["jpeg", "png", "webp", "gif", "bmp", "tiff"]),
    ("buckets", "ftp://x", &["gs://", "s3://"]),
    ("ca-file", "/nowhere/ca.pem", &["a file of certificates in PEM"]),
    ("celery-queues", "nocolon", &["queue:task"]),
    ("celery-priority-steps", "12", &["0 to 9"]),
    ("celery-arguments", "url", &["(image_url, prompt)"]),
    ("keep-packed", "perhaps", YES_OR_NO),
    ("token-ids", "both", &["checkpoint or tokenizer"]),
];

/// All names, by which a message about another setting is known.
fn names() -> Vec<String> {
    let server = Server::start();
    let known: HashMap<String, String> = server.call(&["CONFIG", "GET", "florence.*"]);
    known.into_keys().collect()
}

/// Whether a text says it all, in the one form that there is.
fn says(text: &str, (name, value, allowed): Bad) -> bool {
    let start = format!("florence.{name}: '{value}' is ");
    text.matches(&start).count() == 1 && {
        let (_, rest) = text.split_once(&format!("florence.{name}: ")).unwrap();
        let rest = rest.strip_prefix(&format!("'{value}' ")).unwrap();
        allowed.iter().all(|word| rest.contains(word))
    }
}

/// What is wrong with the log of a server that refused to start, if anything is.
fn fault(log: &str, bad: Bad, names: &[String]) -> Option<String> {
    let (name, value, _) = bad;
    let full = format!("florence.{name}");
    // The server may quote the line of redis.conf that it stumbles over; that is no message.
    let quotes = [format!(">>> '{full} {value}'"), format!(">>> '{full} \"{value}\"'")];
    let lines =
        || log.lines().filter(|line| !quotes.iter().any(|quote| line.contains(quote.as_str())));
    let telling: Vec<&str> = lines()
        .filter(|line| line.contains(&full) || line.contains(&format!("'{value}'")))
        .collect();
    if telling.len() != 1 || !says(telling[0], bad) {
        return Some(format!("{name} {value}: {telling:#?}"));
    }
    let bare = |name: &String| name.trim_start_matches("florence.").to_owned();
    let others = names.iter().filter(|other| **other != full);
    let stray: Vec<&str> = others
        .flat_map(|other| {
            lines().filter(move |line| {
                line.contains(other.as_str())
                    || line.contains(&format!("florence: {}:", bare(other)))
            })
        })
        .collect();
    (!stray.is_empty()).then(|| format!("{name} {value}: also about others: {stray:#?}"))
}

/// As [`fault`], of a start that must be refused.
fn refused(settings: Settings, bad: Bad, names: &[String]) -> Option<String> {
    match Server::refusal(settings) {
        Some(log) => fault(&log, bad, names),
        None => Some(format!("{} {}: accepted", bad.0, bad.1)),
    }
}

#[test]
fn config_set_refuses_bad_values_and_says_what_is_allowed() {
    let server = Server::start();
    let mut wrong = Vec::new();
    for bad in CHANGEABLE {
        let name = format!("florence.{}", bad.0);
        let get = || -> HashMap<String, String> { server.call(&["CONFIG", "GET", &name]) };
        let before = get();
        let refused = server.try_call::<String>(&["CONFIG", "SET", &name, bad.1]);
        match refused {
            Ok(_) => wrong.push(format!("{name} {}: accepted", bad.1)),
            Err(error) if !says(&error.to_string(), bad) => {
                wrong.push(format!("{name} {}: {error}", bad.1));
            }
            Err(_) => assert_eq!(get(), before),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn config_set_takes_good_values() {
    let server = Server::start();
    for (name, value, shown) in [
        ("max-batch", "64", "64"),
        ("max-image-bytes", "1024", "1024"),
        ("publish", "no", "no"),
        ("publish", "YES", "yes"),
        ("file-roots", "/usr /tmp", "/usr /tmp"),
        ("decimals", "3", "3"),
        ("decimals", "all", "all"),
        ("prompts", "any", "any"),
        ("file-roots", "", ""),
        ("stream", "ended", "ended"),
        ("paused", "yes", "yes"),
        ("max-regions", "256", "256"),
        ("thumbnails", "256", "256"),
        ("ended-jobs", "0", "0"),
    ] {
        let name = format!("florence.{name}");
        server.call::<()>(&["CONFIG", "SET", &name, value]);
        let reply: HashMap<String, String> = server.call(&["CONFIG", "GET", &name]);
        assert_eq!(reply[&name], shown, "{name}");
    }
}

fn all() -> impl Iterator<Item = Bad> {
    CHANGEABLE.into_iter().chain(FIXED)
}

#[test]
fn a_bad_line_of_the_configuration_file_ends_the_start_with_one_message() {
    let names = names();
    let faults: Vec<String> = all()
        .filter_map(|bad| {
            let line = format!("florence.{} \"{}\"", bad.0, bad.1);
            refused(Settings::lines(&[&line]), bad, &names)
        })
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_bad_argument_of_the_module_ends_the_start_with_one_message() {
    let names = names();
    let faults: Vec<String> = all()
        .filter_map(|bad| {
            let module_args = vec![bad.0.to_owned(), bad.1.to_owned()];
            let settings = Settings { module_args, ..Settings::default() };
            refused(settings, bad, &names)
        })
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
