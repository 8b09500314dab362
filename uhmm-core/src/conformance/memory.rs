//! Memory for the checks: mappings of their own, device memory of the program's, and what the kernel says about where pages are.
#![allow(unsafe_code)] // maps, unmaps, and makes slices of that

use crate::DeviceRef;
use crate::args::{Access, Arg, RawArg};
use crate::driver::{Dma, DmaKind, Frame};
use crate::error::Error;
use core::any::TypeId;
use std::fs::File;
use std::os::unix::fs::FileExt;
use uhmm_os::PAGE;

/// An anonymous private mapping.
#[derive(Debug)]
pub(super) struct Pages {
    pub start: *mut u8,
    pub len: usize,
}

// SAFETY: it owns its mapping, as a Box would.
unsafe impl Sync for Pages {}

impl Pages {
    /// `len` bytes, a multiple of a page, of zeroes.
    pub(super) fn new(len: usize) -> Self {
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe {
            libc::mmap(core::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "mmap of {len} bytes");
        Pages { start: start.cast(), len }
    }

    /// The same with bytes that tell their place.
    pub(super) fn patterned(len: usize) -> Self {
        let mut pages = Pages::new(len);
        pages.bytes().iter_mut().enumerate().for_each(|(i, x)| *x = pattern(i));
        pages
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is ours, of that length, readable and writable, and borrowed with `self`.
        unsafe { core::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// Drops `len` bytes from `at` on (whole pages): they read as zeroes.
    pub(super) fn drop_pages(&mut self, at: usize, len: usize) {
        assert!(at + len <= self.len);
        // SAFETY: inside the mapping, which is borrowed exclusively.
        assert_eq!(unsafe { libc::madvise(self.start.add(at).cast(), len, libc::MADV_DONTNEED) }, 0);
    }

    /// Moves the mapping to where there is room for `len` bytes. False, and nothing is done, if the kernel sees more than one mapping there, for part of the
    /// range is watched and part of it is not: it resizes one only, and may have moved the first when it refuses the second.
    pub(super) fn resize(&mut self, len: usize) -> bool {
        if !self.is_one_mapping() {
            return false;
        }
        // A place that is free for sure makes the kernel move, which it would not have to.
        let place = core::mem::ManuallyDrop::new(Pages::new(len));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both mappings are ours; the new place is replaced by what moves there, and has one owner afterwards.
        let moved = unsafe { libc::mremap(self.start.cast(), self.len, len, flags, place.start) };
        assert_ne!(moved, libc::MAP_FAILED, "mremap from {} to {len} bytes: {}", self.len, std::io::Error::last_os_error());
        (self.start, self.len) = (moved.cast(), len);
        true
    }

    fn is_one_mapping(&self) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let (start, end) = (self.start as usize, self.start as usize + self.len);
        maps.lines().any(|line| {
            let mut bounds = line.split([' ', '-']).map_while(|number| usize::from_str_radix(number, 16).ok());
            matches!((bounds.next(), bounds.next()), (Some(from), Some(to)) if from <= start && end <= to)
        })
    }

    /// Changes the protection of `len` bytes from `at` on.
    pub(super) fn protect(&mut self, at: usize, len: usize, prot: i32) {
        assert!(at + len <= self.len);
        // SAFETY: inside the mapping, which is borrowed exclusively; the caller touches it as it allows.
        assert_eq!(unsafe { libc::mprotect(self.start.add(at).cast(), len, prot) }, 0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.len) }, 0);
    }
}

/// A byte that tells its place.
pub(super) fn pattern(i: usize) -> u8 {
    (i ^ (i >> 8) ^ (i >> 16) ^ (i >> 24)) as u8
}

/// Panics with the first byte that is not as expected.
pub(super) fn same(what: &str, found: &[u8], expected: impl Fn(usize) -> u8) {
    if let Some(i) = (0..found.len()).find(|&i| found[i] != expected(i)) {
        let wrong = (i..found.len()).filter(|&i| found[i] != expected(i)).count();
        panic!("{what}: byte {i} of {} is {}, not {}; {wrong} bytes are wrong", found.len(), found[i], expected(i));
    }
}

/// Whole pages inside the bytes that the CPU has (bit 63 of /proc/self/pagemap).
pub(super) fn pages_present(data: &[u8]) -> usize {
    let start = (data.as_ptr() as usize).div_ceil(PAGE);
    let end = data.as_ptr_range().end as usize / PAGE;
    let Ok(pagemap) = File::open("/proc/self/pagemap") else { panic!("/proc/self/pagemap is needed") };
    let mut entries = vec![0u8; end.saturating_sub(start) * 8];
    pagemap.read_exact_at(&mut entries, start as u64 * 8).unwrap_or_else(|e| panic!("pagemap: {e}"));
    // In memory, or on its way to another place there (compaction).
    entries.chunks(8).filter(|entry| entry[7] >> 6 != 0).count()
}

/// Memory of the device's own, of bytes.
#[derive(Debug)]
pub(super) struct DeviceBytes<'a> {
    dev: &'a DeviceRef,
    frame: Frame,
    address: usize,
    len: usize,
}

impl<'a> DeviceBytes<'a> {
    pub(super) fn new(dev: &'a DeviceRef, len: usize) -> Result<Self, Error> {
        let (frame, address) = dev.allocate(len)?;
        Ok(DeviceBytes { dev, frame, address, len })
    }

    fn dma(&self, kind: DmaKind, host: usize) {
        let dma = Dma { kind, host, frame: self.frame, offset: 0, len: self.len };
        self.dev.copy(dma).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
    }

    pub(super) fn zero(&mut self) {
        self.dma(DmaKind::Zero, 0);
    }

    pub(super) fn upload(&mut self, data: &[u8]) {
        assert_eq!(data.len(), self.len);
        self.dma(DmaKind::GuardedToDevice, data.as_ptr() as usize);
    }

    pub(super) fn download(&self, data: &mut [u8]) {
        assert_eq!(data.len(), self.len);
        self.dma(DmaKind::GuardedToHost, data.as_mut_ptr() as usize);
    }

    /// The memory as an argument.
    pub(super) fn arg(&mut self, access: Access) -> Arg<'_> {
        let device = Some(self.dev.id());
        let raw = RawArg::Slice { start: self.address, count: self.len, size: 1, ty: TypeId::of::<u8>(), name: "u8", access, device };
        // SAFETY: the memory holds bytes, and is borrowed exclusively.
        unsafe { Arg::from_raw(raw) }
    }
}

impl Drop for DeviceBytes<'_> {
    fn drop(&mut self) {
        self.dev.free(self.frame, self.len);
    }
}
