//! Device memory: which frames are free, who owns the others, and which block was used least recently.
//!
//! Memory is handed out in units of 2 MiB, of two kinds that never mix, for a huge page that is split once stays split: *whole* units (numbers 0
//! to capacity - 1) belong to one block of the process each, *small* units (the next capacity numbers) are handed out by the page.
//! Both draw on one capacity. A unit's descriptor says who owns it and which of its frames are used.
//!
//! Everything here is a leaf lock; drivers' `populate` and `release` are called under it.

use crate::bits::{Bits, PAGES};
use crate::directory::{Block, Directory, Frame};
use crate::driver::Driver;
use crate::own::{OwnSlice, Zeroed};
use crate::page::Va;
use crate::place::Places;
use crate::sync::*;
use uhmm_os::Errno;

/// No room: evict something, or give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

#[derive(Clone, Copy, Debug)]
struct Unit {
    used: Bits,
    /// Address of the block that owns a whole unit.
    owner: Va,
    /// Neighbours in the list that the unit is on, plus 1.
    prev: u32,
    next: u32,
    populated: bool,
}
#[allow(unsafe_code)]
// SAFETY: no page, no owner, no neighbour, not populated.
unsafe impl Zeroed for Unit {}

#[derive(Clone, Copy, Debug, Default)]
struct List {
    head: u32,
}

#[derive(Debug)]
struct Units {
    unit: OwnSlice<Unit>,
    capacity: usize,
    /// Units that hold something.
    used: usize,
    populated: usize,
    /// Populated and empty, by kind.
    free: [List; 2],
    /// Never populated: the next number, by kind.
    fresh: [usize; 2],
    /// Empty and given back, by kind.
    released: [List; 2],
    /// Small units with some pages free.
    partial: List,
}

const WHOLE: usize = 0;
const SMALL: usize = 1;

/// The memory of one device.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    units: Mutex<Units>,
    lru: Mutex<[usize; 2]>,
    places: Option<Places>,
}

impl Units {
    fn push(&mut self, list: fn(&mut Units) -> &mut List, unit: usize) {
        let head = core::mem::replace(&mut list(self).head, unit as u32 + 1);
        self.unit[unit].prev = 0;
        self.unit[unit].next = head;
        if head != 0 {
            self.unit[head as usize - 1].prev = unit as u32 + 1;
        }
    }

    fn unlink(&mut self, list: fn(&mut Units) -> &mut List, unit: usize) {
        let Unit { prev, next, .. } = self.unit[unit];
        if prev == 0 {
            list(self).head = next
        } else {
            self.unit[prev as usize - 1].next = next
        }
        if next != 0 {
            self.unit[next as usize - 1].prev = prev;
        }
    }

    fn pop(&mut self, list: fn(&mut Units) -> &mut List) -> Option<usize> {
        let unit = list(self).head.checked_sub(1)? as usize;
        self.unlink(list, unit);
        Some(unit)
    }

    fn free_list(kind: usize) -> fn(&mut Units) -> &mut List {
        if kind == WHOLE { |u| &mut u.free[WHOLE] } else { |u| &mut u.free[SMALL] }
    }

    fn released_list(kind: usize) -> fn(&mut Units) -> &mut List {
        if kind == WHOLE { |u| &mut u.released[WHOLE] } else { |u| &mut u.released[SMALL] }
    }

    /// An empty, populated unit of a kind.
    fn take(&mut self, kind: usize, driver: &dyn Driver) -> Result<usize, Full> {
        if self.used == self.capacity {
            return Err(Full);
        }
        let unit = match self.pop(Self::free_list(kind)) {
            Some(unit) => unit,
            None => self.populate(kind, driver)?,
        };
        self.used += 1;
        Ok(unit)
    }

    fn populate(&mut self, kind: usize, driver: &dyn Driver) -> Result<usize, Full> {
        if self.populated == self.capacity {
            // What is populated and free is of the other kind: its memory changes sides.
            let other = self.pop(Self::free_list(1 - kind)).ok_or(Full)?;
            self.release(driver, other, 1 - kind);
        }
        let unit = match self.pop(Self::released_list(kind)) {
            Some(unit) => unit,
            None if self.fresh[kind] < self.capacity => {
                self.fresh[kind] += 1;
                kind * self.capacity + self.fresh[kind] - 1
            }
            None => return Err(Full),
        };
        if driver.populate(unit).is_err() {
            self.push(Self::released_list(kind), unit);
            return Err(Full);
        }
        self.unit[unit].populated = true;
        self.populated += 1;
        Ok(unit)
    }

    /// Takes the memory of an empty unit, which is on no list.
    fn release(&mut self, driver: &dyn Driver, unit: usize, kind: usize) {
        driver.release(unit);
        self.unit[unit].populated = false;
        self.populated -= 1;
        self.push(Self::released_list(kind), unit);
    }

    /// Takes one certain whole unit, which is empty.
    fn claim(&mut self, driver: &dyn Driver, unit: usize) -> Result<(), Full> {
        while self.fresh[WHOLE] <= unit {
            let fresh = self.fresh[WHOLE];
            self.fresh[WHOLE] += 1;
            self.push(Units::released_list(WHOLE), fresh);
        }
        if self.unit[unit].populated {
            self.unlink(Units::free_list(WHOLE), unit);
        } else {
            self.unlink(Units::released_list(WHOLE), unit);
            if self.populated == self.capacity {
                // An empty unit elsewhere gives its memory, of either kind.
                if let Some(spare) = self.pop(Units::free_list(SMALL)) {
                    self.release(driver, spare, SMALL);
                } else if let Some(spare) = self.pop(Units::free_list(WHOLE)) {
                    self.release(driver, spare, WHOLE);
                }
            }
            if self.populated == self.capacity || driver.populate(unit).is_err() {
                self.push(Units::released_list(WHOLE), unit);
                return Err(Full);
            }
            self.unit[unit].populated = true;
            self.populated += 1;
        }
        self.unit[unit].used = Bits::ALL;
        self.used += 1;
        Ok(())
    }

    fn give(&mut self, kind: usize, unit: usize) {
        self.unit[unit].owner = 0;
        self.used -= 1;
        self.push(Self::free_list(kind), unit);
    }
}

impl DeviceMemory {
    /// Memory of `bytes`, a multiple of 2 MiB; `linear`: of a device without a page table ([`crate::place`]).
    ///
    /// # Errors
    /// `ENOMEM` if there is no room for the descriptors.
    pub(crate) fn new(bytes: usize, linear: bool) -> Result<Self, Errno> {
        let capacity = bytes / uhmm_os::BLOCK;
        let units = Units {
            unit: OwnSlice::new(c"uhmm device units", capacity * 2)?,
            capacity,
            used: 0,
            populated: 0,
            free: [List::default(); 2],
            fresh: [0; 2],
            released: [List::default(); 2],
            partial: List::default(),
        };
        Ok(DeviceMemory { units: Mutex::new(units), lru: Mutex::new([0; 2]), places: linear.then(|| Places::new(capacity)).transpose()? })
    }

    /// Where blocks lie on a device without a page table.
    pub(crate) fn places(&self) -> Option<&Places> {
        self.places.as_ref()
    }

    /// Whether a whole unit is used.
    pub(crate) fn is_used(&self, unit: usize) -> bool {
        !self.units.lock().unit[unit].used.is_empty()
    }

    /// One certain whole unit, which is empty, for the block at `owner`: its first frame.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn take_at(&self, driver: &dyn Driver, unit: usize, owner: Va) -> Result<Frame, Full> {
        let mut units = self.units.lock();
        units.claim(driver, unit)?;
        units.unit[unit].owner = owner;
        Ok((unit * PAGES) as Frame)
    }

    /// Bytes that are in use, in units of 2 MiB.
    pub(crate) fn used(&self) -> usize {
        self.units.lock().used * uhmm_os::BLOCK
    }

    /// A whole unit for the block at `owner`: its first frame.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn take_whole(&self, driver: &dyn Driver, owner: Va) -> Result<Frame, Full> {
        let mut units = self.units.lock();
        let unit = units.take(WHOLE, driver)?;
        units.unit[unit].owner = owner;
        units.unit[unit].used = Bits::ALL;
        Ok((unit * PAGES) as Frame)
    }

    /// The whole unit that begins with this frame is now of the block at `owner`.
    pub(crate) fn set_owner(&self, base: Frame, owner: Va) {
        self.units.lock().unit[base as usize / PAGES].owner = owner;
    }

    /// A run of at most `pages` frames that follow each other, in a small unit.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn take_run(&self, driver: &dyn Driver, pages: usize) -> Result<(Frame, usize), Full> {
        let mut units = self.units.lock();
        let mut unit = units.partial.head.checked_sub(1).map(|u| u as usize);
        // A fresh unit keeps a long run together, if there is room for one.
        if unit.is_none_or(|u| longest(!units.unit[u].used).len() < pages.min(64))
            && let Ok(fresh) = units.take(SMALL, driver)
        {
            units.push(|u| &mut u.partial, fresh);
            unit = Some(fresh);
        }
        let unit = unit.ok_or(Full)?;
        let run = longest(!units.unit[unit].used);
        let len = run.len().min(pages);
        units.unit[unit].used |= Bits::range(run.start..run.start + len);
        if units.unit[unit].used == Bits::ALL {
            units.unlink(|u| &mut u.partial, unit);
        }
        Ok(((unit * PAGES + run.start) as Frame, len))
    }

    /// Units that follow each other, for memory that the program allocates on the device itself: the first frame.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn take_units(&self, driver: &dyn Driver, count: usize) -> Result<Frame, Full> {
        match &self.places {
            Some(places) => places.with(|placed| self.take_row(driver, count, Some(placed))),
            None => self.take_row(driver, count, None),
        }
    }

    fn take_row(&self, driver: &dyn Driver, count: usize, placed: Option<&dyn Fn(usize) -> bool>) -> Result<Frame, Full> {
        let mut guard = self.units.lock();
        let units = &mut *guard;
        if units.used + count > units.capacity {
            return Err(Full);
        }
        // From the end of the never-used ones first; else a stretch of empty ones.
        let first = if placed.is_none() && units.fresh[WHOLE] + count <= units.capacity && units.populated + count <= units.capacity {
            units.fresh[WHOLE]
        } else {
            let empty = |unit: usize| units.unit[unit].used.is_empty() && !placed.is_some_and(|placed| placed(unit));
            (0..=units.capacity - count).find(|&at| (at..at + count).all(empty)).ok_or(Full)?
        };
        for unit in first..first + count {
            if units.claim(driver, unit).is_err() {
                for taken in first..unit {
                    units.unit[taken].used = Bits::EMPTY;
                    units.give(WHOLE, taken);
                }
                return Err(Full);
            }
        }
        Ok((first * PAGES) as Frame)
    }

    /// Gives a whole unit back.
    pub(crate) fn free_whole(&self, base: Frame) {
        let mut units = self.units.lock();
        let unit = base as usize / PAGES;
        debug_assert!(unit < units.capacity && units.unit[unit].used == Bits::ALL);
        units.unit[unit].used = Bits::EMPTY;
        units.give(WHOLE, unit);
    }

    /// Gives one frame of a small unit back.
    pub(crate) fn free_page(&self, frame: Frame) {
        let mut units = self.units.lock();
        let (unit, page) = (frame as usize / PAGES, frame as usize % PAGES);
        debug_assert!(unit >= units.capacity && units.unit[unit].used.has(page), "frame {frame} is not in use");
        if units.unit[unit].used == Bits::ALL {
            units.push(|u| &mut u.partial, unit);
        }
        units.unit[unit].used -= Bits::one(page);
        if units.unit[unit].used.is_empty() {
            units.unlink(|u| &mut u.partial, unit);
            units.give(SMALL, unit);
        }
    }

    /// Makes the block at `va` the most recently used one.
    pub(crate) fn touch(&self, dir: &Directory, va: Va) {
        let mut ends = self.lru.lock();
        if ends[0] == va | 1 {
            return;
        }
        Self::unlink(&mut ends, dir, va);
        let Some(block) = dir.get(va) else { return };
        let old = ends[0];
        link(block, 0).store(0, Ordering::Relaxed);
        link(block, 1).store(old, Ordering::Relaxed);
        if let Some(next) = dir.get(old & !1).filter(|_| old != 0) {
            link(next, 0).store(va | 1, Ordering::Relaxed);
        } else {
            ends[1] = va | 1;
        }
        ends[0] = va | 1;
    }

    /// Takes the block at `va` off the list.
    pub(crate) fn forget(&self, dir: &Directory, va: Va) {
        Self::unlink(&mut self.lru.lock(), dir, va);
    }

    /// The least recently used block that `fits`.
    pub(crate) fn oldest(&self, dir: &Directory, mut fits: impl FnMut(Va, &Block) -> bool) -> Option<Va> {
        let mut found = None;
        self.oldest_first(dir, |va, block| {
            found = fits(va, block).then_some(va);
            found.is_none()
        });
        found
    }

    /// Calls `f` with every block, the least recently used first, as long as it says to go on.
    pub(crate) fn oldest_first(&self, dir: &Directory, mut f: impl FnMut(Va, &Block) -> bool) {
        let ends = self.lru.lock();
        let mut at = ends[1];
        while let Some(block) = dir.get(at & !1).filter(|_| at != 0)
            && f(at & !1, block)
        {
            at = link(block, 0).load(Ordering::Relaxed);
        }
    }

    fn unlink(ends: &mut [usize; 2], dir: &Directory, va: Va) {
        let Some(block) = dir.get(va) else { return };
        let [prev, next] = [link(block, 0).load(Ordering::Relaxed), link(block, 1).load(Ordering::Relaxed)];
        if prev == 0 && ends[0] != va | 1 {
            return; // not on the list
        }
        match dir.get(prev & !1).filter(|_| prev != 0) {
            Some(block) => link(block, 1).store(next, Ordering::Relaxed),
            None => ends[0] = next,
        }
        match dir.get(next & !1).filter(|_| next != 0) {
            Some(block) => link(block, 0).store(prev, Ordering::Relaxed),
            None => ends[1] = prev,
        }
        link(block, 0).store(0, Ordering::Relaxed);
        link(block, 1).store(0, Ordering::Relaxed);
    }
}

/// Block addresses with bit 0 set, so that the block at address 0 is told from none.
fn link(block: &Block, which: usize) -> &AtomicUsize {
    &block.links[which]
}

fn longest(free: Bits) -> core::ops::Range<usize> {
    free.runs().max_by_key(|run| run.len()).unwrap_or(0..0)
}
