//! A page table for devices that a program models: which pages of a mirrored range the device may use, and the accesses themselves.
//!
//! # Rules
//! * An entry is a number that every invalidation raises, and what the device may do. So an invalidation that comes between a look and its entering is noticed,
//!   and nobody waits for a lock: an invalidation comes from threads that serve page faults, and whoever enters lives in memory that may be away.
//! * What was read through an entry counts only if the entry is the same afterwards, and what the monitor has read by then is followed.

use super::{Entry, Notifier, Pages, Reason};
use crate::error::Error;
use crate::own::OwnSlice;
use crate::page::{Span, Va};
use crate::sync::*;
use core::ops::Range;
use uhmm_os::PAGE;

/// Entries of which is noted together whether any was ever made: what an invalidation of a large range passes over.
const CHUNK: usize = 512;
const FLAGS: usize = 0xff;
const RAISE: usize = 0x100;

/// A device's page table over a mirrored range: 8 bytes a page that was ever entered.
///
/// It is a [`Notifier`] that erases what is invalidated, for any reason. A device that has more to do at that has one inside, and calls
/// [`erase`](Self::erase). The accesses are [`Mirror::read`](super::Mirror::read) and [`Mirror::write`](super::Mirror::write).
#[derive(Debug)]
pub struct PageTable {
    span: Span,
    entries: OwnSlice<AtomicUsize>,
    /// Whether any entry of a chunk was ever made.
    used: OwnSlice<AtomicUsize>,
}

impl PageTable {
    /// An empty table for the pages that a byte range touches.
    ///
    /// # Errors
    /// [`Error::System`] if its address space is refused.
    pub fn new(range: Range<Va>) -> Result<Self, Error> {
        let reserve = |e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e);
        let span = Span::touching(range.start, range.end);
        let pages = span.end.saturating_sub(span.start) / PAGE;
        Ok(PageTable {
            span,
            entries: OwnSlice::new(c"uhmm mirror", pages).map_err(reserve)?,
            used: OwnSlice::new(c"uhmm mirror", pages.div_ceil(CHUNK)).map_err(reserve)?,
        })
    }

    /// Erases the entries of a span: the device uses these pages no more. *Fault path.*
    pub fn erase(&self, span: Span) {
        let part = self.span.and(span);
        let (mut at, end) = (part.start.saturating_sub(self.span.start) / PAGE, part.end.saturating_sub(self.span.start) / PAGE);
        while at < end && !part.is_empty() {
            let next = (at / CHUNK * CHUNK + CHUNK).min(end);
            if self.used[at / CHUNK].load(Ordering::SeqCst) != 0 {
                for entry in &self.entries[at..next] {
                    let _ = entry.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some((old & !FLAGS).wrapping_add(RAISE)));
                }
            }
            at = next;
        }
    }

    /// What the device may do with the page that holds `va`: read it, write it.
    pub fn allows(&self, va: Va) -> (bool, bool) {
        let flags = self.word(va).unwrap_or(0) as u16;
        (flags & Entry::READ != 0, flags & Entry::WRITE != 0)
    }

    /// The word of a page; `None` outside of the table.
    pub(super) fn word(&self, va: Va) -> Option<usize> {
        let index = va.checked_sub(self.span.start)? / PAGE;
        self.entries.get(index).map(|entry| entry.load(Ordering::SeqCst))
    }

    /// An access has found that the entry is not true (the program has protected the page behind our back): it goes, unless it is another by now.
    pub(super) fn refute(&self, va: Va, word: usize) {
        if let Some(entry) = self.entries.get(va.wrapping_sub(self.span.start) / PAGE) {
            let _ = entry.compare_exchange(word, (word & !FLAGS).wrapping_add(RAISE), Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Enters what was looked up, as long as `valid`. False if it was not, or an invalidation came between.
    pub(super) fn enter(&self, pages: &Pages, valid: impl Fn() -> bool) -> bool {
        for (page, entry) in pages.entries.iter().enumerate() {
            let usable = entry.flags() & (Entry::READ | Entry::WRITE | Entry::WATCHED);
            let Some(index) = (pages.span.start + page * PAGE).checked_sub(self.span.start).map(|offset| offset / PAGE) else { continue };
            if usable & Entry::READ == 0 || index >= self.entries.len() {
                continue;
            }
            // First, so that an invalidation either sees it or is seen by `valid`.
            self.used[index / CHUNK].store(1, Ordering::SeqCst);
            let old = self.entries[index].load(Ordering::SeqCst);
            let new = (old & !FLAGS) | usize::from(usable);
            if !valid() || self.entries[index].compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                return false;
            }
        }
        true
    }
}

impl Notifier for PageTable {
    fn invalidate(&self, span: Span, _reason: Reason) {
        self.erase(span);
    }
}

/// Notifiers with a page table, through which a mirror's accesses go.
///
/// ```
/// use uhmm_core::mirror::{HasTable, Notifier, PageTable, Reason, Span};
///
/// /// A device that has more to do at an invalidation than to erase entries.
/// struct Mine {
///     table: PageTable,
/// }
///
/// impl Notifier for Mine {
///     fn invalidate(&self, span: Span, reason: Reason) {
///         self.table.erase(span);
///         if let Reason::Remap { to } = reason {
///             let _ = to; // tell the device where its buffer is now
///         }
///     }
/// }
///
/// impl HasTable for Mine {
///     fn table(&self) -> &PageTable {
///         &self.table
///     }
/// }
///
/// let mine = Mine { table: PageTable::new(0x10000..0x20000)? };
/// mine.invalidate(Span { start: 0x10000, end: 0x11000 }, Reason::Unmap);
/// assert_eq!(mine.table().allows(0x10000), (false, false));
/// # Ok::<(), uhmm_core::Error>(())
/// ```
pub trait HasTable: Notifier {
    /// The table.
    fn table(&self) -> &PageTable;
}

impl HasTable for PageTable {
    fn table(&self) -> &PageTable {
        self
    }
}

/// An access to a page that the device has no entry for: a device fault. Ask for the page ([`Mirror::range_fault`](super::Mirror::range_fault)), enter it, and
/// repeat the access.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the device has no entry for {address:#x} that allows {}", if *.write { "writing" } else { "reading" })]
pub struct Miss {
    /// The first byte that could not be reached.
    pub address: Va,
    /// Whether it was to be written.
    pub write: bool,
}
