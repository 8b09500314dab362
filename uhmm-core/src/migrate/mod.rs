//! Migration to a device: collect, copy, commit. Each step is a type, and only the one before it makes it.
//!
//! *Collect* (event lock and block lock held): take frames, watch the range, find what is there, and take the pages from the CPU: moved
//! out into a tray, write-protected, or just noted. The pages are now `busy`, and this migration is the block's `mover`. *Copy* (no
//! lock held): one batch for up to [`BATCH`] blocks, or [`LENT`] of which only lent pages are copied; while it is copied the next one is collected. *Commit* (locks held again): what is still busy is mapped for the device and changes its
//! state; what an invalidation took out of `busy` meanwhile is freed. A batch that the device has not copied is *undone* instead: every page goes back to where it was taken from.
//!
//! # Rules
//! * A migration that holds uncommitted blocks waits for nothing but its own copies: it commits before it evicts, settles or waits for another mover.
//! * Program memory is read only in the copy step, guarded, without a lock.
//! * A page that cannot move is no error: it stays, and the caller sees that it is not resident.

mod batch;
mod peer;

pub(crate) use batch::give_back;
pub(crate) use batch::{Parked, Room};

use crate::bits::{Bits, PAGES};
use crate::coherent;
use crate::core::{Core, Device};
use crate::directory::{BlockGuard, State};
use crate::driver::DmaKind;
use crate::error::Error;
use crate::fixed::{self, Sealed};
use crate::home;
use crate::mode::Mode;
use crate::notifier;
use crate::page::{Cause, PageState, Span, Va};
use crate::policy;
use crate::pool::{self, Size};
use crate::ranges::{self, MoveEnd};
use crate::space::{Present, Refusals};
use crate::sync::*;
use batch::{Batch, Collected, Item};
use uhmm_os::mem::{self, Advice, Prot};
use uhmm_os::{Errno, PAGE, thread};

/// Blocks in one batch: enough for a copy to be worth waking the engine, few enough for the next batch to be collected meanwhile.
pub(crate) const BATCH: usize = 2;
/// Blocks in one batch of lent pages only, if they are [`joint`](Ask::joint).
const LENT: usize = 512;

/// How often a full device with nothing to evict is asked again.
const DRY: usize = 2000;

/// What a device wants of pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Intent {
    /// To read them: the CPU keeps its copy, write-protected.
    Duplicate,
    /// To have them alone.
    Move,
    /// To have them alone and overwrite them: contents are not copied, the old pages are parked.
    Discard,
    /// To see a snapshot for one launch, while the CPU goes on with its page.
    Snapshot,
    /// To have a page for one launch that it overwrites, while the CPU goes on with its own.
    Blank,
}

impl Intent {
    /// Whether the CPU keeps its page and the device's goes when the launch ends.
    pub(crate) fn bounces(self) -> bool {
        matches!(self, Intent::Snapshot | Intent::Blank)
    }
}

/// How one look at a block ended.
enum Look {
    /// Everything wanted is resident, or cannot be.
    Done,
    /// An item was added to the batch; `again` if not everything that could move did, `refused` if something cannot.
    Taken { again: bool, refused: bool },
    /// Nothing moves: the kernel refuses.
    Refused,
    /// Another migration owns the block, or a launch on another device holds a snapshot of it.
    Wait,
    /// An event is unread.
    Settle,
    /// Another device has pages of the block.
    Elsewhere(usize),
    /// They have left that device.
    Moved,
    /// The device's memory is full.
    Full,
    /// The mappings changed since the asker looked them up.
    Stale,
    /// Pages are shared since a fork, or are the zero page: make these the program's own, and look again.
    Populate(Bits),
}

/// Takes the old pages of what a launch overwrites.
pub(crate) type Park<'a> = &'a mut dyn FnMut(Parked);

/// What is asked for of one block.
#[derive(Clone, Copy)]
pub(crate) struct Ask<'a> {
    /// The block, or the part of it that matters.
    pub part: Span,
    /// The pages.
    pub want: Bits,
    /// What the device wants of them.
    pub intent: Intent,
    /// Those of them that hold data besides that of an argument: what must stay may be among it, see [`crate::fixed`].
    pub beside: Bits,
    /// Those that are a launch's own, whole: nobody unmaps them before it has ended.
    pub lent: Bits,
    /// Many more such blocks come after it, and the device may take their lent pages in one copy.
    pub joint: bool,
    /// What was sealed for the launch.
    pub sealed: Option<&'a Sealed>,
    /// The running launch has declared them: they stay until it ends.
    pub pinned: bool,
    /// What the asker knows of the mappings is as old as this; see [`crate::notifier`].
    pub seq: Option<u32>,
    /// Snapshots for the launch that comes next on the device.
    pub ahead: bool,
    /// Snapshots that may be written beyond what is declared: what was changed is found by comparing.
    pub twins: Bits,
    /// Snapshots of what the process may only read.
    pub rdonly: Bits,
    /// The policy wants the block to leave a full device last.
    pub last: bool,
    /// The pages may be executed: the kernel moves them only to where that is so too.
    pub exec: bool,
}

impl Ask<'_> {
    /// Of a launch's declared pages.
    pub(crate) fn new(part: Span, want: Bits, intent: Intent) -> Self {
        Ask {
            part,
            want,
            intent,
            beside: Bits::EMPTY,
            lent: Bits::EMPTY,
            joint: false,
            sealed: None,
            pinned: true,
            seq: None,
            ahead: false,
            twins: Bits::EMPTY,
            rdonly: Bits::EMPTY,
            last: false,
            exec: false,
        }
    }
}

/// How asking for one block ended.
pub(crate) struct Outcome {
    /// It is worth another look.
    pub again: bool,
    /// A page will not move, or cannot even be read, as it is.
    pub refused: bool,
}

impl Core {
    /// Makes the pages of `span`, whatever lies there, resident on the device as `intent` says, as far as they can move. Pages of `skip` (asked block by
    /// block) are left alone.
    ///
    /// # Errors
    /// [`Error::NoRoom`] if the device's memory is full of what may not be evicted; [`Error::Driver`].
    pub(crate) fn make_resident(
        &self,
        dev: &Device,
        span: Span,
        intent: Intent,
        skip: &dyn Fn(Span) -> Bits,
        park: Park<'_>,
    ) -> Result<(), Error> {
        self.make_resident_in(dev, span, false, intent, skip, park)
    }

    /// As [`make_resident`](Self::make_resident), of a mapping whose pages may be executed, if `exec`.
    pub(crate) fn make_resident_in(
        &self,
        dev: &Device,
        span: Span,
        exec: bool,
        intent: Intent,
        skip: &dyn Fn(Span) -> Bits,
        park: Park<'_>,
    ) -> Result<(), Error> {
        // As often as in `prepare`.
        for _pass in 0..8 {
            let again = self.one_pass(dev, park, |room, park| {
                span.blocks().try_fold(false, |again, part| {
                    let want = part.bits() - skip(part);
                    let ask = Ask { beside: want, exec, ..Ask::new(part, want, intent) };
                    Ok(again | self.block_resident(dev, room, &ask, park)?)
                })
            })?;
            if !again {
                break;
            }
            self.space.settle();
        }
        Ok(())
    }

    /// One migration of blocks that `pass` asks for by [`block_resident`](Self::block_resident): true if something is worth another look.
    ///
    /// # Errors
    /// As [`make_resident`](Self::make_resident).
    pub(crate) fn one_pass(
        &self,
        dev: &Device,
        park: Park<'_>,
        pass: impl FnOnce(&mut Room, Park<'_>) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        let mut room = self.room();
        let asked = pass(&mut room, park);
        let again = self.drain(dev, &mut room, park)?;
        Ok(asked? | again)
    }

    /// Makes pages of one block resident as far as they can move, for a device that waits for them.
    ///
    /// # Errors
    /// As [`make_resident`](Self::make_resident).
    pub(crate) fn make_block_resident(&self, dev: &Device, ask: &Ask<'_>) -> Result<Outcome, Error> {
        let mut room = self.room();
        room.refused = false;
        let park: Park<'_> = &mut |parked| self.pool.put(parked.tray);
        let asked = self.block_resident(dev, &mut room, ask, park);
        let again = self.drain(dev, &mut room, park)?;
        Ok(Outcome { again: asked? | again, refused: room.refused })
    }

    /// Takes part in a migration with one block: true if it should be looked at again.
    pub(crate) fn block_resident(&self, dev: &Device, room: &mut Room, ask: &Ask<'_>, park: Park<'_>) -> Result<bool, Error> {
        let mut again = false;
        let mut populated = false;
        let (mut dry, mut refusals) = (0, Refusals::new(&self.space));
        loop {
            let look = self.collect(dev, &mut room.batches[room.at], ask, populated)?;
            room.refused |= matches!(look, Look::Refused | Look::Taken { refused: true, .. });
            if let Look::Taken { again: more, .. } = look {
                if room.batches[room.at].is_full() {
                    again |= self.fly(dev, room, park)?;
                }
                return Ok(again | more);
            }
            if let Look::Done | Look::Refused = look {
                return Ok(again);
            }
            // Nobody waits for others while he holds blocks in transit. What he waited for may have been among them.
            let held = room.flying.is_some() || !room.batches[room.at].is_empty();
            again |= self.drain(dev, room, park)?;
            let look = if let Look::Elsewhere(other) = look { self.fetch_from_peer(dev, other, room, ask)? } else { look };
            match look {
                Look::Moved => {}
                Look::Wait if held => {}
                Look::Wait => thread::yield_now(),
                Look::Settle => refusals.wait(),
                Look::Full if dev.driver.info().capabilities.coherent => {
                    if !coherent::make_room(self, dev) {
                        return Ok(again);
                    }
                }
                Look::Full => {
                    // Nothing to evict may mean that others hold blocks in transit, or that the CPU has just taken the last one home.
                    if let Err(e) = home::evict_one(self, dev, !ask.pinned) {
                        dry += 1;
                        if dry > DRY || (!ask.pinned && dev.full.load(Ordering::Relaxed)) {
                            // A kernel that goes on touching what does not fit is not made to wait each time.
                            dev.full.store(true, Ordering::Relaxed);
                            return Err(e);
                        }
                        // Who has the blocks in transit may have lost his core for some milliseconds.
                        if dry < DRY / 10 {
                            thread::yield_now();
                        } else {
                            thread::sleep_micros(20);
                        }
                    }
                }
                Look::Stale => return Ok(true),
                Look::Populate(pages) => {
                    populated = true;
                    for run in pages.runs().map(|run| ranges::pages(Span::block(ask.part.start), run)) {
                        self.populate(|| {
                            #[allow(unsafe_code)]
                            // SAFETY: it changes no contents: it only gives the program pages of its own where it shares them.
                            let _ = unsafe { mem::madvise(run.start, run.len(), Advice::PopulateWrite) };
                        });
                    }
                }
                Look::Elsewhere(_) | Look::Done | Look::Refused | Look::Taken { .. } => unreachable!("handled above"),
            }
        }
    }

    /// Has the collected batch copied, and ends the one before: true if something of that was lost on the way and should be looked at again.
    fn fly(&self, dev: &Device, room: &mut Room, park: Park<'_>) -> Result<bool, Error> {
        let next = Collected(&mut room.batches[room.at]).copy(dev);
        let lost = self.land(dev, room, park);
        room.flying = Some(next);
        room.at ^= 1;
        lost
    }

    /// Ends the batch that is being copied, if there is one.
    fn land(&self, dev: &Device, room: &mut Room, park: Park<'_>) -> Result<bool, Error> {
        match room.flying.take() {
            Some(flying) => match flying.land(&mut room.batches[room.at ^ 1], dev) {
                Ok(copied) => {
                    room.refused |= !copied.reached();
                    copied.commit(self, dev, park)
                }
                Err(failed) => Err(failed.undo(self, dev)),
            },
            None => Ok(false),
        }
    }

    /// Ends all that is in transit.
    fn drain(&self, dev: &Device, room: &mut Room, park: Park<'_>) -> Result<bool, Error> {
        let mut lost = Ok(false);
        if !room.batches[room.at].is_empty() {
            lost = self.fly(dev, room, park);
        }
        let last = self.land(dev, room, park);
        Ok(lost? | last?)
    }

    /// Takes the wanted pages of one block from the CPU and adds them to the batch.
    fn collect(&self, dev: &Device, batch: &mut Batch, ask: &Ask<'_>, populated: bool) -> Result<Look, Error> {
        let Ask { part, mut want, intent, pinned, seq, .. } = *ask;
        if matches!(intent, Intent::Move | Intent::Discard) {
            want -= self.policies.marks.stay(Span::block(part.start)); // advised never to leave
        }
        let beside = if intent.bounces() { Bits::EMPTY } else { ask.beside };
        let _hold = self.space.hold();
        let _ends = (!beside.is_empty()).then(|| self.ends.lock());
        let block = self
            .dir
            .get_or_make(part.start)
            .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
        if seq.is_some_and(|seq| notifier::read_retry(block, seq)) {
            return Ok(Look::Stale);
        }
        let mut state = block.lock();
        if state.mover != 0 {
            return Ok(Look::Wait);
        }
        if state.device != 0 && state.device != dev.id() {
            let other = state.device as usize - 1;
            return Ok(match self.device(other).flights.leases(part.start) {
                true => Look::Refused, // a lease has pages of it there
                false if state.bounced().is_empty() => Look::Elsewhere(other),
                false => Look::Wait,
            });
        }
        if pinned {
            block.pin.store(dev.pin(), Ordering::Relaxed);
        }
        if !intent.bounces() {
            policy::pin(block, ask.last);
            block.past.last_use.store(dev.pin(), Ordering::Relaxed);
        }
        if state.device != 0 {
            dev.mem.touch(&self.dir, Span::block(part.start).start);
        }
        self.drop_stale(dev, &mut state, Span::block(part.start).start);
        let settled = self.settle_resident(dev, &mut state, part.start, want, intent);
        if !state.bounced().is_empty() {
            block.keep.store(true, Ordering::Relaxed);
        }
        match settled {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Ok(Look::Settle),
            Err(e) => return Err(dev.failed(e)),
        }
        let lack = (ask.twins & want & state.bounced()) - state.twins;
        if !lack.is_empty() {
            let va = Span::block(part.start).start;
            ranges::unmap(self, dev, &mut state, va, lack);
            self.twins.make(self, dev, &mut state, lack);
            ranges::map(self, dev, &mut state, va, lack).map_err(|e| dev.failed(e))?;
        }
        let fresh = want - state.resident() - state.lost();
        if fresh.is_empty() {
            return Ok(Look::Done);
        }
        Ok(self.collect_fresh(dev, batch, &mut state, &Ask { want: fresh, beside: beside & fresh, ..*ask }, populated))
    }

    /// Takes pages that the device has nothing of from the CPU.
    fn collect_fresh(&self, dev: &Device, batch: &mut Batch, state: &mut BlockGuard<'_>, ask: &Ask<'_>, populated: bool) -> Look {
        let Ask { want: mut fresh, intent, beside, .. } = *ask;
        let span = Span::block(ask.part.start);
        if !intent.bounces()
            && let Err(e) = self.watch(state, span, fresh)
        {
            return if e == Errno::AGAIN { Look::Settle } else { Look::Refused };
        }
        if !intent.bounces() {
            fresh &= state.reg;
        }
        let present = match self.space.present(ranges::hull(span, fresh)) {
            _ if intent.bounces() => Present::default(),
            Ok(present) => present,
            Err(_) => return Look::Done,
        };
        let beside = (beside & present.pages) - ask.sealed.map_or(Bits::EMPTY, |sealed| sealed.still(self, span.start));
        match fixed::seal(self, state, span.start, beside) {
            Ok(sealed) => fresh -= beside - sealed,
            Err(_) => return Look::Settle,
        }
        if fresh.is_empty() {
            return Look::Done;
        }
        if ranges::take_frames(self, dev, state, span.start, fresh).is_err() {
            return Look::Full;
        }
        state.device = dev.id();
        let (twins, rdonly) = (ask.twins & fresh, ask.rdonly & fresh);
        let mut item = Item { twins, rdonly, ..Item::new(span.start, dev.id(), intent) };
        let here = present.pages & fresh;
        let huge = present.huge && fresh == Bits::ALL;
        let end = self.take(&mut item, fresh, here, huge, ask.exec, populated);
        let taken = item.moved | item.zeroed | item.copied;
        // What was refused is the program's as before. If this fails, the first write does it.
        let _ = ranges::unprotect(self, span.start, (beside & fresh) - taken);
        if taken.is_empty() {
            ranges::give_frames(self, dev, state, span.start, fresh);
            if let Some(tray) = item.tray {
                self.pool.put(tray);
            }
            return match end {
                // All of them, for the next look is the last: what it finds refused stays.
                MoveEnd::Refused if !populated => Look::Populate(here),
                MoveEnd::Pending => Look::Settle,
                MoveEnd::Refused => Look::Refused,
                _ => Look::Done,
            };
        }
        state.mover = self.next_mover();
        state.taken = item.moved;
        state.tray = item.tray.as_ref().map_or(0, |tray| tray.start);
        let (moved, copied) = (item.moved | item.zeroed, item.copied);
        state.shift(moved, PageState::System, Cause::Collect, PageState::Moving);
        state.shift(copied, PageState::System, Cause::Collect, PageState::Copying);
        ranges::give_frames(self, dev, state, span.start, fresh - taken);
        state.touches = 0;
        policy::one_more(&state.block().past.migrations);
        state.huge = present.huge && item.moved == Bits::ALL;
        dev.mem.touch(&self.dir, span.start);
        self.list_copies(batch, state, &item, ask);
        let lent = intent == Intent::Duplicate && (taken - (item.copied & ask.lent)).is_empty();
        batch.push(item, lent && ask.joint);
        let again = match end {
            MoveEnd::Pending | MoveEnd::Vanished => true,
            MoveEnd::Refused => !populated,
            MoveEnd::All => false,
        };
        Look::Taken { again, refused: end == MoveEnd::Refused && populated }
    }

    /// Drops copies of what the CPU has written since they were made, where it does not wait for that.
    fn drop_stale(&self, dev: &Device, state: &mut BlockGuard<'_>, va: Va) {
        let shared = state.duplicated();
        if self.space.mode == Mode::UserModeOnly && !shared.is_empty() && state.device == dev.id() {
            let stale = shared - self.space.clean(ranges::hull(Span::block(va), shared));
            ranges::unmap(self, dev, state, va, stale);
            state.shift(stale, PageState::Duplicated, Cause::CpuWrite, PageState::System);
            ranges::give_frames(self, dev, state, va, stale);
        }
    }

    /// Settles what is resident already: duplicated pages that are to be written, and pages that are not in the device's page table.
    fn settle_resident(&self, dev: &Device, state: &mut BlockGuard<'_>, va: Va, want: Bits, intent: Intent) -> Result<(), Errno> {
        let block = Span::block(va).start;
        let shared = want & state.duplicated();
        if intent != Intent::Duplicate && !shared.is_empty() {
            let taken = if intent.bounces() {
                ranges::unprotect(self, block, shared)?;
                state.shift(shared, PageState::Duplicated, Cause::Bounce, PageState::Bounced);
                Ok(())
            } else {
                self.take_shared(state, block, shared)
            };
            let upgraded = shared - state.duplicated();
            ranges::with_runs(self, state, block, upgraded & state.win, true, |runs| dev.driver.allow_writes(runs));
            taken?;
            // What would not move stays on the CPU's side alone: the caller takes a snapshot of it.
            let left = shared & state.duplicated();
            home::drop_duplicates(self, dev, state, block, left)?;
        }
        let unmapped = (want & state.resident()) - state.win - state.coherent();
        if !unmapped.is_empty() {
            ranges::map(self, dev, state, block, unmapped)?;
        }
        Ok(())
    }

    /// The device is going to write pages that both have: the CPU's copies go.
    fn take_shared(&self, state: &mut State, block: Va, shared: Bits) -> Result<(), Errno> {
        let Some(mut tray) = self.pool.take_empty(Size::Small, shared) else { return Ok(()) };
        let (moved, end) = ranges::move_out(&self.space, block, shared, &tray, Some(state.device), false);
        tray.full |= moved;
        self.pool.put(tray);
        state.shift(moved, PageState::Duplicated, Cause::DeviceWrite, PageState::Private);
        match end {
            MoveEnd::Pending => Err(Errno::AGAIN),
            _ => Ok(()),
        }
    }

    /// Registers what of `pages` is not watched yet, as far as it is mapped.
    fn watch(&self, state: &mut State, block: Span, pages: Bits) -> Result<(), Errno> {
        for run in (pages - state.reg).runs() {
            let mut span = ranges::pages(block, run);
            // Where ports are, all of the mapping: see `port`. It may have changed since they have asked for that.
            if self.tags.store() != 0
                && let Some(vma) = self.space.mapping(span.start)?.filter(|vma| vma.end >= span.end)
            {
                span = Span { start: vma.start, end: vma.end };
            }
            self.space.watch(span, Some(self.tags.store()).filter(|id| *id != 0), |part| state.reg |= part.and(block).bits())?;
        }
        Ok(())
    }

    /// The heart of collecting: takes `fresh` pages, of which `here` exist, from the CPU as the item's intent says.
    fn take(&self, item: &mut Item, fresh: Bits, here: Bits, huge: bool, exec: bool, populated: bool) -> MoveEnd {
        match item.intent {
            Intent::Snapshot | Intent::Blank => {
                item.copied = fresh;
                MoveEnd::All
            }
            Intent::Duplicate => {
                // Without faults for missing pages holes are copied like pages, and found unwritten or not like them.
                let here = if self.space.mode == Mode::Full { here } else { fresh };
                for run in here.runs() {
                    match ranges::protect(self, ranges::pages(Span::block(item.va), run.clone())) {
                        Ok(()) => item.copied |= Bits::range(run),
                        Err(Errno::AGAIN) => return MoveEnd::Pending,
                        Err(_) => return MoveEnd::Vanished,
                    }
                }
                item.zeroed = fresh - here;
                MoveEnd::All
            }
            Intent::Move | Intent::Discard => {
                let size = if huge { Size::Huge } else { Size::Small };
                if here.is_empty() {
                    item.zeroed = fresh;
                    return MoveEnd::All;
                }
                let Some(mut tray) = self.pool.take_empty(size, here) else { return MoveEnd::All };
                if exec {
                    tray.allow(Prot::ReadWriteExec);
                }
                let out = |pages| ranges::move_out(&self.space, item.va, pages, &tray, Some(item.device), !populated);
                let (mut moved, mut end) = out(here);
                // Locked memory leaves the program for ports only: a launch uses it in place.
                if end == MoveEnd::Refused
                    && populated
                    && self.tags.store() == item.device
                    && let Some((more, ended)) = pool::while_locked(tray.start, PAGES * PAGE, || out(here - moved))
                {
                    (moved, end) = (moved | more, ended);
                }
                if exec {
                    tray.allow(Prot::ReadWrite);
                }
                tray.full |= moved;
                item.moved = moved;
                item.zeroed = fresh - here;
                item.tray = Some(tray);
                end
            }
        }
    }

    fn list_copies(&self, batch: &mut Batch, state: &State, item: &Item, ask: &Ask<'_>) {
        let Item { va, intent, moved, zeroed, copied, ref tray, .. } = *item;
        let discard = if intent == Intent::Discard { moved } else { Bits::EMPTY };
        ranges::frame_runs(self, state, zeroed | discard, |run, frame| batch.push_dma(DmaKind::Zero, 0, frame, run.len()));
        if let Some(tray) = tray {
            ranges::frame_runs(self, state, moved - discard, |run, frame| {
                batch.push_dma(DmaKind::ToDevice, tray.slot(run.start), frame, run.len())
            });
        }
        let kind = match intent {
            Intent::Blank => DmaKind::Zero,
            Intent::Snapshot if ask.ahead => DmaKind::SnapshotToDevice,
            _ => DmaKind::GuardedToDevice,
        };
        let lent = if intent == Intent::Duplicate { copied & ask.lent } else { Bits::EMPTY };
        for (pages, kind) in [(copied - lent, kind), (lent, DmaKind::LentToDevice)] {
            ranges::frame_runs(self, state, pages, |run, frame| batch.push_dma(kind, va + run.start * PAGE, frame, run.len()));
        }
    }
}
