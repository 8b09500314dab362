//! What is not there, and what is there already: copies of memory that is gone, and windows where the program has something.
#![allow(unsafe_code)] // maps memory at addresses of its choice

use super::Subject;
use super::memory::{Pages, pattern, same};
use crate::driver::{Dma, DmaKind};
use crate::error::Error;
use crate::page::Span;
use uhmm_os::{BLOCK, PAGE};

/// A copy from or to memory that the process does not have is an error with the address; what is there has been copied.
pub(super) fn copies_of_memory_that_is_gone_are_errors(subject: &mut Subject<'_>) {
    if subject.info().memory == 0 {
        return; // no copy is asked of it
    }
    let (frame, _) = subject.dev.allocate(BLOCK).unwrap_or_else(|e| panic!("allocate: {e}"));
    let zeroes = Dma { kind: DmaKind::Zero, host: 0, frame, offset: 0, len: BLOCK };
    subject.dev.copy(zeroes).unwrap_or_else(|e| panic!("zeroes: {e}"));
    let mut data = Pages::patterned(4 * PAGE);
    // SAFETY: a page of ours, which nobody uses until it is mapped again.
    assert_eq!(unsafe { libc::munmap(data.start.add(2 * PAGE).cast(), PAGE) }, 0);
    let gone = data.start as usize + 2 * PAGE;
    for kind in [DmaKind::GuardedToDevice, DmaKind::GuardedToHost] {
        for (at, len) in [(0, 4 * PAGE), (PAGE + 77, PAGE), (2 * PAGE, 1)] {
            let result = subject.dev.copy(Dma { kind, host: data.start as usize + at, frame, offset: 77, len });
            let Err(Error::Gone { address }) = result else { panic!("{kind:?} of {len} bytes at {at}: {result:?}") };
            assert!((gone..gone + PAGE).contains(&address), "{kind:?} of {len} bytes at {at}: {address:#x} is not where it is gone");
        }
        let whole = Dma { kind, host: data.start as usize, frame, offset: 5000, len: 2 * PAGE };
        subject.dev.copy(whole).unwrap_or_else(|e| panic!("what is there: {e}"));
    }
    subject.dev.free(frame, BLOCK);
    // SAFETY: as above; it is a page again.
    let again = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        libc::mmap(gone as *mut _, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_eq!(again as usize, gone);
    same("the last page", &data.bytes()[3 * PAGE..], |i| pattern(3 * PAGE + i));
}

/// Where the device would see a block of the process, the program has something: the launch is refused, and the program keeps what it has.
pub(super) fn a_window_is_not_made_over_the_programs_memory(subject: &mut Subject<'_>) {
    let mask = subject.info().mask;
    if mask == 0 {
        return; // it has no window
    }
    let mut data = Pages::patterned(2 * BLOCK);
    let block = Span::block(data.start as usize + BLOCK).start;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: where nothing is.
    let there = unsafe { libc::mmap((block ^ mask) as *mut _, BLOCK, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_eq!(there as usize, block ^ mask, "a window is left where the process has no memory: {}", std::io::Error::last_os_error());
    let mut there = Pages { start: there.cast(), len: BLOCK };
    there.bytes().fill(77);
    let part = &mut data.bytes()[..];
    let from = block - part.as_ptr() as usize;
    let result = subject.dev.prefetch(block, block + PAGE);
    let launched = subject.run(super::Named::AddOne, 1, &crate::args![crate::args::inout(&mut part[from..][..PAGE]), super::PART as u64]);
    same("what the program has there", there.bytes(), |_| 77);
    drop(there);
    let added = u8::from(launched.is_ok());
    same("the argument", &data.bytes()[from..][..PAGE], |i| pattern(from + i).wrapping_add(added));
    assert!(launched.is_err(), "the device has no address for it: {result:?}, {launched:?}");
    // With the place free, it has.
    subject.add_one(data.bytes());
    same("the whole", data.bytes(), |i| pattern(i).wrapping_add(1));
}
