//! Launches that nobody waits for at once: [`scope`], in the manner of [`std::thread::scope`].
//!
//! A launch in a scope borrows its kernel and its arguments until the scope ends, and the scope ends when all of its launches have: so forgetting what a launch returned
//! costs nothing but its error, which the scope then returns.
//!
//! # Order
//! * Launches on one device run in the order in which they were left there. While one runs the next is prepared.
//! * Launches on two devices have no order, unless one [waits for](Queue::wait_for) the other's event.
//! * Launches that use the same bytes ([`Scope::lend`]), and one of which writes them, never run at the same time.
//!
//! Who uses it: programs, by way of the crate `uhmm`.
//!
//! ```
//! use uhmm_core::kernel::Ctx;
//! use uhmm_core::scope::scope;
//! use uhmm_core::{DeviceRef, Error, args};
//!
//! fn fill_then_sum(one: &DeviceRef, two: &DeviceRef, data: &mut [u32]) -> Result<(), Error> {
//!     let fill = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1024).fill(1);
//!     let sum = |ctx: &Ctx<'_>| assert!(ctx.inp::<u32>(0).iter().all(|n| *n == 1));
//!     let groups = data.len() / 1024;
//!     scope(|scope| {
//!         let data = scope.lend(data); // several launches use it, one after the other
//!         let filled = scope.launch(one, &fill, groups, args![data.out()]);
//!         let mut queue = scope.queue(two);
//!         queue.wait_for(&filled.event()); // an order between two devices
//!         queue.launch(&sum, 1, args![data.inp()]);
//!     }) // returns when both have ended
//! }
//! ```
#![allow(unsafe_code)] // leaves launches behind whose borrows outlive the scope

use crate::args::{Args, Lent};
use crate::core::DeviceRef;
use crate::error::Error;
use crate::kernel::{Entry, Grid, Kernel};
use bytemuck::Pod;
use core::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // an error's text is inline
enum State {
    Pending,
    Ended(Result<(), Error>),
    /// Ended, and whoever waited has its result.
    Told,
}

#[derive(Debug)]
struct Outcome {
    state: Mutex<State>,
    changed: Condvar,
}

impl Outcome {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, result: Result<(), Error>) {
        *self.state() = State::Ended(result);
        self.changed.notify_all();
    }

    fn ended(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        while matches!(*state, State::Pending) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn take(&self) -> Result<(), Error> {
        match core::mem::replace(&mut *self.ended(), State::Told) {
            State::Ended(result) => result,
            State::Pending | State::Told => Ok(()),
        }
    }
}

/// The end of a launch, for who waits for it; see [`Queue::wait_for`].
#[derive(Clone, Debug)]
pub struct Event {
    outcome: Arc<Outcome>,
}

impl Event {
    /// Whether the launch has ended, well or not.
    pub fn is_done(&self) -> bool {
        !matches!(*self.outcome.state(), State::Pending)
    }

    /// Waits until it has.
    pub fn wait(&self) {
        drop(self.outcome.ended());
    }
}

/// A launch that is under way. Dropping it waits for nothing.
#[derive(Debug)]
pub struct Launched<'scope> {
    outcome: Arc<Outcome>,
    scope: PhantomData<&'scope ()>,
}

impl Launched<'_> {
    /// Waits for the launch.
    ///
    /// # Errors
    /// Its error, which the scope then does not return any more.
    pub fn wait(self) -> Result<(), Error> {
        self.outcome.take()
    }

    /// Whether it has ended, well or not.
    pub fn is_done(&self) -> bool {
        self.event().is_done()
    }

    /// Its end, for who waits for it.
    pub fn event(&self) -> Event {
        Event { outcome: self.outcome.clone() }
    }
}

/// Where launches are made that may outlive the call that made them, but not the scope. See [`scope`].
#[derive(Debug)]
pub struct Scope<'scope, 'env: 'scope> {
    launches: Mutex<Vec<Arc<Outcome>>>,
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

/// Runs `f` with a scope in which launches can be made that are not waited for, and waits for all of them.
///
/// # Errors
/// The error of the first launch that failed and was not [waited for](Launched::wait).
///
/// # Panics
/// As `f`, once all launches have ended.
pub fn scope<'env, F, T>(f: F) -> Result<T, Error>
where
    F: for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> T,
{
    let scope = Scope { launches: Mutex::new(vec![]), scope: PhantomData, env: PhantomData };
    let result = catch_unwind(AssertUnwindSafe(|| f(&scope)));
    let launches = core::mem::take(&mut *scope.launches());
    // All of them, whatever becomes of the first: what they borrow goes when this returns.
    let ends: Vec<_> = launches.iter().map(|outcome| outcome.take()).collect();
    match result {
        Ok(value) => ends.into_iter().collect::<Result<(), Error>>().map(|()| value),
        Err(panic) => resume_unwind(panic),
    }
}

impl<'scope, 'env> Scope<'scope, 'env> {
    fn launches(&self) -> MutexGuard<'_, Vec<Arc<Outcome>>> {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `kernel` run on `dev`, after what was launched there before, and does not wait. Waits if very many launches are under way there.
    ///
    /// All errors come from [`Launched::wait`], or from the scope.
    pub fn launch<K: Kernel>(
        &'scope self,
        dev: &'scope impl AsRef<DeviceRef>,
        kernel: &'scope K,
        grid: impl Into<Grid>,
        args: Args<'scope>,
    ) -> Launched<'scope> {
        self.launch_after(dev.as_ref(), kernel, grid.into(), &args, vec![])
    }

    fn launch_after<K: Kernel>(
        &'scope self,
        dev: &'scope DeviceRef,
        kernel: &'scope K,
        grid: Grid,
        args: &Args<'scope>,
        events: Vec<Event>,
    ) -> Launched<'scope> {
        let outcome = Arc::new(Outcome { state: Mutex::new(State::Pending), changed: Condvar::new() });
        {
            let mut launches = self.launches();
            launches.retain(|outcome| !matches!(*outcome.state(), State::Told | State::Ended(Ok(()))));
            launches.push(outcome.clone());
        }
        let then = outcome.clone();
        // SAFETY: kernel, arguments and device are borrowed for `'scope`, which ends after `scope` has waited for the outcome: it is on the list.
        let left = unsafe {
            dev.leave_launch(Entry::new(kernel), grid, args, move || events.iter().for_each(Event::wait), move |result| then.set(result))
        };
        if let Err(e) = left {
            outcome.set(Err(e));
        }
        Launched { outcome, scope: PhantomData }
    }

    /// A queue of launches on one device.
    pub fn queue(&'scope self, dev: &'scope impl AsRef<DeviceRef>) -> Queue<'scope, 'env> {
        Queue { scope: self, dev: dev.as_ref(), events: vec![] }
    }

    /// Memory that several launches of this scope use, one after the other.
    pub fn lend<T: Pod>(&'scope self, data: &'scope mut [T]) -> Lent<'scope, T> {
        Lent::new(data)
    }
}

/// Launches on one device, in order, that can wait for those of others.
#[derive(Debug)]
pub struct Queue<'scope, 'env: 'scope> {
    scope: &'scope Scope<'scope, 'env>,
    dev: &'scope DeviceRef,
    events: Vec<Event>,
}

impl<'scope> Queue<'scope, '_> {
    /// As [`Scope::launch`], on the queue's device.
    pub fn launch<K: Kernel>(&mut self, kernel: &'scope K, grid: impl Into<Grid>, args: Args<'scope>) -> Launched<'scope> {
        let events = core::mem::take(&mut self.events);
        self.scope.launch_after(self.dev, kernel, grid.into(), &args, events)
    }

    /// The next launch of this queue, and so those after it, begins when the event has come.
    pub fn wait_for(&mut self, event: &Event) {
        self.events.push(event.clone());
    }
}
