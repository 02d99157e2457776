//! What of a list was looked at and left for others: found again with a few looks at its ends,
//! whatever the list's length. Pure.

use std::collections::VecDeque;

/// So many messages may come to the right end between two looks; with more, all is looked at anew.
const MOST_NEW: usize = 32;
/// So many of those that are known at the right end are compared each time, as long as they are small:
/// to look at a message is to copy it.
const CHECKED: usize = 8;
const CHECKED_BYTES: usize = 1 << 16;
/// So many may be taken from there meanwhile.
const NEAR: usize = 1024;

/// A message: its digest and how many bytes it has.
pub(super) type Print = (u64, usize);

/// Digests of the messages that were left, from the right end on.
#[derive(Debug, Default)]
pub(super) struct Passed(VecDeque<u64>);

impl Passed {
    /// Follows what others have done to the list, of which `from` reads the messages from a place on,
    /// counted from the right end. Workers take from that end, and give back there what they could
    /// not do.
    ///
    /// Gives how many messages have come to the right end since, of which nobody knows yet.
    pub(super) fn follow<I: Iterator<Item = Print>>(&mut self, from: impl Fn(usize) -> I) -> usize {
        if let Some((new, bytes)) = self.new_at_the_end(from(0))
            && self.are_near(bytes, from(new + 1))
            && self.is_last(|place| from(new + place).next())
        {
            return new;
        }
        self.0.clear();
        0
    }

    /// Whether those behind the first, of so many bytes, are where they were.
    fn are_near(&self, first: usize, mut behind: impl Iterator<Item = Print>) -> bool {
        let mut read = first;
        for known in self.0.iter().take(CHECKED).skip(1) {
            if read > CHECKED_BYTES {
                break;
            }
            match behind.next() {
                Some((digest, bytes)) if digest == *known => read += bytes,
                _ => return false,
            }
        }
        true
    }

    /// Whether the last is where it was: whoever takes from the middle moves it.
    fn is_last(&self, at: impl Fn(usize) -> Option<Print>) -> bool {
        let place = self.0.len() - 1;
        place == 0 || at(place).map(|(digest, _)| digest) == self.0.back().copied()
    }

    /// Finds the right end of what is known, and drops what others have taken from there. Gives how
    /// many are new, and the bytes of the first that is known.
    fn new_at_the_end(&mut self, end: impl Iterator<Item = Print>) -> Option<(usize, usize)> {
        if self.0.is_empty() {
            return None;
        }
        for (new, (digest, bytes)) in end.take(MOST_NEW + 1).enumerate() {
            let near = if new == 0 { self.0.len() } else { NEAR };
            if let Some(taken) = self.0.iter().take(near).position(|known| *known == digest) {
                self.0.drain(..taken);
                return Some((new, bytes));
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
        let new = passed.follow(|place| list.iter().skip(place).map(|it| (*it, 1)));
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
    fn large_ones_are_hardly_looked_at() {
        let (mut passed, list) = (Passed::default(), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        look(&mut passed, &list);
        let looks = std::cell::Cell::new(0);
        let large = |at: &u64| {
            looks.set(looks.get() + 1);
            (*at, 1 << 22)
        };
        assert_eq!(passed.follow(|place| list.iter().skip(place).map(large)), 0);
        // The first and the last.
        assert_eq!((looks.get(), passed.start(0)), (2, list.len()));
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
