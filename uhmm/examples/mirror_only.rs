//! A device without memory of its own sums a linked list where it is: over a page table of its own, which is filled by device faults and erased by every change
//! of the mappings. Meanwhile another thread unmaps and protects parts of the list and puts them back. No page migrates, and every answer is the whole list's sum or
//! an error that says what was wrong at that moment.
//!
//!     cargo run --release -p uhmm --example mirror_only
#![allow(unsafe_code)] // raw pointers, as lists have them, and system calls

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use uhmm::mirror::{Fault, HasTable, Mirror, PageTable, Request, change};
use uhmm::{Error, Mode, Uhmm};

const PAGE: usize = 4096;
const PAGES: usize = 256;

/// A node of the list, one a page. The list ends with a null pointer.
#[repr(C)]
struct Node {
    next: usize,
    value: u64,
}

/// The device reads one node.
fn node<N: HasTable>(mirror: &Mirror<N>, at: usize) -> Result<Node, Fault> {
    let mut bytes = [0u8; 16];
    while mirror.read(at, &mut bytes).is_err() {
        // A device fault. What is entered is true, or refused because the page has changed since: then the read misses again.
        let page = at & !(PAGE - 1);
        let pages = mirror.range_fault(page..page + PAGE, &Request::read(), Duration::from_secs(1))?;
        mirror.enter(&pages);
    }
    let word = |n: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[8 * n + i]));
    Ok(Node { next: word(0) as usize, value: word(1) })
}

/// The device sums the list: as it was at one moment, or what was wrong with it.
fn sum<N: HasTable>(mirror: &Mirror<N>, head: usize) -> Result<u64, Fault> {
    loop {
        let seq = mirror.read_begin();
        let (mut at, mut total) = (head, Ok(0u64));
        while at != 0 {
            match node(mirror, at) {
                Ok(node) => (at, total) = (node.next, total.map(|sum| sum + node.value)),
                Err(fault) => (at, total) = (0, Err(fault)),
            }
        }
        // Whatever changed on the way, so that no moment had it all: again.
        if !mirror.read_retry_begun(seq) {
            return total;
        }
    }
}

/// New memory.
fn map(len: usize) -> usize {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: where the kernel likes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start as usize
}

/// Writes a node of the list that starts at `start` to a page.
fn write_node(page: usize, start: usize, number: usize) {
    let next = if number + 1 < PAGES { start + (number + 1) * PAGE } else { 0 };
    // SAFETY: new memory, which nobody else uses yet.
    unsafe { (page as *mut Node).write(Node { next, value: number as u64 + 1 }) };
}

/// Puts a new page with the node into a hole of the list: it is written elsewhere and moved there, so that it appears at once.
fn replace(start: usize, number: usize) {
    let (page, place) = (map(PAGE), start + number * PAGE);
    write_node(page, start, number);
    // SAFETY: a new page moves into a hole.
    let moved = unsafe { libc::mremap(page as *mut _, PAGE, PAGE, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place) };
    assert_eq!(moved as usize, place);
}

fn main() -> Result<(), Error> {
    let start = map(PAGES * PAGE);
    (0..PAGES).for_each(|number| write_node(start + number * PAGE, start, number));
    let whole = (PAGES * (PAGES + 1) / 2) as u64;

    let hmm = Uhmm::new()?;
    if hmm.mode() == Mode::None {
        println!("without userfaultfd nobody tells a mirror of changes: see `uhmm doctor`");
        return Ok(());
    }
    let range = start..start + PAGES * PAGE;
    let mirror = hmm.mirror(range.clone(), PageTable::new(range)?)?;

    let done = AtomicBool::new(false);
    let (mut right, mut unmapped, mut protected) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let end = Instant::now() + Duration::from_secs(2);
            let mut number = 0;
            while Instant::now() < end {
                number = (number * 7 + 3) % PAGES;
                let page = start + number * PAGE;
                let pause = || std::thread::sleep(Duration::from_micros(300));
                // SAFETY: a page of the list, which only the device uses besides, by copies that bear this.
                unsafe {
                    match number % 3 {
                        // The plain call: the device hears of it before it returns.
                        0 => {
                            libc::munmap(page as *mut _, PAGE);
                            pause();
                            replace(start, number);
                        }
                        // The same, acknowledged before it happens.
                        1 => {
                            change::unmap(page, PAGE).expect("munmap");
                            pause();
                            replace(start, number);
                        }
                        _ => {
                            change::protect(page, PAGE, change::Prot::None).expect("mprotect");
                            pause();
                            change::protect(page, PAGE, change::Prot::ReadWrite).expect("mprotect");
                        }
                    }
                }
                pause();
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            match sum(&mirror, start) {
                Ok(sum) if sum == whole => right += 1,
                Ok(sum) => panic!("the sum is {sum}, not {whole}"),
                Err(Fault::Unmapped { .. }) => unmapped += 1,
                Err(Fault::Protected { .. }) => protected += 1,
                Err(fault) => panic!("{fault}"),
            }
        }
    });
    println!("right sums: {right}; answers that a page is not mapped: {unmapped}, not readable: {protected}; wrong sums: 0");
    println!("pages that migrated: {}", hmm.stats().bytes_to_device);
    assert!(right > 0 && hmm.stats().bytes_to_device == 0);
    Ok(())
}
