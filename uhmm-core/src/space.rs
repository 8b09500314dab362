//! The process's address space as uhmm holds it: the userfaultfd of the program's ranges, its page table, its mappings, and the
//! event lock.
//!
//! # The event lock
//! The kernel reports munmap, mremap and madvise through the userfaultfd. Only the monitor reads, and it holds the lock exclusively from the read until
//! the directory follows. Whoever acts on the directory holds it shared from the look to the end of the act. What is unread while he acts makes the
//! kernel answer EAGAIN to his call, since every page leaves the program into memory that is registered in this same userfaultfd: he then drops his
//! locks, [`Space::settle`]s and looks again.

use crate::bits::Bits;
use crate::left::Left;
use crate::mirror::Reason;
use crate::mirror::registry::Mirrors;
use crate::mode::Mode;
use crate::page::{Span, Va};
use crate::sync::*;
use uhmm_os::maps::{Maps, Vma};
use uhmm_os::pagemap::{Category, Entry, Pagemap, Region, ScanArgs};
use uhmm_os::uffd::{Features, RegisterMode, Userfaultfd};
use uhmm_os::{Errno, thread};

/// What the userfaultfd must be able to do.
pub(crate) const NEEDED: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_UNMAP)
    .union(Features::THREAD_ID)
    .union(Features::EXACT_ADDRESS)
    .union(Features::MOVE);

/// What the CPU's page table says about pages of one block.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Present {
    /// Pages that exist (also in swap).
    pub pages: Bits,
    /// Pages that are the zero page.
    pub zero: Bits,
    /// Pages that are mapped by a whole block.
    pub huge_pages: Bits,
    /// All of them are one huge page.
    pub huge: bool,
}

/// Whether the next [`Space`] is to be able to put markers into empty entries.
static MARKERS: AtomicBool = AtomicBool::new(false);

/// Has the process's core, if it starts from now on, be able to give pages that are away the look of swapped ones ([`crate::port`]).
pub(crate) fn want_markers() {
    MARKERS.store(true, Ordering::Release);
}

/// The process's address space.
#[derive(Debug)]
pub(crate) struct Space {
    /// The userfaultfd of the program's ranges and of the pools.
    pub uffd: Userfaultfd,
    /// What this process may do.
    pub mode: Mode,
    /// The process's mappings.
    pub maps: Maps,
    /// Ranges that may stay on devices in user-mode-only mode.
    pub left: Left,
    /// Who is told of changes.
    pub(crate) mirrors: Mirrors,
    markers: bool,
    pagemap: Pagemap,
    events: RwLock<()>,
    /// How often the monitor has read all events there were, and followed them.
    turns: AtomicU64,
    /// How many find an event unread whenever they look: see [`Refusals`].
    impatient: AtomicU32,
}

impl Space {
    /// Opens everything. To be called on a thread whose descriptors are uhmm's own.
    ///
    /// # Errors
    /// [`crate::Error::NoUserfaultfd`] with what is missing; system errors of /proc.
    pub(crate) fn open() -> Result<Self, crate::Error> {
        let markers = MARKERS.load(Ordering::Acquire);
        let (mode, uffd) = Mode::choose(markers)?;
        Ok(Space {
            uffd,
            mode,
            left: Left::default(),
            mirrors: Mirrors::default(),
            markers: markers && mode == Mode::Full,
            maps: Maps::open().map_err(|e| crate::Error::System("open /proc/self/maps", e))?,
            pagemap: Pagemap::open().map_err(|e| crate::Error::System("open /proc/self/pagemap", e))?,
            events: RwLock::new(()),
            turns: AtomicU64::new(0),
            impatient: AtomicU32::new(0),
        })
    }

    /// Whether write-protecting an empty entry marks it.
    pub(crate) fn has_markers(&self) -> bool {
        self.markers
    }

    /// Shares the event lock: the directory follows every event that was read.
    pub(crate) fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.events.read()
    }

    /// Takes the event lock alone. For the monitor only.
    pub(crate) fn hold_alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.events.write()
    }

    /// The same, unless somebody has it.
    pub(crate) fn try_hold_alone(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.events.try_write()
    }

    /// Waits until every mapping event that was raised before this is read and followed. To be called without any lock.
    ///
    /// Not until none is unread: threads that do nothing but fork would always have raised another.
    pub(crate) fn settle(&self) {
        let mut times = 0;
        // The turn that is going on may have read before.
        let enough = self.turns.load(Ordering::Acquire) + 2;
        while self.uffd.event_pending() && self.turns.load(Ordering::Acquire) < enough {
            thread::pause(times);
            times += 1;
        }
    }

    /// The monitor has read all there was, and followed it.
    pub(crate) fn turned(&self) {
        self.turns.fetch_add(1, Ordering::Release);
    }

    /// Whether the monitor is to take its time before it reads: see [`Refusals`].
    pub(crate) fn is_impatient(&self) -> bool {
        self.impatient.load(Ordering::Relaxed) > 0
    }

    /// Watches a range for missing pages and for writes to protected ones.
    ///
    /// # Errors
    /// `EBUSY` where another userfaultfd has it, `EINVAL` where the kernel cannot watch.
    pub(crate) fn register(&self, span: Span) -> Result<(), Errno> {
        let missing = if self.mode == Mode::Full || self.left.at(span.start).0 { RegisterMode::MISSING } else { RegisterMode::empty() };
        self.uffd.register(span.start, span.len(), missing | RegisterMode::WP)
    }

    /// Watches what is mapped of a range of private anonymous memory, and calls `f` with each part that is watched now. The event lock is held.
    ///
    /// Pages may go `to` a device from now on, which mirrors are told of.
    ///
    /// Registering skips what is not mapped, and a mapping that nobody watched has gone, or come since, without an event: so it is looked up what is mapped
    /// after that, and of each mapping the kernel is asked whether it is registered.
    ///
    /// # Errors
    /// As [`register`](Self::register); `EAGAIN` if an event is unread.
    pub(crate) fn watch(&self, span: Span, to: Option<u32>, mut f: impl FnMut(Span)) -> Result<(), Errno> {
        // What is watched for missing pages a mirror must not write: see `mirror`'s walk.rs.
        if self.mirrors.any() {
            self.mirrors.begin(span, Reason::Migrate { to });
            let done = self.register(span);
            self.mirrors.end(span);
            done?;
        } else {
            self.register(span)?;
        }
        let mut at = span.start;
        while at < span.end {
            let Some(vma) = self.maps.find(at)? else { break };
            let part = Span { start: vma.start, end: vma.end }.and(Span { start: at, end: span.end });
            at = vma.end;
            if part.is_empty() {
                continue;
            }
            if vma.is_private_anonymous() && self.uffd.watches(part.start)? {
                f(part);
            }
        }
        Ok(())
    }

    /// Has the changes of private anonymous memory announced. What is watched for more than that already stays so.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub(crate) fn watch_events(&self, span: Span) -> Result<(), Errno> {
        self.uffd.register(span.start, span.len(), RegisterMode::WP)
    }

    /// What the page table says of pages from `start` on: how many it tells of.
    pub(crate) fn page_entries(&self, start: Va, entries: &mut [Entry]) -> Result<usize, Errno> {
        self.pagemap.entries(start, entries)
    }

    /// Which pages of `span`, which lies in one block, exist on the CPU's side.
    pub(crate) fn present(&self, span: Span) -> Result<Present, Errno> {
        let wanted = Category::PRESENT | Category::SWAPPED;
        let return_mask = wanted | Category::PFNZERO | Category::HUGE;
        let args = ScanArgs { any_of: wanted, return_mask, ..ScanArgs::all_of(Category::empty()) };
        let mut found = Present { huge: true, ..Present::default() };
        let mut at = span.start;
        while at < span.end {
            let mut regions = [Region::EMPTY; 32];
            let scan = self.pagemap.scan(at, span.end, &args, &mut regions)?;
            for region in &regions[..scan.filled] {
                let bits = Span { start: region.start, end: region.end }.and(span).bits();
                found.pages |= bits;
                if region.categories.contains(Category::PFNZERO) {
                    found.zero |= bits;
                }
                if region.categories.contains(Category::HUGE) {
                    found.huge_pages |= bits;
                } else {
                    found.huge = false;
                }
            }
            if scan.walk_end <= at {
                break;
            }
            at = scan.walk_end;
        }
        found.huge &= found.pages == Bits::ALL && found.zero.is_empty();
        Ok(found)
    }

    /// Whether a page of this mapping, which the page table has not got, is none of memory: a device's, or the kernel's.
    pub(crate) fn is_no_memory(&self, vma: &Vma, page: Va) -> bool {
        !vma.is_private_anonymous() && self.pagemap.is_no_memory(page)
    }

    /// Whether a page is there and write-protected.
    pub(crate) fn is_protected(&self, page: Va) -> bool {
        self.pagemap.entry(page).is_ok_and(|entry| entry.present && entry.uffd_wp)
    }

    /// Pages of `span`, which lies in one block, that the CPU has not written since they were protected asynchronously.
    pub(crate) fn clean(&self, span: Span) -> Bits {
        let args = ScanArgs {
            inverted: Category::WRITTEN,
            any_of: Category::PRESENT | Category::SWAPPED,
            return_mask: Category::WPALLOWED,
            ..ScanArgs::all_of(Category::WPALLOWED | Category::WRITTEN)
        };
        let mut clean = Bits::EMPTY;
        let mut at = span.start;
        while at < span.end {
            let mut regions = [Region::EMPTY; 32];
            let Ok(scan) = self.pagemap.scan(at, span.end, &args, &mut regions) else { break };
            for region in &regions[..scan.filled] {
                clean |= Span { start: region.start, end: region.end }.and(span).bits();
            }
            if scan.walk_end <= at {
                break;
            }
            at = scan.walk_end;
        }
        clean
    }

    /// The mapping that covers `va`, if there is one.
    ///
    /// # Errors
    /// Those of /proc.
    pub(crate) fn mapping(&self, va: Va) -> Result<Option<Vma>, Errno> {
        self.maps.covering(va)
    }
}

impl Space {
    /// Whether pages of the mapping, at `at`, may leave the program and stay on a device, and up to where that answer holds.
    pub(crate) fn moves(&self, vma: &Vma, at: Va) -> (bool, Va) {
        match self.mode {
            Mode::Full => (movable(vma), vma.end),
            Mode::UserModeOnly if movable(vma) => {
                let (left, end) = self.left.at(at);
                (left, end.min(vma.end))
            }
            _ => (false, vma.end),
        }
    }

    /// Whether copies of the mapping's pages may stay on a device while the CPU keeps its own.
    pub(crate) fn shares(&self, vma: &Vma) -> bool {
        self.mode != Mode::None && vma.is_private_anonymous() && vma.read
    }
}

/// How often in a row somebody was refused because an event was unread.
///
/// The kernel counts an event until the one who raised it has woken, and who waits for the event lock gets it just after a read, when nobody has. If some threads do
/// nothing but raise events, and there are more threads than cores, there is always one. So as long as somebody has been refused often, the monitor takes its
/// time before each read: by then they all wait, the read wakes them together, and before the first of them raises another there is a moment without.
#[derive(Debug)]
pub(crate) struct Refusals<'a> {
    space: &'a Space,
    times: u32,
}

impl<'a> Refusals<'a> {
    const MANY: u32 = 10;

    /// None yet.
    pub(crate) fn new(space: &'a Space) -> Self {
        Refusals { space, times: 0 }
    }

    /// One more. Waits until it is worth trying again; to be called without any lock.
    pub(crate) fn wait(&mut self) {
        self.times = self.times.saturating_add(1);
        if self.times == Self::MANY {
            self.space.impatient.fetch_add(1, Ordering::Relaxed);
        }
        self.space.settle();
    }
}

impl Drop for Refusals<'_> {
    fn drop(&mut self) {
        if self.times >= Self::MANY {
            self.space.impatient.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether pages of the mapping can move: anonymous, private, readable and writable.
pub(crate) fn movable(vma: &Vma) -> bool {
    vma.is_private_anonymous() && vma.read && vma.write
}
