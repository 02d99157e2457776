//! What the loop drives: a model, or a fake with a clock of its own in the loop's tests.

use std::time::Instant;

use crate::{
    Answer, Batch, Error, Florence, GenerateOptions, Picture, Question, Visual, catch_panic,
};

/// A request in the batch.
pub(super) type RequestId = u64;

pub(super) trait Machine {
    fn now(&self) -> Instant;

    /// Pictures that are best encoded together.
    fn pictures_at_once(&self) -> usize;

    /// Runs the vision tower.
    fn visuals(&mut self, pictures: &[&Picture]) -> Result<Vec<Visual>, Error>;

    /// Bytes that the keys and values of a request take at most.
    fn kv_cache_bytes(&self, question: &Question, options: &GenerateOptions) -> u64;

    /// Encodes a request and takes it into the batch.
    fn join(
        &mut self,
        id: RequestId,
        question: &Question,
        visual: &Visual,
        options: &GenerateOptions,
    ) -> Result<(), Error>;

    /// One token for every request; the answers that are complete now.
    fn step(&mut self) -> Result<Vec<(RequestId, Answer)>, Error>;

    /// Tells more of the texts of requests that are `wanted`, as far as no later step changes it.
    fn tell(&mut self, wanted: &dyn Fn(RequestId) -> bool, tell: &mut dyn FnMut(RequestId, &str));

    /// Drops the requests that `keep` refuses.
    fn retain(&mut self, keep: &dyn Fn(RequestId) -> bool);

    /// Whether it still works, after a failure.
    fn check(&mut self) -> Result<(), Error>;

    /// Drops all requests, in whatever state a failure has left them.
    fn clear(&mut self);
}

/// A model and its batch.
pub(super) struct Decoder<'a> {
    pub(super) florence: &'a Florence,
    pub(super) batch: Batch<'a, RequestId>,
}

impl Machine for Decoder<'_> {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn pictures_at_once(&self) -> usize {
        self.florence.pictures_at_once()
    }

    fn visuals(&mut self, pictures: &[&Picture]) -> Result<Vec<Visual>, Error> {
        self.florence.visuals(pictures)
    }

    fn kv_cache_bytes(&self, question: &Question, options: &GenerateOptions) -> u64 {
        self.florence.kv_cache_bytes(question, options)
    }

    fn join(
        &mut self,
        id: RequestId,
        question: &Question,
        visual: &Visual,
        options: &GenerateOptions,
    ) -> Result<(), Error> {
        self.batch.join(id, question, visual, options)
    }

    fn step(&mut self) -> Result<Vec<(RequestId, Answer)>, Error> {
        self.batch.step()
    }

    fn tell(&mut self, wanted: &dyn Fn(RequestId) -> bool, tell: &mut dyn FnMut(RequestId, &str)) {
        self.batch.tell(|id| wanted(*id), |id, text| tell(*id, text));
    }

    fn retain(&mut self, keep: &dyn Fn(RequestId) -> bool) {
        self.batch.retain(|id| keep(*id));
    }

    fn check(&mut self) -> Result<(), Error> {
        self.florence.check()
    }

    fn clear(&mut self) {
        let failed = std::mem::replace(&mut self.batch, Batch::new(self.florence));
        // It may be in no state to be dropped either.
        let _ = catch_panic(|| drop(failed));
    }
}
