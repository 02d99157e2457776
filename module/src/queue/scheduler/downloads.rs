//! Jobs whose pictures have to be downloaded: which is the first that may start, when hosts and
//! users have no more than so many downloads at a time.
//!
//! Jobs wait in lanes, one for each user, host and model. A lane is open while its host has room; a
//! user is listed while it has room, with the first job of its open lanes for each model.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{Place, places::Places};
use crate::job::Origin;

/// How many downloads may run at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) per_host: usize,
    pub(crate) per_user: usize,
}

#[derive(Debug, Default)]
struct Lane {
    jobs: BTreeSet<Place>,
    /// Its entry in the user's list, if it is open.
    listed: Option<Place>,
}

#[derive(Debug, Default)]
struct User {
    /// By host, then by model.
    lanes: HashMap<Arc<str>, HashMap<Arc<str>, Lane>>,
    /// The first job of each open lane.
    firsts: Places,
    active: usize,
    /// Its entries in the list of all, by model.
    listed: HashMap<Arc<str>, Place>,
}

#[derive(Debug, Default)]
struct Host {
    /// Those who have a lane to it.
    users: HashSet<Arc<str>>,
    active: usize,
}

#[derive(Debug)]
pub(super) struct Downloads {
    limits: Limits,
    users: HashMap<Arc<str>, User>,
    hosts: HashMap<Arc<str>, Host>,
    /// The first job for each model of each user who has room.
    firsts: Places,
}

impl Default for Downloads {
    fn default() -> Self {
        let limits = Limits { per_host: usize::MAX, per_user: usize::MAX };
        Self { limits, users: HashMap::new(), hosts: HashMap::new(), firsts: Places::default() }
    }
}

/// Puts an entry in the place of another.
fn relist(list: &mut Places, model: &Arc<str>, old: Option<Place>, new: Option<Place>) {
    if old == new {
        return;
    }
    if let Some(old) = old {
        list.remove(model, old);
    }
    if let Some(new) = new {
        list.insert(model, new);
    }
}

impl Downloads {
    /// Takes over other limits.
    pub(super) fn limit(&mut self, limits: Limits) {
        if self.limits == limits {
            return;
        }
        self.limits = limits;
        for host in self.hosts.keys().cloned().collect::<Vec<_>>() {
            self.relist_host(&host);
        }
        for user in self.users.keys().cloned().collect::<Vec<_>>() {
            self.relist_user(&user);
        }
    }

    /// The first job that may start, of those whose model is open.
    pub(super) fn first(&self, is_open: &dyn Fn(&str) -> bool) -> Option<Place> {
        self.firsts.first(is_open)
    }

    /// A job waits.
    pub(super) fn insert(&mut self, place: Place, origin: &Origin) {
        let Some(host) = &origin.host else { return };
        self.hosts.entry(Arc::clone(host)).or_default().users.insert(Arc::clone(&origin.user));
        let user = self.users.entry(Arc::clone(&origin.user)).or_default();
        let lanes = user.lanes.entry(Arc::clone(host)).or_default();
        lanes.entry(Arc::clone(&origin.model)).or_default().jobs.insert(place);
        self.relist_lane(&origin.user, host, &origin.model);
    }

    /// A job does not wait any more.
    pub(super) fn remove(&mut self, place: Place, origin: &Origin) {
        let Some(host) = &origin.host else { return };
        let Some(user) = self.users.get_mut(&origin.user) else { return };
        let lanes = user.lanes.get_mut(host);
        let Some(lane) = lanes.and_then(|lanes| lanes.get_mut(&origin.model)) else { return };
        lane.jobs.remove(&place);
        let is_last = lane.jobs.is_empty();
        self.relist_lane(&origin.user, host, &origin.model);
        if is_last {
            self.tidy(&origin.user, host);
        }
    }

    /// A download begins.
    pub(super) fn start(&mut self, origin: &Origin) {
        self.count(origin, |active| active + 1);
    }

    /// A download that began has ended.
    pub(super) fn end(&mut self, origin: &Origin) {
        self.count(origin, |active| active.saturating_sub(1));
        if let Some(host) = &origin.host {
            self.tidy(&origin.user, host);
        }
    }

    fn count(&mut self, origin: &Origin, count: impl Fn(usize) -> usize) {
        let Some(host) = &origin.host else { return };
        let there = self.hosts.entry(Arc::clone(host)).or_default();
        let had_room = there.active < self.limits.per_host;
        there.active = count(there.active);
        let has_room = there.active < self.limits.per_host;
        let user = self.users.entry(Arc::clone(&origin.user)).or_default();
        user.active = count(user.active);
        if had_room != has_room {
            self.relist_host(host);
        }
        self.relist_user(&origin.user);
    }

    /// Forgets whom and what nothing is known of any more.
    fn tidy(&mut self, user: &Arc<str>, host: &Arc<str>) {
        if let Some(known) = self.users.get_mut(user) {
            if let Some(lanes) = known.lanes.get_mut(host) {
                lanes.retain(|_, lane| !lane.jobs.is_empty());
            }
            if known.lanes.get(host).is_none_or(HashMap::is_empty) {
                known.lanes.remove(host);
                if let Some(there) = self.hosts.get_mut(host) {
                    there.users.remove(user);
                }
            }
            if known.lanes.is_empty() && known.active == 0 {
                self.users.remove(user);
            }
        }
        if self.hosts.get(host).is_some_and(|there| there.users.is_empty() && there.active == 0) {
            self.hosts.remove(host);
        }
    }

    fn relist_host(&mut self, host: &Arc<str>) {
        let users = self.hosts.get(host).map(|there| there.users.clone());
        for user in users.unwrap_or_default() {
            let lanes = self.users.get(&user).and_then(|known| known.lanes.get(host));
            let models: Vec<_> = lanes.into_iter().flat_map(HashMap::keys).cloned().collect();
            for model in models {
                self.relist_lane(&user, host, &model);
            }
        }
    }

    fn relist_lane(&mut self, user: &Arc<str>, host: &Arc<str>, model: &Arc<str>) {
        let active = self.hosts.get(host).map_or(0, |there| there.active);
        let is_open = active < self.limits.per_host;
        let Some(known) = self.users.get_mut(user) else { return };
        let lanes = known.lanes.get_mut(host);
        let Some(lane) = lanes.and_then(|lanes| lanes.get_mut(model)) else { return };
        let first = lane.jobs.first().copied().filter(|_| is_open);
        relist(&mut known.firsts, model, std::mem::replace(&mut lane.listed, first), first);
        self.relist_user_for(user, model);
    }

    fn relist_user(&mut self, user: &Arc<str>) {
        let Some(known) = self.users.get(user) else { return };
        let models = known.firsts.models().chain(known.listed.keys());
        for model in models.cloned().collect::<Vec<_>>() {
            self.relist_user_for(user, &model);
        }
    }

    fn relist_user_for(&mut self, user: &Arc<str>, model: &Arc<str>) {
        let Some(known) = self.users.get_mut(user) else { return };
        let has_room = known.active < self.limits.per_user;
        let first = known.firsts.first_of(model).filter(|_| has_room);
        let listed = match first {
            Some(first) => known.listed.insert(Arc::clone(model), first),
            None => known.listed.remove(model),
        };
        relist(&mut self.firsts, model, listed, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(user: &str, host: &str) -> Origin {
        Origin { user: user.into(), host: Some(host.into()), model: "".into() }
    }

    fn first(downloads: &Downloads) -> Option<Place> {
        downloads.first(&|_| true)
    }

    #[test]
    fn the_first_whose_host_and_user_have_room_starts() {
        let mut downloads = Downloads::default();
        downloads.limit(Limits { per_host: 1, per_user: 2 });
        let (ax, ay, az, bx) =
            (origin("a", "x"), origin("a", "y"), origin("a", "z"), origin("b", "x"));
        for (rank, origin) in [(1, &ax), (2, &ax), (3, &ay), (4, &bx), (5, &az)] {
            downloads.insert((rank, 0), origin);
        }
        let start = |downloads: &mut Downloads, rank, origin: &Origin| {
            assert_eq!(first(downloads), Some((rank, 0)));
            downloads.remove((rank, 0), origin);
            downloads.start(origin);
        };
        start(&mut downloads, 1, &ax);
        // Host x is taken, for b too.
        start(&mut downloads, 3, &ay);
        // Now user a has two.
        assert_eq!(first(&downloads), None);
        downloads.end(&ax);
        // The older job of a is first in host x, and a has room.
        start(&mut downloads, 2, &ax);
        downloads.end(&ay);
        start(&mut downloads, 5, &az);
        downloads.end(&ax);
        start(&mut downloads, 4, &bx);
        for origin in [&bx, &az] {
            downloads.end(origin);
        }
        assert!(downloads.users.is_empty() && downloads.hosts.is_empty());
        assert!(downloads.firsts.is_empty());
    }

    #[test]
    fn other_limits_count_at_once() {
        let mut downloads = Downloads::default();
        let job = origin("a", "x");
        downloads.limit(Limits { per_host: 1, per_user: 9 });
        downloads.start(&job);
        downloads.insert((1, 0), &job);
        assert_eq!(first(&downloads), None);
        downloads.limit(Limits { per_host: 2, per_user: 9 });
        assert_eq!(first(&downloads), Some((1, 0)));
        downloads.limit(Limits { per_host: 2, per_user: 1 });
        assert_eq!(first(&downloads), None);
        downloads.limit(Limits { per_host: 2, per_user: 2 });
        downloads.remove((1, 0), &job);
        assert_eq!(first(&downloads), None);
    }

    /// Against a plain search through all jobs, at random.
    #[test]
    fn it_agrees_with_a_plain_search() {
        let mut state = 7_u32;
        let mut random = |n: usize| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as usize % n
        };
        let names = ["a", "b", "c"];
        let mut closed = names[0];
        let mut downloads = Downloads::default();
        let (mut waiting, mut active) = (Vec::<(Place, Origin)>::new(), Vec::<Origin>::new());
        for step in 0..20_000 {
            let limits = Limits { per_host: 2, per_user: 3 };
            downloads.limit(limits);
            if random(10) == 0 {
                closed = names[random(3)];
            }
            let is_open = |model: &str| model != closed;
            match random(4) {
                0 | 1 => {
                    let [user, host, model] = [0, 1, 2].map(|_| names[random(3)]);
                    let place = (i64::try_from(random(50)).unwrap(), step);
                    let origin = Origin { model: model.into(), ..origin(user, host) };
                    downloads.insert(place, &origin);
                    waiting.push((place, origin));
                }
                2 => {
                    if let Some(place) = downloads.first(&is_open) {
                        let index = waiting.iter().position(|(p, _)| *p == place).unwrap();
                        let (_, origin) = waiting.swap_remove(index);
                        downloads.remove(place, &origin);
                        downloads.start(&origin);
                        active.push(origin);
                    }
                }
                _ if !active.is_empty() => {
                    let origin = active.swap_remove(random(active.len()));
                    downloads.end(&origin);
                }
                _ => {}
            }
            let count =
                |is_it: &dyn Fn(&Origin) -> bool| active.iter().filter(|o| is_it(o)).count();
            let may_start = |origin: &Origin| {
                is_open(&origin.model)
                    && count(&|other| other.host == origin.host) < limits.per_host
                    && count(&|other| other.user == origin.user) < limits.per_user
            };
            let expected =
                waiting.iter().filter(|(_, o)| may_start(o)).map(|(place, _)| *place).min();
            assert_eq!(downloads.first(&is_open), expected, "step {step}");
        }
    }
}
