//! One core per process, from its first user to its last, also if the process holds several copies of this crate (libraries that were each linked
//! with one).
//!
//! # Threads
//! * The *keeper* comes first. It gives itself a descriptor table of its own, opens uhmm's descriptors there, starts the others (which share
//!   the table), and does what must be done on such a thread.
//! * The *monitor* serves CPU faults and follows the program's mapping changes.
//! * The *assistant* takes part in preparing launches.
//! * The *prefetcher*, from the first prefetch in the background on, makes them.
//! * The *evictor*, once somebody asks for it, brings everything home before the action of a signal.
//! * Each device has two *queue* threads: one runs a launch while the other prepares the next, and whatever threads its driver starts.
//!
//! # How copies meet
//! Two pages at fixed addresses, which only uhmm uses. That the first is mapped means that somebody starts, joins or ends the core (a lock that needs
//! no memory to be shared beforehand). The second, looked at under that lock, exists while there is a core, and names it. Copies of another
//! version are told from ours by the identity of the core's type, and refused.
#![allow(unsafe_code)] // memory that is shared with threads until they are joined, and between copies of this crate

mod life;

use crate::core::{Core, Device, DeviceRef, Seat};
use crate::counters::Stats;
use crate::desk::Desk;
use crate::driver::{DeviceInfo, Driver};
use crate::error::Error;
use crate::evictor::{Evictor, Post};
use crate::line::Who;
use crate::mode::Mode;
use crate::own::{self, OwnBox};
use crate::prefetch;
use crate::sync::*;
use core::any::TypeId;
use core::time::Duration;
use life::{no_thread, open_device, start};
use uhmm_os::mem::{self, Prot, Reserve};
use uhmm_os::signal::Deferred;
use uhmm_os::thread::{self, Thread};
use uhmm_os::{Errno, PAGE};

/// Devices of one process.
pub const MAX_DEVICES: usize = 16;
/// Bytes of the stacks of uhmm's service threads.
///
/// What a device is made of passes over the keeper's, several times without optimisation.
const STACK: usize = 4 << 20;
/// Mapped while somebody starts, joins or ends the core.
const LOCK: usize = 0x2f00_0000_0000;
/// Mapped while there is a core.
const MEETING: usize = LOCK + PAGE;

/// Makes a driver, on the keeper. What it starts there shares uhmm's descriptors.
///
/// Examples: `uhmm_null::open`, and `open` in uhmm/examples/tiny_driver.rs.
pub type OpenDriver = fn(&DeviceConfig, Mode, &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error>;

/// How a device is to be opened.
///
/// ```
/// use core::time::Duration;
/// use uhmm_core::DeviceConfig;
///
/// let config = DeviceConfig { memory: 1 << 30, fence_limit: Duration::from_secs(2), ..DeviceConfig::new("gpu0") };
/// assert!(config.threads == 0 && config.replayable_faults); // the driver's defaults
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DeviceConfig {
    /// Its name.
    pub name: &'static str,
    /// Bytes of memory, or 0 for the driver's default.
    pub memory: usize,
    /// Worker threads, or 0 for the driver's default.
    pub threads: usize,
    /// Whether kernels may touch what their launch does not declare, if the driver leaves a choice.
    pub replayable_faults: bool,
    /// Whether the CPU uses the device's memory in place, if the driver leaves a choice.
    pub coherent: bool,
    /// How long a batch of copies (4 MiB at most, but for copies to and from buffers) may take. A device that has not finished by then counts as lost. What waits for the
    /// copies waits as long.
    pub fence_limit: Duration,
}

impl DeviceConfig {
    /// The default of [`fence_limit`](Self::fence_limit): some thousand times what a slow bus takes, and short enough that a person waits for it.
    pub const FENCE_LIMIT: Duration = Duration::from_secs(30);

    /// The driver's defaults, under a name.
    pub fn new(name: &'static str) -> Self {
        DeviceConfig { name, memory: 0, threads: 0, replayable_faults: true, coherent: false, fence_limit: Self::FENCE_LIMIT }
    }

    /// The error of a driver that cannot open such a device. `why` says what is wrong, and what to do.
    pub fn refuse(&self, why: impl Into<String>) -> Error {
        Error::Device { name: self.name.into(), why: why.into() }
    }
}

/// What stands in the meeting page: fixed in layout, for any version to read.
#[repr(C)]
struct Meeting {
    identity: [u64; 2],
    running: *mut Running,
}

/// The process's core and the threads that work for it.
struct Running {
    core: OwnBox<Core>,
    desk: OwnBox<Desk>,
    keeper: Thread,
    monitor: Thread,
    assistant: Thread,
    evictor: Option<Evictor>,
    prefetcher: Option<Thread>,
    queues: [Option<[Thread; 2]>; MAX_DEVICES],
    /// Users of the core, those of its devices included, and of each device.
    users: usize,
    device_users: [usize; MAX_DEVICES],
    /// Ends it: the code of the copy that has started it, for its signal handler is that copy's.
    end: fn(Running),
}

impl Running {
    fn has_unused(&self) -> bool {
        (0..MAX_DEVICES).any(|index| self.device_users[index] == 0 && self.queues[index].is_some())
    }

    /// Closes the devices that nobody uses any more. To be called alone, so that no launch runs anywhere.
    fn close_unused(&mut self) {
        for index in (0..MAX_DEVICES).filter(|&index| self.device_users[index] == 0) {
            let Some(queue) = self.queues[index].take() else { continue };
            self.core.device(index).desk().close();
            queue.into_iter().for_each(Thread::join);
            let core = &raw const *self.core as usize;
            // SAFETY: the keeper serves with (); the core outlives the question.
            unsafe { self.desk.ask(move |(): &()| (*(core as *const Core)).close_device(index)) };
        }
    }
}

/// The lock over the core's beginning and end, and over those of its devices.
pub(crate) struct Held;

pub(crate) fn lock() -> Result<Held, Error> {
    loop {
        match try_lock()? {
            Some(held) => return Ok(held),
            None => std::thread::sleep(core::time::Duration::from_micros(50)),
        }
    }
}

pub(crate) fn try_lock() -> Result<Option<Held>, Error> {
    match page(LOCK) {
        Ok(()) => Ok(Some(Held)),
        Err(Errno::EXIST) => Ok(None),
        Err(e) => Err(Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e)),
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: mapped by `lock`, and nobody reads it.
        let _ = unsafe { mem::munmap(LOCK, PAGE) };
    }
}

fn page(at: usize) -> Result<(), Errno> {
    let reserve = Reserve { hint: at, len: PAGE, align: PAGE, name: c"uhmm meeting", prot: Prot::ReadWrite, exact: true };
    mem::map(&reserve).map(|mapping| {
        mapping.into_raw();
    })
}

/// This copy's core type, as a number that differs between versions and compilers.
fn identity() -> [u64; 2] {
    const { assert!(size_of::<TypeId>() == 16) };
    // SAFETY: a TypeId is 16 bytes of plain data; only equality is asked of them.
    unsafe { core::mem::transmute::<TypeId, [u64; 2]>(TypeId::of::<Core>()) }
}

impl Held {
    /// The lock that this thread has taken before and given up the value of.
    pub(crate) fn again() -> Self {
        Held
    }

    /// Has the keeper of the running core do something. `None` if there is no core.
    pub(crate) fn ask_keeper<R: Send>(&self, job: impl FnOnce(&Core) -> R + Send) -> Option<R> {
        let running = self.running().ok().flatten()?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        let core = &raw const *running.core as usize;
        // SAFETY: the keeper serves with (); the core cannot end while the lock is held.
        unsafe { running.desk.ask(move |(): &()| job(&*(core as *const Core))) }
    }

    /// Where signal handlers wait for the evictor, which is started if there is none.
    pub(crate) fn evictor(&self) -> Result<&'static Post, Error> {
        let running = self.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        if running.evictor.is_none() {
            let at = &raw const *running.core as usize;
            // SAFETY: the keeper serves with (); the core is dropped after the evictor was joined, in `end`.
            let started = unsafe { running.desk.ask(move |(): &()| Evictor::start(&*(at as *const Core))) };
            running.evictor = Some(started.unwrap_or(Err(Errno::SRCH)).map_err(no_thread)?);
        }
        running.evictor.as_ref().map(Evictor::post).ok_or(Error::System("start a thread", Errno::SRCH))
    }

    /// Starts the thread that carries prefetches out, if there is none.
    pub(crate) fn start_prefetches(&self) -> Result<(), Error> {
        let running = self.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        if running.prefetcher.is_none() {
            let at = &raw const *running.core as usize;
            // SAFETY: the keeper serves with (); the core is dropped after the thread was joined, in `end`.
            let started = unsafe { running.desk.ask(move |(): &()| prefetch::start(&*(at as *const Core))) };
            running.prefetcher = Some(started.unwrap_or(Err(Errno::SRCH)).map_err(no_thread)?);
        }
        Ok(())
    }

    /// The running core, if there is one.
    fn running(&self) -> Result<Option<*mut Running>, Error> {
        match page(MEETING) {
            Ok(()) => {
                // There was none: the page was just made.
                // SAFETY: as `page` says; the lock is held.
                let _ = unsafe { mem::munmap(MEETING, PAGE) };
                Ok(None)
            }
            Err(Errno::EXIST) => {
                // SAFETY: whoever mapped the page wrote it before giving the lock back.
                let meeting = unsafe { (MEETING as *const Meeting).read() };
                if meeting.identity == identity() { Ok(Some(meeting.running)) } else { Err(Error::OtherVersion) }
            }
            Err(e) => Err(Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e)),
        }
    }

    fn publish(&self, running: OwnBox<Running>) -> Result<*mut Running, Error> {
        page(MEETING).map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
        let running = running.leak();
        // SAFETY: the page was just mapped; the lock is held.
        unsafe { (MEETING as *mut Meeting).write(Meeting { identity: identity(), running }) };
        Ok(running)
    }
}

/// A user's hold on the core. The core ends with the last one.
///
/// ```
/// use uhmm_core::{CoreRef, DeviceConfig, DeviceRef, Error, OpenDriver};
///
/// fn open_small(open: OpenDriver) -> Result<DeviceRef, Error> {
///     let core = CoreRef::get()?;
///     println!("mode: {}, devices: {}", core.mode().name(), core.devices().len());
///     core.device(DeviceConfig { memory: 16 << 20, ..DeviceConfig::new("small") }, open) // with a hold on the core of its own
/// }
/// ```
#[derive(Debug)]
pub struct CoreRef {
    core: *const Core,
    /// The process that it belongs to: a forked child inherits the value, not the core.
    process: u32,
}

// SAFETY: it is a counted reference to a core, which is Sync.
unsafe impl Send for CoreRef {}
// SAFETY: as above.
unsafe impl Sync for CoreRef {}

impl CoreRef {
    /// A hold on the process's core, which is started if there is none.
    ///
    /// # Errors
    /// [`Error::NoUserfaultfd`]; [`Error::System`] if threads or address space are refused; [`Error::OtherVersion`].
    pub fn get() -> Result<Self, Error> {
        let held = lock()?;
        let running = match held.running()? {
            Some(running) => running,
            None => {
                let running = OwnBox::new(c"uhmm process", start()?)
                    .map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
                held.publish(running)?
            }
        };
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        running.users += 1;
        Ok(CoreRef { core: &raw const *running.core, process: std::process::id() })
    }

    /// A hold on the process's core, if it has one.
    pub(crate) fn running() -> Option<Self> {
        let held = lock().ok()?;
        let running = held.running().ok().flatten()?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        running.users += 1;
        Some(CoreRef { core: &raw const *running.core, process: std::process::id() })
    }

    /// The hold on `core` that somebody had in this process, and gave up the value of without dropping it.
    pub(crate) fn kept(core: *const Core) -> Self {
        CoreRef { core, process: std::process::id() }
    }

    pub(crate) fn core(&self) -> &Core {
        assert!(self.is_ours(), "uhmm was opened by the parent of this process: open it again after a fork");
        // SAFETY: the core lives while it has a user, and this is one.
        unsafe { &*self.core }
    }

    /// A hold on one of the open devices, if there is any.
    ///
    /// # Errors
    /// [`Error::System`] if address space is refused.
    pub(crate) fn any_device(&self) -> Result<Option<DeviceRef>, Error> {
        let held = lock()?;
        let running = held.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        Ok((0..MAX_DEVICES).find(|&index| running.device_users[index] > 0).map(|index| {
            running.users += 1;
            running.device_users[index] += 1;
            DeviceRef::new(CoreRef { core: self.core, process: self.process }, index)
        }))
    }

    /// Another hold on the same core.
    ///
    /// # Errors
    /// [`Error::System`] if address space is refused.
    pub(crate) fn again(&self) -> Result<Self, Error> {
        let held = lock()?;
        let running = held.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        unsafe { (*running).users += 1 };
        Ok(CoreRef { core: self.core, process: self.process })
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }

    /// The device called `config.name`: the open one, as it was configured, or else a new one. Its hold on the core is its own.
    ///
    /// # Errors
    /// Those of the driver; [`Error::Device`] if there are too many.
    pub fn device(&self, config: DeviceConfig, open: OpenDriver) -> Result<DeviceRef, Error> {
        self.close_unused()?;
        let held = lock()?;
        let running = held.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        let found = self.find(config.name);
        let index = match found {
            Some(index) => index,
            None => {
                let at = self.core as usize;
                // SAFETY: the keeper serves with (); the core outlives the question.
                let opened = unsafe { running.desk.ask(move |(): &()| open_device(&*(at as *const Core), config, open)) };
                let (index, queue) = opened.unwrap_or(Err(Error::System("reach the keeper", Errno::SRCH)))?;
                running.queues[index] = Some(queue);
                index
            }
        };
        running.users += 1;
        running.device_users[index] += 1;
        Ok(DeviceRef::new(CoreRef { core: self.core, process: self.process }, index))
    }

    /// The open device called `name`, if there is one.
    ///
    /// # Errors
    /// [`Error::System`] if address space is refused.
    pub fn open_device(&self, name: &str) -> Result<Option<DeviceRef>, Error> {
        self.close_unused()?;
        let held = lock()?;
        let running = held.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        Ok(self.find(name).map(|index| {
            running.users += 1;
            running.device_users[index] += 1;
            DeviceRef::new(CoreRef { core: self.core, process: self.process }, index)
        }))
    }

    fn find(&self, name: &str) -> Option<usize> {
        let mut found = None;
        self.core().for_each_device(|dev| {
            if dev.driver.info().name == name {
                found = Some(dev.index());
            }
        });
        found
    }

    /// One user of device `index`, which has one, more.
    ///
    /// # Errors
    /// [`Error::System`] if address space is refused.
    pub(crate) fn enter_device(&self, index: usize) -> Result<DeviceRef, Error> {
        let held = lock()?;
        let running = held.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *running };
        running.users += 1;
        running.device_users[index] += 1;
        Ok(DeviceRef::new(CoreRef { core: self.core, process: self.process }, index))
    }

    /// One user of device `index` less. The last one closes it.
    pub(crate) fn leave_device(&self, index: usize) {
        if !self.is_ours() {
            return;
        }
        {
            let Ok(held) = lock() else { return };
            let Ok(Some(running)) = held.running() else { return };
            // SAFETY: the lock is held, so this is the only reference.
            unsafe { (&mut *running).device_users[index] -= 1 };
        }
        let _ = self.close_unused(); // else it goes with the next one
    }

    /// Closes the devices that nobody uses any more.
    ///
    /// Nobody waits for a launch while he holds the lock that its kernel may want, for a kernel may open and drop what it likes: so the turn comes first, and
    /// is given up again if the lock is not free. A kernel itself leaves this to the next one, for its own launch would be waited for.
    fn close_unused(&self) -> Result<(), Error> {
        let core = self.core();
        let mut asked = Some(lock()?);
        let mut no_launch = None;
        loop {
            if let Some(held) = asked.take() {
                let running = held.running()?.ok_or(Error::System("find the core", Errno::SRCH))?;
                // SAFETY: the lock is held, so this is the only reference.
                let running = unsafe { &mut *running };
                if !running.has_unused() || core.has_worker(thread::gettid()) {
                    return Ok(());
                }
                if no_launch.is_some() {
                    running.close_unused();
                    return Ok(());
                }
            } else {
                drop(no_launch.take());
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
            // A handler on this thread that waits for the evictor would wait for one that waits for this.
            let deferred = Deferred::new();
            no_launch = Some((core.turns.enter(Who::Alone), deferred));
            asked = try_lock()?;
        }
    }

    /// The open devices.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let mut all = vec![];
        self.core().for_each_device(|dev| all.push(dev.driver.info().clone()));
        all
    }

    /// What this process may do.
    pub fn mode(&self) -> Mode {
        self.core().space.mode
    }

    /// The counters of all devices, added up.
    pub fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        self.core().for_each_device(|dev| sum = sum + dev.counters.stats());
        sum
    }
}

impl Drop for CoreRef {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        let Ok(held) = lock() else { return };
        let Ok(Some(at)) = held.running() else { return };
        // SAFETY: the lock is held, so this is the only reference.
        let running = unsafe { &mut *at };
        running.users -= 1;
        if running.users == 0 {
            // SAFETY: mapped by `publish`; nobody reads it without the lock.
            let _ = unsafe { mem::munmap(MEETING, PAGE) };
            // SAFETY: leaked by `publish`, and its last user is going.
            let running = unsafe { OwnBox::reclaim(at) }.into_inner();
            (running.end)(running);
        }
    }
}
