//! What a mirror says of pages, what it is asked for, and what can be wrong with that.

use crate::page::{Span, Va};
use uhmm_os::{BLOCK, Errno, PAGE};

/// What a device may do with one page now, as a look at the CPU's page table and at the directory found it.
///
/// It names no physical page: the kernel may exchange that at any time (compaction, swap) without a word, and the device reaches the page by its address in the
/// process.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    flags: u16,
    device: u16,
}

impl Entry {
    pub(super) const MAPPED: u16 = 1;
    pub(super) const READ: u16 = 2;
    pub(super) const WRITE: u16 = 4;
    pub(super) const WATCHED: u16 = 8;
    pub(super) const HUGE: u16 = 16;
    pub(super) const ZERO: u16 = 32;
    pub(super) const PRIVATE: u16 = 64;
    pub(super) const COHERENT: u16 = 128;
    /// The mapping may be read, whether there is a page or not.
    pub(super) const MAP_READ: u16 = 256;
    /// The mapping may be written.
    pub(super) const MAP_WRITE: u16 = 512;
    /// Private, and the asking port's own.
    pub(super) const OWN: u16 = 1024;
    /// Of a file that is a device's ([`crate::port`]).
    pub(super) const DEVICE_FILE: u16 = 2048;
    /// Not of memory, but of a device's, or of the kernel's alone.
    pub(super) const NO_MEMORY: u16 = 4096;
    /// Of a pool of pages of 1 GiB, besides [`HUGE`](Self::HUGE).
    pub(super) const GIANT: u16 = 8192;

    pub(super) fn new(flags: u16, device: u32) -> Self {
        Entry { flags, device: device as u16 }
    }

    pub(super) fn flags(self) -> u16 {
        self.flags
    }

    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// For ports: whether the mapping may be read, and written.
    pub(crate) fn mapping_allows(self) -> (bool, bool) {
        (self.has(Self::MAP_READ), self.has(Self::MAP_WRITE))
    }

    /// For ports: whether the page is the asking port's own, in its device's memory.
    pub(crate) fn is_own(self) -> bool {
        self.has(Self::OWN)
    }

    /// For ports: whether it is mapped from a device's file.
    pub(crate) fn is_of_device_file(self) -> bool {
        self.has(Self::DEVICE_FILE)
    }

    /// For ports: whether what is mapped is no memory.
    pub(crate) fn is_no_memory(self) -> bool {
        self.has(Self::NO_MEMORY)
    }

    /// For ports: whether a huge page's entry maps it, wherever the page lies.
    pub(crate) fn is_huge(self) -> bool {
        self.has(Self::HUGE)
    }

    /// For ports: whether an entry of 1 GiB maps it.
    pub(crate) fn is_giant(self) -> bool {
        self.has(Self::GIANT)
    }

    /// Whether the process has a mapping there.
    pub fn is_mapped(self) -> bool {
        self.has(Self::MAPPED)
    }

    /// Whether the page is in system memory (or in a coherent device's) and may be read where it is, without a fault.
    pub fn may_read(self) -> bool {
        self.has(Self::READ)
    }

    /// Whether it may be written there without a fault: it is neither read-only, nor the zero page, nor shared copy-on-write, nor write-protected because a device
    /// has a copy of it.
    pub fn may_write(self) -> bool {
        self.has(Self::WRITE)
    }

    /// Bytes of the page-table entry that maps it: 4 KiB or 2 MiB; 0 if the CPU has no page there. A kernel without `PAGEMAP_SCAN` (before 6.7) does not tell: it
    /// is always 4 KiB then.
    pub fn mapping_size(self) -> usize {
        match (self.has(Self::HUGE), self.may_read()) {
            (true, _) => BLOCK,
            (_, true) => PAGE,
            _ => 0,
        }
    }

    /// Whether it is the zero page, which is shared by all that was read and never written. (Told by Linux 6.7 and newer.)
    pub fn is_zero_page(self) -> bool {
        self.has(Self::ZERO)
    }

    /// The device ([`DeviceRef::id`](crate::DeviceRef::id)) whose memory holds the only copy, out of the CPU's and this mirror's reach until it comes home.
    pub fn on_device(self) -> Option<u32> {
        self.has(Self::PRIVATE).then_some(u32::from(self.device))
    }

    /// The coherent device whose memory it lies in; it is used there, in place.
    pub fn on_coherent_device(self) -> Option<u32> {
        self.has(Self::COHERENT).then_some(u32::from(self.device))
    }

    /// Whether changes of its mapping are announced: so it is for private anonymous memory that no other userfaultfd watches. Of shared and file memory only those
    /// are that are made through [`change`](super::change).
    pub fn is_watched(self) -> bool {
        self.has(Self::WATCHED)
    }
}

impl core::fmt::Debug for Entry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let names = ["mapped", "read", "write", "watched", "huge", "zero", "private", "coherent"];
        let mut set = f.debug_set();
        names.iter().enumerate().filter(|(bit, _)| self.has(1 << bit)).for_each(|(_, name)| {
            set.entry(&format_args!("{name}"));
        });
        set.finish()
    }
}

/// What is asked of one page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Want {
    /// Only to be told what is there.
    #[default]
    Nothing,
    /// To read it.
    Read,
    /// To read and write it: copy-on-write is broken, the zero page replaced, a page of a shared file mapping dirtied.
    Write,
}

/// What [`range_fault`](super::Mirror::range_fault) is asked for.
///
/// ```
/// use uhmm_core::mirror::{Request, Want};
/// let all = Request::read(); // every page of the range, for reading
/// let wants = [Want::Nothing, Want::Write];
/// let one = Request::each(&wants); // the second page only, for writing
/// let there = Request::read().leave_on_devices(); // a page that a device has stays there, and is reported
/// # let _ = (all, one, there);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub(super) default: Want,
    pub(super) each: &'a [Want],
    pub(super) leave: bool,
    /// The number of the port's device that asks, whose pages stay; 0 for none. See [`crate::port`].
    pub(super) own: u8,
    /// A port waits for pages that another userfaultfd has to provide.
    pub(super) wait: bool,
}

impl<'a> Request<'a> {
    /// All pages, for reading.
    pub fn read() -> Self {
        Request { default: Want::Read, each: &[], leave: false, own: 0, wait: true }
    }

    /// All pages, for reading and writing.
    pub fn write() -> Self {
        Request { default: Want::Write, ..Request::read() }
    }

    /// What `wants` says of each page, from the first of the range on; of those that it does not reach, nothing.
    pub fn each(wants: &'a [Want]) -> Self {
        Request { default: Want::Nothing, each: wants, leave: false, own: 0, wait: true }
    }

    /// A page that a device has alone stays there, and its entry says so. Otherwise it comes home, as if the CPU touched it.
    pub fn leave_on_devices(self) -> Self {
        Request { leave: true, ..self }
    }

    /// Pages that lie in the memory of the port's device with this number are as good as here.
    pub(crate) fn for_port(self, number: u8, wait: bool) -> Self {
        Request { own: number, wait, ..self }
    }

    pub(super) fn of(&self, page: usize) -> Want {
        self.each.get(page).copied().unwrap_or(self.default)
    }
}

/// Entries of a range, and the number to compare before they are used.
#[derive(Clone, Debug)]
pub struct Pages {
    /// The pages.
    pub span: Span,
    /// As [`read_begin`](super::Mirror::read_begin) gave it before the look: if [`read_retry`](super::Mirror::read_retry) says that it is old, look again.
    pub seq: u64,
    /// How often it took to look; 1 if nothing came between.
    pub rounds: u32,
    /// One for each page.
    pub entries: Vec<Entry>,
}

impl Pages {
    /// The entry of the page that holds `va`.
    pub fn at(&self, va: Va) -> Option<Entry> {
        self.entries.get(va.checked_sub(self.span.start)? / PAGE).copied()
    }
}

/// Why pages cannot be had. Nothing was changed, but that pages before `address` may have been faulted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Nothing is mapped there.
    #[error("nothing is mapped at {address:#x}")]
    Unmapped {
        /// The page.
        address: Va,
    },
    /// The mapping does not allow that.
    #[error("the memory at {address:#x} is {}", if *.write { "not writable" } else { "not readable" })]
    Protected {
        /// The page.
        address: Va,
        /// What it was wanted for.
        write: bool,
    },
    /// There is a mapping that allows it, but no page to be had: beyond the end of a file, a device's mapping, a hardware error.
    #[error(
        "the memory at {address:#x} is mapped, but its page cannot be had (beyond the end of a file, memory of a device, or a hardware error)"
    )]
    Unreachable {
        /// The page.
        address: Va,
    },
    /// The range was invalidated again and again until the time was over.
    #[error(
        "the range was invalidated again and again, {rounds} times, until its time was over: try again when the program leaves its mappings alone for a moment"
    )]
    Busy {
        /// How often it was looked at.
        rounds: u32,
    },
    /// The range is empty, not page-aligned, or not inside the mirror's.
    #[error("{start:#x} to {end:#x} is not a range of whole pages inside the mirror's")]
    Range {
        /// Its start.
        start: Va,
        /// Its end.
        end: Va,
    },
    /// Asked from a kernel that runs on a device: the page might be waiting for the end of its launch.
    #[error("a kernel cannot fault pages in for a mirror: do it outside of launches")]
    Reentrant,
    /// The system refuses.
    #[error("cannot look at the process's memory: {0}")]
    System(Errno),
}
