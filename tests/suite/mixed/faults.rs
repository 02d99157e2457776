//! What happens to the servers: kills, shutdowns, reloads, changes of role, pauses, clock steps.

use std::{collections::HashMap, thread::sleep, time::Duration};

use florence_tests::{Server, eventually, free_port};

use super::{COUNTERS, Driver, model::Ended, requests::Form};

/// How many seconds a server's clock may be off, either way.
const SKEW: i64 = 8;

/// What can happen to servers, apart from small disturbances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Kill,
    /// While an operation is under way.
    KillInFlight,
    KillReplica,
    Terminate,
    ShutDown,
    Reload,
    /// The server's own FAILOVER command.
    Failover,
    /// Master and replica trade places by REPLICAOF while writes are paused.
    Exchange,
    /// For a moment the master is the replica of a port where nobody listens.
    Unreachable,
    /// A sentinel promotes a replica although the master is alive.
    Promotion,
}

impl Driver {
    /// Causes a small disturbance: paused writes, a save, a clock step.
    pub(super) fn disturb(&mut self) {
        match self.random.below(10) {
            0..4 => {
                let pause = (20 + self.random.below(230)).to_string();
                let _ = self.ask::<()>(&["CLIENT", "PAUSE", &pause, "WRITE"]);
            }
            // Refused if one is already under way.
            4 => drop(self.ask::<String>(&["BGSAVE"])),
            5 => drop(self.ask::<String>(&["BGREWRITEAOF"])),
            _ => self.set_clocks(false),
        }
    }

    /// Sets one clock forward or back by a few seconds, or all of them forward by an hour.
    pub(super) fn set_clocks(&mut self, by_an_hour: bool) {
        for server in &self.fleet.servers {
            // A pause ends at a time on the clock, so it would last too long on one set back.
            let _ = server.try_call::<()>(&["CLIENT", "UNPAUSE"]);
        }
        if by_an_hour {
            self.fleet.ahead += 3600;
            self.log_fault("all clocks an hour forward");
        } else {
            let i = self.random.below(self.fleet.clocks.len());
            let skew = self.random.below(17);
            self.fleet.clocks[i].1 = i64::try_from(skew).unwrap() - SKEW;
            let fault = format!("clock of {i}: {:+}", self.fleet.clocks[i].1);
            self.log_fault(&fault);
        }
        for (clock, skew) in &self.fleet.clocks {
            clock.set(self.fleet.ahead + skew);
        }
    }

    pub(super) fn inflict(&mut self, fault: Fault) {
        self.wait_until_calm();
        self.log_fault(&format!("{fault:?} of {}", self.fleet.master));
        let master = self.fleet.master;
        match fault {
            Fault::Kill => {
                self.note_counters(master);
                self.fleet.servers[master].kill();
                self.count_deaths();
                self.recover();
            }
            Fault::KillInFlight => self.kill_in_flight(),
            Fault::KillReplica => {
                let replica = self.fleet.replicas().next().unwrap();
                self.note_counters(replica);
                self.fleet.servers[replica].kill();
                // It comes back as a master, with the data that it had.
                self.fleet.servers[replica].restart();
                self.send_back(replica);
            }
            Fault::Terminate => {
                self.note_counters(master);
                self.fleet.servers[master].terminate();
                // Its replica does not always learn that the shutdown was orderly.
                if !self.fleet.sentinels.is_empty() {
                    self.count_deaths();
                }
                self.recover();
            }
            Fault::ShutDown => {
                self.note_counters(master);
                self.fleet.servers[master].shut_down(&[]);
                self.recover();
            }
            Fault::Reload => self.fleet.servers[master].call::<()>(&["DEBUG", "RELOAD"]),
            Fault::Failover | Fault::Exchange => self.change_roles(fault),
            Fault::Unreachable => {
                let nobody = free_port().to_string();
                let server = &self.fleet.servers[master];
                server.call::<()>(&["REPLICAOF", "127.0.0.1", &nobody]);
                sleep(self.random.pause(500));
                server.call::<()>(&["REPLICAOF", "NO", "ONE"]);
                self.epoch += 1;
            }
            Fault::Promotion => {
                eventually("a replica is fit", || self.fleet.sentinels[0].fail_over().ok());
                self.connection = None;
                self.epoch += 1;
                self.wait_for_other_master(master);
                self.send_back(master);
            }
        }
    }

    fn kill_in_flight(&mut self) {
        let Some((steps, form)) = self.plan() else { return };
        let form = if form == Form::Bare { Form::Multi } else { form };
        let (master, wait) = (self.fleet.master, self.random.below(2000) as u64);
        self.note_counters(master);
        let request = self.request(steps, form);
        let sent = self.connection().and_then(|connection| request.send(connection));
        sleep(Duration::from_micros(wait));
        self.fleet.servers[master].kill();
        let received = sent.and_then(|()| request.receive(self.connection.as_mut().unwrap()));
        self.recover();
        match received {
            Ok(states) if self.fleet.sentinels.is_empty() => self.settle(&request, Some(&states)),
            _ => drop(self.look_up(&request)),
        }
        self.count_deaths();
    }

    /// Master and replica trade places without losing a write.
    fn change_roles(&mut self, fault: Fault) {
        let (old, new) = (self.fleet.master, self.fleet.replicas().next().unwrap());
        let [from, to] = [&self.fleet.servers[old], &self.fleet.servers[new]];
        let info = |server: &Server| server.call::<String>(&["INFO", "replication"]);
        let port = to.port.to_string();
        if fault != Fault::Failover {
            from.call::<()>(&["CLIENT", "PAUSE", "20000", "WRITE"]);
            let offset = |server: &Server| {
                let info = info(server);
                info.lines().find(|line| line.starts_with("master_repl_offset")).map(str::to_owned)
            };
            eventually("the replica has all", || (offset(from) == offset(to)).then_some(()));
            to.call::<()>(&["REPLICAOF", "NO", "ONE"]);
            from.call::<()>(&["REPLICAOF", "127.0.0.1", &to.port.to_string()]);
            from.call::<()>(&["CLIENT", "UNPAUSE"]);
        }
        eventually("the roles have changed", || {
            let (from_says, to_says) = (info(from), info(to));
            // The replica may not be online yet; and a server whose clock has stepped takes it for
            // dead in the middle, and gives up.
            if fault == Fault::Failover
                && from_says.contains("role:master")
                && from_says.contains("master_failover_state:no-failover")
            {
                let failover = ["FAILOVER", "TO", "127.0.0.1", &port, "TIMEOUT", "3000"];
                let _ = from.try_call::<()>(&failover);
            }
            let have_changed = from_says.contains("role:slave") && to_says.contains("role:master");
            have_changed.then_some(())
        });
        self.fleet.master = new;
        self.connection = None;
        self.epoch += 1;
    }

    /// Brings a dead master back: as the master, or under Sentinel as a replica of the one that is
    /// promoted.
    fn recover(&mut self) {
        let dead = self.fleet.master;
        self.connection = None;
        self.epoch += 1;
        if self.fleet.sentinels.is_empty() {
            self.fleet.servers[dead].restart();
            return;
        }
        self.wait_for_other_master(dead);
        self.fleet.servers[dead].restart();
        self.send_back(dead);
    }

    /// Makes a former master a replica, after a moment in which it still believes it is the master.
    fn send_back(&mut self, old: usize) {
        sleep(self.random.pause(600));
        let port = self.fleet.master().port.to_string();
        self.fleet.servers[old].call::<()>(&["REPLICAOF", "127.0.0.1", &port]);
    }

    /// Counts a kill for every job that may have been running.
    pub(super) fn count_deaths(&mut self) {
        let note = format!("(killed after {})", self.number);
        for job in self.model.jobs.values_mut().filter(|job| job.ended != Ended::Yes) {
            job.deaths += 1;
            job.story.push(note.clone());
        }
    }

    /// Adds a process's counters to the totals before it ends.
    pub(super) fn note_counters(&mut self, i: usize) {
        let stats = self.fleet.servers[i].try_call::<HashMap<String, i64>>(&["FLORENCE.STATS"]);
        let stats = stats.unwrap_or_default();
        for name in COUNTERS {
            if let Some(count) = stats.get(name) {
                *self.counters.entry(name).or_default() += count;
            }
        }
    }
}
