//! A second pair of hands: a thread that takes part in what another thread of uhmm's is doing.
//!
//! Taking pages from the CPU costs the kernel as much time as copying them, so a launch prepares its blocks on two threads. The work is one function that
//! both run; how they share it is its own affair.
#![allow(unsafe_code)] // lends a function to a thread for as long as it is awaited

use crate::sync::*;
use uhmm_os::thread::Aside;

/// What both threads run.
type Job = dyn Fn() + Sync;

#[derive(Default)]
struct Offer {
    job: Option<*const Job>,
    at_work: bool,
    /// Somebody has something for its spare time.
    nudged: bool,
    closed: bool,
}

// SAFETY: the pointer is only followed while `together`, which has borrowed the job, waits.
unsafe impl Send for Offer {}

/// Where the thread waits. It must lie in memory that never migrates.
#[derive(Default)]
pub(crate) struct Assist {
    offer: Mutex<Offer>,
    changed: Condvar,
    aside: Aside,
}

impl core::fmt::Debug for Assist {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Assist").finish_non_exhaustive()
    }
}

impl Assist {
    /// Runs `job`, and has it run by the other thread too, unless that is busy or comes too late. Both have ended when this returns.
    pub(crate) fn together(&self, job: &(dyn Fn() + Sync)) {
        /// Takes the offer back, also when the job panics.
        struct Withdraw<'a>(&'a Assist);
        impl Drop for Withdraw<'_> {
            fn drop(&mut self) {
                let mut offer = self.0.offer.lock();
                offer.job = None;
                while offer.at_work {
                    offer = self.0.changed.wait(offer);
                }
            }
        }
        let mut offer = self.offer.lock();
        if offer.job.is_some() || offer.at_work || offer.closed {
            drop(offer);
            return job();
        }
        let lent: *const (dyn Fn() + Sync + '_) = job;
        // SAFETY: only the lifetime changes. The offer is withdrawn, and the other thread's run awaited, before the borrow ends.
        offer.job = Some(unsafe { core::mem::transmute::<*const (dyn Fn() + Sync + '_), *const Job>(lent) });
        drop(offer);
        self.aside.keep_off();
        self.changed.notify_all();
        let _withdraw = Withdraw(self);
        job();
    }

    /// Has the other thread do what it does in its spare time, on another core than this one. It may be busy: nobody waits for it.
    pub(crate) fn nudge(&self) {
        self.offer.lock().nudged = true;
        self.aside.keep_off();
        self.changed.notify_all();
    }

    /// Takes part in whatever is offered, and does `spare` after a nudge, until closed.
    pub(crate) fn serve(&self, spare: impl Fn()) {
        self.aside.enter();
        let mut offer = self.offer.lock();
        while !offer.closed {
            let Some(job) = offer.job.take() else {
                if core::mem::take(&mut offer.nudged) {
                    drop(offer);
                    spare();
                    offer = self.offer.lock();
                    continue;
                }
                offer = self.changed.wait(offer);
                continue;
            };
            offer.at_work = true;
            drop(offer);
            // SAFETY: taken from the offer while `at_work` was raised under the same lock: `together` waits until it is lowered.
            unsafe { (*job)() };
            offer = self.offer.lock();
            offer.at_work = false;
            self.changed.notify_all();
        }
    }

    /// Ends [`serve`](Self::serve).
    pub(crate) fn close(&self) {
        self.offer.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn both_threads_take_part_and_have_ended_when_it_returns() {
        let assist = Assist::default();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                assist.serve(|| {});
                std::thread::current().id()
            });
            let who = std::sync::Mutex::new(std::collections::HashSet::new());
            let limit = Instant::now() + Duration::from_secs(20);
            // The other thread may come too late for a job; not for all of them.
            while who.lock().unwrap().len() < 2 {
                assert!(Instant::now() < limit, "the other thread never took part");
                let inside = AtomicUsize::new(0);
                assist.together(&|| {
                    inside.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                    who.lock().unwrap().insert(std::thread::current().id());
                    inside.fetch_sub(1, Ordering::Relaxed);
                });
                assert_eq!(inside.into_inner(), 0);
            }
            assist.close();
            assert!(who.into_inner().unwrap().contains(&other.join().unwrap()));
            let ran = AtomicUsize::new(0);
            assist.together(&|| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), 1, "a closed assistant leaves the work to who asks");
        });
    }
}
