//! A Redis cluster on loopback: three masters, each with a replica.

use std::ops::RangeInclusive;

use redis::{cluster::ClusterClientBuilder, cluster::ClusterConnection};

use crate::{Server, Settings, eventually, server::free_port};

const MASTERS: u16 = 3;
const SLOTS: u16 = 16384;

/// Masters first, then the replica of each.
pub struct Cluster {
    pub nodes: Vec<Server>,
}

impl Cluster {
    pub fn start() -> Self {
        let node = |_| {
            let bus = format!("cluster-port {}", free_port());
            Server::with(Settings::lines(&[
                "cluster-enabled yes",
                "cluster-node-timeout 2000",
                "cluster-replica-validity-factor 0",
                &bus,
            ]))
        };
        let nodes: Vec<Server> = (0..2 * MASTERS).map(node).collect();
        let cluster = Self { nodes };
        for (i, node) in cluster.nodes.iter().enumerate() {
            node.call::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(i + 1).to_string()]);
        }
        let bus_port: Vec<String> = cluster.nodes[0].call(&["CONFIG", "GET", "cluster-port"]);
        let first = cluster.nodes[0].port.to_string();
        for node in &cluster.nodes[1..] {
            node.call::<()>(&["CLUSTER", "MEET", "127.0.0.1", &first, &bus_port[1]]);
        }
        for i in 0..MASTERS {
            let (from, to) =
                (cluster.slots(i).start().to_string(), cluster.slots(i).end().to_string());
            cluster.nodes[usize::from(i)].call::<()>(&["CLUSTER", "ADDSLOTSRANGE", &from, &to]);
        }
        for i in 0..usize::from(MASTERS) {
            let (master, replica) = (&cluster.nodes[i], &cluster.nodes[i + usize::from(MASTERS)]);
            let id: String = master.call(&["CLUSTER", "MYID"]);
            eventually("the replica knows its master", || {
                replica.try_call::<()>(&["CLUSTER", "REPLICATE", &id]).ok()
            });
        }
        cluster.wait_until_whole();
        for node in &cluster.nodes {
            node.wait_for_model();
        }
        cluster
    }

    /// Waits until every living node sees all slots served and every replica in step.
    fn wait_until_whole(&self) {
        for (i, node) in self.nodes.iter().enumerate() {
            eventually("the cluster is whole", || {
                let info: String = node.call(&["CLUSTER", "INFO"]);
                let is_whole =
                    info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:6");
                let replication: String = node.call(&["INFO", "replication"]);
                let is_linked =
                    i < usize::from(MASTERS) || replication.contains("master_link_status:up");
                (is_whole && is_linked).then_some(())
            });
        }
    }

    /// The slots that a master starts with.
    pub fn slots(&self, master: u16) -> RangeInclusive<u16> {
        let share = SLOTS / MASTERS;
        let last = if master + 1 == MASTERS { SLOTS } else { (master + 1) * share };
        master * share..=last - 1
    }

    /// A client that follows redirections.
    pub fn connect(&self) -> ClusterConnection {
        let urls = self.nodes.iter().map(|node| format!("redis://127.0.0.1:{}", node.port));
        let client = ClusterClientBuilder::new(urls).retries(2).build().unwrap();
        eventually("a node answers", || client.get_connection().ok())
    }

    /// One of the counters of FLORENCE.STATS, summed over the nodes that live.
    pub fn stat(&mut self, name: &str) -> i64 {
        let living = self.nodes.iter_mut().filter_map(|node| node.is_alive().then_some(&*node));
        living.map(|node| node.stat(name)).sum()
    }

    /// The slot of a key.
    pub fn slot(&self, key: &str) -> u16 {
        self.nodes[0].call(&["CLUSTER", "KEYSLOT", key])
    }
}
