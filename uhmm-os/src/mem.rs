//! Memory of the process: mmap(2), mremap(2), madvise(2), mprotect(2), munmap(2), names.
//!
//! Memory that uhmm itself maps ([`map`]) is private, anonymous, not inherited by a fork, left out of core dumps, not committed
//! until touched, and named, so that `/proc/self/maps` tells whose it is. Everything here is raw system calls; what is marked so is
//! *Fault path*.
//!
//! Who uses it: `uhmm-core` and drivers. A driver takes memory for its own state from `uhmm_core::own`, which knows where to put it.
//!
//! ```
//! use uhmm_os::mem::{self, Advice, Prot, Reserve};
//! use uhmm_os::BLOCK;
//!
//! let memory = mem::map(&Reserve { hint: 0, len: 4 * BLOCK, align: BLOCK, name: c"example", prot: Prot::ReadWrite, exact: false })?;
//! assert_eq!(memory.start() % BLOCK, 0);
//! // SAFETY: it is ours; nobody relies on its contents.
//! unsafe {
//!     memory.as_ptr().write(1);
//!     mem::madvise(memory.start(), BLOCK, Advice::DontNeed)?; // a block that reads as zeros again
//!     assert_eq!(memory.as_ptr().read(), 0);
//!     mem::mprotect(memory.start() + BLOCK, BLOCK, Prot::None)?;
//! }
//! drop(memory); // unmapped
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

use crate::syscall::{abi, call};
use crate::{Errno, PAGE};
use bitflags::bitflags;
use core::ffi::CStr;

/// The step between tries of a hint.
const STEP: usize = 1 << 30;
const TRIES: usize = 64;

/// What may be done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prot {
    /// Nothing.
    None,
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
    /// Read and execute it.
    ReadExec,
    /// All of that.
    ReadWriteExec,
}

impl Prot {
    pub(crate) fn bits(self) -> usize {
        let bits = match self {
            Prot::None => abi::PROT_NONE,
            Prot::Read => abi::PROT_READ,
            Prot::ReadWrite => abi::PROT_READ | abi::PROT_WRITE,
            Prot::ReadExec => abi::PROT_READ | abi::PROT_EXEC,
            Prot::ReadWriteExec => abi::PROT_READ | abi::PROT_WRITE | abi::PROT_EXEC,
        };
        bits as usize
    }
}

/// What to map, and where.
#[derive(Clone, Copy, Debug)]
pub struct Reserve<'a> {
    /// Where it should start; 0: anywhere. Rounded up to `align` unless `exact`.
    pub hint: usize,
    /// Bytes, rounded up to pages.
    pub len: usize,
    /// Alignment: a power of two; a page at least.
    pub align: usize,
    /// The name that `/proc/self/maps` shows, in `[anon:...]`: printable, none of ``[ ] \ $ ` ``, at most 79 bytes.
    pub name: &'a CStr,
    /// What may be done to it.
    pub prot: Prot,
    /// Map at `hint` or fail.
    pub exact: bool,
}

/// A private anonymous mapping, unmapped when it is dropped.
#[derive(Debug)]
pub struct Mapping {
    start: usize,
    len: usize,
}

impl Mapping {
    /// First address.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> usize {
        self.len
    }

    /// One past the last address.
    pub fn end(&self) -> usize {
        self.start + self.len
    }

    /// Its first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start as *mut u8
    }

    /// Gives the memory up without unmapping it: start and bytes.
    pub fn into_raw(self) -> (usize, usize) {
        let me = core::mem::ManuallyDrop::new(self);
        (me.start, me.len)
    }

    /// Takes memory over, to unmap it when dropped.
    ///
    /// # Safety
    /// It must be whole pages, mapped, and owned by nobody else.
    pub unsafe fn from_raw(start: usize, len: usize) -> Self {
        Mapping { start, len }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone. Failure (too many mappings, when this splits one) leaves it mapped, which harms nobody.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// Maps memory as [`Reserve`] says.
///
/// A hint that is taken is followed by up to 64 tries upwards, a length (rounded up to 1 GiB) apart, and then by any place;
/// unless it is `exact`.
///
/// # Errors
/// `EINVAL`: no length, or an alignment that is no power of two, or an exact address that is not aligned; `EEXIST`: the exact place
/// is taken; `ENOMEM`: no address space or mappings left, a limit (RLIMIT_AS), or strict overcommit (vm.overcommit_memory=2);
/// `EAGAIN`: memory is locked (mlockall) and the limit for that is reached.
pub fn map(reserve: &Reserve<'_>) -> Result<Mapping, Errno> {
    let align = reserve.align.max(PAGE);
    let len = reserve.len.checked_next_multiple_of(PAGE).ok_or(Errno::INVAL)?;
    if len == 0 || !align.is_power_of_two() {
        return Err(Errno::INVAL);
    }
    let mapping = place(reserve, len, align)?;
    // SAFETY: fresh memory of ours, not inherited, dumped or (should mlockall have locked it, which fills it once it is accessible)
    // locked. All of it is best effort but for the fork: a child must not hold what threads that it lacks would serve.
    unsafe {
        let _ = call(abi::__NR_munlock, [mapping.start, len]);
        madvise(mapping.start, len, Advice::DontFork)?;
        let _ = madvise(mapping.start, len, Advice::DontDump);
        if reserve.prot != Prot::None {
            mprotect(mapping.start, len, reserve.prot)?;
        }
    }
    name(mapping.start, len, reserve.name);
    Ok(mapping)
}

/// Maps zeroed memory over whatever is there, not inherited by a fork's child.
///
/// # Errors
/// Those of mmap(2).
///
/// # Safety
/// What is there is the caller's, and nobody needs its contents.
pub unsafe fn replace(start: usize, len: usize, label: &CStr) -> Result<(), Errno> {
    // SAFETY: handed on.
    unsafe { map_over(start, len, Prot::ReadWrite)? };
    // SAFETY: fresh memory, and no contents change.
    unsafe { madvise(start, len, Advice::DontFork)? };
    name(start, len, label);
    Ok(())
}

/// Makes a range inaccessible in one step, whatever is there: a thread that uses it sees what was there, or faults, and nothing else; the old pages' translations are
/// flushed on every core when it returns. The addresses stay taken. Not inherited by a fork's child, unless the kernel refuses that. *Fault path.*
///
/// # Errors
/// Those of mmap(2): `ENOMEM`: too many mappings.
///
/// # Safety
/// As [`replace`].
pub unsafe fn vacate(start: usize, len: usize, label: &CStr) -> Result<(), Errno> {
    // SAFETY: handed on.
    unsafe { map_over(start, len, Prot::None)? };
    // SAFETY: fresh memory, and no contents change. If it fails, for the process has too many mappings, a child has the same nothing there.
    let _ = unsafe { madvise(start, len, Advice::DontFork) };
    name(start, len, label);
    Ok(())
}

/// # Safety
/// As [`replace`].
unsafe fn map_over(start: usize, len: usize, prot: Prot) -> Result<(), Errno> {
    let flags = abi::MAP_PRIVATE | abi::MAP_ANONYMOUS | abi::MAP_NORESERVE | abi::MAP_FIXED;
    // SAFETY: the caller owns what is replaced.
    unsafe { call(abi::__NR_mmap, [start, len, prot.bits(), flags as usize, usize::MAX, 0]) }.map(|_| ())
}

fn place(reserve: &Reserve<'_>, len: usize, align: usize) -> Result<Mapping, Errno> {
    if reserve.exact {
        return if reserve.hint.is_multiple_of(align) { map_at(reserve.hint, len) } else { Err(Errno::INVAL) };
    }
    if reserve.hint != 0 {
        let step = len.checked_next_multiple_of(STEP.max(align)).ok_or(Errno::NOMEM)?;
        let mut at = reserve.hint.checked_next_multiple_of(align);
        for _ in 0..TRIES {
            let Some(here) = at else { break };
            match map_at(here, len) {
                Ok(mapping) => return Ok(mapping),
                Err(Errno::EXIST | Errno::NOMEM) => at = here.checked_add(step),
                Err(e) => return Err(e),
            }
        }
    }
    map_anywhere(len, align)
}

fn map_at(start: usize, len: usize) -> Result<Mapping, Errno> {
    let mapping = mmap(start, len, abi::MAP_FIXED_NOREPLACE)?;
    // Kernels before 4.17 take the address as a hint only.
    if mapping.start == start { Ok(mapping) } else { Err(Errno::EXIST) }
}

fn map_anywhere(len: usize, align: usize) -> Result<Mapping, Errno> {
    let (at, room) = mmap(0, len.checked_add(align - PAGE).ok_or(Errno::NOMEM)?, 0)?.into_raw();
    let start = at.next_multiple_of(align);
    let (before, after) = (start - at, at + room - (start + len));
    // SAFETY: the parts before and after are ours and unused.
    unsafe {
        if before != 0 {
            let _ = munmap(at, before);
        }
        if after != 0 {
            let _ = munmap(start + len, after);
        }
    }
    Ok(Mapping { start, len })
}

/// Inaccessible at first: a process that locks its memory would otherwise fill it at once.
fn mmap(start: usize, len: usize, flags: u32) -> Result<Mapping, Errno> {
    let flags = flags | abi::MAP_PRIVATE | abi::MAP_ANONYMOUS | abi::MAP_NORESERVE;
    // SAFETY: without MAP_FIXED nothing that is mapped is replaced.
    let start = unsafe { call(abi::__NR_mmap, [start, len, Prot::None.bits(), flags as usize, usize::MAX, 0]) }?;
    Ok(Mapping { start, len })
}

/// Names anonymous memory in `/proc/self/maps`; does nothing where the kernel cannot (before 5.17, or without
/// `CONFIG_ANON_VMA_NAME`).
pub fn name(start: usize, len: usize, name: &CStr) {
    let (option, what) = (linux_raw_sys::prctl::PR_SET_VMA, linux_raw_sys::prctl::PR_SET_VMA_ANON_NAME);
    // SAFETY: a name changes no memory; the string ends in a zero.
    let _ = unsafe { call(abi::__NR_prctl, [option as usize, what as usize, start, len, name.as_ptr() as usize]) };
}

/// What madvise(2) is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Use huge pages where they fit.
    Hugepage,
    /// Do not use huge pages.
    NoHugepage,
    /// Drop the pages: private anonymous memory reads as zeros.
    DontNeed,
    /// The same, for locked memory too. Linux 5.18.
    DontNeedLocked,
    /// Drop the pages when memory is short, unless they are written before.
    Free,
    /// Put blocks together into huge pages now. Linux 6.1.
    Collapse,
    /// Fault the pages in for reading. Linux 5.14.
    PopulateRead,
    /// Fault the pages in for writing. Linux 5.14.
    PopulateWrite,
    /// A fork's child does not get it.
    DontFork,
    /// A fork's child gets it.
    DoFork,
    /// Leave it out of core dumps.
    DontDump,
    /// Drop the pages and what backs them (shared memory).
    Remove,
    /// They will be touched in no order.
    Random,
}

impl Advice {
    fn bits(self) -> usize {
        let bits = match self {
            Advice::Hugepage => abi::MADV_HUGEPAGE,
            Advice::NoHugepage => abi::MADV_NOHUGEPAGE,
            Advice::DontNeed => abi::MADV_DONTNEED,
            Advice::DontNeedLocked => abi::MADV_DONTNEED_LOCKED,
            Advice::Free => abi::MADV_FREE,
            Advice::Collapse => abi::MADV_COLLAPSE,
            Advice::PopulateRead => abi::MADV_POPULATE_READ,
            Advice::PopulateWrite => abi::MADV_POPULATE_WRITE,
            Advice::DontFork => abi::MADV_DONTFORK,
            Advice::DoFork => abi::MADV_DOFORK,
            Advice::DontDump => abi::MADV_DONTDUMP,
            Advice::Remove => abi::MADV_REMOVE,
            Advice::Random => abi::MADV_RANDOM,
        };
        bits as usize
    }
}

/// madvise(2). *Fault path* (but `DontNeed`, `Free` and `Remove` wait until the event they raise in a userfaultfd has been read).
///
/// # Errors
/// Those of madvise(2): `EINVAL`: the kernel does not know this advice, or it does not fit the memory; `ENOMEM`: part of the range is
/// not mapped; `EAGAIN`, `EBUSY`: a collapse did not succeed now.
///
/// # Safety
/// Nobody may rely on contents that the advice drops, here or (`DontFork`) in a child.
pub unsafe fn madvise(start: usize, len: usize, advice: Advice) -> Result<(), Errno> {
    // SAFETY: the caller vouches for the effect on the contents.
    unsafe { call(abi::__NR_madvise, [start, len, advice.bits()]) }.map(|_| ())
}

/// mlock2(2) with `MLOCK_ONFAULT`, or munlock(2): pages that are in the range, or come, stay in memory. *Fault path.*
///
/// # Errors
/// `ENOMEM`, `EPERM`: more than RLIMIT_MEMLOCK allows, or no such mapping; `EAGAIN`.
pub fn lock(start: usize, len: usize, on: bool) -> Result<(), Errno> {
    let (number, args) = if on { (abi::__NR_mlock2, [start, len, 1]) } else { (abi::__NR_munlock, [start, len, 0]) };
    // SAFETY: it changes no contents.
    unsafe { call(number, args) }.map(|_| ())
}

/// munmap(2). *Fault path* (but it waits until the event it raises in a userfaultfd has been read).
///
/// # Errors
/// Those of munmap(2): `EINVAL` for an unaligned or empty range; `ENOMEM`: too many mappings.
///
/// # Safety
/// Nobody may use that memory any more.
pub unsafe fn munmap(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller vouches for it.
    unsafe { call(abi::__NR_munmap, [start, len]) }.map(|_| ())
}

/// mprotect(2). *Fault path.*
///
/// # Errors
/// Those of mprotect(2): `ENOMEM`: part of the range is not mapped, or too many mappings; `EACCES`: a file opened for reading only.
///
/// # Safety
/// Nobody may rely on an access that is taken away, nor on the absence of one that is given.
pub unsafe fn mprotect(start: usize, len: usize, prot: Prot) -> Result<(), Errno> {
    // SAFETY: the caller vouches for it.
    unsafe { call(abi::__NR_mprotect, [start, len, prot.bits()]) }.map(|_| ())
}

bitflags! {
    /// How [`mremap`] goes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RemapFlags: u32 {
        /// It may move.
        const MAYMOVE = abi::MREMAP_MAYMOVE;
        /// It moves to the new address, and replaces what is there (needs `MAYMOVE`).
        const FIXED = abi::MREMAP_FIXED;
        /// The old mapping stays, empty (needs `MAYMOVE`). Linux 5.7.
        const DONTUNMAP = abi::MREMAP_DONTUNMAP;
    }
}

/// mremap(2), and the new address. *Fault path* (but it waits until the event it raises in a userfaultfd has been read).
///
/// An old length of 0 makes a second mapping of the same pages, for shared mappings only.
///
/// ```
/// use uhmm_os::PAGE;
/// use uhmm_os::mem::{self, Mapping, Prot, RemapFlags, Reserve};
///
/// let memory = mem::map(&Reserve { hint: 0, len: PAGE, align: PAGE, name: c"example", prot: Prot::ReadWrite, exact: false })?;
/// let (start, len) = memory.into_raw(); // the call below takes it
/// // SAFETY: it is ours, and nobody uses the old address afterwards.
/// let larger = unsafe {
///     let new = mem::mremap(start, len, 4 * PAGE, RemapFlags::MAYMOVE, 0)?;
///     Mapping::from_raw(new, 4 * PAGE)
/// };
/// assert_eq!(larger.len(), 4 * PAGE);
/// # Ok::<(), uhmm_os::Errno>(())
/// ```
///
/// # Errors
/// Those of mremap(2).
///
/// # Safety
/// Nobody may use the old range any more as it was, and nobody owns what `FIXED` replaces.
pub unsafe fn mremap(old: usize, old_len: usize, new_len: usize, flags: RemapFlags, new: usize) -> Result<usize, Errno> {
    // SAFETY: the caller vouches for it.
    unsafe { call(abi::__NR_mremap, [old, old_len, new_len, flags.bits() as usize, new]) }
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;
