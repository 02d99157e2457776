//! The servers: who is the master, how they are reached, and what the sentinels say.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use florence_tests::{Clock, Sentinel, Server, Settings, eventually};
use redis::{Client, Connection, RedisError, RedisResult};

use super::{Driver, SILENCE, STUCK};

/// The servers, and which of them is the master.
pub(super) struct Fleet {
    pub(super) servers: Vec<Server>,
    pub(super) clocks: Vec<(Clock, i64)>,
    /// How many seconds all clocks are ahead.
    pub(super) ahead: i64,
    pub(super) sentinels: Vec<Sentinel>,
    pub(super) master: usize,
}

impl Fleet {
    /// A master and its replicas.
    pub(super) fn start(count: usize, lines: &[&str]) -> Self {
        let clocks: Vec<(Clock, i64)> = (0..count).map(|_| (Clock::new(), 0)).collect();
        let ours = ["florence.stream ended", "florence.stream-length 1000000"];
        let servers: Vec<Server> = clocks
            .iter()
            .map(|(clock, _)| {
                let settings = Settings::lines(&[lines, &ours].concat());
                Server::with(Settings { env: clock.env(), ..settings })
            })
            .collect();
        for server in &servers {
            server.wait_for_model();
        }
        let fleet = Self { servers, clocks, ahead: 0, sentinels: vec![], master: 0 };
        fleet.replicas().for_each(|i| fleet.servers[i].follow(&fleet.servers[0]));
        fleet
    }

    pub(super) fn replicas(&self) -> impl Iterator<Item = usize> + use<> {
        let (count, master) = (self.servers.len(), self.master);
        (0..count).filter(move |i| *i != master)
    }

    pub(super) fn master(&self) -> &Server {
        &self.servers[self.master]
    }

    /// Whether a replica is connected to the master and has synchronized.
    fn is_linked(&self, replica: usize) -> bool {
        let port = format!("master_port:{}\r", self.master().port);
        let info = self.replication(replica);
        info.is_some_and(|info| info.contains("master_link_status:up") && info.contains(&port))
    }

    /// A server's `INFO replication`; `None` if it does not answer.
    pub(super) fn replication(&self, server: usize) -> Option<String> {
        let client = Client::open(format!("redis://127.0.0.1:{}", self.servers[server].port));
        let mut connection = client.unwrap().get_connection_with_timeout(SILENCE).ok()?;
        redis::cmd("INFO").arg("replication").query(&mut connection).ok()
    }

    pub(super) fn is_whole(&self) -> bool {
        self.replicas().all(|i| self.is_linked(i))
    }

    /// The master according to the sentinels, if it agrees.
    pub(super) fn find_master(&self) -> Option<usize> {
        let Some(sentinel) = self.sentinels.first() else { return Some(self.master) };
        let port = sentinel.master()?;
        let found = self.servers.iter().position(|server| server.port == port)?;
        self.replication(found)?.contains("role:master").then_some(found)
    }
}

impl Driver {
    /// A connection to the master, kept until something happens to the master.
    pub(super) fn connection(&mut self) -> RedisResult<&mut Connection> {
        if self.connection.is_none() {
            let found = eventually("there is a master", || self.fleet.find_master());
            self.accept(found);
            let connection = self.fleet.master().connect();
            connection.set_read_timeout(Some(SILENCE))?;
            self.connection = Some(connection);
        }
        Ok(self.connection.as_mut().unwrap())
    }

    /// Notes which server is the master. If it is another one although there was no fault, the
    /// sentinels found the old one too slow, and the new one takes it for dead.
    pub(super) fn accept(&mut self, found: usize) {
        if found != self.fleet.master {
            self.log_fault(&format!("the sentinels replace {} by {found}", self.fleet.master));
            self.connection = None;
            self.epoch += 1;
            self.fleet.master = found;
            self.count_deaths();
        }
    }

    pub(super) fn ask<T: redis::FromRedisValue>(&mut self, args: &[&str]) -> RedisResult<T> {
        florence_tests::call(self.connection()?, args)
    }

    /// Whether an error may come from a server that has died, or is not (yet) the master.
    pub(super) fn is_lost(&self, error: &RedisError) -> bool {
        let code = error.code().unwrap_or_default();
        let is_refused = ["READONLY", "LOADING", "MASTERDOWN", "EXECABORT"].contains(&code);
        !self.fleet.sentinels.is_empty() && (code.is_empty() || is_refused)
    }

    pub(super) fn wait_for_other_master(&mut self, old: usize) {
        let start = Instant::now();
        loop {
            if let Some(found) = self.fleet.find_master().filter(|found| *found != old) {
                self.fleet.master = found;
                return;
            }
            if start.elapsed() > STUCK {
                self.fail("no replica is promoted", None);
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits until all servers are in sync and the sentinels have settled.
    pub(super) fn wait_until_calm(&mut self) {
        let start = Instant::now();
        loop {
            let port = self.fleet.master().port;
            let is_calm = self.fleet.sentinels.iter().all(|sentinel| sentinel.is_calm(port));
            if is_calm && self.fleet.is_whole() && self.confirm() {
                return;
            }
            if let Some(found) = self.fleet.find_master() {
                self.accept(found);
            }
            if start.elapsed() > STUCK {
                self.fail("the servers are not in step", None);
            }
            sleep(Duration::from_millis(20));
        }
    }
}
