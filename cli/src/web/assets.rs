//! The page itself, which is part of the program: nothing comes from elsewhere.

use axum::{
    http::{
        StatusCode,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};

const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const PAGE: &str = "text/html; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

macro_rules! assets {
    ($($name:literal: $kind:expr;)*) => {
        /// Path, kind and content of every file.
        const ASSETS: &[(&str, &str, &str)] =
            &[$((concat!("/", $name), $kind, include_str!(concat!("page/", $name)))),*];
    };
}

assets! {
    "index.html": PAGE;
    "login.html": PAGE;
    "style.css": STYLE;
    "icon.svg": PICTURE;
    "login.js": SCRIPT;
    "app.js": SCRIPT;
    "api.js": SCRIPT;
    "dom.js": SCRIPT;
    "chart.js": SCRIPT;
    "overlay.js": SCRIPT;
    "overview.js": SCRIPT;
    "jobs.js": SCRIPT;
    "job.js": SCRIPT;
    "try.js": SCRIPT;
    "celery.js": SCRIPT;
    "table.js": SCRIPT;
    "theme.js": SCRIPT;
}

/// Whether a file is for those too who have not logged in.
pub(super) fn is_open(path: &str) -> bool {
    matches!(path, "/login.js" | "/theme.js" | "/style.css" | "/icon.svg")
}

/// The file of a path.
pub(super) fn file(path: &str) -> Response {
    let path = if path == "/" { "/index.html" } else { path };
    let Some((_, kind, text)) = ASSETS.iter().find(|(name, ..)| *name == path) else {
        return (StatusCode::NOT_FOUND, "there is nothing here\n").into_response();
    };
    // Another version of the program has other files.
    ([(CONTENT_TYPE, *kind), (CACHE_CONTROL, "no-cache")], *text).into_response()
}

/// Where the password is asked for.
pub(super) fn login() -> Response {
    file("/login.html")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_comes_from_elsewhere_and_no_text_becomes_html() {
        for (name, _, text) in ASSETS {
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for bad in [
                "http:",
                "https:",
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "eval(",
                "document.write",
                "new Function",
                "javascript:",
                " onclick=",
                " onload=",
                " onerror=",
                "style=\"",
                "<style",
                "DOMParser",
                "srcdoc",
            ] {
                assert!(!text.contains(bad), "{name} has {bad}");
            }
            for script in text.split("<script").skip(1) {
                let tag = script.split_once('>').unwrap();
                assert!(tag.0.contains("src=") && tag.1.starts_with("</script>"), "{name}");
            }
        }
    }

    #[test]
    fn every_file_that_a_page_names_is_there() {
        for (name, _, text) in ASSETS {
            for quoted in text.split('"') {
                let file = quoted.strip_prefix("./").or_else(|| quoted.strip_prefix('/'));
                let is_name =
                    |file: &&str| file.bytes().all(|it| it.is_ascii_lowercase() || it == b'.');
                let Some(file) = file.filter(|file| file.contains('.')).filter(is_name) else {
                    continue;
                };
                let is_there = ASSETS.iter().any(|(known, ..)| known[1..] == *file);
                assert!(is_there, "{name} names {file}");
            }
        }
    }
}
