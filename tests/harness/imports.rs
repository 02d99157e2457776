//! Which modules a file of a crate names: what the tests of layers hold against their tables.

use std::path::Path;

/// The sources of a module, a file or a folder of `src`: path and text of each; there are some.
pub(crate) fn sources(src: &Path, module: &str) -> Vec<(String, String)> {
    let (folder, file) = (src.join(module), src.join(format!("{module}.rs")));
    let mut found = Vec::new();
    read(if folder.is_dir() { &folder } else { &file }, &mut found);
    assert!(!found.is_empty(), "{module}");
    found
}

fn read(path: &Path, found: &mut Vec<(String, String)>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            read(&entry.unwrap().path(), found);
        }
    } else {
        found.push((path.display().to_string(), std::fs::read_to_string(path).unwrap()));
    }
}

/// The first names of all `crate::` paths: of `use crate::{a, b::c}` as well as of `crate::a::b`.
pub(crate) fn named(text: &str) -> Vec<String> {
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
fn paths_are_found_in_lists_and_alone() {
    let text = "use crate::{\n    a::{self, x},\n    b, // crate::no\n    c::d,\n};\nuse crate::e;\n\
        fn f() { crate::g::h() }";
    assert_eq!(named(text), ["a", "b", "c", "e", "g"]);
}
