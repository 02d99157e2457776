//! What is in a bucket below a prefix: asked for a page at a time.

use std::{collections::VecDeque, iter::from_fn};

use florence_engine::{
    Stop,
    fetch::{FetchLimits, Fetcher},
};

use super::{Item, List, Place, Unlisted, is_picture, patiently};

pub(super) fn objects<'a>(fetcher: &'a Fetcher, prefix: &'a str) -> List<'a> {
    let (mut page, mut next, mut is_over) = (VecDeque::new(), None, false);
    let list = from_fn(move || {
        loop {
            if let Some(address) = page.pop_front() {
                return Some(Ok(address));
            }
            if is_over {
                return None;
            }
            let (stop, limits) = (Stop::default(), FetchLimits::default());
            let list = || fetcher.list(prefix, next.as_deref(), &limits, &stop);
            match patiently(&stop, list) {
                Ok(listing) => {
                    page.extend(listing.addresses);
                    next = listing.next;
                    is_over = next.is_none();
                }
                Err(error) => {
                    is_over = true;
                    let reason = format!("cannot list it: {error}");
                    return Some(Err(Unlisted::new(&prefix, &reason)));
                }
            }
        }
    });
    // What was asked for itself is wanted, whatever its name.
    let is_wanted = move |address: &String| is_picture(address) || address == prefix;
    Box::new(list.filter_map(move |listed| {
        match listed {
            Ok(address) => is_wanted(&address)
                .then(|| Ok(Item { name: address.clone(), place: Place::Address(address) })),
            Err(error) => Some(Err(error)),
        }
    }))
}
