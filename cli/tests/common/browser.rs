//! Chromium without a screen, driven by its driver, as the W3C has it.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_tests::{eventually, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::http;

/// A browser without a screen; ended on drop.
pub(crate) struct Browser {
    driver: Child,
    port: u16,
    session: String,
    /// Where it keeps what it keeps.
    profile: TempDir,
}

impl Browser {
    /// A window of this size.
    pub(crate) fn start(width: u32, height: u32) -> Self {
        let port = free_port();
        let profile = tempfile::tempdir().unwrap();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("chromedriver does not start ({error}): install chromium-driver, or run `make test`")
            });
        let mut browser = Self { driver, port, session: String::new(), profile };
        eventually("the driver is ready", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        let profile = browser.profile.path().display().to_string();
        let args = [
            "--headless=new".to_owned(),
            // Tests run in containers, and as root.
            "--no-sandbox".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-gpu".to_owned(),
            "--hide-scrollbars".to_owned(),
            format!("--user-data-dir={profile}"),
            format!("--window-size={width},{height}"),
        ];
        let wanted = json!({ "browserName": "chrome", "goog:chromeOptions": { "args": args },
            "goog:loggingPrefs": { "browser": "ALL" } });
        let made = browser.ask("POST", "", &json!({ "capabilities": { "alwaysMatch": wanted } }));
        made["sessionId"].as_str().unwrap().clone_into(&mut browser.session);
        browser
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        self.try_ask(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn try_ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, Value> {
        let session =
            if self.session.is_empty() { String::new() } else { format!("/{}", self.session) };
        let body = if method == "GET" { String::new() } else { body.to_string() };
        let line = format!("{method} /session{session}{path}");
        let headers = [("Content-Type", "application/json")];
        let answer = http(self.port, &line, &headers, body.as_bytes());
        let mut value = answer.json();
        let value = value["value"].take();
        if answer.status == 200 { Ok(value) } else { Err(value) }
    }

    pub(crate) fn go(&self, url: &str) {
        self.ask("POST", "/url", &json!({ "url": url }));
    }

    /// What a script returns.
    pub(crate) fn js(&self, script: &str) -> Value {
        self.ask("POST", "/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until an expression is true, and gives it.
    pub(crate) fn wait(&self, expression: &str) -> Value {
        let (start, script) = (Instant::now(), format!("return {expression};"));
        loop {
            let body = json!({ "script": script, "args": [] });
            // While a page is on its way its elements may not be there.
            let value = self.try_ask("POST", "/execute/sync", &body).unwrap_or(Value::Null);
            if !matches!(value, Value::Null | Value::Bool(false)) {
                return value;
            }
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "{expression} stays {value}; the page: {}; its console: {:?}",
                self.js("return document.body.innerText"),
                self.console()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Asks something of an element, again if it has been replaced meanwhile.
    fn on(&self, css: &str, what: &str, body: &Value) {
        self.wait(&format!("document.querySelector({})", json!(css)));
        let find = json!({ "using": "css selector", "value": css });
        eventually("the element stays", || {
            let found = self.ask("POST", "/element", &find);
            let id = found.as_object().unwrap().values().next().unwrap().as_str().unwrap();
            match self.try_ask("POST", &format!("/element/{id}/{what}"), body) {
                Err(error) if error["error"] == "stale element reference" => None,
                Err(error) => panic!("{what} on {css}: {error}"),
                Ok(_) => Some(()),
            }
        });
    }

    /// As a user clicks: on what can be seen.
    pub(crate) fn click(&self, css: &str) {
        self.on(css, "click", &json!({}));
    }

    /// As a user types; `\u{e007}` is the enter key.
    pub(crate) fn write(&self, css: &str, text: &str) {
        self.on(css, "value", &json!({ "text": text }));
    }

    /// Says yes to a question of the page.
    pub(crate) fn accept(&self) {
        eventually("the page asks", || self.try_ask("POST", "/alert/accept", &json!({})).ok());
    }

    /// A picture of the window, as a PNG.
    pub(crate) fn screenshot(&self) -> Vec<u8> {
        let coded = self.ask("GET", "/screenshot", &Value::Null);
        BASE64_STANDARD.decode(coded.as_str().unwrap()).unwrap()
    }

    /// What the console has shown of errors and refused scripts since it was last asked.
    pub(crate) fn console(&self) -> Vec<String> {
        let entries = self.ask("POST", "/se/log", &json!({ "type": "browser" }));
        let entries = entries.as_array().unwrap().iter();
        let severe = entries.filter(|entry| entry["level"] == "SEVERE");
        severe.map(|entry| entry["message"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Without this the browser would outlive its driver.
        let ended = self.try_ask("DELETE", "", &json!({}));
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        assert!(ended.is_ok() || std::thread::panicking(), "the browser stays: {ended:?}");
    }
}
