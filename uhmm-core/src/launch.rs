//! The life of a launch: check, prepare, run, finish. It runs on the device's queue thread.
//!
//! *Prepare* makes what is declared resident ([`crate::prepare`]): by migration, or by a snapshot while the CPU keeps its page. *Finish* gives parked pages to
//! the pool, or puts them back if the kernel failed; and of each snapshot writes exactly the bytes back that a written argument covers
//! ([`crate::snapshot`]). Nothing else is copied back: the CPU's touch does that.
//!
//! A launch with the same arguments as the last one, after which nothing has changed on the device, skips the preparation.

use crate::args::{Access, MAX_ARGS, RawArg};
use crate::bits::Bits;
use crate::check;
use crate::coherent;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::driver::{KernelFault, Launch};
use crate::error::Error;
use crate::fixed::Sealed;
use crate::hold;
use crate::kernel::{Bound, Entry, Grid};
use crate::migrate::{Intent, Parked};
use crate::mode::Mode;
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Cause, PageState, Span, Va};
use crate::prepare::{prepare, register_ahead};
use crate::ranges;
use crate::snapshot;
use crate::sync::*;
use std::time::Instant;
use uhmm_os::uffd::MoveMode;
use uhmm_os::{BLOCK, Errno, PAGE, thread};

/// Arguments of at least this many bytes keep their edge pages on the device too: what else lies on such a page is seldom touched (an allocator's header),
/// and an unchanged relaunch then moves nothing. For smaller ones copying is cheaper than a fault.
pub(crate) const LARGE: usize = 64 << 10;

/// A launch as it is handed to the queue thread: by value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub entry: Entry,
    pub grid: Grid,
    pub args: [RawArg; MAX_ARGS],
    pub count: usize,
}

/// What the queue thread remembers, in memory that never migrates.
#[derive(Debug)]
pub(crate) struct Ledger {
    parked: OwnSlice<Option<Parked>>,
    parked_count: usize,
    /// Blocks with snapshots of the running launch.
    pub(crate) bounced: OwnSlice<usize>,
    pub(crate) bounced_count: usize,
    /// Edge pages that have been sealed for the launch.
    pub(crate) sealed: Sealed,
    /// The last launch's ranges, and how often the device's pages had changed when it ended.
    last: [(Va, Va, Option<Access>); MAX_ARGS],
    last_changes: u64,
}

#[allow(unsafe_code)]
// SAFETY: zeroed bytes are never read as a `Parked`: `parked_count` says how many entries were written.
unsafe impl Zeroed for Option<Parked> {}

impl Ledger {
    /// For a device of `memory` bytes.
    pub(crate) fn new(memory: usize) -> Result<Self, Errno> {
        let most = 2 * (memory / BLOCK) * (BLOCK / PAGE) / 8 + 1024;
        Ok(Ledger {
            parked: OwnSlice::new(c"uhmm ledger", 2 * (memory / BLOCK) + 1024)?,
            parked_count: 0,
            bounced: OwnSlice::new(c"uhmm ledger", most)?,
            bounced_count: 0,
            sealed: Sealed::new(),
            last: [(0, 0, None); MAX_ARGS],
            last_changes: u64::MAX,
        })
    }

    /// The next launch has to prepare.
    pub(crate) fn forget_last(&mut self) {
        self.last_changes = u64::MAX;
    }

    /// Keeps old pages until the launch has ended.
    pub(crate) fn park(&mut self, core: &Core, parked: Parked) {
        if self.parked_count == self.parked.len() {
            // More blocks than the device has room for cannot be parked at once; keep the program running in any case.
            core.pool.put(parked.tray);
            return;
        }
        let slot = self.parked.at(self.parked_count);
        #[allow(unsafe_code)]
        // SAFETY: in bounds, ours alone; nothing valid is overwritten, for entries beyond the count are vacant.
        unsafe {
            slot.write(Some(parked))
        };
        self.parked_count += 1;
    }
}

/// Runs a launch from check to finish.
pub(crate) fn run(core: &Core, dev: &Device, request: &Request) -> Result<(), Error> {
    let args = &request.args[..request.count];
    core.space.settle();
    let groups = check::launch(core, dev, request.grid, args)?;
    let mut ledger = dev.ledger.lock();
    let ledger = &mut *ledger;
    // One launch at a time in the process, whatever its device: two that hold snapshots in each other's blocks would wait for each other.
    let _one = core.prepare.lock();
    if dev.driver.info().memory == 0 {
        return bare(dev, request, groups); // it holds no data
    }
    dev.full.store(false, Ordering::Relaxed);
    dev.shares.verify(core, dev);
    hold::begin(core, dev, args);
    let prepared = if unchanged(core, dev, ledger, args) { Ok(()) } else { prepare(core, dev, ledger, args) };
    let mut result = match prepared {
        Ok(()) => execute(dev, request, groups).map_err(|fault| dev.launch_failed(fault)),
        Err(e) => Err(e),
    };
    hold::end(core, dev);
    let ended = finish(core, dev, ledger, args, result.is_ok());
    if result.is_ok() {
        result = ended;
    }
    counted(dev, result)
}

/// A launch on a device that holds no data.
fn bare(dev: &Device, request: &Request, groups: usize) -> Result<(), Error> {
    counted(dev, execute(dev, request, groups).map_err(|fault| dev.launch_failed(fault)))
}

fn counted(dev: &Device, result: Result<(), Error>) -> Result<(), Error> {
    count(&dev.counters.launches, 1);
    if result.is_err() {
        count(&dev.counters.launches_failed, 1);
    }
    result
}

fn signature(args: &[RawArg]) -> [(Va, Va, Option<Access>); MAX_ARGS] {
    let mut ranges = [(0, 0, None); MAX_ARGS];
    for (slot, arg) in ranges.iter_mut().zip(args) {
        if let Some((start, end, access)) = arg.process_range() {
            *slot = (start, end, Some(access));
        }
    }
    ranges
}

/// Whether everything is where the last launch left it. Its pin is kept then.
fn unchanged(core: &Core, dev: &Device, ledger: &Ledger, args: &[RawArg]) -> bool {
    let _hold = core.space.hold(); // an event that was read is followed
    core.space.mode == Mode::Full && dev.changes.load(Ordering::Acquire) == ledger.last_changes && ledger.last == signature(args)
}

fn execute(dev: &Device, request: &Request, groups: usize) -> Result<(), KernelFault> {
    let bound = Bound::new(&request.args[..request.count], request.grid, dev.driver.info().mask);
    let launch = Launch { entry: request.entry, bound, groups };
    let start = Instant::now();
    let result = dev.driver.launch(&launch);
    count(&dev.counters.kernel_nanos, start.elapsed().as_nanos() as usize);
    result
}

fn finish(core: &Core, dev: &Device, ledger: &mut Ledger, args: &[RawArg], success: bool) -> Result<(), Error> {
    for index in 0..core::mem::take(&mut ledger.parked_count) {
        let slot = ledger.parked.at(index);
        #[allow(unsafe_code)]
        // SAFETY: written by `park`, taken once.
        let Some(parked) = (unsafe { slot.replace(None) }) else { continue };
        if !success {
            put_back(core, dev, &parked);
        }
        unpark(core, &parked);
        let Parked { mut tray, .. } = parked;
        if !success {
            // What moved back left its slot.
            tray.full = core.space.present(Span::block(tray.start)).map_or(tray.full, |present| present.pages);
        }
        core.pool.put(tray);
    }
    let ended = snapshot::finish(core, dev, ledger, args, success);
    ledger.last = signature(args);
    // A snapshot serves one launch only, so that the next one has to prepare.
    ledger.last_changes = if success && ended == Ok(0) { dev.changes.load(Ordering::Acquire) } else { u64::MAX };
    if core.space.mode == Mode::UserModeOnly {
        unmap_shared(core, dev, args);
    }
    ended.map(|_| ()).map_err(|e| dev.copy_failed(e))
}

/// Takes copies that stay out of the device's page table: the next launch enters them again when it has looked whether the CPU has written the pages since.
fn unmap_shared(core: &Core, dev: &Device, args: &[RawArg]) {
    for (start, end, _) in args.iter().filter_map(RawArg::process_range).filter(|range| range.0 < range.1) {
        core.dir.for_each(Span::touching(start, end), |block, part| {
            let _hold = core.space.hold();
            let mut state = block.lock();
            if state.device == dev.id() {
                let shared = state.duplicated();
                ranges::unmap(core, dev, &mut state, Span::block(part.start).start, shared);
            }
        });
    }
}

/// The kernel failed: the old pages replace what it left, so that every byte reads as before the launch.
fn put_back(core: &Core, dev: &Device, parked: &Parked) {
    let mut rest = parked.pages;
    restore_spoiled(core, parked);
    while !rest.is_empty() {
        {
            let _hold = core.space.hold();
            let Some(block) = core.dir.get(parked.va) else { return };
            let mut state = block.lock();
            rest = rest & state.private() & state.parked;
            if state.mover == 0 {
                ranges::unmap(core, dev, &mut state, parked.va, rest);
                let mut back = Bits::EMPTY;
                let mut stuck = Bits::EMPTY;
                for page in rest.pages() {
                    let (target, source) = (parked.va + page * PAGE, parked.tray.slot(page));
                    #[allow(unsafe_code)]
                    // SAFETY: the tray holds the program's own old pages; the target is empty and watched.
                    match unsafe { core.space.uffd.move_pages(target, source, PAGE, MoveMode::empty()) } {
                        Ok(()) => back.set(page),
                        Err(partial) if partial.errno == Errno::AGAIN => break,
                        Err(_) => stuck.set(page), // unmapped: its event will come
                    }
                }
                state.shift(back, PageState::Private, Cause::Return, PageState::System);
                state.parked -= back | stuck;
                ranges::give_frames(core, dev, &mut state, parked.va, back);
                rest -= back | stuck;
            }
        }
        core.space.settle();
        thread::yield_now();
    }
}

/// Pages that had to come home for the failing kernel itself, with what it had written so far: their old contents are copied over that.
fn restore_spoiled(core: &Core, parked: &Parked) {
    let Some(block) = core.dir.get(parked.va) else { return };
    let spoiled = block.lock().spoiled & parked.pages;
    for page in spoiled.pages() {
        let (target, source) = (parked.va + page * PAGE, parked.tray.slot(page));
        #[allow(unsafe_code)]
        // SAFETY: the page lies wholly in a written argument, which the launch has borrowed; the tray is ours. No lock is held, so it may fault.
        let _ = unsafe { uhmm_os::copy::guarded(target as *mut u8, source as *const u8, PAGE) };
    }
}

/// The launch has ended: touches of these pages need not wait any more.
fn unpark(core: &Core, parked: &Parked) {
    let Some(block) = core.dir.get(parked.va) else { return };
    let mut state = block.lock();
    state.parked -= parked.pages;
    state.spoiled -= parked.pages;
    if state.parked.is_empty() && state.bounced().is_empty() {
        block.keep.store(false, Ordering::Relaxed);
    }
    if state.mover == 0 && core::mem::take(&mut state.waiters) {
        let _ = core.space.uffd.wake(parked.va, BLOCK);
    }
}

/// Moves the pages inside a byte range to the device, as far as they can move.
pub(crate) fn prefetch(core: &Core, dev: &Device, start: Va, end: Va) -> Result<(), Error> {
    core.space.settle();
    let inside = Span::inside(start, end);
    let info = dev.driver.info();
    if info.memory == 0 {
        return Ok(()); // every page stays
    }
    if info.coherent && core.space.mode != Mode::Full {
        return Ok(()); // as above
    }
    if inside.len() > info.memory && !info.coherent {
        return Err(Error::TooLarge { device: info.name, needed: inside.len(), capacity: info.memory });
    }
    let _one = core.prepare.lock();
    dev.driver.stand_by();
    dev.set_pin(core.next_launch());
    dev.changed(); // the last launch's pins are gone
    dev.full.store(false, Ordering::Relaxed);
    if info.coherent {
        coherent::pin(core, dev, start, end);
    }
    check::pieces(core, start, end, |piece| {
        let part = inside.and(Span::touching(piece.start, piece.end));
        if piece.movable && !part.is_empty() {
            register_ahead(core, part);
            core.make_resident(dev, part, Intent::Move, &|_| Bits::EMPTY, &mut |parked| core.pool.put(parked.tray))?;
        }
        Ok(())
    })
}
