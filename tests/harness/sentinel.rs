//! Redis Sentinel on loopback: watches a master and its replicas, and promotes one when it dies.

use std::{
    collections::HashMap,
    fs::File,
    process::{Child, Command, Stdio},
};

use redis::{Client, Connection, FromRedisValue};
use tempfile::TempDir;

use crate::{Server, call, eventually, free_port};

/// The name of the watched master.
const MASTER: &str = "florence";

type Fields = HashMap<String, String>;

/// A running sentinel; ended on drop.
pub struct Sentinel {
    child: Child,
    port: u16,
    directory: TempDir,
}

impl Sentinel {
    /// So many sentinels that watch a master; they know it, its replicas and each other. An error
    /// if this build of the server has no Sentinel.
    pub fn watch(master: &Server, count: usize) -> Result<Vec<Self>, String> {
        let quorum = count / 2 + 1;
        let mut sentinels = Vec::new();
        for _ in 0..count {
            sentinels.push(Self::spawn(master.port, quorum)?);
        }
        for sentinel in &sentinels {
            eventually("the sentinels know all", || {
                let info: Fields = sentinel.call(&["SENTINEL", "MASTER", MASTER]).ok()?;
                let knows_others = info["num-other-sentinels"] == (count - 1).to_string();
                (knows_others && info["num-slaves"] != "0").then_some(())
            });
        }
        Ok(sentinels)
    }

    fn spawn(master: u16, quorum: usize) -> Result<Self, String> {
        let binary = std::env::var("FLORENCE_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
        let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
        // Longer than the second between two of its pings: the first one after a change of masters
        // would be late.
        let config = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\n\
             sentinel monitor {MASTER} 127.0.0.1 {master} {quorum}\n\
             sentinel down-after-milliseconds {MASTER} 1500\n\
             sentinel failover-timeout {MASTER} 3000\n\
             sentinel parallel-syncs {MASTER} 2\n",
            directory.path().display(),
        );
        let path = directory.path().join("sentinel.conf");
        std::fs::write(&path, config).unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let mut command = Command::new(&binary);
        if let Ok(libraries) = std::env::var("FLORENCE_SERVER_LIBS") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let child = command
            .arg(path)
            .arg("--sentinel")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {binary}: {error}"));
        let mut sentinel = Self { child, port, directory };
        let answers = eventually("the sentinel answers", || {
            if sentinel.child.try_wait().unwrap().is_some() {
                return Some(false);
            }
            sentinel.call::<Vec<String>>(&["SENTINEL", "MASTER", MASTER]).ok().map(|_| true)
        });
        if answers { Ok(sentinel) } else { Err(sentinel.log()) }
    }

    fn connect(&self) -> redis::RedisResult<Connection> {
        Client::open(format!("redis://127.0.0.1:{}", self.port))?.get_connection()
    }

    /// Runs one command on a connection of its own.
    pub fn call<T: FromRedisValue>(&self, args: &[&str]) -> redis::RedisResult<T> {
        call(&mut self.connect()?, args)
    }

    /// The port of the server that is the master now, as clients ask for it.
    pub fn master(&self) -> Option<u16> {
        let address = self.call::<(String, u16)>(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]);
        address.ok().map(|(_, port)| port)
    }

    /// Whether the server at this port is the master, all is well, and nothing is being changed.
    pub fn is_calm(&self, master: u16) -> bool {
        let info = self.call::<Fields>(&["SENTINEL", "MASTER", MASTER]);
        let replicas = self.call::<Vec<Fields>>(&["SENTINEL", "REPLICAS", MASTER]);
        info.is_ok_and(|info| info["flags"] == "master" && info["port"] == master.to_string())
            && replicas.is_ok_and(|all| all.iter().all(|replica| replica["flags"] == "slave"))
    }

    /// Promotes a replica although the master lives. An error if none is fit for it just now.
    pub fn fail_over(&self) -> redis::RedisResult<()> {
        self.call(&["SENTINEL", "FAILOVER", MASTER])
    }

    /// What the sentinel has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
