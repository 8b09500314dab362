//! A port's page table: which pages the device may access now.
//!
//! An entry names the page's rights and remembers a part of the number of the frame that the CPU's page table had there, where the system tells it: copy-on-write, the first write to the
//! zero page and swapping change that number, and announce nothing.
//!
//! # Rules
//! * Only the port's thread enters; any of uhmm's threads may erase, with whatever lock held. What is erased between the look and the entry is not entered: the entry's generation
//!   has changed.
//! * Blocks get a slot when something is entered there first, and keep it.

use crate::bits::PAGES;
use crate::mirror::{Notifier, Reason};
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Span, Va};
use crate::sync::*;
use uhmm_os::{BLOCK, Errno, PAGE};

/// Blocks that can have entries: half a TiB.
const SLOTS: usize = 1 << 18;
const BLOCKS: usize = (1 << 47) / BLOCK;

/// The device may read the page.
pub(super) const READ: u64 = 1;
/// The device may write it.
pub(super) const WRITE: u64 = 2;
/// It is exclusive to the device.
pub(super) const EXCLUSIVE: u64 = 4;
/// Changes of its mapping are announced.
pub(super) const WATCHED: u64 = 8;
/// The page is the device's in name only.
pub(super) const NAMED: u64 = 16;
const FLAGS: u64 = 0x1f;
const RAISE: u64 = 0x20;
const GENERATION: u64 = 0xffff_ffe0;
const FRAME_SHIFT: u32 = 32;

#[derive(Debug)]
struct Slot {
    block: AtomicUsize,
    entries: [AtomicU64; PAGES],
}

#[allow(unsafe_code)]
// SAFETY: zeroes are no entries.
unsafe impl Zeroed for Slot {}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    /// For each block its slot, plus 1.
    index: OwnSlice<AtomicU32>,
    slots: OwnSlice<Slot>,
    used: AtomicUsize,
    /// Migrations to these do not erase: the memory that all ports share, and the port's own device.
    own: [u32; 2],
}

/// One entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Word(u64);

impl Word {
    pub(super) fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    /// Whether the CPU's page table still has the frame there that it had.
    pub(super) fn is_frame(self, frame: u64) -> bool {
        (self.0 >> FRAME_SHIFT) as u32 == frame as u32
    }
}

impl Table {
    pub(super) fn new(own: [u32; 2]) -> Result<Self, Errno> {
        Ok(Table {
            index: OwnSlice::new(c"uhmm port", BLOCKS)?,
            slots: OwnSlice::new(c"uhmm port", SLOTS)?,
            used: AtomicUsize::new(0),
            own,
        })
    }

    fn entry(&self, va: Va) -> Option<&AtomicU64> {
        let slot = self.index.get(va / BLOCK)?.load(Ordering::Acquire).checked_sub(1)?;
        self.slots.get(slot as usize)?.entries.get(va % BLOCK / PAGE)
    }

    /// The entry of a page; `None` if it never had one.
    pub(super) fn word(&self, va: Va) -> Option<Word> {
        self.entry(va).map(|entry| Word(entry.load(Ordering::SeqCst)))
    }

    /// Makes room for a block's entries. False if there is none.
    pub(super) fn prepare(&self, va: Va) -> bool {
        let Some(index) = self.index.get(va / BLOCK) else { return false };
        if index.load(Ordering::Acquire) != 0 {
            return true;
        }
        let number = self.used.load(Ordering::Relaxed);
        let Some(slot) = self.slots.get(number) else { return false };
        slot.block.store(va / BLOCK, Ordering::Relaxed);
        index.store(number as u32 + 1, Ordering::SeqCst);
        self.used.store(number + 1, Ordering::SeqCst);
        true
    }

    /// Enters a page, whose block has room, as long as `valid`. False if it was not, or an invalidation came between.
    pub(super) fn enter(&self, va: Va, flags: u64, frame: u64, valid: impl Fn() -> bool) -> bool {
        let Some(entry) = self.entry(va) else { return false };
        let old = entry.load(Ordering::SeqCst);
        let new = old & GENERATION | flags | frame << FRAME_SHIFT;
        valid() && entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// An access has found that the entry is not true any more: it goes, unless it is another by now.
    pub(super) fn refute(&self, va: Va, word: Word) {
        if let Some(entry) = self.entry(va) {
            let _ = entry.compare_exchange(word.0, erased(word.0), Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Erases the entries of a span. *Fault path.*
    pub(super) fn erase(&self, span: Span) {
        let (first, end) = (span.start / BLOCK, span.end.div_ceil(BLOCK));
        let used = self.used.load(Ordering::SeqCst);
        if end.saturating_sub(first) <= used {
            for block in first..end {
                let slot = self.index.get(block).and_then(|index| index.load(Ordering::Acquire).checked_sub(1));
                if let Some(slot) = slot.and_then(|slot| self.slots.get(slot as usize)) {
                    slot.erase(block, span);
                }
            }
        } else {
            for slot in self.slots.iter().take(used) {
                slot.erase(slot.block.load(Ordering::Relaxed), span);
            }
        }
    }
}

impl Slot {
    fn erase(&self, block: usize, span: Span) {
        let part = Span::block(block * BLOCK).and(span);
        if part.is_empty() {
            return;
        }
        for entry in &self.entries[part.start % BLOCK / PAGE..][..part.len().div_ceil(PAGE)] {
            let _ = entry.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some(erased(old)));
        }
    }
}

fn erased(old: u64) -> u64 {
    (old & GENERATION).wrapping_add(RAISE) & GENERATION
}

impl Notifier for Table {
    fn invalidate(&self, span: Span, reason: Reason) {
        let own = matches!(reason, Reason::Migrate { to: Some(device) } if self.own.contains(&device));
        if !own {
            self.erase(span);
        }
    }
}

const _: () = assert!(FLAGS & GENERATION == 0 && RAISE > FLAGS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_was_erased_meanwhile_is_not_entered() {
        let table = Table::new([1, 7]).unwrap();
        let at = 0x7f12_3450_0000;
        assert!(table.word(at).is_none() && !table.enter(at, READ, 5, || true));
        assert!(table.prepare(at));
        assert!(table.enter(at, READ | WRITE, 5, || true));
        let word = table.word(at).unwrap();
        assert!(word.has(READ) && word.has(WRITE) && word.is_frame(5) && !word.is_frame(6));
        let erase = || {
            table.erase(Span { start: 0, end: 1 << 47 });
            true
        };
        assert!(!table.enter(at, READ, 7, erase));
        assert!(!table.word(at).unwrap().has(READ));
        assert!(table.enter(at, READ, 7, || true));
        table.refute(at, word);
        assert!(table.word(at).unwrap().has(READ), "another entry by now");
        table.invalidate(Span::block(at), Reason::Migrate { to: Some(1) });
        assert!(table.word(at).unwrap().has(READ), "its own device's");
        table.invalidate(Span { start: at, end: at + PAGE }, Reason::Migrate { to: Some(2) });
        assert!(!table.word(at).unwrap().has(READ));
    }
}
