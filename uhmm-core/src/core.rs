//! The core and its devices: what the mechanism works on, and what is asked of a device from outside.
//!
//! Threads of the program never use uhmm's descriptors: what needs them is left at the device's desk, whose queue thread does it, one piece
//! of work after the other.
#![allow(unsafe_code)] // one pointer for the signal handler, and the queue's to its device

use crate::ahead::Ahead;
use crate::args::Args;
use crate::assist::Assist;
use crate::bits::Bits;
use crate::counters::{Counters, Stats};
use crate::desk::{Desk, Kind};
use crate::devmem::DeviceMemory;
use crate::directory::{Directory, Frame};
use crate::driver::{DeviceInfo, Dma, Driver};
use crate::error::Error;
use crate::fixed;
use crate::flight::{Bell, Flights};
use crate::kernel::{Entry, Grid};
use crate::launch::{self, Last, Request};
use crate::lease::Ending;
use crate::line::{Line, Turns};
use crate::migrate::Room;
use crate::own::OwnBox;
use crate::page::{Span, Va};
use crate::policy::Policies;
use crate::pool::Pool;
use crate::port::{huge::Tables, tags::Tags};
use crate::prefetch::Prefetches;
use crate::process::CoreRef;
use crate::shares::Shares;
use crate::snapshot::Fetched;
use crate::space::Space;
use crate::sync::*;
use crate::table::DeviceTable;
use crate::twins::Twins;
use crate::{home, left, place};
use ::core::time::Duration;
use uhmm_os::{BLOCK, Errno, EventFd, PAGE, system, thread};

/// All addresses that a process can have.
pub(crate) const EVERYTHING: Span = Span { start: 0, end: 1 << 47 };

/// Migrations that can be at work at once without waiting for room.
const ROOMS: usize = 16;

/// The core that signal handlers work for. It points to itself when there is none: a static of zeros would lie in memory that can migrate.
pub(crate) static CURRENT: AtomicUsize = AtomicUsize::new(NONE);
/// The process that [`CURRENT`] belongs to. Not zero, for the same reason.
pub(crate) static OWNER: AtomicU32 = AtomicU32::new(1);
/// What [`CURRENT`] is without a core.
pub(crate) const NONE: usize = 1;

/// The core, if there is one.
pub(crate) fn current() -> Option<&'static Core> {
    let at = CURRENT.load(Ordering::Acquire);
    if at == NONE {
        return None;
    }
    // SAFETY: it is set once the core is complete, and cleared before the core's threads end; those are its readers. A forked child has inherited the
    // pointer, but not what it points to.
    (OWNER.load(Ordering::Acquire) == std::process::id()).then(|| unsafe { &*(at as *const Core) })
}

/// The mechanism of one process.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) space: Space,
    pub(crate) dir: Directory,
    pub(crate) pool: Pool,
    pub(crate) policies: Policies,
    /// Held while a launch is prepared, and while one is finished.
    pub(crate) prepare: Mutex<()>,
    pub(crate) turns: Turns,
    pub(crate) flown: Bell,
    pub(crate) ending: Ending,
    /// Some page was lost with a device: launches look whether it is among their arguments.
    pub(crate) has_lost: AtomicBool,
    /// For who looks what threads need when they end: [`crate::fixed`].
    pub(crate) ends: Mutex<()>,
    pub(crate) c_library: Span,
    pub(crate) assist: Assist,
    pub(crate) ahead: Ahead,
    pub(crate) prefetches: Prefetches,
    pub(crate) twins: Twins,
    pub(crate) tags: Tags,
    pub(crate) tables: Tables,
    /// Held while a port has a mapping's protection changed: see [`crate::port::change`].
    pub(crate) rights: Mutex<()>,
    pub(crate) devices: DeviceTable,
    rooms: OwnBox<[Mutex<Room>; ROOMS]>,
    /// Threads that are making pages the program's own.
    populating: [AtomicU32; ROOMS],
    next_mover: AtomicU32,
    next_launch: AtomicU64,
    pub(crate) stop: EventFd,
}

/// One device of the core.
#[derive(Debug)]
pub(crate) struct Device {
    index: usize,
    pub(crate) driver: OwnBox<dyn Driver>,
    pub(crate) mem: DeviceMemory,
    pub(crate) counters: Counters,
    pub(crate) flights: Flights,
    /// Where launches wait to be prepared, and for the device.
    pub(crate) entrance: Line,
    pub(crate) line: Line,
    pub(crate) last: Mutex<Last>,
    pub(crate) fetched: Mutex<Fetched>,
    pub(crate) shares: Shares,
    /// Raised by every change of the device's page table.
    pub(crate) changes: AtomicU64,
    /// The running launch has found the memory full of what may not leave.
    pub(crate) full: AtomicBool,
    pin: AtomicU64,
    allocated: AtomicUsize,
    /// How long a batch of copies may take.
    pub(crate) fence_limit: Duration,
    pub(crate) lost: AtomicBool,
    pub(crate) removed: AtomicBool,
    desk: Desk,
}

/// Both, as the work on a device's queue sees them.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) core: &'static Core,
    pub(crate) dev: *mut Device,
}

impl Seat {
    /// The device.
    pub(crate) fn dev(&self) -> &Device {
        // SAFETY: the device is dropped after its queue, which alone has the seat, was joined.
        unsafe { &*self.dev }
    }
}

impl Core {
    /// On the keeper.
    pub(crate) fn new() -> Result<Self, Error> {
        let reserve = |e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e);
        let memory = system::total_memory() as usize;
        let blocks = memory / BLOCK;
        let space = Space::open()?;
        let pool = Pool::new(space.mode, blocks.max(64), memory / 8 / PAGE)?;
        let mut made = Vec::with_capacity(ROOMS);
        for _ in 0..ROOMS {
            made.push(Mutex::new(Room::new().map_err(reserve)?));
        }
        let rooms: [Mutex<Room>; ROOMS] = made.try_into().map_err(|_| reserve(Errno::NOMEM))?;
        let core = Core {
            dir: Directory::new((2 * blocks).max(1024)).map_err(reserve)?,
            pool,
            policies: Policies::new().map_err(reserve)?,
            prepare: Mutex::new(()),
            turns: Turns::default(),
            flown: Bell::default(),
            ending: Ending::default(),
            has_lost: AtomicBool::new(false),
            ends: Mutex::new(()),
            c_library: fixed::c_library(),
            assist: Assist::default(),
            ahead: Ahead::default(),
            tags: Tags::default(),
            tables: Tables::default(),
            rights: Mutex::new(()),
            prefetches: Prefetches::new().map_err(reserve)?,
            twins: Twins::new(blocks).map_err(reserve)?,
            devices: DeviceTable::default(),
            rooms: OwnBox::new(c"uhmm rooms", rooms).map_err(reserve)?,
            populating: Default::default(),
            next_mover: AtomicU32::new(1),
            next_launch: AtomicU64::new(1),
            stop: EventFd::new().map_err(|e| Error::System("open an eventfd", e))?,
            space,
        };
        // Last, for unmapping what is registered waits for a monitor.
        core.pool.register(&core.space).map_err(reserve)?;
        Ok(core)
    }

    /// Device number `index`, for who holds the lock of a block that it has pages of, or `prepare`, or counts among its users: see [`crate::table`].
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn device(&self, index: usize) -> &Device {
        self.devices.get(index)
    }

    /// Calls `f` for every open device.
    pub(crate) fn for_each_device(&self, f: impl FnMut(&Device)) {
        self.devices.for_each(f);
    }

    /// Room for a migration. A thread has at most one.
    pub(crate) fn room(&self) -> MutexGuard<'_, Room> {
        let free = self.rooms.iter().find_map(|room| room.try_lock());
        free.unwrap_or_else(|| self.rooms[thread::gettid() as usize % ROOMS].lock())
    }

    /// Does something on behalf of the mechanism that touches the program's pages: if they are on a device by now, a worker that does this has not used a process address.
    pub(crate) fn populate(&self, work: impl FnOnce()) {
        let tid = thread::gettid();
        let free = || self.populating.iter().find(|slot| slot.compare_exchange(0, tid, Ordering::AcqRel, Ordering::Relaxed).is_ok());
        let slot = loop {
            match free() {
                Some(slot) => break slot,
                None => thread::yield_now(),
            }
        };
        work();
        slot.store(0, Ordering::Release);
    }

    /// Whether a thread's touch is such a one.
    pub(crate) fn populates(&self, tid: u32) -> bool {
        self.populating.iter().any(|slot| slot.load(Ordering::Acquire) == tid)
    }

    pub(crate) fn next_mover(&self) -> u32 {
        loop {
            let id = self.next_mover.fetch_add(1, Ordering::Relaxed);
            if id != 0 {
                return id;
            }
        }
    }

    pub(crate) fn last_launch(&self) -> u64 {
        self.next_launch.load(Ordering::Relaxed)
    }

    pub(crate) fn next_launch(&self) -> u64 {
        self.next_launch.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether the thread is a worker of any device.
    pub(crate) fn has_worker(&self, tid: u32) -> bool {
        let mut worker = false;
        self.for_each_device(|dev| worker |= dev.driver.owns_thread(tid));
        worker
    }

    /// Brings everything home that any device has.
    pub(crate) fn evict_all(&self) {
        self.for_each_device(|dev| self.evict_device(dev));
    }

    /// As [`evict_device`](Self::evict_device); `send_home` does it, and says whether to go on.
    pub(crate) fn evict_device_with(&self, dev: &Device, mut send_home: impl FnMut(Va) -> bool) {
        while dev.oldest_free(self).is_some_and(&mut send_home) {}
        // Of blocks that leases have a part in, what is left goes.
        if dev.mem.oldest(&self.dir, |_, _| true).is_some() {
            self.dir.for_each(EVERYTHING, |_, part| {
                send_home(part.start);
            });
        }
    }

    /// Brings everything home that a device has, but for what leases hold.
    pub(crate) fn evict_device(&self, dev: &Device) {
        self.evict_device_with(dev, |va| home::send_home(self, dev, va).is_ok());
    }
}

impl Device {
    /// A device with its memory's descriptors, not known to anybody yet.
    pub(crate) fn new(index: usize, driver: OwnBox<dyn Driver>, fence_limit: Duration) -> Result<Self, Error> {
        let reserve = |e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e);
        let (memory, linear) = (driver.info().memory, driver.info().capabilities.linear);
        Ok(Device {
            index,
            driver,
            mem: DeviceMemory::new(memory, linear).map_err(reserve)?,
            counters: Counters::default(),
            flights: Flights::default(),
            entrance: Line::default(),
            line: Line::default(),
            last: Mutex::new(Last::default()),
            fetched: Mutex::new(Fetched::new(memory).map_err(reserve)?),
            shares: Shares::default(),
            changes: AtomicU64::new(0),
            full: AtomicBool::new(false),
            pin: AtomicU64::new(0),
            allocated: AtomicUsize::new(0),
            fence_limit,
            lost: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            desk: Desk::new().map_err(reserve)?,
        })
    }

    /// Its number.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Where work for its queue is left.
    pub(crate) fn desk(&self) -> &Desk {
        &self.desk
    }

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

    /// The least recently used block in which no flight has a part.
    pub(crate) fn oldest_free(&self, core: &Core) -> Option<Va> {
        self.mem.oldest(&core.dir, |va, block| !block.keep.load(Ordering::Relaxed) && self.flights.held(va).is_empty())
    }

    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Bytes that the program has allocated on the device itself.
    pub(crate) fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    pub(crate) fn failed(&self, source: Errno) -> Error {
        Error::Driver { device: self.driver.info().name, source, said: self.driver.said() }
    }
}

/// Has a device do something, unless it is out of use.
fn unless_lost<R>(seat: &Seat, kind: Kind, number: u64, job: impl FnOnce(&Core, &Device, u64) -> Result<R, Error>) -> Result<R, Error> {
    let (core, dev) = (seat.core, seat.dev());
    let gone = if dev.has_been_lost() { core.bury(dev) } else { dev.usable() };
    if let Err(e) = gone {
        if kind == Kind::Launch {
            drop((dev.entrance.place(number), dev.line.place(number))); // those behind it go on
        }
        return Err(e);
    }
    let result = job(core, dev, number);
    if dev.is_lost() || (result.is_err() && dev.has_been_lost()) { core.bury(dev) } else { result }
}

/// A user's hold on a device. The device is closed with the last one: everything it has comes home; its threads, its memory and its name are free again.
///
/// A runtime that has kernels as an [`Entry`] and arguments as [`Args`]:
///
/// ```
/// use uhmm_core::args::Args;
/// use uhmm_core::kernel::{Entry, Grid};
/// use uhmm_core::{DeviceRef, Error};
///
/// fn run_at_home(dev: &DeviceRef, entry: Entry, args: &Args<'_>, result: &[u8]) -> Result<(), Error> {
///     dev.run(entry, Grid::from([64, 64]), args)?;
///     let range = result.as_ptr_range();
///     dev.evict(range.start as usize, range.end as usize) // home now, not at the first touch
/// }
///
/// fn buffer(dev: &DeviceRef) -> Result<(), Error> {
///     let (frame, address) = dev.allocate(1 << 20)?; // memory on the device, without pages of the process
///     println!("{} of {} bytes: the device sees them at {address:#x}", 1 << 20, dev.info().memory);
///     dev.free(frame, 1 << 20);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct DeviceRef {
    hold: CoreRef,
    index: usize,
}

impl DeviceRef {
    pub(crate) fn new(hold: CoreRef, index: usize) -> Self {
        DeviceRef { hold, index }
    }

    pub(crate) fn hold(&self) -> &CoreRef {
        &self.hold
    }

    pub(crate) fn core(&self) -> &Core {
        self.hold.core()
    }

    /// Whether it belongs to this process, and not to a parent.
    pub(crate) fn is_ours(&self) -> bool {
        self.hold.is_ours()
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn dev(&self) -> &Device {
        self.hold.core().device(self.index)
    }

    /// Has the device's queue do something alone, unless the device is out of use; and if it is lost by then, says so, when everything that it leaves behind has
    /// been seen to.
    pub(crate) fn ask<R: Send>(&self, job: impl FnOnce(&Core, &Device) -> Result<R, Error> + Send) -> Result<R, Error> {
        self.ask_as(Kind::Alone, move |core, dev, _| job(core, dev))
    }

    /// Likewise, beside launches.
    pub(crate) fn ask_beside<R: Send>(&self, job: impl FnOnce(&Core, &Device) -> Result<R, Error> + Send) -> Result<R, Error> {
        self.ask_as(Kind::Beside, move |core, dev, _| job(core, dev))
    }

    /// Likewise, as a launch, which gets a number.
    pub(crate) fn ask_launch<R: Send>(&self, job: impl FnOnce(&Core, &Device, u64) -> Result<R, Error> + Send) -> Result<R, Error> {
        self.ask_as(Kind::Launch, job)
    }

    fn ask_as<R: Send>(&self, kind: Kind, job: impl FnOnce(&Core, &Device, u64) -> Result<R, Error> + Send) -> Result<R, Error> {
        // A worker would wait for the end of its own launch.
        if self.hold.core().has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        let job = move |seat: &Seat, number| unless_lost(seat, kind, number, job);
        // SAFETY: queues serve with a Seat.
        let answer = unsafe { self.dev().desk.ask_as(kind, job) };
        answer.unwrap_or(Err(Error::System("reach the device's queue", Errno::SRCH)))
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
        let request = Request::new(self.dev(), entry, grid, args)?;
        self.ask_launch(move |core, dev, number| launch::run(core, dev, request, number))
    }

    /// Moves the pages inside a byte range to the device. Pages that cannot move stay.
    ///
    /// # Errors
    /// [`Error::NoRoom`], [`Error::TooLarge`].
    pub fn prefetch(&self, start: usize, end: usize) -> Result<(), Error> {
        self.ask(move |core, dev| launch::prefetch(core, dev, start, end))
    }

    /// Brings everything home that the device has of a byte range.
    ///
    /// # Errors
    /// [`Error::PagesLost`]; those of the device.
    pub fn evict(&self, start: usize, end: usize) -> Result<(), Error> {
        self.ask(move |core, dev| {
            let lost = dev.counters.pages_lost.load(Ordering::Relaxed);
            for block in Span::touching(start, end).blocks() {
                home::send_home(core, dev, block.start)?;
            }
            dev.gave_back(lost)
        })
    }

    /// Lets what launches write in a byte range stay on the device.
    ///
    /// # Errors
    /// [`Error::Stay`].
    pub fn leave(&self, start: usize, end: usize) -> Result<(), Error> {
        self.ask(move |core, _| left::leave(core, start, end))
    }

    /// Allocates memory on the device itself: the first frame and the device's address of it.
    ///
    /// # Errors
    /// [`Error::NoRoom`].
    pub fn allocate(&self, bytes: usize) -> Result<(Frame, usize), Error> {
        self.ask(move |core, dev| {
            let units = bytes.div_ceil(BLOCK).max(1);
            // What the program has unmapped before is free, not only announced.
            core.space.settle();
            drop(core.space.hold());
            loop {
                if let Ok(frame) = dev.mem.take_units(&*dev.driver, units) {
                    dev.allocated.fetch_add(units * BLOCK, Ordering::Relaxed);
                    return Ok((frame, dev.driver.address(frame)));
                }
                if units * BLOCK + dev.allocated() > dev.driver.info().memory || place::make_room(core, dev).is_err() {
                    let info = dev.driver.info();
                    return Err(Error::NoRoom { device: info.name, needed: bytes, capacity: info.memory });
                }
            }
        })
    }

    /// Gives memory from [`allocate`](Self::allocate) back.
    pub fn free(&self, frame: Frame, bytes: usize) {
        let units = bytes.div_ceil(BLOCK).max(1);
        let _ = self.ask(move |_, dev| {
            for unit in 0..units {
                dev.mem.free_whole(frame + (unit * Bits::ALL.count()) as Frame);
            }
            dev.allocated.fetch_sub(units * BLOCK, Ordering::Relaxed);
            Ok(())
        });
    }

    /// Runs copies on the device's copy engine and waits for them.
    ///
    /// # Errors
    /// [`Error::Gone`] if the program's memory went away meanwhile.
    pub fn copy(&self, dma: Dma) -> Result<(), Error> {
        self.ask(move |_, dev| {
            let list = [dma];
            dev.driver.stand_by();
            dev.transfer(&list).map_err(|e| dev.copy_failed(e))
        })
    }

    /// Takes the device out of use, in order: waits for the running launch, and brings everything home. From then on every call says that it was removed; its threads
    /// and memory go with the last handle, as those of any device.
    ///
    /// # Errors
    /// [`Error::PagesLost`] or [`Error::DeviceLost`] if the device does not give everything back.
    pub fn remove(&self) -> Result<(), Error> {
        self.ask(move |core, dev| {
            let _no_launch = core.prepare.lock();
            dev.removed.store(true, Ordering::Relaxed);
            let lost = dev.counters.pages_lost.load(Ordering::Relaxed);
            core.evict_device(dev);
            dev.gave_back(lost)
        })
    }
}

impl DeviceRef {
    /// Another hold on the device.
    ///
    /// # Errors
    /// [`Error::System`] if address space is refused.
    pub fn again(&self) -> Result<DeviceRef, Error> {
        self.hold.enter_device(self.index)
    }

    /// Leaves a launch to the device's queue, and `then` what is to be done with its result, on the queue's thread and under no lock. It begins after `before`
    /// has returned, and after what was left there earlier.
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel.
    ///
    /// # Safety
    /// What the kernel and the arguments borrow must stay borrowed until `then` is called, and the device open.
    pub(crate) unsafe fn leave_launch(
        &self,
        entry: Entry,
        grid: Grid,
        args: &Args<'_>,
        before: impl FnOnce() + Send,
        then: impl FnOnce(Result<(), Error>) + Send,
    ) -> Result<(), Error> {
        if self.hold.core().has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        let request = Request::new(self.dev(), entry, grid, args)?;
        let job = move |seat: &Seat, number| {
            before();
            then(unless_lost(seat, Kind::Launch, number, |core, dev, number| launch::run(core, dev, request, number)));
        };
        // SAFETY: queues serve with a Seat; the rest by the contract.
        let left = unsafe { self.dev().desk.leave(Kind::Launch, job) };
        if left { Ok(()) } else { Err(Error::System("reach the device's queue", Errno::SRCH)) }
    }
}

impl AsRef<DeviceRef> for DeviceRef {
    fn as_ref(&self) -> &DeviceRef {
        self
    }
}

impl Drop for DeviceRef {
    fn drop(&mut self) {
        self.hold.leave_device(self.index);
    }
}
