//! The device's memory: one buffer for as long as the device is open, so that nothing is allocated, or touched for the first time, when a block comes; and a queue of its own as the copy engine.
//!
//! A batch is enqueued piece by piece without waiting, and waited for as a whole. Pieces from memory of the program, which may be gone, pass through memory of this driver: the runtime must
//! not touch what can vanish under it.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.
#![allow(unsafe_code)] // copies by way of raw addresses

use crate::api::{self, Buffer, Device, Queue, Status};
use crate::ranges::Ranges;
use std::sync::atomic::{AtomicUsize, Ordering};
use uhmm_core::driver::{Dma, DmaError, DmaKind, Fence, Frame};
use uhmm_os::{Errno, PAGE, copy};

/// Where the device's addresses begin, so that none is that of nothing.
const BASE: usize = 1 << 46;
/// Bytes of the program's memory that are copied at a time.
const STAGE: usize = 1 << 20;

/// The device's address of a frame.
pub(crate) fn address(frame: Frame) -> usize {
    BASE + frame as usize * PAGE
}

/// The offset in the buffer of a device address from [`address`].
pub(crate) fn offset(address: usize) -> usize {
    address - BASE
}

/// The memory of one device.
#[derive(Debug)]
pub struct Memory {
    buffer: Buffer,
    /// Two, which take batches in turn: what one of them waits for, the other need not.
    copies: [Queue; 2],
    next: AtomicUsize,
    ranges: Ranges,
    device: Device,
}

/// What a fence stands for.
struct Batch {
    events: Vec<api::Event>,
    result: Result<(), Status>,
}

impl Memory {
    /// A buffer of so many bytes.
    ///
    /// # Errors
    /// The status of OpenCL.
    pub fn new(device: Device, bytes: usize) -> Result<Self, Status> {
        Ok(Memory {
            buffer: device.buffer(bytes)?,
            copies: [device.queue()?, device.queue()?],
            next: AtomicUsize::new(0),
            ranges: Ranges::new(&device)?,
            device,
        })
    }

    /// The device whose memory it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What kernels follow stored pointers by.
    pub(crate) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// The buffer.
    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Starts a batch.
    pub(crate) fn copy(&self, batch: &[Dma]) -> Fence {
        let mut started = Batch { events: Vec::with_capacity(batch.len()), result: Ok(()) };
        let queue = &self.copies[self.next.fetch_add(1, Ordering::Relaxed) % 2];
        for dma in merged(batch) {
            let at = dma.frame as usize * PAGE + dma.offset;
            let event = match dma.kind {
                // SAFETY: the host's memory is uhmm's, and stays as it is until the batch has been waited for.
                DmaKind::ToDevice | DmaKind::LentToDevice => unsafe { queue.write(&self.buffer, at, dma.host as *const u8, dma.len) },
                // SAFETY: as above.
                DmaKind::ToHost => unsafe { queue.read(&self.buffer, at, dma.host as *mut u8, dma.len) },
                DmaKind::Zero => queue.zero(&self.buffer, at, dma.len),
                DmaKind::GuardedToDevice | DmaKind::GuardedToHost => continue, // when they are waited for
            };
            match event {
                Ok(event) => started.events.push(event),
                Err(status) => started.result = started.result.and(Err(status)),
            }
        }
        let flushed = queue.flush();
        started.result = started.result.and(flushed);
        Fence(Box::into_raw(Box::new(started)) as u64)
    }

    /// Waits for a batch.
    ///
    /// # Errors
    /// As the contract says.
    pub(crate) fn wait(&self, fence: Fence, batch: &[Dma]) -> Result<(), DmaError> {
        // SAFETY: `copy` made it, and every fence is waited for once.
        let started = unsafe { Box::from_raw(fence.0 as *mut Batch) };
        let mut result = api::wait(&started.events).and(started.result).map_err(|_| DmaError::Failed(Errno::IO));
        for dma in batch.iter().filter(|dma| matches!(dma.kind, DmaKind::GuardedToDevice | DmaKind::GuardedToHost)) {
            // That the device failed counts for more than that something is gone.
            result = match (result, self.by_stage(dma)) {
                (Ok(()) | Err(DmaError::Gone { .. }), Err(failed @ DmaError::Failed(_))) => Err(failed),
                (Ok(()), other) => other,
                (result, _) => result,
            };
        }
        result
    }

    /// From or to memory of the program, which may be gone, by way of a stage.
    fn by_stage(&self, dma: &Dma) -> Result<(), DmaError> {
        let mut stage = vec![0u8; STAGE.min(dma.len)];
        let mut result = Ok(());
        for done in (0..dma.len).step_by(STAGE) {
            let (at, host, len) = (dma.frame as usize * PAGE + dma.offset + done, dma.host + done, STAGE.min(dma.len - done));
            let failed = |_: Status| DmaError::Failed(Errno::IO);
            // SAFETY: the stage is long enough, and lives until what uses it has been waited for; the program's memory may be anything.
            let reached = unsafe {
                if dma.kind == DmaKind::GuardedToDevice {
                    let read = copy::guarded(stage.as_mut_ptr(), host as *const u8, len);
                    if read.is_ok() {
                        self.copies[0]
                            .write(&self.buffer, at, stage.as_ptr(), len)
                            .and_then(|event| api::wait(&[event]))
                            .map_err(failed)?;
                    }
                    read
                } else {
                    self.copies[0].read(&self.buffer, at, stage.as_mut_ptr(), len).and_then(|event| api::wait(&[event])).map_err(failed)?;
                    copy::guarded(host as *mut u8, stage.as_ptr(), len)
                }
            };
            result = result.and(reached.map_err(|address| DmaError::Gone { address }));
        }
        result
    }
}

/// The pieces of a batch, those that follow each other on both sides as one.
fn merged(batch: &[Dma]) -> impl Iterator<Item = Dma> {
    let mut rest = batch;
    core::iter::from_fn(move || {
        let (&first, mut others) = rest.split_first()?;
        let mut all = first;
        while let Some((next, more)) = others.split_first() {
            let end = all.frame as usize * PAGE + all.offset + all.len;
            let follows = next.kind == all.kind
                && next.frame as usize * PAGE + next.offset == end
                && (next.kind == DmaKind::Zero || next.host == all.host + all.len);
            if !follows {
                break;
            }
            (all.len, others) = (all.len + next.len, more);
        }
        rest = others;
        Some(all)
    })
}
