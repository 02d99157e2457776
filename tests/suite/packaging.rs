//! What people install: the container's entry point, `make install` with its unit, `make run`, and
//! versions that agree.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use florence_tests::{Server, eventually, free_port, module, path};
use redis::{Client, Connection, Value};
use tempfile::TempDir;

/// A text file of the project.
fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A process that ends with the test, and the directory that it works in.
struct Process {
    child: Child,
    directory: TempDir,
    port: u16,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// Starts a program in a directory of its own; `redis-server` is the server under test there.
    fn start(program: &Path, args: &[&str], env: &[(&str, &str)]) -> Self {
        let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
        let names = directory.path().join("bin");
        fs::create_dir(&names).unwrap();
        let server = std::env::var("FLORENCE_SERVER").unwrap_or_default();
        if server.contains('/') {
            std::os::unix::fs::symlink(server, names.join("redis-server")).unwrap();
        }
        let path = format!("{}:{}", names.display(), std::env::var("PATH").unwrap());
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut command = Command::new(program);
        if let Ok(libraries) = std::env::var("FLORENCE_SERVER_LIBS") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let child = command
            .current_dir(directory.path())
            .env("PATH", path)
            .env("FLORENCE_MODULE", module())
            .envs(env.iter().copied())
            .args(args)
            .args(["--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, directory, port }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// A connection with a password, once there is one and the model is loaded.
    fn connect(&mut self, password: &str) -> Connection {
        let url = format!("redis://:{}@127.0.0.1:{}", password.replace('"', "%22"), self.port);
        let url = if password.is_empty() { url.replace(":@", "") } else { url };
        eventually("the model is ready", || {
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended:\n{}", self.log());
            let mut connection = Client::open(url.as_str()).unwrap().get_connection().ok()?;
            let model: Vec<Value> = redis::cmd("FLORENCE.MODEL").query(&mut connection).ok()?;
            let ready = Value::BulkString(b"ready".to_vec());
            model.contains(&ready).then_some(connection)
        })
    }

    fn setting(connection: &mut Connection, name: &str) -> String {
        let pair: Vec<String> =
            redis::cmd("CONFIG").arg("GET").arg(name).query(connection).unwrap();
        pair.into_iter().nth(1).unwrap_or_default()
    }
}

fn entrypoint() -> PathBuf {
    path("packaging/entrypoint.sh")
}

#[test]
fn the_entry_point_starts_a_server_with_a_password_and_the_settings_that_are_added() {
    let password = "two words and a \" quote";
    for is_a_file in [false, true] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("{password}\n")).unwrap();
        let env = if is_a_file {
            ("FLORENCE_PASSWORD_FILE", file.path().to_str().unwrap())
        } else {
            ("FLORENCE_PASSWORD", password)
        };
        let args = ["--florence.max-batch", "7", "--appendonly", "no"];
        let mut server = Process::start(&entrypoint(), &args, &[env]);
        let mut connection = server.connect(&password.replace(' ', "%20"));
        let mut setting = |name| Process::setting(&mut connection, name);
        assert_eq!(setting("florence.max-batch"), "7");
        assert_eq!(setting("appendonly"), "no");
        assert_eq!(setting("maxmemory-policy"), "noeviction");
        let packed = server.directory.path().canonicalize().unwrap().join("packed");
        assert_eq!(Path::new(&setting("florence.packed-directory")), packed);
        assert!(packed.is_dir());

        let stranger = Client::open(format!("redis://127.0.0.1:{}", server.port)).unwrap();
        let refused = redis::cmd("PING").exec(&mut stranger.get_connection().unwrap());
        assert!(refused.unwrap_err().to_string().contains("NOAUTH"));
        let arguments = fs::read_to_string(format!("/proc/{}/cmdline", server.child.id())).unwrap();
        assert!(!arguments.contains("quote"), "{arguments}");

        let port = server.port.to_string();
        let is_ready = |value: &str| {
            let mut command = Command::new(entrypoint());
            command.args(["is-ready", &port]).env(env.0, value).stderr(Stdio::null());
            command.status().unwrap().success()
        };
        assert!(is_ready(env.1) && !is_ready("/dev/null"));
    }
}

#[test]
fn without_a_password_the_entry_point_serves_nobody_from_outside() {
    let mut server = Process::start(&entrypoint(), &[], &[]);
    let mut connection = server.connect("");
    assert_eq!(Process::setting(&mut connection, "protected-mode"), "yes");
    assert_eq!(Process::setting(&mut connection, "appendonly"), "yes");
    assert!(server.log().contains("clients from outside of the container are refused"));
}

#[test]
fn the_entry_point_runs_another_command_instead() {
    let output = Command::new(entrypoint()).args(["echo", "--florence", "x y"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "--florence x y\n");
}

/// The image's first stage has all members of the workspace, and what they include.
#[test]
fn the_dockerfile_copies_what_the_build_needs() {
    let (text, copy) = (read("Dockerfile"), tempfile::tempdir().unwrap());
    let build = text.split("\nFROM ").nth(1).unwrap();
    let mut copied = 0;
    for line in build.lines().filter_map(|line| line.strip_prefix("COPY ")) {
        let (names, to) = line.rsplit_once(' ').unwrap();
        for name in names.split(' ') {
            let from = path(name);
            let to = if to == "./" { copy.path().to_owned() } else { copy.path().join(to) };
            let to = if to.is_dir() { to } else { to.parent().unwrap().to_owned() };
            run(Command::new("cp").arg("-r").arg(from).arg(to));
            copied += 1;
        }
    }
    assert!(copied > 5, "{build}");
    let mut metadata = Command::new("cargo");
    metadata.args(["metadata", "--locked", "--offline", "--format-version", "1", "--no-deps"]);
    run(metadata.current_dir(copy.path()));
    let included = ["models/tiny/model.safetensors", "cli/src/web/page/index.html"];
    assert!(included.iter().all(|name| copy.path().join(name).exists()));
    // What it runs and copies is there.
    assert!(text.contains("COPY packaging/entrypoint.sh /usr/bin/florence-redis"));
    assert!(text.contains("ENTRYPOINT [\"florence-redis\"]") && !text.contains("protected-mode"));
}

/// All sources below a directory; texts that go on in the next line are joined.
fn sources(directory: &Path) -> String {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let text = entries.map(|path| {
        if path.is_dir() {
            sources(&path)
        } else {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.split("\\\n").map(str::trim_start).collect()
        }
    });
    text.collect()
}

#[test]
fn the_faq_quotes_what_is_said() {
    /// What Redis says.
    const THEIRS: [&str; 6] = [
        "cannot open shared object file",
        "Issue during loading of configuration florence.NAME",
        "Unrecognized parameter",
        "unknown command 'FLORENCE.SUBMIT'",
        "DENIED Redis is running in protected mode",
        "can't set immutable config",
    ];
    let ours = ["engine/src", "module/src", "tools"].map(|name| sources(&path(name)));
    let ours = ours.concat();
    let (faq, mut checked, mut wrong) = (read("docs/FAQ.md"), 0, Vec::new());
    let rows = faq.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    for quoted in rows.flat_map(|column| column.split('`').skip(1).step_by(2)) {
        let text = quoted.trim_start_matches(|letter: char| letter.is_ascii_uppercase()).trim();
        for part in text.split("..").filter(|part| part.len() > 8 && !THEIRS.contains(&quoted)) {
            checked += 1;
            if !ours.contains(part) {
                wrong.push(part.to_owned());
            }
        }
    }
    assert!(wrong.is_empty(), "nobody says {wrong:#?}");
    assert!(checked > 30, "{checked}");
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}{err}");
    output
}

fn install(destination: &Path) {
    let destination = format!("DESTDIR={}", destination.display());
    run(Command::new("make").current_dir(path("")).args(["install", &destination]));
}

#[test]
fn make_install_puts_a_unit_that_systemd_takes_and_settings_that_a_server_takes() {
    let to = tempfile::tempdir().unwrap();
    install(to.path());
    let prefix = to.path().join("usr/local");
    assert!(prefix.join("bin/florence").exists());
    assert!(prefix.join("lib/florence-redis/libflorence.so").exists());

    let unit = prefix.join("lib/systemd/system/florence-redis.service");
    let output = run(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!told.contains("florence-redis"), "{told}");
    let text = fs::read_to_string(&unit).unwrap();
    for line in [
        "ProtectSystem=strict",
        "StateDirectory=florence-redis",
        "ExecPaths=/usr/bin/redis-server /usr/lib /lib /usr/local/lib/florence-redis",
        "ExecStart=/usr/bin/redis-server /etc/florence-redis/redis.conf --supervised systemd \
         --daemonize no",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
    assert!(!text.contains('@') || !text.contains("DIR@"), "{text}");

    // The settings, with this directory in the place of the system's.
    let (path, state) = (to.path().join("etc/florence-redis/redis.conf"), to.path().join("state"));
    let installed = fs::read_to_string(&path).unwrap();
    assert!(installed.contains("\nport 6380\n"));
    fs::create_dir(&state).unwrap();
    let here = installed
        .replace("/var/lib/florence-redis", state.to_str().unwrap())
        .replace("/usr/local/lib", prefix.join("lib").to_str().unwrap());
    fs::write(to.path().join("here.conf"), here).unwrap();
    let program = std::env::var("FLORENCE_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
    let conf = to.path().join("here.conf");
    let mut server = Process::start(Path::new(&program), &[conf.to_str().unwrap()], &[]);
    let mut connection = server.connect("");
    let kept = Process::setting(&mut connection, "florence.packed-directory");
    assert_eq!(Path::new(&kept), state);

    // A second time the settings stay as they are.
    fs::write(&path, "mine").unwrap();
    install(to.path());
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn make_run_says_so_when_its_port_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = Command::new(path("tools/run.sh")).args(["--port", &port]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    for part in [&format!("port {port} is taken"), "systemctl", "make run ARGS=\"--port 6380\""] {
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn versions_agree_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    for (name, line) in [
        ("Cargo.toml", format!("version = \"{version}\"")),
        ("clients/python/pyproject.toml", format!("version = \"{version}\"")),
        ("clients/node/package.json", format!("  \"version\": \"{version}\",")),
    ] {
        assert!(read(name).lines().any(|found| found == line), "{name} lacks {line}");
    }
    let label = format!("org.opencontainers.image.version=\"{version}\"");
    assert!(read("Dockerfile").contains(&label));
    let newest =
        read("CHANGELOG.md").lines().find(|line| line.starts_with("## ")).unwrap().to_owned();
    let named = newest.trim_start_matches("## ").split(' ').next().unwrap().to_owned();
    assert_eq!(named, version, "{newest}");

    let server = Server::start();
    let info: String = server.call(&["INFO", "florence"]);
    assert!(info.contains(&format!("florence_version:{version}\r")), "{info}");
    let [major, minor, patch] =
        version.split('.').map(|n| n.parse().unwrap()).collect::<Vec<i64>>()[..]
    else {
        panic!("{version}")
    };
    let modules: Vec<std::collections::HashMap<String, Value>> = server.call(&["MODULE", "LIST"]);
    let ours = modules.iter().find(|it| it["name"] == Value::BulkString(b"florence".to_vec()));
    assert_eq!(ours.unwrap()["ver"], Value::Int(major * 10_000 + minor * 100 + patch));
}
