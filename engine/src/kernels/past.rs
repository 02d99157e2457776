//! What the rows of one job have seen, as lists of slots: where keys and values are is up to whoever
//! gives the slots.

/// Rows share their past: a search may drop, keep and double rows without moving any key.
#[derive(Debug, Default)]
pub(crate) struct Past {
    rows: Vec<Vec<u32>>,
}

impl Past {
    /// Gives each of `rows` rows a slot for the coming step.
    pub(crate) fn advance(&mut self, rows: usize, mut slot: impl FnMut() -> u32) {
        self.rows.resize_with(rows, Vec::new);
        for row in &mut self.rows {
            row.push(slot());
        }
    }

    /// Row `i` goes on from what row `parents[i]` has seen; the slots that no row needs any more.
    pub(crate) fn select(&mut self, parents: &[usize]) -> Vec<u32> {
        let selected = parents.iter().map(|parent| self.rows[*parent].clone()).collect();
        let before = std::mem::replace(&mut self.rows, selected);
        let mut free = Vec::new();
        for (i, row) in before.iter().enumerate() {
            if parents.contains(&i) {
                continue;
            }
            // Rows that have parted never meet again. What dropped rows share goes with the last.
            let others = self.rows.iter().chain(&before[i + 1..]);
            let shared = others.map(|other| in_common(row, other)).max().unwrap_or_default();
            free.extend(&row[shared..]);
        }
        free
    }

    /// Of each row, the slots of all that it has seen, the oldest first.
    pub(crate) fn rows(&self) -> &[Vec<u32>] {
        &self.rows
    }
}

/// How many of their first slots two rows share.
fn in_common(row: &[u32], other: &[u32]) -> usize {
    row.iter().zip(other).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_slot_is_free_when_the_last_row_that_has_it_is_dropped() {
        let (mut past, mut free, mut given) = (Past::default(), Vec::new(), 0);
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..300 {
            past.advance(5, || {
                free.pop().unwrap_or_else(|| {
                    given += 1;
                    given - 1
                })
            });
            let parents: Vec<usize> = (0..5).map(|_| random.usize(..5)).collect();
            free.extend(past.select(&parents));
            let used: BTreeSet<u32> = past.rows().iter().flatten().copied().collect();
            let unused: BTreeSet<u32> = free.iter().copied().collect();
            assert_eq!(unused.len(), free.len(), "a slot is free twice");
            assert!(used.is_disjoint(&unused), "a slot is free that a row needs");
            assert_eq!(used.len() + unused.len(), given as usize, "a slot is lost");
        }
        // Rows that part again and again have nearly all of their past in common.
        assert!(given < 400, "{given} slots for 300 steps of 5 rows");
    }
}
