//! The table by which a kernel turns a pointer that is stored in memory into one of its own (`uhmm_ptr` in `uhmm.cl`): the ranges that the launch has declared, and where they lie in the
//! device's memory. A pointer to anything else is noted, and fails the launch.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // copies by way of raw addresses

use crate::api::{self, Buffer, Device, Queue, Status};
use crate::program::place;
use crate::table::Table;
use uhmm_core::args::{MAX_ARGS, RawArg};

/// The numbers of the table: see `uhmm.cl`.
const NUMBERS: usize = 2 + 3 * MAX_ARGS;
/// Its bytes, with the page that stands for what was not found.
const BYTES: usize = 1024 + 4096;

/// The table of a device: of one launch at a time.
#[derive(Debug)]
pub struct Ranges {
    buffer: Buffer,
    queue: Queue,
}

impl Ranges {
    pub(crate) fn new(device: &Device) -> Result<Self, Status> {
        Ok(Ranges { buffer: device.buffer(BYTES)?, queue: device.queue()? })
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Makes it the table of a launch with these arguments.
    pub(crate) fn set(&self, args: &[RawArg], table: &Table) -> Result<(), Status> {
        let mut found = [(0u64, 0u64, 0u64); MAX_ARGS];
        let mut count = 0;
        for arg in args {
            let &RawArg::Slice { start, count: elements, size, device: None, .. } = arg else { continue };
            let Some(at) = place(arg, table).filter(|_| elements * size > 0) else { continue };
            found[count] = (start as u64, (start + elements * size) as u64, at as u64);
            count += 1;
        }
        found[..count].sort_unstable();
        let mut numbers = [0u64; NUMBERS];
        numbers[0] = (count as u64) << 32; // little-endian: the first word says that nothing was missed
        for (slot, range) in numbers[2..].chunks_mut(3).zip(&found[..count]) {
            slot.copy_from_slice(&[range.0, range.1, range.2]);
        }
        let zero = self.queue.zero(&self.buffer, 1024, BYTES - 1024)?;
        // SAFETY: the numbers live until it has been waited for.
        let written = unsafe { self.queue.write(&self.buffer, 0, numbers.as_ptr().cast(), size_of_val(&numbers)) }?;
        api::wait(&[zero, written])
    }

    /// The first address that the kernel did not find, when it has ended.
    pub(crate) fn missed(&self) -> Result<Option<usize>, Status> {
        let mut head = [0u64; 2];
        // SAFETY: the head lives until it has been waited for.
        let read = unsafe { self.queue.read(&self.buffer, 0, head.as_mut_ptr().cast(), size_of_val(&head)) }?;
        api::wait(&[read])?;
        Ok((head[0] & 0xffff_ffff != 0).then_some(head[1] as usize))
    }
}
