//! Device memory: two arenas of the device's capacity each, of which only so much is ever populated. Whole units lie in the first, as huge
//! pages; units that are used in single pages lie in the second, as small ones. A frame's address is fixed; its page is there while it is not in the
//! window.
//!
//! A populated unit is registered in the device's userfaultfd, because pages come back from the window by UFFDIO_MOVE. That
//! descriptor raises SIGBUS instead of waiting, so a touch of a page that is in the window is an error, not a hang.
//!
//! A page of a coherent device may leave for good, with the program's mapping that it was in. So there a place that has lost its page gets a new one when the copy engine
//! next writes to it: the units are registered for write protection, which nobody uses, and so not for missing pages.
//!
//! No example: a part of the device, for who reads how one is made; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // populates and drops its own mappings, and moves pages into them

use crate::window;
use uhmm_core::driver::Frame;
use uhmm_core::own;
use uhmm_os::mem::{self, Advice, Mapping};
use uhmm_os::uffd::{RegisterMode, Userfaultfd};
use uhmm_os::{BLOCK, Errno, PAGE};

/// The arenas.
#[derive(Debug)]
pub struct Memory {
    arenas: [Mapping; 2],
    units: usize,
    watch: Watch,
}

/// What a populated unit is registered for. Pages come back by UFFDIO_MOVE, which wants the destination registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watch {
    /// Nothing: mremap carries the pages.
    Not,
    /// Touches of pages that are elsewhere.
    Missing,
    /// Nothing that happens.
    Writes,
}

impl Memory {
    /// Address space for `bytes` of memory.
    ///
    /// # Errors
    /// `ENOMEM` where limits refuse it.
    pub fn new(bytes: usize, watch: Watch) -> Result<Self, Errno> {
        let arena = |advice| {
            let memory = own::map(c"uhmm device memory", bytes)?;
            // SAFETY: the mapping is ours and empty. A kernel without huge pages does without the advice.
            let _ = unsafe { mem::madvise(memory.start(), bytes, advice) };
            Ok::<_, Errno>(memory)
        };
        Ok(Memory { arenas: [arena(Advice::Hugepage)?, arena(Advice::NoHugepage)?], units: bytes / BLOCK, watch })
    }

    /// Where a frame lies.
    pub fn address(&self, frame: Frame) -> usize {
        let page = frame as usize;
        let pages = self.units * (BLOCK / PAGE);
        if page < pages { self.arenas[0].start() + page * PAGE } else { self.arenas[1].start() + (page - pages) * PAGE }
    }

    fn unit(&self, unit: usize) -> usize {
        self.address((unit * (BLOCK / PAGE)) as Frame)
    }

    /// Gives a unit its pages.
    ///
    /// # Errors
    /// `ENOMEM`; those of registering.
    pub fn populate(&self, uffd: &Userfaultfd, unit: usize) -> Result<(), Errno> {
        let start = self.unit(unit);
        // SAFETY: ours, and nobody uses it yet.
        unsafe { mem::madvise(start, BLOCK, Advice::PopulateWrite)? };
        match self.watch {
            Watch::Not => Ok(()),
            Watch::Missing => uffd.register(start, BLOCK, RegisterMode::MISSING),
            Watch::Writes => uffd.register(start, BLOCK, RegisterMode::WP),
        }
    }

    /// Moves pages from memory of uhmm's into the empty places of frames: how many of them, the first ones, until the kernel refuses.
    pub fn take_back(&self, uffd: &Userfaultfd, frame: Frame, host: usize, pages: usize) -> usize {
        let Err((moved, _)) = window::move_first(uffd, self.address(frame), host, pages * PAGE, &|_| {}) else { return pages };
        moved / PAGE
    }

    /// Takes a unit's pages.
    pub fn release(&self, uffd: &Userfaultfd, unit: usize) {
        let start = self.unit(unit);
        let _ = uffd.unregister(start, BLOCK);
        // SAFETY: ours, and nobody uses it any more.
        let _ = unsafe { mem::madvise(start, BLOCK, Advice::DontNeed) };
    }
}
