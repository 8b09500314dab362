//! A device around another one, that fails on order: what uhmm does with a device that fails is tested with it.
//!
//! ```no_run
//! use uhmm_core::{CoreRef, DeviceConfig};
//! use uhmm_faulty::{Call, Fault, order};
//!
//! # fn main() -> Result<(), uhmm_core::Error> {
//! let open = uhmm_faulty::around(uhmm_soft::open);
//! let dev = CoreRef::get()?.device(DeviceConfig::new("faulty"), open)?;
//! order(Call::ToHost, Fault::Failed, 3, 1); // the third batch from the device from now on fails, once
//! # Ok(())
//! # }
//! ```
//!
//! # Rules
//! * Without an order it is the other device, but for one thing: nobody reads its memory except by copies ([`Driver::peek`] says no, unless the device is coherent).
//! * A batch that fails has done the worst that the contract allows: what it should have written to uhmm's memory is garbage, what it should have written to the
//!   device is not written, and of what it should have written to the program the first half of each piece is.
//! * Lost is lost: every copy fails, no kernel runs, nothing is mapped. Taking pages out of the page table and freeing memory, which cannot fail, still happen.
//! * The orders are one for the process: there are few devices of this kind in a test. They lie in `.data`, for they are read on the fault path.
#![allow(unsafe_code)] // writes garbage into uhmm's own memory; a static in `.data`

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use core::time::Duration;
use std::time::Instant;
use uhmm_core::driver::{self, Committed, DeviceInfo, Dma, DmaError, DmaKind, Driver, Fence, Forward, Frame, KernelFault, Launch, MapRun};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::{DeviceConfig, Error, OpenDriver};
use uhmm_os::{Errno, thread};

/// A call of the driver that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A batch of copies that has a piece to the device.
    ToDevice,
    /// A batch of copies that has a piece from the device.
    ToHost,
    /// Making a unit of memory usable.
    Populate,
    /// Entering pages into the page table.
    Map,
    /// Running a kernel. It has run when the failure is told.
    Launch,
}

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// With EIO (memory: ENOMEM).
    Failed,
    /// The device is lost, from this call on.
    Lost,
    /// Its fence never comes. As [`Lost`](Self::Lost) where there is no fence.
    Never,
}

/// For ever, as the number of times.
pub const ALWAYS: u32 = u32::MAX;

struct Order {
    /// Calls that still go well.
    good: AtomicU32,
    /// Calls that fail after those.
    bad: AtomicU32,
    fault: AtomicU32,
}

struct Orders {
    of: [Order; 5],
    /// The driver that is wrapped next: an [`OpenDriver`]. Not 0, for a static of zeroes lies elsewhere.
    inner: AtomicUsize,
    /// The name of failures on order: where, and its length.
    name: [AtomicUsize; 2],
}

#[unsafe(link_section = ".data")]
static ORDERS: Orders = Orders {
    of: [const { Order { good: AtomicU32::new(0), bad: AtomicU32::new(0), fault: AtomicU32::new(0) } }; 5],
    inner: AtomicUsize::new(1),
    name: [const { AtomicUsize::new(0) }; 2],
};

/// What failures on order are called, as a device's own interface calls them ([`Driver::said`]); of a device that has failed so.
pub fn called(name: &'static str) {
    ORDERS.name[1].store(0, Ordering::SeqCst);
    ORDERS.name[0].store(name.as_ptr() as usize, Ordering::SeqCst);
    ORDERS.name[1].store(name.len(), Ordering::SeqCst);
}

fn name() -> Option<&'static str> {
    let [at, len] = [0, 1].map(|i| ORDERS.name[i].load(Ordering::SeqCst));
    // SAFETY: the parts of a string that lives for ever; `called` and failures come one after the other.
    (len > 0).then(|| unsafe { core::str::from_utf8_unchecked(core::slice::from_raw_parts(at as *const u8, len)) })
}

/// From now on the `nth` call (the first is number 1) fails, and those after it: `times` in all. It replaces an earlier order for that call.
pub fn order(call: Call, fault: Fault, nth: u32, times: u32) {
    let order = &ORDERS.of[call as usize];
    order.bad.store(0, Ordering::SeqCst);
    order.good.store(nth.max(1) - 1, Ordering::SeqCst);
    order.fault.store(fault as u32, Ordering::SeqCst);
    order.bad.store(times, Ordering::SeqCst);
}

/// Takes all orders back. A device that is lost stays so.
pub fn all_well() {
    ORDERS.of.iter().for_each(|order| order.bad.store(0, Ordering::SeqCst));
}

/// How many failures of a call are still to come.
///
/// ```
/// use uhmm_faulty::{ALWAYS, Call, Fault, all_well, order, outstanding};
///
/// order(Call::ToHost, Fault::Failed, 1, 2);
/// assert_eq!(outstanding(Call::ToHost), 2); // no device has failed yet
/// order(Call::Launch, Fault::Lost, 1, ALWAYS);
/// all_well();
/// assert_eq!(outstanding(Call::ToHost), 0);
/// ```
pub fn outstanding(call: Call) -> u32 {
    ORDERS.of[call as usize].bad.load(Ordering::SeqCst)
}

/// One call: how it fails, if it does.
fn strike(call: Call) -> Option<Fault> {
    let order = &ORDERS.of[call as usize];
    let less = |n: u32| (n > 0).then(|| if n == ALWAYS { n } else { n - 1 });
    if order.bad.load(Ordering::SeqCst) == 0 || order.good.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
        return None;
    }
    order.bad.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).ok()?;
    Some(match order.fault.load(Ordering::SeqCst) {
        0 => Fault::Failed,
        1 => Fault::Lost,
        _ => Fault::Never,
    })
}

/// What opens a device of this kind around those that `open` makes. The last call counts, for all devices that are opened later.
pub fn around(open: OpenDriver) -> OpenDriver {
    ORDERS.inner.store(open as usize, Ordering::SeqCst);
    open_around
}

fn open_around(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    // SAFETY: a function that `around`, which alone gives this one out, has left there.
    let open = unsafe { core::mem::transmute::<usize, OpenDriver>(ORDERS.inner.load(Ordering::SeqCst)) };
    let faulty = Faulty { inner: open(config, mode, others)?, lost: AtomicBool::new(false), failed: AtomicBool::new(false) };
    driver::boxed(c"uhmm faulty device", faulty).map_err(|e| config.refuse(format!("cannot reserve address space: {e}")))
}

/// The device.
#[derive(Debug)]
struct Faulty {
    inner: OwnBox<dyn Driver>,
    lost: AtomicBool,
    /// It has failed on order.
    failed: AtomicBool,
}

/// Fences of batches that the other device has not seen.
const FAILED: Fence = Fence(u64::MAX);
const NEVER: Fence = Fence(u64::MAX - 1);
const LOST: Fence = Fence(u64::MAX - 2);

impl Faulty {
    fn lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// One call: how it fails, if it does. A lost device fails all.
    fn strike(&self, call: Call) -> Option<Fault> {
        if self.lost() {
            return Some(Fault::Lost);
        }
        let fault = strike(call)?;
        self.failed.store(true, Ordering::SeqCst);
        if fault == Fault::Lost || (fault == Fault::Never && !matches!(call, Call::ToDevice | Call::ToHost)) {
            self.lost.store(true, Ordering::SeqCst);
        }
        Some(fault)
    }

    fn fails(&self, call: Call, errno: Errno) -> Result<(), Errno> {
        match self.strike(call) {
            None => Ok(()),
            Some(Fault::Failed) => Err(errno),
            Some(_) => Err(Errno::NODEV),
        }
    }
}

/// What a failed batch leaves in uhmm's memory, and in the program's.
fn garble(inner: &dyn Driver, batch: &[Dma], limit: Duration) {
    for dma in batch.iter().filter(|dma| dma.kind == DmaKind::ToHost) {
        // SAFETY: the batch would have written there.
        unsafe { (dma.host as *mut u8).write_bytes(0xdb, dma.len) };
    }
    for dma in batch.iter().filter(|dma| dma.kind == DmaKind::GuardedToHost) {
        let half = [Dma { len: dma.len / 2, ..*dma }];
        let _ = inner.wait(inner.copy(&half), &half, limit);
    }
}

// SAFETY: what the other device promises; nothing is done that it would not do.
unsafe impl Forward for Faulty {
    fn inner(&self) -> &dyn Driver {
        &*self.inner
    }

    fn populate(&self, unit: usize) -> Result<(), Errno> {
        self.fails(Call::Populate, Errno::NOMEM)?;
        self.inner.populate(unit)
    }

    fn peek(&self, frame: Frame) -> Option<usize> {
        if self.inner.info().capabilities.coherent { self.inner.peek(frame) } else { None }
    }

    fn copy(&self, batch: &[Dma]) -> Fence {
        let has = |to_host| batch.iter().any(|dma| matches!(dma.kind, DmaKind::ToHost | DmaKind::GuardedToHost) == to_host);
        let out = if has(false) { self.strike(Call::ToDevice) } else { None };
        match out.or_else(|| if has(true) { self.strike(Call::ToHost) } else { None }) {
            None => self.inner.copy(batch),
            Some(Fault::Failed) => FAILED,
            Some(Fault::Never) => NEVER,
            Some(Fault::Lost) => LOST,
        }
    }

    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        let error = match fence {
            FAILED => DmaError::Failed(Errno::IO),
            LOST => DmaError::Lost,
            NEVER => {
                let start = Instant::now();
                while start.elapsed() < limit {
                    thread::sleep_micros(1000);
                }
                self.lost.store(true, Ordering::SeqCst);
                DmaError::Lost
            }
            fence => return self.inner.wait(fence, batch, limit),
        };
        garble(&*self.inner, batch, limit);
        Err(error)
    }

    fn is_lost(&self) -> bool {
        self.lost()
    }

    fn said(&self) -> Option<&'static str> {
        if self.failed.load(Ordering::SeqCst) { name() } else { self.inner.said() }
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        self.fails(Call::Map, Errno::IO)?;
        self.inner.map(batch)
    }

    fn protect(&self, run: MapRun) -> Option<usize> {
        if self.lost() { None } else { self.inner.protect(run) }
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        if self.lost() {
            return Err(KernelFault::Lost);
        }
        let result = self.inner.launch(launch);
        match self.strike(Call::Launch) {
            None => result,
            Some(Fault::Failed) => Err(KernelFault::Device { source: Errno::IO }),
            Some(_) => Err(KernelFault::Lost),
        }
    }
}
