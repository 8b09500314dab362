//! Opening OpenCL devices, and what a program that uses OpenCL by itself needs to know of them.

use crate::{Device, Lease};
use core::ffi::c_void;
use std::sync::{Mutex, PoisonError};
use uhmm_core::driver::{Located, Native};
use uhmm_core::{CoreRef, DeviceConfig, Error};

/// Opens an OpenCL device as asked.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// let gpu = hmm.opencl("opencl:gpu").memory(2 << 30).open()?;
/// # drop(gpu);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct OpenClBuilder<'a> {
    pub(crate) core: &'a CoreRef,
    pub(crate) config: DeviceConfig,
    pub(crate) copies: bool,
}

impl OpenClBuilder<'_> {
    /// Bytes of the device's memory that uhmm may use, rounded down to 2 MiB: one buffer, made when the device is opened. Default: a quarter of what it has. It is left out of account where nothing is copied.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.config.memory = bytes.max(1);
        self
    }

    /// Whether what a launch declares is copied to the device in any case. Default: no. Then a device whose kernels may follow any pointer of the process ([`OpenClDevice::system_pointers`](crate::OpenClDevice))
    /// uses the process's memory in place: nothing moves and nothing is watched, [`Device::memory`] is 0, a bare [`ptr`](crate::ptr) is an argument, and what a kernel writes at a wild address is the program's.
    /// Other devices are not concerned.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// let as_it_is = hmm.opencl("opencl:0").open()?;
    /// println!("it shares the process's pointers: {}", as_it_is.memory() == 0);
    /// drop(as_it_is);
    /// let with_copies = hmm.opencl("opencl:0").copies(true).memory(1 << 30).open()?;
    /// assert_eq!(with_copies.memory(), 1 << 30);
    /// # Ok(())
    /// # }
    /// ```
    pub fn copies(mut self, copies: bool) -> Self {
        self.copies = copies;
        self
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none of that name, or it cannot be had so; the message has the OpenCL name of the status, and what there is.
    pub fn open(self) -> Result<Device, Error> {
        Ok(Device { dev: self.core.device(self.config, if self.copies { uhmm_opencl::open_with_copies } else { uhmm_opencl::open })? })
    }
}

/// The OpenCL objects of a device: see [`Device::opencl_handles`].
///
/// The handles are those of OpenCL's C interface, as every binding has them. They are uhmm's, and valid as long as the device is open: who keeps one longer retains it
/// (`clRetainContext`, `clRetainCommandQueue`), and nobody releases what he has not retained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenClHandles {
    /// The `cl_context` that the device's memory is in.
    pub context: *mut c_void,
    /// The `cl_device_id`.
    pub device: *mut c_void,
    /// The `cl_command_queue` that uhmm's kernels run in, one after the other: what is put there makes launches wait. A queue of one's own, made of context and device, does not.
    pub queue: *mut c_void,
}

/// Where leased memory lies on an OpenCL device: see [`Lease::opencl`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenClMemory {
    /// The `cl_mem` of the device's memory: one buffer, in which everything lies. Nobody releases it.
    pub buffer: *mut c_void,
    /// Bytes from the buffer's beginning to the argument's. It is aligned as the argument is in the process, up to 2 MiB.
    pub offset: usize,
    /// Bytes of the argument.
    pub len: usize,
}

impl Device {
    /// The device's OpenCL objects, if it is an OpenCL device: to enqueue kernels of one's own on what a [lease](Lease::opencl) has.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// let dev = hmm.device("opencl")?;
    /// let handles = dev.opencl_handles().expect("an OpenCL device");
    /// println!("context {:?}, device {:?}, queue {:?}", handles.context, handles.device, handles.queue);
    /// # Ok(())
    /// # }
    /// ```
    pub fn opencl_handles(&self) -> Option<OpenClHandles> {
        match self.dev.native() {
            Some(Native::OpenCl { context, device, queue }) => {
                Some(OpenClHandles { context: context as *mut c_void, device: device as *mut c_void, queue: queue as *mut c_void })
            }
            _ => None,
        }
    }
}

impl Lease<'_> {
    /// Where an OpenCL device has argument `index`: in this buffer, from this offset on, in one piece, and nowhere else until the lease ends. `None` on any other device.
    ///
    /// What is enqueued may use those bytes of the buffer, in any queue of the device's context; what the argument was declared for holds there too. It must be done when the
    /// lease ends, or its fence is signalled. Everything else in the buffer is uhmm's. In C, or with any binding for Rust (here the crate `cl3`), a kernel gets buffer and offset
    /// as two arguments:
    ///
    /// ```no_run
    /// use cl3::command_queue::{create_command_queue, enqueue_nd_range_kernel};
    /// use cl3::{event::wait_for_events, kernel::set_kernel_arg};
    /// use std::ffi::c_void;
    /// use std::ptr;
    /// use uhmm::{OpenClMemory, Uhmm, args, inout};
    ///
    /// /// __kernel void scale(__global uchar *memory, ulong at) { ((__global float *)(memory + at))[get_global_id(0)] *= 2; }
    /// unsafe fn scale(queue: *mut c_void, kernel: *mut c_void, data: OpenClMemory) -> Result<(), i32> {
    ///     unsafe {
    ///         set_kernel_arg(kernel, 0, size_of::<*mut c_void>(), (&raw const data.buffer).cast())?;
    ///         set_kernel_arg(kernel, 1, size_of::<u64>(), (&raw const data.offset).cast())?;
    ///         let global = [data.len / 4];
    ///         let done = enqueue_nd_range_kernel(queue, kernel, 1, ptr::null(), global.as_ptr(), ptr::null(), 0, ptr::null())?;
    ///         wait_for_events(&[done])
    ///     }
    /// }
    ///
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let kernel = ptr::null_mut(); // built in the handles' context
    /// let hmm = Uhmm::new()?;
    /// let dev = hmm.device("opencl")?;
    /// let handles = dev.opencl_handles().expect("an OpenCL device");
    /// let queue = unsafe { create_command_queue(handles.context, handles.device, 0) }.expect("a queue");
    /// let mut data = vec![1.0f32; 1 << 20];
    /// let lease = dev.acquire(args![inout(&mut data)])?;
    /// let memory = lease.opencl(0).expect("an OpenCL device");
    /// // SAFETY: the kernel uses what is leased and nothing else, and is done when this returns.
    /// unsafe { scale(queue, kernel, memory) }.expect("the kernel runs");
    /// drop(lease);
    /// assert_eq!(data[77], 2.0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    /// If there is no such argument, or it is a value.
    pub fn opencl(&self, index: usize) -> Option<OpenClMemory> {
        let (arg, len) = self.range(index);
        self.dev.opencl_handles()?;
        let Located { memory, offset } = self.dev.dev.locate(arg)?;
        Some(OpenClMemory { buffer: memory as *mut c_void, offset, len })
    }
}

/// The name, for ever: a device is known by it. Each is kept once.
pub(crate) fn kept(name: &str) -> &'static str {
    static NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.iter().find(|known| **known == name) {
        return known;
    }
    let known: &'static str = Box::leak(name.into());
    names.push(known);
    known
}
