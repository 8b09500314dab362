//! A desk: where threads of the program leave work for a thread of uhmm's, and wait until it is done.
//!
//! A thread of the program cannot use uhmm's descriptors (uhmm's threads have a descriptor table of their own, so that nothing the program closes
//! can drop a userfaultfd). So what needs them is moved, by value, into memory that never migrates, run by the desk's thread, and its
//! result is moved back. Work is done one piece at a time, in order of arrival at the desk.
#![allow(unsafe_code)] // moves closures and results through untyped memory

use crate::sync::*;
use core::cell::UnsafeCell;
use core::mem::{MaybeUninit, align_of, size_of};

const ROOM: usize = 8192;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Free,
    Filled,
    Done,
    Closed,
}

#[repr(align(64))]
struct Room(UnsafeCell<[MaybeUninit<u8>; ROOM]>);

#[derive(Debug)]
struct Work {
    phase: Phase,
    call: Option<unsafe fn(*mut u8, *const ())>,
}

/// A desk. It must lie in memory that never migrates.
pub(crate) struct Desk {
    work: Mutex<Work>,
    /// For who asks.
    changed: Condvar,
    /// For who serves.
    filled: Condvar,
    room: Room,
}

impl core::fmt::Debug for Desk {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

// SAFETY: the room is used by one side at a time, as the phase says, which is changed under the lock.
unsafe impl Sync for Desk {}
// SAFETY: as above.
unsafe impl Send for Desk {}

impl Desk {
    /// A desk without work.
    pub(crate) fn new() -> Self {
        Desk {
            work: Mutex::new(Work { phase: Phase::Free, call: None }),
            changed: Condvar::new(),
            filled: Condvar::new(),
            room: Room(UnsafeCell::new([MaybeUninit::uninit(); ROOM])),
        }
    }

    /// Has the desk's thread run `job` with its context, and waits for the result. `None` if the desk is closed.
    ///
    /// The job is moved into memory that never migrates; what it borrows is the program's, and may be touched by it only while it holds no lock.
    ///
    /// # Safety
    /// The context type must be the one that the desk's thread passes to [`serve`](Self::serve).
    pub(crate) unsafe fn ask<C, R: Send, F: FnOnce(&C) -> R + Send>(&self, job: F) -> Option<R> {
        const { assert!(size_of::<F>() <= ROOM && size_of::<R>() <= ROOM && align_of::<F>() <= 64 && align_of::<R>() <= 64) };
        /// # Safety
        /// `room` holds an `F`, `context` is a `&C`.
        unsafe fn call<C, R, F: FnOnce(&C) -> R>(room: *mut u8, context: *const ()) {
            // SAFETY: by the contract; the closure is moved out before the result is moved in.
            unsafe {
                let job = room.cast::<F>().read();
                let result = job(&*context.cast::<C>());
                room.cast::<R>().write(result);
            }
        }
        let mut work = self.work.lock();
        while work.phase != Phase::Free {
            if work.phase == Phase::Closed {
                return None;
            }
            work = self.changed.wait(work);
        }
        let room = self.room.0.get().cast::<u8>();
        // SAFETY: phase Free under the lock: the room is ours, large and aligned enough (checked above).
        unsafe { room.cast::<F>().write(job) };
        work.call = Some(call::<C, R, F>);
        work.phase = Phase::Filled;
        self.filled.notify_one();
        while work.phase != Phase::Done {
            work = self.changed.wait(work);
        }
        // SAFETY: phase Done: `call` has left a result, and only who asked takes it.
        let result = unsafe { room.cast::<R>().read() };
        work.phase = Phase::Free;
        self.changed.notify_all();
        Some(result)
    }

    /// Works until the desk is closed. `context` is what jobs are given.
    pub(crate) fn serve<C>(&self, context: &C) {
        loop {
            let mut work = self.work.lock();
            while work.phase != Phase::Filled {
                if work.phase == Phase::Closed {
                    return;
                }
                work = self.filled.wait(work);
            }
            let call = work.call.take();
            drop(work);
            if let Some(call) = call {
                // SAFETY: phase Filled: the room holds the closure that `call` was made for, and the asker waits for Done.
                unsafe { call(self.room.0.get().cast(), core::ptr::from_ref(context).cast()) };
            }
            let mut work = self.work.lock();
            work.phase = Phase::Done;
            self.changed.notify_all();
        }
    }

    /// Closes the desk, once its work is done.
    pub(crate) fn close(&self) {
        let mut work = self.work.lock();
        while work.phase != Phase::Free {
            if work.phase == Phase::Closed {
                return;
            }
            work = self.changed.wait(work);
        }
        work.phase = Phase::Closed;
        self.changed.notify_all();
        self.filled.notify_all();
    }
}

impl Default for Desk {
    fn default() -> Self {
        Desk::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_by_the_desks_thread_and_its_result_comes_back() {
        let desk = Desk::new();
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
                (0..8).map(ask).collect::<Vec<_>>().into_iter().map(|t| t.join().unwrap().unwrap()).collect()
            });
            desk.close();
            let id = thread.join().unwrap();
            assert!(answers.iter().enumerate().all(|(n, &(answer, by))| answer == 7 + n && by == id));
            // SAFETY: as above; nobody serves any more.
            assert!(unsafe { desk.ask(|_: &String| ()) }.is_none());
        });
    }
}
