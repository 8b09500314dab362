//! Device memory: two arenas of the device's capacity each, of which only so much is ever populated. Whole units lie in the first, as huge
//! pages; units that are used in single pages lie in the second, as small ones. A frame's address is fixed; its page is there while it is not in the
//! window.
//!
//! A populated unit is registered in the device's userfaultfd, because pages come back from the window by UFFDIO_MOVE. That
//! descriptor raises SIGBUS instead of waiting, so a touch of a page that is in the window is an error, not a hang.
#![allow(unsafe_code)] // populates and drops its own mappings

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
    /// Pages go to the window and back by UFFDIO_MOVE, which wants the destination registered.
    watched: bool,
}

impl Memory {
    /// Address space for `bytes` of memory.
    ///
    /// # Errors
    /// `ENOMEM` where limits refuse it.
    pub fn new(bytes: usize, watched: bool) -> Result<Self, Errno> {
        let arena = |advice| {
            let memory = own::map(c"uhmm device memory", bytes)?;
            // SAFETY: the mapping is ours and empty. A kernel without huge pages does without the advice.
            let _ = unsafe { mem::madvise(memory.start(), bytes, advice) };
            Ok::<_, Errno>(memory)
        };
        Ok(Memory { arenas: [arena(Advice::Hugepage)?, arena(Advice::NoHugepage)?], units: bytes / BLOCK, watched })
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
        if self.watched { uffd.register(start, BLOCK, RegisterMode::MISSING) } else { Ok(()) }
    }

    /// Takes a unit's pages.
    pub fn release(&self, uffd: &Userfaultfd, unit: usize) {
        let start = self.unit(unit);
        let _ = uffd.unregister(start, BLOCK);
        // SAFETY: ours, and nobody uses it any more.
        let _ = unsafe { mem::madvise(start, BLOCK, Advice::DontNeed) };
    }
}
