//! Pools: the host pages that a migration passes through, so that nothing is allocated or freed on either way.
//!
//! A *tray* is 2 MiB of address space, where slot `i` takes the page at place `i` of some block: a run of a block stays a run in its tray and moves by one call. A page that
//! leaves the program moves into an empty slot; its contents are copied to the device, and the page stays as a full slot; a page that comes
//! home is copied into a full slot and moves out of it.
//!
//! # Rules
//! * Trays for pages that leave are registered in the program's userfaultfd: the kernel's guard against acting on stale knowledge belongs to the destination.
//!   So a slot that is registered and empty must never be touched.
//! * Huge pages and small pages have trays of their own, for a tray that ever held a small page splits a huge one.
//! * *Spare* trays are not registered: their pages are made by touching them. They serve returns when no full tray fits.
//! * Beyond a bound, full slots are given back. A registered range cannot be dropped without raising an event, so they go through
//!   a tray of another userfaultfd.
#![allow(unsafe_code)] // moves pages between mappings of its own

use crate::bits::{Bits, PAGES};
use crate::mode::Mode;
use crate::own::{self, OwnSlice, Zeroed};
use crate::page::Span;
use crate::space::Space;
use crate::sync::*;
use uhmm_os::mem::{self, Advice, Mapping, Prot};
use uhmm_os::uffd::{Features, MoveMode, RegisterMode, Userfaultfd};
use uhmm_os::{BLOCK, Errno, PAGE, thread};

/// Spare trays of each kind: as many threads can bring pages home at once.
const SPARES: usize = 32;
const WASTE: usize = 4;
/// Full trays that are looked at for the best fit.
const SEARCH: usize = 16;
/// Trays with fewer pages serve no return, for those are larger or copied by the kernel.
const FEW: usize = 16;

/// Small pages or huge ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Size {
    /// 4 KiB pages.
    Small,
    /// One 2 MiB page.
    Huge,
}

/// A tray in the hands of one migration.
#[derive(Debug)]
pub struct Tray {
    /// Its address.
    pub start: usize,
    /// Slots that hold a page.
    pub full: Bits,
    size: Size,
    spare: bool,
    index: u32,
}

impl Tray {
    /// The address of a slot.
    pub fn slot(&self, page: usize) -> usize {
        self.start + page * PAGE
    }

    /// Sets what may be done with its memory: the kernel moves pages only between mappings of the same rights. If it fails, so does the move.
    pub(crate) fn allow(&self, prot: Prot) {
        #[allow(unsafe_code)]
        // SAFETY: the tray is in our hands alone, and may be read and written whatever `prot` says (`ReadWrite` or more).
        let _ = unsafe { mem::mprotect(self.start, uhmm_os::BLOCK, prot) };
    }
}

/// Does something while memory of uhmm's own is locked: the kernel moves pages only between mappings that are both locked, or both not. `None`, and not done, if it may not be locked.
pub(crate) fn while_locked<R>(start: usize, len: usize, f: impl FnOnce() -> R) -> Option<R> {
    mem::lock(start, len, true).ok()?;
    let result = f();
    let _ = mem::lock(start, len, false);
    Some(result)
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    full: Bits,
    next: u32,
}
// SAFETY: no page, no neighbour.
unsafe impl Zeroed for Slot {}

#[derive(Debug)]
struct Arena {
    memory: Mapping,
    slots: OwnSlice<Slot>,
    fresh: usize,
    empty: u32,
    full: u32,
    /// Trays with fewer than [`FEW`] pages, which are filled up by further small migrations.
    crumbs: u32,
}

#[derive(Debug)]
struct Spares {
    memory: Mapping,
    free: u64,
}

#[derive(Debug)]
struct Inner {
    arenas: [Arena; 2],
    spares: [Spares; 2],
    pages: usize,
}

/// The pools of one process.
#[derive(Debug)]
pub(crate) struct Pool {
    inner: Mutex<Inner>,
    waste: Userfaultfd,
    waste_memory: Mapping,
    waste_free: AtomicU32,
    bound: AtomicUsize,
}

fn arena(trays: usize, size: Size) -> Result<Arena, Errno> {
    let memory = own::map(c"uhmm pool", trays * BLOCK)?;
    advise(&memory, size)?;
    Ok(Arena { memory, slots: OwnSlice::new(c"uhmm pool slots", trays)?, fresh: 0, empty: 0, full: 0, crumbs: 0 })
}

fn advise(memory: &Mapping, size: Size) -> Result<(), Errno> {
    let advice = if size == Size::Huge { Advice::Hugepage } else { Advice::NoHugepage };
    // SAFETY: the mapping is ours, and the advice changes no contents.
    match unsafe { mem::madvise(memory.start(), memory.len(), advice) } {
        Err(Errno::INVAL) => Ok(()), // a kernel without huge pages
        other => other,
    }
}

fn spares(size: Size) -> Result<Spares, Errno> {
    let memory = own::map(c"uhmm spare pages", SPARES * BLOCK)?;
    advise(&memory, size)?;
    Ok(Spares { memory, free: (1 << SPARES) - 1 })
}

impl Pool {
    /// Pools with room for `trays` trays of each size, that keep at most `bound` unused pages.
    ///
    /// # Errors
    /// `ENOMEM` if address space cannot be reserved; those of userfaultfd.
    pub(crate) fn new(mode: Mode, trays: usize, bound: usize) -> Result<Self, crate::Error> {
        let system = |e| crate::Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e);
        let waste = mode.open(Features::MOVE)?;
        let waste_memory = own::map(c"uhmm pool", WASTE * BLOCK).map_err(system)?;
        advise(&waste_memory, Size::Small).map_err(system)?;
        if mode != Mode::None {
            waste.register(waste_memory.start(), WASTE * BLOCK, RegisterMode::MISSING).map_err(system)?;
        }
        let inner = Inner {
            arenas: [arena(trays, Size::Small).map_err(system)?, arena(trays, Size::Huge).map_err(system)?],
            spares: [spares(Size::Small).map_err(system)?, spares(Size::Huge).map_err(system)?],
            pages: 0,
        };
        Ok(Pool {
            inner: Mutex::new(inner),
            waste,
            waste_memory,
            waste_free: AtomicU32::new((1 << WASTE) - 1),
            bound: AtomicUsize::new(bound),
        })
    }

    /// Registers the trays in the program's userfaultfd. Before that, none may be taken.
    ///
    /// # Errors
    /// Those of userfaultfd; nothing is registered then.
    pub(crate) fn register(&self, space: &Space) -> Result<(), Errno> {
        if space.mode == Mode::None {
            return Ok(()); // nothing leaves the program
        }
        let inner = self.inner.lock();
        let [small, huge] = [0, 1].map(|size: usize| {
            let start = inner.arenas[size].memory.start();
            Span { start, end: start + inner.arenas[size].slots.len() * BLOCK }
        });
        space.register(small)?;
        space.register(huge).inspect_err(|_| {
            let _ = space.uffd.unregister(small.start, small.len());
        })
    }

    /// A registered tray whose slots `need` are empty, for pages that leave the program. `None` if there is none left.
    pub(crate) fn take_empty(&self, size: Size, need: Bits) -> Option<Tray> {
        loop {
            let mut inner = self.inner.lock();
            if let Some(tray) = inner.take_crumbs(size, need).or_else(|| inner.take_empty(size)) {
                return Some(tray);
            }
            // All trays hold something that fitted nobody: the first one is emptied.
            let mut tray = inner.pop_full(size)?;
            drop(inner);
            self.throw_away(&mut tray);
            if tray.full.is_empty() {
                return Some(tray);
            }
            self.put(tray);
            thread::yield_now();
        }
    }

    /// A tray whose slots `need`, but for at most `lack` of them, hold a page, or will when touched, for pages that come home.
    pub(crate) fn take_full(&self, space: &Space, size: Size, need: Bits, lack: usize) -> Tray {
        loop {
            let mut inner = self.inner.lock();
            if let Some(mut tray) = inner.take_full(size, need, lack) {
                drop(inner);
                // A page that the program had given up with MADV_FREE may have been reclaimed since.
                let there = space.present(Span::block(tray.start)).map(|present| present.pages).unwrap_or_default();
                tray.full &= there;
                if (need - tray.full).count() <= lack {
                    return tray;
                }
                self.put(tray);
                continue;
            }
            let spares = &mut inner.spares[size as usize];
            if spares.free != 0 {
                let index = spares.free.trailing_zeros();
                spares.free &= spares.free - 1;
                let start = spares.memory.start() + index as usize * BLOCK;
                return Tray { start, full: Bits::ALL, size, spare: true, index };
            }
            drop(inner);
            thread::yield_now();
        }
    }

    /// Gives a tray back; `tray.full` must be true to the fact.
    pub(crate) fn put(&self, mut tray: Tray) {
        let mut inner = self.inner.lock();
        if tray.spare {
            inner.spares[tray.size as usize].free |= 1 << tray.index;
            return;
        }
        if inner.pages + tray.full.count() > self.bound.load(Ordering::Relaxed) {
            drop(inner);
            self.throw_away(&mut tray);
            inner = self.inner.lock();
        }
        inner.pages += tray.full.count();
        let arena = &mut inner.arenas[tray.size as usize];
        let list = match tray.full.count() {
            0 => &mut arena.empty,
            1..FEW => &mut arena.crumbs,
            _ => &mut arena.full,
        };
        let next = core::mem::replace(list, tray.index + 1);
        arena.slots[tray.index as usize] = Slot { full: tray.full, next };
    }

    /// Frees the tray's pages, through memory that can be dropped without an event.
    fn throw_away(&self, tray: &mut Tray) {
        let Ok(index) = self.waste_free.fetch_update(Ordering::Acquire, Ordering::Relaxed, |free| (free != 0).then(|| free & (free - 1)))
        else {
            return; // others are at it: this tray is kept for now
        };
        let index = index.trailing_zeros();
        let waste = self.waste_memory.start() + index as usize * BLOCK;
        for run in tray.full.runs() {
            // SAFETY: both ranges are ours; the tray is in our hands alone, and so is this part of the waste.
            match unsafe { self.waste.move_pages(waste + run.start * PAGE, tray.slot(run.start), run.len() * PAGE, MoveMode::empty()) } {
                Ok(()) => tray.full -= Bits::range(run),
                Err(partial) => tray.full -= Bits::range(run.start..run.start + partial.done / PAGE),
            }
        }
        // SAFETY: ours, and nobody reads it.
        let _ = unsafe { mem::madvise(waste, BLOCK, Advice::DontNeed) };
        self.waste_free.fetch_or(1 << index, Ordering::Release);
    }
}

impl Inner {
    fn tray(&self, size: Size, index: u32, full: Bits) -> Tray {
        Tray { start: self.arenas[size as usize].memory.start() + index as usize * BLOCK, full, size, spare: false, index }
    }

    fn take_empty(&mut self, size: Size) -> Option<Tray> {
        let arena = &mut self.arenas[size as usize];
        let index = match arena.empty.checked_sub(1) {
            Some(index) => {
                arena.empty = arena.slots[index as usize].next;
                index
            }
            None if arena.fresh < arena.slots.len() => {
                arena.fresh += 1;
                arena.fresh as u32 - 1
            }
            None => return None,
        };
        Some(self.tray(size, index, Bits::EMPTY))
    }

    /// The first tray with a few pages, if `need` is free there.
    fn take_crumbs(&mut self, size: Size, need: Bits) -> Option<Tray> {
        let arena = &mut self.arenas[size as usize];
        let index = arena.crumbs.checked_sub(1)?;
        let Slot { full, next } = arena.slots[index as usize];
        if full.meets(need) || need.count() >= FEW {
            return None;
        }
        arena.crumbs = next;
        self.pages -= full.count();
        Some(self.tray(size, index, full))
    }

    fn pop_full(&mut self, size: Size) -> Option<Tray> {
        let arena = &mut self.arenas[size as usize];
        let list = if arena.crumbs != 0 { &mut arena.crumbs } else { &mut arena.full };
        let index = list.checked_sub(1)?;
        let Slot { full, next } = arena.slots[index as usize];
        *list = next;
        self.pages -= full.count();
        Some(self.tray(size, index, full))
    }

    /// Of the first full trays, the one that lacks the least of `need`, and has the least left over: another return may need the rest of a larger one.
    fn take_full(&mut self, size: Size, need: Bits, lack: usize) -> Option<Tray> {
        let arena = &self.arenas[size as usize];
        let (mut before, mut at) = (0, arena.full);
        let mut best: Option<((usize, usize), u32, u32)> = None;
        for _ in 0..SEARCH {
            let Some(index) = at.checked_sub(1) else { break };
            let Slot { full, next } = arena.slots[index as usize];
            let fit = ((need - full).count(), (full - need).count());
            if fit.0 <= lack && best.is_none_or(|(most, ..)| fit < most) {
                best = Some((fit, before, index));
                if fit == (0, 0) {
                    break;
                }
            }
            (before, at) = (at, next);
        }
        let (_, before, index) = best?;
        let arena = &mut self.arenas[size as usize];
        let Slot { full, next } = arena.slots[index as usize];
        if before == 0 {
            arena.full = next
        } else {
            arena.slots[before as usize - 1].next = next
        }
        self.pages -= full.count();
        Some(self.tray(size, index, full))
    }
}

const _: () = assert!(PAGES * PAGE == BLOCK);
