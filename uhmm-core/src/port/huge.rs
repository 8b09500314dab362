//! Blocks that come home as one huge page.
//!
//! The marks of a block that is away stand in a page table, and the kernel splits a huge page that is moved to where a page table is, however empty. So the table goes first: MADV_DONTNEED
//! of the empty block frees it, and its event is known to be ours.
//!
//! # Rules
//! * Meanwhile the block has a mover, so that whoever touches it waits; no lock is held, for the call returns when the monitor has read its event.
//! * The monitor, which reads that event, leaves the work to the assistant.

use crate::bits::Bits;
use crate::core::Core;
use crate::directory::State;
use crate::home;
use crate::page::{Span, Va};
use crate::sync::*;
use uhmm_os::mem::{self, Advice};
use uhmm_os::{BLOCK, Errno, thread};

/// Blocks that can wait for the assistant.
const MOST: usize = 16;

/// What is to be done, and what was announced.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    asked: Mutex<[Va; MOST]>,
    drops: Mutex<[Va; MOST]>,
}

fn replace(all: &Mutex<[Va; MOST]>, from: Va, to: Va) -> bool {
    let mut all = all.lock();
    let found = all.iter_mut().find(|va| **va == from);
    found.map(|va| *va = to).is_some()
}

impl Tables {
    /// Whether the event that pages of a span are dropped is of our own call. It is for one.
    pub(crate) fn is_own_drop(&self, span: Span) -> bool {
        span.len() == BLOCK && span.start != 0 && replace(&self.drops, span.start, 0)
    }
}

/// Whether the block's page table must go before all of it can come home as one.
fn applies(core: &Core, state: &State) -> bool {
    core.space.has_markers()
        && state.device == core.tags.store()
        && state.mover == 0
        && state.huge
        && state.whole
        && state.private() == Bits::ALL
        && state.reg == Bits::ALL
}

/// On the monitor, with the block's lock: has the assistant bring the block home, if that takes more than the monitor may do.
pub(crate) fn leave_to_assistant(core: &Core, state: &mut State, va: Va) -> bool {
    if !applies(core, state) || !replace(&core.tables.asked, 0, va) {
        return false;
    }
    state.mover = core.next_mover();
    state.waiters = true;
    core.assist.nudge();
    true
}

/// The assistant's part.
pub(crate) fn work(core: &Core) {
    loop {
        let asked = core.tables.asked.lock().iter_mut().find(|va| **va != 0).map(core::mem::take);
        let Some(va) = asked else { return };
        drop_table(core, va);
        end(core, va, true);
    }
}

/// Frees the page table of a block that is about to come home as one, if it is such a block. To be called without any lock, by who is not the monitor.
pub(super) fn prepare(core: &Core, va: Va) {
    {
        let _hold = core.space.hold();
        let Some(block) = core.dir.get(va) else { return };
        let mut state = block.lock();
        if !applies(core, &state) {
            return;
        }
        state.mover = core.next_mover();
    }
    drop_table(core, va);
    end(core, va, false);
}

/// The block has a mover: ours.
fn drop_table(core: &Core, va: Va) {
    if replace(&core.tables.drops, 0, va) {
        #[allow(unsafe_code)]
        // SAFETY: all of the block is away, so that there is nothing to drop but marks.
        let dropped = unsafe { mem::madvise(va, BLOCK, Advice::DontNeed) };
        if dropped.is_err_and(|e| e != Errno::AGAIN) {
            replace(&core.tables.drops, va, 0); // locked memory, say: it comes page by page
        }
    }
}

/// Gives the block free again; with `bring`, when it has come home: else the next touch would have the same done again, and wait for it.
fn end(core: &Core, va: Va, bring: bool) {
    let Some(block) = core.dir.get(va) else { return };
    let mut hold = core.space.hold();
    let mut state = block.lock();
    while bring && state.device != 0 {
        let dev = core.device(state.device as usize - 1);
        state.mover = 0;
        let away = state.private() - dev.flights.held(va);
        if home::bring_home(core, dev, &mut state, va, away) != Err(Errno::AGAIN) {
            break;
        }
        state.mover = core.next_mover();
        drop((state, hold));
        core.space.settle();
        thread::yield_now();
        hold = core.space.hold();
        state = block.lock();
    }
    state.mover = 0;
    let woken = core::mem::take(&mut state.waiters);
    if state.device != 0 && (state.resident() | state.busy()).is_empty() {
        let dev = core.device(state.device as usize - 1);
        crate::ranges::give_frames(core, dev, &mut state, va, Bits::EMPTY);
    }
    if woken {
        let _ = core.space.uffd.wake(va, BLOCK);
    }
    drop((state, hold));
}
