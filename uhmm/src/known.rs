//! Names that live as long as the process: a device is known by one.

use std::sync::{Mutex, PoisonError};

static NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

/// The name, for ever. Each is kept once.
pub(crate) fn name(name: &str) -> &'static str {
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.iter().find(|known| **known == name) {
        return known;
    }
    let known: &'static str = Box::leak(name.into());
    names.push(known);
    known
}
