//! Anonymous memory on a 2 MiB boundary, owned and unmapped on drop.
//!
//! Rule: whether a range has huge pages is decided when it is mapped and never changes; a block that has held small pages cannot
//! take a huge one cheaply.

use crate::{Error, Result};
use core::ptr::NonNull;

/// The size of a page, in bytes.
pub const PAGE: usize = 4096;
/// The size of a huge page, in bytes.
pub const BLOCK: usize = 2 << 20;

/// Which pages a floor works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Huge pages of 2 MiB, where the system gives them (`MADV_HUGEPAGE`).
    Huge,
    /// Pages of 4 KiB (`MADV_NOHUGEPAGE`).
    Small,
}

/// `size` bytes of private anonymous memory that starts on a 2 MiB boundary.
#[derive(Debug)]
pub(crate) struct Region {
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a region is plain memory with one owner, wherever that is.
unsafe impl Send for Region {}
// SAFETY: a region hands out raw pointers only. Whoever goes through one says why no other thread uses the same bytes.
unsafe impl Sync for Region {}

impl Region {
    /// Untouched memory.
    pub(crate) fn empty(size: usize, pages: Pages) -> Result<Self> {
        if size == 0 || !size.is_multiple_of(BLOCK) {
            return Err(Error::Size(size));
        }
        let mapped = size.checked_add(BLOCK).ok_or(Error::Size(size))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let mapping = unsafe { libc::mmap(core::ptr::null_mut(), mapped, protection, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        let Some(mapping) = NonNull::new(mapping.cast::<u8>()) else {
            return Err(Error::of("mmap", libc::ENOMEM));
        };
        let skip = mapping.as_ptr().align_offset(BLOCK);
        // SAFETY: `skip` is less than BLOCK, and `size + BLOCK` bytes were mapped.
        let start = unsafe { mapping.add(skip) };
        let region = Region { mapping, mapped, start, size };
        let advice = match pages {
            Pages::Huge => libc::MADV_HUGEPAGE,
            Pages::Small => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: advice about page sizes on our own mapping; it changes no contents.
        if unsafe { libc::madvise(region.start.as_ptr().cast(), size, advice) } != 0 && pages == Pages::Huge {
            // A kernel without transparent huge pages: the floor is then that of small pages.
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(Error::System { call: "madvise", source: error });
            }
        }
        Ok(region)
    }

    /// Memory of which every page has been touched.
    pub(crate) fn full(size: usize, pages: Pages) -> Result<Self> {
        let region = Region::empty(size, pages)?;
        region.touch();
        Ok(region)
    }

    /// Memory of huge pages, but for one block, of which every page has been touched.
    pub(crate) fn full_but(size: usize, small: usize) -> Result<Self> {
        let region = Region::empty(size, Pages::Huge)?;
        assert!(small.is_multiple_of(BLOCK) && small < size, "the block with small pages lies in the region");
        // SAFETY: advice about page sizes on our own mapping; it changes no contents. A kernel that knows no such advice has small
        // pages everywhere.
        unsafe { libc::madvise(region.at(small).cast(), BLOCK, libc::MADV_NOHUGEPAGE) };
        region.touch();
        Ok(region)
    }

    /// Writes to every page; for who has made the region.
    fn touch(&self) {
        for (number, at) in (0..self.size).step_by(PAGE).enumerate() {
            // SAFETY: page `number` lies within the region, which nobody else knows of yet.
            unsafe { core::ptr::write_bytes(self.at(at), number as u8, PAGE) };
        }
    }

    /// Writes the first byte of every page anew: the low byte of its number plus `salt`. With a new salt for every run, bytes that
    /// an earlier run left behind cannot pass for those of this one.
    pub(crate) fn mark(&self, salt: u8) {
        for (number, at) in (0..self.size).step_by(PAGE).enumerate() {
            // SAFETY: within the region; floors mark a region only while they have it for themselves and its pages are there.
            unsafe { self.at(at).write_volatile((number as u8).wrapping_add(salt)) };
        }
    }

    /// The address of byte `at`.
    pub(crate) fn at(&self, at: usize) -> *mut u8 {
        debug_assert!(at <= self.size);
        self.start.as_ptr().wrapping_add(at)
    }

    /// Bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Gives every page back, so that the region is empty again.
    pub(crate) fn discard(&self) -> Result<()> {
        // SAFETY: our own private anonymous memory, of which nobody holds a reference (only raw pointers are ever made).
        match unsafe { libc::madvise(self.start.as_ptr().cast(), self.size, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(Error::last("madvise")),
        }
    }

    /// Reads the first byte of every page in `from..to` and compares it with what [`Region::mark`] wrote.
    pub(crate) fn check(&self, from: usize, to: usize, salt: u8) -> Result<()> {
        for at in (from..to).step_by(PAGE) {
            // SAFETY: callers pass bounds within the region; a page that is missing is served by the floor.
            let byte = unsafe { self.at(at).read_volatile() };
            if byte != ((at / PAGE) as u8).wrapping_add(salt) {
                return Err(Error::WrongData(at));
            }
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; no pointer into it outlives the region.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}
