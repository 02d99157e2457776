//! A redis-server process with the module, on a port of its own; ended on drop.
//!
//! `FLORENCE_SERVER` names the server's binary (default: redis-server on the PATH),
//! `FLORENCE_SERVER_LIBS` a library path for it, `FLORENCE_MODULE` the module.

use std::{
    collections::HashMap,
    fs::File,
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use redis::{Client, Connection, FromRedisValue, Value, from_redis_value};
use tempfile::TempDir;

use crate::{Pictures, eventually};

/// How a server is started.
#[derive(Default)]
pub struct Settings {
    /// Lines of the configuration, such as `appendonly yes`.
    pub lines: Vec<String>,
    /// Arguments of `loadmodule`.
    pub module_args: Vec<String>,
    /// Environment variables.
    pub env: Vec<(&'static str, String)>,
    /// Without the module, and without its lines of the configuration.
    pub plain: bool,
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
    /// They count from the next start on.
    pub settings: Settings,
}

/// The module under test.
pub fn module() -> PathBuf {
    let default = || crate::path("").join("target/release/libflorence.so");
    let path = std::env::var("FLORENCE_MODULE").map_or_else(|_| default(), PathBuf::from);
    path.canonicalize().unwrap_or_else(|_| panic!("{} is not built", path.display()))
}

/// A port that nobody listens on, below those that the system gives to outgoing connections. No
/// other test takes it while this process lives: a server that was killed comes back to it.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // The system gives a socket's name to one process at a time, and takes it back at its end.
    static CLAIMS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    loop {
        let n = std::process::id().wrapping_mul(97) + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(10_000 + n % 20_000).unwrap();
        let name = SocketAddr::from_abstract_name(format!("florence-tests-{port}")).unwrap();
        let Ok(claim) = UnixListener::bind_addr(&name) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            CLAIMS.lock().unwrap().push(claim);
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
        let mut server = Self::spawn(settings);
        server.wait_until_ready();
        server
    }

    /// A server with as many downloads as it begins at one host: others from there wait until the
    /// gate `back` is opened.
    pub fn busy(pictures: &Pictures, lines: &[&str]) -> Self {
        const AT_WORK: usize = 16;
        let server = Self::ready(&[lines, &["florence.prepare-threads 16"]].concat());
        let url = pictures.url("held/back/sign.png");
        for i in 0..AT_WORK {
            let key = format!("at-work:{i}");
            server.call::<()>(&["FLORENCE.SUBMIT", &key, &url, "<OCR>"]);
            eventually("it is worked on", || (server.state(&key) == "fetching").then_some(()));
        }
        server
    }

    /// A server with these configuration lines, whose model is loaded.
    pub fn ready(lines: &[&str]) -> Self {
        let server = Self::with(Settings::lines(lines));
        server.wait_for_model();
        server
    }

    /// What a server logs that does not start with these settings.
    pub fn refused(settings: Settings) -> String {
        let mut server = Self::spawn(settings);
        eventually("the server refuses to start", || (!server.is_alive()).then_some(()));
        server.log()
    }

    /// What a server logs that does not start with these settings; `None` if it does start.
    pub fn refusal(settings: Settings) -> Option<String> {
        let mut server = Self::spawn(settings);
        eventually("the server starts, or ends", || {
            if !server.is_alive() {
                return Some(Some(server.log()));
            }
            let pong: redis::RedisResult<String> = call(&mut server.try_connect()?, &["PING"]);
            pong.is_ok().then_some(None)
        })
    }

    fn spawn(settings: Settings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        let child = spawn(port, &directory, &settings);
        Self { child, port, directory, settings }
    }

    fn wait_until_ready(&mut self) {
        eventually("the server answers", || {
            assert!(self.is_alive(), "the server has ended:\n{}", self.log());
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
        self.try_connect().unwrap_or_else(|| panic!("the server is gone:\n{}", self.log()))
    }

    /// A new connection to a database, RESP2.
    pub fn connect_to(&self, db: usize) -> Connection {
        let mut connection = self.connect();
        redis::cmd("SELECT").arg(db).exec(&mut connection).unwrap();
        connection
    }

    /// A user who may do all, with the password `pw`.
    pub fn add_user(&self, user: &str) {
        self.call::<()>(&["ACL", "SETUSER", user, "on", ">pw", "~*", "&*", "+@all"]);
    }

    /// A new connection of a user.
    pub fn connect_as(&self, user: &str, password: &str) -> Connection {
        let url = format!("redis://{user}:{password}@127.0.0.1:{}", self.port);
        Client::open(url).unwrap().get_connection().unwrap()
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

    /// The counters of FLORENCE.STATS, all of one moment.
    pub fn stats<const N: usize>(&self, names: [&str; N]) -> [i64; N] {
        let stats: HashMap<String, i64> = self.call(&["FLORENCE.STATS"]);
        names.map(|name| {
            *stats.get(name).unwrap_or_else(|| panic!("FLORENCE.STATS has no {name}: {stats:?}"))
        })
    }

    /// One of them.
    pub fn stat(&self, name: &str) -> i64 {
        self.stats([name])[0]
    }

    /// How many jobs have not ended, those left out that wait for a later time.
    pub fn unfinished(&self) -> i64 {
        self.stats(["jobs_waiting", "jobs_active"]).iter().sum()
    }

    /// Waits until nothing is left to do.
    pub fn until_idle(&self) {
        eventually("nothing is left to do", || (self.unfinished() == 0).then_some(()));
    }

    /// What FLORENCE.MODEL tells of the default model.
    pub fn model(&self) -> HashMap<String, Option<String>> {
        let mut told: HashMap<String, Value> = self.call(&["FLORENCE.MODEL"]);
        told.remove("models");
        told.into_iter().map(|(name, value)| (name, from_redis_value(&value).unwrap())).collect()
    }

    /// What it tells of all of them, by name.
    pub fn models(&self) -> HashMap<String, HashMap<String, Option<String>>> {
        let told: HashMap<String, Value> = self.call(&["FLORENCE.MODEL"]);
        let models: Vec<HashMap<String, Option<String>>> =
            from_redis_value(&told["models"]).unwrap();
        models.into_iter().map(|model| (model["name"].clone().unwrap(), model)).collect()
    }

    /// Waits until the default model is loaded.
    pub fn wait_for_model(&self) {
        eventually("the model is ready", || {
            (self.model()["state"].as_deref() == Some("ready")).then_some(())
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

    /// Ends the process in good order, by the command, and waits for that.
    pub fn shut_down(&mut self, options: &[&str]) {
        // The server goes without a reply, unless it refuses.
        let refused = match self.try_call::<Value>(&[&["SHUTDOWN"], options].concat()) {
            Err(error) if error.code().is_some() => Some(error),
            _ => None,
        };
        assert!(refused.is_none(), "SHUTDOWN {options:?}: {refused:?}\n{}", self.log());
        self.wait_for_end();
    }

    /// Ends the process in good order, by SIGTERM, and waits for that.
    pub fn terminate(&mut self) {
        self.signal("TERM");
        self.wait_for_end();
    }

    /// Sends the process a signal, by its name.
    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    fn wait_for_end(&mut self) {
        eventually("the server ends", || (!self.is_alive()).then_some(()));
    }

    /// Starts a server that has ended again, on the same files and port.
    pub fn restart(&mut self) {
        self.begin_to_restart();
        self.wait_until_ready();
    }

    /// As [`Self::restart`], but it may still be loading its data.
    pub fn begin_to_restart(&mut self) {
        self.child = spawn(self.port, &self.directory, &self.settings);
        eventually("the server takes connections", || {
            assert!(self.is_alive(), "the server has ended:\n{}", self.log());
            self.try_connect()
        });
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
        let descriptors = std::fs::read_dir(self.proc().join("fd")).unwrap().count();
        [self.status("VmRSS:"), self.status("Threads:"), descriptors as u64]
    }

    /// The most that was ever resident, in KiB.
    pub fn peak(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc().join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// One of the numbers of INFO.
    pub fn info(&self, name: &str) -> i64 {
        let info: String = self.call(&["INFO", "everything"]);
        let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let value = value.unwrap_or_else(|| panic!("INFO has no {name}: {info}"));
        value.parse().unwrap_or_else(|_| panic!("{name} is {value}"))
    }

    /// The time that the calls of a command have taken so far, as INFO tells it.
    pub fn time_of(&self, command: &str) -> Duration {
        let info: String = self.call(&["INFO", "commandstats"]);
        let start = format!("cmdstat_{command}:");
        let line = info.lines().find(|line| {
            line.get(..start.len()).is_some_and(|named| named.eq_ignore_ascii_case(&start))
        });
        let usec = line.and_then(|line| line.split_once("usec=")?.1.split(',').next());
        let usec = usec.unwrap_or_else(|| panic!("no calls of {command}: {info}"));
        Duration::from_micros(usec.parse().unwrap())
    }

    /// Seconds of processor time that the process has used, all its threads together.
    pub fn cpu_seconds(&self) -> f64 {
        /// The kernel tells of hundredths, whatever its own clock is.
        const TICKS: f64 = 100.0;
        let stat = std::fs::read_to_string(self.proc().join("stat")).unwrap();
        // The name of the process may hold anything; the fields after it may not.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks = |index: usize| fields[index].parse::<u32>().unwrap();
        f64::from(ticks(11) + ticks(12)) / TICKS
    }

    /// The share of a core that the process uses over three seconds.
    pub fn cpu_share(&self) -> f64 {
        let (start, before) = (Instant::now(), self.cpu_seconds());
        sleep(Duration::from_secs(3));
        (self.cpu_seconds() - before) / start.elapsed().as_secs_f64()
    }

    /// Loads the module into a running server, with these arguments.
    pub fn load_module(&self, args: &[&str]) {
        let path = module().display().to_string();
        self.call::<()>(
            &[&["MODULE", "LOAD", &path, "allow-networks", "127.0.0.0/8"], args].concat(),
        );
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
pub fn call<T: FromRedisValue>(
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
    let mut config = vec![
        format!("port {port}\nbind 127.0.0.1\ndir {}", directory.path().display()),
        "save \"\"\nrepl-diskless-sync-delay 0".to_owned(),
        "enable-debug-command yes\nenable-module-command yes".to_owned(),
    ];
    if !settings.plain {
        config.push(format!(
            "loadmodule {} {}",
            module().display(),
            settings.module_args.join(" ")
        ));
        let is_named = |text: &String| text.contains("allow-networks");
        if !settings.lines.iter().chain(&settings.module_args).any(is_named) {
            config.push("florence.allow-networks 127.0.0.0/8".to_owned());
        }
    }
    let is_left_out = |line: &&String| settings.plain && line.starts_with("florence.");
    config.extend(settings.lines.iter().filter(|line| !is_left_out(line)).cloned());
    let path = directory.path().join("redis.conf");
    std::fs::write(&path, config.join("\n")).unwrap();
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
