//! The directory: where every page of the process is. It is the only truth; a device's page table is a cache of it.
//!
//! A radix tree of two levels over the 47-bit address space: the root points to nodes of 8192 blocks (16 GiB), a node is one mapping
//! whose untouched pages cost nothing, and a block (2 MiB of the process) is a lock, a few bitmaps of 512 bits and the numbers of its device pages.
//!
//! # Rules
//! * A block's [`State`] is changed only under its lock, and bits of places only through [`State::shift`].
//! * One block is on one device at a time.
//! * While `mover` is set, one migration owns the block's pages in transit and their frames; everybody else waits, except that an
//!   invalidation may take pages out of `busy` (the mover sees that when it commits, and frees what was cancelled).
//! * Locks are taken in this order: launches' `prepare`, the event lock ([`crate::space`]), the `ends` lock (fixed.rs), one block, then any one of the leaf locks
//!   (device memory, least-recently-used list, pools, frame tables). Two blocks at once are locked only by `port::carry`, on the monitor with the event lock held alone. Nobody waits for the program's memory while holding any of them
//!   (`mirror` writes there, to pages that nobody needs to bring).
#![allow(unsafe_code)] // blocks lie in raw mappings and are reached through their lock

use crate::bits::{Bits, PAGES};
use crate::driver::Done;
use crate::own::{self, OwnSlice, Zeroed};
use crate::page::{Cause, PageState, Span, Va, allowed};
use crate::policy::Past;
use crate::sync::*;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use uhmm_os::{BLOCK, Errno, PAGE, mem};

const NODE_BLOCKS: usize = 8192;
const ROOTS: usize = 8192;
const NO_FRAME: u32 = u32::MAX;

/// The number of a page of device memory.
pub type Frame = u32;

/// Where the 512 pages of one block are.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct State {
    gone: Bits,
    /// The device has a copy of its own.
    dev: Bits,
    /// Bounced, with `dev`; without, the page that the program has mapped is the device's.
    bounce: Bits,
    busy: Bits,
    /// Pages whose frame is in the device's page table.
    pub win: Bits,
    /// Pages that are registered with userfaultfd.
    pub reg: Bits,
    /// Pages whose old contents are kept until the running launch ends: a touch by the CPU waits for that.
    pub parked: Bits,
    /// Parked pages that came home all the same, because a worker of the launch touched them at their process address.
    pub spoiled: Bits,
    /// Snapshots that the device may only read.
    pub rdonly: Bits,
    /// Snapshots with a twin: their contents as they were taken, in the slot `twin` (`crate::twins`).
    pub twins: Bits,
    /// See `twins`; 0 if there is none.
    pub twin: u32,
    /// The number of the migration that owns the busy pages; 0 if none.
    pub mover: u32,
    /// Pages that the mover took out of the program, into the tray at address `tray` (0 if none).
    pub taken: Bits,
    /// See `taken`.
    pub tray: usize,
    /// The device that holds pages of this block, plus 1; 0 if none.
    pub device: u32,
    table: u32,
    base: Frame,
    /// The frames are one device block of 2 MiB, kept whole until the last page leaves.
    pub whole: bool,
    /// Somebody waits for the mover: wake the block when it is done.
    pub waiters: bool,
    /// The CPU's pages were one huge page when they left, so that its page table is empty.
    pub huge: bool,
    /// CPU faults served since the block was last migrated, for the choice of how much to bring.
    pub touches: u8,
}

impl State {
    /// Pages of which the CPU has no copy: on the device, on the way there, or lost.
    pub(crate) fn gone(&self) -> Bits {
        self.gone
    }

    /// Pages of which the device holds a valid copy.
    pub(crate) fn resident(&self) -> Bits {
        self.dev | self.bounce
    }

    /// Pages in the memory of a coherent device that the program has mapped.
    pub(crate) fn coherent(&self) -> Bits {
        self.bounce - self.dev
    }

    /// Pages on the device only.
    pub(crate) fn private(&self) -> Bits {
        self.dev & self.gone
    }

    /// Pages on both sides.
    pub(crate) fn duplicated(&self) -> Bits {
        self.dev - self.gone - self.bounce
    }

    /// Pages with a snapshot for one launch.
    pub(crate) fn bounced(&self) -> Bits {
        self.bounce & self.dev
    }

    /// Pages whose only copy was lost.
    pub(crate) fn lost(&self) -> Bits {
        self.gone - self.dev - self.busy - self.bounce
    }

    /// Pages in transit.
    pub(crate) fn busy(&self) -> Bits {
        self.busy
    }

    /// Where one page is.
    pub(crate) fn page(&self, page: usize) -> PageState {
        match (self.busy.has(page), self.gone.has(page), self.dev.has(page), self.bounce.has(page)) {
            (true, true, ..) => PageState::Moving,
            (true, false, ..) => PageState::Copying,
            (_, _, true, true) => PageState::Bounced,
            (_, _, false, true) => PageState::Coherent,
            (_, true, true, _) => PageState::Private,
            (_, false, true, _) => PageState::Duplicated,
            (_, true, false, _) => PageState::Lost,
            _ => PageState::System,
        }
    }

    /// Moves `pages`, all of which are in state `from`, to state `to`.
    ///
    /// # Panics
    /// In debug builds, if the table of transitions does not hold this one, or it is a commit, or a page is elsewhere.
    pub(crate) fn shift(&mut self, pages: Bits, from: PageState, cause: Cause, to: PageState) {
        debug_assert!(cause != Cause::Commit, "a migration is committed by `commit`");
        self.change(pages, from, cause, to);
    }

    /// Ends a migration of `pages`: they are resident, for their copy is done.
    pub(crate) fn commit(&mut self, pages: Bits, from: PageState, to: PageState, _copied: &Done) {
        self.change(pages, from, Cause::Commit, to);
    }

    fn change(&mut self, pages: Bits, from: PageState, cause: Cause, to: PageState) {
        debug_assert!(allowed(from, cause, to), "no transition {from:?} -{cause:?}-> {to:?}");
        if cfg!(debug_assertions) {
            for page in pages.pages() {
                assert_eq!(self.page(page), from, "page {page} on {cause:?} to {to:?}");
            }
        }
        let (gone, dev, bounce, busy) = match to {
            PageState::System => (false, false, false, false),
            PageState::Duplicated => (false, true, false, false),
            PageState::Private => (true, true, false, false),
            PageState::Bounced => (false, true, true, false),
            PageState::Coherent => (false, false, true, false),
            PageState::Moving => (true, false, false, true),
            PageState::Copying => (false, false, false, true),
            PageState::Lost => (true, false, false, false),
        };
        for (bits, on) in [(&mut self.gone, gone), (&mut self.dev, dev), (&mut self.bounce, bounce), (&mut self.busy, busy)] {
            if on { *bits |= pages } else { *bits -= pages }
        }
        debug_assert!(dev || to == PageState::Moving || to == PageState::Copying || !self.win.meets(pages), "still mapped on the device");
    }
}

/// One block.
#[repr(C, align(64))]
pub(crate) struct Block {
    lock: RawMutex,
    /// Raised by every invalidation: what a reader of the CPU's page table compares.
    pub(crate) seq: AtomicU32,
    /// The launch that needs this block to stay; compared with the device's current one.
    pub(crate) pin: AtomicU64,
    /// The running launch could not bear the block's going: it holds parked pages or snapshots.
    pub(crate) keep: AtomicBool,
    /// Neighbours in the device's least-recently-used list: block addresses, guarded by that list's lock.
    pub(crate) links: [AtomicUsize; 2],
    /// What has happened to it, for policies.
    pub(crate) past: Past,
    /// A policy wants it to leave a full device last.
    pub(crate) last: AtomicBool,
    state: UnsafeCell<State>,
}

const _: () = assert!(size_of::<Block>() * 1000 < BLOCK, "a block's entry costs less than a thousandth of the block");

// SAFETY: the state is reached only through `BlockGuard`, which holds the lock; the rest is atomic.
unsafe impl Sync for Block {}

impl core::fmt::Debug for Block {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Block").field("seq", &self.seq).field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl Block {
    /// Waits for the block's lock.
    pub(crate) fn lock(&self) -> BlockGuard<'_> {
        self.lock.lock();
        BlockGuard { block: self }
    }

    /// The same, unless somebody else has it.
    pub(crate) fn try_lock(&self) -> Option<BlockGuard<'_>> {
        self.lock.try_lock().then(|| BlockGuard { block: self })
    }
}

/// A locked block.
#[derive(Debug)]
pub(crate) struct BlockGuard<'a> {
    block: &'a Block,
}

impl<'a> BlockGuard<'a> {
    /// The block.
    pub(crate) fn block(&self) -> &'a Block {
        self.block
    }
}

impl Deref for BlockGuard<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        // SAFETY: the lock is held, so nobody else has a reference to the state.
        unsafe { &*self.block.state.get() }
    }
}

impl DerefMut for BlockGuard<'_> {
    fn deref_mut(&mut self) -> &mut State {
        // SAFETY: as in `deref`, and the guard is borrowed exclusively.
        unsafe { &mut *self.block.state.get() }
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `Block::lock`, dropped once.
        unsafe { self.block.lock.unlock() };
    }
}

/// The part of the directory for 16 GiB.
#[repr(C)]
struct Node {
    used: [AtomicU64; NODE_BLOCKS / 64],
    _pad: [u8; 0],
    blocks: [Block; NODE_BLOCKS],
}

// SAFETY: zeroed words are null pointers and unlocked locks.
unsafe impl Zeroed for AtomicUsize {}

/// A table of frames, for blocks whose device pages are not one device block.
#[derive(Clone, Copy, Debug)]
struct FrameTable([u32; PAGES]);
// SAFETY: plain numbers.
unsafe impl Zeroed for FrameTable {}

/// The directory of one process.
#[derive(Debug)]
pub(crate) struct Directory {
    roots: OwnSlice<AtomicUsize>,
    tables: OwnSlice<FrameTable>,
    free_tables: Mutex<(u32, u32)>,
}

impl Directory {
    /// An empty directory with room for `tables` blocks that are only partly on a device.
    ///
    /// # Errors
    /// `ENOMEM` if its address space cannot be reserved.
    pub(crate) fn new(tables: usize) -> Result<Self, Errno> {
        Ok(Directory {
            roots: OwnSlice::new(c"uhmm directory", ROOTS)?,
            tables: OwnSlice::new(c"uhmm frame tables", tables + 1)?,
            free_tables: Mutex::new((1, 0)),
        })
    }

    fn node(&self, va: Va) -> Option<&Node> {
        let node = self.roots.get(va / BLOCK / NODE_BLOCKS)?.load(Ordering::Acquire);
        // SAFETY: a root is null or a whole mapped node, published with Release, that stays until the directory is dropped.
        unsafe { (node as *const Node).as_ref() }
    }

    /// The block that holds `va`, if anything of it was ever looked at.
    pub(crate) fn get(&self, va: Va) -> Option<&Block> {
        let node = self.node(va)?;
        let index = va / BLOCK % NODE_BLOCKS;
        (node.used[index / 64].load(Ordering::Acquire) >> (index % 64) & 1 != 0).then(|| &node.blocks[index])
    }

    /// The block that holds `va`.
    ///
    /// # Errors
    /// `ENOMEM` if the node cannot be mapped; `EFAULT` for an address beyond the user's half.
    pub(crate) fn get_or_make(&self, va: Va) -> Result<&Block, Errno> {
        let node = match self.node(va) {
            Some(node) => node,
            None => self.make_node(va)?,
        };
        let index = va / BLOCK % NODE_BLOCKS;
        let bit = 1 << (index % 64);
        if node.used[index / 64].load(Ordering::Relaxed) & bit == 0 {
            node.used[index / 64].fetch_or(bit, Ordering::AcqRel);
        }
        Ok(&node.blocks[index])
    }

    fn make_node(&self, va: Va) -> Result<&Node, Errno> {
        let root = self.roots.get(va / BLOCK / NODE_BLOCKS).ok_or(Errno::FAULT)?;
        let mapping = own::map(c"uhmm directory", size_of::<Node>())?;
        match root.compare_exchange(0, mapping.start(), Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                core::mem::forget(mapping); // unmapped by `drop`
            }
            Err(_) => drop(mapping), // another thread was first
        }
        self.node(va).ok_or(Errno::FAULT)
    }

    /// Calls `f` for every known block that meets `span`, with the part of the span that lies in it.
    pub(crate) fn for_each(&self, span: Span, mut f: impl FnMut(&Block, Span)) {
        let end = span.end.div_ceil(BLOCK).min(ROOTS * NODE_BLOCKS);
        let mut number = span.start / BLOCK;
        while number < end {
            let Some(node) = self.node(number * BLOCK) else {
                number = (number / NODE_BLOCKS + 1) * NODE_BLOCKS;
                continue;
            };
            let index = number % NODE_BLOCKS;
            let word = node.used[index / 64].load(Ordering::Acquire) >> (index % 64);
            if word == 0 {
                number += 64 - index % 64;
                continue;
            }
            number += word.trailing_zeros() as usize;
            if number < end {
                f(&node.blocks[number % NODE_BLOCKS], Span::block(number * BLOCK).and(span));
            }
            number += 1;
        }
    }

    /// The frame of a page of the block. Meaningful only for pages that are resident or in transit.
    pub(crate) fn frame(&self, state: &State, page: usize) -> Frame {
        if state.whole {
            return state.base + page as u32;
        }
        if state.table == 0 {
            return NO_FRAME;
        }
        // SAFETY: the block owns its table while it holds the number, and the caller its lock.
        unsafe { (*self.tables.at(state.table as usize)).0[page] }
    }

    /// Gives the block one whole device block.
    pub(crate) fn set_whole(&self, state: &mut State, base: Frame) {
        debug_assert!(!state.whole && state.table == 0);
        state.whole = true;
        state.base = base;
    }

    /// Sets the frame of one page.
    ///
    /// # Errors
    /// `ENOSPC` if there is no table left.
    pub(crate) fn set_frame(&self, state: &mut State, page: usize, frame: Frame) -> Result<(), Errno> {
        debug_assert!(!state.whole);
        if state.table == 0 {
            state.table = self.take_table()?;
        }
        // SAFETY: as in `frame`.
        unsafe { (*self.tables.at(state.table as usize)).0[page] = frame };
        Ok(())
    }

    /// Forgets the block's frames; its device block comes back if it had a whole one. To be called when no page has a frame any more.
    pub(crate) fn clear_frames(&self, state: &mut State) -> Option<Frame> {
        if state.table != 0 {
            let mut free = self.free_tables.lock();
            // SAFETY: as in `frame`; from here on the table belongs to the free list.
            unsafe { (*self.tables.at(state.table as usize)).0[0] = free.1 };
            free.1 = state.table;
            state.table = 0;
        }
        core::mem::take(&mut state.whole).then_some(state.base)
    }

    /// Exchanges the frames of two states.
    pub(crate) fn swap_frames(&self, a: &mut State, b: &mut State) {
        core::mem::swap(&mut a.whole, &mut b.whole);
        core::mem::swap(&mut a.base, &mut b.base);
        core::mem::swap(&mut a.table, &mut b.table);
    }

    /// Whether the block's frames are kept in a table.
    pub(crate) fn has_table(&self, state: &State) -> bool {
        state.table != 0
    }

    fn take_table(&self) -> Result<u32, Errno> {
        let mut free = self.free_tables.lock();
        if free.1 != 0 {
            let table = free.1;
            // SAFETY: the table belongs to the free list, whose lock is held.
            free.1 = unsafe { (*self.tables.at(table as usize)).0[0] };
            return Ok(table);
        }
        if free.0 as usize >= self.tables.len() {
            return Err(Errno::NOSPC);
        }
        free.0 += 1;
        Ok(free.0 - 1)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        for root in self.roots.iter() {
            let node = root.load(Ordering::Acquire);
            if node != 0 {
                // SAFETY: mapped by `make_node`, and nobody can reach it any more.
                let _ = unsafe { mem::munmap(node, size_of::<Node>().next_multiple_of(PAGE)) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DONE: fn() -> Done = || Done::of(Ok(())).unwrap();

    #[test]
    fn blocks_are_found_again_and_walked_in_order() {
        let dir = Directory::new(4).unwrap();
        let at = [0x5555_0000_0000, 0x7fff_ffe0_0000, 0x20_0000, 0x5555_0040_0000];
        for va in at {
            assert!(dir.get(va).is_none());
            assert!(core::ptr::eq(dir.get_or_make(va + 5).unwrap(), dir.get(va).unwrap()));
        }
        let mut seen = vec![];
        dir.for_each(Span { start: 0, end: 1 << 47 }, |_, span| seen.push(span.start));
        assert_eq!(seen, [0x20_0000, 0x5555_0000_0000, 0x5555_0040_0000, 0x7fff_ffe0_0000]);
        seen.clear();
        dir.for_each(Span { start: 0x5555_0000_1000, end: 0x5555_0040_0000 }, |_, span| seen.push(span.start));
        assert_eq!(seen, [0x5555_0000_1000]);
        assert_eq!(dir.get_or_make(usize::MAX).unwrap_err(), Errno::FAULT);
    }

    #[test]
    fn tables_are_reused_and_their_end_is_an_error() {
        let dir = Directory::new(2).unwrap();
        let mut locks: Vec<_> = (0..3).map(|i| dir.get_or_make(i * BLOCK).unwrap().lock()).collect();
        for (i, state) in locks.iter_mut().take(2).enumerate() {
            dir.set_frame(state, 7, 70 + i as u32).unwrap();
        }
        assert_eq!((dir.frame(&locks[0], 7), dir.frame(&locks[1], 7)), (70, 71));
        assert_eq!(dir.set_frame(&mut locks[2], 0, 1), Err(Errno::NOSPC));
        assert_eq!(dir.clear_frames(&mut locks[0]), None);
        dir.set_frame(&mut locks[2], 0, 1).unwrap();
        dir.clear_frames(&mut locks[0]);
        dir.set_whole(&mut locks[0], 1024);
        assert_eq!((dir.frame(&locks[0], 3), dir.clear_frames(&mut locks[0])), (1027, Some(1024)));
    }

    /// Of a coherent page both sides have the one copy: it is resident, and neither gone nor shared.
    #[test]
    fn a_page_of_a_coherent_device_goes_there_and_back() {
        use PageState::*;
        let dir = Directory::new(1).unwrap();
        let mut state = dir.get_or_make(0).unwrap().lock();
        let (one, others) = (Bits::one(5), Bits::range(6..9));
        let sets = |state: &State| [state.gone(), state.resident(), state.private(), state.coherent()];
        for end in [Cause::Leave, Cause::Release, Cause::Unmap] {
            state.shift(one | others, System, Cause::Collect, Moving);
            state.commit(one | others, Moving, Private, &DONE());
            state.shift(one, Private, Cause::Enter, Coherent);
            assert_eq!(sets(&state), [others, one | others, others, one]);
            assert!(state.page(5) == Coherent && state.page(6) == Private && state.page(4) == System);
            assert!((state.duplicated() | state.bounced() | state.busy()).is_empty());
            if end == Cause::Leave {
                state.shift(one, Coherent, end, Private);
                state.shift(one, Private, Cause::Return, System);
            } else {
                state.shift(one, Coherent, end, System);
            }
            state.shift(others, Private, Cause::Unmap, System);
            assert_eq!(sets(&state), [Bits::EMPTY; 4]);
        }
        state.shift(one, System, Cause::Collect, Copying);
        state.commit(one, Copying, Bounced, &DONE());
        assert!(state.coherent().is_empty() && state.bounced() == one && state.resident() == one, "a snapshot is none");
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "no transition Private -Commit-> Duplicated")]
    fn a_transition_that_is_not_in_the_table_is_refused() {
        let dir = Directory::new(1).unwrap();
        dir.get_or_make(0).unwrap().lock().commit(Bits::one(0), PageState::Private, PageState::Duplicated, &DONE());
    }
}
