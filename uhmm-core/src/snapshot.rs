//! The end of snapshots: pages that hold other data too, or cannot move, of which a launch had a copy on the device.
//!
//! Of such a page exactly the bytes count that a written argument covers, and those that the kernel has changed besides ([`crate::twins`]). For a small argument, and for pages that cannot move, they are written
//! to the CPU's page. For a large argument the page joins the rest of the range on the device: the CPU's page is taken away, which stops its
//! other bytes from changing, those are brought up to date on the device, and the page is Private. So a second launch moves nothing.
#![allow(unsafe_code)] // writes bytes of arguments, which the launch has borrowed, into the program

use crate::args::{MAX_ARGS, RawArg};
use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::{Block, BlockGuard, Frame};
use crate::driver::{Dma, DmaError, DmaKind};
use crate::fixed::{self, Sealed};
use crate::flight::{Flight, MAX_FLIGHTS};
use crate::launch::{LARGE, Ledger};
use crate::migrate;
use crate::own::OwnSlice;
use crate::page::{Cause, PageState, Span, Va};
use crate::policy::Wishes;
use crate::pool::{Size, Tray};
use crate::ranges::{self, MoveEnd};
use crate::returns::{self, Returns};
use crate::sync::*;
use crate::twins;
use core::ops::Range;
use uhmm_os::{BLOCK, Errno, PAGE, copy, thread};

/// Ends all snapshots of the launch that has just ended: how many pages did not stay on the device.
///
/// # Errors
/// Why some of what the kernel has written could not be written to the program: the first reason.
pub(crate) fn finish(
    core: &Core,
    dev: &Device,
    flight: &Flight,
    ledger: &mut Ledger,
    args: &[RawArg],
    success: bool,
) -> Result<usize, DmaError> {
    let mut result = Ok(0);
    // A kept page goes home when the CPU touches its other bytes: nothing for a device that could not fetch it again.
    let mut end = |va, keeps: bool| {
        if success && keeps && flight.fetches(dev) {
            keep(core, dev, flight, va, args, &ledger.sealed);
        }
        let ended = end_block(core, dev, flight, va, args, success, Some(&ledger.returns));
        result = match (result, ended) {
            (Ok(sum), Ok(pages)) => Ok(sum + pages),
            (Err(e), _) | (_, Err(e)) => Err(e),
        };
    };
    for index in 0..core::mem::take(&mut ledger.bounced_count) {
        end(ledger.bounced[index], true);
    }
    if flight.ran {
        // Those that the kernel itself asked for. It has ended: there will be no more.
        while let Some(va) = dev.fetched.lock().pop() {
            end(va, false);
        }
    }
    ledger.returns.forget();
    result
}

/// Ends the snapshots that a kernel has asked for itself, which ran under a lease.
///
/// # Errors
/// As [`finish`].
pub(crate) fn finish_fetched(core: &Core, dev: &Device, flight: &Flight, success: bool) -> Result<(), DmaError> {
    let mut result = Ok(());
    while let Some(va) = dev.fetched.lock().pop() {
        result = result.and(end_block(core, dev, flight, va, &[], success, None).map(|_| ()));
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
fn keep(core: &Core, dev: &Device, flight: &Flight, va: Va, args: &[RawArg], sealed: &Sealed) {
    let hold = core.space.hold();
    let ends = core.ends.lock();
    let Some(block) = core.dir.get(va) else { return };
    let mut state = block.lock();
    if state.mover != 0 {
        return;
    }
    for page in (state.bounced() - dev.flights.others(flight, va)).pages() {
        let at = va + page * PAGE;
        let span = Span { start: at, end: at + PAGE };
        // It joins its argument if that has moved.
        let joins = args.iter().filter_map(RawArg::process_range).any(|(start, end, access)| {
            let large = access.writes() && end - start >= LARGE && start < span.end && span.start < end;
            large && Wishes::of(core, dev, flight.fetches(dev), access, end - start, span).moves.has(page)
        });
        if !joins || !core.space.mapping(at).ok().flatten().is_some_and(|vma| core.space.moves(&vma, at).0) {
            continue;
        }
        if !state.reg.has(page) {
            let mut watched = Bits::EMPTY;
            let done = core.space.watch(span, None, |part| watched |= part.bits());
            state.reg |= watched;
            if done.is_err() || !watched.has(page) {
                continue;
            }
        }
        if (sealed.still(core, va).has(page) || fixed::seal(core, &mut state, va, Bits::one(page)) == Ok(Bits::one(page)))
            && let Err(tray) = keep_page(core, dev, &mut state, va, page, args)
        {
            // The device does not take the page: it goes home, with what the kernel wrote. The others are written back as snapshots are.
            drop((state, ends, hold));
            return migrate::give_back(core, dev, va, Bits::one(page), tray);
        }
    }
}

/// # Errors
/// The tray with the page, which is `Moving`, if the device does not take it.
fn keep_page(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, page: usize, args: &[RawArg]) -> Result<(), Tray> {
    let one = Bits::one(page);
    // The kernel has ended: what it wrote stays as it is.
    ranges::unmap(core, dev, state, va, one);
    let frame = core.dir.frame(state, page);
    let Ok(now) = read_frame(dev, frame) else { return Ok(()) }; // it stays a snapshot, whose end tells
    let Some(mut tray) = core.pool.take_empty(Size::Small, one) else { return Ok(()) };
    let (moved, end) = ranges::move_out(&core.space, va, one, &tray, Some(dev.id()), false);
    tray.full |= moved;
    if end == MoveEnd::All {
        // What the kernel wrote, declared or found by the twin, goes over the CPU's page; all of that is the device's page from now on.
        // SAFETY: the tray is ours, and the slot holds the page that was just moved there.
        let merged = unsafe { &mut *(tray.slot(page) as *mut [u8; PAGE]) };
        if state.twins.has(page) {
            twins::changes(core.twins.of(state.twin, page), &now, |range| merged[range.clone()].copy_from_slice(&now[range]));
        }
        for (range, _) in written(args, va + page * PAGE) {
            merged[range.clone()].copy_from_slice(&now[range]);
        }
        let dma = [Dma { kind: DmaKind::ToDevice, host: tray.slot(page), frame, offset: 0, len: PAGE }];
        if dev.transfer(&dma).is_err() {
            state.shift(one, PageState::Bounced, Cause::LaunchEnd, PageState::Moving);
            state.mover = core.next_mover();
            (state.taken, state.tray) = (one, tray.start);
            state.twins -= one;
            state.rdonly -= one;
            return Err(tray);
        }
        count(&dev.counters.bytes_to_device, PAGE);
        state.shift(one, PageState::Bounced, Cause::LaunchEnd, PageState::Private);
        let _ = ranges::map(core, dev, state, va, one); // else a device fault maps it
    }
    core.pool.put(tray);
    Ok(())
}

/// The contents of a frame that is not in the device's page table.
fn read_frame(dev: &Device, frame: Frame) -> Result<[u8; PAGE], DmaError> {
    let mut now = [0u8; PAGE];
    let dma = [Dma { kind: DmaKind::ToHost, host: now.as_mut_ptr() as usize, frame, offset: 0, len: PAGE }];
    dev.transfer(&dma)?;
    Ok(now)
}

/// Blocks of which the running kernel got snapshots by touching them.
#[derive(Debug)]
pub(crate) struct Fetched {
    blocks: OwnSlice<usize>,
    count: usize,
}

impl Fetched {
    /// For a device of `memory` bytes.
    pub(crate) fn new(memory: usize) -> Result<Self, Errno> {
        Ok(Fetched { blocks: OwnSlice::new(c"uhmm ledger", memory / PAGE + 1)?, count: 0 })
    }

    /// Notes a block, unless it was the last one. False if there is no room.
    pub(crate) fn push(&mut self, va: Va) -> bool {
        if self.count > 0 && self.blocks[self.count - 1] == va {
            return true;
        }
        if self.count == self.blocks.len() {
            return false;
        }
        self.blocks[self.count] = va;
        self.count += 1;
        true
    }

    fn pop(&mut self) -> Option<Va> {
        self.count = self.count.checked_sub(1)?;
        Some(self.blocks[self.count])
    }
}

/// Takes the block's snapshots off the device, with `success` after what the kernel wrote there has been written to the program: how many pages went. Those
/// that other flights have a part in stay, with twins that know what was written.
fn end_block(
    core: &Core,
    dev: &Device,
    flight: &Flight,
    va: Va,
    args: &[RawArg],
    success: bool,
    returns: Option<&Returns>,
) -> Result<usize, DmaError> {
    let mut others = dev.flights.others(flight, va);
    if flight.index < MAX_FLIGHTS && !flight.ran {
        others |= Bits::ALL - dev.flights.mine(flight, va); // a running kernel may have asked for it
    }
    let Some((block, pages, twins, slot)) = claim(core, dev, va, others) else { return Ok(0) };
    let stay = pages & others;
    let mut result = Ok(pages.count());
    if success {
        // No lock is held: the program's pages may fault. What is claimed stays where it is.
        if let Err(e) = write_declared(core, dev, args, va, pages - stay, returns) {
            result = Err(e);
        }
        for page in stay.pages() {
            if let Err(e) = write_shared(core, dev, args, va, page) {
                result = Err(e);
            }
        }
        for page in twins.pages() {
            if let Err(e) = write_changes(core, dev, va, page, slot) {
                result = Err(e);
            }
        }
    }
    if !success {
        // What this kernel has written is no change that the others' end has to write.
        for page in (stay & twins).pages() {
            if let Ok(Some(now)) = read_page(core, dev, va, page) {
                core.twins.set(slot, page, &now, 0..PAGE);
            }
        }
    }
    let _hold = core.space.hold();
    let mut state = block.lock();
    let pages = (pages - stay) & state.bounced(); // what was unmapped meanwhile has gone already
    state.shift(pages, PageState::Bounced, Cause::LaunchEnd, PageState::System);
    state.rdonly -= pages;
    state.mover = 0;
    core.twins.leave(&mut state, pages);
    block.keep.store(!state.parked.is_empty() || !state.bounced().is_empty(), Ordering::Relaxed);
    ranges::give_frames(core, dev, &mut state, va, pages);
    if core::mem::take(&mut state.waiters) {
        let _ = core.space.uffd.wake(va, BLOCK);
    }
    result
}

/// Writes what written arguments cover of the block's snapshots to the program, while their flight goes on.
///
/// # Errors
/// As [`finish`].
pub(crate) fn deliver(
    core: &Core,
    dev: &Device,
    flight: &Flight,
    args: &[RawArg],
    va: Va,
    returns: Option<&Returns>,
) -> Result<(), DmaError> {
    let Some(pages) = core.dir.get(va).map(|block| block.lock()).filter(|state| state.device == dev.id()).map(|state| state.bounced())
    else {
        return Ok(());
    };
    let shared = pages & dev.flights.others(flight, va);
    let own = write_declared(core, dev, args, va, pages - shared, returns);
    shared.pages().map(|page| write_shared(core, dev, args, va, page)).fold(own, Result::and)
}

/// Takes the block's snapshots out of the device's page table, but for those that others use there, and the block for ourselves.
fn claim<'a>(core: &'a Core, dev: &Device, va: Va, others: Bits) -> Option<(&'a Block, Bits, Bits, u32)> {
    loop {
        let hold = core.space.hold();
        let block = core.dir.get(va)?;
        let mut state = block.lock();
        if state.mover != 0 {
            drop((state, hold));
            thread::yield_now();
            continue;
        }
        if state.device != 0 && state.device != dev.id() {
            return None; // what was asked for could not come from the device that has it
        }
        let pages = state.bounced();
        if pages.is_empty() && state.parked.is_empty() {
            block.keep.store(false, Ordering::Relaxed);
        }
        if pages.is_empty() {
            core.twins.release(&mut state);
            return None;
        }
        ranges::unmap(core, dev, &mut state, va, pages - others);
        state.mover = core.next_mover();
        return Some((block, pages, state.twins & pages, state.twin));
    }
}

/// Writes the bytes that written arguments cover, and no other, into the program's pages.
fn write_declared(core: &Core, dev: &Device, args: &[RawArg], va: Va, pages: Bits, returns: Option<&Returns>) -> Result<(), DmaError> {
    let mut room = core.room();
    let list = room.list();
    let mut count = 0;
    let mut result = Ok(());
    let mut send = |list: &mut [Dma]| {
        let mut rest = 0;
        for index in 0..list.len() {
            let dma = list[index];
            count_bytes(dev, dma.len);
            if let Some(read) = returns.and_then(|returns| returns.of(&dma)) {
                // SAFETY: the launch has borrowed these bytes for writing; what was unmapped all the same is an error, not a crash.
                if let Err(address) = unsafe { copy::guarded(dma.host as *mut u8, read.as_ptr(), dma.len) } {
                    result = Err(DmaError::Gone { address });
                }
            } else {
                list[rest] = dma;
                rest += 1;
            }
        }
        if rest > 0
            && let Err(e) = dev.transfer(&list[..rest])
        {
            result = Err(e);
        }
    };
    let Some(block) = core.dir.get(va) else { return Ok(()) };
    // The frames are ours while the block is; their numbers are read under the lock, a part at a time.
    let mut rest = pages;
    while !rest.is_empty() {
        let mut done = Bits::EMPTY;
        {
            let state = block.lock();
            ranges::frame_runs(core, &state, rest, |run, frame| {
                if count + MAX_ARGS <= list.len() {
                    done |= Bits::range(run.clone());
                    returns::declared(args, va, run, frame, &mut |dma| {
                        list[count] = dma;
                        count += 1;
                    });
                }
            });
        }
        send(&mut list[..count]);
        count = 0;
        rest -= done;
    }
    result
}

fn count_bytes(dev: &Device, bytes: usize) {
    count(&dev.counters.bytes_to_cpu, bytes);
}

/// Writes what differs from the page's twin into the program's page.
fn write_changes(core: &Core, dev: &Device, va: Va, page: usize, slot: u32) -> Result<(), DmaError> {
    let Some(now) = read_page(core, dev, va, page)? else { return Ok(()) };
    let mut result = Ok(());
    twins::changes(core.twins.of(slot, page), &now, |range| {
        let at = va + page * PAGE + range.start;
        // SAFETY: the kernel, which may do what the caller may, has written these bytes; what was unmapped all the same is an error, not a crash.
        match unsafe { copy::guarded(at as *mut u8, now[range.start..].as_ptr(), range.len()) } {
            Ok(()) => count_bytes(dev, range.len()),
            Err(address) => result = Err(DmaError::Gone { address }),
        }
    });
    // If the page stays for others, these bytes are no changes of theirs.
    core.twins.set(slot, page, &now, 0..PAGE);
    result
}

/// What a snapshot holds, wherever it is; `None` if the page was unmapped meanwhile. The block is the caller's.
///
/// # Errors
/// If the device does not give it.
fn read_page(core: &Core, dev: &Device, va: Va, page: usize) -> Result<Option<[u8; PAGE]>, DmaError> {
    let Some(block) = core.dir.get(va) else { return Ok(None) };
    let (frame, mapped) = {
        let state = block.lock();
        if !state.bounced().has(page) {
            return Ok(None);
        }
        (core.dir.frame(&state, page), state.win.has(page))
    };
    let Some(at) = dev.driver.mapped(va + page * PAGE).filter(|_| mapped) else { return read_frame(dev, frame).map(Some) };
    let mut now = [0u8; PAGE];
    // SAFETY: the device's page, which stays mapped while the block is ours, is plain memory; a byte that its user writes just now is one that he may.
    Ok(unsafe { copy::guarded(now.as_mut_ptr(), at as *const u8, PAGE) }.is_ok().then_some(now))
}

/// Writes the bytes of a page that written arguments cover to the program, from a snapshot that stays for others.
fn write_shared(core: &Core, dev: &Device, args: &[RawArg], va: Va, page: usize) -> Result<(), DmaError> {
    let at = va + page * PAGE;
    let Some(now) = read_page(core, dev, va, page)? else { return Ok(()) };
    let slot = core.dir.get(va).map_or(0, |block| block.lock().twin);
    for (range, _) in written(args, at) {
        // SAFETY: the launch has borrowed these bytes for writing; what was unmapped all the same is an error, not a crash.
        let done = unsafe { copy::guarded((at + range.start) as *mut u8, now[range.start..].as_ptr(), range.len()) };
        done.map_err(|address| DmaError::Gone { address })?;
        count_bytes(dev, range.len());
        core.twins.set(slot, page, &now, range);
    }
    Ok(())
}

/// Brings the bytes of arguments up to date in snapshots that other flights have taken of their pages. The caller holds `prepare`.
///
/// # Errors
/// If the device does not take them.
pub(crate) fn refresh(core: &Core, dev: &Device, flight: &Flight, args: &[RawArg]) -> Result<(), DmaError> {
    let ranges = args.iter().filter_map(RawArg::process_range).filter(|range| range.0 < range.1);
    ranges.map(|(start, end, _)| refresh_range(core, dev, flight, start, end)).fold(Ok(()), Result::and)
}

/// As [`refresh`], for the bytes of one range.
pub(crate) fn refresh_range(core: &Core, dev: &Device, flight: &Flight, start: Va, end: Va) -> Result<(), DmaError> {
    let mut result = Ok(());
    core.dir.for_each(Span::touching(start, end), |block, part| {
        let va = Span::block(part.start).start;
        let Some(pages) = claim_snapshots(core, dev, flight, block, part) else { return };
        for page in pages.pages() {
            result = result.and(refresh_page(core, dev, va, page, start, end));
        }
        unclaim(core, block, va);
    });
    result
}

/// What kernels have changed in the snapshot of a page, which stays, is written to the program, but for the bytes of `leased`; without `success` it is forgotten. The caller holds `prepare`.
///
/// # Errors
/// As [`finish`].
pub(crate) fn write_beside(core: &Core, dev: &Device, at: Va, leased: &dyn Fn(usize) -> bool, success: bool) -> Result<(), DmaError> {
    let (va, page) = (Span::block(at).start, at % BLOCK / PAGE);
    let Some(block) = core.dir.get(va) else { return Ok(()) };
    if claim_snapshots(core, dev, &Flight::none(), block, Span { start: at, end: at + PAGE }).is_none() {
        return Ok(());
    }
    let slot = Some(block.lock()).filter(|state| state.twins.has(page)).map(|state| state.twin);
    let mut result = Ok(());
    if let Some(slot) = slot
        && let Some(now) = read_page(core, dev, va, page).unwrap_or_else(|e| {
            result = Err(e);
            None
        })
    {
        let twin = *core.twins.of(slot, page);
        twins::changes(&twin, &now, |range| {
            let mut from = range.start;
            while from < range.end {
                let end = (from..range.end).find(|&byte| leased(byte) != leased(from)).unwrap_or(range.end);
                if !leased(from) {
                    if success {
                        // SAFETY: as in `write_changes`.
                        match unsafe { copy::guarded((at + from) as *mut u8, now[from..].as_ptr(), end - from) } {
                            Ok(()) => count_bytes(dev, end - from),
                            Err(address) => result = Err(DmaError::Gone { address }),
                        }
                    }
                    core.twins.set(slot, page, &now, from..end);
                }
                from = end;
            }
        });
    }
    unclaim(core, block, va);
    result
}

/// A block that was taken is free again.
fn unclaim(core: &Core, block: &Block, va: Va) {
    let _hold = core.space.hold();
    let mut state = block.lock();
    state.mover = 0;
    if core::mem::take(&mut state.waiters) {
        let _ = core.space.uffd.wake(va, BLOCK);
    }
}

/// Takes a block whose part has snapshots for ourselves.
fn claim_snapshots(core: &Core, dev: &Device, flight: &Flight, block: &Block, part: Span) -> Option<Bits> {
    loop {
        let hold = core.space.hold();
        let mut state = block.lock();
        let pages = state.bounced() & part.bits();
        if pages.is_empty() || state.device != dev.id() || !flight.is_beside(dev) {
            return None;
        }
        if state.mover == 0 {
            state.mover = core.next_mover();
            return Some(pages);
        }
        drop((state, hold));
        thread::yield_now();
    }
}

/// Writes the bytes of `start..end` on one page into its snapshot. What cannot be read is found when the argument is prepared.
fn refresh_page(core: &Core, dev: &Device, va: Va, page: usize, start: Va, end: Va) -> Result<(), DmaError> {
    let at = va + page * PAGE;
    let (from, to) = (start.max(at), end.min(at + PAGE));
    let Some((frame, mapped, slot)) = core.dir.get(va).and_then(|block| {
        let state = block.lock();
        state.bounced().has(page).then(|| (core.dir.frame(&state, page), state.win.has(page), state.twin))
    }) else {
        return Ok(());
    };
    if let Some(window) = dev.driver.mapped(at).filter(|_| mapped) {
        // SAFETY: the argument's bytes, which the launch has borrowed, go to the device's page, where nobody else uses them.
        let _ = unsafe { copy::guarded((window + (from - at)) as *mut u8, from as *const u8, to - from) };
    } else {
        let dma = [Dma { kind: DmaKind::GuardedToDevice, host: from, frame, offset: from - at, len: to - from }];
        match dev.transfer(&dma) {
            Ok(()) | Err(DmaError::Gone { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    count(&dev.counters.bytes_to_device, to - from);
    if let Some(now) = read_page(core, dev, va, page)? {
        core.twins.set(slot, page, &now, from - at..to - at);
    }
    Ok(())
}
