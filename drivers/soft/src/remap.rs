//! The device's page table without userfaultfd: mremap carries pages between the arena and the window, and the window is inaccessible where it has none.
//!
//! Used only while no kernel runs: entering and leaving take several calls each. Every run of pages costs two of the process's mappings.
#![allow(unsafe_code)] // moves pages between the device's own mappings

use uhmm_os::Errno;
use uhmm_os::mem::{self, Prot, RemapFlags};

/// Carries pages, and leaves both ranges mapped.
fn carry(to: usize, from: usize, len: usize) -> Result<(), Errno> {
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED | RemapFlags::DONTUNMAP;
    // SAFETY: both ranges are the device's own; what was at `to` holds nothing, as the directory says.
    unsafe { mem::mremap(from, len, len, flags, to) }.map(|_| ())
}

/// Carries pages from the arena into the window.
///
/// # Errors
/// `ENOMEM`: the process has too many mappings. The pages are in the arena then.
pub(crate) fn enter(window: usize, arena: usize, len: usize, write: bool) -> Result<(), Errno> {
    // First, for the pages take it along, and once they are in the window nothing may fail.
    // SAFETY: the arena is the device's own, and nothing is copied to these frames now.
    let protect = |prot| unsafe { mem::mprotect(arena, len, prot) };
    if !write {
        protect(Prot::Read)?;
    }
    carry(window, arena, len).inspect_err(|_| {
        let _ = protect(Prot::ReadWrite);
    })
}

/// Carries pages from the window back into the arena.
///
/// # Errors
/// As [`enter`].
pub(crate) fn leave(arena: usize, window: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the window is the device's own. First, so that nothing can be touched in what stays behind.
    unsafe { mem::mprotect(window, len, Prot::None) }?;
    carry(arena, window, len)?;
    // SAFETY: as above, for the arena.
    unsafe { mem::mprotect(arena, len, Prot::ReadWrite) }
}

/// Makes pages of the window writable.
pub(crate) fn allow_writes(window: usize, len: usize) {
    // SAFETY: the window is the device's own.
    let _ = unsafe { mem::mprotect(window, len, Prot::ReadWrite) };
}
