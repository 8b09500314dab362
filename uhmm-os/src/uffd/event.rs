//! The messages of a userfaultfd, read in batches into a buffer that lies wherever its owner puts it. *Fault path.*

use crate::syscall::abi;
use core::fmt;
use core::mem::MaybeUninit;
use rustix::fd::RawFd;

/// What happened.
///
/// A fault may be delivered before an older mapping event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread touched a page that is missing or write-protected, and waits.
    Fault {
        /// The address: of the page, or exact with [`Features::EXACT_ADDRESS`](super::Features::EXACT_ADDRESS).
        address: usize,
        /// It was a write.
        write: bool,
        /// The page is there, but write-protected.
        wp: bool,
        /// The page is in the page cache, but not mapped.
        minor: bool,
        /// The thread, with [`Features::THREAD_ID`](super::Features::THREAD_ID), else 0.
        tid: u32,
    },
    /// The process forked; the descriptor of the child's userfaultfd belongs to whoever reads this
    /// ([`Userfaultfd::from_fork`](super::Userfaultfd::from_fork)).
    Fork {
        /// It, in the reading thread's descriptor table.
        fd: RawFd,
    },
    /// mremap moved a mapping; it has happened.
    Remap {
        /// The old address.
        from: usize,
        /// The new one.
        to: usize,
        /// The old length.
        len: usize,
    },
    /// madvise (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`) will drop pages after this is read.
    Remove {
        /// First address.
        start: usize,
        /// One past the last.
        end: usize,
    },
    /// munmap (or a mapping over it, or a shrinking mremap) dropped mappings; it has happened.
    Unmap {
        /// First address.
        start: usize,
        /// One past the last.
        end: usize,
    },
}

/// Room for messages, in place: nothing is allocated.
pub struct MsgBuf {
    messages: [MaybeUninit<abi::uffd_msg>; Self::CAPACITY],
    /// INVARIANT: that many messages, from the first, were written by the kernel.
    count: usize,
}

impl MsgBuf {
    /// The most messages of one read.
    pub const CAPACITY: usize = 64;

    /// An empty buffer.
    pub const fn new() -> Self {
        MsgBuf { messages: [const { MaybeUninit::uninit() }; Self::CAPACITY], count: 0 }
    }

    /// What the last read brought, oldest first. A message of a kind that this version does not know is left out.
    pub fn events(&self) -> Events<'_> {
        // INVARIANT of `count` makes this the initialised part; `get` cannot fail, and does not panic.
        Events { left: self.messages.get(..self.count).unwrap_or(&[]).iter() }
    }

    pub(super) fn clear(&mut self) {
        self.count = 0;
    }

    /// Where to write, and how many bytes.
    pub(super) fn space(&mut self) -> (*mut u8, usize) {
        (self.messages.as_mut_ptr().cast(), size_of_val(&self.messages))
    }

    /// Notes that the kernel wrote that many bytes, and returns the number of messages.
    pub(super) fn set_bytes(&mut self, bytes: usize) -> usize {
        self.count = bytes / size_of::<abi::uffd_msg>();
        self.count
    }
}

impl Default for MsgBuf {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MsgBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.events()).finish()
    }
}

/// The events in a [`MsgBuf`].
#[derive(Clone)]
pub struct Events<'a> {
    left: core::slice::Iter<'a, MaybeUninit<abi::uffd_msg>>,
}

impl Iterator for Events<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        loop {
            // SAFETY: `MsgBuf::events` hands out only messages that the kernel wrote.
            let message = unsafe { self.left.next()?.assume_init_ref() };
            if let Some(event) = decode(message) {
                return Some(event);
            }
        }
    }
}

fn decode(message: &abi::uffd_msg) -> Option<Event> {
    let arg = message.arg; // a copy: the structure is packed
    // SAFETY: every member of the union is plain integers, and the kernel fills the whole message (the rest with zeros).
    Some(unsafe {
        match u32::from(message.event) {
            abi::UFFD_EVENT_PAGEFAULT => {
                let fault = arg.pagefault;
                let has = |flag: u32| fault.flags & u64::from(flag) != 0;
                Event::Fault {
                    address: fault.address as usize,
                    write: has(abi::UFFD_PAGEFAULT_FLAG_WRITE),
                    wp: has(abi::UFFD_PAGEFAULT_FLAG_WP),
                    minor: has(abi::UFFD_PAGEFAULT_FLAG_MINOR),
                    tid: fault.feat.ptid,
                }
            }
            abi::UFFD_EVENT_FORK => Event::Fork { fd: arg.fork.ufd as RawFd },
            abi::UFFD_EVENT_REMAP => Event::Remap { from: arg.remap.from as usize, to: arg.remap.to as usize, len: arg.remap.len as usize },
            abi::UFFD_EVENT_REMOVE => Event::Remove { start: arg.remove.start as usize, end: arg.remove.end as usize },
            abi::UFFD_EVENT_UNMAP => Event::Unmap { start: arg.remove.start as usize, end: arg.remove.end as usize },
            _ => return None,
        }
    })
}
