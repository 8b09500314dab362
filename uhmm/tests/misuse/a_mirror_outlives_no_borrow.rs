//! What hears of changes is kept for as long as the mirror: it borrows nothing that goes before.
use std::sync::atomic::AtomicUsize;
use uhmm::mirror::{Notifier, Reason};
use uhmm_core::page::Span;

struct Counts<'a>(&'a AtomicUsize);

impl Notifier for Counts<'_> {
    fn invalidate(&self, _: Span, _: Reason) {}
}

fn main() {}
