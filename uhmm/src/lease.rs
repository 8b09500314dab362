//! Leases: memory that stays on a device for who launches there by himself.
#![allow(unsafe_code)] // a release whose caller keeps the memory as it is

use crate::Device;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use uhmm_core::args::{Args, RawArg};
use uhmm_core::kernel::{Entry, Grid, Kernel};
use uhmm_core::lease::LeaseId;
use uhmm_core::{DeviceRef, Error};

/// Memory that is resident on a device until this is released or dropped. Made by [`Device::acquire`].
///
/// The CPU may read what is only read under a lease. Its touch of what is written waits for the end; so does a launch, on any device, that needs what a released
/// lease has. Forgetting a lease keeps its memory from the CPU until the device is closed.
#[derive(Debug)]
pub struct Lease<'a> {
    pub(crate) dev: &'a Device,
    id: LeaseId,
    args: Args<'a>,
}

impl Device {
    /// Makes what the arguments declare resident, for who uses it on the device by himself: a queue of his own, a vendor's library.
    ///
    /// A [`run`](Self::run) is such a lease, a launch under it, and its release. What the arguments only [reach](Args::reaching) is nobody else's under the lease; a device that
    /// cannot fetch it gets copies for each [`Lease::run`], and none for who works there by himself.
    ///
    /// ```
    /// # fn main() -> Result<(), uhmm::Error> {
    /// use uhmm::{Uhmm, args, fence, inout};
    /// let hmm = Uhmm::new()?;
    /// let dev = hmm.device("soft")?;
    /// let mut data = vec![1u64; 1 << 16];
    /// let lease = dev.acquire(args![inout(&mut data)])?;
    /// let at = lease.addr(0) as *mut u64;
    /// // SAFETY: what is leased is resident at the device's address, and nobody else uses it until the lease ends.
    /// unsafe { *at += 1 };
    /// let (done, signal) = fence();
    /// // SAFETY: the vector stays, and nobody touches it before the signal.
    /// unsafe { lease.release(done) }; // whoever works there signals when he is done
    /// signal.done();
    /// assert_eq!(data[0], 2);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those that [`run`](Self::run) finds before its kernel starts; [`Error::Busy`] if a lease has what this one needs; [`Error::TooMany`]; a bare pointer
    /// declares nothing ([`Error::LeasedPointer`]).
    pub fn acquire<'a>(&'a self, args: Args<'a>) -> Result<Lease<'a>, Error> {
        let id = self.dev.acquire(&args)?;
        Ok(Lease { dev: self, id, args })
    }
}

impl Lease<'_> {
    /// Where the device has argument `index`: valid there until the lease ends. A device whose kernels know no addresses of the process (OpenCL) has it somewhere in a buffer of its own: there this is
    /// the process's address, [`opencl`](Self::opencl) says where in which buffer it is, and [`run`](Self::run) runs one of uhmm's kernels there.
    ///
    /// # Panics
    /// If there is no such argument, or it is a value.
    pub fn addr(&self, index: usize) -> usize {
        match *self.range(index).0 {
            RawArg::Slice { start, device: None, .. } => start ^ self.dev.info().mask,
            RawArg::Slice { start, .. } => start,
            RawArg::Value { .. } | RawArg::Pointer { .. } => unreachable!("it is a range"),
        }
    }

    /// An argument that has an address, and its bytes.
    ///
    /// # Panics
    /// If there is no such argument, or it is a value.
    pub(crate) fn range(&self, index: usize) -> (&RawArg, usize) {
        match self.args.raw().get(index) {
            Some(arg @ &RawArg::Slice { count, size, .. }) => (arg, count * size),
            Some(_) => panic!("argument {index} is a value: it has no address"),
            None => panic!("there is no argument {index}: the lease has {}", self.args.raw().len()),
        }
    }

    /// Runs a kernel over the leased arguments, and waits for its end. Nothing is moved before or after.
    ///
    /// # Errors
    /// [`Error::Grid`]; [`Error::Kernel`]: what it wrote until then stays.
    pub fn run<K: Kernel>(&self, kernel: &K, grid: impl Into<Grid>) -> Result<(), Error> {
        self.dev.dev.run_leased(Entry::new(kernel), grid.into(), &self.args)
    }

    /// Gives the memory back once `fence` is signalled, and returns at once. Until then the CPU's touch of a whole page of what is written waits, and so does its write to
    /// a whole page of what is read.
    ///
    /// # Safety
    /// The borrow of the memory ends here, its use on the device does not: until the fence is signalled the memory must stay allocated, and the CPU must not use those bytes of it
    /// that lie on the pages at its ends, which hold other data too (to align arrays to pages avoids them). In the lesser modes and on coherent devices that is so for all of its bytes, for there
    /// no touch waits.
    pub unsafe fn release(self, fence: Fence) {
        let mut state = fence.state();
        if !state.done
            && let Ok(dev) = self.dev.dev.again()
        {
            dev.will_release(self.id);
            state.leases.push((dev, self.id));
            core::mem::forget(self);
            return;
        }
        drop(state);
        fence.wait(); // then by dropping it
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.dev.dev.release(self.id);
    }
}

#[derive(Debug, Default)]
struct State {
    done: bool,
    leases: Vec<(DeviceRef, LeaseId)>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Tells when work that uhmm has not launched is done; see [`Lease::release`]. Its clones are one fence.
#[derive(Clone, Debug)]
pub struct Fence {
    shared: Arc<Shared>,
}

/// Signals a [`Fence`]. Dropping it does so too, so that nobody waits for who has gone.
#[derive(Debug)]
pub struct Signal {
    shared: Arc<Shared>,
}

/// A new fence and its signal.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// let (fence, signal) = uhmm::fence();
/// std::thread::spawn(move || signal.done()); // when the work is done
/// fence.wait();
/// assert!(fence.is_done());
/// # Ok(())
/// # }
/// ```
pub fn fence() -> (Fence, Signal) {
    let shared = Arc::new(Shared::default());
    (Fence { shared: shared.clone() }, Signal { shared })
}

impl Fence {
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was signalled.
    pub fn is_done(&self) -> bool {
        self.state().done
    }

    /// Waits until it is.
    pub fn wait(&self) {
        let mut state = self.state();
        while !state.done {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Signal {
    /// The work is done. Leases that were released with the fence end now: when this returns their memory is the CPU's again.
    pub fn done(self) {}
}

impl Drop for Signal {
    fn drop(&mut self) {
        let leases = {
            let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.done = true;
            core::mem::take(&mut state.leases)
        };
        self.shared.changed.notify_all();
        for (dev, id) in leases {
            dev.release(id);
        }
    }
}
