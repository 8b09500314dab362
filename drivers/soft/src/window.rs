//! The device's page table: where workers see the process's memory.
//!
//! Its addresses are those of a [`WindowSpace`]. It belongs to a userfaultfd that raises SIGBUS in who touches a page that is not there. Without userfaultfd it is inaccessible where nothing is mapped, and
//! mremap carries the pages (`remap`).
//!
//! No example: a part of the device, for who reads how one is made; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // moves pages between the device's own mappings

use crate::memory::Memory;
use crate::remap;
use uhmm_core::driver::MapRun;
use uhmm_core::driver::window::WindowSpace;
use uhmm_core::page::Span;
use uhmm_os::mem::{self, Advice, Prot, RemapFlags, Reserve};
use uhmm_os::uffd::{MoveMode, RegisterMode, Userfaultfd};
use uhmm_os::{Errno, PAGE, tasks, thread};

/// How a scratch page was put down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scratch {
    /// The access can be repeated without one.
    None,
    /// In an empty place of the window.
    Filled,
    /// In place of a part of the window.
    Replaced,
}

/// The window of one device.
#[derive(Debug)]
pub struct Window {
    space: WindowSpace,
    /// Pages come and go by UFFDIO_MOVE; else by mremap.
    watched: bool,
}

impl Window {
    /// A window in this space.
    pub fn new(space: WindowSpace, watched: bool) -> Self {
        Window { space, watched }
    }

    /// Whether pages come and go by UFFDIO_MOVE.
    pub fn watched(&self) -> bool {
        self.watched
    }

    /// Whether `address` is where workers see something of the process.
    pub fn contains(&self, address: usize) -> bool {
        self.space.contains(address)
    }

    fn at(&self, va: usize) -> usize {
        self.space.at(va)
    }

    /// Makes the window for all blocks that `span` touches.
    ///
    /// # Errors
    /// `EEXIST` if something of the program's lies there; `ENOMEM`.
    pub fn open(&self, uffd: &Userfaultfd, span: Span) -> Result<(), Errno> {
        self.space.open(span, |new| self.ready(uffd, new.start(), new.len()))
    }

    /// Puts a second mapping of a shared one into the window.
    ///
    /// # Errors
    /// Those of mremap(2).
    pub fn share(&self, uffd: &Userfaultfd, span: Span) -> Result<(), Errno> {
        self.open(uffd, span)?;
        let at = self.at(span.start);
        // SAFETY: an old length of 0 makes a second mapping and leaves the first alone; what is replaced is the window's, where the directory has no page, for
        // such memory never migrates.
        unsafe { mem::mremap(span.start, 0, span.len(), RemapFlags::MAYMOVE | RemapFlags::FIXED, at)? };
        // SAFETY: the window's part is ours, and neither changes contents.
        unsafe {
            let _ = mem::madvise(at, span.len(), Advice::DontDump);
            mem::madvise(at, span.len(), Advice::DontFork)
        }
    }

    /// Makes the window empty again where it had a second mapping.
    pub fn unshare(&self, uffd: &Userfaultfd, span: Span) {
        // A block without a window was closed as a whole.
        for part in span.blocks().filter(|part| self.space.is_open(part.start)) {
            let at = self.at(part.start);
            // Without addresses the device's accesses fail there; no data is lost.
            // SAFETY: the window is ours, and no kernel runs that uses what has gone from the process.
            let _ = unsafe { mem::vacate(at, part.len(), c"uhmm window") }.and_then(|()| self.ready(uffd, at, part.len()));
        }
    }

    /// Makes a new, inaccessible part of the window one that workers can use.
    fn ready(&self, uffd: &Userfaultfd, at: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: the mapping is ours and empty. A kernel without huge pages does without the advice.
        let _ = unsafe { mem::madvise(at, len, Advice::Hugepage) };
        if self.watched {
            uffd.register(at, len, RegisterMode::MISSING | RegisterMode::WP)?;
            // Only now, for a worker may be waiting to touch it: before, the kernel would have given it a page of zeroes.
            // SAFETY: as above.
            unsafe { mem::mprotect(at, len, Prot::ReadWrite) }?;
        }
        Ok(())
    }

    /// Unmaps the window of all blocks that lie wholly in `span`. Nothing of them is mapped for the device any more.
    pub fn close(&self, span: Span) {
        self.space.close(span);
    }

    /// Moves pages from the arena into the window. `unscratch` is told of pages where a scratch page makes room.
    ///
    /// # Errors
    /// As [`open`](Self::open); those of UFFDIO_MOVE.
    pub fn map(&self, uffd: &Userfaultfd, memory: &Memory, batch: &[MapRun], unscratch: impl Fn(usize)) -> Result<(), Errno> {
        for (index, run) in batch.iter().enumerate() {
            let len = run.pages * PAGE;
            let at = self.at(run.va);
            let from = memory.address(run.frame);
            let entered = self.open(uffd, run.span()).and_then(|()| {
                if self.watched { move_all(uffd, at, from, len, &unscratch) } else { remap::enter(at, from, len, run.write) }
            });
            let protected = match entered {
                // SAFETY: the window is ours.
                Ok(()) if self.watched && !run.write => unsafe { uffd.write_protect(at, len, true) },
                _ => Ok(()),
            };
            if let Err(e) = entered.and(protected) {
                self.unmap(uffd, memory, &batch[..index + usize::from(entered.is_ok())]);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Lets workers write mapped pages.
    pub fn allow_writes(&self, uffd: &Userfaultfd, batch: &[MapRun]) {
        for run in batch {
            if !self.watched {
                remap::allow_writes(self.at(run.va), run.pages * PAGE);
                continue;
            }
            // SAFETY: the window is ours.
            let _ = unsafe { uffd.write_protect(self.at(run.va), run.pages * PAGE, false) };
        }
    }

    /// Takes the right to write from mapped pages: where they can be read.
    pub fn protect(&self, uffd: &Userfaultfd, run: MapRun) -> Option<usize> {
        let at = self.at(run.va);
        // SAFETY: the window is ours, and contents do not change. The kernel has flushed every core's view of the pages when it returns.
        (self.watched && unsafe { uffd.write_protect(at, run.pages * PAGE, true) }.is_ok()).then_some(at)
    }

    /// Puts a page of zeroes where the window has none. `None` if that cannot be.
    pub fn put_scratch(&self, uffd: &Userfaultfd, page: usize) -> Option<Scratch> {
        if !self.watched {
            // SAFETY: the window is ours, and has nothing here.
            return unsafe { mem::replace(page, PAGE, c"uhmm scratch") }.is_ok().then_some(Scratch::Replaced);
        }
        match uffd.zeropage(page, PAGE) {
            Ok(()) => Some(Scratch::Filled),
            // Somebody was first: the access is repeated.
            Err(partial) if matches!(partial.errno, Errno::EXIST | Errno::AGAIN) => Some(Scratch::None),
            // A second mapping, of which the process has no page here, or not for that; or the window has just been closed.
            // SAFETY: the window's part is ours; the pages of a second mapping stay the first one's.
            Err(_) => unsafe { mem::replace(page, PAGE, c"uhmm scratch") }.is_ok().then_some(Scratch::Replaced),
        }
    }

    /// Takes a scratch page up that stands in place of a part of the window.
    pub fn take_scratch(&self, page: usize) {
        // SAFETY: put there by `put_scratch`.
        let _ = unsafe { mem::munmap(page, PAGE) };
        if !self.watched {
            let window = Reserve { hint: page, len: PAGE, align: PAGE, name: c"uhmm window", prot: Prot::None, exact: true };
            let _ = mem::map(&window).map(|mapping| mapping.into_raw());
        }
    }

    /// Moves pages back from the window into the arena.
    pub fn unmap(&self, uffd: &Userfaultfd, memory: &Memory, batch: &[MapRun]) {
        for run in batch {
            let (to, from, len) = (memory.address(run.frame), self.at(run.va), run.pages * PAGE);
            let moved = if self.watched { move_all(uffd, to, from, len, &|_| {}) } else { remap::leave(to, from, len) };
            if moved.is_err() {
                // The directory and the window disagree: going on would hand a frame out whose contents are somewhere else.
                tasks::write_stderr(b"uhmm: a page is missing from a device's page table; stopping before data is lost\n");
                std::process::abort();
            }
        }
    }
}

/// How often a page that is held is tried again.
const BUSY: usize = 10_000;

/// Moves pages between the device's own mappings, all or none. A scratch page in the way goes.
fn move_all(uffd: &Userfaultfd, to: usize, from: usize, len: usize, unscratch: &dyn Fn(usize)) -> Result<(), Errno> {
    let Err((moved, errno)) = move_first(uffd, to, from, len, unscratch) else { return Ok(()) };
    // SAFETY: both ranges are the device's own; what has moved goes back to where it was. If the kernel refuses that too, the window has pages that nothing tells of, and
    // that lie in the way of the next move there: it finds them as it finds scratch pages.
    let _ = unsafe { uffd.move_pages(from, to, moved, MoveMode::empty()) };
    Err(errno)
}

/// As `move_all`, but what has moved stays moved: an error says how many bytes, the first ones, that are.
pub(crate) fn move_first(uffd: &Userfaultfd, to: usize, from: usize, len: usize, unscratch: &dyn Fn(usize)) -> Result<(), (usize, Errno)> {
    let mut done = 0;
    let mut busy = 0;
    while done < len {
        // SAFETY: both ranges are the device's own, and the directory's lock on the block keeps others from them.
        let Err(partial) = (unsafe { uffd.move_pages(to + done, from + done, len - done, MoveMode::empty()) }) else { break };
        done += partial.done;
        match partial.errno {
            Errno::AGAIN => thread::yield_now(),
            // Somebody holds the page for a moment (the kernel's own compaction, a reader of our memory from outside).
            Errno::BUSY if busy < BUSY => {
                busy += 1;
                thread::yield_now();
            }
            Errno::EXIST if busy < BUSY => {
                busy += 1;
                unscratch(to + done);
                // SAFETY: what lies in the window where the directory has no page is a scratch page.
                let _ = unsafe { mem::madvise(to + done, PAGE, Advice::DontNeed) };
            }
            errno => return Err((done, errno)),
        }
    }
    Ok(())
}
