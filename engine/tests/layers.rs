//! Who may import whom: the table of ARCHITECTURE.md, held against the `crate::` paths.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::path::Path;

#[path = "../../tests/harness/imports.rs"]
mod imports;

/// A module of the engine, and the modules that it may name.
const ALLOWED: [(&str, &[&str]); 16] = [
    // Besides, by the names that the crate shows to all.
    ("chain", &["image", "postprocess", "prompt", "task"]),
    ("stop", &[]),
    ("budget", &[]),
    ("child", &[]),
    ("panics", &[]),
    // Besides, by the names that the crate shows to all.
    ("serve", &["image"]),
    ("task", &[]),
    ("prompt", &["task"]),
    ("fetch", &[]),
    ("image", &[]),
    ("kernels", &["child"]),
    ("model", &["image", "kernels"]),
    ("generate", &["kernels", "model"]),
    ("postprocess", &["task"]),
    ("text", &["model", "prompt"]),
    ("error", &["fetch", "image", "model", "prompt"]),
];

#[test]
fn modules_import_only_what_the_table_allows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (module, allowed) in ALLOWED {
        for (path, text) in imports::sources(&src, module) {
            for named in imports::named(&text) {
                let is_module = ALLOWED.iter().any(|(known, _)| *known == named);
                assert!(
                    !is_module || allowed.contains(&named.as_str()) || named == module,
                    "{path}: {module} must not import {named}"
                );
            }
        }
    }
}
