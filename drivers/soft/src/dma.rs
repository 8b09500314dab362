//! The copy engine: a queue of batches, a thread that works on them, and fences.
//!
//! A batch is divided into pieces of at most [`CHUNK`] bytes that are claimed one by one. Whoever waits for a fence claims pieces of its
//! batch too, so that a small batch is done by its waiter at once, without waking a thread, and a large one by both. Copies bypass the cache on the
//! way out, as a device's would.
//!
//! No example: a part of the device, for who reads how one is made; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // the copies

use crate::memory::Memory;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use rustix_futex_sync::{Condvar, Mutex};
use uhmm_core::driver::{Dma, DmaError, Fence, cpu};
use uhmm_core::own::{self, OwnBox};
use uhmm_os::Errno;
use uhmm_os::thread::{self, Aside, Thread};

/// Bytes that are claimed at once.
pub const CHUNK: usize = 256 << 10;
/// Batches from this size on are worth waking the engine's thread for.
const WAKE: usize = 1 << 20;
const SLOTS: usize = 64;
/// Bits for an offset: one piece of a batch has at most 1 TiB.
const OFFSET: u32 = 40;

/// One batch in the queue.
#[derive(Debug, Default)]
struct Slot {
    list: AtomicPtr<Dma>,
    count: AtomicUsize,
    /// The next unclaimed byte: the list's entry in the high 24 bits, the offset in the low [`OFFSET`].
    cursor: AtomicU64,
    done: AtomicUsize,
    total: AtomicUsize,
    /// Threads that may be looking at the list.
    readers: AtomicUsize,
    failed: AtomicUsize,
    used: AtomicBool,
}

/// What the engine's thread shares with who submits.
#[derive(Debug)]
struct Shared {
    slots: [Slot; SLOTS],
    memory: AtomicPtr<Memory>,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
    aside: Aside,
}

#[derive(Debug, Default)]
struct State {
    wanted: u64,
    stop: bool,
}

/// The copy engine of one device.
#[derive(Debug)]
pub struct Engine {
    shared: OwnBox<Shared>,
    thread: Mutex<Option<Thread>>,
}

impl Engine {
    /// An engine without a thread yet.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        let shared = Shared {
            slots: core::array::from_fn(|_| Slot::default()),
            memory: AtomicPtr::new(core::ptr::null_mut()),
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            done: Condvar::new(),
            aside: Aside::default(),
        };
        Ok(Engine { shared: OwnBox::new(c"uhmm copy engine", shared)?, thread: Mutex::new(None) })
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start(&self) -> Result<(), Errno> {
        /// # Safety
        /// The argument is a `&Shared` that outlives the thread.
        unsafe extern "C" fn work(shared: *mut ()) {
            // SAFETY: by the contract.
            unsafe { &*shared.cast::<Shared>() }.work();
        }
        // SAFETY: `drop` joins the thread before the shared part goes.
        let thread = unsafe { own::spawn(c"uhmm-dma", 128 << 10, work, (&raw const *self.shared).cast_mut().cast())? };
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// The calling thread is going to submit, and to help: the engine's thread does its part on another core.
    pub fn stand_by(&self) {
        self.shared.aside.keep_off();
    }

    /// Queues a batch.
    pub fn submit(&self, memory: &Memory, batch: &[Dma]) -> Fence {
        let total = batch.iter().map(|dma| dma.len).sum();
        let index = loop {
            let free = |slot: &Slot| slot.used.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
            match self.shared.slots.iter().position(free) {
                Some(index) => break index,
                None => thread::yield_now(),
            }
        };
        let slot = &self.shared.slots[index];
        slot.count.store(batch.len(), Ordering::Relaxed);
        slot.done.store(0, Ordering::Relaxed);
        slot.total.store(total, Ordering::Relaxed);
        slot.failed.store(0, Ordering::Relaxed);
        slot.cursor.store(0, Ordering::Relaxed);
        if total >= WAKE {
            self.shared.memory.store(core::ptr::from_ref(memory).cast_mut(), Ordering::Relaxed);
            // Only a batch that is published here is seen by the engine's thread.
            slot.list.store(batch.as_ptr().cast_mut(), Ordering::Release);
            self.shared.state.lock().wanted |= 1 << index;
            self.shared.work.notify_one();
        }
        Fence(index as u64)
    }

    /// Helps with a batch, and waits until it is done.
    ///
    /// # Errors
    /// If memory of the program could not be reached.
    pub fn wait(&self, memory: &Memory, fence: Fence, batch: &[Dma]) -> Result<(), DmaError> {
        let slot = &self.shared.slots[fence.0 as usize];
        slot.help(memory, batch);
        // Nobody may look at the list when this returns.
        slot.list.store(core::ptr::null_mut(), Ordering::SeqCst);
        let idle = |slot: &Slot| {
            slot.done.load(Ordering::Acquire) >= slot.total.load(Ordering::Relaxed) && slot.readers.load(Ordering::SeqCst) == 0
        };
        if !idle(slot) {
            let mut state = self.shared.state.lock();
            while !idle(slot) {
                state = self.shared.done.wait(state);
            }
        }
        let failed = slot.failed.load(Ordering::Relaxed);
        slot.used.store(false, Ordering::Release);
        if failed == 0 { Ok(()) } else { Err(DmaError::Gone { address: failed }) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            thread.join();
        }
    }
}

impl Shared {
    /// The engine's thread.
    fn work(&self) {
        self.aside.enter();
        loop {
            let mut state = self.state.lock();
            while state.wanted == 0 {
                if state.stop {
                    return;
                }
                state = self.work.wait(state);
            }
            let index = state.wanted.trailing_zeros() as usize;
            state.wanted &= state.wanted - 1;
            drop(state);
            let slot = &self.slots[index];
            slot.readers.fetch_add(1, Ordering::SeqCst);
            let list = slot.list.load(Ordering::SeqCst);
            if !list.is_null() {
                // SAFETY: a waiter clears the pointer before it waits for `readers` to be 0, and leaves the list alone until then. So a
                // pointer that is seen with `readers` raised stays good until it is lowered. The memory outlives the engine.
                let (batch, memory) = unsafe {
                    (core::slice::from_raw_parts(list, slot.count.load(Ordering::Relaxed)), &*self.memory.load(Ordering::Relaxed))
                };
                slot.help(memory, batch);
            }
            slot.readers.fetch_sub(1, Ordering::SeqCst);
            drop(self.state.lock());
            self.done.notify_all();
        }
    }
}

impl Slot {
    /// Claims and copies until nothing is left to claim.
    fn help(&self, memory: &Memory, batch: &[Dma]) {
        loop {
            let cursor = self.cursor.load(Ordering::Relaxed);
            let (entry, offset) = ((cursor >> OFFSET) as usize, (cursor & ((1 << OFFSET) - 1)) as usize);
            let Some(dma) = batch.get(entry) else { return };
            let len = CHUNK.min(dma.len - offset);
            let next = if offset + len == dma.len { (entry as u64 + 1) << OFFSET } else { cursor + len as u64 };
            if self.cursor.compare_exchange_weak(cursor, next, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                continue;
            }
            // SAFETY: frames that follow each other are next to each other in the arena, and the caller's frames are there, not in the window (the contract of
            // `Driver::copy`).
            if let Err(address) = unsafe { cpu::copy_part(dma, offset, len, |frame| memory.address(frame)) } {
                let _ = self.failed.compare_exchange(0, address.max(1), Ordering::Relaxed, Ordering::Relaxed);
            }
            self.done.fetch_add(len, Ordering::AcqRel);
        }
    }
}
