//! A sequence under construction, and the scores of its tokens.

#[derive(Debug, Clone)]
pub(super) struct Path {
    pub(super) ids: Vec<u32>,
    pub(super) scores: Vec<f32>,
}

impl Path {
    pub(super) fn new(start: u32) -> Self {
        Self { ids: vec![start], scores: Vec::new() }
    }

    pub(super) fn extended(&self, token: u32, score: f32) -> Self {
        let mut next = self.clone();
        next.push(token, score);
        next
    }

    pub(super) fn push(&mut self, token: u32, score: f32) {
        self.ids.push(token);
        self.scores.push(score);
    }
}
