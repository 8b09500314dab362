//! Changes of the process's mappings that mirrors are told of before they happen.
//!
//! The same as the system calls of that name, for programs with mirrors. The kernel announces `munmap` and `mremap` when they have happened, just before they
//! return, and `mprotect` never; made through these functions every mirror has acknowledged its invalidation before anything changes, and none looks at the range
//! until the change has been made. Without a mirror they are the plain calls.
//!
//! They may be called from any thread but a notifier's.
//!
//! ```
//! use uhmm_core::mirror::change::{self, Prot};
//! use uhmm_os::{Errno, PAGE};
//!
//! fn seal(start: usize) -> Result<(), Errno> {
//!     // SAFETY: whoever calls this owns the page and writes to it no more.
//!     unsafe { change::protect(start, PAGE, Prot::Read) } // no mirror's device writes to it any more, either
//! }
//! ```

use super::Reason;
use crate::core::Core;
use crate::page::{Span, Va};
use crate::process;
use uhmm_os::mem::{self, Advice, RemapFlags};
use uhmm_os::{Errno, PAGE};

pub use uhmm_os::mem::Prot;

/// Sets what may be done with a range of whole pages (mprotect(2)), [`Reason::Protect`].
///
/// # Errors
/// Those of mprotect(2): `ENOMEM`: part of the range is not mapped, or there are too many mappings; `EACCES`; `EINVAL` for an address that is not page-aligned.
///
/// # Safety
/// As mprotect(2): nobody relies on an access that is taken away, nor on the absence of one that is given.
pub unsafe fn protect(start: Va, len: usize, prot: Prot) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    announced(start, len, Reason::Protect, move || unsafe { mem::mprotect(start, len, prot) })
}

/// Unmaps a range of whole pages (munmap(2)), [`Reason::Unmap`].
///
/// # Errors
/// Those of munmap(2): `EINVAL` for an unaligned or empty range; `ENOMEM`: too many mappings.
///
/// # Safety
/// As munmap(2): nobody uses that memory any more.
pub unsafe fn unmap(start: Va, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    announced(start, len, Reason::Unmap, move || unsafe { mem::munmap(start, len) })
}

/// Drops the contents of a range of whole pages (`MADV_DONTNEED`), [`Reason::Discard`]: private anonymous memory reads as zeros then.
///
/// # Errors
/// Those of madvise(2): `ENOMEM`: part of the range is not mapped; `EINVAL`: it is not page-aligned, or locked.
///
/// # Safety
/// As madvise(2): nobody relies on the contents.
pub unsafe fn discard(start: Va, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    announced(start, len, Reason::Discard, move || unsafe { mem::madvise(start, len, Advice::DontNeed) })
}

/// Moves a mapping to an address where nothing is mapped, or what is there is replaced (mremap(2) with `MREMAP_FIXED`), [`Reason::Remap`].
///
/// # Errors
/// Those of mremap(2).
///
/// # Safety
/// As mremap(2): nobody uses the old range any more, and nobody needs what is replaced.
pub unsafe fn remap(start: Va, len: usize, to: Va) -> Result<(), Errno> {
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    // SAFETY: the caller's promise.
    announced(start, len, Reason::Remap { to }, move || unsafe { mem::mremap(start, len, len, flags, to) }.map(|_| ()))
}

/// Makes a change, on the keeper: there its announcements need no memory that could be away.
fn announced(start: Va, len: usize, reason: Reason, change: impl FnOnce() -> Result<(), Errno> + Send) -> Result<(), Errno> {
    let end = start.checked_add(len).ok_or(Errno::INVAL)?;
    let span = Span { start: start & !(PAGE - 1), end: end.checked_next_multiple_of(PAGE).ok_or(Errno::INVAL)? };
    let mut change = Some(change);
    let mut make = || change.take().map_or(Err(Errno::INVAL), |change| change());
    if !crate::core::current().is_some_and(|core| core.space.mirrors.any()) {
        return make();
    }
    let Ok(held) = process::lock() else { return make() };
    let asked = held.ask_keeper(|core: &Core| {
        core.space.mirrors.begin(span, reason);
        let made = make();
        // The call returns when its event is read. Once it is followed too, what it tells is known to be about this change.
        drop(core.space.hold());
        core.space.mirrors.end(span);
        made
    });
    asked.unwrap_or(Err(Errno::SRCH))
}
