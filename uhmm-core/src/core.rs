//! The core: one per process, shared by everything that uses uhmm there, from its first user to its last.
//!
//! # Threads
//! * The *keeper* comes first. It gives itself a descriptor table of its own, opens uhmm's descriptors there, starts the others (which share
//!   the table), and does what must be done on such a thread.
//! * The *monitor* serves CPU faults and follows the program's mapping changes ([`crate::monitor`]).
//! * Each device has a *queue* thread that runs its launches, and whatever threads its driver starts.
//!
//! Threads of the program never use uhmm's descriptors; they leave work at a [`Desk`].
#![allow(unsafe_code)] // one pointer for the signal handler, and memory that is shared with threads until they are joined

use crate::bits::Bits;
use crate::counters::{Counters, Stats};
use crate::desk::Desk;
use crate::device_fault;
use crate::devmem::DeviceMemory;
use crate::directory::{Directory, Frame};
use crate::driver::{DeviceInfo, Dma, Driver};
use crate::error::Error;
use crate::home;
use crate::kernel::{Args, Entry, Grid, MAX_ARGS, RawArg};
use crate::launch::{self, Ledger, Request};
use crate::migrate::Batch;
use crate::monitor::Monitor;
use crate::own::OwnBox;
use crate::page::Span;
use crate::policy::{Declared, Policy};
use crate::pool::Pool;
use crate::space::Space;
use crate::sync::*;
use uhmm_os::thread::{self, Thread};
use uhmm_os::{BLOCK, Errno, EventFd, PAGE, signal, system};

/// Devices of one process.
pub const MAX_DEVICES: usize = 16;
/// Migrations that can be at work at once without waiting for room.
const BATCHES: usize = 16;
/// Bytes of the stacks of uhmm's threads.
pub const STACK: usize = 256 << 10;

/// The core that signal handlers work for. It points to itself when there is none: a static of zeros would lie in memory that can migrate.
static CURRENT: AtomicUsize = AtomicUsize::new(NONE);
const NONE: usize = 1;

/// The core, if there is one.
pub(crate) fn current() -> Option<&'static Core> {
    let at = CURRENT.load(Ordering::Acquire);
    // SAFETY: it is set once the core is complete, and cleared before the core's threads end; those are its readers.
    (at != NONE).then(|| unsafe { &*(at as *const Core) })
}

/// The mechanism of one process.
#[derive(Debug)]
pub struct Core {
    pub(crate) space: Space,
    pub(crate) dir: Directory,
    pub(crate) pool: Pool,
    pub(crate) policy: OwnBox<dyn Policy>,
    pub(crate) prepare: Mutex<()>,
    devices: [AtomicUsize; MAX_DEVICES],
    batches: OwnBox<[Mutex<Batch>; BATCHES]>,
    next_mover: AtomicU32,
    next_launch: AtomicU64,
    stop: EventFd,
}

/// One device of the core.
#[derive(Debug)]
pub struct Device {
    index: usize,
    pub(crate) driver: OwnBox<dyn Driver>,
    pub(crate) mem: DeviceMemory,
    pub(crate) counters: Counters,
    pub(crate) ledger: Mutex<Ledger>,
    /// Raised by every change of the device's page table.
    pub(crate) changes: AtomicU64,
    pin: AtomicU64,
    allocated: AtomicUsize,
    desk: Desk,
}

/// Both, as the work on a device's queue sees them.
#[derive(Debug)]
struct Seat<'a> {
    core: &'a Core,
    dev: &'a Device,
}

impl Core {
    /// On the keeper.
    fn new() -> Result<Self, Error> {
        let reserve = |e| Error::System("reserve address space", e);
        let memory = system::total_memory() as usize;
        let blocks = memory / BLOCK;
        let space = Space::open()?;
        let pool = Pool::new(&space, blocks.max(64), memory / 8 / PAGE)?;
        let batch = || Batch::new().map(Mutex::new);
        let mut made = Vec::with_capacity(BATCHES);
        for _ in 0..BATCHES {
            made.push(batch().map_err(reserve)?);
        }
        let batches: [Mutex<Batch>; BATCHES] = made.try_into().map_err(|_| Error::System("reserve address space", Errno::NOMEM))?;
        Ok(Core {
            dir: Directory::new((2 * blocks).max(1024)).map_err(reserve)?,
            pool,
            policy: OwnBox::new(c"uhmm policy", Declared).map_err(reserve)?.unsize(|p| p as *mut dyn Policy),
            prepare: Mutex::new(()),
            devices: [const { AtomicUsize::new(0) }; MAX_DEVICES],
            batches: OwnBox::new(c"uhmm batches", batches).map_err(reserve)?,
            next_mover: AtomicU32::new(1),
            next_launch: AtomicU64::new(1),
            stop: EventFd::new().map_err(|e| Error::System("open an eventfd", e))?,
            space,
        })
    }

    /// Device number `index`.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn device(&self, index: usize) -> &Device {
        let at = self.devices[index].load(Ordering::Acquire);
        assert!(at != 0, "no device {index}");
        // SAFETY: set to a whole device that stays until the core goes.
        unsafe { &*(at as *const Device) }
    }

    /// Calls `f` for every open device.
    pub(crate) fn for_each_device(&self, mut f: impl FnMut(&Device)) {
        for slot in &self.devices {
            let at = slot.load(Ordering::Acquire);
            // SAFETY: as in `device`.
            if let Some(dev) = unsafe { (at as *const Device).as_ref() } {
                f(dev);
            }
        }
    }

    /// Room for a batch. A thread has at most one.
    pub(crate) fn batch(&self) -> MutexGuard<'_, Batch> {
        let free = self.batches.iter().find_map(|batch| batch.try_lock());
        free.unwrap_or_else(|| self.batches[thread::gettid() as usize % BATCHES].lock())
    }

    pub(crate) fn next_mover(&self) -> u32 {
        loop {
            let id = self.next_mover.fetch_add(1, Ordering::Relaxed);
            if id != 0 {
                return id;
            }
        }
    }

    pub(crate) fn next_launch(&self) -> u64 {
        self.next_launch.fetch_add(1, Ordering::Relaxed)
    }

    /// Brings everything home that any device has.
    fn evict_all(&self) {
        self.for_each_device(|dev| {
            while let Some(va) = dev.mem.oldest(&self.dir, |_| true) {
                if home::send_home(self, dev, va).is_err() {
                    return;
                }
            }
        });
    }
}

impl Device {
    /// Its number plus 1.
    pub(crate) fn id(&self) -> u32 {
        self.index as u32 + 1
    }

    /// The launch whose blocks must stay.
    pub(crate) fn pin(&self) -> u64 {
        self.pin.load(Ordering::Relaxed)
    }

    pub(crate) fn set_pin(&self, launch: u64) {
        self.pin.store(launch, Ordering::Relaxed);
    }

    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Bytes that the program has allocated on the device itself.
    pub(crate) fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    pub(crate) fn failed(&self, source: Errno) -> Error {
        Error::Driver { device: self.driver.info().name, source }
    }
}

/// Makes a driver, on the keeper. What it starts there shares uhmm's descriptors.
pub type OpenDriver = fn(&DeviceConfig) -> Result<OwnBox<dyn Driver>, Error>;

/// How a device is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct DeviceConfig {
    /// Its name.
    pub name: &'static str,
    /// Bytes of memory, or 0 for the driver's default.
    pub memory: usize,
    /// Worker threads, or 0 for the driver's default.
    pub threads: usize,
}

/// The process's core and the threads that work for it.
struct Running {
    core: OwnBox<Core>,
    desk: OwnBox<Desk>,
    keeper: Thread,
    queues: Vec<Thread>,
    monitor: Thread,
    users: usize,
}

/// The running core. Taken only by threads of the program, when a user comes or goes or opens a device.
static RUNNING: std::sync::Mutex<Option<Running>> = std::sync::Mutex::new(None);

/// A user's hold on the core. The core ends with the last one.
#[derive(Debug)]
pub struct CoreRef {
    core: *const Core,
}

// SAFETY: it is a counted reference to a core, which is Sync.
unsafe impl Send for CoreRef {}
// SAFETY: as above.
unsafe impl Sync for CoreRef {}

fn lock() -> std::sync::MutexGuard<'static, Option<Running>> {
    RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl CoreRef {
    /// A hold on the process's core, which is started if there is none.
    ///
    /// # Errors
    /// [`Error::NoUserfaultfd`]; [`Error::System`] if threads or address space are refused.
    pub fn get() -> Result<Self, Error> {
        let mut running = lock();
        let running = match running.as_mut() {
            Some(running) => running,
            None => running.insert(start()?),
        };
        running.users += 1;
        Ok(CoreRef { core: &raw const *running.core })
    }

    fn core(&self) -> &Core {
        // SAFETY: the core lives while it has a user, and this is one.
        unsafe { &*self.core }
    }

    /// The device called `config.name`: the open one, or else a new one. Its hold on the core is its own.
    ///
    /// # Errors
    /// Those of the driver; [`Error::Device`] if there are too many.
    pub fn device(&self, config: DeviceConfig, open: OpenDriver) -> Result<DeviceRef, Error> {
        let mut guard = lock();
        let running = guard.as_mut().ok_or(Error::System("find the core", Errno::SRCH))?;
        let core = self.core();
        let mut found = None;
        core.for_each_device(|dev| {
            if dev.driver.info().name == config.name {
                found = Some(dev.index);
            }
        });
        let index = match found {
            Some(index) => index,
            None => {
                // SAFETY: the keeper serves with (); see `keep`.
                let opened = unsafe { running.desk.ask(move |(): &()| open_device(config, open)) };
                let (index, queue) = opened.unwrap_or(Err(Error::System("reach the keeper", Errno::SRCH)))?;
                running.queues.push(queue);
                index
            }
        };
        running.users += 1;
        Ok(DeviceRef { hold: CoreRef { core: self.core }, index })
    }

    /// The open devices.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let mut all = vec![];
        self.core().for_each_device(|dev| all.push(dev.driver.info().clone()));
        all
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
        let mut running = lock();
        if let Some(r) = running.as_mut() {
            r.users -= 1;
            if r.users == 0
                && let Some(last) = running.take()
            {
                end(last);
            }
        }
    }
}

/// Starts the keeper, which starts the rest.
fn start() -> Result<Running, Error> {
    let threads = |e| Error::System("start a thread", e);
    let desk = OwnBox::new(c"uhmm desk", Desk::new()).map_err(|e| Error::System("reserve address space", e))?;
    /// # Safety
    /// The argument is a `&Desk` that outlives the thread.
    unsafe extern "C" fn keep(desk: *mut ()) {
        // SAFETY: by the contract.
        let desk = unsafe { &*desk.cast::<Desk>() };
        desk.serve(&());
    }
    // SAFETY: the desk is joined before it is dropped, in `end` or below.
    let keeper = unsafe { thread::spawn(c"uhmm-keeper", STACK, keep, (&raw const *desk).cast_mut().cast()) }.map_err(threads)?;
    // SAFETY: the keeper serves with ().
    let started = unsafe { desk.ask(|(): &()| start_core()) }.unwrap_or(Err(Error::System("reach the keeper", Errno::SRCH)));
    match started {
        Ok((core, monitor)) => Ok(Running { core, desk, keeper, queues: vec![], monitor, users: 0 }),
        Err(e) => {
            desk.close();
            keeper.join();
            Err(e)
        }
    }
}

/// On the keeper.
fn start_core() -> Result<(OwnBox<Core>, Thread), Error> {
    thread::unshare_files().map_err(|e| Error::System("get a descriptor table of its own", e))?;
    let core = OwnBox::new(c"uhmm core", Core::new()?).map_err(|e| Error::System("reserve address space", e))?;
    /// # Safety
    /// The argument is a `&Core` that outlives the thread.
    unsafe extern "C" fn monitor(core: *mut ()) {
        // SAFETY: by the contract.
        let core = unsafe { &*core.cast::<Core>() };
        Monitor::new().run(core, &core.stop);
    }
    let argument = (&raw const *core).cast_mut().cast();
    // SAFETY: the core is dropped after the monitor was joined, in `end`.
    let monitor = unsafe { thread::spawn(c"uhmm-monitor", STACK, monitor, argument) }.map_err(|e| Error::System("start a thread", e))?;
    CURRENT.store(&raw const *core as usize, Ordering::Release);
    if let Err(e) = signal::install(device_fault::on_signal) {
        CURRENT.store(NONE, Ordering::Release);
        let _ = core.stop.signal();
        monitor.join();
        return Err(Error::System("install a signal handler", e));
    }
    Ok((core, monitor))
}

/// On the keeper: opens a device and starts its queue.
fn open_device(config: DeviceConfig, open: OpenDriver) -> Result<(usize, Thread), Error> {
    let core = current().ok_or(Error::System("find the core", Errno::SRCH))?;
    let reserve = |e| Error::System("reserve address space", e);
    let Some(index) = core.devices.iter().position(|slot| slot.load(Ordering::Relaxed) == 0) else {
        return Err(Error::Device { name: config.name.into(), why: format!("there are {MAX_DEVICES} already") });
    };
    let driver = open(&config)?;
    let memory = driver.info().memory;
    let dev = Device {
        index,
        driver,
        mem: DeviceMemory::new(memory).map_err(reserve)?,
        counters: Counters::default(),
        ledger: Mutex::new(Ledger::new(memory).map_err(reserve)?),
        changes: AtomicU64::new(0),
        pin: AtomicU64::new(0),
        allocated: AtomicUsize::new(0),
        desk: Desk::new(),
    };
    // The box itself is kept in front of the device, for `end` to take it out again.
    let holder = OwnBox::new(c"uhmm device", dev).map_err(reserve)?;
    let at = &raw const *holder;
    /// # Safety
    /// The argument is a `&Device` that outlives the thread.
    unsafe extern "C" fn queue(dev: *mut ()) {
        // SAFETY: by the contract.
        let dev = unsafe { &*dev.cast::<Device>() };
        let Some(core) = current() else { return };
        dev.desk.serve(&Seat { core, dev });
    }
    // SAFETY: the device is dropped after its queue was joined, in `end`.
    let thread = unsafe { thread::spawn(c"uhmm-queue", STACK, queue, at.cast_mut().cast()) }.map_err(|e| Error::System("start a thread", e))?;
    core.devices[index].store(at as usize, Ordering::Release);
    holder.leak();
    Ok((index, thread))
}

/// Everything comes home, threads end, memory goes.
fn end(running: Running) {
    let Running { core, desk, keeper, queues, monitor, .. } = running;
    core.for_each_device(|dev| dev.desk.close());
    queues.into_iter().for_each(Thread::join);
    // SAFETY: the keeper serves with (). Bringing pages home needs uhmm's descriptors.
    unsafe {
        desk.ask(|(): &()| {
            if let Some(core) = current() {
                core.evict_all();
            }
        })
    };
    signal::uninstall();
    // Devices end while the monitor still serves: drivers may touch memory of the program as they do.
    // SAFETY: the keeper serves with ().
    unsafe {
        desk.ask(|(): &()| {
            let Some(core) = current() else { return };
            for slot in &core.devices {
                let at = slot.swap(0, Ordering::AcqRel);
                if at != 0 {
                    // SAFETY: leaked by `open_device`; its queue was joined, and nobody finds it any more.
                    drop(OwnBox::<Device>::reclaim(at as *mut Device));
                }
            }
            CURRENT.store(NONE, Ordering::Release);
            let _ = core.stop.signal();
        })
    };
    monitor.join();
    // The core's descriptors are in the keeper's table: it must close them.
    // SAFETY: the keeper serves with ().
    unsafe { desk.ask(move |(): &()| drop(core)) };
    desk.close();
    keeper.join();
}

/// A user's hold on a device.
#[derive(Debug)]
pub struct DeviceRef {
    hold: CoreRef,
    index: usize,
}

impl DeviceRef {
    fn dev(&self) -> &Device {
        self.hold.core().device(self.index)
    }

    fn ask<R: Send>(&self, job: impl FnOnce(&Core, &Device) -> R + Send) -> Result<R, Error> {
        // SAFETY: queues serve with a Seat. The lifetime is that of the call.
        let answer = unsafe { self.dev().desk.ask(move |seat: &Seat<'static>| job(seat.core, seat.dev)) };
        answer.ok_or(Error::System("reach the device's queue", Errno::SRCH))
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        self.dev().driver.info()
    }

    /// Its number, as arguments in its memory carry it.
    pub fn id(&self) -> u32 {
        self.dev().id()
    }

    /// Its counters.
    pub fn stats(&self) -> Stats {
        self.dev().counters.stats()
    }

    /// Runs a kernel and waits for it.
    ///
    /// # Errors
    /// See [`Error`]; those that are found before the kernel starts leave everything as it was.
    pub fn run(&self, entry: Entry, grid: Grid, args: &Args<'_>) -> Result<(), Error> {
        let mut raw = [RawArg::Pointer { address: 0 }; MAX_ARGS];
        raw[..args.raw().len()].copy_from_slice(args.raw());
        let request = Request { entry, grid, args: raw, count: args.raw().len() };
        self.ask(move |core, dev| launch::run(core, dev, &request))?
    }

    /// Moves the pages inside a byte range to the device. Pages that cannot move stay.
    ///
    /// # Errors
    /// [`Error::NoRoom`], [`Error::TooLarge`].
    pub fn prefetch(&self, start: usize, end: usize) -> Result<(), Error> {
        self.ask(move |core, dev| launch::prefetch(core, dev, start, end))?
    }

    /// Brings everything home that the device has of a byte range.
    ///
    /// # Errors
    /// Those of the device.
    pub fn evict(&self, start: usize, end: usize) -> Result<(), Error> {
        self.ask(move |core, dev| {
            for block in Span::touching(start, end).blocks() {
                home::send_home(core, dev, block.start)?;
            }
            Ok(())
        })?
    }

    /// Allocates memory on the device itself: the first frame and the device's address of it.
    ///
    /// # Errors
    /// [`Error::NoRoom`].
    pub fn allocate(&self, bytes: usize) -> Result<(Frame, usize), Error> {
        self.ask(move |core, dev| {
            let units = bytes.div_ceil(BLOCK).max(1);
            loop {
                if let Ok(frame) = dev.mem.take_units(&*dev.driver, units) {
                    dev.allocated.fetch_add(units * BLOCK, Ordering::Relaxed);
                    return Ok((frame, dev.driver.address(frame)));
                }
                if units * BLOCK + dev.allocated() > dev.driver.info().memory || home::evict_one(core, dev, true).is_err() {
                    let info = dev.driver.info();
                    return Err(Error::NoRoom { device: info.name, needed: bytes, capacity: info.memory });
                }
            }
        })?
    }

    /// Gives memory from [`allocate`](Self::allocate) back.
    pub fn free(&self, frame: Frame, bytes: usize) {
        let units = bytes.div_ceil(BLOCK).max(1);
        let _ = self.ask(move |_, dev| {
            for unit in 0..units {
                dev.mem.free_whole(frame + (unit * Bits::ALL.count()) as Frame);
            }
            dev.allocated.fetch_sub(units * BLOCK, Ordering::Relaxed);
        });
    }

    /// Runs copies on the device's copy engine and waits for them.
    ///
    /// # Errors
    /// [`Error::Gone`] if the program's memory went away meanwhile.
    pub fn copy(&self, dma: Dma) -> Result<(), Error> {
        self.ask(move |_, dev| {
            let list = [dma];
            let fence = dev.driver.copy(&list);
            dev.driver.wait(fence, &list).map_err(|e| Error::Gone { address: e.address })
        })?
    }
}
