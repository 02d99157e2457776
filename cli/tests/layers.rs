//! Who may import whom in the command line, held against the `crate::` paths.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

use std::path::Path;

#[path = "../../tests/harness/imports.rs"]
mod imports;

/// A subcommand, or what several share, and what it may name of ours.
const ALLOWED: [(&str, &[&str]); 22] = [
    ("agree", &["asked", "draw", "load", "source", "whole"]),
    ("ask", &["limits"]),
    ("asked", &["ask", "source", "whole"]),
    ("bench", &["limits", "load"]),
    ("convert", &["formats", "signals"]),
    ("doctor", &["load"]),
    ("draw", &["servers", "whole"]),
    ("formats", &["draw", "limits", "whole"]),
    ("label", &["ask", "formats", "limits", "load", "servers", "signals", "source", "whole"]),
    ("limits", &[]),
    ("load", &["limits"]),
    ("merge", &[]),
    ("prove", &["load"]),
    ("pull", &[]),
    ("run", &["ask", "limits", "load"]),
    ("servers", &[]),
    ("signals", &[]),
    ("source", &[]),
    ("top", &["servers"]),
    ("tune", &["asked", "load"]),
    ("web", &["draw", "servers", "signals"]),
    ("whole", &[]),
];

#[test]
fn subcommands_import_only_what_the_table_allows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let entries = std::fs::read_dir(&src).unwrap().count();
    assert_eq!(entries, ALLOWED.len() + 1, "a file of src is not in the table");
    for (module, allowed) in ALLOWED {
        for (path, text) in imports::sources(&src, module) {
            for named in imports::named(&text) {
                let is_allowed = allowed.contains(&named.as_str()) || named == module;
                assert!(is_allowed, "{path}: {module} must not import {named}");
            }
        }
    }
}
