//! Worker threads: they run kernels, group by group, on stacks and scratch memory that never migrate.
//!
//! A launch is over when every group has run. The first fault of a launch is kept; a panic also keeps groups from starting that have not yet. A wild
//! pointer gets a scratch page, so that its kernel runs on; scratch pages go when the launch ends.
//!
//! No example: a part of the device, for who reads how one is made; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // runs kernels; puts scratch pages down and takes them up

use crate::window::Window;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use rustix_futex_sync::{Condvar, Mutex};
use uhmm_core::driver::cpu::{self, FirstFault, ScratchPages};
use uhmm_core::driver::{KernelFault, Launch};
use uhmm_core::kernel::LOCAL_BYTES;
use uhmm_core::own::{self, OwnBox};
use uhmm_core::page::Span;
use uhmm_os::mem::{self, Advice, Mapping, Prot, Reserve};
use uhmm_os::thread::Thread;
use uhmm_os::uffd::Userfaultfd;
use uhmm_os::{Errno, PAGE};

/// The most workers of one device.
pub const MOST: usize = 256;
/// Bytes of a worker's stack.
pub const STACK: usize = 2 << 20;
const FAULTS: usize = 1024;

/// The workers of one device.
#[derive(Debug)]
pub struct Workers {
    shared: OwnBox<Shared>,
    threads: Mutex<Vec<Thread>>,
    count: usize,
    /// The device's fault buffer.
    pub faults: FaultBuffer,
}

#[derive(Debug)]
struct Shared {
    tids: [AtomicU32; MOST],
    local: Mapping,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
    launch: AtomicPtr<Launch<'static>>, // while it runs
    next: AtomicUsize,
    fault: FirstFault,
    scratch: Mutex<Scratch>,
}

#[derive(Debug, Default)]
struct State {
    epoch: u64,
    busy: usize,
    started: usize,
    stop: bool,
}

/// Scratch pages, with how they were put there.
type Scratch = ScratchPages<1024>;
/// In an empty place of the window.
const FILLED: usize = 0;
/// On the process's side.
const PROCESS: usize = 1;
/// In place of a part of the window.
const REPLACED: usize = 2;

impl Workers {
    /// `count` workers that have not started.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(count: usize) -> Result<Self, Errno> {
        let shared = Shared {
            tids: [const { AtomicU32::new(0) }; MOST],
            local: own::map(c"uhmm local memory", count * LOCAL_BYTES)?,
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            done: Condvar::new(),
            launch: AtomicPtr::new(core::ptr::null_mut()),
            next: AtomicUsize::new(0),
            fault: FirstFault::default(),
            scratch: Mutex::new(Scratch::default()),
        };
        let shared = OwnBox::new(c"uhmm workers", shared)?;
        Ok(Workers { shared, threads: Mutex::new(Vec::new()), count, faults: FaultBuffer::default() })
    }

    /// Starts them.
    ///
    /// # Errors
    /// Those of starting a thread; those that did start end again with the device.
    pub fn start(&self) -> Result<(), Errno> {
        /// # Safety
        /// The argument is a `&Shared` that outlives the thread.
        unsafe extern "C" fn work(shared: *mut ()) {
            // SAFETY: by the contract.
            unsafe { &*shared.cast::<Shared>() }.work();
        }
        let mut threads = self.threads.lock();
        for index in 0..self.count {
            // SAFETY: `drop` joins the threads before the shared part goes.
            let thread = unsafe { own::spawn(c"uhmm-worker", STACK, work, (&raw const *self.shared).cast_mut().cast())? };
            self.shared.tids[index].store(thread.tid(), Ordering::Release);
            threads.push(thread);
        }
        Ok(())
    }

    /// Whether the thread is one of them.
    pub fn owns(&self, tid: u32) -> bool {
        self.shared.tids[..self.count].iter().any(|own| own.load(Ordering::Acquire) == tid)
    }

    /// Runs all groups of a launch.
    ///
    /// # Errors
    /// Its first fault.
    pub fn run(&self, window: &Window, launch: &Launch) -> Result<(), KernelFault> {
        let shared = &*self.shared;
        shared.fault.begin();
        shared.next.store(0, Ordering::Relaxed);
        shared.launch.store(core::ptr::from_ref(launch).cast_mut().cast(), Ordering::Release);
        let mut state = shared.state.lock();
        state.epoch += 1;
        state.busy = self.count;
        shared.work.notify_all();
        while state.busy > 0 {
            state = shared.done.wait(state);
        }
        drop(state);
        shared.launch.store(core::ptr::null_mut(), Ordering::Release);
        clear(&mut shared.scratch.lock(), window);
        shared.fault.end()
    }

    /// Fails the running launch, unless it has failed already.
    pub fn fail(&self, fault: KernelFault) {
        self.shared.fault.set(fault);
    }

    /// Puts a page of zeroes where a worker touched nothing. False if that cannot be.
    pub fn put_scratch(&self, uffd: &Userfaultfd, window: &Window, address: usize, in_window: bool) -> bool {
        let page = address & !(PAGE - 1);
        let mut scratch = self.shared.scratch.lock();
        if scratch.is_full() {
            clear(&mut scratch, window);
        }
        if in_window {
            match window.put_scratch(uffd, page) {
                None => return false,
                Some(crate::window::Scratch::None) => {}
                Some(crate::window::Scratch::Filled) => scratch.push(page, FILLED),
                Some(crate::window::Scratch::Replaced) => scratch.push(page, REPLACED),
            }
        } else {
            let at = Reserve { hint: page, len: PAGE, align: PAGE, name: c"uhmm scratch", prot: Prot::ReadWrite, exact: true };
            match mem::map(&at) {
                Ok(mapping) => {
                    mapping.into_raw();
                    scratch.push(page, PROCESS);
                }
                Err(Errno::EXIST) => return scratch.has(page, PROCESS), // another worker was first
                Err(_) => return false,
            }
        }
        true
    }

    /// The scratch page at this address makes room for a real one.
    pub fn forget_scratch(&self, page: usize) {
        self.shared.scratch.lock().forget(Span { start: page, end: page + PAGE });
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.lock().drain(..) {
            thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let index = {
            let mut state = self.state.lock();
            state.started += 1;
            state.started - 1
        };
        let local = (self.local.start() + index * LOCAL_BYTES) as *mut u8;
        let mut seen = 0;
        loop {
            let mut state = self.state.lock();
            while state.epoch == seen {
                if state.stop {
                    return;
                }
                state = self.work.wait(state);
            }
            seen = state.epoch;
            drop(state);
            // SAFETY: `run` keeps the launch alive until every worker has counted itself out.
            if let Some(launch) = unsafe { self.launch.load(Ordering::Acquire).as_ref() } {
                self.groups(launch, local);
            }
            let mut state = self.state.lock();
            state.busy -= 1;
            if state.busy == 0 {
                self.done.notify_all();
            }
        }
    }

    fn groups(&self, launch: &Launch, local: *mut u8) {
        loop {
            let group = self.next.fetch_add(1, Ordering::Relaxed);
            if group >= launch.groups {
                return;
            }
            // SAFETY: `run` ends when all workers have; each group number is handed out once, and this worker's scratch memory is its own.
            if let Err(fault) = unsafe { cpu::run_group(launch, group, local) } {
                self.fault.set(fault);
                self.next.store(launch.groups, Ordering::Relaxed);
            }
        }
    }
}

/// Takes all scratch pages up.
fn clear(scratch: &mut Scratch, window: &Window) {
    scratch.clear(|page, how| {
        let _ = match how {
            // SAFETY: the page was put there by `put_scratch`, and is still a scratch page, or `forget_scratch` would have taken it off.
            FILLED => unsafe { mem::madvise(page, PAGE, Advice::DontNeed) },
            // SAFETY: as above.
            PROCESS => unsafe { mem::munmap(page, PAGE) },
            _ => {
                window.take_scratch(page);
                Ok(())
            }
        };
    });
}

/// The last faults of a device, for people and policies. Entries are overwritten in a ring.
#[derive(Debug)]
pub struct FaultBuffer {
    entries: [AtomicU64; FAULTS],
    next: AtomicUsize,
}

impl Default for FaultBuffer {
    fn default() -> Self {
        FaultBuffer { entries: [const { AtomicU64::new(0) }; FAULTS], next: AtomicUsize::new(0) }
    }
}

impl FaultBuffer {
    /// Enters a fault.
    pub fn push(&self, va: usize, write: bool) {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % FAULTS;
        self.entries[index].store((va & !1) as u64 | u64::from(write), Ordering::Relaxed);
    }

    /// The last faults, newest first: address and whether it was a write.
    pub fn recent(&self) -> impl Iterator<Item = (usize, bool)> {
        let next = self.next.load(Ordering::Relaxed);
        (1..=next.min(FAULTS)).map(move |back| {
            let entry = self.entries[(next - back) % FAULTS].load(Ordering::Relaxed);
            ((entry & !1) as usize, entry & 1 != 0)
        })
    }
}
