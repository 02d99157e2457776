//! Which of the listed pictures are meant: so many, a sample, those that lack something.

use std::{collections::BinaryHeap, path::Path};

use anyhow::ensure;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::source::{Item, List, Place, first};

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SelectArgs {
    /// Only the first N pictures
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Only N pictures, chosen at random; the same ones each time, as long as the sources are
    #[arg(long, value_name = "N", conflicts_with = "limit")]
    sample: Option<usize>,
    /// Another sample
    #[arg(long, value_name = "N", default_value_t = 0, requires = "sample")]
    seed: u64,
    /// Only pictures that have no file of this ending beside them, such as .txt
    #[arg(long, value_name = "ENDING")]
    where_missing: Option<String>,
}

impl SelectArgs {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let ending = self.where_missing.as_deref().map(plain);
        let is_ending = ending.is_none_or(|it| !it.is_empty() && !it.contains('/'));
        ensure!(is_ending, "--where-missing takes the ending of a name, such as .txt");
        Ok(())
    }

    /// The pictures that are meant. What cannot be listed stays, to be told of.
    pub(super) fn of<'a>(&'a self, list: List<'a>) -> List<'a> {
        let list: List<'a> = match self.where_missing.as_deref().map(plain) {
            Some(ending) => {
                Box::new(list.filter(move |it| !it.as_ref().is_ok_and(|it| has(it, ending))))
            }
            None => list,
        };
        match (self.limit, self.sample) {
            (Some(limit), _) => first(list, limit),
            (None, Some(count)) => sample(list, count, self.seed),
            (None, None) => list,
        }
    }
}

fn plain(ending: &str) -> &str {
    ending.trim_start_matches('.')
}

/// Whether a file lies beside a picture; beside what is no file there is none.
fn has(item: &Item, ending: &str) -> bool {
    matches!(&item.place, Place::File(path) if beside(path, ending))
}

/// Also under the name that formats take where two pictures differ in their ending alone.
fn beside(path: &Path, ending: &str) -> bool {
    let whole = path.extension().unwrap_or_default().to_string_lossy();
    path.with_extension(ending).exists()
        || path.with_extension(format!("{whole}.{ending}")).exists()
}

/// Those whose names have the smallest hashes, in the order of the list.
fn sample(list: List<'_>, count: usize, seed: u64) -> List<'_> {
    struct Chosen {
        hash: u64,
        index: usize,
        item: Item,
    }
    impl Ord for Chosen {
        fn cmp(&self, other: &Self) -> std::cmp::Ordering {
            (self.hash, self.index).cmp(&(other.hash, other.index))
        }
    }
    impl PartialOrd for Chosen {
        fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
            Some(self.cmp(other))
        }
    }
    impl PartialEq for Chosen {
        fn eq(&self, other: &Self) -> bool {
            self.cmp(other).is_eq()
        }
    }
    impl Eq for Chosen {}

    let (mut chosen, mut unlisted) = (BinaryHeap::new(), Vec::new());
    for (index, listed) in list.enumerate() {
        match listed {
            Ok(item) => {
                let hash = xxh3_64_with_seed(item.name.as_bytes(), seed);
                chosen.push(Chosen { hash, index, item });
                if chosen.len() > count {
                    chosen.pop();
                }
            }
            Err(error) => unlisted.push(Err(error)),
        }
    }
    let mut chosen = chosen.into_vec();
    chosen.sort_by_key(|it| it.index);
    Box::new(unlisted.into_iter().chain(chosen.into_iter().map(|it| Ok(it.item))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(count: usize) -> List<'static> {
        Box::new((0..count).map(|i| {
            let name = format!("{i:03}.png");
            Ok(Item { place: Place::File(name.clone().into()), name })
        }))
    }

    fn names(args: &SelectArgs, count: usize) -> Vec<String> {
        args.of(list(count)).map(|it| it.unwrap().name).collect()
    }

    #[test]
    fn a_sample_is_the_same_each_time_and_another_with_another_seed() {
        let args = |seed| SelectArgs { limit: None, sample: Some(10), seed, where_missing: None };
        let first = names(&args(0), 200);
        assert_eq!((first.len(), first.is_sorted()), (10, true));
        assert_eq!(first, names(&args(0), 200));
        assert_ne!(first, names(&args(1), 200));
        assert_eq!(names(&args(0), 5).len(), 5);
    }

    #[test]
    fn pictures_that_have_a_file_beside_them_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.png", "a.txt", "b.png", "c.png", "c.png.txt"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let items = ["a", "b", "c"].map(|name| {
            let path = directory.path().join(name).with_extension("png");
            Ok(Item { name: name.to_owned(), place: Place::File(path) })
        });
        let where_missing = Some(".txt".to_owned());
        let args = SelectArgs { limit: Some(5), sample: None, seed: 0, where_missing };
        let found: Vec<_> =
            args.of(Box::new(items.into_iter())).map(|it| it.unwrap().name).collect();
        assert_eq!(found, ["b"]);
        let odd = SelectArgs { where_missing: Some(".".to_owned()), ..args };
        assert!(odd.check().is_err());
    }
}
