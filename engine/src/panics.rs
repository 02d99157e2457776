//! Panics as errors: where one job's panic must not end what runs beside it.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs `f`; a panic becomes its text.
///
/// What `f` has changed when it panics is the caller's to repair.
///
/// # Errors
///
/// The text of the panic.
pub fn catch_panic<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| text(&*payload))
}

fn text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_text() {
        assert_eq!(catch_panic(|| 1), Ok(1));
        assert_eq!(catch_panic(|| panic!("plain")), Err::<(), _>("plain".to_owned()));
        let number = 3;
        assert_eq!(catch_panic(|| panic!("with {number}")), Err::<(), _>("with 3".to_owned()));
    }
}
