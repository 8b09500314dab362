//! The small steps that migrations both ways are made of, each on pages of one locked block: take and give frames, move pages out of the
//! program, protect them, enter them into the device's page table and take them out.
#![allow(unsafe_code)] // calls of userfaultfd that change the program's memory

use crate::bits::{Bits, PAGES};
use crate::coherent;
use crate::core::{Core, Device};
use crate::devmem::Full;
use crate::directory::{Frame, State};
use crate::driver::{Committed, MapRun};
use crate::home;
use crate::mirror::Reason;
use crate::page::{Span, Va};
use crate::place;
use crate::pool::Tray;
use crate::space::Space;
use core::ops::Range;
use uhmm_os::uffd::MoveMode;
use uhmm_os::{Errno, PAGE, thread};

/// Runs that are handed to a driver at once.
const RUNS: usize = 64;

/// How moving pages out of the program ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MoveEnd {
    /// Every page was moved.
    All,
    /// A mapping event is unread.
    Pending,
    /// A page was not there any more.
    Vanished,
    /// The kernel will not move a page (pinned, shared since a fork, another kind of mapping); others may have moved.
    Refused,
}

/// The addresses of a run of pages of a block.
pub(crate) fn pages(block: Span, run: Range<usize>) -> Span {
    Span { start: block.start + run.start * PAGE, end: block.start + run.end * PAGE }
}

/// The smallest span that holds all pages of a set.
pub(crate) fn hull(block: Span, bits: Bits) -> Span {
    let first = bits.next(0).unwrap_or(0);
    let end = bits.runs().last().map_or(first, |run| run.end);
    pages(block, first..end)
}

/// Moves pages of the block at `va` into the same slots of a tray, which are empty. With `hasty`, stops at the first page that is refused. Mirrors are told first
/// that they go `to` a device, or home.
pub(crate) fn move_out(space: &Space, va: Va, bits: Bits, tray: &Tray, to: Option<u32>, hasty: bool) -> (Bits, MoveEnd) {
    space.mirrors.invalidate(hull(Span::block(va), bits), Reason::Migrate { to });
    take_out(space, va, bits, tray, hasty)
}

/// As [`move_out`], of what mirrors were told of before.
pub(crate) fn take_out(space: &Space, va: Va, bits: Bits, tray: &Tray, hasty: bool) -> (Bits, MoveEnd) {
    let mut moved = Bits::EMPTY;
    let mut end = MoveEnd::All;
    for run in bits.runs() {
        let mut at = run.start;
        let mut most = run.len();
        let mut contended = 0;
        while at < run.end {
            let n = most.min(run.end - at);
            // SAFETY: the tray is in our hands alone and registered in this userfaultfd, so that the kernel refuses the call while a
            // change of the program's mappings is unread; the directory, looked at under the event lock, says that the pages are the program's.
            let result = unsafe { space.uffd.move_pages(tray.slot(at), va + at * PAGE, n * PAGE, MoveMode::empty()) };
            let Err(partial) = result else {
                moved |= Bits::range(at..at + n);
                at += n;
                most = run.len();
                continue;
            };
            let done = partial.done / PAGE;
            moved |= Bits::range(at..at + done);
            at += done;
            match partial.errno {
                Errno::AGAIN if done > 0 => {}
                Errno::AGAIN if space.uffd.event_pending() => return (moved, MoveEnd::Pending),
                Errno::AGAIN if contended < 1000 => {
                    contended += 1;
                    thread::yield_now();
                }
                Errno::NOENT => return (moved, MoveEnd::Vanished),
                Errno::INVAL if n > 1 => most = within_mapping(space, va + at * PAGE, n),
                _ => {
                    end = MoveEnd::Refused;
                    if hasty {
                        return (moved, end);
                    }
                    at += 1;
                }
            }
        }
    }
    (moved, end)
}

/// How many of `n` pages from `at` on to try next, when all at once were refused: those of the first mapping, for one call moves within one only; else half.
pub(crate) fn within_mapping(space: &Space, at: Va, n: usize) -> usize {
    match space.mapping(at) {
        Ok(Some(vma)) if (vma.end - at) / PAGE < n => (vma.end - at) / PAGE,
        _ => n.div_ceil(2),
    }
}

/// Watches what is mapped of a range, whatever blocks it lies in. No lock is held.
///
/// # Errors
/// As [`Space::watch`]; what was watched before that is noted.
pub(crate) fn watch_span(core: &Core, span: Span) -> Result<(), Errno> {
    watch_and(core, span, |_| {})
}

/// As [`watch_span`]; calls `f` with each part that is watched, before anybody can be told that it is unmapped.
pub(crate) fn watch_and(core: &Core, span: Span, mut f: impl FnMut(Span)) -> Result<(), Errno> {
    let _hold = core.space.hold();
    core.space.watch(span, Some(core.tags.store()).filter(|id| *id != 0), |watched| {
        for part in watched.blocks() {
            if let Ok(block) = core.dir.get_or_make(part.start) {
                block.lock().reg |= part.bits();
            }
        }
        f(watched);
    })
}

/// Write-protects pages of the program.
pub(crate) fn protect(core: &Core, span: Span) -> Result<(), Errno> {
    // SAFETY: it changes no contents; a writer waits until the monitor has served it.
    unsafe { core.space.uffd.write_protect(span.start, span.len(), true) }
}

/// Takes the marks out of empty entries of the program's block at `to`, which nothing could be moved onto. See [`crate::port`].
///
/// # Errors
/// `EAGAIN` if an event is unread.
pub(crate) fn clear_marks(core: &Core, dev: &Device, pages: Bits, to: Va) -> Result<(), Errno> {
    if !core.space.has_markers() || core.tags.store() != dev.id() {
        return Ok(());
    }
    for run in pages.runs() {
        let span = Span { start: to + run.start * PAGE, end: to + run.end * PAGE };
        // SAFETY: as in `protect`; who waits there is woken when the pages have come, or touches them again.
        let cleared = unsafe { core.space.uffd.write_protect(span.start, span.len(), false) };
        // Any other error: it is unmapped, of which an event tells.
        if cleared == Err(Errno::AGAIN) {
            return cleared;
        }
    }
    Ok(())
}

/// Lets the program write pages again, and wakes who waits for that.
pub(crate) fn unprotect(core: &Core, va: Va, bits: Bits) -> Result<(), Errno> {
    bits.runs().try_for_each(|run| unprotect_span(core, pages(Span::block(va), run)))
}

/// As [`unprotect`], at addresses.
pub(crate) fn unprotect_span(core: &Core, span: Span) -> Result<(), Errno> {
    // SAFETY: as in `protect`.
    match unsafe { core.space.uffd.write_protect(span.start, span.len(), false) } {
        // Unmapped: its event will come. The kernel wakes nobody who waits for a page that has gone.
        Err(Errno::NOENT) => core.space.uffd.wake(span.start, span.len()),
        other => other,
    }
}

/// Calls `f` for every run of pages whose frames follow each other.
pub(crate) fn frame_runs(core: &Core, state: &State, bits: Bits, mut f: impl FnMut(Range<usize>, Frame)) {
    for run in bits.runs() {
        let mut start = run.start;
        while start < run.end {
            let first = core.dir.frame(state, start);
            let mut end = if state.whole { run.end } else { start + 1 };
            while end < run.end && core.dir.frame(state, end) == first + (end - start) as Frame {
                end += 1;
            }
            f(start..end, first);
            start = end;
        }
    }
}

/// Calls `f` with places in the block and addresses at which the contents of the device's pages there stand; `None` if the device does not give them.
pub(crate) fn read_frames(core: &Core, dev: &Device, state: &State, va: Va, run: Range<usize>, mut f: impl FnMut(usize, Option<usize>)) {
    for page in run {
        match dev.driver.mapped(va + page * PAGE).filter(|_| state.win.has(page)) {
            Some(at) => f(page, Some(at)),
            None => {
                if home::with_contents(core, dev, 1, core.dir.frame(state, page), |at| f(page, Some(at))).is_err() {
                    f(page, None);
                }
            }
        }
    }
}

/// Calls `f` with the runs of `bits` in batches for a driver.
pub(crate) fn with_runs(core: &Core, state: &State, va: Va, bits: Bits, write: bool, mut f: impl FnMut(&[MapRun])) {
    let mut runs = [MapRun { va: 0, frame: 0, pages: 0, write }; RUNS];
    let mut count = 0;
    frame_runs(core, state, bits, |run, frame| {
        if count == RUNS {
            f(&runs);
            count = 0;
        }
        runs[count] = MapRun { va: va + run.start * PAGE, frame, pages: run.len(), write };
        count += 1;
    });
    if count > 0 {
        f(&runs[..count]);
    }
}

/// Enters resident pages into the device's page table: read-only those that both sides have. Those of a coherent device go into the program.
///
/// # Errors
/// The driver's; for a coherent device `EAGAIN` if an event is unread.
pub(crate) fn map(core: &Core, dev: &Device, state: &mut State, va: Va, bits: Bits) -> Result<(), Errno> {
    if dev.driver.info().capabilities.coherent {
        return coherent::enter(core, dev, state, va, bits);
    }
    dev.changed();
    let mut result = Ok(());
    let read = state.duplicated() | state.rdonly;
    for (part, write) in [(bits & read, false), (bits - read, true)] {
        let mut done = Bits::EMPTY;
        with_runs(core, state, va, part, write, |runs| {
            if result.is_ok() {
                result = dev.driver.map(Committed::new(state, va, runs));
                if result.is_ok() {
                    for run in runs {
                        let first = (run.va - va) / PAGE;
                        done |= Bits::range(first..first + run.pages);
                    }
                }
            }
        });
        state.win |= done;
    }
    result
}

/// Takes pages out of the device's page table. A block that is one huge page there goes whole, for taking a part would split it; but not where the rest could not be fetched again: on a device
/// that has no page table to split, and under a lease.
pub(crate) fn unmap(core: &Core, dev: &Device, state: &mut State, va: Va, bits: Bits) {
    dev.changed();
    let is_huge = state.whole && state.win == Bits::ALL && !bits.is_empty();
    let goes_whole = is_huge && !dev.driver.info().capabilities.linear && dev.flights.leased(Span::block(va).start).is_empty();
    let gone = if goes_whole { Bits::ALL } else { bits & state.win };
    with_runs(core, state, va, gone, true, |runs| dev.driver.unmap(runs));
    state.win -= gone;
}

/// Gives every page of `bits` a frame.
///
/// # Errors
/// [`Full`]; nothing was taken then.
pub(crate) fn take_frames(core: &Core, dev: &Device, state: &mut State, va: Va, bits: Bits) -> Result<(), Full> {
    if state.whole {
        return Ok(());
    }
    if let Some(places) = dev.mem.places() {
        let base = place::take(dev, places, va)?;
        core.dir.set_whole(state, base);
        return Ok(());
    }
    if bits == Bits::ALL && !core.dir.has_table(state) {
        let base = dev.mem.take_whole(&*dev.driver, va)?;
        core.dir.set_whole(state, base);
        return Ok(());
    }
    let mut have = Bits::EMPTY;
    for run in bits.runs() {
        let mut at = run.start;
        while at < run.end {
            let taken = dev.mem.take_run(&*dev.driver, run.end - at);
            let Ok((frame, len)) = taken else {
                give_frames(core, dev, state, va, have);
                return Err(Full);
            };
            for i in 0..len {
                if core.dir.set_frame(state, at + i, frame + i as Frame).is_err() {
                    (i..len).for_each(|rest| dev.mem.free_page(frame + rest as Frame));
                    give_frames(core, dev, state, va, have);
                    return Err(Full);
                }
                have.set(at + i);
            }
            at += len;
        }
    }
    Ok(())
}

/// Gives the frames of pages back that are neither resident nor in transit; when the block has nothing left on the device, all of it.
pub(crate) fn give_frames(core: &Core, dev: &Device, state: &mut State, va: Va, bits: Bits) {
    debug_assert!(!bits.meets(state.resident()));
    if !state.whole {
        for page in bits.pages() {
            dev.mem.free_page(core.dir.frame(state, page));
        }
    }
    if state.mover == 0 && (state.resident() | state.busy()).is_empty() {
        if let Some(base) = core.dir.clear_frames(state) {
            dev.mem.free_whole(base);
        }
        state.device = 0;
        dev.mem.forget(&core.dir, va);
    }
}

const _: () = assert!(PAGES <= u16::MAX as usize);
