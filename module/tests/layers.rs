//! Layers look down only: the order of `lib.rs`, held against the `crate::` paths of each.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::path::Path;

/// The layers, the lowest first. Each may name those before it, and nothing else of ours.
const LAYERS: [&str; 12] = [
    "settings", "figures", "server", "model", "source", "job", "queue", "news", "celery", "work",
    "command", "entry",
];

fn sources(path: &Path, found: &mut Vec<(String, String)>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), found);
        }
    } else {
        let text = std::fs::read_to_string(path).unwrap();
        found.push((path.display().to_string(), text));
    }
}

/// The first names of all `crate::` paths: of `use crate::{a, b::c}` as well as of `crate::a::b`.
fn named(text: &str) -> Vec<String> {
    let code: String = text.lines().map(|line| line.split("//").next().unwrap()).collect();
    let mut names = Vec::new();
    for path in code.split("crate::").skip(1) {
        let Some(list) = path.strip_prefix('{') else {
            names.push(first_name(path));
            continue;
        };
        let (mut depth, mut start) = (0, true);
        for (i, letter) in list.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                letter if start && !letter.is_whitespace() => {
                    names.push(first_name(&list[i..]));
                    start = false;
                }
                _ => {}
            }
        }
    }
    names
}

fn first_name(path: &str) -> String {
    path.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
}

#[test]
fn layers_import_only_what_is_below_them() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut entries: Vec<String> = std::fs::read_dir(&src)
        .unwrap()
        .map(|entry| {
            entry.unwrap().file_name().to_string_lossy().trim_end_matches(".rs").to_owned()
        })
        .filter(|name| name != "lib")
        .collect();
    entries.sort();
    let mut layers: Vec<&str> = LAYERS.to_vec();
    layers.sort_unstable();
    assert_eq!(entries, layers, "a file of src is in no layer, or a layer has no file");
    for (height, layer) in LAYERS.iter().enumerate() {
        let mut files = Vec::new();
        let folder = src.join(layer);
        let file = src.join(format!("{layer}.rs"));
        sources(if folder.is_dir() { &folder } else { &file }, &mut files);
        for (path, text) in files {
            for name in named(&text) {
                let is_below = LAYERS[..=height].contains(&name.as_str());
                assert!(is_below, "{path}: {layer} must not name crate::{name}");
            }
        }
    }
}

#[test]
fn paths_are_found_in_lists_and_alone() {
    let text = "use crate::{\n    a::{self, x},\n    b, // crate::no\n    c::d,\n};\nuse crate::e;\n\
        fn f() { crate::g::h() }";
    assert_eq!(named(text), ["a", "b", "c", "e", "g"]);
}
