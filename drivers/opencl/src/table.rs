//! The page table: where in the device's memory each block of the process is. OpenCL devices have none, so this is what turns an argument's address into an offset when a kernel is
//! launched.
//!
//! All pages of a block lie in one unit, each in its place (uhmm keeps to that for a device that says [`linear`](uhmm_core::driver::Capabilities)), so an entry is one number a block.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.

use std::sync::{Mutex, PoisonError};
use uhmm_core::driver::{Frame, MapRun};
use uhmm_core::own::{OwnSlice, Zeroed};
use uhmm_os::{BLOCK, Errno, PAGE};

/// A block and the frame of its first page.
#[derive(Clone, Copy, Debug)]
struct Entry {
    block: usize,
    first: Frame,
    /// Pages that are mapped.
    pages: u32,
}
#[allow(unsafe_code)]
// SAFETY: an entry of no pages stands for none.
unsafe impl Zeroed for Entry {}

/// The table of one device: by unit, for a unit has one block at a time.
#[derive(Debug)]
pub struct Table(Mutex<Entries>);

#[derive(Debug)]
struct Entries {
    units: OwnSlice<Entry>,
    /// Ranges that were asked for since the table changed, and what was said: a launch that comes again asks for the same.
    asked: [(usize, usize, Option<usize>); ASKED],
    next: usize,
}

/// How many of them.
const ASKED: usize = 16;

impl Table {
    /// For a device of so many units.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(units: usize) -> Result<Self, Errno> {
        Ok(Table(Mutex::new(Entries { units: OwnSlice::new(c"uhmm opencl table", units)?, asked: [(0, 0, None); ASKED], next: 0 })))
    }

    fn each(&self, runs: &[MapRun], mut f: impl FnMut(&mut Entry, &MapRun, usize)) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.asked = [(0, 0, None); ASKED];
        for run in runs {
            let (block, page) = (run.va & !(BLOCK - 1), run.va % BLOCK / PAGE);
            let unit = run.frame as usize / (BLOCK / PAGE);
            debug_assert_eq!(run.frame as usize % (BLOCK / PAGE), page, "a page lies at its place in its block's unit");
            f(&mut entries.units[unit], run, block);
        }
    }

    /// Enters runs.
    pub fn enter(&self, runs: &[MapRun]) {
        self.each(runs, |entry, run, block| {
            debug_assert!(entry.pages == 0 || entry.block == block, "a unit has one block at a time");
            *entry = Entry { block, first: run.frame & !((BLOCK / PAGE) as Frame - 1), pages: entry.pages + run.pages as u32 };
        });
    }

    /// Takes runs out.
    pub fn leave(&self, runs: &[MapRun]) {
        self.each(runs, |entry, run, _| entry.pages = entry.pages.saturating_sub(run.pages as u32));
    }

    /// Where the range of `bytes` bytes at `va` begins in the device's memory, if it lies there in one piece.
    pub fn offset(&self, va: usize, bytes: usize) -> Option<usize> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = entries.asked.iter().find(|asked| asked.0 == va && asked.1 == bytes.max(1)) {
            return known.2;
        }
        let found = entries.find(va, bytes);
        let next = entries.next;
        entries.asked[next] = (va, bytes.max(1), found);
        entries.next = (next + 1) % ASKED;
        found
    }
}

impl Entries {
    fn find(&self, va: usize, bytes: usize) -> Option<usize> {
        let entries = &self.units;
        let at =
            |block: usize| entries.iter().find(|entry| entry.pages > 0 && entry.block == block).map(|entry| entry.first as usize * PAGE);
        let first = va & !(BLOCK - 1);
        let base = at(first)?;
        // Units that follow each other: the entries do as well.
        let unit = base / BLOCK;
        let last = (va + bytes.max(1) - 1) & !(BLOCK - 1);
        let whole = (first..=last)
            .step_by(BLOCK)
            .zip(unit..)
            .all(|(block, unit)| entries.get(unit).is_some_and(|e| e.pages > 0 && e.block == block));
        whole.then_some(base + va % BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_found_where_its_blocks_follow_each_other() {
        let table = Table::new(8).unwrap();
        let run = |block: usize, page: usize, unit: usize, pages: usize| MapRun {
            va: block * BLOCK + page * PAGE,
            frame: (unit * (BLOCK / PAGE) + page) as Frame,
            pages,
            write: true,
        };
        table.enter(&[run(10, 100, 3, 412), run(11, 0, 4, 512), run(12, 0, 6, 1)]);
        let va = 10 * BLOCK + 100 * PAGE + 7;
        assert_eq!(table.offset(va, BLOCK), Some(3 * BLOCK + 100 * PAGE + 7));
        assert_eq!(table.offset(va, 2 * BLOCK), None, "block 12 lies elsewhere");
        assert_eq!(table.offset(9 * BLOCK, 1), None);
        table.leave(&[run(10, 100, 3, 400)]);
        assert!(table.offset(va, 1).is_some(), "some of it is still there");
        table.leave(&[run(10, 500, 3, 12)]);
        assert_eq!(table.offset(va, 1), None);
    }
}
