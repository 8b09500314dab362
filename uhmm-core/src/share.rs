//! Sharing what a device has: its pages go on being its own, and the CPU gets copies, so that both sides can read them.
//!
//! Order, on one locked block whose pages are the device's alone: the device loses the right to write, acknowledged; the kernel copies the contents into the program,
//! write-protected, which wakes who waits for them (UFFDIO_COPY); only then does the directory call them Duplicated. So nobody can write before both are equal, also while kernels
//! run. The other way round, from the CPU's page to both, is a migration's ([`crate::migrate`]), which cannot do that while kernels run: a page enters a device's page table before
//! it is protected there.
#![allow(unsafe_code)] // calls of userfaultfd that put pages into the program

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::{BlockGuard, Frame};
use crate::driver::MapRun;
use crate::home;
use crate::mode::Mode;
use crate::monitor::kept;
use crate::page::{Cause, PageState, Va};
use crate::ranges;
use core::ops::Range;
use uhmm_os::uffd::CopyMode;
use uhmm_os::{Errno, PAGE};

/// How sharing a run of pages ended.
struct Shared {
    /// Pages that both have now.
    both: Bits,
    /// A page that somebody else has filled: what is there is newer.
    newer: Bits,
    result: Result<(), Errno>,
}

/// Gives the CPU copies of private pages of the block, which the device keeps: those that both have, or the CPU alone, now. The event lock is held, or the
/// caller is the one who reads events.
///
/// # Errors
/// As [`home::bring_home`].
pub(crate) fn share(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits) -> Result<Bits, Errno> {
    let mut pages = pages & state.private();
    // What is parked has no contents to share yet. A coherent device shares as it is, and what is written asynchronously is noticed in another way.
    if dev.driver.info().capabilities.coherent || core.space.mode != Mode::Full || pages.meets(state.parked) {
        return home::bring_home(core, dev, state, va, pages);
    }
    if core.space.uffd.event_pending() {
        return Err(Errno::AGAIN);
    }
    // A device block that is one huge page is not split for a part of it.
    if state.whole && state.win == Bits::ALL && pages != state.private() {
        if !kept(core, state, va).is_empty() {
            return home::bring_home(core, dev, state, va, pages);
        }
        pages = state.private();
    }
    dev.changed();
    let mut shared = Shared { both: Bits::EMPTY, newer: Bits::EMPTY, result: Ok(()) };
    let mut loose = pages - state.win;
    let mut runs = [MapRun { va: 0, frame: 0, pages: 0, write: true }; 16];
    // In turns of a few runs, for they are told by a callback that borrows the state.
    let mut rest = pages & state.win;
    while !rest.is_empty() && shared.result.is_ok() {
        let mut found = 0;
        ranges::frame_runs(core, state, rest, |run, frame| {
            if found < runs.len() {
                runs[found] = MapRun { va: va + run.start * PAGE, frame, pages: run.len(), write: true };
                found += 1;
            }
        });
        for &run in &runs[..found] {
            let first = (run.va - va) / PAGE;
            let bits = Bits::range(first..first + run.pages);
            rest -= bits;
            match dev.driver.protect(run) {
                Some(source) if shared.result.is_ok() => give(core, dev, va, first..first + run.pages, source, &mut shared),
                Some(_) => {}
                None => loose |= bits,
            }
            let left = bits - shared.both;
            if !left.meets(loose) && !left.is_empty() {
                ranges::with_runs(core, state, va, left, true, |runs| dev.driver.allow_writes(runs));
            }
        }
    }
    if shared.result.is_ok() && !loose.is_empty() {
        // They go back into the device's page table when it next needs them.
        ranges::unmap(core, dev, state, va, loose);
        ranges::frame_runs(core, state, loose, |run, frame| {
            if shared.result.is_ok() {
                // What the device does not give is not shared: who asked brings it home, and finds it lost.
                let _ = home::with_contents(core, dev, run.len(), frame as Frame, |source| give(core, dev, va, run, source, &mut shared));
            }
        });
    }
    end(core, dev, state, va, shared)
}

/// Copies a run of pages, whose contents stand at `source`, into the program.
fn give(core: &Core, dev: &Device, va: Va, run: Range<usize>, source: usize, shared: &mut Shared) {
    let (mut at, mut most) = (run.start, run.len());
    while at < run.end {
        let n = most.min(run.end - at);
        let (to, from) = (va + at * PAGE, source + (at - run.start) * PAGE);
        count(&dev.counters.bytes_to_cpu, n * PAGE); // first, for the copy wakes the toucher, who may look
        // SAFETY: nobody writes to the source: the device may not, and the block is locked. The target pages are empty and watched, as the directory says.
        let copied = unsafe { core.space.uffd.copy(to, from, n * PAGE, CopyMode::WP) };
        let done = copied.map_or_else(|partial| partial.done / PAGE, |()| n);
        shared.both |= Bits::range(at..at + done);
        at += done;
        let Err(partial) = copied else {
            most = run.len();
            continue;
        };
        match partial.errno {
            // One call copies within one mapping only, and says of more that there is none.
            Errno::NOENT if n - done > 1 => most = ranges::within_mapping(&core.space, va + at * PAGE, n - done),
            errno => {
                if errno == Errno::EXIST {
                    shared.newer.set(at);
                }
                shared.result = Err(if errno == Errno::NOENT { errno } else { Errno::AGAIN });
                return;
            }
        }
    }
}

/// Enters into the directory what has come of it.
fn end(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, shared: Shared) -> Result<Bits, Errno> {
    let Shared { both, newer, result } = shared;
    state.shift(both, PageState::Private, Cause::Share, PageState::Duplicated);
    if !both.is_empty() {
        state.huge = false; // the CPU's page table has small pages there now
    }
    count(&dev.counters.pages_duplicated, both.count());
    if !newer.is_empty() {
        ranges::unmap(core, dev, state, va, newer);
        state.shift(newer, PageState::Private, Cause::Return, PageState::System);
        ranges::give_frames(core, dev, state, va, newer);
    }
    result.map(|()| both)
}
