//! Policy: what to migrate, and when. The mechanism asks; a policy answers with spans, and can make a program slow but never wrong.
//!
//! A policy is asked on the fault path: it must not allocate, log, or touch memory that could migrate, so it keeps its state in
//! itself (uhmm places it in memory of its own).

use crate::bits::{Bits, PAGES};
use crate::page::Va;

/// A touch by a device of a page that is not there.
#[derive(Clone, Copy, Debug)]
pub struct DeviceFault {
    /// The page's number in its block of 2 MiB, 0 to 511.
    pub page: usize,
    /// Whether it was a write.
    pub write: bool,
    /// Pages of the block that could come: of the same mapping, not on the device.
    pub candidates: Bits,
}

/// A touch by the CPU of a page that is on a device.
#[derive(Clone, Copy, Debug)]
pub struct CpuFault {
    /// The page's number in its block, 0 to 511.
    pub page: usize,
    /// Whether it was a write.
    pub write: bool,
    /// Pages of the block that are on the device only.
    pub away: Bits,
    /// CPU faults in this block since it was last migrated, this one not counted.
    pub faults_in_block: u32,
    /// Blocks that were brought back whole one after the other, each next to the one before, up to the one next to this one; without a launch
    /// in between.
    pub stream: u32,
    /// Whether the pages left as one huge page.
    pub huge: bool,
}

/// Blocks one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    /// The first.
    pub(crate) next: Va,
    /// Whether the others lie below it.
    pub(crate) down: bool,
    /// How many there are.
    pub(crate) left: usize,
}

/// Decides how much moves.
pub trait Policy: Send + Sync + core::fmt::Debug {
    /// What to bring to the device. The touched page is brought in any case; pages that are no candidates are ignored.
    fn device_fault(&self, fault: &DeviceFault) -> Bits;
    /// What to bring home. The touched page is brought in any case; pages that are not away are ignored.
    fn cpu_fault(&self, fault: &CpuFault) -> Bits;
    /// How many of the blocks that follow in a stream to bring home before they are touched. They come in the background.
    fn ahead(&self, _: &CpuFault) -> usize {
        0
    }
}

/// The first policy: a launch moves what it declares; a device fault brings the block; a lone CPU touch brings a leaf of 64 KiB, a
/// second one in the same block or a stream brings the rest of the block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Declared;

/// The most blocks that come ahead of a stream: 16 MiB.
const MOST_AHEAD: usize = 8;

/// Pages in a leaf: 64 KiB, the size at which moving a page begins to beat copying it.
pub const LEAF: usize = 16;

impl Policy for Declared {
    fn device_fault(&self, _: &DeviceFault) -> Bits {
        Bits::ALL
    }

    fn cpu_fault(&self, fault: &CpuFault) -> Bits {
        if fault.huge || fault.stream > 0 || fault.faults_in_block > 0 {
            return Bits::ALL;
        }
        let start = fault.page / LEAF * LEAF;
        Bits::range(start..(start + LEAF).min(PAGES))
    }

    /// Twice as many after each block that proved right.
    fn ahead(&self, fault: &CpuFault) -> usize {
        if fault.stream == 0 { 0 } else { (1 << fault.stream.min(8)).min(MOST_AHEAD) }
    }
}
