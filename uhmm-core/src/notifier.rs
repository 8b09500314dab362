//! How a reader of the CPU's page table keeps from acting on what is no longer so: `read_begin`, look, `read_retry`.
//!
//! Every invalidation of a block (unmap, remap, remove) raises the block's sequence number while it holds the event lock alone. A reader
//! takes the number, looks the mapping up without any lock, takes the event lock shared and the block's lock, and compares: if the number is still the
//! same, nothing that was read before has changed, and nothing that is unread can be acted on, for the kernel refuses the move.

use crate::directory::Block;
use crate::sync::Ordering;

/// The number to compare later.
pub(crate) fn read_begin(block: &Block) -> u32 {
    block.seq.load(Ordering::Acquire)
}

/// Whether the block was invalidated since [`read_begin`]: start again. To be asked under the event lock.
pub(crate) fn read_retry(block: &Block, seq: u32) -> bool {
    block.seq.load(Ordering::Acquire) != seq
}

/// An invalidation happens. Under the event lock, alone.
pub(crate) fn invalidate(block: &Block) {
    block.seq.fetch_add(1, Ordering::Release);
}
