//! Layers look down only: the order of `lib.rs`, held against the `crate::` paths of each.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::path::Path;

#[path = "../../tests/harness/imports.rs"]
mod imports;

/// The layers, the lowest first. Each may name those before it, and nothing else of ours.
const LAYERS: [&str; 12] = [
    "settings", "figures", "server", "model", "source", "job", "queue", "news", "celery", "work",
    "command", "entry",
];

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
        let files = imports::sources(&src, layer);
        for (path, text) in files {
            for name in imports::named(&text) {
                let is_below = LAYERS[..=height].contains(&name.as_str());
                assert!(is_below, "{path}: {layer} must not name crate::{name}");
            }
        }
    }
}
