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
    FIRST + 3 * ranges
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
        let declared = bound.args().iter().filter_map(|arg| declared(arg, table));
        let reached = bound.reached().map(|range| (range.start, range.end, memory::offset(range.at)));
        let mut all: Vec<(usize, usize, usize)> = declared.chain(reached).collect();
        all.sort_unstable(); // what is reached is in order already: little is left to do
        let count = all.len();
        let Sheet { buffer, room, numbers: list } = &mut *sheet;
        list.clear();
        list.resize(numbers(count), 0);
        list[0] = (count as u64) << 32; // little-endian: the first word says that nothing was missed
        let (starts, rest) = list[FIRST..].split_at_mut(count);
        for ((start, rest), range) in starts.iter_mut().zip(rest.chunks_exact_mut(2)).zip(&all) {
            *start = range.0 as u64;
            rest.copy_from_slice(&[range.1 as u64, range.2 as u64]);
        }
        if count > *room {
            *buffer = device.buffer(8 * numbers(count.next_power_of_two()))?;
            *room = count.next_power_of_two();
        }
        // SAFETY: the numbers live, as they are, until it has been waited for.
        let written = unsafe { self.queue.write(buffer, 0, list.as_ptr().cast(), 8 * list.len()) }?;
        let written = api::wait(&[written]);
        if count > FEW {
            sheet.numbers = vec![]; // a large one is made anew, not kept
        }
        written
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

/// Beginning and end of what an argument declares of the process, and its offset in the device's memory.
fn declared(arg: &RawArg, table: &Table) -> Option<(usize, usize, usize)> {
    let (start, bytes) = match *arg {
        RawArg::Slice { start, count, size, device: None, .. } => (start, count * size),
        RawArg::Pointer { start, bytes, .. } => (start, bytes),
        _ => return None,
    };
    let at = table.offset(start, bytes).filter(|_| bytes > 0)?;
    Some((start, start + bytes, at))
}
