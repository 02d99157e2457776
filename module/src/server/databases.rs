//! Databases by their content.
//!
//! SWAPDB changes the numbers by which clients reach two contents. What we know of keys belongs to
//! the content, so a swap only changes which number leads to which.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use redis_module::{Context, raw};

use super::OK;

/// A database's content, which keeps this name whatever number leads to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Db(pub(crate) i32);

/// Which content each number leads to; numbers beyond the end lead to the content of their own.
struct Numbers(Vec<i32>);

static NUMBERS: Mutex<Numbers> = Mutex::new(Numbers(Vec::new()));

impl Numbers {
    fn db(&self, number: i32) -> Db {
        let known = usize::try_from(number).ok().and_then(|number| self.0.get(number));
        Db(known.copied().unwrap_or(number))
    }

    fn number(&self, db: Db) -> i32 {
        let known = self.0.iter().position(|known| *known == db.0);
        known.and_then(|number| i32::try_from(number).ok()).unwrap_or(db.0)
    }

    fn swap(&mut self, first: i32, second: i32) {
        let (Ok(first), Ok(second)) = (usize::try_from(first), usize::try_from(second)) else {
            return;
        };
        for number in self.0.len()..=first.max(second) {
            self.0.push(i32::try_from(number).unwrap_or(i32::MAX));
        }
        self.0.swap(first, second);
    }
}

/// Whether no database has changed its number yet, as it is nearly everywhere.
static IS_PLAIN: AtomicBool = AtomicBool::new(true);

/// What a number leads to now.
pub(crate) fn numbered(number: i32) -> Db {
    if IS_PLAIN.load(Ordering::Relaxed) { Db(number) } else { NUMBERS.lock().db(number) }
}

/// Two numbers have changed places.
pub(super) fn swap(first: i32, second: i32) {
    NUMBERS.lock().swap(first, second);
    IS_PLAIN.store(false, Ordering::Relaxed);
}

fn selected_number(ctx: &Context) -> i32 {
    api!(RedisModule_GetSelectedDb(ctx.get_raw()))
}

pub(crate) fn selected_db(ctx: &Context) -> Db {
    numbered(selected_number(ctx))
}

pub(crate) fn select_db(ctx: &Context, db: Db) {
    let number = NUMBERS.lock().number(db);
    if selected_number(ctx) != number {
        api!(RedisModule_SelectDb(ctx.get_raw(), number));
    }
}

/// Whether there is a database of this number.
pub(crate) fn has_db(ctx: &Context, number: i32) -> bool {
    let selected = selected_number(ctx);
    let has = api!(RedisModule_SelectDb(ctx.get_raw(), number)) == OK;
    api!(RedisModule_SelectDb(ctx.get_raw(), selected));
    has
}

/// Whether the selected database has keys.
pub(crate) fn has_keys(ctx: &Context) -> bool {
    api!(RedisModule_DbSize(ctx.get_raw())) > 0
}

/// Works in another database, and returns to the selected one.
pub(crate) fn in_db<T>(ctx: &Context, db: Db, f: impl FnOnce() -> T) -> T {
    let selected = selected_db(ctx);
    select_db(ctx, db);
    let result = f();
    select_db(ctx, selected);
    result
}

/// Works in each database, and returns to the selected one.
pub(crate) fn in_each_db(ctx: &Context, mut f: impl FnMut(Db)) {
    let selected = selected_db(ctx);
    for number in 0.. {
        if api!(RedisModule_SelectDb(ctx.get_raw(), number)) != OK {
            break;
        }
        f(numbered(number));
    }
    select_db(ctx, selected);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_changes_the_numbers_and_not_the_contents() {
        let mut numbers = Numbers(Vec::new());
        assert_eq!((numbers.db(3), numbers.number(Db(3))), (Db(3), 3));
        numbers.swap(1, 3);
        assert_eq!([0, 1, 2, 3, 4].map(|n| numbers.db(n).0), [0, 3, 2, 1, 4]);
        assert_eq!([0, 1, 2, 3, 4].map(|n| numbers.number(Db(n))), [0, 3, 2, 1, 4]);
        numbers.swap(3, 0);
        assert_eq!([0, 1, 2, 3].map(|n| numbers.db(n).0), [1, 3, 2, 0]);
        numbers.swap(0, 3);
        numbers.swap(1, 3);
        assert_eq!([0, 1, 2, 3].map(|n| numbers.db(n).0), [0, 1, 2, 3]);
    }
}
