//! Twins: what snapshots held when they were taken.
//!
//! A kernel may write anywhere on a page of which it has a snapshot: to bytes that a launch declares, which are known, and, where it follows pointers, to any other. When
//! the launch ends, the bytes that differ from the twin are those that the kernel has changed, and just they are written to the program's page.
//! What a kernel overwrites with what was there before is no change, as with any such comparison.
//!
//! A block with twins owns a slot of 2 MiB of address space, where the twin of page `i` stands at place `i`.

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::directory::State;
use crate::driver::{Dma, DmaKind};
use crate::own::{self, OwnSlice};
use crate::ranges;
use crate::sync::*;
use core::ops::Range;
use uhmm_os::mem::{self, Advice, Mapping};
use uhmm_os::{BLOCK, Errno, PAGE};

/// The slots.
#[derive(Debug)]
pub(crate) struct Twins {
    memory: Mapping,
    slots: usize,
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    /// Slots that were given back.
    list: OwnSlice<u32>,
    count: usize,
    /// The first slot that was never used; 0 is no slot.
    fresh: u32,
}

impl Twins {
    /// Room for `slots` blocks.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(slots: usize) -> Result<Self, Errno> {
        let memory = own::map(c"uhmm twins", (slots + 1) * BLOCK)?;
        Ok(Twins { memory, slots, free: Mutex::new(Free { list: OwnSlice::new(c"uhmm twin slots", slots)?, count: 0, fresh: 1 }) })
    }

    fn slot(&self, state: &State, page: usize) -> usize {
        self.memory.start() + state.twin as usize * BLOCK + page * PAGE
    }

    fn take(&self) -> Option<u32> {
        let mut free = self.free.lock();
        if free.count > 0 {
            free.count -= 1;
            return Some(free.list[free.count]);
        }
        if free.fresh as usize > self.slots {
            return None;
        }
        free.fresh += 1;
        Some(free.fresh - 1)
    }

    /// Makes twins of snapshots that are on the device and not in its page table. Without room for them, or if the device does not give what it was just given, it may only read the pages.
    pub(crate) fn make(&self, core: &Core, dev: &Device, state: &mut State, pages: Bits) {
        if pages.is_empty() {
            return;
        }
        if state.twin == 0 {
            match self.take() {
                Some(slot) => state.twin = slot,
                None => {
                    state.rdonly |= pages;
                    return;
                }
            }
        }
        let mut without = Bits::EMPTY;
        ranges::frame_runs(core, state, pages, |run, frame| {
            let dma = [Dma { kind: DmaKind::ToHost, host: self.slot(state, run.start), frame, offset: 0, len: run.len() * PAGE }];
            if dev.transfer(&dma).is_err() {
                without |= Bits::range(run);
            }
        });
        state.rdonly |= without;
        state.twins |= pages - without;
    }

    /// The twin of a page.
    #[allow(unsafe_code)]
    pub(crate) fn of(&self, slot: u32, page: usize) -> &[u8; PAGE] {
        // SAFETY: the slot's block made the twin, and is in the hands of the caller until he releases it; nobody writes it meanwhile.
        unsafe { &*((self.memory.start() + slot as usize * BLOCK + page * PAGE) as *const [u8; PAGE]) }
    }

    /// These bytes of the page are no changes any more. The block is the caller's; without a slot, or a twin of the page, nobody reads them.
    pub(crate) fn set(&self, slot: u32, page: usize, now: &[u8; PAGE], range: Range<usize>) {
        if slot == 0 {
            return;
        }
        let twin = (self.memory.start() + slot as usize * BLOCK + page * PAGE + range.start) as *mut u8;
        #[allow(unsafe_code)]
        // SAFETY: inside the slot, which belongs to the caller's block; nobody else reads or writes it meanwhile.
        unsafe {
            twin.copy_from_nonoverlapping(now[range.clone()].as_ptr(), range.len())
        };
    }

    /// The twins of these pages go, and with the last snapshot the slot.
    pub(crate) fn leave(&self, state: &mut State, pages: Bits) {
        state.twins -= pages;
        if state.bounced().is_empty() {
            self.release(state);
        }
    }

    /// Gives the block's slot back.
    pub(crate) fn release(&self, state: &mut State) {
        let slot = core::mem::take(&mut state.twin);
        state.twins = Bits::EMPTY;
        if slot == 0 {
            return;
        }
        #[allow(unsafe_code)]
        // SAFETY: ours, and nobody reads it any more.
        let _ = unsafe { mem::madvise(self.memory.start() + slot as usize * BLOCK, BLOCK, Advice::DontNeed) };
        let mut free = self.free.lock();
        let count = free.count;
        free.list[count] = slot;
        free.count += 1;
    }
}

/// Calls `f` with each run of bytes of `now` that differ from `twin`.
pub(crate) fn changes(twin: &[u8; PAGE], now: &[u8; PAGE], mut f: impl FnMut(Range<usize>)) {
    let mut at = 0;
    while at < PAGE {
        if twin[at..at + 8] == now[at..at + 8] {
            at += 8;
            continue;
        }
        let from = (at..PAGE).find(|&i| twin[i] != now[i]).unwrap_or(PAGE);
        let to = (from..PAGE).find(|&i| twin[i] == now[i]).unwrap_or(PAGE);
        f(from..to);
        // On with the word that holds the first equal byte, unless all of it was looked at.
        at = to.next_multiple_of(8).min(PAGE);
        if to < at && twin[to..at] != now[to..at] {
            let mut rest = to;
            while let Some(from) = (rest..at).find(|&i| twin[i] != now[i]) {
                rest = (from..at).find(|&i| twin[i] == now[i]).unwrap_or(at);
                f(from..rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_is_found_and_no_other() {
        let mut random = 12345u64;
        let mut next = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            (random >> 33) as usize
        };
        for many in [0, 1, 7, 100, 4000] {
            let twin = [7u8; PAGE];
            let mut now = twin;
            for _ in 0..many {
                let at = next() % PAGE;
                now[at] = (next() % 3) as u8 + 6; // sometimes what was there
            }
            let mut seen = twin;
            changes(&twin, &now, |range| {
                assert!(range.clone().all(|i| twin[i] != now[i]), "{range:?} holds an equal byte");
                seen[range.clone()].copy_from_slice(&now[range]);
            });
            assert!(seen == now, "{many} changes");
        }
    }
}
