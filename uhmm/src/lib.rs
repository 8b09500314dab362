//! Any ordinary pointer of a Linux process is valid on a device too: no special allocator, no copies to write, no kernel module.
//!
//! ```no_run
//! use uhmm::{args, inp, out, Ctx, Uhmm};
//!
//! fn double(ctx: &Ctx<'_>) {
//!     let part = ctx.out::<f32>(0).chunk(1024);
//!     let from = ctx.group() * 1024;
//!     for (r, a) in part.iter_mut().zip(&ctx.inp::<f32>(1)[from..]) {
//!         *r = 2.0 * a;
//!     }
//! }
//!
//! # fn main() -> Result<(), uhmm::Error> {
//! let hmm = Uhmm::new()?;
//! let dev = hmm.device("soft")?;
//! let a = vec![1.0f32; 1 << 20];
//! let mut r = vec![0.0f32; 1 << 20];
//! dev.run(&double, 1 << 10, args![out(&mut r), inp(&a)])?; // the pages go to the device
//! println!("{}", r[0]); // this touch brings what it needs back
//! # Ok(())
//! # }
//! ```
//!
//! What moves, and when: a launch makes what it declares resident ([`inp`] is duplicated, [`inout`] moves, [`out`] moves without an upload).
//! After it nothing is copied back; the CPU's touch of a page brings its surroundings home. A second launch moves only what the CPU wrote or fetched back in
//! between. Ranges need no alignment.
//!
//! The ways of passing arguments, and what a kernel does with them:
//!
//! ```no_run
//! use uhmm::{Ctx, Uhmm, args, inout, inp, out, ptr, val};
//!
//! struct Node {
//!     value: u64,
//!     next: *const Node,
//! }
//!
//! fn kernel(ctx: &Ctx<'_>) {
//!     let [_, y, _] = ctx.group3(); // the grid has up to three sides
//!     let scale = ctx.value::<f32>(3) + ctx.value::<[f32; 2]>(4)[0];
//!     let scratch = ctx.local::<f32>(100); // this group's own
//!     scratch[0] = ctx.inp::<f32>(0)[y] * scale;
//!     ctx.out::<f32>(1).chunk(1)[0] = scratch[0]; // a part for each group
//!     ctx.out::<u32>(2).chunk(1)[0] += 1;
//!     let mut node = ctx.pointer::<Node>(5).cast_const(); // as the device sees it
//!     // SAFETY: the list outlives the launch, and nobody changes it.
//!     while let Some(here) = unsafe { node.as_ref() } {
//!         assert!(here.value < 100);
//!         node = if here.next.is_null() { here.next } else { ctx.ptr(here.next) }; // a pointer that was stored in memory
//!     }
//! }
//!
//! # fn main() -> Result<(), uhmm::Error> {
//! # let dev = Uhmm::new()?.device("soft")?;
//! let (a, mut r, mut counts) = ([1.0f32; 8], [0.0f32; 16], [0u32; 16]);
//! let tail = Box::new(Node { value: 2, next: std::ptr::null() });
//! let list = Box::new(Node { value: 1, next: &*tail });
//! // SAFETY: the list outlives the launch, and nobody changes it.
//! let list = unsafe { ptr(&*list) };
//! dev.run(&kernel, [2, 8], args![inp(&a), out(&mut r), inout(&mut counts), 0.5f32, val([1.0f32, 2.0]), list])?;
//! # Ok(())
//! # }
//! ```
//!
//! Launches that nobody waits for at once, with an order between two devices:
//!
//! ```no_run
//! # use uhmm::{Ctx, Uhmm, args, scope};
//! # fn main() -> Result<(), uhmm::Error> {
//! # let hmm = Uhmm::new()?;
//! # let (one, two) = (hmm.soft("one").open()?, hmm.soft("two").open()?);
//! let fill = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1 << 20).fill(1);
//! let sum = |ctx: &Ctx<'_>| assert_eq!(ctx.inp::<u32>(0).iter().sum::<u32>(), 1 << 20);
//! let mut data = vec![0u32; 1 << 20];
//! scope(|scope| {
//!     let data = scope.lend(&mut data); // several launches use it, one after the other
//!     let filled = scope.launch(&one, &fill, 1, args![data.out()]);
//!     let mut queue = scope.queue(&two);
//!     queue.wait_for(&filled.event());
//!     queue.launch(&sum, 1, args![data.inp()]);
//!     filled.wait()
//! })??;
//! # Ok(())
//! # }
//! ```
//!
//! Pointers that are stored in memory, on any device; those that cannot fetch what a kernel touches are told what there is:
//!
//! ```no_run
//! # fn main() -> Result<(), uhmm::Error> {
//! use uhmm::{Ctx, Forms, Uhmm, args, inp, out};
//!
//! #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
//! #[repr(C)]
//! struct Node {
//!     next: u64, // the address of another one, or 0
//!     value: u64,
//! }
//! const SOURCE: &str = "
//! typedef struct { ulong next, value; } node;
//! __kernel void sum(__global ulong *sum, ulong at, UHMM) {
//!     for (sum[0] = 0; at; at = ((__global const node *)uhmm_ptr(at))->next)
//!         sum[0] += ((__global const node *)uhmm_ptr(at))->value;
//! }";
//! let rust = |_: &Ctx<'_>| { /* the same with ctx.ptr */ };
//! let mut nodes: Vec<Box<Node>> = (0..1000).map(|value| Box::new(Node { next: 0, value })).collect();
//! for i in 1..nodes.len() {
//!     nodes[i - 1].next = &raw const *nodes[i] as u64;
//! }
//! let (head, mut sum) = (&raw const *nodes[0] as u64, [0u64]);
//! let each = nodes.iter().map(|node| inp(std::slice::from_ref(&**node)));
//! let dev = Uhmm::new()?.device("opencl")?;
//! dev.run(&Forms::new(rust).opencl(SOURCE, "sum", 1), 1, args![out(&mut sum), head].reaching(each))?;
//! # Ok(())
//! # }
//! ```
//!
//! An item without an example of its own is shown in one of these, or in that of its type.
#![deny(unsafe_code)]

mod buffer;
mod devices;
mod hints;
mod host;
mod lease;
mod opencl;

pub use buffer::Buffer;
pub use devices::Available;
pub use hints::{AsRange, Place, Prefetch, Residency, Run, To};
pub use host::Host;
pub use lease::{Fence, Lease, Signal, fence};
pub use opencl::{OpenClBuilder, OpenClHandles, OpenClMemory};
pub use uhmm_core::Error;
pub use uhmm_core::args;
pub use uhmm_core::args::{Access, Arg, Args, IntoArg, Lent, MAX_ARGS, inout, inp, out, ptr, val};
pub use uhmm_core::counters::Stats;
pub use uhmm_core::driver::{DeviceInfo, KernelFault};
pub use uhmm_core::kernel::{Atomic, Ctx, Forms, Grid, Kernel, LOCAL_BYTES, OpenCl, Out};
pub use uhmm_core::mirror::{self, Mirror, Notifier};
pub use uhmm_core::mode::Mode;
pub use uhmm_core::policy::{Advice, Location};
pub use uhmm_core::scope::{Event, Launched, Queue, Scope, scope};
pub use uhmm_opencl::{api::Found as OpenClDevice, choose as opencl_device, devices as opencl_devices};

/// What decides what moves, and when: [`Policy`](policy::Policy), those that come with uhmm, and what they are asked.
///
/// ```no_run
/// use uhmm::policy::{Declared, OnDemand, Recording};
/// use uhmm::Uhmm;
///
/// # fn main() -> Result<(), uhmm::Error> {
/// let hmm = Uhmm::new()?;
/// let dev = hmm.device("soft")?;
/// let table = vec![0u32; 1 << 24];
/// hmm.set_policy_for(&table, OnDemand)?; // kernels touch little of it
/// let recording = dev.set_policy(Recording::new(Declared, 1000)?)?; // everything else
/// # drop(recording);
/// # Ok(())
/// # }
/// ```
pub mod policy {
    pub use uhmm_core::policy::*;
}

use bytemuck::Pod;
use uhmm_core::kernel::Entry;
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef};

/// The names of the kinds of device that this build has; [`Uhmm::device`] says what they are.
pub const KINDS: &[&str] = &["soft", "soft:nofault", "soft:coherent", "opencl", "null"];

/// The process's heterogeneous memory management. All values of this type in a process share one core, which ends with the last of them and of their
/// devices: everything comes home, and no thread, mapping or descriptor stays.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// let one = uhmm::Uhmm::new()?;
/// let other = uhmm::Uhmm::new()?; // the same core
/// println!("{:?}: {:?}", one.mode(), other.open_devices());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Uhmm {
    core: CoreRef,
}

impl Uhmm {
    /// Starts uhmm in this process, or joins what is running, in the best [mode](Self::mode) that the process's rights allow, or the one that the environment
    /// variable `UHMM_MODE` names (`full`, `user-mode-only`, `none`).
    ///
    /// Costs a few threads and some address space; memory is watched only from its first migration on.
    ///
    /// # Errors
    /// [`Error::NoUserfaultfd`] if `UHMM_MODE` names a mode for which the right is missing; the message says which sysctl, capability or
    /// device file gives it. [`Error::NoMode`].
    pub fn new() -> Result<Self, Error> {
        Ok(Uhmm { core: CoreRef::get()? })
    }

    /// The device called `name`: the open one of that name, else a new one of that kind with its default configuration.
    ///
    /// | kind | |
    /// |---|---|
    /// | `soft` | the reference device in software |
    /// | `soft:nofault` | the same without replayable faults, as most hardware is: kernels reach only what their launch declares |
    /// | `soft:coherent` | the same with memory that the CPU uses in place, as behind CXL: what a launch declares moves there as far as there is room, and neither side's touch moves anything |
    /// | `opencl`, `opencl:1`, `opencl:gpu`, `opencl:NAME` | a device with OpenCL 1.2 or newer, by number, type (`gpu`, `cpu`, `accelerator`) or words of its name; it runs the form of a kernel that is in OpenCL C ([`Forms`]). One that shares the process's pointers uses memory in place ([`OpenClBuilder::copies`]) |
    /// | `null` | accepts every launch, runs nothing, has no memory: what uhmm itself costs |
    ///
    /// # Errors
    /// [`Error::NoDevice`]; [`Error::Device`] if it cannot be opened.
    pub fn device(&self, name: &str) -> Result<Device, Error> {
        match name {
            "soft" => self.soft("soft").open(),
            "soft:nofault" => self.soft("soft:nofault").replayable_faults(false).open(),
            "soft:coherent" => self.soft("soft:coherent").coherent(true).open(),
            "null" => Ok(Device { dev: self.core.device(DeviceConfig::new("null"), uhmm_null::open)? }),
            _ if name == "opencl" || name.starts_with("opencl:") => self.opencl(name).open(),
            _ => match self.core.open_device(name)? {
                Some(dev) => Ok(Device { dev }),
                None => Err(Error::NoDevice { name: name.into(), known: KINDS.join(", ") }),
            },
        }
    }

    /// A software device with a configuration of its own. If a device of that name is open already, it is that one, as it was configured.
    pub fn soft(&self, name: &'static str) -> SoftBuilder<'_> {
        SoftBuilder { core: &self.core, config: DeviceConfig::new(name) }
    }

    /// An OpenCL device with a configuration of its own; names are those of [`device`](Self::device). If a device of that name is open already, it is that one, as it was configured.
    pub fn opencl(&self, name: &str) -> OpenClBuilder<'_> {
        OpenClBuilder { core: &self.core, config: DeviceConfig::new(opencl::kept(name)), copies: false }
    }

    /// Brings everything home that any device has, but for what a [lease](Lease) holds: afterwards all other memory is the CPU's alone, until the next launch. Waits for the running launch.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// hmm.evict_all()?; // a debugger, or whoever reads this process's memory from outside, sees all of it now
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel.
    pub fn evict_all(&self) -> Result<(), Error> {
        self.core.evict_all()
    }

    /// From now on, until the last value of this type and the last device are gone: when `signal` (signal(7), such as SIGABRT, 6) comes, everything is
    /// brought home, and then its action happens as it would without uhmm: the handler that is there now, or the default action.
    ///
    /// So a core dump has all pages (SIGABRT, SIGSEGV, SIGQUIT), and a process that is stopped (SIGTSTP) can be read by a debugger: launches wait until it
    /// goes on. SIGUSR1, SIGUSR2 and real-time signals without a handler only bring everything home. A handler that is installed later replaces this, unless
    /// it calls the one before it. A running launch is waited for, 5 seconds at most; then what it uses stays on its device. It may be called for several
    /// signals; the first call starts a thread.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// hmm.evict_on_signal(6)?; // SIGABRT: the core dump has everything
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Signal`] for SIGKILL, SIGSTOP and what is no signal; [`Error::System`] if a thread is refused; [`Error::Reentrant`] from a kernel.
    pub fn evict_on_signal(&self, signal: i32) -> Result<(), Error> {
        self.core.evict_on_signal(signal)
    }

    /// Mirrors a range of addresses, for a device that uses memory where it is: what it may do with each page can be looked up and asked for, and `notifier` is
    /// told of every change before the device could act on what is no longer so. Nothing migrates. See [`mirror`](mod@mirror), and the example `mirror_only`.
    ///
    /// ```no_run
    /// use uhmm::mirror::{Mirror, PageTable};
    ///
    /// # fn main() -> Result<(), uhmm::Error> {
    /// let hmm = uhmm::Uhmm::new()?;
    /// let data = vec![7u8; 1 << 20];
    /// let range = data.as_ptr() as usize..data.as_ptr() as usize + data.len();
    /// let device: Mirror<PageTable> = hmm.mirror(range.clone(), PageTable::new(range)?)?;
    /// println!("it may use {} pages", device.span().len() / 4096);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Mirror`] in [`Mode::None`], for an empty range or one that holds uhmm's own memory, and if there are 2^20 mirrors already; [`Error::System`].
    pub fn mirror<N: Notifier>(&self, range: std::ops::Range<usize>, notifier: N) -> Result<Mirror<N>, Error> {
        self.core.mirror(range, notifier)
    }

    /// Sets the policy for all memory and all devices that have none of their own. Until then it is [`Declared`](policy::Declared).
    ///
    /// It takes effect at once, also for what is running. The answer gives access to the policy in its place; dropping it changes nothing.
    ///
    /// # Errors
    /// [`Error::TooManyPolicies`] after [`MOST_POLICIES`](policy::MOST_POLICIES) of them; [`Error::Reentrant`] from a kernel.
    pub fn set_policy<P: policy::Policy + 'static>(&self, policy: P) -> Result<policy::InForce<P>, Error> {
        self.core.set_policy(policy)
    }

    /// Sets the policy for the whole pages of `data`, as long as they are mapped. It is asked before those of the device and the process; which block leaves a full device it is not asked.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// use uhmm::policy::OnDemand;
    ///
    /// let table = vec![0u64; 1 << 24];
    /// hmm.set_policy_for(&table, OnDemand)?; // kernels touch little of it
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`set_policy`](Self::set_policy); [`Error::TooManyRanges`].
    pub fn set_policy_for<T: Pod, P: policy::Policy + 'static>(&self, data: &[T], policy: P) -> Result<policy::InForce<P>, Error> {
        let range = data.as_ptr_range();
        self.core.set_policy_for(range.start as usize, range.end as usize, policy)
    }

    /// Says something about the whole pages of `data`, for as long as they are mapped: see [`Advice`]. It waits for the running launch.
    ///
    /// It costs nothing where memory cannot move or nothing stays on a device, and is forgotten there.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// let weights = vec![0f32; 1 << 20];
    /// hmm.advise(&weights, uhmm::Advice::ReadMostly)?; // what the CPU reads of it stays on the device too
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::TooManyRanges`] after [`MOST_RANGES`](policy::MOST_RANGES) of them; [`Error::Reentrant`] from a kernel.
    pub fn advise<T: Pod>(&self, data: &[T], advice: Advice) -> Result<(), Error> {
        let range = data.as_ptr_range();
        self.core.advise(range.start as usize, range.end as usize, advice)
    }

    /// As [`advise`](Self::advise), for a range of addresses, whatever lies there.
    ///
    /// # Errors
    /// As [`advise`](Self::advise).
    pub fn advise_range(&self, start: usize, bytes: usize, advice: Advice) -> Result<(), Error> {
        self.core.advise(start, start.saturating_add(bytes), advice)
    }

    /// What this process may do, and so how much uhmm can: the same program is right in all modes.
    pub fn mode(&self) -> Mode {
        self.core.mode()
    }

    /// The counters of all open devices, added up.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// let before = hmm.stats();
    /// // ... a launch, and touches ...
    /// let moved = hmm.stats() - before;
    /// println!("{} bytes there, {} back, {} faults", moved.bytes_to_device, moved.bytes_to_cpu, moved.cpu_faults);
    /// # Ok(())
    /// # }
    /// ```
    pub fn stats(&self) -> Stats {
        self.core.stats()
    }
}

/// The configuration of a software device.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// let small = hmm.soft("small").memory(64 << 20).threads(2).replayable_faults(false).open()?;
/// assert_eq!(small.threads(), 2);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SoftBuilder<'a> {
    core: &'a CoreRef,
    config: DeviceConfig,
}

impl SoftBuilder<'_> {
    /// Bytes of device memory, rounded down to 2 MiB. Default: a quarter of the machine's memory.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.config.memory = bytes.max(1);
        self
    }

    /// Worker threads. Default: one a core.
    pub fn threads(mut self, threads: usize) -> Self {
        self.config.threads = threads;
        self
    }

    /// Whether kernels may touch any address of the process, the device fetching what it does not have yet. Default: yes. Without, a launch must declare
    /// all that its kernel touches: a bare `ptr` stands for the allocation that holds it, what stored pointers lead to is declared by [`Args::reaching`], and a touch of
    /// anything else fails the launch.
    pub fn replayable_faults(mut self, have: bool) -> Self {
        self.config.replayable_faults = have;
        self
    }

    /// Whether the CPU uses the device's memory in place. Default: no. Then device and process use the same addresses, kernels may touch any of them, whatever
    /// [`replayable_faults`](Self::replayable_faults) says, and a launch may declare more than the device's memory: what has no room there is used where it is.
    pub fn coherent(mut self, have: bool) -> Self {
        self.config.coherent = have;
        self
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be had so.
    pub fn open(self) -> Result<Device, Error> {
        Ok(Device { dev: self.core.device(self.config, uhmm_soft::open)? })
    }
}

/// A user's hold on an open device. With the last one the device is closed: what it has comes home, its threads and its memory go, and its name is free for
/// a device with another configuration. That waits for the running launch, whatever its device; a kernel that drops the last handle leaves it to whoever opens or closes a device next.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// use uhmm::{Ctx, args, inout};
///
/// let mut data = vec![1u32; 1 << 20];
/// dev.prefetch(&data)?; // a hint: the launch would fetch it
/// dev.run(&|ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1024).fill(7), 1024, args![inout(&mut data)])?;
/// dev.evict(&data)?; // a hint: the touch would fetch it
/// assert_eq!(data[5], 7);
/// println!("{} of {} bytes: {:?}", dev.name(), dev.memory(), dev.stats());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Device {
    dev: DeviceRef,
}

impl AsRef<DeviceRef> for Device {
    fn as_ref(&self) -> &DeviceRef {
        &self.dev
    }
}

impl Device {
    /// Runs `kernel` once for each group of `grid`, on ordinary memory, and waits for its end.
    ///
    /// Launches of one device run one after the other, in the order in which they come.
    ///
    /// # Errors
    /// Found before the kernel starts, with everything left as it was: ranges that are null, unmapped, protected, too long, overlapping, or larger than
    /// the device's memory (a coherent device uses in place what it has no room for), be they arguments or what is [reached](Args::reaching); a bare pointer of which no allocation is known; an empty grid. Found by the kernel's running: [`Error::Kernel`]. A byte then reads as before the launch or as the kernel wrote it.
    pub fn run<K: Kernel>(&self, kernel: &K, grid: impl Into<Grid>, args: Args<'_>) -> Result<(), Error> {
        self.dev.run(Entry::new(kernel), grid.into(), &args)
    }

    /// Moves the whole pages of `data` to the device ahead of a launch. Pages that cannot move stay, and so does what a coherent device has no room for.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::NoRoom`]; a coherent device has neither.
    pub fn prefetch<T: Pod>(&self, data: &[T]) -> Result<(), Error> {
        let range = data.as_ptr_range();
        self.dev.prefetch(range.start as usize, range.end as usize)
    }

    /// Moves the whole pages of a range of addresses to the device, whatever lies there and whoever uses it: a touch brings it back. Pages that cannot
    /// move stay, and so do those that the end of a thread needs (control blocks of threads, robust mutexes that are held).
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::NoRoom`].
    pub fn prefetch_range(&self, start: usize, bytes: usize) -> Result<(), Error> {
        self.dev.prefetch(start, start.saturating_add(bytes))
    }

    /// Brings home whatever the device has of `data` (and of the blocks of 2 MiB that it touches).
    ///
    /// # Errors
    /// Those of the device.
    pub fn evict<T: Pod>(&self, data: &[T]) -> Result<(), Error> {
        let range = data.as_ptr_range();
        self.dev.evict(range.start as usize, range.end as usize)
    }

    /// Lets what launches write in `data` stay on the device until the CPU touches it, also in [`Mode::UserModeOnly`], where results otherwise come home before
    /// [`run`](Self::run) returns. It is about the whole pages of `data`, for as long as they are mapped. In [`Mode::Full`] this is so for all memory.
    ///
    /// In user-mode-only mode, system calls on such pages fail with `EFAULT` while they are away, and a child that was forked past libc's fork has no
    /// memory there.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// let mut data = vec![0u32; 1 << 20];
    /// dev.leave(&mut data)?; // results of launches stay there, also without root's rights
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Stay`] in [`Mode::None`], and for memory that cannot move.
    pub fn leave<T: Pod>(&self, data: &mut [T]) -> Result<(), Error> {
        let range = data.as_ptr_range();
        self.dev.leave(range.start as usize, range.end as usize)
    }

    /// Memory of the device's own, for programs that manage it by hand. It starts zeroed.
    ///
    /// # Errors
    /// [`Error::NoRoom`].
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<'_, T>, Error> {
        Buffer::new(&self.dev, len)
    }

    /// Sets the policy for this device, as long as it is open. It is asked before the process's, and after those of ranges.
    ///
    /// # Errors
    /// As [`Uhmm::set_policy`].
    pub fn set_policy<P: policy::Policy + 'static>(&self, policy: P) -> Result<policy::InForce<P>, Error> {
        self.dev.set_policy(policy)
    }

    /// Its number, as policies and [`Advice`] name it: 1 or more, and another device's when this one is closed.
    pub fn id(&self) -> u32 {
        self.dev.id()
    }

    /// Takes the device out of use, in order: waits for the running launch and brings everything home. From then on every call on it says that it was removed. Its name can be
    /// opened again when its last handle is gone.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// let hmm = uhmm::Uhmm::new()?;
    /// let dev = hmm.device("soft")?;
    /// dev.remove()?;
    /// assert!(dev.run(&|_: &uhmm::Ctx<'_>| {}, 1, uhmm::args![]).is_err());
    /// drop(dev); // the last handle
    /// let again = hmm.device("soft")?;
    /// # drop(again);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::PagesLost`], [`Error::DeviceLost`]: it does not give everything back.
    pub fn remove(&self) -> Result<(), Error> {
        self.dev.remove()
    }

    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.dev.info().name
    }

    /// Bytes of its memory.
    pub fn memory(&self) -> usize {
        self.dev.info().memory
    }

    /// Groups that run at the same time.
    pub fn threads(&self) -> usize {
        self.dev.info().threads
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        self.dev.info()
    }

    /// What has happened on it.
    pub fn stats(&self) -> Stats {
        self.dev.stats()
    }
}
