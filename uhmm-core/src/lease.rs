//! Leases: memory stays resident on a device for somebody who launches there by himself.
//!
//! A lease is a flight without a launch (`flight`): prepared as a launch is, held until it is released, and finished as a launch is that went well. Who uses the
//! pages under it cannot fetch them again, so nothing but its end makes them leave.
//!
//! The assistant ends leases: the device's own threads may all be waiting for just that.
//!
//! Who uses it: runtimes that launch kernels by another way than uhmm's (`uhmm::Lease` is the safe form, for programs).
//!
//! ```
//! use uhmm_core::args::Args;
//! use uhmm_core::{DeviceRef, Error};
//!
//! fn with_resident(dev: &DeviceRef, args: &Args<'_>, launch: impl FnOnce()) -> Result<(), Error> {
//!     let lease = dev.acquire(args)?; // what is declared is on the device ...
//!     launch();
//!     dev.release(lease); // ... until here: what was written is the program's again
//!     Ok(())
//! }
//! ```

use crate::args::{Args, MAX_ARGS, RawArg};
use crate::beside;
use crate::check;
use crate::core::{Core, Device, DeviceRef};
use crate::driver::{Located, Native};
use crate::error::Error;
use crate::flight::{self, Flight, MAX_FLIGHTS, Purpose};
use crate::kernel::{Entry, Grid};
use crate::launch::{self, Request, try_take_off};
use crate::prepare::{Part, note_all, prepare};
use crate::process::MAX_DEVICES;
use crate::reach::Reaches;
use crate::snapshot;
use crate::sync::*;
use uhmm_os::Errno;

/// A lease of a device, for whoever keeps the device open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseId {
    index: usize,
    number: u64,
}

/// Leases that are to end. Its lock is a leaf.
#[derive(Debug)]
pub(crate) struct Ending {
    list: Mutex<([(usize, LeaseId); MAX_FLIGHTS * MAX_DEVICES], usize)>,
}

impl Default for Ending {
    fn default() -> Self {
        Ending { list: Mutex::new(([(0, LeaseId { index: 0, number: 0 }); MAX_FLIGHTS * MAX_DEVICES], 0)) }
    }
}

impl Ending {
    fn push(&self, device: usize, lease: LeaseId) {
        let mut list = self.list.lock();
        let count = list.1;
        // Each is here once: there are no more than have room.
        list.0[count] = (device, lease);
        list.1 += 1;
    }

    fn pop(&self) -> Option<(usize, LeaseId)> {
        let mut list = self.list.lock();
        list.1 = list.1.checked_sub(1)?;
        Some(list.0[list.1])
    }
}

/// The assistant's part: ends what is to end.
pub(crate) fn work(core: &Core) {
    while let Some((device, lease)) = core.ending.pop() {
        // Who asked waits, and keeps the device open.
        let dev = core.device(device);
        if let Some(flight) = dev.flights.claim(lease.index, lease.number) {
            let _turn = core.turns.join(device);
            finish(core, dev, &flight, true);
        }
    }
}

/// One attempt; `None`: something is in the way that will end.
fn acquire(core: &Core, dev: &Device, args: &[RawArg], reaches: Reaches) -> Result<Option<LeaseId>, Error> {
    core.space.settle();
    if let Some(index) = args.iter().position(|arg| matches!(arg, RawArg::Pointer { .. })) {
        return Err(Error::LeasedPointer { index });
    }
    check::launch(core, dev, Grid::from(1), args, &reaches)?;
    #[allow(unsafe_code)]
    // SAFETY: the ledger keeps the list until the flight has ended.
    let shared = unsafe { reaches.share(dev) };
    let Some((_turn, flight)) = try_take_off(core, dev, args, shared, Purpose::Lease)? else { return Ok(None) };
    let lease = LeaseId { index: flight.index, number: flight.number };
    let info = dev.driver.info();
    let mut reaches = Some(reaches);
    let prepared = (|| {
        let mut ledger = dev.flights.ledger(&flight, info.memory).map_err(|e| Error::System("reserve address space", e))?;
        let ledger = ledger.as_mut().ok_or(Error::System("reserve address space", Errno::NOMEM))?;
        ledger.args = [RawArg::NONE; MAX_ARGS];
        ledger.args[..args.len()].copy_from_slice(args);
        ledger.reaches = reaches.take().unwrap_or_default();
        if info.memory == 0 {
            return Ok(()); // it holds no data
        }
        let _prepare = core.prepare.lock();
        dev.full.store(false, Ordering::Relaxed);
        // A running kernel may be using what is shared.
        if !dev.flights.has_other_launch(&flight) {
            dev.shares.verify(core, dev);
        }
        prepare(core, dev, &flight, ledger, args, Part::All)
    })();
    if let Err(e) = prepared {
        finish(core, dev, &flight, false);
        return Err(e);
    }
    Ok(Some(lease))
}

/// Ends a lease, which is the caller's. Without `success` nothing is written to the program.
fn finish(core: &Core, dev: &Device, flight: &Flight, success: bool) {
    let mut reaches = Reaches::default();
    if let Ok(mut ledger) = dev.flights.ledger(flight, dev.driver.info().memory)
        && let Some(ledger) = ledger.as_mut()
    {
        reaches = core::mem::take(&mut ledger.reaches);
        let args = ledger.args;
        let _prepare = core.prepare.lock();
        note_all(core, dev, ledger, &args);
        // What cannot be written to was unmapped by who had leased it.
        let _ = launch::finish(core, dev, flight, ledger, &args, success);
    }
    flight::end(core, dev, flight);
    drop(reaches); // others have looked at it until now
}

/// Ends leases whose owners forgot them, when the device is closed. What they had declared may be somebody else's by now: nothing is written there.
pub(crate) fn abandon(core: &Core, dev: &Device) {
    while let Some(flight) = dev.flights.any_lease() {
        finish(core, dev, &flight, false);
    }
}

/// Runs a kernel under a lease: everything is there.
fn run(core: &Core, dev: &Device, request: &Request, number: u64) -> Result<(), Error> {
    let place = dev.line.place(number);
    let entrance = dev.entrance.place(number);
    let groups = request.grid.groups().filter(|&n| n > 0).ok_or(Error::Grid(request.grid.size))?;
    entrance.wait();
    let _turn = core.turns.enter(crate::line::Who::Device(dev.index()));
    drop(entrance);
    place.wait();
    {
        let _prepare = core.prepare.lock();
        beside::refresh(core, dev)?;
    }
    let result = launch::bare(core, dev, request, groups);
    let _prepare = core.prepare.lock();
    let ended = snapshot::finish_fetched(core, dev, &Flight::none(), result.is_ok());
    let ended = ended.and_then(|()| beside::finish(core, dev, result.is_ok()));
    result.and(ended.map_err(|e| dev.copy_failed(e)))
}

impl DeviceRef {
    /// Makes what the arguments declare resident, until [`release`](Self::release). What they borrow must stay borrowed until then. What they only
    /// [reach](Args::reaching) is nobody else's meanwhile, and is copied at each [run](Self::run_leased).
    ///
    /// # Errors
    /// Those of a launch before its kernel runs; [`Error::Busy`], [`Error::TooMany`], [`Error::LeasedPointer`].
    pub fn acquire(&self, args: &Args<'_>) -> Result<LeaseId, Error> {
        // Whoever waits does so here, and not on one of the device's threads, which have launches to run meanwhile.
        loop {
            let bell = self.core().flown.count();
            let reaches = Reaches::new(args.reaches(), args.raw(), &self.dev().flights.spare)?;
            if let Some(lease) = self.ask_beside(|core, dev| acquire(core, dev, args.raw(), reaches))? {
                return Ok(lease);
            }
            self.core().flown.wait(bell);
        }
    }

    /// Where an argument that is leased lies, in the terms of the interface that the device is driven by ([`native`](Self::native)), if it has any.
    pub fn locate(&self, arg: &RawArg) -> Option<Located> {
        self.dev().driver.locate(arg)
    }

    /// The interface that the device is driven by, if a program may use it beside uhmm.
    pub fn native(&self) -> Option<Native> {
        self.dev().driver.native()
    }

    /// The lease will end by itself soon: who needs its memory waits for that.
    pub fn will_release(&self, lease: LeaseId) {
        if self.is_ours() {
            self.dev().flights.released(lease.index, lease.number);
        }
    }

    /// Ends a lease, once: what was written under it is the program's again when this returns. In a forked child it does nothing, for there is no lease.
    pub fn release(&self, lease: LeaseId) {
        if !self.is_ours() {
            return;
        }
        let core = self.core();
        self.will_release(lease);
        core.ending.push(self.index(), lease);
        core.assist.nudge();
        loop {
            let bell = core.flown.count();
            if !self.dev().flights.is_under_way(lease.index, lease.number) {
                return;
            }
            core.flown.wait(bell);
        }
    }

    /// Runs a kernel over a lease's arguments, and waits for it.
    ///
    /// # Errors
    /// [`Error::Grid`], [`Error::Kernel`], [`Error::Reentrant`]; of what it reaches [`Error::Gone`], [`Error::NoRoom`].
    pub fn run_leased(&self, entry: Entry, grid: Grid, args: &Args<'_>) -> Result<(), Error> {
        let request = Request::new(self.dev(), entry, grid, args)?;
        self.ask_launch(move |core, dev, number| run(core, dev, &request, number))
    }
}
