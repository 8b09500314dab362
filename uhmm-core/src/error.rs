//! What can go wrong, in words for the one who called.

use crate::args::MAX_ARGS;
use crate::driver::KernelFault;
use uhmm_os::Errno;
use uhmm_os::uffd::OpenError;

/// An error of uhmm. Errors found before a kernel starts leave all memory as it was.
///
/// ```
/// use uhmm_core::Error;
///
/// fn advise(e: &Error) -> String {
///     match e {
///         Error::NoRoom { capacity, .. } => format!("make it smaller than {capacity} bytes"),
///         Error::PagesLost { .. } | Error::DeviceLost { .. } => "compute it again, on another device".into(),
///         other => other.to_string(), // the message says what to do
///     }
/// }
/// assert_eq!(advise(&Error::NoRoom { device: "soft", needed: 8192, capacity: 4096 }), "make it smaller than 4096 bytes");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// userfaultfd cannot be used; the message says what gives the right.
    #[error("cannot use userfaultfd: {0}")]
    NoUserfaultfd(#[from] OpenError),
    /// The environment asks for a mode that does not exist.
    #[error("UHMM_MODE is {name:?}: it must be full, user-mode-only or none, or unset for the best that can be had")]
    NoMode {
        /// What it asks for.
        name: String,
    },
    /// A range cannot stay on a device between launches.
    #[error("memory at {address:#x} cannot stay on a device between launches: {why}")]
    Stay {
        /// Where the range starts.
        address: usize,
        /// Why.
        why: &'static str,
    },
    /// A range cannot be mirrored.
    #[error("cannot mirror the range: {why}")]
    Mirror {
        /// Why.
        why: &'static str,
    },
    /// As many policies as can be were set in this process.
    #[error(
        "{most} policies have been set in this process, and each is kept until uhmm ends: change a policy by atomics in its value instead of replacing it"
    )]
    TooManyPolicies {
        /// How many.
        most: usize,
    },
    /// Too many ranges have advice or a policy of their own.
    #[error(
        "too many ranges have advice or a policy of their own: say it for larger ranges than the one at {address:#x}, or take advice back"
    )]
    TooManyRanges {
        /// Where the range starts.
        address: usize,
    },
    /// A range whose contents cannot be discarded.
    #[error("memory at {address:#x} cannot be discarded: {why}")]
    Discard {
        /// The first address that cannot.
        address: usize,
        /// Why.
        why: &'static str,
    },
    /// A device was closed before what was to go there had gone.
    #[error("device {device} was closed before the prefetch to it was done: keep a handle of it until then")]
    Closed {
        /// The device.
        device: &'static str,
    },
    /// No device of that name.
    #[error("no such device: {name:?} (there is: {known})")]
    NoDevice {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A library of this process brought another version of uhmm, which is running.
    #[error("another version of uhmm runs in this process: build all its libraries with the same version and compiler")]
    OtherVersion,
    /// A device cannot be opened as asked.
    #[error("cannot open device {name}: {why}")]
    Device {
        /// Its name.
        name: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// A null pointer was passed where a range was declared.
    #[error("argument {index} is a null pointer with a length of {bytes} bytes")]
    Null {
        /// The argument's position.
        index: usize,
        /// The declared bytes.
        bytes: usize,
    },
    /// A range that the process has not mapped, in whole or in part.
    #[error("argument {index} names {address:#x}, which is not mapped (declared: {start:#x} to {end:#x})")]
    Unmapped {
        /// The argument's position.
        index: usize,
        /// The first address without a mapping.
        address: usize,
        /// Start of the declared range.
        start: usize,
        /// End of the declared range.
        end: usize,
    },
    /// A range that the process may not use as declared.
    #[error("argument {index} is to be {}, but the memory at {address:#x} is {}", if *.write { "written" } else { "read" }, if *.write { "read-only" } else { "not readable" })]
    Protected {
        /// The argument's position.
        index: usize,
        /// The first such address.
        address: usize,
        /// Whether the launch writes it.
        write: bool,
    },
    /// A range whose end is beyond the address space.
    #[error("argument {index} declares {count} elements of {size} bytes at {start:#x}, which reaches beyond the address space")]
    Overflow {
        /// The argument's position.
        index: usize,
        /// Start of the range.
        start: usize,
        /// Elements.
        count: usize,
        /// Bytes of an element.
        size: usize,
    },
    /// Two arguments share bytes and one of them is written.
    #[error("arguments {first} and {second} overlap at {address:#x} and one of them is written")]
    Overlap {
        /// The earlier argument.
        first: usize,
        /// The later one.
        second: usize,
        /// The first shared byte.
        address: usize,
    },
    /// A range that a launch reaches besides its arguments ([`Args::reaching`](crate::args::Args::reaching)) cannot be had.
    #[error("the launch reaches memory at {address:#x}, {why}")]
    Reached {
        /// The first such address.
        address: usize,
        /// Why, and what to do.
        why: &'static str,
    },
    /// A bare pointer stands for the allocation that holds it, and none is known to.
    #[error("argument {index} is a bare pointer to {address:#x}, and device {device} needs to know the allocation that holds it: {why}")]
    Allocation {
        /// The argument's position.
        index: usize,
        /// The pointer.
        address: usize,
        /// The device.
        device: &'static str,
        /// What is wrong, and what to do.
        why: &'static str,
    },
    /// A bare pointer was passed to a device that cannot fetch what its kernel touches, and has no memory of its own.
    #[error(
        "argument {index} is a bare pointer, and device {device} has no replayable faults to fetch what its kernel touches: declare the memory with inp, out or inout"
    )]
    BarePointer {
        /// The argument's position.
        index: usize,
        /// The device.
        device: &'static str,
    },
    /// An address where the device cannot see the process's memory.
    #[error("argument {index} at {address:#x} lies where device {device} has no address for it")]
    OutOfReach {
        /// The argument's position.
        index: usize,
        /// The address.
        address: usize,
        /// The device.
        device: &'static str,
    },
    /// Memory of one device was passed to another.
    #[error("argument {index} is memory of another device")]
    OtherDevice {
        /// The argument's position.
        index: usize,
    },
    /// A device cannot run a kernel: it has no form for that kind of device, or the device's compiler refuses it.
    #[error("device {device} cannot run the kernel: {why}")]
    NotLoaded {
        /// The device.
        device: &'static str,
        /// What the compiler says, or what is missing.
        why: String,
    },
    /// The grid has no group, or more than can be counted.
    #[error("a grid of {0:?} groups cannot run: each side needs at least 1, the product must fit a usize")]
    Grid([usize; 3]),
    /// One launch declares more than the device's memory holds.
    #[error(
        "the launch declares {needed} bytes (in blocks of 2 MiB), the memory of device {device} has {capacity}: divide the work, or open the device with more memory"
    )]
    TooLarge {
        /// The device.
        device: &'static str,
        /// What the launch needs resident at once.
        needed: usize,
        /// What the device has.
        capacity: usize,
    },
    /// The device's memory is exhausted by memory that was allocated on it.
    #[error(
        "device {device} has no room for {needed} bytes more (memory: {capacity} bytes, allocated by the program or in use by a launch)"
    )]
    NoRoom {
        /// The device.
        device: &'static str,
        /// What was needed.
        needed: usize,
        /// What the device has.
        capacity: usize,
    },
    /// A lease has memory that a launch or another lease needs.
    #[error("argument {index} needs memory at {address:#x}, which a lease has on device {device}: release the lease first")]
    Busy {
        /// The argument's position.
        index: usize,
        /// The address.
        address: usize,
        /// The device that the lease is on.
        device: &'static str,
    },
    /// Memory that is lent to a scope was to be used without a device.
    #[error("memory that is lent to a scope cannot be used by the host: launches of devices may be using it")]
    Lent,
    /// A bare pointer in a lease.
    #[error("argument {index} is a bare pointer: a lease declares what is used under it with inp, out or inout")]
    LeasedPointer {
        /// The argument's position.
        index: usize,
    },
    /// Too many leases at a time.
    #[error("device {device} has {most} leases and launches under way, and takes no more: release one first")]
    TooMany {
        /// The device.
        device: &'static str,
        /// The most there can be.
        most: usize,
    },
    /// Device memory and a slice of unequal length were to be copied.
    #[error("the buffer holds {buffer} elements, the slice {slice}")]
    Length {
        /// Elements of the device's buffer.
        buffer: usize,
        /// Elements of the slice.
        slice: usize,
    },
    /// Memory went away while it was being copied.
    #[error("memory at {address:#x} could not be reached while it was copied: it was unmapped or protected meanwhile")]
    Gone {
        /// The address.
        address: usize,
    },
    /// A kernel asked for a launch.
    #[error("a kernel cannot launch, allocate or move memory: do it after the launch has ended")]
    Reentrant,
    /// A signal that no handler can be had for.
    #[error(
        "signal {signal} cannot be handled: signals from 1 to 64 can, but for SIGKILL (9), SIGSTOP (19), and 32 and 33, which are the C library's"
    )]
    Signal {
        /// Its number.
        signal: i32,
    },
    /// The kernel failed on the device.
    #[error("kernel failed: {}", kernel_fault(.0))]
    Kernel(KernelFault),
    /// The device failed.
    #[error("device {device} failed: {source}{}", in_its_words(.said))]
    Driver {
        /// The device.
        device: &'static str,
        /// The system's error.
        source: Errno,
        /// What the device's own interface calls it: for OpenCL the name of the status.
        said: Option<&'static str>,
    },
    /// The device is lost: it was unplugged, fell off its bus, or hangs. What only it had is gone: a touch of such a page raises SIGBUS.
    #[error(
        "device {device} is lost{}, and {pages} pages whose only copy it had: drop all its handles and open it again; unmap the lost pages, or drop them with MADV_DONTNEED", in_its_words(.said)
    )]
    DeviceLost {
        /// The device.
        device: &'static str,
        /// What the device's own interface said when it last failed.
        said: Option<&'static str>,
        /// Pages that were lost with it.
        pages: u64,
    },
    /// The device did not give pages back whose only copy it had. A touch of them raises SIGBUS.
    #[error("device {device} failed to give {pages} pages back, which are lost: unmap them, or drop them with MADV_DONTNEED")]
    PagesLost {
        /// The device.
        device: &'static str,
        /// How many.
        pages: u64,
    },
    /// The device was taken out of use by [`DeviceRef::remove`](crate::DeviceRef::remove).
    #[error("device {device} was removed: drop all its handles and open it again")]
    DeviceRemoved {
        /// The device.
        device: &'static str,
    },
    /// A range has a page that was lost with a device.
    #[error("argument {index} has the page at {address:#x}, which was lost with a device: unmap it, or drop it with MADV_DONTNEED, first")]
    PageLost {
        /// The argument's position.
        index: usize,
        /// The page.
        address: usize,
    },
    /// The system refused something uhmm needs.
    #[error("cannot {0}: {1}")]
    System(&'static str, #[source] Errno),
}

/// What a device said, as a part of a message.
fn in_its_words(name: &Option<&'static str>) -> String {
    name.map(|name| format!(" ({name})")).unwrap_or_default()
}

fn kernel_fault(fault: &KernelFault) -> String {
    match fault {
        KernelFault::Panic(message) => format!("it panicked: {}", message.as_str()),
        KernelFault::Wild { address, write } => {
            format!("it {} {address:#x}, where the process has no memory for that", if *write { "wrote" } else { "read" })
        }
        KernelFault::HostAddress { address } => {
            format!(
                "it touched process address {address:#x} while the page was on the device: follow stored pointers with ctx.ptr(p), in OpenCL C with uhmm_ptr(p)"
            )
        }
        KernelFault::NoRoom { address } => {
            format!("it touched {address:#x}, and the device's memory is full of what may not leave: open the device with more memory")
        }
        KernelFault::NotDeclared { address, write } => {
            format!(
                "it {} {address:#x}, which its launch has not declared{}, and the device has no replayable faults to fetch it: declare it with {}{}",
                if *write { "wrote" } else { "read" },
                if *write { " as written" } else { "" },
                if *write { "out or inout" } else { "inp, out or inout" },
                ", as an argument or among what the launch reaches (Args::reaching)"
            )
        }
        KernelFault::PageLost { address } => format!("it touched {address:#x}, whose contents were lost with a device"),
        KernelFault::Refused(message) => format!("the device refused it: {}", message.as_str()),
        KernelFault::Device { source } => format!("the device could not go on: {source}"),
        KernelFault::Lost => "the device is lost".into(),
        KernelFault::Unreachable { address } => {
            format!("it touched {address:#x}, which is not anonymous private memory: declare it with inp, out or inout")
        }
    }
}

const _: () = assert!(MAX_ARGS == 16, "the message of `Args::new` names the number");
