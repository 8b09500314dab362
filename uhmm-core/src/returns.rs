//! What of a launch's snapshots goes to the program when it ends, read by the device right behind the kernel.
//!
//! A page at the end of an argument is a snapshot on the device, of which exactly the argument's bytes are written to the program ([`crate::snapshot`]). They are few, and each wait for a copy can
//! cost more than all of them: so the driver is told of them with the launch ([`Reads`](crate::driver::Reads)), and what it has read lies in memory of uhmm's until the end of the launch looks
//! for it. What it has not read, or what has become of a page since, is copied then.

use crate::args::RawArg;
use crate::core::{Core, Device};
use crate::directory::Frame;
use crate::driver::{Dma, DmaKind};
use crate::flight::Flight;
use crate::launch::LARGE;
use crate::own::OwnSlice;
use crate::page::Va;
use crate::ranges;
use core::ops::Range;
use uhmm_os::{Errno, PAGE};

/// Pieces that are read behind a kernel: two for each argument.
const MOST: usize = 2 * crate::args::MAX_ARGS;

/// Bytes of each, at most.
const ROOM: usize = LARGE;

/// What is read behind one kernel.
#[derive(Debug)]
pub(crate) struct Returns {
    pieces: [Dma; MOST],
    count: usize,
    /// They have been read.
    done: bool,
    /// A room each.
    stage: OwnSlice<u8>,
}

impl Returns {
    /// Room for them.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let none = Dma { kind: DmaKind::ToHost, host: 0, frame: 0, offset: 0, len: 0 };
        Ok(Returns { pieces: [none; MOST], count: 0, done: false, stage: OwnSlice::new(c"uhmm returns", MOST * ROOM)? })
    }

    /// Notes what a launch that is about to run has snapshots of in `blocks`, as far as there is room.
    pub(crate) fn list(&mut self, core: &Core, dev: &Device, flight: &Flight, args: &[RawArg], blocks: &[Va]) {
        self.forget();
        for &va in blocks {
            let others = dev.flights.others(flight, va);
            let Some(block) = core.dir.get(va) else { continue };
            let state = block.lock();
            if state.device == dev.id() {
                ranges::frame_runs(core, &state, state.bounced() - others, |run, frame| {
                    declared(args, va, run, frame, &mut |dma| self.push(dma));
                });
            }
        }
    }

    fn push(&mut self, dma: Dma) {
        if self.count < MOST && dma.len <= ROOM {
            self.pieces[self.count] = Dma { kind: DmaKind::ToHost, host: self.stage.at(self.count * ROOM) as usize, ..dma };
            self.count += 1;
        }
    }

    /// What the driver is to read.
    pub(crate) fn pieces(&self) -> &[Dma] {
        &self.pieces[..self.count]
    }

    /// The driver has read all of it.
    pub(crate) fn are_done(&mut self) {
        self.done = true;
    }

    /// There is nothing, or nothing any more.
    pub(crate) fn forget(&mut self) {
        (self.count, self.done) = (0, false);
    }

    /// The bytes of a piece, if they have been read.
    pub(crate) fn of(&self, dma: &Dma) -> Option<&[u8]> {
        let same = |read: &Dma| (read.frame, read.offset, read.len) == (dma.frame, dma.offset, dma.len);
        let index = self.pieces().iter().position(same).filter(|_| self.done)?;
        Some(&self.stage[index * ROOM..][..dma.len])
    }
}

/// The bytes that written arguments cover of a run of pages of the block at `va`, which are in frames from `frame` on: the way to the program.
pub(crate) fn declared(args: &[RawArg], va: Va, run: Range<usize>, frame: Frame, f: &mut dyn FnMut(Dma)) {
    let (from, to) = (va + run.start * PAGE, va + run.end * PAGE);
    for (start, end, _) in args.iter().filter_map(RawArg::process_range).filter(|range| range.2.writes()) {
        let (start, end) = (start.max(from), end.min(to));
        if start < end {
            let at = start - from;
            let frame = frame + (at / PAGE) as Frame;
            f(Dma { kind: DmaKind::GuardedToHost, host: start, frame, offset: at % PAGE, len: end - start });
        }
    }
}
