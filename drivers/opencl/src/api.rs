//! The calls of OpenCL that are used, with what they make given back when it is dropped, and the devices that there are. The library is loaded at run time: where there is none, there are no devices.
//!
//! Sources: the OpenCL specification, version 1.2 and newer, by the names of the calls.
//!
//! No example: a part of the device; outside, only [`crate::devices`] and [`crate::open`] are used.
#![allow(unsafe_code)] // the foreign calls

use cl3::command_queue as cq;
use cl3::context as cx;
use cl3::device as dv;
use cl3::error_codes::{
    CL_DEVICE_NOT_AVAILABLE, CL_INVALID_COMMAND_QUEUE, CL_INVALID_CONTEXT, CL_MEM_OBJECT_ALLOCATION_FAILURE, CL_OUT_OF_HOST_MEMORY,
    CL_OUT_OF_RESOURCES, DLOPEN_RUNTIME_LOAD_FAILED, error_text,
};
use cl3::event as ev;
use cl3::memory as mm;
use cl3::platform as pf;
use cl3::types::{cl_command_queue, cl_context, cl_device_id, cl_event, cl_mem};
use core::ffi::{CStr, c_void};
use core::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use uhmm_core::driver::{DmaError, Native};
use uhmm_os::{Errno, signal, tasks, thread};

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

impl Status {
    /// What OpenCL calls it.
    pub fn name(self) -> &'static str {
        error_text(self.0)
    }

    /// Whether it says that the device is gone, and nothing that is asked of it will be done. Of a queue and a context that were made, that they are none means the same: that is how
    /// drivers tell of a device that has been reset.
    pub fn is_loss(self) -> bool {
        matches!(self.0, CL_DEVICE_NOT_AVAILABLE | CL_INVALID_CONTEXT | CL_INVALID_COMMAND_QUEUE)
    }

    /// What it means for a batch of copies.
    pub fn of_copy(self) -> DmaError {
        match self.0 {
            _ if self.is_loss() => DmaError::Lost,
            CL_MEM_OBJECT_ALLOCATION_FAILURE | CL_OUT_OF_RESOURCES | CL_OUT_OF_HOST_MEMORY => DmaError::Failed(Errno::NOMEM),
            _ => DmaError::Failed(Errno::IO),
        }
    }
}

fn status<T>(result: Result<T, i32>) -> Result<T, Status> {
    result.map_err(Status)
}

/// How threads are called that a runtime in this process makes when uhmm first uses it.
const RUNTIME: &CStr = c"uhmm:cl-runtime";

/// Calls of OpenCL that may make the runtime start threads: they are known by their name afterwards. And its compiler may take over the signals of the process.
pub(crate) fn as_runtime<R>(work: impl FnOnce() -> R) -> R {
    thread::named(RUNTIME, || signal::keep(work))
}

/// Whether a thread is the runtime's. Fault path.
pub(crate) fn is_runtimes(tid: u32) -> bool {
    tasks::is_named(tid, RUNTIME)
}

/// A device that was found.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(Default))]
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
    pub(crate) device: usize,
}

/// All devices of all platforms that are ready, with compilers.
///
/// # Errors
/// That OpenCL cannot be used at all.
pub(crate) fn find() -> Result<Vec<Found>, Status> {
    // PoCL makes its devices when it is first asked for them, and gives a second thread what is only half made.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    as_runtime(look)
}

fn look() -> Result<Vec<Found>, Status> {
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
                system_pointers: has_system_pointers(svm),
                device: device as usize,
            });
        }
    }
    Ok(found)
}

/// Whether CL_DEVICE_SVM_CAPABILITIES has CL_DEVICE_SVM_FINE_GRAIN_SYSTEM.
pub(crate) fn has_system_pointers(svm: u64) -> bool {
    svm & (1 << 2) != 0
}

/// A device in a context of its own.
#[derive(Debug)]
pub struct Device {
    context: cl_context,
    id: cl_device_id,
    kernels: Queue,
    /// The CPU copies: see [`by_rows`](Self::by_rows).
    cpu: bool,
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
            Ok(kernels) => Ok(Device { context, id, kernels: Queue(kernels), cpu: found.kind == "cpu" }),
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

    /// The queue for kernels, and for what they come after.
    pub(crate) fn kernels(&self) -> &Queue {
        &self.kernels
    }

    /// Whether copies of rows touch nothing between them on the host. The CPU's copy row by row. Other runtimes pin all from the first row to the last, and what lies between may be away.
    pub(crate) fn by_rows(&self) -> bool {
        self.cpu
    }

    #[cfg(test)]
    pub(crate) fn pretend(&mut self, cpu: bool) {
        self.cpu = cpu;
    }

    /// Its objects, for a program that uses OpenCL by itself.
    pub(crate) fn native(&self) -> Native {
        Native::OpenCl { context: self.context as usize, device: self.id as usize, queue: self.kernels.0 as usize }
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
        // SAFETY: it is this value's own, and nothing is asked of it any more; the queue, which goes next, holds it until then.
        let _ = unsafe { cx::release_context(self.context) };
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

impl Event {
    /// # Safety
    /// The event is nobody else's.
    pub(crate) unsafe fn new(event: cl_event) -> Self {
        Event(event)
    }

    /// Whether it has ended, well or not.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended().is_ok_and(|code| code <= 0)
    }

    /// How it has ended, once it has been waited for.
    ///
    /// # Errors
    /// With what status it failed.
    pub(crate) fn result(&self) -> Result<(), Status> {
        match self.ended()? {
            0.. => Ok(()),
            code => Err(Status(code)),
        }
    }

    /// How far it is: negative if it failed, with what status.
    fn ended(&self) -> Result<i32, Status> {
        status(ev::get_event_info(self.0, ev::CL_EVENT_COMMAND_EXECUTION_STATUS).map(i32::from))
    }
}

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

/// Why what was waited for is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// The device did not do it.
    Failed(Status),
    /// The time is over. The device may do it still.
    Late,
}

/// Tells of the end of an event.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

/// How long the end of an event is looked for before a call back is asked for: most copies end in that time, and to look costs less than to sleep and be woken.
const LOOKED: Duration = Duration::from_micros(50);

/// Waits for all events of one queue, of which the last one ends last, and no longer than until `end`. clWaitForEvents knows no limit: who waits looks for a while, and then the runtime calls back.
///
/// # Errors
/// The first that failed.
pub(crate) fn wait_until(events: &[Event], end: Instant) -> Result<(), Undone> {
    let Some(last) = events.last() else { return Ok(()) };
    let start = Instant::now();
    while last.ended().is_ok_and(|code| code > 0) {
        if start.elapsed() > LOOKED {
            sleep_until(last, end)?;
            break;
        }
        thread::yield_now();
    }
    events.iter().try_for_each(|event| event.result().map_err(Undone::Failed))
}

/// Sleeps until an event has ended, or it is time.
fn sleep_until(last: &Event, end: Instant) -> Result<(), Undone> {
    extern "C" fn ring(_: cl_event, _: i32, bell: *mut c_void) {
        // SAFETY: the runtime calls once, with what it was given for that.
        let bell = unsafe { Arc::from_raw(bell.cast::<Bell>()) };
        *bell.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        bell.changed.notify_all();
    }
    let bell = Arc::new(Bell::default());
    let given = Arc::into_raw(bell.clone());
    match ev::set_event_callback(last.0, ev::CL_COMPLETE, ring, given.cast_mut().cast()) {
        Ok(()) => {
            let mut rung = bell.rung.lock().unwrap_or_else(PoisonError::into_inner);
            while !*rung {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Undone::Late);
                }
                rung = bell.changed.wait_timeout(rung, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Err(_) => {
            // SAFETY: it was not taken.
            drop(unsafe { Arc::from_raw(given) });
            status(ev::wait_for_events(&[last.0])).map_err(Undone::Failed)?;
        }
    }
    Ok(())
}

/// Bytes that one call copies: rows of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Bytes of a row.
    pub len: usize,
    /// Rows.
    pub count: usize,
    /// Bytes from one row to the next in the buffer: no less than it has.
    pub device: usize,
    /// The same on the host.
    pub host: usize,
}

impl Rows {
    /// One row.
    pub(crate) fn one(len: usize) -> Self {
        Rows { len, count: 1, device: len, host: len }
    }
}

/// Origin in the buffer, origin on the host and region of rows, as clEnqueueWriteBufferRect takes them: bytes, rows, slices. There is one slice, so that its pitch may be left open (0).
fn rectangle(at: usize, rows: Rows) -> [[usize; 3]; 3] {
    [[at, 0, 0], [0; 3], [rows.len, rows.count, 1]]
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

    /// As [`write`](Self::write), of rows.
    ///
    /// # Safety
    /// As there, for each row.
    pub(crate) unsafe fn write_rows(&self, buffer: &Buffer, at: usize, host: *const u8, rows: Rows) -> Result<Event, Status> {
        let Rows { len, count, device, host: pitch } = rows;
        if count == 1 {
            // SAFETY: handed on.
            return unsafe { self.write(buffer, at, host, len) };
        }
        #[cfg(test)]
        tests::refuse()?;
        let (host, [there, here, region]) = (host.cast::<c_void>(), rectangle(at, rows));
        let [there, here, region] = [&there, &here, &region].map(|of| of.as_ptr());
        // SAFETY: as in `write`; the three have three numbers each, which are read before the call returns.
        status(unsafe {
            cq::enqueue_write_buffer_rect(self.0, buffer.0, 0, there, here, region, device, 0, pitch, 0, host, 0, ptr::null())
        })
        .map(Event)
    }

    /// As [`read`](Self::read), of rows. What lies between them on the host may be anybody's.
    ///
    /// # Safety
    /// As there, for each row.
    pub(crate) unsafe fn read_rows(&self, buffer: &Buffer, at: usize, host: *mut u8, rows: Rows) -> Result<Event, Status> {
        let Rows { len, count, device, host: pitch } = rows;
        if count == 1 {
            // SAFETY: handed on.
            return unsafe { self.read(buffer, at, host, len) };
        }
        #[cfg(test)]
        tests::refuse()?;
        let (host, [there, here, region]) = (host.cast::<c_void>(), rectangle(at, rows));
        let [there, here, region] = [&there, &here, &region].map(|of| of.as_ptr());
        // SAFETY: as in `write_rows`.
        status(unsafe { cq::enqueue_read_buffer_rect(self.0, buffer.0, 0, there, here, region, device, 0, pitch, 0, host, 0, ptr::null()) })
            .map(Event)
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

    pub(crate) fn raw(&self) -> cl_command_queue {
        self.0
    }

    /// Waits for all that was enqueued.
    pub(crate) fn finish(&self) -> Result<(), Status> {
        status(cq::finish(self.0))
    }

    /// What is enqueued from now on begins when all of these have ended, which another queue does.
    pub(crate) fn come_after(&self, events: &[&Event]) -> Result<(), Status> {
        let raw: Vec<cl_event> = events.iter().map(|event| event.0).collect();
        // SAFETY: queue and events are alive, and their number is right.
        let barrier = status(unsafe { cq::enqueue_barrier_with_wait_list(self.0, raw.len() as u32, raw.as_ptr()) })?;
        drop(Event(barrier));
        Ok(())
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;

    std::thread_local! {
        /// Whether devices refuse rectangles, and how often they have.
        static REFUSED: Cell<Option<u32>> = const { Cell::new(None) };
    }

    pub(super) fn refuse() -> Result<(), Status> {
        let refused = REFUSED.get();
        REFUSED.set(refused.map(|times| times + 1));
        if refused.is_some() { Err(Status(cl3::error_codes::CL_INVALID_OPERATION)) } else { Ok(()) }
    }

    /// Calls `f` while devices refuse this thread's rectangles: how often they did.
    pub(crate) fn refusing(f: impl FnOnce()) -> u32 {
        REFUSED.set(Some(0));
        f();
        REFUSED.take().unwrap()
    }
}
