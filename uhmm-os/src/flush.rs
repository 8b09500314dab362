//! Has every core forget all of this process's translations. *Fault path.*
//!
//! There is no call for it. But taking the access away from more pages than `tlb_single_page_flush_ceiling` (33, the kernel's arch/x86/tlb) flushes everything,
//! and returns when all cores have done so. Rule: what is needed for that is had beforehand, for a flush is asked for when memory is short, and who asks cannot
//! go on without it. The pages are the kernel's page of zeroes, so that none is ever swapped out, moved or allocated; and the mapping is like no other, so that
//! the kernel never joins it to a neighbour, which it would then have to split again.

use crate::mem::{self, Advice, Mapping, Prot, Reserve};
use crate::{Errno, PAGE, thread};
use core::sync::atomic::{AtomicBool, Ordering};

const PAGES: usize = 128;

/// What a flush needs.
#[derive(Debug)]
pub(crate) struct Flush {
    /// A page that keeps two of these apart, and the pages.
    memory: Mapping,
    /// Somebody flushes. Who finds the access taken away already would return before the other's flush, or flush nothing.
    busy: AtomicBool,
}

impl Flush {
    /// # Errors
    /// Those of [`mem::map`].
    pub(crate) fn new() -> Result<Self, Errno> {
        let reserve = Reserve { hint: 0, len: (1 + PAGES) * PAGE, align: PAGE, name: c"uhmm flush", prot: Prot::None, exact: false };
        let flush = Flush { memory: mem::map(&reserve)?, busy: AtomicBool::new(false) };
        let (start, len) = flush.pages();
        // SAFETY: fresh memory of ours. Small pages, for it is their number that counts. Memory that cannot be written is none that moves to devices.
        unsafe {
            let _ = mem::madvise(start, len, Advice::NoHugepage); // an error: there are no huge pages
            mem::madvise(start, len, Advice::Random)?;
            mem::mprotect(start, len, Prot::Read)?;
            mem::madvise(start, len, Advice::PopulateRead)?;
        }
        Ok(flush)
    }

    fn pages(&self) -> (usize, usize) {
        (self.memory.start() + PAGE, PAGES * PAGE)
    }

    /// Afterwards nobody reaches, through an old translation, a page that is not at that address any more.
    ///
    /// # Errors
    /// None is known: it asks the kernel for nothing that it could be short of.
    pub(crate) fn all(&self) -> Result<(), Errno> {
        while self.busy.swap(true, Ordering::Acquire) {
            thread::yield_now(); // the other makes two system calls, and waits for nothing of this process's
        }
        let (start, len) = self.pages();
        // SAFETY: nobody touches this memory.
        let result = unsafe { mem::mprotect(start, len, Prot::None).and_then(|()| mem::mprotect(start, len, Prot::Read)) };
        self.busy.store(false, Ordering::Release);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What /proc/self/pagemap says of the pages: how many are there.
    fn present(flush: &Flush) -> usize {
        let (start, len) = flush.pages();
        let pagemap = crate::pagemap::Pagemap::open().unwrap();
        pagemap.present_from(start, start + len) / PAGE
    }

    #[test]
    fn it_can_be_done_over_and_over_by_many() {
        let flush = Flush::new().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..300).for_each(|_| flush.all().unwrap()));
            }
        });
        assert_eq!(present(&flush), PAGES, "without its pages it flushes nothing");
    }

    /// The story: a flush took memory of its own, and where the process may have no more mappings, there was none, which nobody minded.
    #[test]
    fn it_needs_no_mapping_and_no_memory() {
        // SAFETY: the child makes raw system calls only, and ends.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::_exit(i32::from(!without_mappings()));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            assert_eq!(status, 0);
        }
    }

    fn without_mappings() -> bool {
        // Two neighbours, as a process with two userfaultfds has them.
        let (Ok(one), Ok(two)) = (Flush::new(), Flush::new()) else { return false };
        let whole = Reserve { hint: 0, len: PAGE << 18, align: PAGE, name: c"uhmm-test", prot: Prot::None, exact: false };
        let Ok(memory) = mem::map(&whole) else { return false };
        let mut at = memory.start();
        // Every second page of it a mapping of its own, until the process has as many as it may.
        // SAFETY: memory of the test's own.
        while unsafe { mem::mprotect(at, PAGE, Prot::Read) }.is_ok() {
            at += 2 * PAGE;
            if at >= memory.end() {
                return false;
            }
        }
        // The last try may have found room for one of the two that it needed.
        // SAFETY: as above.
        let _ = unsafe { mem::mprotect(memory.end() - PAGE, PAGE, Prot::Read) };
        one.all().is_ok() && two.all().is_ok()
    }
}
