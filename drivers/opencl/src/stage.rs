//! Memory of the driver's that pieces of a batch pass through. It is kept from batch to batch: the first touch of a fresh page costs more than its copy.
#![allow(unsafe_code)] // copies by way of raw addresses

use crate::pieces::{Op, SMALL};
use core::mem;
use core::ops::Range;
use std::sync::{Mutex, PoisonError};
use uhmm_core::driver::{Dma, DmaKind};
use uhmm_os::copy;

/// How many are kept: two batches are under way together, and one before a kernel.
const KEPT: usize = 3;
/// The largest that are kept: all of a batch of two blocks.
const LARGEST: usize = 4 << 20;

/// Those that no batch uses.
#[derive(Debug, Default)]
pub(crate) struct Stages(Mutex<Vec<Vec<u8>>>);

impl Stages {
    /// One for these calls.
    pub(crate) fn take(&self, ops: impl Iterator<Item = Op>) -> Stage {
        let needed = ops.filter(fits).map(|op| op.rows.len * op.rows.count).sum();
        let mut bytes = if needed == 0 { vec![] } else { self.kept().pop().unwrap_or_default() };
        if bytes.len() < needed {
            bytes.resize(needed, 0);
        }
        Stage { base: bytes.as_mut_ptr(), bytes, used: 0, back: vec![], gone: None }
    }

    /// It has served: the device uses it no more.
    pub(crate) fn put(&self, stage: Stage) {
        let mut kept = self.kept();
        if (1..=LARGEST).contains(&stage.bytes.len()) && kept.len() < KEPT {
            kept.push(stage.bytes);
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a call passes through the stage of its batch. What is larger goes by parts, when the batch is waited for.
pub(crate) fn fits(op: &Op) -> bool {
    op.staged && op.rows.len <= SMALL
}

/// That of one batch.
#[derive(Debug)]
pub(crate) struct Stage {
    /// As long as all its calls need, or longer.
    bytes: Vec<u8>,
    /// Where they are: they are used by nothing but this, while the device has a part of them.
    base: *mut u8,
    used: usize,
    /// What goes to where it belongs when it has come from the device: from which byte on, and which pieces.
    back: Vec<(usize, Range<usize>)>,
    /// The first address that could not be reached.
    gone: Option<usize>,
}

// SAFETY: the address is that of its own bytes.
unsafe impl Send for Stage {}

impl Stage {
    /// A place for a call, and in it what goes to the device; `None` if nothing of that can be read. It stays where it is.
    pub(crate) fn enter(&mut self, batch: &[Dma], op: &Op) -> Option<*mut u8> {
        let (start, len) = (self.used, op.rows.len * op.rows.count);
        assert!(fits(op) && len <= self.bytes.len() - start, "a stage for other calls");
        self.used += len;
        if matches!(op.first.kind, DmaKind::ToHost | DmaKind::GuardedToHost) {
            self.back.push((start, op.pieces.clone()));
        } else if !self.each(batch, start, op.pieces.clone(), |stage, dma| {
            // SAFETY: the piece's part of the stage, which the device does not have yet; the program's memory may be anything.
            unsafe { copy::guarded(stage, dma.host as *const u8, dma.len) }
        }) {
            return None;
        }
        Some(self.base.wrapping_add(start))
    }

    /// All has come from the device: copies it to where it belongs. The first address of the program's that could not be reached, then or before.
    pub(crate) fn deliver(&mut self, batch: &[Dma]) -> Option<usize> {
        for (start, pieces) in mem::take(&mut self.back) {
            self.each(batch, start, pieces, |stage, dma| {
                // SAFETY: the piece's part of the stage, with which the device is done; the program's memory may be anything.
                unsafe { copy::guarded(dma.host as *mut u8, stage, dma.len) }
            });
        }
        self.gone
    }

    /// The device may use it for ever.
    pub(crate) fn leave(self) {
        mem::forget(self.bytes);
    }

    /// Copies some pieces, which lie one after the other from a byte on: whether any could be reached.
    fn each(&mut self, batch: &[Dma], mut at: usize, pieces: Range<usize>, copied: impl Fn(*mut u8, &Dma) -> Result<(), usize>) -> bool {
        let mut reached = false;
        for dma in &batch[pieces] {
            match copied(self.base.wrapping_add(at), dma) {
                Ok(()) => reached = true,
                Err(address) => self.gone = self.gone.or(Some(address)),
            }
            at += dma.len;
        }
        reached
    }
}
