//! The calls of OpenCL that the programs make: a device with one queue that works in order, buffers, kernels.
//!
//! Sources: the OpenCL specification, version 1.2, by the names of the calls.
#![allow(unsafe_code)] // the foreign calls

use cl3::command_queue as cq;
use cl3::context as cx;
use cl3::device as dv;
use cl3::error_codes::error_text;
use cl3::event as ev;
use cl3::kernel as kn;
use cl3::memory as mm;
use cl3::platform as pf;
use cl3::program as pg;
use cl3::types::{CL_FALSE, CL_TRUE, cl_command_queue, cl_context, cl_device_id, cl_kernel, cl_mem, cl_program};
use core::ffi::c_void;
use core::marker::PhantomData;
use core::ptr;
use std::ffi::CString;

/// What OpenCL said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error("{call}: {} ({status})", error_text(*status))]
    Call {
        /// Which.
        call: &'static str,
        /// What it returned.
        status: i32,
    },
    /// There is no such device.
    #[error("there is no OpenCL device number {0}")]
    NoDevice(usize),
    /// A kernel does not compile.
    #[error("the program does not compile: {0}")]
    Build(String),
}

/// The result of a call.
pub type Result<T> = core::result::Result<T, Error>;

fn checked<T>(call: &'static str, result: core::result::Result<T, i32>) -> Result<T> {
    result.map_err(|status| Error::Call { call, status })
}

/// A device, its context, and a queue that works in order.
#[derive(Debug)]
pub struct Cl {
    context: cl_context,
    device: cl_device_id,
    queue: cl_command_queue,
}

impl Cl {
    /// Opens a device by its number, over all platforms in their order; those that are not ready, or have no compiler, do not count.
    ///
    /// # Errors
    /// [`Error::NoDevice`], and what the calls say.
    pub fn open(number: usize) -> Result<Cl> {
        let mut devices = vec![];
        for platform in checked("clGetPlatformIDs", pf::get_platform_ids())? {
            devices.extend(dv::get_device_ids(platform, dv::CL_DEVICE_TYPE_ALL).unwrap_or_default());
        }
        let says = |device, what| dv::get_device_info(device, what).map(u32::from).unwrap_or_default() != 0;
        devices.retain(|&device| says(device, dv::CL_DEVICE_AVAILABLE) && says(device, dv::CL_DEVICE_COMPILER_AVAILABLE));
        let device = *devices.get(number).ok_or(Error::NoDevice(number))?;
        let context = checked("clCreateContext", cx::create_context(&[device], ptr::null(), None, ptr::null_mut()))?;
        // SAFETY: both are valid: they come from the calls above.
        let queue = checked("clCreateCommandQueue", unsafe { cq::create_command_queue(context, device, 0) })?;
        Ok(Cl { context, device, queue })
    }

    /// A buffer for so many elements.
    ///
    /// # Errors
    /// What clCreateBuffer says.
    pub fn buffer<T: Copy>(&self, len: usize) -> Result<Buffer<'_, T>> {
        // SAFETY: the context is valid, and no host pointer is given.
        let mem = unsafe { mm::create_buffer(self.context, mm::CL_MEM_READ_WRITE, len * size_of::<T>(), ptr::null_mut()) };
        Ok(Buffer { cl: self, mem: checked("clCreateBuffer", mem)?, len, of: PhantomData })
    }

    /// A kernel of a program.
    ///
    /// # Errors
    /// [`Error::Build`] with the compiler's words, and what the other calls say.
    pub fn kernel(&self, source: &str, name: &str) -> Result<Kernel<'_>> {
        let program = checked("clCreateProgramWithSource", pg::create_program_with_source(self.context, &[source]))?;
        if pg::build_program(program, &[self.device], &CString::default(), None, ptr::null_mut()).is_err() {
            let log = pg::get_program_build_info(program, self.device, pg::CL_PROGRAM_BUILD_LOG).map(String::from);
            return Err(Error::Build(log.unwrap_or_default()));
        }
        let name = CString::new(name).unwrap_or_default();
        Ok(Kernel { cl: self, program, kernel: checked("clCreateKernel", kn::create_kernel(program, &name))? })
    }

    /// Waits for all that was enqueued.
    ///
    /// # Errors
    /// What clFinish says.
    pub fn finish(&self) -> Result<()> {
        checked("clFinish", cq::finish(self.queue))
    }
}

impl Drop for Cl {
    fn drop(&mut self) {
        // SAFETY: both are this value's own; buffers and kernels borrow it, and so are gone.
        unsafe {
            let _ = cq::release_command_queue(self.queue);
            let _ = cx::release_context(self.context);
        }
    }
}

/// Memory of the device for elements of one type.
#[derive(Debug)]
pub struct Buffer<'c, T> {
    cl: &'c Cl,
    mem: cl_mem,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Copy> Buffer<'_, T> {
    /// Begins to copy `data` there, from element `at` on.
    ///
    /// # Safety
    /// The data stays as it is until a call that waits ([`Cl::finish`], [`read`](Self::read)) has returned.
    ///
    /// # Errors
    /// What clEnqueueWriteBuffer says.
    pub unsafe fn write(&self, at: usize, data: &[T]) -> Result<()> {
        let (at, bytes) = (at * size_of::<T>(), size_of_val(data));
        // SAFETY: queue and buffer are valid; OpenCL checks the range; that the data stays is the caller's promise.
        let event = unsafe { cq::enqueue_write_buffer(self.cl.queue, self.mem, CL_FALSE, at, bytes, data.as_ptr().cast(), 0, ptr::null()) };
        forget("clEnqueueWriteBuffer", event)
    }

    /// Begins to copy rows of so many elements, which are `apart` on both sides: from element `at` of the buffer on, and from the beginning of `data`.
    ///
    /// # Safety
    /// As of [`write`](Self::write).
    ///
    /// # Errors
    /// What clEnqueueWriteBufferRect says.
    ///
    /// # Panics
    /// If the data has not so many rows.
    pub unsafe fn write_rows(&self, at: usize, data: &[T], len: usize, rows: usize, apart: usize) -> Result<()> {
        assert!(rows > 0 && (rows - 1) * apart + len <= data.len(), "so many rows");
        let [at, len, apart] = [at, len, apart].map(|elements| elements * size_of::<T>());
        let [there, here, region] = [[at, 0, 0], [0; 3], [len, rows, 1]];
        // SAFETY: as in `write`; the rows are the data's, and the three have three numbers each.
        let event = unsafe {
            cq::enqueue_write_buffer_rect(
                self.cl.queue,
                self.mem,
                CL_FALSE,
                there.as_ptr(),
                here.as_ptr(),
                region.as_ptr(),
                apart,
                0,
                apart,
                0,
                data.as_ptr().cast(),
                0,
                ptr::null(),
            )
        };
        forget("clEnqueueWriteBufferRect", event)
    }

    /// Copies the elements from `at` on back, and waits for that and all before it.
    ///
    /// # Errors
    /// What clEnqueueReadBuffer says.
    pub fn read(&self, at: usize, data: &mut [T]) -> Result<()> {
        let (at, bytes) = (at * size_of::<T>(), size_of_val(data));
        // SAFETY: queue and buffer are valid; OpenCL checks the range; the call blocks, so that the data is borrowed as long as it is written.
        let event =
            unsafe { cq::enqueue_read_buffer(self.cl.queue, self.mem, CL_TRUE, at, bytes, data.as_mut_ptr().cast(), 0, ptr::null()) };
        forget("clEnqueueReadBuffer", event)
    }

    /// How many elements it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// It as an argument of a kernel.
    pub fn arg(&self) -> Arg {
        Arg { bytes: (self.mem as usize as u64).to_ne_bytes(), size: size_of::<cl_mem>() }
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: it is this value's own. What is enqueued keeps it until it is done (clReleaseMemObject).
        let _ = unsafe { mm::release_mem_object(self.mem) };
    }
}

/// The event of something whose end the queue's order tells.
fn forget(call: &'static str, event: core::result::Result<cl3::types::cl_event, i32>) -> Result<()> {
    // SAFETY: the event is ours.
    unsafe { ev::release_event(checked(call, event)?) }.map_err(|status| Error::Call { call: "clReleaseEvent", status })
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    bytes: [u8; 8],
    size: usize,
}

impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg::from_bytes(value.to_ne_bytes())
    }
}
impl From<u64> for Arg {
    fn from(value: u64) -> Arg {
        Arg::from_bytes(value.to_ne_bytes())
    }
}
impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg::from_bytes(value.to_ne_bytes())
    }
}

impl Arg {
    fn from_bytes<const N: usize>(value: [u8; N]) -> Arg {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&value);
        Arg { bytes, size: N }
    }
}

/// A kernel.
#[derive(Debug)]
pub struct Kernel<'c> {
    cl: &'c Cl,
    program: cl_program,
    kernel: cl_kernel,
}

impl Kernel<'_> {
    /// Enqueues it: groups and work items of a group along x and y.
    ///
    /// # Safety
    /// The arguments are what the kernel takes, and it stays within its buffers.
    ///
    /// # Errors
    /// What the calls say.
    pub unsafe fn enqueue(&self, args: &[Arg], groups: [usize; 2], local: [usize; 2]) -> Result<()> {
        for (index, arg) in args.iter().enumerate() {
            // SAFETY: the kernel is valid; so many bytes are there, and are copied.
            let set = unsafe { kn::set_kernel_arg(self.kernel, index as u32, arg.size, arg.bytes.as_ptr().cast::<c_void>()) };
            checked("clSetKernelArg", set)?;
        }
        let global = [groups[0] * local[0], groups[1] * local[1]];
        // SAFETY: queue and kernel are valid, and all arguments are set; both arrays have two sides.
        let event = unsafe {
            cq::enqueue_nd_range_kernel(self.cl.queue, self.kernel, 2, ptr::null(), global.as_ptr(), local.as_ptr(), 0, ptr::null())
        };
        forget("clEnqueueNDRangeKernel", event)
    }
}

impl Drop for Kernel<'_> {
    fn drop(&mut self) {
        // SAFETY: both are this value's own.
        unsafe {
            let _ = kn::release_kernel(self.kernel);
            let _ = pg::release_program(self.program);
        }
    }
}
