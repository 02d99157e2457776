//! What of a list was looked at and left for others: found again with a few looks at its ends,
//! whatever the list's length. Pure.

use std::collections::VecDeque;

/// So many messages may come to the right end between two looks; with more, all is looked at anew.
const MOST_NEW: usize = 32;
/// So many of those that are known at the right end are compared each time.
const CHECKED: usize = 8;
/// So many may be taken from there meanwhile.
const NEAR: usize = 1024;

/// Digests of the messages that were left, from the right end on.
#[derive(Debug, Default)]
pub(super) struct Passed(VecDeque<u64>);

impl Passed {
    /// Follows what others have done to the list, of which `from` reads the digests from a place on,
    /// counted from the right end. Workers take from that end, and give back there what they could
    /// not do.
    ///
    /// Gives how many messages have come to the right end since, of which nobody knows yet.
    pub(super) fn follow<I: Iterator<Item = u64>>(&mut self, from: impl Fn(usize) -> I) -> usize {
        let new = self.new_at_the_end(from(0)).unwrap_or_default();
        // Whoever takes from the middle moves what lies behind.
        let known = self.0.back().copied();
        let near = self.0.len().min(CHECKED);
        let are_there = from(new).take(near).eq(self.0.iter().take(near).copied());
        if are_there && known.is_some() && from(new + self.0.len() - 1).next() == known {
            return new;
        }
        self.0.clear();
        0
    }

    /// Finds the right end of what is known, and drops what others have taken from there.
    fn new_at_the_end(&mut self, end: impl Iterator<Item = u64>) -> Option<usize> {
        if self.0.is_empty() {
            return None;
        }
        for (new, digest) in end.take(MOST_NEW + 1).enumerate() {
            let near = if new == 0 { self.0.len() } else { NEAR };
            if let Some(taken) = self.0.iter().take(near).position(|known| *known == digest) {
                self.0.drain(..taken);
                return Some(new);
            }
        }
        None
    }

    /// Where to look: behind what was left, or before it if there are new ones.
    pub(super) fn start(&self, new: usize) -> usize {
        if new > 0 { 0 } else { self.0.len() }
    }

    /// A message at this place, behind or before all others, was left where it is.
    pub(super) fn add(&mut self, place: usize, digest: u64) {
        self.0.insert(place.min(self.0.len()), digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of `list` that was not looked at is left; tells what that was. The right end comes first.
    fn look(passed: &mut Passed, list: &[u64]) -> Vec<u64> {
        let new = passed.follow(|place| list.iter().skip(place).copied());
        let start = passed.start(new);
        let most = if new > 0 { new } else { list.len() };
        let seen: Vec<u64> = list.iter().skip(start).take(most).copied().collect();
        for (i, digest) in seen.iter().enumerate() {
            passed.add(start + i, *digest);
        }
        seen
    }

    #[test]
    fn nothing_is_looked_at_twice_nor_forgotten_whatever_others_do_at_the_ends() {
        let mut passed = Passed::default();
        assert_eq!(look(&mut passed, &[1, 2, 3]), [1, 2, 3]);
        assert!(look(&mut passed, &[1, 2, 3]).is_empty());
        // New ones come to the left end, and others take from the right.
        assert_eq!(look(&mut passed, &[2, 3, 4, 5]), [4, 5]);
        // A worker gives back what it took, and another one takes the next.
        assert_eq!(look(&mut passed, &[9, 3, 4, 5, 6]), [9]);
        assert_eq!(look(&mut passed, &[9, 3, 4, 5, 6]), [6]);
        assert!(look(&mut passed, &[9, 3, 4, 5, 6]).is_empty());
        // All of it is taken.
        assert_eq!(look(&mut passed, &[7, 8]), [7, 8]);
        assert!(look(&mut passed, &[]).is_empty());
        assert_eq!(look(&mut passed, &[7, 8]), [7, 8]);
    }

    #[test]
    fn whoever_takes_from_the_middle_hides_no_message() {
        let mut passed = Passed::default();
        assert_eq!(look(&mut passed, &[1, 2, 3, 4]), [1, 2, 3, 4]);
        assert_eq!(look(&mut passed, &[1, 3, 4, 5]), [1, 3, 4, 5]);
        // Some are taken, and what was one of them comes back behind another one.
        assert_eq!(look(&mut passed, &[3, 9, 5]), [3, 9, 5]);
    }

    #[test]
    fn a_message_that_is_there_twice_hides_none() {
        let mut passed = Passed::default();
        assert_eq!(look(&mut passed, &[1, 2, 1, 2]), [1, 2, 1, 2]);
        assert_eq!(look(&mut passed, &[2, 1, 2, 3]), [3]);
        // The copy of one that lies deep is given back: it is known, what follows is looked at anew.
        assert_eq!(look(&mut passed, &[3, 2, 1, 2, 3]), [2, 1, 2, 3]);
    }

    #[test]
    fn more_new_ones_than_are_looked_for_are_found_by_looking_at_all() {
        let mut passed = Passed::default();
        let list: Vec<u64> = (0..10).collect();
        assert_eq!(look(&mut passed, &list), list);
        let more: Vec<u64> = (100..=100 + MOST_NEW as u64).chain(list).collect();
        assert_eq!(look(&mut passed, &more), more);
    }
}
