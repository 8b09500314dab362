//! The driver contract: what a device must do for uhmm, and what it may ask of it.
//!
//! Sentence by sentence, with what shows it: docs/driver-contract.md. How to write a driver: docs/write-a-driver.md, with a complete one, uhmm/examples/tiny_driver.rs.
//!
//! | module | what helps to write one |
//! |---|---|
//! | [`cpu`] | copies, groups, first faults and scratch pages of a device whose copy engine or kernels are the CPU's |
//! | [`window`] | the addresses at which such a device's kernels see the process |
//! | [`forward`] | a driver around another one |
//!
//! # Rules
//! * Drivers are called per batch, never per page, from uhmm's own threads. Every call but [`Driver::launch`] may be made on the
//!   fault path: no allocation, no lock in memory that could migrate, no log, no touch of the program's memory but through
//!   guarded copies.
//! * The directory is the only truth; a driver's page table is a cache of it. [`Driver::unmap`] returns when the device has
//!   acknowledged: no access through the old entry can happen afterwards.
//! * An error is only for what the caller cannot foresee. A page whose copy failed is not mapped: [`Committed`] shows that it did not.
//! * A device may fail, and be lost, in any call that says so. It says what is so: uhmm then gives an error, keeps the page where it is, or poisons it.
//! * The memory of a coherent device ([`Capabilities::coherent`]) is anonymous memory of this process, which [`Driver::peek`] tells, and its pages themselves go into
//!   the program and come back ([`Driver::take_back`]). It sees the process's addresses as they are (its mask is 0) and reaches all of them, so that it has no page table:
//!   nothing is mapped, unmapped or shared for it, and no window is opened. A frame whose page is in the program, or went with it, is vacant; the copy engine's
//!   next write gives it a page. A fault of its kernels is one of the process's own addresses, and uhmm lets them run on itself.
//!
//! Examples: uhmm/examples/tiny_driver.rs is a complete driver, `drivers/null` the smallest, `drivers/soft` the reference.

pub mod cpu;
pub mod forward;
pub mod window;

use crate::args::RawArg;
use crate::bits::PAGES;
use crate::directory::State;
use crate::kernel::{Bound, Entry, Message};
use crate::own::OwnBox;
use crate::page::Span;
use crate::sync::*;
use core::ffi::CStr;
use core::time::Duration;
use uhmm_os::{Errno, PAGE};

pub use crate::directory::Frame;
pub use forward::Forward;

/// What a device is, fixed when it is opened.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name: what it is found by.
    pub name: &'static str,
    /// The bytes of its memory, a multiple of 2 MiB. With 0 it holds no data: nothing is made resident for its launches.
    pub memory: usize,
    /// Groups that run at the same time.
    pub threads: usize,
    /// The device sees the process's address `v` at `v ^ mask`.
    pub mask: usize,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// What a device can do, and so what uhmm asks of it: fixed when it is opened. By default it can do nothing of it.
///
/// ```
/// use uhmm_core::driver::Capabilities;
///
/// let gpu = Capabilities { replayable_faults: true, ..Capabilities::default() };
/// assert!(!gpu.coherent && !gpu.reads_peers);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The device may touch any address and waits until it is there. Without, a kernel reaches only what its launch declares.
    pub replayable_faults: bool,
    /// The CPU reads and writes the device's memory in place, so that a page of it need not come home to be touched.
    pub coherent: bool,
    /// The device has no page table: its kernels reach an argument through one address, and what is mapped must be where its frame is. Pages of a range that a launch declares
    /// then lie in frames that follow each other, and all pages of a block in one unit.
    pub linear: bool,
    /// The device's copy engine can read what another device's [`peek`](Driver::peek) names, as the host address of [`DmaKind::ToDevice`]: then pages move from that device
    /// to this one by one copy. Else they pass through host pages.
    pub reads_peers: bool,
}

/// One piece of a batch of copies. Frames that follow each other are next to each other in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dma {
    /// What to do.
    pub kind: DmaKind,
    /// The host's address; unused for `Zero`.
    pub host: usize,
    /// The first frame.
    pub frame: Frame,
    /// Bytes into that frame.
    pub offset: usize,
    /// How many bytes.
    pub len: usize,
}

/// What one piece of a batch does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaKind {
    /// From memory of uhmm's, or of another device ([`Capabilities::reads_peers`]), to the device.
    ToDevice,
    /// From the device to memory of uhmm's.
    ToHost,
    /// From memory of the program to the device: it may fault, and may be gone.
    GuardedToDevice,
    /// As `GuardedToDevice`, for the kernel that is launched next: it may be on its way still when the batch has been waited for, if whatever is asked of the device from then on comes after it. If
    /// it fails by then, that launch fails.
    SnapshotToDevice,
    /// From memory of the program's that a launch has borrowed, whole pages of its own, to the device: it may fault, but is there until the batch has been waited for.
    LentToDevice,
    /// From the device to memory of the program.
    GuardedToHost,
    /// Zeroes on the device.
    Zero,
}

/// A batch that was handed to the copy engine; [`Driver::wait`] ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence(pub u64);

/// Why a batch of copies failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaError {
    /// Memory of the program could not be reached. All pieces but the guarded ones are done.
    Gone {
        /// The first such host address.
        address: usize,
    },
    /// The device did not do it, for this reason. The same asked again may succeed.
    Failed(Errno),
    /// The device is lost: what it holds cannot be reached any more, and nothing that is asked of it will be done.
    Lost,
}

/// A run of pages and where they are on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// The first page's address in the process.
    pub va: usize,
    /// Its frame; the others follow.
    pub frame: Frame,
    /// Pages.
    pub pages: usize,
    /// Whether the device may write.
    pub write: bool,
}

impl MapRun {
    /// The process addresses of its pages.
    pub fn span(&self) -> Span {
        Span { start: self.va, end: self.va + self.pages * PAGE }
    }
}

/// What a driver calls a piece of memory that it has: for a program that uses the interface below the driver by itself. See [`Driver::locate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// The handle of the memory: for OpenCL a `cl_mem`.
    pub memory: usize,
    /// Bytes from its beginning.
    pub offset: usize,
}

/// The interface that a device is driven by, and the driver's own objects of it: for a program that uses it by itself. They are the driver's, and valid as long as the device is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Native {
    /// OpenCL.
    OpenCl {
        /// The `cl_context` that the device's memory is in.
        context: usize,
        /// The `cl_device_id`.
        device: usize,
        /// The `cl_command_queue` that kernels run in, one after the other.
        queue: usize,
    },
}

/// Runs of pages whose frames hold valid data: what a driver may enter into its page table. Only uhmm makes one, of pages that the directory calls resident, and those it calls
/// so only once the copy that fills their frames is done. So neither a driver nor a mechanism can map what was not copied.
///
/// ```compile_fail,E0423
/// use uhmm_core::driver::{Committed, Driver, MapRun};
/// fn map_anyway(driver: &dyn Driver, run: MapRun) {
///     let _ = driver.map(Committed(&[run]));
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Committed<'a>(&'a [MapRun]);

impl<'a> Committed<'a> {
    /// Runs of pages of the block at `va` that are resident.
    pub(crate) fn new(state: &State, va: usize, runs: &'a [MapRun]) -> Self {
        debug_assert!(runs.iter().all(|run| (run.va - va) / PAGE + run.pages <= PAGES), "runs of one block");
        let resident = |run: &MapRun| ((run.va - va) / PAGE..(run.va - va) / PAGE + run.pages).all(|page| state.resident().has(page));
        debug_assert!(runs.iter().all(resident), "pages that are not resident have no valid frames");
        Committed(runs)
    }
}

impl core::ops::Deref for Committed<'_> {
    type Target = [MapRun];
    fn deref(&self) -> &[MapRun] {
        self.0
    }
}

/// A batch that the copy engine has done, as the driver says. What commits a migration asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    gone: Option<usize>,
}

impl Done {
    /// What a driver's [`wait`](Driver::wait) has said of a batch.
    ///
    /// # Errors
    /// That nothing of it counts as done.
    pub(crate) fn of(result: Result<(), DmaError>) -> Result<Self, DmaError> {
        match result {
            Ok(()) => Ok(Done { gone: None }),
            Err(DmaError::Gone { address }) => Ok(Done { gone: Some(address) }),
            Err(e) => Err(e),
        }
    }

    /// Whether the guarded pieces are done as well.
    pub(crate) fn is_all(&self) -> bool {
        self.gone.is_none()
    }

    /// # Errors
    /// [`DmaError::Gone`] unless all pieces are done.
    pub(crate) fn all(self) -> Result<(), DmaError> {
        self.gone.map_or(Ok(()), |address| Err(DmaError::Gone { address }))
    }
}

/// Why a launch failed on the device. The first of a launch is kept.
#[derive(Clone, Copy, Debug)]
pub enum KernelFault {
    /// The kernel panicked.
    Panic(Message),
    /// The kernel touched an address that the process has not mapped, or not for that access. It ran on over a scratch page.
    Wild {
        /// The process address.
        address: usize,
        /// Whether it was a write.
        write: bool,
    },
    /// The kernel used a process address while the page was on the device: it forgot [`crate::kernel::Ctx::ptr`].
    HostAddress {
        /// The process address.
        address: usize,
    },
    /// The kernel touched memory for which the device has no room left.
    NoRoom {
        /// The process address.
        address: usize,
    },
    /// The kernel touched what its launch has not declared, or not for writing, on a device without replayable faults.
    NotDeclared {
        /// The process address.
        address: usize,
        /// Whether it was a write.
        write: bool,
    },
    /// The kernel touched memory of a kind that this device cannot reach.
    Unreachable {
        /// The process address.
        address: usize,
    },
    /// The kernel touched a page that was lost with a device.
    PageLost {
        /// The process address.
        address: usize,
    },
    /// The device refuses to run the kernel, in its own words: for an OpenCL device the name of the status.
    Refused(Message),
    /// The device could not run the kernel, or not fetch what it touched.
    Device {
        /// The system's error.
        source: Errno,
    },
    /// The device is lost.
    Lost,
}

/// A launch as the driver runs it.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The kernel.
    pub entry: Entry,
    /// Its arguments, as device addresses.
    pub bound: Bound,
    /// The number of groups.
    pub groups: usize,
    /// What will be read when it has ended.
    pub reads: Reads<'a>,
    pub(crate) begun: Begun<'a>,
}

impl Launch<'_> {
    /// The driver has put the launch, and all that it reads behind it, into the device's queue: what is put there from now on comes after it. Where [`Driver::follows`] says so the next
    /// launch may be handed over then, by another thread, and before this one has ended.
    pub fn has_begun(&self) {
        (self.begun.0)();
    }
}

/// What follows from the beginning of a launch.
pub(crate) struct Begun<'a>(pub(crate) &'a (dyn Fn() + Sync));

impl core::fmt::Debug for Begun<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Begun").finish_non_exhaustive()
    }
}

/// Small pieces of kind [`DmaKind::ToHost`] that uhmm will ask for when a launch has ended well. A driver that can copy them behind the kernel for less than a batch of their own costs, does so
/// and says it; any other leaves them alone.
///
/// ```
/// use uhmm_core::driver::{Dma, KernelFault, Launch};
///
/// fn launch(launch: &Launch, run: impl Fn() -> Result<(), KernelFault>, read: impl Fn(&[Dma]) -> bool) -> Result<(), KernelFault> {
///     run()?;
///     if read(launch.reads.pieces()) {
///         launch.reads.are_done();
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Reads<'a> {
    pieces: &'a [Dma],
    done: AtomicBool,
}

impl<'a> Reads<'a> {
    pub(crate) fn new(pieces: &'a [Dma]) -> Self {
        Reads { pieces, done: AtomicBool::new(false) }
    }

    /// The pieces.
    pub fn pieces(&self) -> &'a [Dma] {
        self.pieces
    }

    /// The driver has copied all of them.
    pub fn are_done(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    pub(crate) fn take(self) -> bool {
        self.done.into_inner()
    }
}

/// A kind of device. See the module's rules.
///
/// # Safety
/// uhmm's memory safety rests on a driver doing what each method says, in particular on `unmap` being acknowledged.
#[allow(unsafe_code)] // only the marker: an implementation promises what safe code relies on
pub unsafe trait Driver: Send + Sync + core::fmt::Debug {
    /// What the device is.
    fn info(&self) -> &DeviceInfo;

    /// Makes a unit of device memory (512 frames from `unit * 512`) usable; its contents are zero or old. Units from `memory / 2 MiB` on are
    /// those that are used in single pages.
    ///
    /// # Errors
    /// If the device has no memory for it.
    fn populate(&self, unit: usize) -> Result<(), Errno>;

    /// Gives the memory of an unused unit back.
    fn release(&self, unit: usize);

    /// Where the CPU can read `frame` while it is not mapped for the device, if it can.
    fn peek(&self, frame: Frame) -> Option<usize> {
        let _ = frame;
        None
    }

    /// The pages at `host`, which lie in memory of uhmm's and are those of a coherent device, become the pages of vacant frames from `frame` on again: the first so many.
    /// The others' contents are copied into the frames then.
    fn take_back(&self, frame: Frame, host: usize, pages: usize) -> usize {
        let _ = (frame, host, pages);
        0
    }

    /// The device's own address of a frame that is not mapped at any process address, for memory that the program allocated on the device.
    fn address(&self, frame: Frame) -> usize;

    /// The interface that the device is driven by, if a program may use it beside uhmm.
    fn native(&self) -> Option<Native> {
        None
    }

    /// Where in that interface's terms an argument lies whose pages are mapped, or which is memory that the program allocated on the device: all of it, in one piece. `None` if
    /// there is no such place. It stays there as long as the pages are mapped.
    fn locate(&self, arg: &RawArg) -> Option<Located> {
        let _ = arg;
        None
    }

    /// The calling thread is going to ask for copies and to wait for them: threads of the driver's that copy had better run on other cores.
    fn stand_by(&self) {}

    /// Where the CPU can use the frame that the device has mapped at process address `va`, while it is mapped. A device that says `None` lets [`copy`](Self::copy)
    /// use frames that are mapped; for any other they are out of its reach meanwhile.
    fn mapped(&self, va: usize) -> Option<usize> {
        let _ = va;
        None
    }

    /// Starts a batch of copies. The batch and what it names stay as they are until [`wait`](Self::wait) has returned.
    fn copy(&self, batch: &[Dma]) -> Fence;

    /// Waits for a batch, for so long at most as the device may take. When it returns, whatever it says, the device touches neither the batch nor the host memory that it
    /// names any more.
    ///
    /// # Errors
    /// [`DmaError`]; [`DmaError::Lost`] if the limit has passed. What a failed batch should have written then holds anything, but for memory of the program
    /// ([`DmaKind::GuardedToHost`]), which holds what was there or what should be.
    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError>;

    /// Whether the device is lost, for good: it was unplugged, fell off its bus, or hangs.
    fn is_lost(&self) -> bool {
        false
    }

    /// What the device's own interface called the last thing in which it failed, for messages.
    fn said(&self) -> Option<&'static str> {
        None
    }

    /// Makes the device able to see the blocks of `span` at all: asked for what a launch declares or advice names, so that a lack of addresses is an error there.
    /// [`map`](Self::map) also comes for blocks that nobody has asked this for (a prefetch, a device fault), and opens them itself.
    ///
    /// # Errors
    /// If the device has no addresses for it.
    fn open_window(&self, span: Span) -> Result<(), Errno> {
        let _ = span;
        Ok(())
    }

    /// The process has nothing at `span` (whole blocks) any more: addresses for it may go.
    fn close_window(&self, span: Span) {
        let _ = span;
    }

    /// Lets the device use a shared mapping of the process in place: its page table and the process's name the same pages. Replaces what was shared there before.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the device cannot: uhmm copies such memory then.
    fn share(&self, span: Span) -> Result<(), Errno> {
        let _ = span;
        Err(Errno::OPNOTSUPP)
    }

    /// Ends [`share`](Self::share).
    fn unshare(&self, span: Span) {
        let _ = span;
    }

    /// Enters runs into the device's page table.
    ///
    /// # Errors
    /// If the device cannot map; nothing of the batch is mapped then.
    fn map(&self, batch: Committed<'_>) -> Result<(), Errno>;

    /// Makes mapped runs writable.
    fn allow_writes(&self, batch: &[MapRun]);

    /// Takes the right to write from a mapped run, acknowledged: where the CPU can read its pages, or `None` if the device cannot do that without taking them out of its page
    /// table. A device that gives that right back (`allow_writes`), or takes the run out (`unmap`), has the same pages as before.
    fn protect(&self, run: MapRun) -> Option<usize> {
        let _ = run;
        None
    }

    /// Takes runs out of the device's page table, acknowledged.
    fn unmap(&self, batch: &[MapRun]);

    /// Makes a kernel ready to run, on the thread that is going to launch it and before anything moves for it: compiles its form for this device, if it is new. The kernel is alive.
    ///
    /// # Errors
    /// Why the device cannot run it, in words for the one who launches: that it has no form for this kind of device, what its compiler says, that the arguments are not its own.
    fn load(&self, entry: &Entry, args: &[RawArg]) -> Result<(), String> {
        let _ = (entry, args);
        Ok(())
    }

    /// Whether [`launch`](Self::launch) may be called for this kernel while one launch runs that [has begun](Launch::has_begun): the device runs them in that order, and this kernel fails
    /// only with the device.
    fn follows(&self, entry: &Entry, args: &[RawArg]) -> bool {
        let _ = (entry, args);
        false
    }

    /// Runs a kernel to its end, all groups.
    ///
    /// # Errors
    /// The first fault of the kernel.
    fn launch(&self, launch: &Launch) -> Result<(), KernelFault>;

    /// A worker touched the page at `va` and it was not in the device's page table: the entry of the device's fault buffer.
    fn note_fault(&self, va: usize, write: bool) {
        let _ = (va, write);
    }

    /// Fails the running launch, unless it has failed already. Its kernel runs on.
    fn fail(&self, fault: KernelFault) {
        let _ = fault;
    }

    /// Tells the running launch that it touched process memory that was on the device.
    fn host_touch(&self, tid: u32, address: usize) {
        let _ = tid;
        self.fail(KernelFault::HostAddress { address });
    }

    /// Whether the thread is one of the device's workers.
    fn owns_thread(&self, tid: u32) -> bool {
        let _ = tid;
        false
    }

    /// Whether the thread is one of a runtime below the driver, which runs kernels in this process. Asked when it touches memory that the running launch has declared: that is the
    /// kernel's touch then ([`host_touch`](Self::host_touch)). What else such a thread does is its own affair, and served as any thread's.
    fn owns_runtime_thread(&self, tid: u32) -> bool {
        let _ = tid;
        false
    }

    /// Whether `address` lies where the device sees the process's memory.
    fn in_window(&self, address: usize) -> bool {
        let _ = address;
        false
    }

    /// Whether the device can see the process's address `va` at all.
    fn reaches(&self, va: usize) -> bool {
        self.in_window(va ^ self.info().mask)
    }

    /// A worker touched an address that cannot be served: let it run on over a scratch page, and fail its launch.
    /// Returns false if even that is impossible.
    fn scratch(&self, address: usize, fault: KernelFault) -> bool {
        let _ = (address, fault);
        false
    }
}

/// Moves a driver into memory of uhmm's: what an [`OpenDriver`](crate::OpenDriver) returns.
///
/// # Errors
/// `ENOMEM`: no address space for it.
pub fn boxed(name: &CStr, driver: impl Driver + 'static) -> Result<OwnBox<dyn Driver>, Errno> {
    Ok(OwnBox::new(name, driver)?.unsize(|p| p as *mut dyn Driver))
}
