//! Launches that follow each other on a device without a wait of the host's between them.
//!
//! A device that has a queue runs what stands in it one after the other. So a launch may be handed over while the one before it runs, if nothing has to be done between them: it uses the same
//! ranges, they are there and nothing of them has to move. Such launches are *members* of one flight, a chain:
//!
//! * The first is prepared as any other. It says which ranges there are and whether they can be written (`candidate`), and the chain is open when the driver has begun it
//!   ([`Launch::has_begun`](crate::driver::Launch::has_begun)).
//! * The next in line joins if it came while the last member had not ended. So what the program did between the two, it did while one ran, with memory that it had lent to both: the device
//!   has whatever there is of it, the pages at the ends included.
//! * Each member reads the bytes at the ends that it has written behind its own kernel, and writes them to the program before it is over.
//! * The last one to leave ends the flight: until then the whole pages stay on the device. Nobody joins when somebody waits for a page, when a lease has begun, or when somebody wants to be
//!   alone: a chain goes on only while nobody minds.
//!
//! Old pages that the first member overwrites are parked until the end. They come back if it fails; else what it wrote is what was there before the next. When a member fails the one that stands
//! behind it already fails too, for it may have run over what was not there any more.
//!
//! Lock order: a leaf but for the list of flights.

use crate::args::{MAX_ARGS, RawArg};
use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::driver::KernelFault;
use crate::error::Error;
use crate::flight::{self, Flight, Purpose};
use crate::kernel::Message;
use crate::launch::{self, LARGE, Ledger, Request};
use crate::line::{Place, Turn, Who};
use crate::mode::Mode;
use crate::page::{Span, Va};
use crate::returns::Returns;
use crate::snapshot;
use crate::sync::*;
use std::time::Instant;

/// Blocks with ends of arguments.
const BLOCKS: usize = 2 * MAX_ARGS;

/// The open chain of a device.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    open: Mutex<Option<Open>>,
    /// For two members that are not the first: so many threads serve a device.
    returns: [Mutex<Option<Returns>>; 2],
    /// When the last launch ended.
    ended: Mutex<Option<Instant>>,
}

/// A range, and whether the device may write it; an empty one is none.
type Range = (Va, Va, bool);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    index: usize,
    number: u64,
    ranges: [Range; MAX_ARGS],
    /// Those with snapshots.
    blocks: [Va; BLOCKS],
    count: usize,
    /// The last member's place in the line, and whether the driver has begun it.
    last: u64,
    begun: bool,
    /// Members that have not ended.
    running: usize,
    /// The first has run well.
    success: bool,
    /// One has not: nobody else joins, and who has already fails too.
    failed: bool,
    /// How often the device's page table had changed.
    changes: u64,
}

impl Open {
    fn flight(&self) -> Flight {
        Flight { index: self.index, number: self.number, purpose: Purpose::Launch, holds: true, ran: true }
    }

    /// Only what this launch declares has been lent all the while.
    fn narrow(&mut self, args: &[RawArg]) {
        let declares =
            |range: &Range| args.iter().filter_map(RawArg::process_range).any(|(start, end, _)| (start, end) == (range.0, range.1));
        self.ranges.iter_mut().filter(|range| !declares(range)).for_each(|range| *range = (0, 0, false));
    }

    /// Whether a launch over these arguments finds everything as it needs it.
    fn serves(&self, args: &[RawArg]) -> bool {
        let has = |start, end, write: bool| self.ranges.iter().any(|range| (range.0, range.1) == (start, end) && (range.2 || !write));
        let mut ranges = args.iter().filter_map(RawArg::process_range).filter(|range| range.0 < range.1);
        ranges.all(|(start, end, access)| has(start, end, access.writes()))
    }
}

/// How a member leaves.
#[derive(Debug)]
pub(crate) enum Left {
    /// There is no chain: the flight is its own.
    Alone,
    /// Others go on.
    Behind,
    /// It was the last: it ends the flight, which has run well or not.
    Last(Flight, bool),
}

impl Chain {
    /// Nanoseconds that a kernel has run which was handed over at `start` and has just ended: what ran before it at that time is not counted twice.
    pub(crate) fn ran(&self, start: Instant) -> usize {
        let (mut ended, now) = (self.ended.lock(), Instant::now());
        let from = ended.replace(now).map_or(start, |before| before.max(start));
        now.saturating_duration_since(from).as_nanos() as usize
    }

    /// The driver has begun the first member.
    fn begin(&self, candidate: Open) {
        *self.open.lock() = Some(candidate);
    }

    /// The driver has begun the last member.
    fn begun(&self) {
        if let Some(open) = &mut *self.open.lock() {
            open.begun = true;
        }
    }

    /// Takes part as the launch at this place in the line.
    fn join(&self, dev: &Device, number: u64, args: &[RawArg]) -> Option<Open> {
        let mut open = self.open.lock();
        let chain = open.as_mut().filter(|chain| chain.begun && chain.last + 1 == number && chain.serves(args))?;
        let written = args.iter().filter_map(RawArg::process_range).filter(|range| range.2.writes()).map(|(start, end, _)| (start, end));
        if chain.failed || chain.changes != dev.changes.load(Ordering::Acquire) || !dev.flights.join(chain.index, written) {
            return None;
        }
        chain.narrow(args);
        (chain.last, chain.begun) = (number, false);
        chain.running += 1;
        Some(*chain)
    }

    /// Whether a member of the open chain has failed.
    fn has_failed(&self) -> bool {
        self.open.lock().as_ref().is_some_and(|chain| chain.failed)
    }

    /// A member of that flight has ended, well or not; and whether it was the first.
    pub(crate) fn leave(&self, number: u64, success: bool, first: bool) -> Left {
        let mut open = self.open.lock();
        let Some(chain) = open.as_mut().filter(|chain| chain.number == number) else { return Left::Alone };
        chain.running -= 1;
        chain.success |= success && first;
        chain.failed |= !success;
        if chain.running > 0 {
            return Left::Behind;
        }
        let last = *chain;
        *open = None;
        Left::Last(last.flight(), last.success)
    }
}

/// What others could join, of a launch that is ready; `None` if each launch has to look after something.
fn candidate(core: &Core, dev: &Device, flight: &Flight, request: &Request, place: u64, blocks: &[Va]) -> Option<Open> {
    if !dev.line.is_waited_in() && !dev.entrance.is_waited_in() {
        return None; // whoever comes later begins the next chain: to look at all blocks for nobody would cost each launch 20 us a GiB
    }
    if !flight.holds || core.space.mode != Mode::Full || blocks.len() > BLOCKS {
        return None;
    }
    if !dev.driver.follows(&request.entry, request.args()) || !request.reaches.is_empty() || dev.flights.has_lease() {
        return None;
    }
    let mut ranges = [(0, 0, false); MAX_ARGS];
    for (slot, arg) in ranges.iter_mut().zip(request.args()) {
        if let Some((start, end, _)) = arg.process_range().filter(|range| range.0 < range.1) {
            *slot = (start, end, is_writable(core, dev, start, end)?);
        }
    }
    let mut all = [0; BLOCKS];
    all[..blocks.len()].copy_from_slice(blocks);
    let Flight { index, number, .. } = *flight;
    let changes = dev.changes.load(Ordering::Acquire);
    Some(Open {
        index,
        number,
        ranges,
        blocks: all,
        count: blocks.len(),
        last: place,
        begun: true,
        running: 1,
        success: false,
        failed: false,
        changes,
    })
}

/// Whether the device has all whole pages of a range alone; `None` if it has not even copies of all, or only snapshots.
fn is_writable(core: &Core, dev: &Device, start: Va, end: Va) -> Option<bool> {
    let mut writable = true;
    for part in Span::inside(start, end).blocks() {
        let state = core.dir.get(part.start)?.lock();
        let copied = if end - start < LARGE { state.bounced() } else { Bits::EMPTY }; // as the ends of others are
        let has = if state.device == dev.id() { (state.private() | copied, state.duplicated()) } else { (Bits::EMPTY, Bits::EMPTY) };
        if (part.bits() - (has.0 | has.1)).next(0).is_some() {
            return None;
        }
        writable &= (part.bits() - has.0).is_empty();
    }
    Some(writable)
}

/// Runs the first of a chain, or a launch that nobody follows.
pub(crate) fn execute(
    core: &Core,
    dev: &Device,
    flight: &Flight,
    ledger: &mut Ledger,
    request: &Request,
    groups: usize,
    place: &Place<'_>,
) -> Result<(), Error> {
    let blocks = &ledger.bounced[..ledger.bounced_count];
    if !flight.fetches(dev) {
        ledger.returns.list(core, dev, flight, request.args(), blocks);
    }
    let candidate = candidate(core, dev, flight, request, place.number(), blocks);
    let begin = || {
        if let Some(candidate) = candidate {
            dev.flights.chain.begin(candidate);
            dev.line.look_again();
        }
    };
    launch::execute(core, dev, request, groups, Some(&mut ledger.returns), &begin)
}

/// A launch that has joined a chain.
#[derive(Debug)]
pub(crate) struct Member<'a> {
    open: Open,
    _turn: Turn<'a>,
}

/// Waits until it is the launch's place in the line, or it may join the chain before that.
pub(crate) fn wait<'a>(core: &'a Core, dev: &Device, request: &Request, place: &Place<'_>) -> Option<Member<'a>> {
    let mut member = None;
    let may = request.reaches.is_empty() && dev.driver.follows(&request.entry, request.args());
    place.wait_or(|| {
        if may && let Some(turn) = core.turns.try_enter(Who::Device(dev.index())) {
            let joined = dev.flights.chain.join(dev, place.number(), request.args());
            member = joined.map(|open| Member { open, _turn: turn });
        }
        member.is_some()
    });
    member
}

impl Member<'_> {
    /// Runs the launch, and ends the flight if nobody else does.
    pub(crate) fn run(self, core: &Core, dev: &Device, request: &Request, groups: usize, place: &Place<'_>) -> Result<(), Error> {
        let (args, flight, blocks) = (request.args(), self.open.flight(), &self.open.blocks[..self.open.count]);
        let chain = &dev.flights.chain;
        count(&dev.counters.launches_chained, 1);
        let result = {
            let mut returns = chain.returns[place.number() as usize % 2].lock();
            if returns.is_none() {
                *returns = Returns::new().ok(); // without, what it has written is copied
            }
            if let Some(returns) = &mut *returns {
                returns.list(core, dev, &flight, args, blocks);
            }
            let begun = || {
                chain.begun();
                dev.line.look_again();
            };
            let result = launch::execute(core, dev, request, groups, returns.as_mut(), &begun);
            place.wait(); // what the one before has written goes to the program before what this one has
            let behind = || {
                KernelFault::Refused(Message::new(
                    "the launch before it, over the same memory and in the same queue, failed: launch it again",
                ))
            };
            let result = result.and_then(|()| if chain.has_failed() { Err(dev.launch_failed(behind())) } else { Ok(()) });
            result.and_then(|()| deliver(core, dev, &flight, args, blocks, returns.as_ref()))
        };
        match chain.leave(flight.number, result.is_ok(), false) {
            Left::Last(flight, success) => result.and(end(core, dev, &flight, args, success)),
            Left::Behind | Left::Alone => result,
        }
    }
}

/// Writes what a member has written at the ends of its arguments to the program, while the flight goes on.
///
/// # Errors
/// As those of a launch's end.
pub(crate) fn deliver(
    core: &Core,
    dev: &Device,
    flight: &Flight,
    args: &[RawArg],
    blocks: &[Va],
    returns: Option<&Returns>,
) -> Result<(), Error> {
    let each = |va: &Va| snapshot::deliver(core, dev, flight, args, *va, returns);
    blocks.iter().map(each).fold(Ok(()), Result::and).map_err(|e| dev.copy_failed(e))
}

/// Ends the flight of a chain.
fn end(core: &Core, dev: &Device, flight: &Flight, args: &[RawArg], success: bool) -> Result<(), Error> {
    let ended = match dev.flights.ledger(flight, dev.driver.info().memory) {
        Ok(mut ledger) => ledger.as_mut().map_or(Ok(()), |ledger| {
            ledger.returns.forget(); // that was the first member's
            launch::land(core, dev, flight, ledger, args, success)
        }),
        Err(e) => Err(Error::System("reserve address space", e)),
    };
    flight::end(core, dev, flight);
    ended
}
