//! Waiting jobs by the model that they ask for.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::Place;

#[derive(Debug, Default)]
pub(super) struct Places(HashMap<Arc<str>, BTreeSet<Place>>);

impl Places {
    pub(super) fn insert(&mut self, model: &Arc<str>, place: Place) {
        self.0.entry(Arc::clone(model)).or_default().insert(place);
    }

    pub(super) fn remove(&mut self, model: &Arc<str>, place: Place) {
        if let Some(places) = self.0.get_mut(model) {
            places.remove(&place);
            if places.is_empty() {
                self.0.remove(model);
            }
        }
    }

    /// The first of a model.
    pub(super) fn first_of(&self, model: &str) -> Option<Place> {
        self.0.get(model)?.first().copied()
    }

    /// The first of all models that are open.
    pub(super) fn first(&self, is_open: &dyn Fn(&str) -> bool) -> Option<Place> {
        let open = self.0.iter().filter(|(model, _)| is_open(model));
        open.filter_map(|(_, places)| places.first().copied()).min()
    }

    pub(super) fn models(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.keys()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
