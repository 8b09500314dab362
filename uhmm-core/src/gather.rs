//! What a launch reaches besides its arguments, on a device that cannot fetch it: copied into a piece of the device's memory before the kernel starts, and what is written back when it has
//! ended well ([`crate::reach`]).
//!
//! Bytes are copied one range after the other into a stage of uhmm's, and from there to the device in few large pieces; back in the same way, exactly the bytes that are declared as written.
//! The program's pages stay where they are and are never watched. A page that is on a device comes home at the first touch, as for any thread of the program: so no lock is held but
//! those that a running kernel is under as well, and that of the stage, which only the one launch takes whose turn it is.

#![allow(unsafe_code)] // guarded copies from and to the program

use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::Frame;
use crate::driver::{Dma, DmaKind};
use crate::error::Error;
use crate::own::OwnSlice;
use crate::place;
use crate::reach::{Reaches, Spot, gathers};
use crate::sync::*;
use uhmm_os::{BLOCK, Errno, PAGE, copy};

/// Bytes of the stage: many enough that a transfer costs little more than its bytes, few enough to stay in a cache.
const STAGE: usize = 1 << 20;

/// Where ranges pass between the program and the device.
#[derive(Debug, Default)]
pub(crate) struct Stage(Mutex<Option<OwnSlice<u8>>>);

/// A piece of the device's memory with what a launch reaches. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Gathered<'a> {
    dev: &'a Device,
    reaches: &'a Reaches,
    first: Frame,
    units: usize,
}

/// The units of device memory that a launch needs for what it reaches.
pub(crate) fn units(dev: &Device, reaches: &Reaches) -> usize {
    if gathers(dev) { reaches.bytes.div_ceil(BLOCK) } else { 0 }
}

/// Copies what a launch reaches to the device, if that is needed. It is the launch's turn, and it holds no lock that a fault could need.
///
/// # Errors
/// [`Error::NoRoom`]; [`Error::Gone`] with an address that cannot be read; those of the device.
pub(crate) fn gather<'a>(core: &Core, dev: &'a Device, reaches: &'a Reaches) -> Result<Option<Gathered<'a>>, Error> {
    let units = units(dev, reaches);
    if units == 0 {
        return Ok(None);
    }
    let first = loop {
        if let Ok(first) = dev.mem.take_units(&*dev.driver, units) {
            break first;
        }
        place::make_room(core, dev)?;
    };
    let gathered = Gathered { dev, reaches, first, units };
    for write in [false, true] {
        gathered.each_piece(write, |piece| piece.fill())?;
    }
    Ok(Some(gathered))
}

/// A part of the gathered memory that passes through the stage at once.
struct Piece<'a> {
    gathered: &'a Gathered<'a>,
    /// Ranges that have a part in it.
    spots: &'a [Spot],
    write: bool,
    start: usize,
    end: usize,
    stage: *mut u8,
}

impl Gathered<'_> {
    /// The device's address of its first byte.
    pub(crate) fn address(&self) -> usize {
        self.dev.driver.address(self.first)
    }

    /// Writes what the kernel has left in the ranges that are written to the program.
    ///
    /// # Errors
    /// The first of those that the device does not give ([`Error::Driver`]), or the program does not take ([`Error::Gone`]); the rest is written all the same.
    pub(crate) fn write_back(&self) -> Result<(), Error> {
        let mut result = Ok(());
        let each = self.each_piece(true, |piece| {
            if let Err(e) = piece.empty() {
                result = core::mem::replace(&mut result, Ok(())).and(Err(e));
            }
            Ok(())
        });
        each.and(result)
    }

    /// Calls `f` with one part of the ranges after the other: those that are written, or the others.
    fn each_piece(&self, write: bool, mut f: impl FnMut(&Piece<'_>) -> Result<(), Error>) -> Result<(), Error> {
        let end = if write { self.reaches.bytes } else { self.reaches.read };
        let mut start = if write { self.reaches.read.next_multiple_of(PAGE) } else { 0 };
        if start >= end {
            return Ok(());
        }
        let mut stage = self.dev.flights.stage.0.lock();
        if stage.is_none() {
            *stage = Some(OwnSlice::new(c"uhmm stage", STAGE).map_err(|e| Error::System("reserve address space", e))?);
        }
        let stage = stage.as_ref().map(|stage| stage.at(0)).ok_or(Error::System("reserve address space", Errno::NOMEM))?;
        let mut spots = self.reaches.spots();
        while start < end {
            let piece = Piece { gathered: self, spots, write, start, end: end.min(start + STAGE), stage };
            f(&piece)?;
            start = piece.end;
            // The others have had their turn.
            let done = spots.iter().take_while(|spot| spot.write != write || spot.offset + (spot.end - spot.start) <= start).count();
            spots = &spots[done..];
        }
        Ok(())
    }
}

impl Piece<'_> {
    /// Calls `f` with an address of the program, its place in the stage, and how many bytes.
    fn each(&self, mut f: impl FnMut(usize, *mut u8, usize)) {
        for spot in self.spots.iter().filter(|spot| spot.write == self.write) {
            if spot.offset >= self.end {
                return;
            }
            let (from, to) = (spot.offset.max(self.start), (spot.offset + (spot.end - spot.start)).min(self.end));
            if from < to {
                f(spot.start + (from - spot.offset), self.stage.wrapping_add(from - self.start), to - from);
            }
        }
    }

    fn transfer(&self, kind: DmaKind) -> Result<(), Error> {
        let Gathered { dev, first, .. } = *self.gathered;
        let (frame, len) = (first + (self.start / PAGE) as Frame, self.end - self.start);
        let dma = [Dma { kind, host: self.stage as usize, frame, offset: self.start % PAGE, len }];
        dev.transfer(&dma).map_err(|e| dev.copy_failed(e))
    }

    /// # Errors
    /// As [`gather`].
    fn fill(&self) -> Result<(), Error> {
        let mut bytes = 0;
        let mut gone = None;
        self.each(|va, stage, len| {
            if gone.is_none() {
                // SAFETY: the stage has room for the piece, and is ours; what cannot be read is an error, not a crash.
                gone = unsafe { copy::guarded(stage, va as *const u8, len) }.err();
            }
            bytes += len;
        });
        if let Some(address) = gone {
            return Err(Error::Gone { address });
        }
        count(&self.gathered.dev.counters.bytes_to_device, bytes);
        self.transfer(DmaKind::ToDevice)
    }

    /// # Errors
    /// As [`Gathered::write_back`].
    fn empty(&self) -> Result<(), Error> {
        self.transfer(DmaKind::ToHost)?;
        let mut bytes = 0;
        let mut gone = None;
        self.each(|va, stage, len| {
            // SAFETY: the launch has borrowed these bytes for writing; what was unmapped all the same is an error, not a crash.
            gone = gone.or(unsafe { copy::guarded(va as *mut u8, stage, len) }.err());
            bytes += len;
        });
        count(&self.gathered.dev.counters.bytes_to_cpu, bytes);
        gone.map_or(Ok(()), |address| Err(Error::Gone { address }))
    }
}

impl Drop for Gathered<'_> {
    fn drop(&mut self) {
        for unit in 0..self.units {
            self.dev.mem.free_whole(self.first + (unit * (BLOCK / PAGE)) as Frame);
        }
    }
}
