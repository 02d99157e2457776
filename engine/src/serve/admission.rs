//! When another picture is taken in. Pure.
//!
//! Encoding a picture takes as long as many decoder steps, so jobs never wait for all others to
//! join: after each picture that is encoded, decoder steps have a share of the time.

use std::time::Duration;

/// For every so many seconds of encoding, one of decoder steps goes before the next picture.
const ENCODE_TO_DECODE: u32 = 8;

/// What encoding owes to decoding.
#[derive(Debug, Default)]
pub(super) struct Admission {
    owed: Duration,
}

impl Admission {
    /// Whether another request may be taken in, with so many in the batch.
    pub(super) fn admits(&self, running: usize, most: usize) -> bool {
        running == 0 || (self.owed.is_zero() && running < most)
    }

    /// A request was taken in.
    pub(super) fn encoded(&mut self, time: Duration) {
        self.owed = time / ENCODE_TO_DECODE;
    }

    /// A decoder step was made.
    pub(super) fn stepped(&mut self, time: Duration) {
        self.owed = self.owed.saturating_sub(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoder_steps_have_their_share_before_the_next_picture() {
        let mut admission = Admission::default();
        assert!(admission.admits(0, 4) && admission.admits(3, 4) && !admission.admits(4, 4));
        admission.encoded(Duration::from_millis(800));
        assert!(!admission.admits(1, 4));
        // An empty batch has nobody to owe to.
        assert!(admission.admits(0, 4));
        admission.stepped(Duration::from_millis(60));
        assert!(!admission.admits(1, 4));
        admission.stepped(Duration::from_millis(60));
        assert!(admission.admits(1, 4));
    }
}
