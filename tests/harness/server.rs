//! A redis-server process with the module, on a port of its own; ended on drop.
//!
//! `FLORENCE_SERVER` names the server's binary (default: redis-server on the PATH),
//! `FLORENCE_SERVER_LIBS` a library path for it, `FLORENCE_MODULE` the module.

use std::{
    collections::HashMap,
    fs::File,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use redis::{Client, Connection, FromRedisValue, Value};
use tempfile::TempDir;

use crate::eventually;

/// How a server is started.
#[derive(Default)]
pub struct Settings {
    /// Lines of the configuration, such as `appendonly yes`.
    pub lines: Vec<String>,
    /// Arguments of `loadmodule`.
    pub module_args: Vec<String>,
    /// Environment variables.
    pub env: Vec<(&'static str, String)>,
}

impl Settings {
    /// With these configuration lines.
    pub fn lines(lines: &[&str]) -> Self {
        Self { lines: lines.iter().map(ToString::to_string).collect(), ..Self::default() }
    }
}

/// A running server.
pub struct Server {
    child: Child,
    pub port: u16,
    pub directory: TempDir,
    settings: Settings,
}

/// The module under test.
fn module() -> PathBuf {
    let default = || {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
        root.join("target/release/libflorence.so")
    };
    let path = std::env::var("FLORENCE_MODULE").map_or_else(|_| default(), PathBuf::from);
    path.canonicalize().unwrap_or_else(|_| panic!("{} is not built", path.display()))
}

/// A port that nobody listens on, below those that the system gives to outgoing connections.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id().wrapping_mul(97) + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(10_000 + n % 20_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Server {
    /// A server with default settings.
    pub fn start() -> Self {
        Self::with(Settings::default())
    }

    /// A server with these settings.
    pub fn with(settings: Settings) -> Self {
        let server = Self::spawn(settings);
        server.wait_until_ready();
        server
    }

    /// What a server logs that does not start with these settings.
    pub fn refused(settings: Settings) -> String {
        let mut server = Self::spawn(settings);
        eventually("the server refuses to start", || (!server.is_alive()).then_some(()));
        server.log()
    }

    fn spawn(settings: Settings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        let child = spawn(port, &directory, &settings);
        Self { child, port, directory, settings }
    }

    fn wait_until_ready(&self) {
        eventually("the server answers", || {
            let mut connection = self.try_connect()?;
            let pong: Result<String, _> = redis::cmd("PING").query(&mut connection);
            pong.ok()
        });
    }

    fn try_connect(&self) -> Option<Connection> {
        Client::open(format!("redis://127.0.0.1:{}", self.port)).unwrap().get_connection().ok()
    }

    /// A new connection, RESP2.
    pub fn connect(&self) -> Connection {
        self.try_connect().unwrap()
    }

    /// A new connection, RESP3.
    pub fn connect_resp3(&self) -> Connection {
        let url = format!("redis://127.0.0.1:{}/?protocol=resp3", self.port);
        Client::open(url).unwrap().get_connection().unwrap()
    }

    /// Runs one command on a connection of its own.
    pub fn try_call<T: FromRedisValue>(&self, args: &[&str]) -> redis::RedisResult<T> {
        call(&mut self.connect(), args)
    }

    /// As [`Self::try_call`], where it must succeed.
    pub fn call<T: FromRedisValue>(&self, args: &[&str]) -> T {
        self.try_call(args).unwrap_or_else(|error| panic!("{args:?}: {error}\n{}", self.log()))
    }

    /// The error text of a command that must fail.
    pub fn error(&self, args: &[&str]) -> String {
        let reply: redis::RedisResult<Value> = self.try_call(args);
        error_text(reply)
    }

    /// A job as a map.
    pub fn job(&self, key: &str) -> HashMap<String, Option<String>> {
        self.call(&["FLORENCE.GET", key])
    }

    /// The state of a job.
    pub fn state(&self, key: &str) -> String {
        self.job(key).remove("state").flatten().unwrap_or_default()
    }

    /// One of the counters of FLORENCE.STATS.
    pub fn stat(&self, name: &str) -> i64 {
        self.call::<HashMap<String, i64>>(&["FLORENCE.STATS"])[name]
    }

    /// Waits until the model is loaded.
    pub fn wait_for_model(&self) {
        eventually("the model is ready", || {
            let model: HashMap<String, Option<String>> = self.call(&["FLORENCE.MODEL"]);
            (model["state"].as_deref() == Some("ready")).then_some(())
        });
    }

    /// Makes this server the replica of another, and waits until it is in step.
    pub fn follow(&self, master: &Self) {
        self.call::<()>(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]);
        eventually("the replica follows", || {
            let replication: String = self.call(&["INFO", "replication"]);
            replication.contains("master_link_status:up").then_some(())
        });
    }

    /// Kills the process at once, as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts a killed server again, on the same files and port.
    pub fn restart(&mut self) {
        self.child = spawn(self.port, &self.directory, &self.settings);
        self.wait_until_ready();
    }

    /// Whether the process still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What the kernel tells of the process.
    pub fn proc(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.child.id()))
    }

    /// What the process takes: resident KiB, threads, open descriptors.
    pub fn usage(&self) -> [u64; 3] {
        let process = self.proc();
        let status = std::fs::read_to_string(process.join("status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let descriptors = std::fs::read_dir(process.join("fd")).unwrap().count();
        [number("VmRSS:"), number("Threads:"), descriptors as u64]
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command on a connection.
pub(crate) fn call<T: FromRedisValue>(
    connection: &mut Connection,
    args: &[&str],
) -> redis::RedisResult<T> {
    let mut command = redis::cmd(args[0]);
    command.arg(&args[1..]);
    command.query(connection)
}

fn error_text(reply: redis::RedisResult<Value>) -> String {
    let error = reply.expect_err("an error reply");
    let code = error.code().unwrap_or("ERR").to_owned();
    format!("{code} {}", error.detail().unwrap_or_default())
}

fn spawn(port: u16, directory: &TempDir, settings: &Settings) -> Child {
    let binary = std::env::var("FLORENCE_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
    let mut config = format!(
        "port {port}\nbind 127.0.0.1\ndir {}\nsave \"\"\nrepl-diskless-sync-delay 0\n\
         enable-debug-command yes\nenable-module-command yes\nloadmodule {} {}\n\
         florence.allow-networks 127.0.0.0/8\n",
        directory.path().display(),
        module().display(),
        settings.module_args.join(" "),
    );
    for line in &settings.lines {
        config.push_str(line);
        config.push('\n');
    }
    let path = directory.path().join("redis.conf");
    std::fs::write(&path, config).unwrap();
    let log = directory.path().join("log");
    let log = File::options().create(true).append(true).open(log).unwrap();
    let mut command = Command::new(&binary);
    if let Ok(libraries) = std::env::var("FLORENCE_SERVER_LIBS") {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    command
        .envs(settings.env.iter().map(|(name, value)| (name, value)))
        .arg(path)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {binary}: {error}"))
}
