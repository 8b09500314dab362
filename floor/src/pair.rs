//! Two threads that start together, and how long both take.

use crate::Result;
use core::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Runs `second` on a thread that is waiting for the start, and `first` on this one; the time until both have ended.
pub(crate) fn together(first: impl FnOnce() -> Result<()>, second: impl FnOnce() -> Result<()> + Send) -> Result<Duration> {
    let (ready, go) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            ready.store(true, Ordering::Release);
            // Spinning: a thread that must be woken would start late.
            while !go.load(Ordering::Acquire) {
                core::hint::spin_loop();
            }
            let result = second();
            (result, Instant::now())
        });
        while !ready.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
        let start = Instant::now();
        go.store(true, Ordering::Release);
        let first = first();
        let first_end = Instant::now();
        let (second, second_end) = second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        first.and(second)?;
        Ok(first_end.max(second_end) - start)
    })
}
