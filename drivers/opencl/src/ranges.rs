//! The table by which a kernel turns a pointer that is stored in memory into one of its own (`uhmm_ptr` in `uhmm.cl`): the ranges that the launch has declared, be it as arguments or as what it
//! reaches besides, and where they lie in the device's memory. A pointer to anything else is noted, and fails the launch.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // copies by way of raw addresses

use crate::api::{self, Buffer, Device, Queue, Status};
use crate::memory;
use crate::table::Table;
use cl3::types::cl_mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use uhmm_core::args::RawArg;
use uhmm_core::kernel::Bound;
use uhmm_core::reach::{ALIGN, Reached};

/// Where the ranges begin in the table, in numbers: see `uhmm.cl`. Before them lie the head and a page that stands for what was not found.
const FIRST: usize = 16 + 4096 / 8;
/// The ranges that the first table has room for.
const FEW: usize = 1000;

/// The table of a device: of one launch at a time.
#[derive(Debug)]
pub struct Ranges {
    at_work: Mutex<Sheet>,
    queue: Queue,
}

/// The table, and what is written to it.
#[derive(Debug)]
struct Sheet {
    buffer: Buffer,
    room: usize,
    numbers: Vec<u64>,
}

/// The numbers of a table of so many ranges.
fn numbers(ranges: usize) -> usize {
    FIRST + 2 * ranges
}

impl Ranges {
    pub(crate) fn new(device: &Device) -> Result<Self, Status> {
        let sheet = Sheet { buffer: device.buffer(8 * numbers(FEW))?, room: FEW, numbers: vec![] };
        Ok(Ranges { at_work: Mutex::new(sheet), queue: device.queue()? })
    }

    /// For the launch whose turn it is. Nobody asks for it while a touch is served.
    fn sheet(&self) -> MutexGuard<'_, Sheet> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table's buffer, until the next [`set`](Self::set).
    pub(crate) fn raw(&self) -> cl_mem {
        self.sheet().buffer.raw()
    }

    /// Makes it the table of a launch.
    pub(crate) fn set(&self, device: &Device, bound: &Bound, table: &Table) -> Result<(), Status> {
        let mut sheet = self.sheet();
        let Sheet { buffer, room, numbers: list } = &mut *sheet;
        list.clear();
        list.resize(FIRST, 0);
        let mut declared: Vec<Entry> = bound.args().iter().filter_map(|arg| declared(arg, table)).flat_map(Entry::parts).collect();
        declared.sort_unstable_by_key(|entry| entry.start);
        // What is reached is in order, and long: it is merged with the arguments on the way, for each half of the table anew.
        list.reserve(2 * (bound.reached().len() + declared.len()));
        merge(&declared, bound.reached().map(Entry::of), |entry| list.push(entry.start as u64));
        merge(&declared, bound.reached().map(Entry::of), |entry| list.push(entry.rest()));
        let count = (list.len() - FIRST) / 2;
        list[0] = (count as u64) << 32; // little-endian: the first word says that nothing was missed
        if count > *room {
            *buffer = device.buffer(8 * numbers(count.next_power_of_two()))?;
            *room = count.next_power_of_two();
        }
        // SAFETY: the numbers live, as they are, until it has been waited for.
        let written = unsafe { self.queue.write(buffer, 0, list.as_ptr().cast(), 8 * list.len()) }?;
        api::wait(&[written])
    }

    /// The first address that the kernel did not find, when it has ended.
    pub(crate) fn missed(&self) -> Result<Option<usize>, Status> {
        let mut head = [0u64; 2];
        // SAFETY: the head lives until it has been waited for.
        let read = unsafe { self.queue.read(&self.sheet().buffer, 0, head.as_mut_ptr().cast(), size_of_val(&head)) }?;
        api::wait(&[read])?;
        Ok((head[0] & 0xffff_ffff != 0).then_some(head[1] as usize))
    }
}

/// A range of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    start: usize,
    bytes: usize,
    /// Its offset in the device's memory, which is its address modulo 16.
    at: usize,
}

/// The most bytes of an entry.
const MOST: usize = (1 << 28) - 16;

impl Entry {
    fn of(range: Reached) -> Self {
        Entry { start: range.start, bytes: range.end - range.start, at: memory::offset(range.at) }
    }

    /// The same in entries of [`MOST`] bytes at most.
    fn parts(self) -> impl Iterator<Item = Entry> {
        (0..self.bytes).step_by(MOST).map(move |from| Entry {
            start: self.start + from,
            bytes: MOST.min(self.bytes - from),
            at: self.at + from,
        })
    }

    /// Its bytes and its offset, as the table has them.
    fn rest(self) -> u64 {
        debug_assert_eq!(self.at % ALIGN, self.start % ALIGN);
        self.bytes as u64 | ((self.at / ALIGN) as u64) << 28
    }
}

/// Calls `f` with the entries of two lists that are in order, in order; with the parts of large ones of the second.
fn merge(few: &[Entry], many: impl Iterator<Item = Entry>, mut f: impl FnMut(Entry)) {
    let mut few = few.iter().peekable();
    for entry in many {
        while let Some(before) = few.next_if(|other| other.start < entry.start) {
            f(*before);
        }
        if entry.bytes <= MOST { f(entry) } else { entry.parts().for_each(&mut f) }
    }
    few.for_each(|entry| f(*entry));
}

/// What an argument declares of the process.
fn declared(arg: &RawArg, table: &Table) -> Option<Entry> {
    let (start, bytes) = match *arg {
        RawArg::Slice { start, count, size, device: None, .. } => (start, count * size),
        RawArg::Pointer { start, bytes, .. } => (start, bytes),
        _ => return None,
    };
    let at = table.offset(start, bytes).filter(|_| bytes > 0)?;
    Some(Entry { start, bytes, at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_large_has_several_entries() {
        let parts: Vec<Entry> = Entry { start: 5, bytes: 2 * MOST + 3, at: 21 }.parts().collect();
        assert_eq!(parts.iter().map(|part| part.bytes).collect::<Vec<_>>(), [MOST, MOST, 3]);
        assert_eq!((parts[2].start, parts[2].at), (5 + 2 * MOST, 21 + 2 * MOST));
        assert!(parts.iter().all(|part| part.rest() & 0xfff_ffff == part.bytes as u64 && (part.rest() >> 28) as usize * 16 + 5 == part.at));
        assert_eq!(Entry { start: 0, bytes: 0, at: 0 }.parts().count(), 0);
    }

    #[test]
    fn two_lists_are_one_in_order() {
        let entry = |start| Entry { start, bytes: 1, at: start };
        let starts = |few: &[usize], many: &[usize]| {
            let few: Vec<Entry> = few.iter().copied().map(entry).collect();
            let mut all = vec![];
            merge(&few, many.iter().copied().map(entry), |entry| all.push(entry.start));
            all
        };
        assert_eq!(starts(&[2, 5, 9], &[1, 3, 4, 7]), [1, 2, 3, 4, 5, 7, 9]);
        assert_eq!((starts(&[], &[1, 2]), starts(&[3], &[])), (vec![1, 2], vec![3]));
    }
}
