//! A desk: where threads of the program leave work for threads of uhmm's, and wait until it is done, or go on.
//!
//! A thread of the program cannot use uhmm's descriptors (uhmm's threads have a descriptor table of their own, so that nothing the program closes
//! can drop a userfaultfd). So what needs them is moved, by value, into memory that never migrates, run by one of the desk's threads, and its
//! result is moved back.
//!
//! # Order
//! Work is begun in order of arrival. A *launch* may begin while the one before it is still at work, and gets a number by which they take turns on the
//! device ([`crate::line`]). Everything else is done alone: it begins when what came before has ended, and what comes after begins when it has ended.
#![allow(unsafe_code)] // moves closures and results through untyped memory

use crate::own::OwnSlice;
use crate::sync::*;
use core::mem::{align_of, size_of};
use uhmm_os::Errno;

/// Bytes of a piece of work, and of its result.
const ROOM: usize = 8192;
/// Pieces of work that can lie here at once; who comes later waits.
const ROOMS: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Free,
    /// Somebody is putting work there.
    Taken,
    Filled,
    Running,
    Done,
}

/// How a piece of work shares the desk's threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Beside other launches.
    Launch,
    /// Likewise, without a number.
    Beside,
    /// Alone.
    Alone,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    phase: Phase,
    kind: Kind,
    /// Nobody waits for it.
    detached: bool,
    arrival: u64,
    call: Option<unsafe fn(*mut u8, *const (), u64)>,
}

const FREE: Slot = Slot { phase: Phase::Free, kind: Kind::Alone, detached: false, arrival: 0, call: None };

#[derive(Debug)]
struct Work {
    slots: [Slot; ROOMS],
    arrivals: u64,
    launches: u64,
    closed: bool,
}

/// A desk. It must lie in memory that never migrates.
pub(crate) struct Desk {
    work: Mutex<Work>,
    /// For who asks.
    changed: Condvar,
    /// For who serves.
    filled: Condvar,
    /// Bytes, a room after the other.
    rooms: OwnSlice<u8>,
}

impl core::fmt::Debug for Desk {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

/// # Safety
/// `room` holds an `F`, `context` is a `&C`.
unsafe fn call<C, R, F: FnOnce(&C, u64) -> R>(room: *mut u8, context: *const (), number: u64) {
    // SAFETY: by the contract; the closure is moved out before the result is moved in.
    unsafe {
        let job = room.cast::<F>().read();
        let result = job(&*context.cast::<C>(), number);
        room.cast::<R>().write(result);
    }
}

impl Work {
    /// The piece of work that may begin now: the oldest, if its kind allows.
    fn next(&self) -> Option<usize> {
        let filled = (0..ROOMS).filter(|&index| self.slots[index].phase == Phase::Filled);
        let oldest = filled.min_by_key(|&index| self.slots[index].arrival)?;
        let mut running = self.slots.iter().filter(|slot| slot.phase == Phase::Running);
        let free = match self.slots[oldest].kind {
            Kind::Launch | Kind::Beside => running.all(|slot| slot.kind != Kind::Alone),
            Kind::Alone => running.next().is_none(),
        };
        free.then_some(oldest)
    }
}

impl Desk {
    /// A desk without work.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Desk {
            work: Mutex::new(Work { slots: [FREE; ROOMS], arrivals: 0, launches: 0, closed: false }),
            changed: Condvar::new(),
            filled: Condvar::new(),
            rooms: OwnSlice::new(c"uhmm desk", ROOM * ROOMS)?,
        })
    }

    fn room(&self, index: usize) -> *mut u8 {
        self.rooms.at(index * ROOM) // rooms begin where pages do
    }

    /// Puts a job into a room. `None` if the desk is closed.
    fn put<C, R, F: FnOnce(&C, u64) -> R>(&self, kind: Kind, detached: bool, job: F) -> Option<(usize, MutexGuard<'_, Work>)> {
        const { assert!(size_of::<F>() <= ROOM && size_of::<R>() <= ROOM && align_of::<F>() <= 64 && align_of::<R>() <= 64) };
        let mut work = self.work.lock();
        let index = loop {
            if work.closed {
                return None;
            }
            match work.slots.iter().position(|slot| slot.phase == Phase::Free) {
                Some(index) => break index,
                None => work = self.changed.wait(work),
            }
        };
        // The job may lie in memory that migrates: it is not touched under a lock.
        work.arrivals += 1;
        work.slots[index] = Slot { phase: Phase::Taken, kind, detached, arrival: work.arrivals, call: None };
        drop(work);
        // SAFETY: phase Taken: the room is ours, large and aligned enough (checked above).
        unsafe { self.room(index).cast::<F>().write(job) };
        let mut work = self.work.lock();
        work.slots[index].call = Some(call::<C, R, F>);
        work.slots[index].phase = Phase::Filled;
        self.filled.notify_one();
        Some((index, work))
    }

    /// Has one of the desk's threads run `job` alone, with its context, and waits for the result. `None` if the desk is closed.
    ///
    /// # Safety
    /// As [`ask_as`](Self::ask_as).
    pub(crate) unsafe fn ask<C, R: Send, F: FnOnce(&C) -> R + Send>(&self, job: F) -> Option<R> {
        // SAFETY: by the contract.
        unsafe { self.ask_as(Kind::Alone, move |context: &C, _| job(context)) }
    }

    /// Has one of the desk's threads run `job` with its context, and waits for the result. A launch gets its number. `None` if the desk is closed.
    ///
    /// The job is moved into memory that never migrates; what it borrows is the program's, and may be touched by it only while it holds no lock.
    ///
    /// # Safety
    /// The context type must be the one that the desk's threads pass to [`serve`](Self::serve).
    pub(crate) unsafe fn ask_as<C, R: Send, F: FnOnce(&C, u64) -> R + Send>(&self, kind: Kind, job: F) -> Option<R> {
        let (index, mut work) = self.put::<C, R, F>(kind, false, job)?;
        while work.slots[index].phase != Phase::Done {
            work = self.changed.wait(work);
        }
        drop(work);
        // SAFETY: phase Done: `call` has left a result, and only who asked takes it.
        let result = unsafe { self.room(index).cast::<R>().read() };
        self.work.lock().slots[index] = FREE;
        self.changed.notify_all();
        Some(result)
    }

    /// As [`ask_as`](Self::ask_as), without waiting for the end. False if the desk is closed: then the job is dropped.
    ///
    /// # Safety
    /// As `ask_as`; and what the job borrows must stay until it has run.
    pub(crate) unsafe fn leave<C, F: FnOnce(&C, u64) + Send>(&self, kind: Kind, job: F) -> bool {
        self.put::<C, (), F>(kind, true, job).is_some()
    }

    /// Works until the desk is closed. `context` is what jobs are given.
    pub(crate) fn serve<C>(&self, context: &C) {
        let mut work = self.work.lock();
        loop {
            let Some(index) = work.next() else {
                if work.closed && work.slots.iter().all(|slot| matches!(slot.phase, Phase::Free | Phase::Done)) {
                    self.filled.notify_all();
                    return;
                }
                work = self.filled.wait(work);
                continue;
            };
            let number = work.launches;
            work.launches += u64::from(work.slots[index].kind == Kind::Launch);
            work.slots[index].phase = Phase::Running;
            let call = work.slots[index].call.take();
            // Another launch may begin beside this one.
            self.filled.notify_one();
            drop(work);
            if let Some(call) = call {
                // SAFETY: phase Running: the room holds the closure that `call` was made for, and nobody else uses it.
                unsafe { call(self.room(index), core::ptr::from_ref(context).cast(), number) };
            }
            work = self.work.lock();
            if work.slots[index].detached {
                work.slots[index] = FREE;
            } else {
                work.slots[index].phase = Phase::Done;
            }
            self.changed.notify_all();
            self.filled.notify_one();
        }
    }

    /// Closes the desk: what lies there is still done.
    pub(crate) fn close(&self) {
        let mut work = self.work.lock();
        work.closed = true;
        self.changed.notify_all();
        self.filled.notify_all();
        while work.slots.iter().any(|slot| slot.phase != Phase::Free) {
            work = self.changed.wait(work);
        }
        drop(work);
        self.filled.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_by_the_desks_thread_and_its_result_comes_back() {
        let desk = Desk::new().unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let context = String::from("context");
                desk.serve(&context);
                std::thread::current().id()
            });
            let answers: Vec<_> = std::thread::scope(|inner| {
                let ask = |n: usize| {
                    let desk = &desk;
                    // SAFETY: the thread above serves with a String.
                    inner.spawn(move || unsafe { desk.ask(move |c: &String| (c.len() + n, std::thread::current().id())) })
                };
                (0..40).map(ask).collect::<Vec<_>>().into_iter().map(|t| t.join().unwrap().unwrap()).collect()
            });
            let left = std::sync::Arc::new(AtomicUsize::new(0));
            for _ in 0..40 {
                let left = left.clone();
                // SAFETY: as above; the job owns what it uses.
                assert!(unsafe {
                    desk.leave(Kind::Launch, move |_: &String, _| left.store(left.load(Ordering::Relaxed) + 1, Ordering::Relaxed))
                });
            }
            desk.close();
            let id = thread.join().unwrap();
            assert!(answers.iter().enumerate().all(|(n, &(answer, by))| answer == 7 + n && by == id));
            assert_eq!(left.load(Ordering::Relaxed), 40, "what was left is done before the desk closes");
            // SAFETY: as above; nobody serves any more.
            assert!(unsafe { desk.ask(|_: &String| ()) }.is_none());
        });
    }

    /// Two threads serve. Launches overlap, and are numbered in the order of their arrival; what is done alone overlaps nothing.
    #[test]
    fn launches_overlap_and_the_rest_is_done_alone() {
        let desk = Desk::new().unwrap();
        let (launches, others) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let together = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let servers = [(); 2].map(|()| scope.spawn(|| desk.serve(&())));
            std::thread::scope(|inner| {
                for n in 0..4 {
                    let (desk, launches, others, together) = (&desk, &launches, &others, &together);
                    inner.spawn(move || {
                        for round in 0..200 {
                            let alone = (round + n) % 3 == 0;
                            let job = move |_: &(), _| {
                                let mine = if alone { others } else { launches };
                                let beside = mine.fetch_add(1, Ordering::SeqCst);
                                if alone {
                                    assert_eq!((beside, launches.load(Ordering::SeqCst)), (0, 0));
                                } else {
                                    assert_eq!(others.load(Ordering::SeqCst), 0);
                                    together.fetch_max(beside, Ordering::SeqCst);
                                }
                                std::thread::sleep(std::time::Duration::from_micros(50));
                                mine.fetch_sub(1, Ordering::SeqCst);
                            };
                            // SAFETY: the threads above serve with ().
                            unsafe { desk.ask_as(if alone { Kind::Alone } else { Kind::Launch }, job) }.unwrap();
                        }
                    });
                }
            });
            let order = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
            for n in 0..30 {
                let order = order.clone();
                // SAFETY: as above; the job owns what it uses.
                unsafe { desk.leave(Kind::Launch, move |_: &(), number| order.lock().unwrap().push((number, n))) };
            }
            desk.close();
            servers.into_iter().for_each(|server| server.join().unwrap());
            let mut order = order.lock().unwrap().clone();
            order.sort_unstable();
            assert!(order.iter().map(|&(_, n)| n).eq(0..30), "numbers follow arrival: {order:?}");
        });
        assert_eq!(together.into_inner(), 1, "two launches were never at work together, or more than two");
    }
}
