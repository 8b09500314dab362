//! The end of snapshots: pages that hold other data too, or cannot move, of which a launch had a copy on the device.
//!
//! Of such a page exactly the bytes count that a written argument covers. For a small argument, and for pages that cannot move, they are written
//! to the CPU's page. For a large argument the page joins the rest of the range on the device: the CPU's page is taken away, which stops its
//! other bytes from changing, those are brought up to date on the device, and the page is Private. So a second launch moves nothing.
#![allow(unsafe_code)] // writes bytes of arguments, which the launch has borrowed, into the program

use crate::args::RawArg;
use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::BlockGuard;
use crate::driver::{Dma, DmaKind};
use crate::fixed;
use crate::launch::{LARGE, Ledger};
use crate::page::{Cause, PageState, Span, Va};
use crate::pool::{Size, Tray};
use crate::ranges::{self, MoveEnd};
use crate::space;
use crate::sync::*;
use core::ops::Range;
use uhmm_os::{PAGE, copy, thread};

/// Ends all snapshots of the launch that has just ended: how many pages did not stay on the device.
///
/// # Errors
/// The first address that was to be written and could not be.
pub(crate) fn finish(core: &Core, dev: &Device, ledger: &mut Ledger, args: &[RawArg], success: bool) -> Result<usize, Va> {
    let mut result = Ok(0);
    for index in 0..core::mem::take(&mut ledger.bounced_count) {
        let va = ledger.bounced[index];
        if success {
            keep(core, dev, va, args);
        }
        let written = take(core, dev, va);
        if let Some((pages, tray)) = written {
            if success && let Ok(dropped) = result {
                result = write_back(args, va, pages, &tray, dev).map(|()| dropped + pages.count());
            }
            core.pool.put(tray);
        }
    }
    result
}

/// The byte ranges of a page, as offsets, that written arguments cover, in order of the arguments.
fn written(args: &[RawArg], page: Va) -> impl Iterator<Item = (Range<usize>, usize)> {
    args.iter().filter_map(RawArg::process_range).filter(|range| range.2.writes()).filter_map(move |(start, end, _)| {
        let (from, to) = (start.max(page), end.min(page + PAGE));
        (from < to).then(|| (from - page..to - page, end - start))
    })
}

/// Lets the pages of large arguments stay on the device.
fn keep(core: &Core, dev: &Device, va: Va, args: &[RawArg]) {
    let _hold = core.space.hold();
    let _ends = core.ends.lock();
    let Some(block) = core.dir.get(va) else { return };
    let mut state = block.lock();
    if state.mover != 0 {
        return;
    }
    for page in state.bounced().pages() {
        let at = va + page * PAGE;
        let span = Span { start: at, end: at + PAGE };
        let large = written(args, at).any(|(_, len)| len >= LARGE);
        if !large || !core.space.mapping(at).ok().flatten().is_some_and(|vma| space::movable(&vma)) {
            continue;
        }
        if !state.reg.has(page) {
            if core.space.register(span).is_err() {
                continue;
            }
            state.reg.set(page);
        }
        if fixed::seal(core, &mut state, va, Bits::one(page)) == Ok(Bits::one(page)) {
            keep_page(core, dev, &mut state, va, page, args);
        }
    }
}

fn keep_page(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, page: usize, args: &[RawArg]) {
    let one = Bits::one(page);
    let Some(mut tray) = core.pool.take_empty(Size::Small, one) else { return };
    let (moved, end) = ranges::move_out(&core.space, va, one, &tray, false);
    tray.full |= moved;
    if end == MoveEnd::All {
        ranges::unmap(core, dev, state, va, one);
        // The bytes between the written ranges are the CPU's.
        let frame = core.dir.frame(state, page);
        let mut at = 0;
        while at < PAGE {
            let inside = written(args, va + page * PAGE).find(|(range, _)| range.contains(&at));
            if let Some((range, _)) = inside {
                at = range.end;
                continue;
            }
            let next = written(args, va + page * PAGE).map(|(range, _)| range.start).filter(|&start| start > at).min().unwrap_or(PAGE);
            let dma = [Dma { kind: DmaKind::ToDevice, host: tray.slot(page) + at, frame, offset: at, len: next - at }];
            let fence = dev.driver.copy(&dma);
            let _ = dev.driver.wait(fence, &dma);
            count(&dev.counters.bytes_to_device, next - at);
            at = next;
        }
        state.shift(one, PageState::Bounced, Cause::LaunchEnd, PageState::Private);
        let _ = ranges::map(core, dev, state, va, one); // else a device fault maps it
    }
    core.pool.put(tray);
}

/// Takes the block's snapshots off the device: which pages, and a tray with their contents.
fn take(core: &Core, dev: &Device, va: Va) -> Option<(Bits, Tray)> {
    loop {
        let hold = core.space.hold();
        let block = core.dir.get(va)?;
        let mut state = block.lock();
        if state.mover != 0 {
            drop((state, hold));
            thread::yield_now();
            continue;
        }
        block.keep.store(false, Ordering::Relaxed);
        let pages = state.bounced();
        if pages.is_empty() {
            return None;
        }
        ranges::unmap(core, dev, &mut state, va, pages);
        let tray = core.pool.take_full(&core.space, Size::Small, pages, 0);
        ranges::frame_runs(core, &state, pages, |run, frame| {
            let dma = [Dma { kind: DmaKind::ToHost, host: tray.slot(run.start), frame, offset: 0, len: run.len() * PAGE }];
            let fence = dev.driver.copy(&dma);
            let _ = dev.driver.wait(fence, &dma);
        });
        state.shift(pages, PageState::Bounced, Cause::LaunchEnd, PageState::System);
        ranges::give_frames(core, dev, &mut state, va, pages);
        return Some((pages, tray));
    }
}

/// Writes the bytes that written arguments cover, and no other, into the program's pages. No lock is held: it may fault.
fn write_back(args: &[RawArg], va: Va, pages: Bits, tray: &Tray, dev: &Device) -> Result<(), Va> {
    let mut result = Ok(());
    for page in pages.pages() {
        let at = va + page * PAGE;
        for (range, _) in written(args, at) {
            // SAFETY: the bytes are an argument's that the launch has borrowed exclusively; the tray is ours. What was unmapped all the same
            // is an error, not a crash.
            let copied = unsafe { copy::guarded((at + range.start) as *mut u8, (tray.slot(page) + range.start) as *const u8, range.len()) };
            match copied {
                Ok(()) => count(&dev.counters.bytes_to_cpu, range.len()),
                Err(address) => result = Err(address),
            }
        }
    }
    result
}
