//! Before a launch: everything that its arguments declare becomes resident on the device.
//!
//! `inp` is duplicated, `inout` moves, `out` moves without an upload while its old pages are parked; then what did not move, and the pages that hold other data
//! too, get a snapshot ([`crate::snapshot`]). Pages of arguments from [`LARGE`] bytes on that are only read are shared whole, edges included.

use crate::advice;
use crate::args::{Access, MAX_ARGS, RawArg};
use crate::bits::Bits;
use crate::check::{self, Piece};
use crate::coherent;
use crate::core::{Core, Device};
use crate::error::Error;
use crate::fixed::Sealed;
use crate::flight::{Flight, Purpose};
use crate::home;
use crate::launch::{LARGE, Ledger};
use crate::migrate::{Ask, BATCH, Intent, Park, Room};
use crate::mode::Mode;
use crate::page::{Span, Va};
use crate::place;
use crate::policy::Wishes;
use crate::ranges;
use crate::shares;
use crate::snapshot;
use crate::sync::*;
use core::ops::Range;
use uhmm_os::{PAGE, tasks};

/// Which arguments to prepare.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    All,
    /// Those whose contents count.
    Read,
    /// The others, after those, and the snapshots of all.
    Rest,
}

impl Part {
    fn has(self, access: Access) -> bool {
        match self {
            Part::All => true,
            Part::Read => access != Access::Out,
            Part::Rest => access == Access::Out,
        }
    }
}

impl Flight {
    /// A part of an argument of so many bytes as this flight may use it. Without fork events a child could not be given what a lease has taken away.
    fn sees(&self, core: &Core, dev: &Device, bytes: usize, piece: Piece) -> Piece {
        if self.copies(dev, bytes) {
            return Piece { movable: false, shareable: false, ..piece };
        }
        Piece { movable: piece.movable && (self.purpose == Purpose::Launch || core.space.mode == Mode::Full), ..piece }
    }

    /// Whether an argument of so many bytes is copied for a launch, there and back, and does not move: where each launch has to be told where things are, that costs less than its pages' way there
    /// and the faults that bring them home.
    fn copies(&self, dev: &Device, bytes: usize) -> bool {
        bytes < LARGE && self.purpose == Purpose::Launch && dev.driver.info().capabilities.linear
    }
}

/// Makes what the arguments declare resident. The caller holds `prepare`.
///
/// # Errors
/// Those of migration; [`Error::Gone`] if an argument cannot be reached.
pub(crate) fn prepare(core: &Core, dev: &Device, flight: &Flight, ledger: &mut Ledger, args: &[RawArg], part: Part) -> Result<(), Error> {
    let prepared = prepare_part(core, dev, flight, ledger, args, part);
    if prepared.is_err() {
        note_all(core, dev, ledger, args);
    }
    prepared
}

/// Notes the blocks at the ends of arguments that have snapshots: a lease may have made one of a page that was the device's when this flight began.
pub(crate) fn note_ends(core: &Core, dev: &Device, ledger: &mut Ledger, args: &[RawArg]) {
    for (start, end, _) in ranges(args) {
        for va in [start, end - 1].map(|at| Span::block(at).start) {
            let bounced = core.dir.get(va).is_some_and(|block| {
                let state = block.lock();
                state.device == dev.id() && !state.bounced().is_empty()
            });
            if bounced && ledger.bounced_count < ledger.bounced.len() {
                ledger.bounced[ledger.bounced_count] = va;
                ledger.bounced_count += 1;
            }
        }
    }
}

/// Notes every block with snapshots: who was stopped on the way has not noted those that he had taken by then, a lease not those that a kernel has made of its copies since, and nobody would
/// end them.
pub(crate) fn note_all(core: &Core, dev: &Device, ledger: &mut Ledger, args: &[RawArg]) {
    for (start, end, _) in ranges(args) {
        core.dir.for_each(Span::touching(start, end), |block, part| {
            let state = block.lock();
            if state.device == dev.id() && !state.bounced().is_empty() && ledger.bounced_count < ledger.bounced.len() {
                ledger.bounced[ledger.bounced_count] = Span::block(part.start).start;
                ledger.bounced_count += 1;
            }
        });
    }
}

fn prepare_part(core: &Core, dev: &Device, flight: &Flight, ledger: &mut Ledger, args: &[RawArg], part: Part) -> Result<(), Error> {
    dev.set_pin(flight.number);
    dev.last.lock().forget();
    let coherent = dev.driver.info().capabilities.coherent;
    if coherent && core.space.mode != Mode::Full {
        return Ok(()); // it uses everything in place
    }
    if part != Part::Rest {
        ledger.sealed = open(core, dev, flight, args)?;
        if !flight.fetches(dev) {
            edges_home(core, dev, args)?;
        }
        snapshot::refresh(core, dev, flight, args).map_err(|e| dev.copy_failed(e))?;
    }
    let sealed = core::mem::replace(&mut ledger.sealed, Sealed::new());
    let mut wants = [Want::default(); MAX_ARGS];
    for (want, range) in wants.iter_mut().zip(ranges(args)) {
        *want = Want::of(dev, flight, range);
    }
    let read = wants.iter().filter(|want| want.access == Some(Access::In)).map(|want| want.span.blocks().count()).sum();
    let joint = if dev.driver.info().capabilities.linear && part.has(Access::In) && read >= JOINT { read } else { 0 };
    let plan = Plan { core, dev, flight, args, part, wants, sealed: &sealed, pins: Pins::default(), next: AtomicUsize::new(0), joint };
    let carried_out = plan.carry_out(ledger);
    let pins = flight.fetches(dev) && core.policies.marks.any() && plan.pins.any();
    ledger.sealed = sealed; // of those that are written snapshots are taken; they leave when the launch has ended
    carried_out?;
    if coherent {
        return Ok(()); // what has not moved is used in place
    }
    if flight.fetches(dev) {
        advice::bring_accessed(core, dev, pins);
    }
    if part == Part::Read {
        return Ok(());
    }
    if !flight.fetches(dev) {
        snapshot_ends(core, dev, flight, args)?;
    }
    for range in ranges(args) {
        snapshot_rest(core, dev, flight, ledger, args, range)?;
    }
    Ok(())
}

/// Takes snapshots of the pages at the ends of all arguments together, so that their copies are waited for once and not one by one. What this leaves over, [`snapshot_rest`] finds.
fn snapshot_ends(core: &Core, dev: &Device, flight: &Flight, args: &[RawArg]) -> Result<(), Error> {
    let park: Park<'_> = &mut |parked| core.pool.put(parked.tray);
    let taken = core.one_pass(dev, park, |room, park| {
        for (start, end, access) in ranges(args) {
            for edge in edges(start, end) {
                let want = edge.bits() - usable(core, dev, flight, edge, access); // shared memory is used in place, edges too
                if !want.is_empty() {
                    let (ahead, twins) = (flight.purpose == Purpose::Launch, beyond(dev, args, edge));
                    let ask = Ask { ahead, twins, ..Ask::new(edge, want, Intent::Snapshot) };
                    core.block_resident(dev, room, &ask, park)?;
                }
            }
        }
        Ok(false)
    });
    taken.map(|_| ())
}

/// Opens the ranges on the device, watches them as far as they may move, and seals the edges of large ones.
fn open(core: &Core, dev: &Device, flight: &Flight, args: &[RawArg]) -> Result<Sealed, Error> {
    let info = dev.driver.info();
    let mut sealed = Sealed::new();
    // Elsewhere edges are copied at each launch, or used in place.
    let seals = flight.fetches(dev) && core.space.mode == Mode::Full && !info.capabilities.coherent;
    for (start, end, _) in ranges(args) {
        if info.capabilities.coherent {
            coherent::pin(core, dev, start, end);
        } else {
            place::ensure(core, dev, Some(flight), Span::touching(start, end))?;
            dev.driver.open_window(Span::touching(start, end)).map_err(|e| dev.failed(e))?;
            shares::open(core, dev, start, end);
        }
        check::pieces(core, start, end, |piece| {
            let piece = flight.sees(core, dev, end - start, piece);
            if piece.movable {
                let whole = Span::touching(piece.start, piece.end);
                register_ahead(core, Span::inside(start, end).and(whole));
                if seals && end - start >= LARGE {
                    edges(start, end).filter(|edge| whole.and(*edge) == *edge).for_each(|edge| sealed.push(edge.start));
                }
            }
            Ok(())
        })?;
    }
    sealed.seal(core);
    Ok(sealed)
}

/// Pages that hold other data too must not be on a device without replayable faults, for the CPU may touch that data while the kernel runs: they come home,
/// and the launch gets a snapshot.
fn edges_home(core: &Core, dev: &Device, args: &[RawArg]) -> Result<(), Error> {
    for (start, end, _) in ranges(args) {
        for edge in edges(start, end) {
            home::send_pages_home(core, dev, edge.start, edge.bits())?;
        }
    }
    Ok(())
}

/// The pages at the ends of a range that hold other data too.
fn edges(start: Va, end: Va) -> impl Iterator<Item = Span> {
    let inside = Span::inside(start, end);
    [Span::touching(start, start + 1), Span::touching(end - 1, end)].into_iter().filter(move |edge| inside.and(*edge) != *edge)
}

/// Blocks that a thread takes at a time.
const SHARE: usize = BATCH;
/// Launches over so many blocks are prepared on two threads.
const MANY: usize = 2 * SHARE;
/// From so many blocks on that are only read a device that has them in one piece gets them in as few copies as can be. The larger a copy, the less of it passes through the CPU's cache; but what
/// is less than the cache holds gains nothing, and is there sooner in small pieces.
const JOINT: usize = 32;

/// What is to be made resident, for all arguments together: the copies of one run while the next is collected. Two threads carry it out, each its own
/// migration; they take blocks by turns, in one order.
struct Plan<'a> {
    core: &'a Core,
    dev: &'a Device,
    flight: &'a Flight,
    args: &'a [RawArg],
    part: Part,
    wants: [Want; MAX_ARGS],
    sealed: &'a Sealed,
    pins: Pins,
    /// The first block that nobody has taken yet.
    next: AtomicUsize,
    /// So many blocks come first whose copies are joint: each thread takes half of them at once.
    joint: usize,
}

/// Whether some pages of the process may be pinned. Whoever has pinned a page writes to it without a fault, so it must not be duplicated: what is read moves too, which is refused for just these
/// pages; they get a snapshot. The system is asked (some 25 us) when it first matters.
#[derive(Default)]
struct Pins(AtomicU8);

impl Pins {
    fn any(&self) -> bool {
        const NO: u8 = 1;
        const YES: u8 = 2;
        match self.0.load(Ordering::Relaxed) {
            NO => false,
            YES => true,
            _ => {
                let any = tasks::has_pinned_pages();
                self.0.store(if any { YES } else { NO }, Ordering::Relaxed);
                any
            }
        }
    }
}

impl Plan<'_> {
    fn carry_out(&self, ledger: &mut Ledger) -> Result<(), Error> {
        self.dev.driver.stand_by();
        let blocks: usize = self.wants.iter().map(|want| want.span.blocks().count()).sum();
        let ledger = Mutex::new(ledger);
        // A second pass looks again at what an event or a cancelled page left over; more are only needed while the program changes its mappings.
        for _pass in 0..8 {
            self.next.store(0, Ordering::Relaxed);
            let result = Mutex::new(Ok(false));
            let work = || {
                let own =
                    self.core.one_pass(self.dev, &mut |parked| ledger.lock().park(self.core, parked), |room, park| self.pass(room, park));
                let mut sum = result.lock();
                *sum = match (&*sum, own) {
                    (Ok(again), Ok(more)) => Ok(*again | more),
                    (Ok(_), Err(e)) => Err(e),
                    (Err(_), _) => return,
                };
            };
            if blocks >= MANY {
                self.core.assist.together(&work)
            } else {
                work()
            }
            if !result.into_inner()? {
                break;
            }
            self.core.space.settle();
        }
        Ok(())
    }

    /// One thread's part of a pass: true if something is worth another look.
    fn pass(&self, room: &mut Room, park: Park<'_>) -> Result<bool, Error> {
        let mut again = false;
        let (mut at, mut share) = (0, self.take_share());
        // What is copied comes first: then what is only moved is collected while the copies run.
        let order = |access| ranges(self.args).enumerate().filter(move |(_, range)| range.2 == access);
        for (index, (start, end, access)) in order(Access::In).chain(order(Access::InOut)).chain(order(Access::Out)) {
            // What is copied back as a whole must be whole before.
            let access = if access == Access::Out && self.flight.copies(self.dev, end - start) { Access::InOut } else { access };
            check::pieces(self.core, start, end, |piece| {
                let piece = self.flight.sees(self.core, self.dev, end - start, piece);
                // What does not move gets a snapshot, as of its turn.
                let due = if piece.movable { self.part.has(access) } else { self.part != Part::Read };
                if !due {
                    return Ok(());
                }
                if !piece.movable && self.dev.driver.info().capabilities.coherent {
                    return Ok(());
                }
                let whole = Span::touching(piece.start, piece.end);
                let pages = match access {
                    _ if piece.movable => self.wants[index].span.and(whole),
                    Access::Out => Span::inside(start, end).and(whole),
                    _ => whole,
                };
                let in_place = |part: &Span| !piece.movable && self.dev.shares.bits(*part, access.writes()) == part.bits();
                for part in pages.blocks().filter(|part| !in_place(part)) {
                    if at == share.end {
                        share = self.take_share();
                    }
                    if share.contains(&at) {
                        let ask = self.ask(access, part, piece);
                        again |= if piece.movable {
                            self.as_wished(room, (access, end - start), &ask, park)?
                        } else {
                            self.core.block_resident(self.dev, room, &ask, park)?
                        };
                    }
                    at += 1;
                }
                Ok(())
            })?;
        }
        Ok(again)
    }

    fn take_share(&self) -> Range<usize> {
        let end = |first| first + if first < self.joint { self.joint.div_ceil(2).max(SHARE) } else { SHARE };
        let first = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |first| Some(end(first))).unwrap_or_else(|first| first);
        first..end(first)
    }

    /// Has pages that can move where the policy wants those that an argument of so many bytes declares.
    fn as_wished(&self, room: &mut Room, (access, bytes): (Access, usize), ask: &Ask<'_>, park: Park<'_>) -> Result<bool, Error> {
        let wishes = Wishes::of(self.core, self.dev, self.flight.fetches(self.dev), access, bytes, ask.part);
        // What the device has was not pinned when it was shared; and whoever pins a page since, to write to it, has to break its protection first.
        let lacks = || (wishes.duplicates & ask.want) - usable(self.core, self.dev, self.flight, ask.part, Access::In);
        let shares = if !lacks().is_empty() && self.pins.any() { Intent::Move } else { Intent::Duplicate };
        // A coherent device writes in place whatever happens then: there is nothing to park for a kernel that fails.
        let moves = if access == Access::Out && !self.dev.driver.info().capabilities.coherent { Intent::Discard } else { Intent::Move };
        let mut again = false;
        for (pages, intent) in [(wishes.duplicates & ask.want, shares), (wishes.moves & ask.want, moves)] {
            if !pages.is_empty() {
                let ask = Ask { want: pages, beside: ask.beside & pages, intent, last: wishes.pin, ..*ask };
                again |= self.core.block_resident(self.dev, room, &ask, park)?;
            }
        }
        Ok(again)
    }

    /// What argument `index` wants of a part of a block.
    fn ask(&self, access: Access, part: Span, piece: Piece) -> Ask<'_> {
        if !piece.movable {
            let intent = match access {
                Access::In if piece.shareable && !self.pins.any() => Intent::Duplicate,
                Access::Out => Intent::Blank,
                _ => Intent::Snapshot,
            };
            let (ahead, twins) = (self.flight.purpose == Purpose::Launch, beyond(self.dev, self.args, part));
            // What moved there with another argument, or an earlier launch, need not be copied.
            let there = if intent == Intent::Snapshot { usable(self.core, self.dev, self.flight, part, access) } else { Bits::EMPTY };
            return Ask { ahead, twins, ..Ask::new(part, part.bits() - there, intent) };
        }
        // Neighbours that are wanted in the same way come along: a block that is whole is one huge page on the device.
        let block = Span::block(part.start);
        let alike = || self.wants.iter().filter(|want| want.access == Some(access));
        let all = alike().fold(Bits::EMPTY, |sum, other| sum | other.span.and(block).bits()) == Bits::ALL;
        let whole = all && self.core.space.mode == Mode::Full; // else neighbours may be of another kind
        let (part, want) = if whole { (block, Bits::ALL) } else { (part, part.bits()) };
        let beside = alike().fold(want, |rest, other| rest - other.inside.and(block).bits());
        Ask { beside, lent: want - beside, joint: self.joint > 0, sealed: Some(self.sealed), ..Ask::new(part, want, Intent::Move) }
    }
}

/// Pages of a part of a block that no argument covers whole: where the kernel can follow pointers, it may write beyond what is declared.
fn beyond(dev: &Device, args: &[RawArg], part: Span) -> Bits {
    // Also under a lease: launches beside it follow pointers.
    if !dev.driver.info().capabilities.replayable_faults {
        return Bits::EMPTY;
    }
    ranges(args).fold(part.bits(), |rest, (start, end, _)| rest - Span::inside(start, end).and(part).bits())
}

/// The non-empty process ranges of arguments.
fn ranges(args: &[RawArg]) -> impl Iterator<Item = (Va, Va, Access)> {
    args.iter().filter_map(RawArg::process_range).filter(|range| range.0 < range.1)
}

/// Watches a large range by one call, where it is not watched at all yet, instead of block by block.
pub(crate) fn register_ahead(core: &Core, span: Span) {
    // In one block one call does it anyway. In several, each call would split the mapping for a moment, and an mremap that resizes fails then.
    if span.blocks().nth(1).is_none() {
        return;
    }
    let mut any = false;
    core.dir.for_each(span, |block, part| any |= block.lock().reg.meets(part.bits()));
    if any {
        return;
    }
    // An error: block by block will tell which part cannot be watched.
    let _ = ranges::watch_span(core, span);
}

/// The pages of an argument that go to the device whole.
#[derive(Clone, Copy, Default)]
struct Want {
    access: Option<Access>,
    span: Span,
    /// Those that hold nothing else.
    inside: Span,
}

impl Want {
    fn of(dev: &Device, flight: &Flight, (start, end, access): (Va, Va, Access)) -> Self {
        let inside = Span::inside(start, end);
        // The first and the last page of a large range that is only read are shared whole: nothing of theirs moves.
        let info = dev.driver.info();
        let shared = access == Access::In && end - start >= LARGE && flight.fetches(dev) && !info.capabilities.coherent;
        Want { access: Some(access), span: if shared { Span::touching(start, end) } else { inside }, inside }
    }
}

/// Pages of a block that the device can use as `access` needs.
fn usable(core: &Core, dev: &Device, flight: &Flight, part: Span, access: Access) -> Bits {
    let shared = dev.shares.bits(part, access.writes());
    let Some(block) = core.dir.get(part.start) else { return shared };
    let state = block.lock();
    if state.device != dev.id() {
        return shared;
    }
    let pages = if access.writes() { state.private() | state.bounced() } else { state.resident() };
    // What a flight uses and does not hold could leave under it.
    let pages = if flight.holds { pages & (dev.flights.held(part.start) | state.bounced()) } else { pages };
    pages & state.win & part.bits() | shared
}

/// Takes snapshots of what is not resident by now: edges, and pages that cannot move.
fn snapshot_rest(
    core: &Core,
    dev: &Device,
    flight: &Flight,
    ledger: &mut Ledger,
    args: &[RawArg],
    range: (Va, Va, Access),
) -> Result<(), Error> {
    let (start, end, access) = range;
    let (span, inside) = (Span::touching(start, end), Span::inside(start, end));
    for part in span.blocks() {
        let mut left = Bits::EMPTY; // to the kernel's touch
        if usable(core, dev, flight, part, access) != part.bits() {
            left = Wishes::of(core, dev, flight.fetches(dev), access, end - start, part).left_to_touch(access) & inside.and(part).bits();
        }
        // A thread that touches what lies beside the range brings pages of it home between two looks: look again.
        let mut looks = 0;
        while let Some(page) = (part.bits() - usable(core, dev, flight, part, access) - left).next(0) {
            if looks == 100 {
                return Err(Error::Gone { address: Span::block(part.start).start + page * PAGE });
            }
            looks += 1;
            let want = part.bits() - usable(core, dev, flight, part, access) - left;
            if flight.holds {
                // A kernel that runs beside may have fetched an end since it was sent home: there it is nobody's who holds it, and no snapshot is made of it.
                home::send_pages_home(core, dev, part.start, want)?;
            }
            let ask = Ask { twins: beyond(dev, args, part), ..Ask::new(part, want, Intent::Snapshot) };
            if core.make_block_resident(dev, &ask)?.again {
                core.space.settle();
            }
        }
        let bounced = core.dir.get(part.start).map_or(Bits::EMPTY, |block| block.lock().bounced());
        let va = Span::block(part.start).start;
        let known = ledger.bounced_count > 0 && ledger.bounced[ledger.bounced_count - 1] == va;
        if bounced.meets(part.bits()) && !known {
            if ledger.bounced_count == ledger.bounced.len() {
                let info = dev.driver.info();
                return Err(Error::NoRoom { device: info.name, needed: span.len(), capacity: info.memory });
            }
            ledger.bounced[ledger.bounced_count] = va;
            ledger.bounced_count += 1;
        }
    }
    Ok(())
}
