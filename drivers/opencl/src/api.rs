//! The calls of OpenCL that are used, with what they make given back when it is dropped, and the devices that there are. The library is loaded at run time: where there is none, there are no devices.
//!
//! Sources: the OpenCL specification, version 1.2 and newer, by the names of the calls.
//!
//! No example: a part of the device; outside, only [`crate::devices`] and [`crate::open`] are used.
#![allow(unsafe_code)] // the foreign calls

use cl3::command_queue as cq;
use cl3::context as cx;
use cl3::device as dv;
use cl3::error_codes::{DLOPEN_RUNTIME_LOAD_FAILED, error_text};
use cl3::event as ev;
use cl3::memory as mm;
use cl3::platform as pf;
use cl3::types::{cl_command_queue, cl_context, cl_device_id, cl_event, cl_mem};
use core::ffi::c_void;
use core::ptr;

/// What a call said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub i32);

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            DLOPEN_RUNTIME_LOAD_FAILED => f.write_str(
                "the OpenCL library cannot be loaded: install the loader (Debian: ocl-icd-libopencl1) and a driver (for the CPU: pocl-opencl-icd)",
            ),
            -1001 => f.write_str("CL_PLATFORM_NOT_FOUND_KHR: install an OpenCL driver (for the CPU, on Debian: pocl-opencl-icd)"),
            code => write!(f, "{} ({code})", error_text(code)),
        }
    }
}

fn status<T>(result: Result<T, i32>) -> Result<T, Status> {
    result.map_err(Status)
}

/// A device that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// `opencl:N`.
    pub id: String,
    /// That N: over all platforms in their order, devices that are not ready or have no compiler left out.
    pub number: usize,
    /// Its own name.
    pub name: String,
    /// That of its platform.
    pub platform: String,
    /// What it implements, as it says: `OpenCL 3.0 ...`.
    pub version: String,
    /// `gpu`, `cpu`, `accelerator` or `other`.
    pub kind: &'static str,
    /// Bytes of its memory.
    pub memory: usize,
    /// The most bytes of one buffer.
    pub largest: usize,
    /// Compute units.
    pub units: usize,
    /// Whether its kernels may follow any pointer of the process (CL_DEVICE_SVM_FINE_GRAIN_SYSTEM).
    pub system_pointers: bool,
    device: usize,
}

/// All devices of all platforms that are ready, with compilers.
///
/// # Errors
/// That OpenCL cannot be used at all.
pub(crate) fn find() -> Result<Vec<Found>, Status> {
    let mut found: Vec<Found> = vec![];
    for platform in status(pf::get_platform_ids())? {
        let text = pf::get_platform_info(platform, pf::CL_PLATFORM_NAME).map(String::from).unwrap_or_default();
        for device in dv::get_device_ids(platform, dv::CL_DEVICE_TYPE_ALL).unwrap_or_default() {
            let text_of = |what| dv::get_device_info(device, what).map(String::from).unwrap_or_default();
            let number = |what| dv::get_device_info(device, what).map(u64::from).unwrap_or_default() as usize;
            let count = |what| dv::get_device_info(device, what).map(u32::from).unwrap_or_default();
            if count(dv::CL_DEVICE_AVAILABLE) == 0 || count(dv::CL_DEVICE_COMPILER_AVAILABLE) == 0 {
                continue;
            }
            let types = dv::get_device_info(device, dv::CL_DEVICE_TYPE).map(u64::from).unwrap_or_default();
            let is = |bit| types & bit != 0;
            let kind = match () {
                () if is(dv::CL_DEVICE_TYPE_GPU) => "gpu",
                () if is(dv::CL_DEVICE_TYPE_CPU) => "cpu",
                () if is(dv::CL_DEVICE_TYPE_ACCELERATOR) => "accelerator",
                () => "other",
            };
            // Asked of a device before 2.0 it is an error, and so false.
            const SVM: u32 = 0x1053; // CL_DEVICE_SVM_CAPABILITIES
            let svm = dv::get_device_info(device, SVM).map(u64::from).unwrap_or_default();
            found.push(Found {
                id: format!("opencl:{}", found.len()),
                number: found.len(),
                name: text_of(dv::CL_DEVICE_NAME),
                platform: text.clone(),
                version: text_of(dv::CL_DEVICE_VERSION),
                kind,
                memory: number(dv::CL_DEVICE_GLOBAL_MEM_SIZE),
                largest: number(dv::CL_DEVICE_MAX_MEM_ALLOC_SIZE),
                units: count(dv::CL_DEVICE_MAX_COMPUTE_UNITS) as usize,
                system_pointers: svm & (1 << 2) != 0, // CL_DEVICE_SVM_FINE_GRAIN_SYSTEM
                device: device as usize,
            });
        }
    }
    Ok(found)
}

/// A device in a context of its own.
#[derive(Debug)]
pub struct Device {
    context: cl_context,
    id: cl_device_id,
    kernels: cl_command_queue,
}

// SAFETY: OpenCL's objects may be used by any thread (specification, appendix A.2), but for the arguments of a kernel, which `program` keeps to one thread at a time.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// A context and a queue for kernels.
    pub(crate) fn open(found: &Found) -> Result<Self, Status> {
        let id = found.device as cl_device_id;
        let context = status(cx::create_context(&[id], ptr::null(), None, ptr::null_mut()))?;
        // SAFETY: both were made above.
        match unsafe { cq::create_command_queue(context, id, 0) } {
            Ok(kernels) => Ok(Device { context, id, kernels }),
            Err(code) => {
                // SAFETY: made above, and used by nobody.
                let _ = unsafe { cx::release_context(context) };
                Err(Status(code))
            }
        }
    }

    pub(crate) fn context(&self) -> cl_context {
        self.context
    }

    pub(crate) fn id(&self) -> cl_device_id {
        self.id
    }

    pub(crate) fn kernels(&self) -> cl_command_queue {
        self.kernels
    }

    /// A queue that does one thing after the other.
    pub(crate) fn queue(&self) -> Result<Queue, Status> {
        // SAFETY: context and device are alive.
        status(unsafe { cq::create_command_queue(self.context, self.id, 0) }).map(Queue)
    }

    /// A buffer.
    pub(crate) fn buffer(&self, bytes: usize) -> Result<Buffer, Status> {
        // SAFETY: the context is alive; no host pointer is given.
        status(unsafe { mm::create_buffer(self.context, mm::CL_MEM_READ_WRITE, bytes, ptr::null_mut()) }).map(Buffer)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: both are this value's own, and nothing is asked of them any more.
        unsafe {
            let _ = cq::release_command_queue(self.kernels);
            let _ = cx::release_context(self.context);
        }
    }
}

/// Memory on a device.
#[derive(Debug)]
pub struct Buffer(cl_mem);

// SAFETY: as of `Device`.
unsafe impl Send for Buffer {}
// SAFETY: as of `Device`.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(crate) fn raw(&self) -> cl_mem {
        self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it is this value's own.
        let _ = unsafe { mm::release_mem_object(self.0) };
    }
}

/// The end of something that was enqueued.
#[derive(Debug)]
pub struct Event(cl_event);

// SAFETY: as of `Device`.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it is this value's own.
        let _ = unsafe { ev::release_event(self.0) };
    }
}

/// Waits for all of them.
///
/// # Errors
/// The status of the first that failed, as far as the device says which.
pub(crate) fn wait(events: &[Event]) -> Result<(), Status> {
    let raw: Vec<cl_event> = events.iter().map(|event| event.0).collect();
    if raw.is_empty() {
        return Ok(());
    }
    status(ev::wait_for_events(&raw))
}

/// A queue that copies.
#[derive(Debug)]
pub struct Queue(cl_command_queue);

// SAFETY: as of `Device`.
unsafe impl Send for Queue {}
// SAFETY: as of `Device`.
unsafe impl Sync for Queue {}

impl Queue {
    /// Copies from the host into a buffer.
    ///
    /// # Safety
    /// `len` bytes at `host` stay valid for reads, and as they are, until the event has been waited for.
    pub(crate) unsafe fn write(&self, buffer: &Buffer, at: usize, host: *const u8, len: usize) -> Result<Event, Status> {
        // SAFETY: queue and buffer are alive; OpenCL checks the range; the host's memory is the caller's promise.
        status(unsafe { cq::enqueue_write_buffer(self.0, buffer.0, 0, at, len, host.cast::<c_void>(), 0, ptr::null()) }).map(Event)
    }

    /// Copies from a buffer to the host.
    ///
    /// # Safety
    /// `len` bytes at `host` stay valid for writes, and nobody else uses them, until the event has been waited for.
    pub(crate) unsafe fn read(&self, buffer: &Buffer, at: usize, host: *mut u8, len: usize) -> Result<Event, Status> {
        // SAFETY: as in `write`.
        status(unsafe { cq::enqueue_read_buffer(self.0, buffer.0, 0, at, len, host.cast::<c_void>(), 0, ptr::null()) }).map(Event)
    }

    /// Zeroes bytes of a buffer.
    pub(crate) fn zero(&self, buffer: &Buffer, at: usize, len: usize) -> Result<Event, Status> {
        // The pattern's size must divide both (clEnqueueFillBuffer), and is best large.
        let zeros = [0u64; 16];
        let size = 1 << (at | len | 128).trailing_zeros();
        // SAFETY: queue and buffer are alive; the pattern is read before the call returns.
        status(unsafe { cq::enqueue_fill_buffer(self.0, buffer.0, zeros.as_ptr().cast::<c_void>(), size, at, len, 0, ptr::null()) })
            .map(Event)
    }

    /// Sees to it that what was enqueued begins.
    pub(crate) fn flush(&self) -> Result<(), Status> {
        status(cq::flush(self.0))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: it is this value's own.
        let _ = unsafe { cq::release_command_queue(self.0) };
    }
}
