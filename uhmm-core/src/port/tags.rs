//! Whose the pages are that lie in the memory which all ports share.
//!
//! A block of the process is on one device at a time ([`crate::directory`]), but pages of one block may belong to several ports' devices. So all of them lie in one memory, and a tag for
//! each page says whose it is.
//!
//! # Rules
//! * A tag counts only while the directory calls the page resident on that memory. It is set before the page migrates, by who has the turn alone, and moves along with the page
//!   when its mapping is moved.
//! * A private page stays in that memory; a coherent one goes into the program ([`crate::coherent`]). An exclusive one is private, and nobody's for looks.

use super::Owner;
use crate::bits::{Bits, PAGES};
use crate::core::{Core, EVERYTHING};
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Span, Va};
use crate::sync::*;
use std::sync::OnceLock;
use uhmm_os::pagemap;
use uhmm_os::{Errno, PAGE, signal};

/// Addresses of a process, in pages.
const ALL: usize = (1 << 47) / PAGE;
/// Ports that write at the same time.
const WRITERS: usize = 16;
/// Device files whose mappings are known.
const FILES: usize = 64;

const NUMBER: u8 = 0x0f;
const COHERENT: u8 = 0x40;
const EXCLUSIVE: u8 = 0x80;

#[allow(unsafe_code)]
// SAFETY: zeroes are no tag.
unsafe impl Zeroed for AtomicU8 {}

/// Files by device (major, minor) and inode, and how many there ever were.
type Files = ([(u32, u32, u64); FILES], usize);

/// The tags of a process.
#[derive(Debug)]
pub(crate) struct Tags {
    pages: OnceLock<OwnSlice<AtomicU8>>,
    /// For coherent pages the number of the CPU's frame, a part of it, where the system tells: another one there is not the device's page any more.
    frames: OnceLock<OwnSlice<AtomicU32>>,
    /// Whether the process has ever forked: until then no frame is another one by copy-on-write.
    forked: AtomicBool,
    /// Device number plus 1.
    store: AtomicU32,
    files: Mutex<Files>,
    /// Threads that write to the process's memory with the event lock held: see `access`.
    writers: [AtomicU32; WRITERS],
    /// Start and end of what may be written for a moment that the program may not write: see `migrate`. Both are 0 otherwise.
    unlocked: [AtomicUsize; 2],
}

impl Default for Tags {
    fn default() -> Self {
        Tags {
            pages: OnceLock::new(),
            frames: OnceLock::new(),
            forked: AtomicBool::new(false),
            store: AtomicU32::new(0),
            files: Mutex::new(([(0, 0, 0); FILES], 0)),
            writers: [const { AtomicU32::new(0) }; WRITERS],
            unlocked: [const { AtomicUsize::new(0) }; 2],
        }
    }
}

/// What the tags of one block's pages say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tagged {
    /// Pages of the asked owner's.
    pub(crate) own: Bits,
    /// Pages that are exclusive to whoever.
    pub(crate) exclusive: Bits,
    /// Pages that do not go into the program.
    pub(crate) private: Bits,
}

impl Tags {
    /// Makes room for tags, of pages on the device with this id.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn begin(&self, store: u32) -> Result<(), Errno> {
        if self.pages.get().is_none() {
            let _ = self.frames.set(OwnSlice::new(c"uhmm tags", ALL)?);
            let _ = self.pages.set(OwnSlice::new(c"uhmm tags", ALL)?);
        }
        self.store.store(store, Ordering::Release);
        Ok(())
    }

    /// The device that tagged pages lie on: its id. 0 if there is none.
    pub(crate) fn store(&self) -> u32 {
        self.store.load(Ordering::Acquire)
    }

    fn slot(&self, va: Va) -> Option<&AtomicU8> {
        self.pages.get()?.get(va / PAGE)
    }

    /// Tags pages of the block at `va`.
    pub(crate) fn set(&self, va: Va, pages: Bits, owner: Owner, exclusive: bool) {
        let tag = owner.number & NUMBER | if owner.coherent && !exclusive { COHERENT } else { 0 } | if exclusive { EXCLUSIVE } else { 0 };
        pages.pages().filter_map(|page| self.slot(va + page * PAGE)).for_each(|slot| slot.store(tag, Ordering::Relaxed));
    }

    /// Looks at the pages of the block at `va`, for the device with this number.
    pub(crate) fn of(&self, va: Va, number: u8) -> Tagged {
        let mut found = Tagged::default();
        let Some(all) = self.pages.get() else { return found };
        let first = Span::block(va).start / PAGE;
        for (page, slot) in all.iter().skip(first).take(PAGES).enumerate() {
            let tag = slot.load(Ordering::Relaxed);
            if tag & EXCLUSIVE != 0 {
                found.exclusive.set(page);
            } else if tag & NUMBER == number && number != 0 {
                found.own.set(page);
            }
            if tag != 0 && tag & COHERENT == 0 {
                found.private.set(page);
            }
        }
        found
    }

    /// Whether the page is tagged as that device's, and not exclusive.
    pub(crate) fn is(&self, va: Va, number: u8) -> bool {
        self.slot(va).is_some_and(|slot| {
            let tag = slot.load(Ordering::Relaxed);
            tag & EXCLUSIVE == 0 && tag & NUMBER == number
        })
    }

    /// Pages of the block at `va` that are tagged as that device's, exclusive or not.
    pub(crate) fn all_of(&self, va: Va, number: u8) -> Bits {
        let mut found = Bits::EMPTY;
        let first = Span::block(va).start / PAGE;
        for (page, slot) in self.pages.get().into_iter().flat_map(|all| all.iter().skip(first).take(PAGES)).enumerate() {
            if slot.load(Ordering::Relaxed) & NUMBER == number {
                found.set(page);
            }
        }
        found
    }

    /// Pages of the block at `va`, on the device with this id, that must not go into the program.
    pub(crate) fn private(&self, va: Va, device: u32) -> Bits {
        if device == 0 || self.store() != device { Bits::EMPTY } else { self.of(va, 0).private }
    }

    fn frame(&self, va: Va) -> u64 {
        self.frames.get().and_then(|all| all.get(va / PAGE)).map_or(0, |slot| u64::from(slot.load(Ordering::Relaxed)))
    }

    /// The coherent page at `va` has this frame.
    pub(crate) fn note_frame(&self, va: Va, frame: u64) {
        if let Some(slot) = self.frames.get().and_then(|all| all.get(va / PAGE)) {
            slot.store(frame as u32, Ordering::Relaxed);
        }
    }

    /// Whether the frame that the CPU has at a coherent page is still the one that was noted, so that copy-on-write has put no other in its place; where nothing was noted, yes.
    ///
    /// The kernel changes frames for reasons of its own, too (compaction, huge pages made of small ones). That counts only from the last fork on ([`forks`](Self::forks)).
    pub(crate) fn is_frame(&self, va: Va, frame: u64) -> bool {
        !self.forked.load(Ordering::Acquire) || matches!(self.frame(va), 0) || self.frame(va) as u32 == frame as u32
    }

    /// The process forks: from now on a coherent page with another frame than it has now is a copy.
    pub(crate) fn forks(&self, core: &Core) {
        let store = self.store();
        if store == 0 {
            return;
        }
        core.dir.for_each(EVERYTHING, |block, part| {
            let state = block.lock();
            let coherent = if state.device == store { state.coherent() } else { Bits::EMPTY };
            let mut entries = [pagemap::Entry::default(); PAGES];
            let Some(told) = coherent.next(0).and_then(|_| core.space.page_entries(part.start, &mut entries).ok()) else { return };
            for page in coherent.pages().filter(|page| *page < told && entries[*page].present) {
                let va = part.start + page * PAGE;
                if self.is_frame(va, entries[page].pfn) {
                    self.note_frame(va, entries[page].pfn);
                }
            }
        });
        self.forked.store(true, Ordering::Release);
    }

    /// The page at `from` is at `to` now.
    pub(crate) fn moved(&self, from: Va, to: Va) {
        if let (Some(from), Some(to)) = (self.slot(from), self.slot(to)) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.note_frame(to, self.frame(from));
    }

    /// Does something as a thread that [`interrupt_writers`](Self::interrupt_writers) finds. `None` if there are too many.
    pub(super) fn as_writer<R>(&self, tid: u32, f: impl FnOnce() -> R) -> Option<R> {
        let free = |slot: &&AtomicU32| slot.compare_exchange(0, tid, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let slot = self.writers.iter().find(free)?;
        let result = f();
        slot.store(0, Ordering::SeqCst);
        Some(result)
    }

    /// Ends writes that wait for a page. The page was there when they began; the mapping has changed since, and that its event is followed is what they would wait for.
    pub(crate) fn interrupt_writers(&self) {
        for tid in self.writers.iter().map(|slot| slot.load(Ordering::SeqCst)).filter(|tid| *tid != 0) {
            signal::interrupt(tid);
        }
    }

    /// From now on no touch of this span is served, or all are again (an empty span). One thread at a time.
    pub(super) fn set_unlocked(&self, span: Span) {
        // Never wider than either span: the first to be seen of it is the end that makes it empty.
        self.unlocked[1].store(0, Ordering::SeqCst);
        self.unlocked[0].store(span.start, Ordering::SeqCst);
        self.unlocked[1].store(span.end, Ordering::SeqCst);
    }

    fn unlocked_span(&self) -> Span {
        let end = self.unlocked[1].load(Ordering::SeqCst); // before the start: see `set_unlocked`
        Span { start: self.unlocked[0].load(Ordering::SeqCst).min(end), end }
    }

    /// Whether a touch must wait until the mapping's protection is what it was: what came home now could be written. *Fault path.*
    pub(crate) fn is_unlocked(&self, va: Va) -> bool {
        let span = self.unlocked_span();
        span.start <= va && va < span.end
    }

    /// Pages of the block at `va` of which that is so.
    pub(crate) fn unlocked(&self, va: Va) -> Bits {
        self.unlocked_span().and(Span::block(va)).bits()
    }

    /// Mappings of this file are a device's. The oldest is forgotten if there are too many.
    pub(crate) fn add_file(&self, dev: (u32, u32), inode: u64) {
        let mut files = self.files.lock();
        let (all, next) = &mut *files;
        all[*next % FILES] = (dev.0, dev.1, inode);
        *next += 1;
    }

    /// Whether mappings of this file are a device's.
    pub(crate) fn is_device(&self, dev: (u32, u32), inode: u64) -> bool {
        inode != 0 && self.files.lock().0.contains(&(dev.0, dev.1, inode))
    }
}
