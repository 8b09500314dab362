//! Changes of the program's mappings, and mappings of the device's file.
//!
//! # Rules
//! * What the program changes through libc is held as a [`Change`] around the real call. libc's own calls (malloc, threads' stacks) do not come by here; the core hears of those as of raw system calls.
//! * Without an open device nothing is announced, and nothing costs.
//! * What is mapped privately of /dev/zero becomes anonymous memory, which it is to the kernel: userfaultfd does not serve it otherwise.
//! * A mapping of the device's file is one of a fresh file in memory, so that its pages are ordinary ones, zeroed, and nobody else's.
#![allow(unsafe_code)] // system calls that the program asked for

use crate::device::Kind;
use crate::name::Name;
use crate::{opens, sys};
use core::ops::Range;
use libc::{c_int, c_void, off_t, size_t};
use uhmm_core::port::{self, Change};
use uhmm_os::{Errno, PAGE};

/// The whole pages of a range; `None` if it has none, or ends beyond all addresses.
pub(crate) fn pages(start: usize, len: usize) -> Option<Range<usize>> {
    let end = start.checked_add(len)?.checked_next_multiple_of(PAGE)?;
    (len > 0).then_some(start & !(PAGE - 1)..end)
}

/// Announces a change of a range, until the value is dropped.
fn announce(start: *mut c_void, len: usize) -> Option<Change> {
    opens::home()?;
    pages(start as usize, len).map(port::change)
}

/// mmap(2).
pub(crate) fn map(addr: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> Result<usize, Errno> {
    let _change = if flags & libc::MAP_FIXED != 0 { announce(addr, len) } else { None };
    let args = [addr as usize, len, prot as usize, flags as usize, fd as usize, offset as usize];
    // SAFETY: the program's call.
    let mapped = unsafe { sys::call(libc::SYS_mmap, args) };
    // A socket cannot be mapped, which the kernel says before it does anything.
    let device = match mapped {
        Err(Errno::NODEV) if flags & libc::MAP_ANONYMOUS == 0 => Name::of(fd).filter(|name| name.kind.number().is_some()),
        _ => None,
    };
    match (device, mapped) {
        (Some(name), _) => map_device(&name, args),
        (None, Ok(at)) if flags & (libc::MAP_ANONYMOUS | libc::MAP_TYPE) == libc::MAP_PRIVATE && is_zero(fd) => Ok(map_zero(at, args)),
        _ => mapped,
    }
}

/// Whether a descriptor that has just been mapped is of /dev/zero.
fn is_zero(fd: c_int) -> bool {
    // SAFETY: a struct of numbers, which may be written.
    let (status, asked) = unsafe {
        let mut status: libc::stat = core::mem::zeroed();
        let asked = sys::call(libc::SYS_fstat, [fd as usize, &raw mut status as usize]);
        (status, asked)
    };
    asked.is_ok() && status.st_mode & libc::S_IFMT == libc::S_IFCHR && status.st_rdev == libc::makedev(1, 5)
}

/// A private mapping of /dev/zero has been made. It is anonymous memory to the kernel, but not to userfaultfd, which can bring no page to where there is a file of no length: so it becomes what
/// it is. If there is no room for that it stays.
fn map_zero(at: usize, args: [usize; 6]) -> usize {
    let [_, len, prot, flags, _, _] = args;
    let flags = flags & !(libc::MAP_FIXED_NOREPLACE as usize) | (libc::MAP_FIXED | libc::MAP_ANONYMOUS) as usize;
    // SAFETY: in the place of what was mapped for the program just now, with the same contents, which nobody can have used yet.
    let _ = unsafe { sys::call(libc::SYS_mmap, [at, len, prot, flags, usize::MAX, 0]) };
    at
}

fn map_device(name: &Name, args: [usize; 6]) -> Result<usize, Errno> {
    let [addr, len, prot, flags, _, offset] = args;
    if !offset.is_multiple_of(PAGE) {
        return Err(Errno::INVAL);
    }
    let file = sys::memfd()?;
    // SAFETY: a file of our own; the mapping is the program's call.
    let mapped = unsafe {
        sys::call(libc::SYS_ftruncate, [file as usize, len]).and_then(|_| {
            let mut status: libc::stat = core::mem::zeroed();
            sys::call(libc::SYS_fstat, [file as usize, &raw mut status as usize])?;
            // Whoever looks at the mapping knows already what it is.
            if let (Kind::Device(_), Some(home)) = (name.kind, opens::home()) {
                home.station.add_device_file((libc::major(status.st_dev), libc::minor(status.st_dev)), status.st_ino);
            }
            sys::call(libc::SYS_mmap, [addr, len, prot, flags | libc::MAP_POPULATE as usize, file as usize, 0])
        })
    };
    sys::close(file);
    mapped
}

/// munmap(2).
pub(crate) fn unmap(addr: *mut c_void, len: size_t) -> Result<usize, Errno> {
    let _change = announce(addr, len);
    // SAFETY: the program's call.
    unsafe { sys::call(libc::SYS_munmap, [addr as usize, len]) }
}

/// mremap(2).
pub(crate) fn remap(old: *mut c_void, old_len: size_t, new_len: size_t, flags: c_int, new: *mut c_void) -> Result<usize, Errno> {
    let moves = flags & (libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) != 0;
    let _from = match old_len.checked_sub(new_len) {
        _ if moves => announce(old, old_len),
        Some(tail) if tail > 0 => announce(old.wrapping_byte_add(new_len), tail), // what stays where it is does not change
        _ => None,
    };
    let _to = if flags & libc::MREMAP_FIXED != 0 { announce(new, new_len) } else { None };
    // What the kernel itself would move mapping by mapping: it does not where they are watched.
    let pieces = match opens::home() {
        Some(home) if flags & libc::MREMAP_FIXED != 0 && old_len == new_len => {
            pages(old as usize, old_len).map_or(vec![], |range| home.station.pieces(range))
        }
        _ => vec![],
    };
    let call = |from: usize, len: usize, new_len: usize, to: usize| {
        // SAFETY: the program's call.
        unsafe { sys::call(libc::SYS_mremap, [from, len, new_len, flags as usize, to]) }
    };
    let result = match pieces.first() {
        Some(first) if first.start == old as usize => {
            let mut move_all =
                pieces.iter().map(|piece| call(piece.start, piece.len(), piece.len(), new as usize + (piece.start - old as usize)));
            move_all.find(Result::is_err).unwrap_or(Ok(new as usize))
        }
        _ => call(old as usize, old_len, new_len, new as usize),
    };
    // Whether it moves to grow, only the kernel knows before. Of anonymous memory it has told; entries of other memory go now.
    if !moves && result.is_ok_and(|at| at != old as usize) {
        drop(announce(old, old_len));
    }
    result
}

/// mprotect(2).
pub(crate) fn protect(addr: *mut c_void, len: size_t, prot: c_int) -> Result<usize, Errno> {
    let _change = announce(addr, len);
    // SAFETY: the program's call.
    unsafe { sys::call(libc::SYS_mprotect, [addr as usize, len, prot as usize]) }
}

/// pkey_mprotect(2).
pub(crate) fn protect_by_key(addr: *mut c_void, len: size_t, prot: c_int, key: c_int) -> Result<usize, Errno> {
    let _change = announce(addr, len);
    // SAFETY: the program's call.
    unsafe { sys::call(libc::SYS_pkey_mprotect, [addr as usize, len, prot as usize, key as usize]) }
}

const MADV_COLLAPSE: c_int = 25;
const MADV_DONTNEED_LOCKED: c_int = 24;
const MADV_GUARD_INSTALL: c_int = 102;

/// madvise(2).
pub(crate) fn advise(addr: *mut c_void, len: size_t, advice: c_int) -> Result<usize, Errno> {
    let changes = matches!(
        advice,
        libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE | libc::MADV_HWPOISON | MADV_DONTNEED_LOCKED | MADV_GUARD_INSTALL
    );
    // What is on a device keeps its contents: the kernel's lazy freeing passes it by, and is not promised for the rest.
    if advice == libc::MADV_FREE && is_on_a_device(addr, len) {
        return Ok(0);
    }
    let result = {
        let _change = if changes { announce(addr, len) } else { None };
        // SAFETY: the program's call.
        unsafe { sys::call(libc::SYS_madvise, [addr as usize, len, advice as usize]) }
    };
    // The kernel puts guards where pages were, and tells nobody of those; a drop, which leaves guards alone, is told.
    if result.is_ok() && advice == MADV_GUARD_INSTALL && is_on_a_device(addr, len) {
        // SAFETY: the contents have just been given up by the program's call.
        let _ = unsafe { sys::call(libc::SYS_madvise, [addr as usize, len, MADV_DONTNEED_LOCKED as usize]) };
    }
    // Pages on a device can neither be freed lazily nor collapsed, and nobody promised that they are.
    match result {
        Err(_) if advice == MADV_COLLAPSE && is_on_a_device(addr, len) => Ok(0),
        result => result,
    }
}

/// Whether any page of a range lies on a device.
fn is_on_a_device(start: *mut c_void, len: usize) -> bool {
    let (Some(home), Some(range)) = (opens::home(), pages(start as usize, len)) else { return false };
    home.station.holds(range)
}

/// The program's own userfaultfd is about to watch a range: the struct of its request begins with it.
pub(crate) fn step_aside(arg: u64) {
    let Some(home) = opens::home() else { return };
    let mut words = [[0; 8]; 2];
    if sys::copy_in(words.as_flattened_mut(), arg).is_ok() {
        let [start, len] = words.map(usize::from_ne_bytes);
        if let Some(range) = pages(start, len) {
            home.station.step_aside(range);
        }
    }
}
