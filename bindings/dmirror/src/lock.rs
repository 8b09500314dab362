//! A lock that is taken in one function and given in another, as handlers around a fork do.

use core::sync::atomic::{AtomicU32, Ordering};
use uhmm_os::{futex_wait, futex_wake};

/// The lock: 0 free, 1 held, 2 held and perhaps waited for.
pub(crate) struct Lock(AtomicU32);

/// Held as long as it lives.
pub(crate) struct Held<'a>(&'a Lock);

impl Lock {
    pub(crate) const fn new() -> Self {
        Lock(AtomicU32::new(0))
    }

    pub(crate) fn lock(&self) -> Held<'_> {
        self.take();
        Held(self)
    }

    /// Waits for it and has it.
    pub(crate) fn take(&self) {
        if self.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            return;
        }
        while self.0.swap(2, Ordering::Acquire) != 0 {
            futex_wait(&self.0, 2, None);
        }
    }

    /// Gives it up. Also right in a forked child, whose other threads are gone.
    pub(crate) fn give(&self) {
        if self.0.swap(0, Ordering::Release) == 2 {
            futex_wake(&self.0);
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.give();
    }
}
