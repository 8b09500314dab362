//! Which policies are in force: for the process, for devices, for ranges; and how they are asked.
//!
//! # Rules
//! * A policy that was set once stays where it is until the core ends, in memory that never migrates, so that whoever asks it needs no lock.
//! * What it answers is used by the mechanism as a wish only.
//! * A panic of a policy ends the process: there is nobody to unwind to, and the locks that are held guard half-made changes.
#![allow(unsafe_code)] // policies that stay until the core ends

use super::marks::{Marks, Said};
use super::*;
use crate::core::{Core, Device, DeviceRef};
use crate::directory::Block;
use crate::error::Error;
use crate::own::{OwnBox, OwnSlice, Zeroed};
use crate::process::{self, CoreRef, MAX_DEVICES};
use crate::sync::*;
use core::any::TypeId;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ops::Deref;
use uhmm_os::{Errno, system, thread};

/// The most policies that can be set while a process's core lives, replaced ones included. Types without a value of their own ([`Declared`]) count once, however often they are set.
pub const MOST_POLICIES: usize = 256;

/// A policy in its place.
struct Kept {
    policy: OwnBox<dyn Policy>,
    /// The type, if it has no value of its own.
    unit: Option<TypeId>,
}

/// A place for one.
struct Slot(UnsafeCell<MaybeUninit<Kept>>);

// SAFETY: whatever is there may be called uninitialised.
unsafe impl Zeroed for Slot {}

/// The policies of one process, and what is said about its memory.
pub(crate) struct Policies {
    /// The first `count` are there and stay as they are.
    kept: OwnSlice<Slot>,
    count: AtomicUsize,
    adding: Mutex<()>,
    /// The number of the process's policy.
    process: AtomicUsize,
    /// Numbers of devices' policies, plus 1; 0 for none.
    devices: [AtomicUsize; MAX_DEVICES],
    pub(crate) marks: Marks,
}

// SAFETY: an entry is written once, by who holds `adding`, before `count` says (Release, Acquire) that it may be read; policies are Send and Sync.
unsafe impl Sync for Policies {}
// SAFETY: it owns them.
unsafe impl Send for Policies {}

impl core::fmt::Debug for Policies {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Policies").field("count", &self.count).field("process", &self.process).finish_non_exhaustive()
    }
}

/// Aborts if it is dropped: whoever asks a policy forgets it when the answer has come.
struct NoPanic;

impl Drop for NoPanic {
    fn drop(&mut self) {
        uhmm_os::tasks::write_stderr(b"uhmm: a policy has panicked, where nobody can go on without its answer: stopping\n");
        std::process::abort();
    }
}

/// Asks a policy.
pub(super) fn ask<R>(question: impl FnOnce() -> R) -> R {
    let firm = NoPanic;
    let answer = question();
    core::mem::forget(firm);
    answer
}

impl Policies {
    /// [`Declared`] for everything.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let policies = Policies {
            kept: OwnSlice::new(c"uhmm policies", MOST_POLICIES)?,
            count: AtomicUsize::new(0),
            adding: Mutex::new(()),
            process: AtomicUsize::new(0),
            devices: [const { AtomicUsize::new(0) }; MAX_DEVICES],
            marks: Marks::new()?,
        };
        policies.add(Declared).map_err(|_| Errno::NOMEM)?;
        Ok(policies)
    }

    /// Keeps a policy: its number.
    fn add<P: Policy + 'static>(&self, policy: P) -> Result<usize, Error> {
        system::pin_library(<P as Policy>::evict as fn(&P, &Pressure<'_>) -> usize as usize);
        let unit = (size_of::<P>() == 0).then(TypeId::of::<P>);
        let _adding = self.adding.lock();
        let count = self.count.load(Ordering::Relaxed);
        let known = (0..count).find(|&number| unit.is_some() && self.kept(number).unit == unit);
        if let Some(number) = known {
            return Ok(number);
        }
        if count == MOST_POLICIES {
            return Err(Error::TooManyPolicies { most: MOST_POLICIES });
        }
        let policy = OwnBox::new(c"uhmm policy", policy)
            .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?
            .unsize(|p| p as *mut dyn Policy);
        // SAFETY: nobody reads the entry yet, and nobody else writes one.
        unsafe { (*self.kept[count].0.get()).write(Kept { policy, unit }) };
        self.count.store(count + 1, Ordering::Release);
        Ok(count)
    }

    fn kept(&self, number: usize) -> &Kept {
        assert!(number < self.count.load(Ordering::Acquire), "no policy {number}");
        // SAFETY: written by `add` before it was counted, and as it was since.
        unsafe { (*self.kept[number].0.get()).assume_init_ref() }
    }

    /// The policy of a device, or the process's.
    pub(super) fn of_device(&self, device: u32) -> &dyn Policy {
        let own = device.checked_sub(1).and_then(|index| self.devices.get(index as usize)).map_or(0, |own| own.load(Ordering::Acquire));
        let number = own.checked_sub(1).unwrap_or_else(|| self.process.load(Ordering::Acquire));
        &*self.kept(number).policy
    }

    /// The policy for memory of which this is said.
    pub(super) fn of(&self, said: Said, device: u32) -> &dyn Policy {
        match said.policy.checked_sub(1) {
            Some(number) => &*self.kept(number as usize).policy,
            None => self.of_device(device),
        }
    }

    /// A device is closed: its number may be another's soon.
    pub(crate) fn forget_device(&self, device: u32) {
        if let Some(own) = self.devices.get(device as usize - 1) {
            own.store(0, Ordering::Release);
        }
        self.marks.change_all(|said| Said { advice: said.advice.without(device), ..said });
    }
}

impl Drop for Policies {
    fn drop(&mut self) {
        for number in 0..*self.count.get_mut() {
            // SAFETY: written by `add`, and dropped once.
            unsafe { (*self.kept[number].0.get()).assume_init_drop() };
        }
    }
}

/// A policy that was set: the value in its place, to read what it has recorded or to change what it looks at.
///
/// It is a hold on the process's core, and on no more: another policy may have taken the place of this one since.
#[derive(Debug)]
pub struct InForce<P> {
    policy: *const P,
    _core: CoreRef,
}

// SAFETY: it is a reference to a value that stays as long as the core, and a hold on that.
unsafe impl<P: Sync> Send for InForce<P> {}
// SAFETY: as above.
unsafe impl<P: Sync> Sync for InForce<P> {}

impl<P> Deref for InForce<P> {
    type Target = P;

    fn deref(&self) -> &P {
        // SAFETY: a policy is kept until the core ends.
        unsafe { &*self.policy }
    }
}

impl CoreRef {
    /// Sets the policy of the process, for whatever has no policy of its own.
    ///
    /// # Errors
    /// [`Error::TooManyPolicies`]; [`Error::Reentrant`] from a kernel.
    pub fn set_policy<P: Policy + 'static>(&self, policy: P) -> Result<InForce<P>, Error> {
        self.add_policy(policy, |core, number| {
            core.policies.process.store(number, Ordering::Release);
            core.for_each_device(Device::changed);
            Ok(())
        })
    }

    /// Sets the policy of the whole pages of a byte range, as long as they are mapped. It goes with them if they are moved (mremap), and is asked before those of the device and the process.
    /// Memory that cannot move has none.
    ///
    /// ```
    /// use uhmm_core::policy::{Advice, NeverMigrate, OnDemand};
    /// use uhmm_core::{CoreRef, DeviceRef, Error};
    ///
    /// fn decide(core: &CoreRef, dev: &DeviceRef, table: &[u64], log: &[u8]) -> Result<(), Error> {
    ///     let range = |start: *const u8, bytes| (start as usize, start as usize + bytes);
    ///     let (start, end) = range(table.as_ptr().cast(), size_of_val(table));
    ///     core.set_policy_for(start, end, OnDemand)?; // asked first, for the table
    ///     dev.set_policy(NeverMigrate)?; // then this one, for all else on this device
    ///     let (start, end) = range(log.as_ptr(), log.len());
    ///     core.advise(start, end, Advice::WillNotNeed) // policies see it
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::TooManyPolicies`], [`Error::TooManyRanges`]; [`Error::Reentrant`] from a kernel.
    pub fn set_policy_for<P: Policy + 'static>(&self, start: Va, end: Va, policy: P) -> Result<InForce<P>, Error> {
        self.add_policy(policy, |core, number| {
            let policy = number as u32 + 1;
            self.on_queue(core, move |core| crate::advice::say(core, start, end, |said| Said { policy, ..said }))
        })
    }

    /// Says something about the whole pages of a byte range: see [`Advice`]. It holds as long as they are mapped, and goes with them if they are moved (mremap). Memory that cannot move needs no advice and
    /// takes none, nor does any in the modes in which nothing stays on a device.
    ///
    /// # Errors
    /// [`Error::TooManyRanges`]; [`Error::Reentrant`] from a kernel.
    pub fn advise(&self, start: Va, end: Va, advice: Advice) -> Result<(), Error> {
        self.on_queue(self.core(), move |core| crate::advice::advise(core, start, end, advice))
    }

    pub(crate) fn add_policy<P: Policy + 'static>(
        &self,
        policy: P,
        set: impl FnOnce(&Core, usize) -> Result<(), Error>,
    ) -> Result<InForce<P>, Error> {
        let core = self.core();
        if core.has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        let number = core.policies.add(policy)?;
        set(core, number)?;
        let policy = core::ptr::from_ref(&*self.core().policies.kept(number).policy).cast::<P>();
        Ok(InForce { policy, _core: self.again()? })
    }

    /// Does something on a thread that has uhmm's descriptors, between two launches of a device; or, if there is no device, on the keeper.
    fn on_queue<R: Send>(&self, core: &Core, job: impl FnOnce(&Core) -> Result<R, Error> + Send) -> Result<R, Error> {
        if core.has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        match self.any_device()? {
            Some(device) => device.ask(move |core, _| job(core)),
            None => process::lock()?.ask_keeper(job).ok_or(Error::System("reach the keeper", Errno::SRCH))?,
        }
    }
}

impl DeviceRef {
    /// Sets the policy of this device, as long as it is open. It is asked before the process's.
    ///
    /// # Errors
    /// As [`CoreRef::set_policy`].
    pub fn set_policy<P: Policy + 'static>(&self, policy: P) -> Result<InForce<P>, Error> {
        let device = self.id();
        self.hold().add_policy(policy, move |core, number| {
            core.policies.devices[device as usize - 1].store(number + 1, Ordering::Release);
            core.for_each_device(Device::changed);
            Ok(())
        })
    }
}

/// Makes a block the one that leaves a full device last, or no longer that.
pub(crate) fn pin(block: &Block, last: bool) {
    block.last.store(last, Ordering::Relaxed);
}
