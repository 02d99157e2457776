//! What the decoder has seen, on the device: slots that rows of all jobs share.

use std::sync::{Arc, Weak};

use candle_core::{DType, Result, Tensor};

use super::{Inner, OnDevice};
use crate::model::{backend::History, launch::address};

/// Keys and values of what all jobs' rows have seen, by slots: a search that drops, keeps and doubles
/// rows moves none of them.
#[derive(Default)]
pub(super) struct Pool {
    layers: Vec<Arena>,
    /// Slots that an arena has room for, and those that nobody holds.
    capacity: usize,
    free: Vec<usize>,
    pub(super) step: Option<Step>,
}

/// `[slots, D]` each.
#[derive(Clone)]
pub(super) struct Arena {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
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
const FEW_SLOTS: usize = 4096;

impl Pool {
    fn take(&mut self) -> usize {
        if self.free.is_empty() {
            let more = self.capacity.max(FEW_SLOTS);
            self.free.extend((self.capacity..self.capacity + more).rev());
            self.capacity += more;
        }
        self.free.pop().unwrap_or_default()
    }

    /// A layer's arena, with room for all slots that have been given out.
    pub(super) fn arena(
        &mut self,
        on: &OnDevice,
        layer: usize,
        (d, kind): (usize, DType),
    ) -> Result<Arena> {
        // A device has no memory of no bytes: nothing here may be empty.
        let new = |slots: usize| Tensor::zeros((slots, d), kind, on.device());
        let grown = match self.layers.get(layer) {
            Some(arena) if arena.k.dim(0)? == self.capacity => return Ok(arena.clone()),
            Some(Arena { k, v }) => {
                let missing = self.capacity - k.dim(0)?;
                let more = |x: &Tensor| Tensor::cat(&[x, &new(missing)?], 0);
                Arena { k: more(k)?, v: more(v)? }
            }
            None => Arena { k: new(self.capacity)?, v: new(self.capacity)? },
        };
        self.layers.splice(layer..(layer + 1).min(self.layers.len()), [grown.clone()]);
        Ok(grown)
    }
}

/// What a job's rows have seen: slots of the pool, which go back there with the job.
#[derive(Default)]
pub(crate) struct Seen {
    rows: Vec<Vec<usize>>,
    /// All that the job holds, whether a row still has them or not.
    held: Vec<usize>,
    on: Weak<Inner>,
}

impl Seen {
    /// Gives each row a slot for its new token.
    pub(super) fn take_slots(&mut self, on: &OnDevice, pool: &mut Pool) {
        self.on = Arc::downgrade(&on.0);
        for row in &mut self.rows {
            let slot = pool.take();
            row.push(slot);
            self.held.push(slot);
        }
    }
}

impl History for Seen {
    fn advance(&mut self, rows: usize) {
        self.rows.resize_with(rows, Vec::new);
    }

    fn select(&mut self, parents: &[usize]) -> Result<()> {
        self.rows = parents.iter().map(|parent| self.rows[*parent].clone()).collect();
        Ok(())
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        if let Some(on) = self.on.upgrade() {
            on.pool.lock().free.append(&mut self.held);
        }
    }
}

impl OnDevice {
    /// What all layers of a step need to know of its rows.
    pub(super) fn step(&self, jobs: &[&mut Seen]) -> Result<Step> {
        let rows = || jobs.iter().flat_map(|job| &job.rows);
        let slots: Vec<usize> = rows().filter_map(|row| row.last()).copied().collect();
        let counts: Vec<usize> = rows().map(Vec::len).collect();
        let all = self.ints(&rows().flatten().copied().collect::<Vec<_>>())?;
        let start = address(&all)?;
        let mut first = 0;
        let lists = counts.iter().map(|count| {
            let list = start + first * size_of::<u32>() as u64;
            first += *count as u64;
            list
        });
        let seen = self.addresses(&lists.collect::<Vec<_>>())?;
        Ok(Step { slots: self.ints(&slots)?, counts: self.ints(&counts)?, seen, _all: all })
    }
}
