//! Who may import whom: the table of ARCHITECTURE.md, held against the `use crate::` lines.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::path::Path;

/// A module of the engine, and the modules that it may name.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("stop", &[]),
    ("panics", &[]),
    // By the names that the crate shows to all.
    ("serve", &[]),
    ("task", &[]),
    ("fetch", &[]),
    ("image", &[]),
    ("kernels", &[]),
    ("model", &["image", "kernels"]),
    ("generate", &["kernels", "model"]),
    ("postprocess", &["task"]),
    ("text", &["model", "task"]),
    ("error", &["fetch", "image", "model", "task"]),
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

#[test]
fn modules_import_only_what_the_table_allows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (module, allowed) in ALLOWED {
        let mut files = Vec::new();
        let folder = src.join(module);
        let file = src.join(format!("{module}.rs"));
        sources(if folder.is_dir() { &folder } else { &file }, &mut files);
        assert!(!files.is_empty(), "{module}");
        for (path, text) in files {
            let text = text.replace("use crate::{", "use crate::{\n");
            let mut in_list = false;
            for line in text.lines().map(str::trim) {
                let named = if let Some(rest) = line.strip_prefix("use crate::") {
                    in_list = rest.starts_with('{');
                    rest.split("::").next().unwrap_or_default().trim_matches(['{', ';'])
                } else if in_list {
                    in_list = !line.starts_with('}');
                    line.split("::").next().unwrap_or_default().trim_matches(['}', ';', ','])
                } else {
                    continue;
                };
                let is_module = ALLOWED.iter().any(|(known, _)| *known == named);
                assert!(
                    !is_module || allowed.contains(&named) || named == module,
                    "{path}: {module} must not import {named}"
                );
            }
        }
    }
}
