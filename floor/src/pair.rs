//! Two threads that start together, and how long both take: for one piece of work each, or for several in step.

use crate::Result;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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

/// A phase of work that two threads share: each calls it with its number, 0 or 1. It does not panic, for the other would wait for ever.
pub(crate) type Phase<'a> = &'a (dyn Fn(usize) -> Result<()> + Sync);

/// Runs the phases on this thread, number 0, and on a second one, number 1: each begins when both threads have ended the one before.
/// After an error no other begins. The times that the phases took.
pub(crate) fn in_step<const N: usize>(phases: [Phase<'_>; N]) -> Result<[Duration; N]> {
    let meeting = Meeting::default();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| meeting.run(1, phases));
        let first = meeting.run(0, phases);
        let second = second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        first.and_then(|times| second.map(|_| times))
    })
}

/// Where two threads meet after each phase. They spin: a thread that must be woken would come late.
struct Meeting {
    arrivals: AtomicUsize,
    /// The first phase that failed.
    failed: AtomicUsize,
}

impl Default for Meeting {
    fn default() -> Self {
        Meeting { arrivals: AtomicUsize::new(0), failed: AtomicUsize::new(usize::MAX) }
    }
}

impl Meeting {
    /// Spins before a thread gives its core away, in case both have only one: more than a phase takes.
    const PATIENCE: u32 = 1 << 16;

    fn run<const N: usize>(&self, thread: usize, phases: [Phase<'_>; N]) -> Result<[Duration; N]> {
        let mut times = [Duration::ZERO; N];
        self.meet();
        let mut start = Instant::now();
        for (number, phase) in phases.into_iter().enumerate() {
            let result = phase(thread);
            if result.is_err() {
                self.failed.fetch_min(number, Ordering::Relaxed);
            }
            self.meet();
            let end = Instant::now();
            (times[number], start) = (end - start, end);
            result?;
            // The other may already have failed in the next phase, which we then have to join.
            if self.failed.load(Ordering::Relaxed) <= number {
                break;
            }
        }
        Ok(times)
    }

    fn meet(&self) {
        let all = (self.arrivals.fetch_add(1, Ordering::AcqRel) + 1).next_multiple_of(2);
        let mut spins = 0u32;
        while self.arrivals.load(Ordering::Acquire) < all {
            core::hint::spin_loop();
            spins = spins.saturating_add(1);
            if spins > Self::PATIENCE {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use std::sync::Mutex;

    #[test]
    fn phases_are_run_in_step_until_one_fails() {
        let log = &Mutex::new(vec![]);
        let noted = |phase: usize| {
            move |_: usize| {
                log.lock().unwrap().push(phase);
                Ok(())
            }
        };
        let fails_on_the_second = |thread: usize| {
            log.lock().unwrap().push(2);
            if thread == 1 { Err(Error::WrongData(7)) } else { Ok(()) }
        };
        assert!(in_step([&noted(0), &noted(1)]).is_ok());
        assert_eq!(core::mem::take(&mut *log.lock().unwrap()), [0, 0, 1, 1]);
        let outcome = in_step([&noted(1), &fails_on_the_second, &noted(3)]);
        assert!(matches!(outcome, Err(Error::WrongData(7))), "{outcome:?}");
        assert_eq!(*log.lock().unwrap(), [1, 1, 2, 2]);
    }
}
