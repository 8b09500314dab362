//! The life of a launch: check, prepare, run, finish. It runs on one of the device's queue threads, as a flight ([`crate::flight`]).
//!
//! A launch is prepared while the one before it runs, with one exception: on a device with replayable faults what it overwrites, and its snapshots, are taken when it is its
//! turn, for the kernel that runs may follow a pointer there. A lease ([`crate::lease`]) is prepared and finished in the same way, and what runs in between is not ours.
//!
//! *Prepare* makes what is declared resident ([`crate::prepare`]): by migration, or by a snapshot while the CPU keeps its page. *Finish* gives parked pages to
//! the pool, or puts them back if the kernel failed; and of each snapshot writes exactly the bytes back that a written argument covers
//! ([`crate::snapshot`]). Nothing else is copied back: the CPU's touch does that.
//!
//! A launch with the same arguments as the last one, after which nothing has changed on the device, skips the preparation.

use crate::args::{Access, Args, MAX_ARGS, RawArg};
use crate::beside;
use crate::bits::Bits;
use crate::chain::{self, Left};
use crate::check;
use crate::coherent;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::driver::{Begun, Launch, Reads};
use crate::error::Error;
use crate::fixed::Sealed;
use crate::flight::{self, Conflict, Flight, Purpose};
use crate::gather;
use crate::kernel::{Bound, Entry, Grid};
use crate::line::{Place, Turn, Who};
use crate::migrate::{Intent, Parked};
use crate::mode::Mode;
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Cause, PageState, Span, Va};
use crate::place;
use crate::prepare::{Part, note_ends, prepare, register_ahead};
use crate::ranges;
use crate::reach::{self, Reaches, Shared};
use crate::returns::Returns;
use crate::snapshot;
use crate::sync::*;
use std::time::Instant;
use uhmm_os::uffd::MoveMode;
use uhmm_os::{BLOCK, Errno, PAGE, allocation, thread};

/// Arguments of at least this many bytes keep their edge pages on the device too: what else lies on such a page is seldom touched (an allocator's header),
/// and an unchanged relaunch then moves nothing. For smaller ones copying is cheaper than a fault.
pub(crate) const LARGE: usize = 64 << 10;

/// A launch as it is handed to the queue thread: by value.
#[derive(Debug)]
pub(crate) struct Request {
    pub entry: Entry,
    pub grid: Grid,
    pub args: [RawArg; MAX_ARGS],
    pub count: usize,
    /// What it reaches besides.
    pub reaches: Reaches,
}

impl Request {
    /// Made on the thread that launches, where the device's compiler may run: nothing has moved yet.
    ///
    /// # Errors
    /// [`Error::NotLoaded`], [`Error::Reached`], [`Error::Allocation`].
    pub(crate) fn new(dev: &Device, entry: Entry, grid: Grid, args: &Args<'_>) -> Result<Self, Error> {
        let mut all = [RawArg::NONE; MAX_ARGS];
        let count = args.raw().len();
        all[..count].copy_from_slice(args.raw());
        dev.driver.load(&entry, &all[..count]).map_err(|why| Error::NotLoaded { device: dev.driver.info().name, why })?;
        find_allocations(dev, &mut all[..count])?;
        let reaches = Reaches::new(args.reaches(), &all[..count], &dev.flights.spare)?;
        Ok(Request { entry, grid, args: all, count, reaches })
    }

    pub(crate) fn args(&self) -> &[RawArg] {
        &self.args[..self.count]
    }

    /// The list of what it reaches, for a flight on `dev` that ends before this request is dropped.
    fn shared(&self, dev: &Device) -> Shared {
        #[allow(unsafe_code)]
        // SAFETY: whoever runs the request borrows it until the flight has ended.
        unsafe {
            self.reaches.share(dev)
        }
    }
}

/// Where kernels could not fetch what a bare pointer leads to, it stands for the allocation that holds it.
fn find_allocations(dev: &Device, args: &mut [RawArg]) -> Result<(), Error> {
    if !reach::gathers(dev) {
        return Ok(());
    }
    for (index, arg) in args.iter_mut().enumerate() {
        if let RawArg::Pointer { address, start, bytes } = arg {
            let unknown = |why| Error::Allocation { index, address: *address, device: dev.driver.info().name, why };
            let range = allocation::holding(*address).map_err(|why| unknown(why.words()))?;
            (*start, *bytes) = (range.start, range.len());
        }
    }
    Ok(())
}

/// What the queue thread remembers, in memory that never migrates.
#[derive(Debug)]
pub(crate) struct Ledger {
    parked: OwnSlice<Option<Parked>>,
    parked_count: usize,
    /// Blocks with snapshots of the running launch.
    pub(crate) bounced: OwnSlice<usize>,
    pub(crate) bounced_count: usize,
    /// What the driver reads of them behind the kernel.
    pub(crate) returns: Returns,
    /// Edge pages that have been sealed for the launch.
    pub(crate) sealed: Sealed,
    /// What a lease has declared.
    pub(crate) args: [RawArg; MAX_ARGS],
    /// What a lease reaches besides.
    pub(crate) reaches: Reaches,
}

/// What the last launch of a device left: its ranges, and how often the device's pages had changed when it ended.
#[derive(Debug)]
pub(crate) struct Last {
    ranges: [(Va, Va, Option<Access>); MAX_ARGS],
    changes: u64,
    number: u64,
}

impl Last {
    /// The next launch has to prepare.
    pub(crate) fn forget(&mut self) {
        self.changes = u64::MAX;
    }
}

impl Default for Last {
    fn default() -> Self {
        Last { ranges: [(0, 0, None); MAX_ARGS], changes: u64::MAX, number: 0 }
    }
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
            returns: Returns::new()?,
            sealed: Sealed::new(),
            args: [RawArg::NONE; MAX_ARGS],
            reaches: Reaches::default(),
        })
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

/// Runs a launch from check to finish. `number` is its number on the device.
pub(crate) fn run(core: &Core, dev: &Device, request: Request, number: u64) -> Result<(), Error> {
    let result = checked(core, dev, &request, number);
    dev.flights.spare.give(request.reaches);
    result
}

fn checked(core: &Core, dev: &Device, request: &Request, number: u64) -> Result<(), Error> {
    let place = dev.line.place(number);
    let entrance = dev.entrance.place(number);
    let args = request.args();
    core.space.settle();
    let groups = check::launch(core, dev, request.grid, args, &request.reaches)?;
    entrance.wait();
    if dev.driver.info().memory == 0 {
        let _turn = core.turns.enter(Who::Device(dev.index()));
        drop(entrance);
        place.wait();
        return bare(core, dev, request, groups); // it holds no data
    }
    if dev.driver.info().capabilities.linear {
        // It is not prepared before its turn (`make_ready`): nor may it hold what the one before it has to put out of the way.
        if let Some(member) = chain::wait(core, dev, request, &place) {
            drop(entrance);
            return counted(dev, member.run(core, dev, request, groups, &place));
        }
    }
    let (_turn, mut flight) = take_off(core, dev, args, request.shared(dev), Purpose::Launch)?;
    let (result, goes_on) = fly(core, dev, request, groups, &mut flight, entrance, &place);
    if !goes_on {
        flight::end(core, dev, &flight);
    }
    counted(dev, result)
}

/// Waits for a turn and for what is in the way, and begins a flight.
///
/// # Errors
/// [`Error::Busy`], [`Error::TooMany`].
fn take_off<'a>(core: &'a Core, dev: &Device, args: &[RawArg], reaches: Shared, purpose: Purpose) -> Result<(Turn<'a>, Flight), Error> {
    loop {
        let bell = core.flown.count();
        if let Some(begun) = try_take_off(core, dev, args, reaches, purpose)? {
            return Ok(begun);
        }
        core.flown.wait(bell); // without a turn, for the one who is waited for may need it
    }
}

/// One attempt; `None` if something is in the way that will end.
///
/// # Errors
/// As [`take_off`].
pub(crate) fn try_take_off<'a>(
    core: &'a Core,
    dev: &Device,
    args: &[RawArg],
    reaches: Shared,
    purpose: Purpose,
) -> Result<Option<(Turn<'a>, Flight)>, Error> {
    let turn = core.turns.enter(Who::Device(dev.index()));
    let _prepare = core.prepare.lock();
    match flight::begin(core, dev, args, reaches, purpose, core.next_launch()) {
        Ok(flight) => Ok(Some((turn, flight))),
        Err(Conflict::Busy(e)) => Err(e),
        Err(Conflict::Wait) => Ok(None),
    }
}

/// A launch between its beginning and its end, and whether others go on with its flight.
fn fly(
    core: &Core,
    dev: &Device,
    request: &Request,
    groups: usize,
    flight: &mut Flight,
    entrance: Place<'_>,
    place: &Place<'_>,
) -> (Result<(), Error>, bool) {
    let args = request.args();
    let no_ledger = |e| (Err(Error::System("reserve address space", e)), false);
    let mut ledger = match dev.flights.ledger(flight, dev.driver.info().memory) {
        Ok(ledger) => ledger,
        Err(e) => return no_ledger(e),
    };
    let Some(ledger) = ledger.as_mut() else { return no_ledger(Errno::NOMEM) };
    let prepared = make_ready(core, dev, flight, ledger, args, place);
    drop(entrance); // who comes next may take what room is left, and not before
    place.wait();
    flight.ran = prepared.is_ok();
    let result = match prepared {
        Ok(()) => chain::execute(core, dev, flight, ledger, request, groups, place),
        Err(e) => Err(e),
    };
    let success = match dev.flights.chain.leave(flight.number, result.is_ok(), true) {
        Left::Behind => {
            let blocks = &ledger.bounced[..ledger.bounced_count];
            return (result.and_then(|()| chain::deliver(core, dev, flight, args, blocks, Some(&ledger.returns))), true);
        }
        Left::Last(_, success) => success,
        Left::Alone => result.is_ok(),
    };
    let ended = land(core, dev, flight, ledger, args, success);
    (result.and(ended), false)
}

/// Ends what a flight has begun.
pub(crate) fn land(core: &Core, dev: &Device, flight: &Flight, ledger: &mut Ledger, args: &[RawArg], success: bool) -> Result<(), Error> {
    let _prepare = core.prepare.lock();
    note_ends(core, dev, ledger, args);
    finish(core, dev, flight, ledger, args, success)
}

/// Makes everything resident, as early as it may be.
fn make_ready(
    core: &Core,
    dev: &Device,
    flight: &mut Flight,
    ledger: &mut Ledger,
    args: &[RawArg],
    place: &Place<'_>,
) -> Result<(), Error> {
    // On a device without a page table it is its turn already: `checked` has waited.
    if !place.is_first() && dev.flights.has_other_launch(flight) {
        let part = if flight.fetches(dev) { Part::Read } else { Part::All };
        let early = {
            let _prepare = core.prepare.lock();
            let early = prepare(core, dev, flight, ledger, args, part);
            if let Err(Error::NoRoom { .. }) = early {
                let _ = finish(core, dev, flight, ledger, args, false); // the device holds one of both only
            }
            early
        };
        place.wait();
        let _prepare = core.prepare.lock();
        dev.full.store(false, Ordering::Relaxed);
        dev.shares.verify(core, dev);
        beside::refresh(core, dev)?;
        return match early {
            Err(Error::NoRoom { .. }) => prepare(core, dev, flight, ledger, args, Part::All),
            // Without replayable faults once more, for what it uses in place may have been replaced.
            Ok(()) => prepare(core, dev, flight, ledger, args, if part == Part::Read { Part::Rest } else { Part::All }),
            early => early,
        };
    }
    place.wait();
    let _prepare = core.prepare.lock();
    dev.full.store(false, Ordering::Relaxed);
    dev.shares.verify(core, dev);
    beside::refresh(core, dev)?;
    match unchanged(core, dev, args) {
        Some(number) => {
            dev.flights.renumber(flight, number);
            Ok(())
        }
        None => prepare(core, dev, flight, ledger, args, Part::All),
    }
}

/// A launch for which nothing has to be done.
pub(crate) fn bare(core: &Core, dev: &Device, request: &Request, groups: usize) -> Result<(), Error> {
    counted(dev, execute(core, dev, request, groups, None, &|| {}))
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

/// The number of the last launch, if everything is where it left it: its blocks are pinned under that number.
fn unchanged(core: &Core, dev: &Device, args: &[RawArg]) -> Option<u64> {
    let _hold = core.space.hold(); // an event that was read is followed
    let last = dev.last.lock();
    let same = core.space.mode == Mode::Full
        && !dev.flights.is_changing()
        && dev.changes.load(Ordering::Acquire) == last.changes
        && last.ranges == signature(args);
    same.then_some(last.number)
}

/// It is the launch's turn on the device, and what it declares is there.
pub(crate) fn execute(
    core: &Core,
    dev: &Device,
    request: &Request,
    groups: usize,
    returns: Option<&mut Returns>,
    begun: &(dyn Fn() + Sync),
) -> Result<(), Error> {
    let gathered = gather::gather(core, dev, &request.reaches)?;
    let mut bound = Bound::new(request.args(), request.grid, dev.driver.info().mask);
    if let Some(gathered) = &gathered {
        bound = bound.with_reaches(request.shared(dev), gathered.address());
    }
    let reads = Reads::new(returns.as_ref().map_or(&[], |returns| returns.pieces()));
    let launch = Launch { entry: request.entry, bound, groups, reads, begun: Begun(begun) };
    let start = Instant::now();
    let result = dev.driver.launch(&launch);
    count(&dev.counters.kernel_nanos, dev.flights.chain.ran(start));
    let read = launch.reads.take();
    if let Some(returns) = returns.filter(|_| read) {
        returns.are_done();
    }
    result.map_err(|fault| dev.launch_failed(fault))?;
    gathered.map_or(Ok(()), |gathered| gathered.write_back())
}

/// Ends what [`prepare`] has begun. The caller holds `prepare`.
pub(crate) fn finish(core: &Core, dev: &Device, flight: &Flight, ledger: &mut Ledger, args: &[RawArg], success: bool) -> Result<(), Error> {
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
    let ended = snapshot::finish(core, dev, flight, ledger, args, success);
    let ended =
        if flight.purpose == Purpose::Launch { ended.and_then(|pages| beside::finish(core, dev, success).map(|()| pages)) } else { ended };
    {
        let mut last = dev.last.lock();
        last.ranges = signature(args);
        last.number = flight.number;
        // A snapshot serves one launch only, so that the next one has to prepare.
        // Who is under way beside it prepares once more when it is his turn, which forgets this, or finds everything as it is left here.
        let stays = success && ended == Ok(0);
        last.changes = if stays { dev.changes.load(Ordering::Acquire) } else { u64::MAX };
    }
    if core.space.mode == Mode::UserModeOnly {
        unmap_shared(core, dev, flight, args);
    }
    ended.map(|_| ()).map_err(|e| dev.copy_failed(e))
}

/// Takes copies that stay out of the device's page table: the next launch enters them again when it has looked whether the CPU has written the pages since.
fn unmap_shared(core: &Core, dev: &Device, flight: &Flight, args: &[RawArg]) {
    for (start, end, _) in args.iter().filter_map(RawArg::process_range).filter(|range| range.0 < range.1) {
        core.dir.for_each(Span::touching(start, end), |block, part| {
            let _hold = core.space.hold();
            let mut state = block.lock();
            if state.device == dev.id() {
                let shared = state.duplicated() - dev.flights.others(flight, part.start);
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
    let _turn = core.turns.enter(Who::Device(dev.index()));
    let _prepare = core.prepare.lock();
    send(core, dev, (start, end), Span::inside(start, end), core.next_launch())
}

/// The same for a part of a range whose `whole` is to move, under one pin for all its parts. `prepare` is held.
pub(crate) fn send(core: &Core, dev: &Device, (start, end): (Va, Va), whole: Span, pin: u64) -> Result<(), Error> {
    let inside = Span::inside(start, end);
    let info = dev.driver.info();
    if info.memory == 0 {
        return Ok(()); // every page stays
    }
    if info.capabilities.coherent && core.space.mode != Mode::Full {
        return Ok(()); // as above
    }
    if whole.len() > info.memory && !info.capabilities.coherent {
        return Err(Error::TooLarge { device: info.name, needed: whole.len(), capacity: info.memory });
    }
    dev.driver.stand_by();
    dev.set_pin(pin);
    dev.changed(); // the last launch's pins are gone
    dev.full.store(false, Ordering::Relaxed);
    if info.capabilities.coherent {
        coherent::pin(core, dev, start, end);
    }
    place::ensure(core, dev, None, whole)?;
    check::pieces(core, start, end, |piece| {
        let part = inside.and(Span::touching(piece.start, piece.end));
        if piece.movable && !part.is_empty() {
            register_ahead(core, part);
            core.make_resident(dev, part, Intent::Move, &|_| Bits::EMPTY, &mut |parked| core.pool.put(parked.tray))?;
        }
        Ok(())
    })
}
