//! The window of a device that lies in the process's own address space: where its kernels see the process's memory.
//!
//! The page at process address `v` is seen at `v ^ mask`. Linux places a program's mappings where bits 46 to 44 are 000 (programs without position independence), 101
//! (programs, heap) or 111 (mappings, stacks); four masks never land one of these on another. The window is made by whole blocks, when they are first needed, never over a
//! mapping of the program's; it is not inherited by a forked child and not in a core dump.
//!
//! Examples: `uhmm/examples/tiny_driver.rs`, which opens, vacates and closes its window by it.
#![allow(unsafe_code)] // unmaps what it has mapped

use super::DeviceInfo;
use crate::own::OwnSlice;
use crate::page::Span;
use crate::sync::Mutex;
use core::ffi::CStr;
use uhmm_os::mem::{self, Mapping, Prot, Reserve};
use uhmm_os::{BLOCK, Errno, PAGE, tasks};

const MASKS: [usize; 4] = [0b100 << 44, 0b110 << 44, 0b011 << 44, 0b001 << 44];

/// The address space of a window, and the book of which blocks have it. It goes with its owner. Spans are process addresses.
///
/// # Rules
/// * A block of it is inaccessible when it is made; what the driver puts there is the driver's until the block is closed.
/// * The book lies in memory that never migrates, behind a lock that touches nothing else.
#[derive(Debug)]
pub struct WindowSpace {
    mask: usize,
    name: &'static CStr,
    /// One bit for each block of the address space that has a window.
    open: Mutex<OwnSlice<u64>>,
}

impl WindowSpace {
    /// How many devices of one process can have such a window.
    pub const MOST: usize = MASKS.len();

    /// An empty window, with a mask that no other device has; `name` is what its mappings are called. `None` if there is no mask left.
    ///
    /// # Errors
    /// `ENOMEM`: no memory for the book.
    pub fn new(name: &'static CStr, others: &[DeviceInfo]) -> Result<Option<Self>, Errno> {
        let free = MASKS.into_iter().find(|mask| others.iter().all(|other| other.mask != *mask));
        free.map(|mask| Self::with_mask(name, mask)).transpose()
    }

    /// An empty window with this mask: 0 for a device that never opens it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_mask(name: &'static CStr, mask: usize) -> Result<Self, Errno> {
        Ok(WindowSpace { mask, name, open: Mutex::new(OwnSlice::new(c"uhmm window table", (1 << 47) / BLOCK / 64)?) })
    }

    /// What an address of the process and its image in the window differ by.
    pub fn mask(&self) -> usize {
        self.mask
    }

    /// Where the device sees the process's address `va`.
    pub fn at(&self, va: usize) -> usize {
        va ^ self.mask
    }

    /// Whether `address` is where the device sees something of the process ([`Driver::in_window`](super::Driver::in_window)).
    pub fn contains(&self, address: usize) -> bool {
        let va = address ^ self.mask;
        va < 1 << 47 && matches!(va >> 44, 0b000 | 0b101 | 0b111)
    }

    /// Whether the block of `va` has a window.
    pub fn is_open(&self, va: usize) -> bool {
        is_open(&self.open.lock(), va / BLOCK)
    }

    /// Makes the window for all blocks that `span` touches and that have none. `ready` is told of each new mapping, and may do with it what the device needs.
    ///
    /// # Errors
    /// `EEXIST` if something of the program's lies there; `ENOMEM`; what `ready` says. The blocks before that are open then.
    pub fn open(&self, span: Span, mut ready: impl FnMut(&Mapping) -> Result<(), Errno>) -> Result<(), Errno> {
        let mut open = self.open.lock();
        let end = span.end.div_ceil(BLOCK).min(open.len() * 64);
        let mut number = span.start / BLOCK;
        while number < end {
            if is_open(&open, number) {
                number += 1;
                continue;
            }
            let mut last = number + 1;
            // A window never crosses a mask bit, for beyond it the addresses go on elsewhere.
            while last < end && !is_open(&open, last) && !(last * BLOCK).is_multiple_of(1 << 44) {
                last += 1;
            }
            let (hint, len) = (self.at(number * BLOCK), (last - number) * BLOCK);
            let mapping = mem::map(&Reserve { hint, len, align: PAGE, name: self.name, prot: Prot::None, exact: true })?;
            ready(&mapping)?;
            mapping.into_raw();
            (number..last).for_each(|number| open[number / 64] |= 1 << (number % 64));
            number = last;
        }
        Ok(())
    }

    /// Makes a part of open blocks inaccessible again, in one step: a kernel that uses it sees what was there, or faults, and nothing else. When it returns, no core has an old
    /// translation: what [`Driver::unmap`](super::Driver::unmap) owes.
    ///
    /// What is made inaccessible as a whole that was entered as a whole needs no mapping more than the process has, so that a batch can be undone that failed for lack of them.
    ///
    /// # Panics
    /// It ends the process if the kernel refuses: uhmm would take an entry for gone that is there.
    pub fn vacate(&self, span: Span) {
        debug_assert!(span.blocks().all(|part| self.is_open(part.start)), "a part of the window");
        let (at, len) = (self.at(span.start), span.len());
        // SAFETY: the addresses are this window's, whose mappings only give access to what the driver keeps elsewhere.
        let vacated = unsafe { mem::vacate(at, len, self.name).or_else(|_| mem::mprotect(at, len, Prot::None)) };
        if vacated.is_err() {
            tasks::write_stderr(b"uhmm: a page cannot be taken out of a device's page table; stopping before data is lost\n");
            std::process::abort();
        }
    }

    /// Unmaps the window of all blocks that lie wholly in `span`. Nothing of them is mapped for the device any more.
    pub fn close(&self, span: Span) {
        let mut open = self.open.lock();
        let words = open.len();
        let mut number = span.start.div_ceil(BLOCK);
        while number < (span.end / BLOCK).min(words * 64) {
            let word = open[number / 64] >> (number % 64);
            if word == 0 {
                number += 64 - number % 64;
                continue;
            }
            number += word.trailing_zeros() as usize;
            if number < span.end / BLOCK {
                open[number / 64] &= !(1 << (number % 64));
                // SAFETY: the book says that `open` has mapped the block, so that the addresses are this window's; no page is entered there, as the caller says, so
                // that no kernel has business there.
                let _ = unsafe { mem::munmap(self.at(number * BLOCK), BLOCK) };
            }
            number += 1;
        }
    }
}

fn is_open(open: &OwnSlice<u64>, number: usize) -> bool {
    open[number / 64] >> (number % 64) & 1 != 0
}

impl Drop for WindowSpace {
    fn drop(&mut self) {
        self.close(Span { start: 0, end: 1 << 47 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_mask_lands_a_usual_place_on_another() {
        for mask in MASKS {
            let window = WindowSpace::with_mask(c"test window", mask).unwrap();
            for region in [0b000usize, 0b101, 0b111] {
                let va = region << 44 | 0x123_4567_8000;
                assert!(window.contains(window.at(va)));
                assert!(!window.contains(va), "{mask:#x}: {va:#x} is the process's own");
            }
        }
    }

    #[test]
    fn blocks_open_once_and_close_whole() {
        let window = WindowSpace::with_mask(c"test window", 0b011 << 44).unwrap();
        let start = (0b101 << 44) + 7 * BLOCK;
        let span = |from: usize, to: usize| Span { start: start + from, end: start + to };
        let mut made = Vec::new();
        for ask in [span(BLOCK, 2 * BLOCK), span(PAGE, 3 * BLOCK + 1), span(0, 4 * BLOCK)] {
            let note = |new: &Mapping| {
                made.push((new.start() - window.at(start), new.len()));
                Ok(())
            };
            window.open(ask, note).unwrap();
        }
        assert_eq!(made, [(BLOCK, BLOCK), (0, BLOCK), (2 * BLOCK, 2 * BLOCK)]);
        let refused = window.open(span(5 * BLOCK, 6 * BLOCK), |_| Err(Errno::NOMEM));
        assert!(refused == Err(Errno::NOMEM) && !window.is_open(start + 5 * BLOCK));
        window.close(span(1, 3 * BLOCK - 1));
        assert_eq!([0, 1, 2, 3].map(|block| window.is_open(start + block * BLOCK)), [true, false, true, true]);
        drop(window);
        let free = Reserve { hint: start ^ 0b011 << 44, len: 4 * BLOCK, align: PAGE, name: c"free", prot: Prot::None, exact: true };
        assert!(mem::map(&free).is_ok(), "its addresses are free again");
    }
}
