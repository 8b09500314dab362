//! Pages that come home one fault at a time: who serves the fault, how, and how much each brings.
//!
//! Each run reads one byte of every page of the range, all of which are away. Afterwards, outside the clock, everything is taken
//! away again. A floor that fails in the middle stops watching its range, so that nobody waits for ever: the reader then sees zeros
//! and the run ends with the first error.

use crate::copy::stream;
use crate::memory::{BLOCK, PAGE, Pages, Region};
use crate::pair::together;
use crate::sigbus;
use crate::uffd::Uffd;
use crate::{Error, Result};
use core::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Who serves a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// A thread that reads the userfaultfd, wherever the scheduler puts it.
    Handler,
    /// Such a thread on the core of the one that faults.
    HandlerSameCore,
    /// The thread that faults (`UFFD_FEATURE_SIGBUS`).
    Itself,
    /// Two threads, each for the faults of its own half.
    TwoThemselves,
}

impl Server {
    fn itself(self) -> bool {
        matches!(self, Server::Itself | Server::TwoThemselves)
    }
}

/// How the bytes of a fault come home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `UFFDIO_COPY`: the kernel allocates a page and copies.
    Copy,
    /// A copy into pages that are already there, which `UFFDIO_MOVE` then puts in place.
    Move,
}

/// What serves a fault; the SIGBUS handler has its address.
#[derive(Debug)]
pub(crate) struct Core {
    // The descriptor first: it is closed before the regions it watches are unmapped.
    uffd: Uffd,
    host: Region,
    staging: Region,
    device: Region,
    chunk: usize,
    method: Method,
    failed: AtomicI32,
    /// What the device's bytes are marked with in this run.
    salt: AtomicU8,
}

impl Core {
    /// Brings the chunk home that holds `address`; `false` if it is not in the range. Safe in a signal handler.
    pub(crate) fn serve(&self, address: usize) -> bool {
        let Some(at) = address.checked_sub(self.host.at(0) as usize).filter(|&at| at < self.host.size()) else {
            return false;
        };
        let at = at - at % self.chunk;
        let (to, staging, device) = (self.host.at(at), self.staging.at(at), self.device.at(at));
        let served = match self.method {
            // SAFETY: all three lie in regions of this floor, which end on a chunk; the staging pages are spare. Threads that
            // serve at the same time serve different chunks: a run gives each its own half, cut at a chunk.
            Method::Move => unsafe {
                stream(staging, device, self.chunk);
                self.uffd.move_pages(to, staging, self.chunk)
            },
            // SAFETY: as above.
            Method::Copy => unsafe { self.uffd.copy(to, device, self.chunk) },
        };
        if let Err(errno) = served
            && errno != libc::EEXIST
        {
            self.failed.store(errno, Ordering::Relaxed);
            self.uffd.unregister(self.host.at(0), self.host.size());
        }
        true
    }

    /// Serves faults until the last chunk is home.
    fn serve_all(&self) {
        let last = self.host.at(self.host.size() - self.chunk) as usize;
        while let Some(address) = self.uffd.next_fault() {
            self.serve(address);
            if address >= last || self.failed.load(Ordering::Relaxed) != 0 {
                return;
            }
        }
        self.failed.store(libc::EIO, Ordering::Relaxed);
        self.uffd.unregister(self.host.at(0), self.host.size());
    }

    /// Reads every page in `from..to`, which brings it home, and checks that it is this run's.
    fn check(&self, from: usize, to: usize) -> Result<()> {
        self.host.check(from, to, self.salt.load(Ordering::Relaxed))
    }

    /// Takes every page away again.
    fn take_away(&self) -> Result<()> {
        match self.method {
            Method::Copy => self.host.discard(),
            Method::Move => self.uffd.move_region(&self.staging, &self.host),
        }
    }
}

/// The floor of a CPU fault on memory that a device has.
#[derive(Debug)]
pub struct Fault {
    core: Box<Core>,
    server: Server,
}

impl Fault {
    /// Maps, touches and registers everything. `chunk` is what one fault brings, in bytes: 4 KiB to 2 MiB, a power of two. Huge
    /// pages can only come in chunks of 2 MiB, and arrive as such only by [`Method::Move`].
    ///
    /// # Errors
    /// If `size`, in bytes, is not a positive multiple of 2 MiB, memory is short, or there is no right to use userfaultfd.
    ///
    /// # Panics
    /// If `chunk` is none of those sizes, or smaller than the pages.
    pub fn prepare(size: usize, server: Server, method: Method, chunk: usize, pages: Pages) -> Result<Self> {
        assert!(chunk.is_power_of_two() && (PAGE..=BLOCK).contains(&chunk), "a chunk has 4 KiB to 2 MiB, a power of two");
        assert!(pages == Pages::Small || chunk == BLOCK, "huge pages come in chunks of 2 MiB");
        let staging = match method {
            Method::Move => Region::full(size, pages)?,
            Method::Copy => Region::empty(size, pages)?,
        };
        let core = Core {
            uffd: Uffd::open(server.itself())?,
            host: Region::empty(size, pages)?,
            staging,
            device: Region::full(size, Pages::Huge)?,
            chunk,
            method,
            failed: AtomicI32::new(0),
            salt: AtomicU8::new(0),
        };
        core.uffd.watch(&core.host)?;
        core.uffd.watch(&core.staging)?;
        Ok(Fault { core: Box::new(core), server })
    }

    /// The number of faults in one run.
    pub fn faults(&self) -> usize {
        self.core.host.size() / self.core.chunk
    }

    /// Reads every page home once.
    ///
    /// # Errors
    /// If the kernel refuses a request, or wrong bytes come home. The floor is of no more use then.
    pub fn run(&mut self) -> Result<Duration> {
        let core = &*self.core;
        core.device.mark(core.salt.fetch_add(1, Ordering::Relaxed).wrapping_add(1));
        let result = match self.server {
            Server::Handler => with_handler(core),
            Server::HandlerSameCore => {
                let _pinned = Pinned::to_one_core()?;
                with_handler(core)
            }
            Server::Itself => {
                let _installed = sigbus::install(core)?;
                read_home(core, 0, core.host.size())
            }
            Server::TwoThemselves => {
                let _installed = sigbus::install(core)?;
                two_themselves(core)
            }
        };
        match core.failed.load(Ordering::Relaxed) {
            0 => {}
            errno if core.method == Method::Move => return Err(Error::of("UFFDIO_MOVE", errno)),
            errno => return Err(Error::of("UFFDIO_COPY", errno)),
        }
        let taken = result?;
        core.take_away()?;
        Ok(taken)
    }
}

fn read_home(core: &Core, from: usize, to: usize) -> Result<Duration> {
    let start = Instant::now();
    core.check(from, to)?;
    Ok(start.elapsed())
}

fn with_handler(core: &Core) -> Result<Duration> {
    std::thread::scope(|scope| {
        scope.spawn(|| core.serve_all());
        let taken = read_home(core, 0, core.host.size());
        if taken.is_err() {
            // The handler thread ends with the last chunk: ask for it.
            let _ = core.check(core.host.size() - PAGE, core.host.size());
        }
        taken
    })
}

fn two_themselves(core: &Core) -> Result<Duration> {
    let half = (core.host.size() / 2).next_multiple_of(core.chunk);
    together(|| core.check(0, half), || core.check(half, core.host.size()))
}

/// This thread on one of the cores it may use; dropping it gives the others back.
struct Pinned {
    before: libc::cpu_set_t,
}

impl Pinned {
    fn to_one_core() -> Result<Self> {
        // SAFETY: all zeros is the empty set.
        let (mut before, mut one): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { (core::mem::zeroed(), core::mem::zeroed()) };
        let size = size_of::<libc::cpu_set_t>();
        // SAFETY: `before` has `size` bytes.
        if unsafe { libc::sched_getaffinity(0, size, &raw mut before) } != 0 {
            return Err(Error::last("sched_getaffinity"));
        }
        // SAFETY: these macros stay within the set for numbers below CPU_SETSIZE.
        let core = (0..libc::CPU_SETSIZE as usize).find(|&core| unsafe { libc::CPU_ISSET(core, &before) }).unwrap_or(0);
        // SAFETY: as above.
        unsafe { libc::CPU_SET(core, &mut one) };
        // SAFETY: `one` has `size` bytes.
        match unsafe { libc::sched_setaffinity(0, size, &raw const one) } {
            0 => Ok(Pinned { before }),
            _ => Err(Error::last("sched_setaffinity")),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the set that sched_getaffinity reported.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const self.before) };
    }
}
