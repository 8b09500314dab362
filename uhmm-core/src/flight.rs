//! What is under way on a device: launches from their preparation to their end, and leases from [`acquire`](crate::lease) to release.
//!
//! Each has a *flight*: what it declares, and a ledger of what is to be done when it ends. Flights of one device share its memory, so they must agree:
//!
//! * Bytes that one of them writes are no other's. Who comes later waits for the launch that has them, or for the fence of a lease that was released; a lease that
//!   was not is in the hands of the program, which may be the one who asks: that is [`Error::Busy`].
//! * A page at the edges of two of them is one snapshot. Who comes later brings his bytes of it up to date; who ends first writes his bytes back and leaves
//!   the page to the other ([`Flights::others`]).
//! * A block is on one device. A lease keeps it there; see above for who wants it elsewhere.
//!
//! A flight that *holds* keeps the whole pages that it declares on the device: nobody could fetch them again for who uses them there. Such are all leases,
//! and the launches of devices without replayable faults. The CPU's touch of such a page waits for the flight's end; nothing else makes it leave. The pages
//! at the edges, which hold other data too, are never shared with such a flight, or kept for it: it gets a snapshot of them ([`crate::prepare`]).

use crate::args::{Access, MAX_ARGS, RawArg};
use crate::bits::Bits;
use crate::chain::Chain;
use crate::core::{Core, Device};
use crate::error::Error;
use crate::gather::Stage;
use crate::home;
use crate::launch::Ledger;
use crate::page::{Span, Va};
use crate::reach::{Shared, Spare};
use crate::sync::*;
use uhmm_os::{BLOCK, Errno, PAGE};

/// Flights of one device at a time.
pub(crate) const MAX_FLIGHTS: usize = 64;

/// Touches that the end of a flight serves by itself.
const TOUCHES: usize = 16;

/// Bytes of a page, a bit each.
pub(crate) type Bytes = [u64; PAGE / 64];

/// What a flight is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// A launch: it ends by itself.
    Launch,
    /// A lease: it ends when the program says so.
    Lease,
    /// A lease that was released: it ends when its fence is signalled.
    Released,
}

/// A flight as others see it.
#[derive(Clone, Copy, Debug)]
struct Brief {
    number: u64,
    purpose: Purpose,
    holds: bool,
    /// First byte, one past the last, and what for.
    ranges: [(Va, Va, Option<Access>); MAX_ARGS],
    /// What it reaches besides; whoever ends the flight keeps the list until then.
    reaches: Shared,
}

impl Brief {
    fn ranges(&self) -> impl Iterator<Item = (Va, Va, Access)> {
        self.ranges.iter().filter_map(|&(start, end, access)| Some((start, end, access?)))
    }
}

/// The flights of one device. Its locks are leaves.
#[derive(Debug)]
pub(crate) struct Flights {
    list: Mutex<[Option<Brief>; MAX_FLIGHTS]>,
    /// Whether one of them holds, for who only passes.
    any: AtomicBool,
    /// Whether somebody may wait for the end of one that holds.
    waited: AtomicBool,
    /// Those who are about to take pages away.
    changing: AtomicUsize,
    /// The first touches that do, and how many.
    touches: Mutex<([Va; TOUCHES], usize)>,
    /// For the launch whose turn it is.
    pub(crate) stage: Stage,
    pub(crate) spare: Spare,
    pub(crate) chain: Chain,
    ledgers: [Mutex<Option<Ledger>>; MAX_FLIGHTS],
}

/// A flight of a device. Whoever has it ends it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    pub(crate) index: usize,
    pub(crate) number: u64,
    pub(crate) purpose: Purpose,
    pub(crate) holds: bool,
    /// Its kernel has begun to run.
    pub(crate) ran: bool,
}

impl Flight {
    /// None that is under way: all of these are others.
    pub(crate) fn none() -> Self {
        Flight { index: MAX_FLIGHTS, number: 0, purpose: Purpose::Launch, holds: false, ran: false }
    }

    /// Whether another flight is under way on the device.
    pub(crate) fn is_beside(&self, dev: &Device) -> bool {
        dev.flights.list.lock().iter().enumerate().any(|(index, brief)| index != self.index && brief.is_some())
    }

    /// Whether who uses the pages can fetch them again.
    pub(crate) fn fetches(&self, dev: &Device) -> bool {
        !self.holds && dev.driver.info().capabilities.replayable_faults
    }
}

/// What stands in the way of a new flight.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // an error's text is inline
pub(crate) enum Conflict {
    /// It will end by itself.
    Wait,
    /// It will not, or nothing more can be under way.
    Busy(Error),
}

impl Default for Flights {
    fn default() -> Self {
        let ledgers = [const { Mutex::new(None) }; MAX_FLIGHTS];
        Flights {
            list: Mutex::new([None; MAX_FLIGHTS]),
            any: AtomicBool::new(false),
            waited: AtomicBool::new(false),
            changing: AtomicUsize::new(0),
            touches: Mutex::new(([0; TOUCHES], 0)),
            stage: Stage::default(),
            spare: Spare::default(),
            chain: Chain::default(),
            ledgers,
        }
    }
}

impl Flights {
    /// The ledger of a flight, made if it is the first of its place.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn ledger(&self, flight: &Flight, memory: usize) -> Result<MutexGuard<'_, Option<Ledger>>, Errno> {
        let mut ledger = self.ledgers[flight.index].lock();
        if ledger.is_none() {
            *ledger = Some(Ledger::new(memory)?);
        }
        Ok(ledger)
    }

    /// Pages of the block at `va`, which the caller has locked, that a flight holds.
    pub(crate) fn held(&self, va: Va) -> Bits {
        self.held_by(va, |_| true)
    }

    /// As [`held`](Self::held), for who lets somebody wait for the end of what holds them: it will look for him.
    pub(crate) fn will_wait(&self, va: Va) -> Bits {
        if !self.any.load(Ordering::Acquire) {
            return Bits::EMPTY;
        }
        let list = self.list.lock();
        let held = held_in(&list, va, |_| true);
        if !held.is_empty() {
            self.waited.store(true, Ordering::Relaxed); // the list's lock orders it
        }
        held
    }

    /// A touch waits for the end of what holds the page. If launches follow each other, the next one would have the page again before the toucher wakes: so the end serves it.
    pub(crate) fn waits_at(&self, at: Va) {
        let (touches, count) = &mut *self.touches.lock();
        if *count < TOUCHES {
            touches[*count] = at;
            *count += 1;
        }
    }

    /// Likewise, that a lease holds.
    pub(crate) fn leased(&self, va: Va) -> Bits {
        self.held_by(va, |purpose| purpose != Purpose::Launch)
    }

    /// Likewise, that a launch holds.
    pub(crate) fn launched(&self, va: Va) -> Bits {
        self.held_by(va, |purpose| purpose == Purpose::Launch)
    }

    fn held_by(&self, va: Va, which: impl Fn(Purpose) -> bool) -> Bits {
        if !self.any.load(Ordering::Acquire) {
            return Bits::EMPTY;
        }
        held_in(&self.list.lock(), va, which)
    }

    /// Another launch goes on with a flight, which from then on writes these ranges of its own too: false if somebody waits for it, or there is a lease.
    pub(crate) fn join(&self, index: usize, written: impl Iterator<Item = (Va, Va)>) -> bool {
        let mut list = self.list.lock();
        if self.waited.load(Ordering::Relaxed) || list.iter().flatten().any(|brief| brief.purpose != Purpose::Launch) {
            return false;
        }
        let Some(brief) = &mut list[index] else { return false };
        for (start, end) in written {
            for range in brief.ranges.iter_mut().filter(|range| (range.0, range.1) == (start, end)) {
                range.2 = range.2.map(|_| Access::InOut);
            }
        }
        true
    }

    /// Pages of the block at `va` that other flights than `flight` declare, in whole or in part.
    pub(crate) fn others(&self, flight: &Flight, va: Va) -> Bits {
        let block = Span::block(va);
        let list = self.list.lock();
        let others = list.iter().enumerate().filter(|(index, _)| *index != flight.index).filter_map(|(_, brief)| brief.as_ref());
        others.flat_map(Brief::ranges).fold(Bits::EMPTY, |pages, (start, end, _)| pages | Span::touching(start, end).and(block).bits())
    }

    /// Calls `f` with each page that leases cover in part, and a set of the bytes that they cover there.
    pub(crate) fn leased_edges(&self, mut f: impl FnMut(Va, &Bytes)) {
        let list = *self.list.lock();
        let leases = || list.iter().flatten().filter(|brief| brief.purpose != Purpose::Launch);
        for (start, end, _) in leases().flat_map(Brief::ranges) {
            let inside = Span::inside(start, end);
            for page in [Span::touching(start, start + 1), Span::touching(end - 1, end)] {
                if inside.and(page) == page {
                    continue;
                }
                let mut covered = [0u64; PAGE / 64];
                for (from, to, _) in leases().flat_map(Brief::ranges) {
                    for at in from.max(page.start)..to.min(page.end) {
                        covered[(at - page.start) / 64] |= 1 << (at % 64);
                    }
                }
                f(page.start, &covered);
            }
        }
    }

    /// Pages of the block at `va` that the flight itself declares, in whole or in part.
    pub(crate) fn mine(&self, flight: &Flight, va: Va) -> Bits {
        let block = Span::block(va);
        let brief = self.list.lock().get(flight.index).copied().flatten();
        let ranges = brief.iter().flat_map(Brief::ranges).map(|(start, end, _)| Span::touching(start, end).and(block).bits());
        ranges.fold(Bits::EMPTY, |pages, more| pages | more)
    }

    /// Whether a lease has a part in the block at `va`.
    pub(crate) fn leases(&self, va: Va) -> bool {
        let block = Span::block(va);
        let list = self.list.lock();
        let mut leased = list.iter().flatten().filter(|brief| brief.purpose != Purpose::Launch).flat_map(Brief::ranges);
        leased.any(|(start, end, _)| start < block.end && block.start < end)
    }

    /// Whether there is a lease.
    pub(crate) fn has_lease(&self) -> bool {
        self.list.lock().iter().flatten().any(|brief| brief.purpose != Purpose::Launch)
    }

    /// Whether a launch besides `flight` is under way.
    pub(crate) fn has_other_launch(&self, flight: &Flight) -> bool {
        let list = self.list.lock();
        list.iter().enumerate().any(|(index, brief)| index != flight.index && brief.is_some_and(|brief| brief.purpose == Purpose::Launch))
    }

    /// The smallest number of launches under way: blocks that were needed since must stay. What leases hold stays in any case.
    pub(crate) fn oldest(&self) -> u64 {
        let list = self.list.lock();
        let launches = list.iter().flatten().filter(|brief| brief.purpose == Purpose::Launch);
        launches.map(|brief| brief.number).min().unwrap_or(u64::MAX)
    }

    /// Takes a lease, once, to end it.
    pub(crate) fn claim(&self, index: usize, number: u64) -> Option<Flight> {
        let mut list = self.list.lock();
        let brief = list[index].as_mut().filter(|brief| brief.number == number && brief.purpose != Purpose::Launch)?;
        let flight = Flight { index, number, purpose: brief.purpose, holds: brief.holds, ran: false };
        brief.purpose = Purpose::Launch; // from now on it ends by itself
        Some(flight)
    }

    /// Takes any lease that is left.
    pub(crate) fn any_lease(&self) -> Option<Flight> {
        let leases = |list: &[Option<Brief>; MAX_FLIGHTS]| {
            let lease = |brief: &Option<Brief>| brief.filter(|brief| brief.purpose != Purpose::Launch);
            list.iter().enumerate().find_map(|(index, brief)| Some((index, lease(brief)?.number)))
        };
        let at = leases(&self.list.lock());
        at.and_then(|(index, number)| self.claim(index, number))
    }

    /// Whether that flight has not ended.
    pub(crate) fn is_under_way(&self, index: usize, number: u64) -> bool {
        self.list.lock()[index].is_some_and(|brief| brief.number == number)
    }

    /// The lease ends with its fence now.
    pub(crate) fn released(&self, index: usize, number: u64) {
        if let Some(brief) = self.list.lock()[index].as_mut().filter(|brief| brief.number == number && brief.purpose == Purpose::Lease) {
            brief.purpose = Purpose::Released;
        }
    }

    /// The flight goes on under the number of an earlier one, whose blocks are all it needs.
    pub(crate) fn renumber(&self, flight: &mut Flight, number: u64) {
        if let Some(brief) = &mut self.list.lock()[flight.index] {
            (brief.number, flight.number) = (number, number);
        }
    }
}

/// Somebody is going to take pages away, unless a flight holds them.
pub(crate) struct Changing<'a>(&'a AtomicUsize);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Flights {
    /// Who is going to take pages away, unless a flight holds them, says so before he looks, and until he has: a flight that he does not see yet looks at each block, and so waits for him.
    pub(crate) fn will_change(&self) -> Changing<'_> {
        self.changing.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        Changing(&self.changing)
    }

    /// Whether somebody is at it. For who has begun a flight.
    pub(crate) fn is_changing(&self) -> bool {
        self.changing.load(Ordering::Acquire) > 0
    }
}

fn held_in(list: &[Option<Brief>; MAX_FLIGHTS], va: Va, which: impl Fn(Purpose) -> bool) -> Bits {
    let block = Span::block(va);
    let holding = list.iter().flatten().filter(|brief| brief.holds && which(brief.purpose)).flat_map(Brief::ranges);
    holding.fold(Bits::EMPTY, |pages, (start, end, _)| pages | Span::inside(start, end).and(block).bits())
}

fn of(args: &[RawArg]) -> [(Va, Va, Option<Access>); MAX_ARGS] {
    let mut ranges = [(0, 0, None); MAX_ARGS];
    let declared = args.iter().enumerate().filter_map(|(index, arg)| Some((index, arg.process_range()?)));
    for (index, (start, end, access)) in declared.filter(|(_, range)| range.0 < range.1) {
        ranges[index] = (start, end, Some(access));
    }
    ranges
}

/// Begins a flight. The caller holds `prepare`.
///
/// # Errors
/// What stands in the way.
pub(crate) fn begin(
    core: &Core,
    dev: &Device,
    args: &[RawArg],
    reaches: Shared,
    purpose: Purpose,
    number: u64,
) -> Result<Flight, Conflict> {
    let mine = of(args);
    let mut conflict = None;
    core.for_each_device(|other| {
        let list = other.flights.list.lock();
        for brief in list.iter().flatten() {
            let busy = match (meets(&mine, brief, other.id() == dev.id()), reaches_into(&reaches, brief)) {
                (Some((index, address)), _) => Conflict::Busy(Error::Busy { index, address, device: other.driver.info().name }),
                (None, Some(address)) => Conflict::Busy(Error::Reached { address, why: "which a lease has: release the lease first" }),
                (None, None) => continue,
            };
            match (brief.purpose, &conflict) {
                (Purpose::Lease, _) => conflict = Some(busy),
                (_, None) => {
                    other.flights.waited.store(true, Ordering::Relaxed); // no launch goes on with that flight
                    conflict = Some(Conflict::Wait);
                }
                _ => {}
            }
        }
    });
    if let Some(conflict) = conflict {
        return Err(conflict);
    }
    let info = dev.driver.info();
    // A coherent device's pages are used in place by both sides: nothing has to stay.
    let holds = !info.capabilities.coherent && (purpose == Purpose::Lease || !info.capabilities.replayable_faults);
    let index = {
        let mut list = dev.flights.list.lock();
        let Some(index) = list.iter().position(Option::is_none) else {
            return Err(Conflict::Busy(Error::TooMany { device: info.name, most: MAX_FLIGHTS }));
        };
        list[index] = Some(Brief { number, purpose, holds, ranges: mine, reaches });
        index
    };
    let flight = Flight { index, number, purpose, holds, ran: false };
    if holds {
        dev.flights.any.store(true, Ordering::Release);
        // From here on no page comes home but to the device's own workers. Who looked before shares the event lock until he has finished; or he is the monitor, who has the block's lock, and has said
        // before he looked that something will change (`is_changing`): then this flight looks at each block.
        fence(Ordering::SeqCst);
        drop(core.space.hold_alone());
    }
    Ok(flight)
}

/// What is under way with bytes of a range that somebody wants to have alone: a lease's is [`Conflict::Busy`], of which the address counts.
pub(crate) fn who_has(core: &Core, start: Va, end: Va) -> Option<Conflict> {
    let mut mine = [(0, 0, None); MAX_ARGS];
    mine[0] = (start, end, Some(Access::Out));
    let mut conflict = None;
    core.for_each_device(|dev| {
        for brief in dev.flights.list.lock().iter().flatten() {
            let Some((index, address)) = meets(&mine, brief, true) else { continue };
            match (brief.purpose, &conflict) {
                (Purpose::Lease, _) => conflict = Some(Conflict::Busy(Error::Busy { index, address, device: dev.driver.info().name })),
                (_, None) => conflict = Some(Conflict::Wait),
                _ => {}
            }
        }
    });
    conflict
}

/// The argument and the address at which a new flight meets one that is under way.
fn meets(mine: &[(Va, Va, Option<Access>); MAX_ARGS], other: &Brief, same: bool) -> Option<(usize, Va)> {
    for (index, &(start, end, access)) in mine.iter().enumerate() {
        let Some(access) = access else { continue };
        for (from, to, theirs) in other.ranges() {
            let shared = if same {
                ((access.writes() || theirs.writes()) && start.max(from) < end.min(to)).then(|| start.max(from))
            } else {
                // On another device: blocks must not meet.
                let (from, to) = (from / BLOCK * BLOCK, to.next_multiple_of(BLOCK));
                (start.max(from) < end.min(to)).then(|| start.max(from))
            };
            if let Some(address) = shared {
                return Some((index, address));
            }
        }
        if let Some(address) = other.reaches.meets((start, end, access)) {
            return Some((index, address));
        }
    }
    None
}

/// The address at which what a new flight reaches meets one that is under way. Blocks may meet: what is gathered does not move.
fn reaches_into(mine: &Shared, other: &Brief) -> Option<Va> {
    let declared = other.ranges().find_map(|range| mine.meets(range));
    declared.or_else(|| mine.meets_list(&other.reaches))
}

/// The flight has ended: who waited for its pages, or for its place, goes on.
pub(crate) fn end(core: &Core, dev: &Device, flight: &Flight) {
    if flight.holds {
        serve_touches(core, dev, flight);
    }
    let (ended, waited) = {
        let mut list = dev.flights.list.lock();
        let ended = list[flight.index].take();
        let any = list.iter().flatten().any(|brief| brief.holds);
        dev.flights.any.store(any, Ordering::Release);
        let waited = dev.flights.waited.load(Ordering::Relaxed);
        dev.flights.waited.store(waited && any, Ordering::Relaxed);
        (ended, waited)
    };
    if let Some(brief) = ended.filter(|brief| brief.holds && waited) {
        each_block(core, &brief.ranges, |va, waiters| {
            if core::mem::take(waiters) {
                let _ = core.space.uffd.wake(va, BLOCK);
            }
        });
    }
    core.flown.ring();
}

/// Brings home what somebody has waited for.
fn serve_touches(core: &Core, dev: &Device, flight: &Flight) {
    let (touches, count) = core::mem::replace(&mut *dev.flights.touches.lock(), ([0; TOUCHES], 0));
    for &at in &touches[..count] {
        if dev.flights.others(flight, at).has(at % BLOCK / PAGE) {
            dev.flights.waits_at(at); // theirs, or soon
            continue;
        }
        let whole = core.dir.get(at).is_some_and(|block| block.lock().huge);
        let pages = if whole { Bits::ALL } else { Bits::one(at % BLOCK / PAGE) };
        // An error is the monitor's, whom the touch asks again.
        let _ = home::send_but(core, dev, at, pages, &|va| dev.flights.others(flight, va));
    }
}

/// Locks every block that is declared, one after the other.
fn each_block(core: &Core, ranges: &[(Va, Va, Option<Access>); MAX_ARGS], mut f: impl FnMut(Va, &mut bool)) {
    for &(start, end, _) in ranges.iter().filter(|range| range.2.is_some()) {
        core.dir.for_each(Span::inside(start, end), |block, part| {
            let mut state = block.lock();
            // A mover wakes by itself.
            if state.mover == 0 {
                f(Span::block(part.start).start, &mut state.waiters);
            }
        });
    }
}

/// Rings when a flight has ended.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    /// How often it has rung: to be asked before looking at what one may have to wait for.
    pub(crate) fn count(&self) -> u64 {
        *self.rung.lock()
    }

    /// Waits until it rings again.
    pub(crate) fn wait(&self, count: u64) {
        let mut rung = self.rung.lock();
        while *rung == count {
            rung = self.changed.wait(rung);
        }
    }

    fn ring(&self) {
        *self.rung.lock() += 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brief(ranges: &[(Va, Va, Access)], holds: bool) -> Brief {
        let mut all = [(0, 0, None); MAX_ARGS];
        for (slot, &(start, end, access)) in all.iter_mut().zip(ranges) {
            *slot = (start, end, Some(access));
        }
        Brief { number: 7, purpose: Purpose::Launch, holds, ranges: all, reaches: Shared::NONE }
    }

    #[test]
    fn whole_pages_of_who_holds_are_held() {
        let flights = Flights::default();
        let at = 5 * BLOCK;
        flights.list.lock()[0] = Some(brief(&[(at + 1, at + 3 * PAGE, Access::In), (at + 7 * PAGE, at + 2 * BLOCK, Access::Out)], true));
        flights.list.lock()[1] = Some(brief(&[(at, at + 5 * PAGE, Access::Out)], false));
        assert!(flights.held(at).is_empty(), "nobody holds");
        flights.any.store(true, Ordering::Release);
        assert!(flights.held(at) == (Bits::range(1..3) | Bits::range(7..512)));
        assert!(flights.held(at + BLOCK + 123) == Bits::ALL);
        assert!(flights.held(at + 2 * BLOCK).is_empty());
        let flight = Flight { index: 1, number: 7, purpose: Purpose::Launch, holds: false, ran: false };
        assert!(flights.others(&flight, at) == (Bits::range(0..3) | Bits::range(7..512)), "edges too");
    }

    #[test]
    fn what_one_writes_is_no_others() {
        let at = 5 * BLOCK;
        let reads = brief(&[(at, at + 100, Access::In)], false).ranges;
        let writes = brief(&[(at + 99, at + 200, Access::Out)], false).ranges;
        let other = brief(&[(at + 50, at + 150, Access::In)], false);
        assert_eq!(meets(&reads, &other, true), None, "two that read");
        assert_eq!(meets(&writes, &other, true), Some((0, at + 99)));
        assert_eq!(meets(&reads, &brief(&[(at + 100, at + 101, Access::Out)], false), true), None, "neighbours on one page");
        assert_eq!(meets(&reads, &brief(&[(at + 2000, at + 2001, Access::In)], false), false), Some((0, at)), "one block, two devices");
        assert_eq!(meets(&reads, &brief(&[(at + BLOCK, at + BLOCK + 1, Access::Out)], false), false), None);
    }
}
