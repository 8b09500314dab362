//! From one device to another, without the program in between.
//!
//! A block is on one device at a time, so what another device needs of it leaves the first as a whole. Nothing changes but whose the block is: pages that are
//! private stay private, those that are duplicated stay duplicated, and the program's side is not touched. So no page is seen in the program meanwhile, a
//! CPU's touch finds the page on the one device or on the other, and nobody has to be waited for but launches that hold something of the block.
//!
//! | pages | become |
//! |---|---|
//! | private | private on the other device: copied |
//! | duplicated | duplicated there: copied; where that cannot be (a coherent device), the program's alone |
//! | coherent | taken out of the program, then as private ones; what will not leave is the program's alone |
//! | parked, snapshots, held by a launch | the block waits for its end |
//! | held by a lease | the block stays where it is |
//! | beside what is asked for | come along; home, if the other device has no replayable faults, or no room for them |
//!
//! The copy is direct where the receiver's engine reads what the sender lets be seen ([`reads_peers`], [`Driver::peek`]), else by host pages of the pool.
//! Without room, or if the copy fails, the block stays where it is.
//!
//! [`reads_peers`]: crate::driver::Capabilities::reads_peers
//! [`Driver::peek`]: crate::driver::Driver::peek

use super::{Ask, Look, Room};
use crate::bits::Bits;
use crate::coherent;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::{BlockGuard, Frame, State};
use crate::driver::{Dma, DmaKind};
use crate::error::Error;
use crate::home;
use crate::mode::Mode;
use crate::monitor;
use crate::page::{Span, Va};
use crate::pool::Size;
use crate::ranges;
use core::ops::Range;
use uhmm_os::{Errno, PAGE};

/// The number of the migration that frames are taken for, before they are the block's: with one, nothing is done at the end of the last page.
const ON_THE_WAY: u32 = u32::MAX;

/// How one attempt ended.
enum Step {
    /// As a look at the block: it has moved, or why it has not.
    Ended(Look),
    /// These must go home first.
    Home(Bits),
}

impl Core {
    /// The block that is asked for leaves device number `from` for `dev`; or, where it cannot be so, for the program. The room has nothing in transit.
    ///
    /// # Errors
    /// Those of the devices; the block is where it was then.
    pub(super) fn fetch_from_peer(&self, dev: &Device, from: usize, room: &mut Room, ask: &Ask<'_>) -> Result<Look, Error> {
        let other = self.device(from);
        let va = Span::block(ask.part.start).start;
        // A device without replayable faults gets snapshots of what it does not have whole.
        let stays = ask.intent.bounces() && !dev.driver.info().capabilities.replayable_faults;
        if self.space.mode != Mode::Full || stays {
            home::send_home(self, other, va)?;
            return Ok(Look::Moved);
        }
        match self.peer_step(dev, other, room, va, ask.want)? {
            Step::Ended(look) => Ok(look),
            Step::Home(pages) => {
                home::send_pages_home(self, other, va, pages)?;
                Ok(Look::Moved)
            }
        }
    }

    fn peer_step(&self, dev: &Device, other: &Device, room: &mut Room, va: Va, want: Bits) -> Result<Step, Error> {
        let _hold = self.space.hold();
        let _ends = coherent::ends(self, other);
        let Some(block) = self.dir.get(va) else { return Ok(Step::Ended(Look::Moved)) };
        let mut state = block.lock();
        if state.device != other.id() {
            return Ok(Step::Ended(Look::Moved));
        }
        let kept = monitor::kept(self, &state, va) & state.resident();
        if state.mover != 0 || !(kept | state.bounced()).is_empty() {
            return Ok(Step::Ended(Look::Wait));
        }
        if coherent::leave(self, other, &mut state, va, Bits::ALL).is_err() {
            return Ok(Step::Ended(Look::Settle));
        }
        if dev.driver.info().capabilities.coherent {
            let shared = state.duplicated();
            if home::drop_duplicates(self, other, &mut state, va, shared).is_err() {
                return Ok(Step::Ended(Look::Settle));
            }
        }
        let all = state.resident();
        if all.is_empty() {
            return Ok(Step::Ended(Look::Moved)); // it was the device's until now
        }
        let beside = all - want;
        if !dev.driver.info().capabilities.replayable_faults && !dev.driver.info().capabilities.coherent && !beside.is_empty() {
            return Ok(Step::Home(beside));
        }
        let mut there = State::default();
        (there.device, there.mover) = (dev.id(), ON_THE_WAY);
        if ranges::take_frames(self, dev, &mut there, va, all).is_err() {
            return Ok(if beside.is_empty() { Step::Ended(Look::Full) } else { Step::Home(beside) });
        }
        ranges::unmap(self, other, &mut state, va, all);
        if let Err(e) = self.peer_copy(dev, other, room.list(), &state, &there, all) {
            self.release(dev, &mut there, all);
            let _ = ranges::map(self, other, &mut state, va, all); // else a device fault maps it
            return Err(e);
        }
        self.hand_over(dev, other, &mut state, &mut there, va, all);
        match ranges::map(self, dev, &mut state, va, all) {
            Err(Errno::AGAIN) if dev.driver.info().capabilities.coherent => Ok(Step::Ended(Look::Settle)),
            mapped => mapped.map(|()| Step::Ended(Look::Moved)).map_err(|e| dev.failed(e)),
        }
    }

    /// The block is `dev`'s, with the frames of `there`; those that it had are `other`'s own again.
    fn hand_over(&self, dev: &Device, other: &Device, state: &mut BlockGuard<'_>, there: &mut State, va: Va, all: Bits) {
        self.dir.swap_frames(state, there);
        other.mem.forget(&self.dir, va); // before it is on the other list
        state.device = dev.id();
        state.touches = 0;
        dev.mem.touch(&self.dir, va);
        self.release(other, there, all);
        count(&dev.counters.pages_between_devices, all.count());
    }

    /// Gives frames back that are no block's.
    fn release(&self, dev: &Device, frames: &mut State, pages: Bits) {
        if !frames.whole {
            pages.pages().for_each(|page| dev.mem.free_page(self.dir.frame(frames, page)));
        }
        if let Some(base) = self.dir.clear_frames(frames) {
            dev.mem.free_whole(base);
        }
    }

    /// Copies pages, which are in no device's page table, from the frames of `here` on `other` to those of `there` on `dev`.
    fn peer_copy(&self, dev: &Device, other: &Device, list: &mut [Dma], here: &State, there: &State, pages: Bits) -> Result<(), Error> {
        let bytes = pages.count() * PAGE;
        let first = pages.next(0).and_then(|page| other.driver.peek(self.dir.frame(here, page)));
        if dev.driver.info().capabilities.reads_peers && first.is_some() {
            let mut n = 0;
            ranges::frame_runs(self, here, pages, |run, frame| {
                let Some(at) = other.driver.peek(frame) else { return };
                n = self.list_run(list, n, DmaKind::ToDevice, there, run.clone(), |page| at + (page - run.start) * PAGE);
            });
            dev.driver.stand_by();
            self.batch(dev, &list[..n])?;
            count(&dev.counters.bytes_between_devices, bytes);
            return Ok(());
        }
        let size = if pages == Bits::ALL { Size::Huge } else { Size::Small };
        let tray = self.pool.take_full(&self.space, size, pages, 0);
        let way = |list: &mut [Dma], device: &Device, kind, frames: &State| {
            let n = pages.runs().fold(0, |n, run| self.list_run(list, n, kind, frames, run, |page| tray.slot(page)));
            device.driver.stand_by();
            self.batch(device, &list[..n])
        };
        let copied = way(list, other, DmaKind::ToHost, here).and_then(|()| way(list, dev, DmaKind::ToDevice, there));
        self.pool.put(tray);
        count(&other.counters.bytes_to_cpu, bytes);
        count(&dev.counters.bytes_to_device, bytes);
        copied
    }

    /// Adds a run of pages to a list of copies that has `n`: how many it has then.
    fn list_run(
        &self,
        list: &mut [Dma],
        mut n: usize,
        kind: DmaKind,
        frames: &State,
        run: Range<usize>,
        host: impl Fn(usize) -> usize,
    ) -> usize {
        ranges::frame_runs(self, frames, Bits::range(run), |part, frame: Frame| {
            list[n] = Dma { kind, host: host(part.start), frame, offset: 0, len: part.len() * PAGE };
            n += 1;
        });
        n
    }

    /// # Errors
    /// With the name of the device that fails.
    fn batch(&self, dev: &Device, list: &[Dma]) -> Result<(), Error> {
        dev.transfer(list).map_err(|e| dev.copy_failed(e))
    }
}
