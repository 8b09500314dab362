//! The bare copies: memcpy, and one that goes past the cache on the way out, as a DMA engine would.

use crate::Result;
use crate::memory::{Pages, Region};
use std::time::{Duration, Instant};

/// How bytes are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyKind {
    /// The C library's memcpy.
    Memcpy,
    /// Non-temporal stores.
    Stream,
}

/// The floor of moving bytes: a copy between two ranges of huge pages that were touched before.
#[derive(Debug)]
pub struct Copy {
    kind: CopyKind,
    from: Region,
    to: Region,
    salt: u8,
}

impl Copy {
    /// Maps and touches both ranges.
    ///
    /// # Errors
    /// If `size`, in bytes, is not a positive multiple of 2 MiB, or memory is short.
    pub fn prepare(size: usize, kind: CopyKind) -> Result<Self> {
        Ok(Copy { kind, from: Region::full(size, Pages::Huge)?, to: Region::full(size, Pages::Huge)?, salt: 0 })
    }

    /// Copies everything once.
    ///
    /// # Errors
    /// If wrong bytes arrive.
    pub fn run(&mut self) -> Result<Duration> {
        let size = self.from.size();
        self.salt = self.salt.wrapping_add(1);
        self.from.mark(self.salt);
        let start = Instant::now();
        // SAFETY: two regions of `size` bytes, of which nobody else has the address.
        unsafe { copy(self.kind, self.to.at(0), self.from.at(0), size) };
        let taken = start.elapsed();
        self.to.check(0, size, self.salt)?;
        Ok(taken)
    }
}

/// Copies `len` bytes.
///
/// # Safety
/// Both ranges are valid, do not overlap and start on a page boundary; `len` is a multiple of the page size.
unsafe fn copy(kind: CopyKind, to: *mut u8, from: *const u8, len: usize) {
    match kind {
        // SAFETY: by the contract.
        CopyKind::Memcpy => unsafe { core::ptr::copy_nonoverlapping(from, to, len) },
        // SAFETY: by the contract.
        CopyKind::Stream => unsafe { stream(to, from, len) },
    }
}

/// Copies past the cache, where the processor has such stores.
///
/// # Safety
/// As for [`copy`].
pub(crate) unsafe fn stream(to: *mut u8, from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: by the contract, and AVX2 is there.
        return unsafe { stream_avx2(to, from, len) };
    }
    // SAFETY: by the contract.
    unsafe { core::ptr::copy_nonoverlapping(from, to, len) }
}

/// [`stream`] with 32-byte stores.
///
/// # Safety
/// As for [`copy`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn stream_avx2(to: *mut u8, from: *const u8, len: usize) {
    use core::arch::x86_64::{__m256i, _mm_sfence, _mm256_load_si256, _mm256_stream_si256};
    for at in (0..len).step_by(128) {
        for part in [0, 32, 64, 96] {
            // SAFETY: `at + part + 32 <= len`, and both are aligned to 32 because they are to a page.
            unsafe { _mm256_stream_si256(to.add(at + part).cast::<__m256i>(), _mm256_load_si256(from.add(at + part).cast())) };
        }
    }
    _mm_sfence();
}

/// Writes zeroes past the cache, where the processor has such stores.
///
/// # Safety
/// The range is valid and starts on a page boundary; `len` is a multiple of the page size.
pub(crate) unsafe fn stream_zeroes(to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: by the contract, and AVX2 is there.
        return unsafe { stream_zeroes_avx2(to, len) };
    }
    // SAFETY: by the contract.
    unsafe { core::ptr::write_bytes(to, 0, len) }
}

/// [`stream_zeroes`] with 32-byte stores.
///
/// # Safety
/// As for [`stream_zeroes`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn stream_zeroes_avx2(to: *mut u8, len: usize) {
    use core::arch::x86_64::{__m256i, _mm_sfence, _mm256_setzero_si256, _mm256_stream_si256};
    for at in (0..len).step_by(128) {
        for part in [0, 32, 64, 96] {
            // SAFETY: `at + part + 32 <= len`, and the address is aligned to 32 because `to` is to a page.
            unsafe { _mm256_stream_si256(to.add(at + part).cast::<__m256i>(), _mm256_setzero_si256()) };
        }
    }
    _mm_sfence();
}
