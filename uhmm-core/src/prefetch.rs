//! Prefetches that go on in the background: ranges on their way to a device, or home, while the program does something else.
//!
//! One thread, which starts with the first of them, carries them out in the order in which they were asked for. Who asked has a ticket, which is all
//! that a fence is: it can be waited for, looked at, or dropped, and owns nothing. Nothing of the program's is borrowed, for moving its pages is
//! harmless to whoever uses them, and what was unmapped meanwhile is not there to be moved.
//!
//! # Rules
//! * A migration is made with the turn alone (`line`), so that no launch runs whose pages it could take. It is made in parts, 32 MiB at a time, and
//!   the turn is free for a moment between two, so that a launch does not wait for all of a prefetch.
//! * The queue's lock is a leaf: nothing is waited for while it is held. It is taken by who has the turn; so a thread of the program takes it with signals
//!   deferred, for a handler there would wait for the evictor, and that for the turn.
//! * A device is closed by who is alone. What is still to go there is cancelled then, also what has begun; so a device that is not cancelled, looked at with
//!   the turn, is open.
//!
//! Who uses it: the hints of the crate `uhmm`, and runtimes that know what comes next.
//!
//! ```
//! use uhmm_core::{CoreRef, DeviceRef, Error};
//!
//! fn ahead(core: &CoreRef, dev: &DeviceRef, data: &[f32]) -> Result<(), Error> {
//!     let range = data.as_ptr_range();
//!     let on_its_way = core.prefetch(range.start as usize, range.end as usize, Some(dev))?;
//!     // Something else meanwhile.
//!     on_its_way.wait()
//! }
//! ```
#![allow(unsafe_code)] // a thread that has the core's address, and entries in memory of zeros

use crate::core::{Core, DeviceRef};
use crate::error::Error;
use crate::home;
use crate::launch;
use crate::line::Who;
use crate::own::{self, OwnSlice, Zeroed};
use crate::page::{Span, Va};
use crate::process::{self, CoreRef};
use crate::sync::*;
use uhmm_os::signal::Deferred;
use uhmm_os::thread::{self, Thread};
use uhmm_os::{BLOCK, Errno, futex_wait, futex_wake};

/// Prefetches that can wait for their turn, and whose errors are kept.
const MOST: usize = 4096;
/// Bytes that move between two moments at which a launch may begin.
const PART: usize = 32 << 20;
const STACK: usize = 256 << 10;

/// Where a range goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Device(usize),
    Home,
}

/// One prefetch.
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: Va,
    end: Va,
    target: Target,
    /// The name of the device, if it was closed meanwhile.
    closed: Option<&'static str>,
    /// How it failed.
    failed: Option<Failure>,
}

// SAFETY: zeroed entries are never read: those that were asked for are written.
unsafe impl Zeroed for Option<Entry> {}

/// The errors that there are, as plain data.
#[derive(Clone, Copy, Debug)]
enum Failure {
    Closed { device: &'static str },
    Removed { device: &'static str },
    TooLarge { device: &'static str, needed: usize, capacity: usize },
    NoRoom { device: &'static str, needed: usize, capacity: usize },
    Driver { device: &'static str, source: Errno, said: Option<&'static str> },
    System(&'static str, Errno),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Closed { device } => Failure::Closed { device },
            Error::DeviceRemoved { device } => Failure::Removed { device },
            Error::TooLarge { device, needed, capacity } => Failure::TooLarge { device, needed, capacity },
            Error::NoRoom { device, needed, capacity } => Failure::NoRoom { device, needed, capacity },
            Error::Driver { device, source, said } => Failure::Driver { device, source, said },
            Error::System(what, source) => Failure::System(what, source),
            _ => Failure::System("move the range", Errno::IO),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Closed { device } => Error::Closed { device },
            Failure::Removed { device } => Error::DeviceRemoved { device },
            Failure::TooLarge { device, needed, capacity } => Error::TooLarge { device, needed, capacity },
            Failure::NoRoom { device, needed, capacity } => Error::NoRoom { device, needed, capacity },
            Failure::Driver { device, source, said } => Error::Driver { device, source, said },
            Failure::System(what, source) => Error::System(what, source),
        }
    }
}

/// Tickets are counted from 1; ticket `t` stands in entry `t % MOST`.
#[derive(Debug)]
struct Queue {
    entries: OwnSlice<Option<Entry>>,
    /// The last ticket that was given out.
    asked: u64,
    /// There is a thread.
    started: bool,
    stop: bool,
}

impl Queue {
    /// The entry of a ticket that was given out.
    fn entry(&mut self, ticket: u64) -> Option<&mut Entry> {
        self.entries[ticket as usize % MOST].as_mut()
    }
}

/// The prefetches of one process. It must lie in memory that never migrates.
#[derive(Debug)]
pub(crate) struct Prefetches {
    queue: Mutex<Queue>,
    /// For the thread.
    filled: Condvar,
    /// The last ticket that is done. Changed under the lock.
    done: AtomicU64,
    /// Rung (raised, and woken) whenever one is done, for who waits for that.
    bell: AtomicU32,
}

impl Prefetches {
    /// None yet.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let entries = OwnSlice::new(c"uhmm prefetches", MOST)?;
        Ok(Prefetches {
            queue: Mutex::new(Queue { entries, asked: 0, started: false, stop: false }),
            filled: Condvar::new(),
            done: AtomicU64::new(0),
            bell: AtomicU32::new(0),
        })
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until `f` says what was waited for; it is asked whenever a prefetch is done.
    fn until<R>(&self, f: impl Fn() -> Option<R>) -> R {
        loop {
            let bell = self.bell.load(Ordering::Acquire);
            if let Some(result) = f() {
                return result;
            }
            futex_wait(&self.bell, bell, None);
        }
    }

    /// Adds one; waits if there are too many. Its ticket, and whether the thread is still to be started.
    fn add(&self, start: Va, end: Va, target: Target) -> (u64, bool) {
        self.until(|| {
            let _deferred = Deferred::new();
            let mut queue = self.queue.lock();
            if queue.asked - self.done() >= MOST as u64 {
                return None;
            }
            queue.asked += 1;
            let ticket = queue.asked;
            queue.entries[ticket as usize % MOST] = Some(Entry { start, end, target, closed: None, failed: None });
            self.filled.notify_one();
            Some((ticket, !core::mem::replace(&mut queue.started, true)))
        })
    }

    fn is_done(&self, ticket: u64) -> bool {
        self.done() >= ticket
    }

    /// Waits for one. Of one that was done long ago no error is known.
    fn wait(&self, ticket: u64) -> Result<(), Error> {
        self.until(|| self.is_done(ticket).then_some(()));
        let _deferred = Deferred::new();
        let mut queue = self.queue.lock();
        if ticket == 0 || queue.asked - ticket >= MOST as u64 {
            return Ok(());
        }
        queue.entry(ticket).and_then(|entry| entry.failed).map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// The device is being closed, by who is alone.
    pub(crate) fn cancel(&self, device: usize, name: &'static str) {
        let mut queue = self.queue.lock();
        for ticket in self.done() + 1..=queue.asked {
            if let Some(entry) = queue.entry(ticket)
                && entry.target == Target::Device(device)
            {
                entry.closed = Some(name);
            }
        }
    }

    /// Ends the thread once the prefetch that it is at is done; the others are not made.
    pub(crate) fn stop(&self) {
        self.queue.lock().stop = true;
        self.filled.notify_all();
    }

    /// The thread's work.
    fn serve(&self, core: &Core) {
        loop {
            let mut queue = self.queue.lock();
            while self.done() == queue.asked && !queue.stop {
                queue = self.filled.wait(queue);
            }
            if queue.stop {
                return;
            }
            let ticket = self.done() + 1;
            drop(queue);
            let result = self.carry_out(core, ticket);
            let mut queue = self.queue.lock();
            if let Some(entry) = queue.entry(ticket) {
                entry.failed = result.err().map(Failure::from);
            }
            self.done.store(ticket, Ordering::Release);
            drop(queue);
            self.bell.fetch_add(1, Ordering::AcqRel);
            futex_wake(&self.bell);
        }
    }

    fn carry_out(&self, core: &Core, ticket: u64) -> Result<(), Error> {
        let Some(Entry { start: mut at, end, target, .. }) = self.queue.lock().entry(ticket).copied() else { return Ok(()) };
        let whole = Span::inside(at, end);
        let pin = core.next_launch();
        loop {
            let to = (at / BLOCK * BLOCK + PART).min(end);
            core.space.settle();
            {
                let _alone = core.turns.enter(Who::Alone);
                let _prepare = core.prepare.lock();
                let closed = self.queue.lock().entry(ticket).and_then(|entry| entry.closed);
                if let Some(device) = closed {
                    return Err(Error::Closed { device });
                }
                match target {
                    Target::Device(index) => {
                        let dev = core.device(index);
                        dev.usable()?;
                        launch::send(core, dev, (at, to), whole, pin)?;
                    }
                    Target::Home => home_part(core, at, to)?,
                }
            }
            if to == end {
                return Ok(());
            }
            at = to;
            // Who waits for the lock must have woken before it is taken again.
            thread::sleep_micros(50);
        }
    }
}

/// Brings home what any device has of the pages that a part of a range touches. `prepare` is held.
fn home_part(core: &Core, start: Va, end: Va) -> Result<(), Error> {
    let mut result = Ok(());
    core.dir.for_each(Span::touching(start, end), |block, part| {
        let device = block.lock().device as usize;
        if let Some(index) = device.checked_sub(1) {
            let sent = home::send_pages_home(core, core.device(index), part.start, part.bits());
            result = core::mem::replace(&mut result, Ok(())).and(sent);
        }
    });
    result
}

/// Starts the thread, on the keeper. The core must outlive it.
pub(crate) fn start(core: &Core) -> Result<Thread, Errno> {
    /// # Safety
    /// The argument is a `&Core` that outlives the thread.
    unsafe extern "C" fn serve(at: *mut ()) {
        // SAFETY: by the contract.
        let core = unsafe { &*at.cast::<Core>() };
        core.prefetches.serve(core);
    }
    // SAFETY: the core is dropped after the thread was joined, in `process::end`.
    unsafe { own::spawn(c"uhmm-prefetch", STACK, serve, core::ptr::from_ref(core).cast_mut().cast()) }
}

/// A prefetch that goes on in the background: a fence. It may be dropped: the work goes on, and an error is not seen.
#[derive(Debug)]
pub struct Prefetch<'a> {
    hold: &'a CoreRef,
    ticket: u64,
}

impl Prefetch<'_> {
    /// Whether it is done, be it with an error.
    pub fn is_done(&self) -> bool {
        self.hold.core().prefetches.is_done(self.ticket)
    }

    /// Waits until it is done.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the range is larger than the device's memory, with nothing moved; [`Error::NoRoom`], with a part of it moved; [`Error::Closed`] if the device
    /// was closed meanwhile, [`Error::DeviceRemoved`] if it was removed; those of the device. Of the last 4096 prefetches that were asked for the errors are kept. [`Error::Reentrant`] from a kernel, whose own
    /// launch may be what the prefetch waits for.
    pub fn wait(self) -> Result<(), Error> {
        let core = self.hold.core();
        if core.has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        core.prefetches.wait(self.ticket)
    }
}

impl CoreRef {
    /// Has the pages of a byte range moved to a device (those that lie wholly inside it), or home (those that it touches), in the background.
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel; [`Error::System`] if the thread for it is refused.
    pub fn prefetch(&self, start: usize, end: usize, to: Option<&DeviceRef>) -> Result<Prefetch<'_>, Error> {
        let core = self.core();
        if core.has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        let end = end.min(1 << 47);
        if start >= end {
            return Ok(Prefetch { hold: self, ticket: 0 });
        }
        let target = to.map_or(Target::Home, |dev| Target::Device(dev.id() as usize - 1));
        let (ticket, first) = core.prefetches.add(start, end, target);
        if first {
            let started = process::lock().and_then(|held| held.start_prefetches());
            if let Err(e) = started {
                // The next one tries again.
                let _deferred = Deferred::new();
                core.prefetches.queue.lock().started = false;
                return Err(e);
            }
        }
        Ok(Prefetch { hold: self, ticket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_kept_until_their_place_is_needed() {
        let all = Prefetches::new().unwrap();
        let mut tickets = vec![];
        for _ in 0..MOST {
            tickets.push(all.add(1, 2, Target::Device(3)).0);
        }
        all.cancel(3, "gone");
        all.cancel(4, "other");
        assert!(!all.is_done(tickets[0]));
        {
            let mut queue = all.queue.lock();
            assert!((1..=MOST as u64).all(|ticket| queue.entry(ticket).unwrap().closed == Some("gone")));
            all.done.store(MOST as u64, Ordering::Release);
            queue.entry(1).unwrap().failed = Some(Failure::Closed { device: "first" });
            queue.entry(2).unwrap().failed = Some(Failure::Closed { device: "second" });
        }
        assert!(all.is_done(tickets[0]));
        let (next, start) = all.add(1, 2, Target::Home);
        assert!(next == MOST as u64 + 1 && !start && !all.is_done(next));
        assert!(all.wait(tickets[0]).is_ok(), "its place is another's now");
        assert!(matches!(all.wait(tickets[1]), Err(Error::Closed { device: "second" })));
        assert!(all.wait(0).is_ok(), "nothing was asked for");
    }
}
