//! What the decoder has seen, on the device: slots that rows of all jobs share.

use std::sync::{Arc, Weak};

use candle_core::{DType, Result, Tensor};

use super::{Inner, OnDevice};
use crate::{
    kernels::Past,
    model::{backend::History, launch::address},
};

/// Keys and values of what all jobs' rows have seen, by slots: a search that drops, keeps and doubles
/// rows moves none of them.
#[derive(Default)]
pub(super) struct Pool {
    layers: Vec<Arena>,
    /// Slots that every arena has room for once it is used, and those that nobody holds.
    capacity: u32,
    free: Vec<u32>,
    pub(super) step: Option<Step>,
}

/// `[slots, D]` each.
#[derive(Clone)]
pub(super) struct Arena {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
}

impl Arena {
    fn slots(&self) -> Result<usize> {
        self.k.dim(0)
    }
}

pub(super) struct Step {
    /// Of each row, where its new token goes.
    pub(super) slots: Tensor,
    /// Of each row, the address of a list of slots, and how many these are.
    pub(super) seen: Tensor,
    pub(super) counts: Tensor,
    /// What the addresses point to.
    _all: Tensor,
}

/// Slots of the first arenas.
const FEW_SLOTS: u32 = 4096;

impl Pool {
    fn take(&mut self) -> u32 {
        if self.free.is_empty() {
            let more = self.capacity.max(FEW_SLOTS);
            self.free.extend((self.capacity..self.capacity + more).rev());
            self.capacity += more;
        }
        self.free.pop().unwrap_or_default()
    }

    fn give_back(&mut self, slots: Vec<u32>) {
        // Some may have been taken for arenas that could not grow.
        self.free.extend(slots.into_iter().filter(|slot| *slot < self.capacity));
    }

    /// A layer's arena, with room for all slots that have been given out.
    pub(super) fn arena(
        &mut self,
        on: &OnDevice,
        layer: usize,
        (d, kind): (usize, DType),
    ) -> Result<Arena> {
        let (there, wanted) = (self.layers.get(layer), self.capacity as usize);
        let slots = there.map_or(Ok(0), Arena::slots)?;
        if let Some(arena) = there.filter(|_| slots >= wanted) {
            return Ok(arena.clone());
        }
        // A device has no memory of no bytes: nothing here may be empty.
        let new = || Tensor::zeros((wanted - slots, d), kind, on.device());
        let longer = |x: Option<&Tensor>| match x {
            Some(x) => Tensor::cat(&[x, &new()?], 0),
            None => new(),
        };
        let grown = || {
            let (k, v) = (there.map(|it| &it.k), there.map(|it| &it.v));
            Ok(Arena { k: longer(k)?, v: longer(v)? })
        };
        let grown = grown();
        match &grown {
            Ok(arena) => {
                let place = layer..(layer + 1).min(self.layers.len());
                self.layers.splice(place, [arena.clone()]);
            }
            // Later jobs may need less.
            Err(_) => self.shrink_to(slots),
        }
        grown
    }

    fn shrink_to(&mut self, slots: usize) {
        self.capacity = self.capacity.min(u32::try_from(slots).unwrap_or(u32::MAX));
        self.free.retain(|slot| *slot < self.capacity);
    }
}

/// What a job's rows have seen: slots of the pool, which go back there with the job.
#[derive(Default)]
pub(crate) struct Seen {
    past: Past,
    /// Rows of the coming step.
    rows: usize,
    on: Weak<Inner>,
}

impl Seen {
    /// Gives each row a slot for its new token.
    pub(super) fn take_slots(&mut self, on: &OnDevice, pool: &mut Pool) {
        self.on = Arc::downgrade(&on.0);
        self.past.advance(self.rows, || pool.take());
    }

    fn give_back(&self, slots: Vec<u32>) {
        if let Some(on) = self.on.upgrade() {
            on.pool.lock().give_back(slots);
        }
    }
}

impl History for Seen {
    fn advance(&mut self, rows: usize) {
        self.rows = rows;
    }

    fn select(&mut self, parents: &[usize]) -> Result<()> {
        let free = self.past.select(parents);
        self.give_back(free);
        Ok(())
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        let all = self.past.select(&[]);
        self.give_back(all);
    }
}

impl OnDevice {
    /// What all layers of a step need to know of its rows.
    pub(super) fn step(&self, jobs: &[&mut Seen]) -> Result<Step> {
        let rows = || jobs.iter().flat_map(|job| job.past.rows());
        let slots: Vec<u32> = rows().filter_map(|row| row.last()).copied().collect();
        let counts: Vec<usize> = rows().map(Vec::len).collect();
        let all = self.whole(&rows().flatten().copied().collect::<Vec<_>>())?;
        let start = address(&all)?;
        let mut first = 0;
        let lists = counts.iter().map(|count| {
            let list = start + first * size_of::<u32>() as u64;
            first += *count as u64;
            list
        });
        let seen = self.addresses(&lists.collect::<Vec<_>>())?;
        Ok(Step { slots: self.whole(&slots)?, counts: self.ints(&counts)?, seen, _all: all })
    }
}
