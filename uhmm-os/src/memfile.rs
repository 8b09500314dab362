//! A file in memory (memfd_create(2)): the same pages at several addresses. *Fault path*, all but [`MemFile::new`].
//!
//! Examples: `uhmm/examples/tiny_driver.rs`, whose device memory it is.

use crate::mem::{self, Advice, Prot};
use crate::syscall::{abi, call};
use crate::{Errno, PAGE};
use core::ffi::CStr;
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The file. Its descriptor is usable where the thread that made it has its descriptors.
#[derive(Debug)]
pub struct MemFile {
    fd: OwnedFd,
}

impl MemFile {
    /// A file of `len` bytes, none of which takes memory yet.
    ///
    /// # Errors
    /// Those of memfd_create(2) and ftruncate(2): `EMFILE`, `ENFILE`: too many open files; `ENOMEM`; `EINVAL`, `EFBIG`: the length.
    pub fn new(name: &CStr, len: usize) -> Result<Self, Errno> {
        // SAFETY: the name ends with a zero and is only read.
        let raw = unsafe { call(abi::__NR_memfd_create, [name.as_ptr() as usize, abi::MFD_CLOEXEC as usize]) }?;
        // SAFETY: the kernel has just given the descriptor to us.
        let file = MemFile { fd: unsafe { OwnedFd::from_raw_fd(raw as i32) } };
        // SAFETY: it names no memory.
        unsafe { call(abi::__NR_ftruncate, [raw, len]) }?;
        Ok(file)
    }

    /// Gives `len` bytes at `offset` their memory.
    ///
    /// # Errors
    /// Those of fallocate(2): `ENOSPC`, `ENOMEM`.
    pub fn populate(&self, offset: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: it names no memory of the process.
        unsafe { call(abi::__NR_fallocate, [self.fd.as_raw_fd() as usize, 0, offset, len]) }.map(|_| ())
    }

    /// Takes the memory of `len` bytes at `offset`, which are zeroes then wherever they are mapped.
    ///
    /// # Errors
    /// Those of fallocate(2).
    ///
    /// # Safety
    /// Nobody relies on these bytes.
    pub unsafe fn release(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let how = abi::FALLOC_FL_PUNCH_HOLE | abi::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the caller vouches for the contents.
        unsafe { call(abi::__NR_fallocate, [self.fd.as_raw_fd() as usize, how as usize, offset, len]) }.map(|_| ())
    }

    /// Maps `len` bytes at `offset` over whatever is at `at`, in one step: a thread that uses the place sees what was there or what is there, nothing else. A fork's
    /// child does not get it.
    ///
    /// # Errors
    /// Those of mmap(2): `ENOMEM`: too many mappings; `EINVAL`: what is not aligned to a page. What is at `at` then is what was there, or these bytes.
    ///
    /// # Safety
    /// What is at `at` is the caller's, and nobody needs its contents. Who uses `at` then shares these bytes with all that have them mapped.
    pub unsafe fn map_over(&self, at: usize, len: usize, offset: usize, prot: Prot) -> Result<(), Errno> {
        debug_assert!(at.is_multiple_of(PAGE) && len.is_multiple_of(PAGE));
        let flags = abi::MAP_SHARED | abi::MAP_FIXED;
        // SAFETY: the caller owns what is replaced.
        unsafe { call(abi::__NR_mmap, [at, len, prot.bits(), flags as usize, self.fd.as_raw_fd() as usize, offset]) }?;
        // SAFETY: the mapping has just been made, and no contents change.
        unsafe { mem::madvise(at, len, Advice::DontFork) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Reserve;

    #[test]
    fn the_same_bytes_at_two_places_and_none_after_release() {
        let file = MemFile::new(c"two places", 4 * PAGE).unwrap();
        let reserve = Reserve { hint: 0, len: 2 * PAGE, align: PAGE, name: c"two places", prot: Prot::None, exact: false };
        let places = mem::map(&reserve).unwrap();
        file.populate(PAGE, PAGE).unwrap();
        // SAFETY: the mapping is this test's, and no reference to it lives.
        unsafe {
            file.map_over(places.start(), PAGE, PAGE, Prot::ReadWrite).unwrap();
            file.map_over(places.start() + PAGE, PAGE, PAGE, Prot::Read).unwrap();
            let [one, two] = [places.as_ptr(), places.as_ptr().add(PAGE)];
            one.write_volatile(7);
            assert_eq!(two.read_volatile(), 7);
            file.release(PAGE, PAGE).unwrap();
            assert_eq!([one.read_volatile(), two.read_volatile()], [0, 0]);
            mem::vacate(places.start(), PAGE, c"two places").unwrap();
            let written = call(abi::__NR_write, [file.fd.as_raw_fd() as usize, one as usize, 1]);
            assert_eq!(written, Err(Errno::FAULT), "nothing can be read there");
        }
    }
}
