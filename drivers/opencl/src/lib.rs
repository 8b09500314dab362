//! Any device with OpenCL 1.2 or newer, through plain buffers: it needs neither shared virtual memory nor a page table that the process could reach.
//!
//! | module | what it does |
//! |---|---|
//! | [`api`] | the calls of OpenCL that are used, and which devices there are; the library is loaded at run time |
//! | [`memory`] | one buffer that is the device's memory, and its queue as copy engine |
//! | `pieces` | the calls that a batch of copies becomes: runs and rectangles |
//! | `stage` | memory that pieces pass through where the runtime must not touch the program's |
//! | [`table`] | where in it the blocks of the process are |
//! | [`ranges`] | the table by which kernels follow stored pointers |
//! | [`native`] | a device that shares the process's pointers: there none of the above is needed |
//! | [`program`] | kernels: compiling them, and calling them with addresses inside that buffer |
//! | `signature` | a kernel's parameters exchanged in its text |
//!
//! The device never sees the process's own pages. What a launch declares is copied into its buffer by the device's queue before the kernel starts, and the kernel gets addresses in there; a
//! range that is declared lies there in one piece ([`Capabilities::linear`]), so that arithmetic on its pointers stays native, at whatever alignment it begins.
//!
//! The OpenCL runtime lives in this process and allocates as it pleases, also when uhmm asks it for a copy to serve a touch of the program. That is no circle as long as it does not
//! touch memory that is on a device: what it allocates shares no page with what uhmm has moved, for pages that hold bytes outside of a declared range stay.
//!
//! ```no_run
//! use uhmm_core::{CoreRef, DeviceConfig};
//!
//! # fn main() -> Result<(), uhmm_core::Error> {
//! for device in uhmm_opencl::devices() {
//!     println!("{}: {}, {} MiB", device.id, device.name, device.memory >> 20);
//! }
//! let dev = CoreRef::get()?.device(DeviceConfig::new("opencl:0"), uhmm_opencl::open)?;
//! # drop(dev);
//! # Ok(())
//! # }
//! ```

pub mod api;
pub mod memory;
pub mod native;
mod pieces;
pub mod program;
pub mod ranges;
mod signature;
mod stage;
pub mod table;

use api::{Found, Status};
use core::time::Duration;
use memory::Memory;
use program::Programs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use table::Table;
use uhmm_core::args::RawArg;
use uhmm_core::driver::{
    self, Capabilities, Committed, DeviceInfo, Dma, DmaError, Driver, Fence, Frame, KernelFault, Launch, Located, MapRun, Native,
};
use uhmm_core::kernel::{Entry, Message};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::{DeviceConfig, Error};
use uhmm_os::{BLOCK, Errno, system};

/// The OpenCL devices of this machine, in the order of their platforms; none where there is no OpenCL at all.
pub fn devices() -> Vec<Found> {
    api::find().unwrap_or_default()
}

/// The device that a name means: `opencl` and `opencl:N` by number, `opencl:gpu`, `opencl:cpu` and `opencl:accelerator` the first of that type, `opencl:WORDS` the first whose name, or that of
/// its platform, has these words.
///
/// # Errors
/// Why there is none, in words.
pub fn choose(name: &str) -> Result<Found, String> {
    let all = api::find().map_err(|e| e.to_string())?;
    let wanted = name.strip_prefix("opencl").map_or(name, |rest| rest.trim_start_matches(':')).to_lowercase();
    let fits = |device: &&Found| match wanted.as_str() {
        "" => true,
        kind @ ("gpu" | "cpu" | "accelerator") => device.kind == kind,
        number if number.bytes().all(|byte| byte.is_ascii_digit()) => device.id == format!("opencl:{number}"),
        words => device.name.to_lowercase().contains(words) || device.platform.to_lowercase().contains(words),
    };
    all.iter().find(fits).cloned().ok_or_else(|| {
        let known: Vec<String> = all.iter().map(|device| format!("{} ({}, {})", device.id, device.name, device.kind)).collect();
        format!("no OpenCL device is called that; there is: {}", known.join(", "))
    })
}

/// An OpenCL device.
#[derive(Debug)]
pub struct OpenCl {
    info: DeviceInfo,
    // Fields are dropped in this order: programs and memory belong to the context that `memory` holds.
    programs: Programs,
    table: Table,
    memory: Memory,
    /// What has failed the running launch beside OpenCL.
    failed: Mutex<Failed>,
}

/// What has failed a launch beside OpenCL.
#[derive(Debug, Default)]
struct Failed {
    /// Launches that run, or stand behind one that does.
    running: usize,
    fault: Option<KernelFault>,
}

/// Why a kernel cannot run here.
const NO_FORM: &str = "it has no form in OpenCL C: make one with `Forms::new(kernel).opencl(source, name, local)`";

/// Whether a device is opened as one that shares the process's pointers.
fn shares_pointers(found: &Found, copies: bool) -> bool {
    found.system_pointers && !copies
}

/// Opens the device that [`choose`] finds for the configuration's name. One that shares the process's pointers ([`Found::system_pointers`]) uses the process's memory in place: it has no memory, whatever is
/// asked for, and nothing moves. Any other one is opened as [`open_with_copies`] does it.
///
/// # Errors
/// [`Error::Device`] if there is none, or it cannot be had as asked.
pub fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    let found = choose(config.name).map_err(|why| config.refuse(why))?;
    if shares_pointers(&found, false) { native::open(config, &found) } else { open_with_copies(config, mode, others) }
}

/// As [`open`], as a device with memory of its own in any case: what a launch declares moves there.
///
/// `memory` 0 means a quarter of the device's memory, or of the machine's if that is less (a CPU device has no other). OpenCL gives one buffer so much at most as it says
/// (CL_DEVICE_MAX_MEM_ALLOC_SIZE).
///
/// # Errors
/// [`Error::Device`] if there is none, or it cannot be had as asked.
pub fn open_with_copies(config: &DeviceConfig, _: Mode, _: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    let found = choose(config.name).map_err(|why| config.refuse(why))?;
    let asked =
        if config.memory == 0 { (found.memory / 4).min(system::total_memory() as usize / 4).min(found.largest) } else { config.memory };
    let memory = asked / BLOCK * BLOCK;
    if memory == 0 {
        return Err(config.refuse("its memory must be at least 2 MiB"));
    }
    if memory > found.largest {
        return Err(config.refuse(format!("{memory} bytes of memory are more than the {} bytes that it gives one buffer", found.largest)));
    }
    let refuse = |what: &str, status: Status| config.refuse(format!("{what}: {status}"));
    let device = api::as_runtime(|| api::Device::open(&found)).map_err(|e| refuse("cannot make a context and queues", e))?;
    let buffer =
        api::as_runtime(|| Memory::new(device, memory)).map_err(|e| refuse("cannot make a buffer for its memory: ask for less", e))?;
    let opencl = OpenCl {
        info: DeviceInfo {
            name: config.name,
            memory,
            threads: found.units,
            mask: 0,
            capabilities: Capabilities { linear: true, ..Capabilities::default() },
        },
        programs: Programs::default(),
        table: Table::new(memory / BLOCK).map_err(|e| config.refuse(format!("cannot reserve its page table: {e}")))?,
        memory: buffer,
        failed: Mutex::default(),
    };
    driver::boxed(c"uhmm opencl device", opencl).map_err(|e| config.refuse(format!("cannot reserve memory: {e}")))
}

impl OpenCl {
    fn failed(&self) -> MutexGuard<'_, Failed> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[allow(unsafe_code)]
// SAFETY: kernels reach only what their arguments name, inside the device's own buffer, and only while `launch` runs. uhmm takes nothing out of the page table that a running
// launch declares, and what is taken out is in no later launch's arguments.
unsafe impl Driver for OpenCl {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn populate(&self, _unit: usize) -> Result<(), Errno> {
        Ok(()) // the whole buffer is the device's from the beginning
    }

    fn release(&self, _unit: usize) {}

    fn address(&self, frame: Frame) -> usize {
        memory::address(frame)
    }

    fn native(&self) -> Option<Native> {
        Some(self.memory.device().native())
    }

    fn locate(&self, arg: &RawArg) -> Option<Located> {
        let offset = program::place(arg, &self.table)?;
        Some(Located { memory: self.memory.buffer().raw() as usize, offset })
    }

    fn copy(&self, batch: &[Dma]) -> Fence {
        self.memory.copy(batch)
    }

    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        self.memory.wait(fence, batch, limit)
    }

    fn is_lost(&self) -> bool {
        self.memory.health().is_lost()
    }

    fn said(&self) -> Option<&'static str> {
        self.memory.health().said()
    }

    fn reaches(&self, _va: usize) -> bool {
        true
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        self.table.enter(&batch);
        Ok(())
    }

    fn allow_writes(&self, _batch: &[MapRun]) {}

    fn unmap(&self, batch: &[MapRun]) {
        self.table.leave(batch);
    }

    fn load(&self, entry: &Entry, args: &[RawArg]) -> Result<(), String> {
        // SAFETY: the kernel is alive while it is loaded (the contract of `Driver::load`).
        let form = unsafe { entry.opencl() }.ok_or(NO_FORM)?;
        self.programs.load(self.memory.device(), form)?.check(args)
    }

    fn follows(&self, entry: &Entry, _args: &[RawArg]) -> bool {
        // SAFETY: the kernel is alive while its launch is under way.
        let form = unsafe { entry.opencl() };
        form.and_then(|form| self.programs.load(self.memory.device(), form).ok()).is_some_and(|kernel| !kernel.can_fail())
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        // SAFETY: who launches waits for this, and so keeps the kernel alive.
        let form = unsafe { launch.entry.opencl() }.ok_or_else(|| KernelFault::Refused(Message::new(NO_FORM)))?;
        let kernel = self.programs.load(self.memory.device(), form).map_err(|why| KernelFault::Refused(Message::new(&why)))?;
        {
            let mut failed = self.failed();
            if failed.running == 0 {
                failed.fault = None;
            }
            failed.running += 1;
        }
        let ran = api::as_runtime(|| kernel.run(&self.memory, &self.table, launch, form.local));
        let mut failed = self.failed();
        failed.running -= 1;
        failed.fault.take().map_or(ran, Err) // the first of several is the one that ran
    }

    fn fail(&self, fault: KernelFault) {
        self.failed().fault.get_or_insert(fault);
    }

    fn owns_runtime_thread(&self, tid: u32) -> bool {
        api::is_runtimes(tid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_shared_where_the_device_says_so_and_nobody_wants_copies() {
        let found = |system_pointers| Found { system_pointers, ..Found::default() };
        assert!(shares_pointers(&found(true), false));
        assert!(!shares_pointers(&found(true), true) && !shares_pointers(&found(false), false) && !shares_pointers(&found(false), true));
        // As CL_DEVICE_SVM_CAPABILITIES tells it: coarse-grain and fine-grain buffers, the whole system, atomics.
        assert_eq!(
            [0b0000, 0b0001, 0b0011, 0b1011, 0b0111, 0b1111, 0b0100].map(api::has_system_pointers),
            [false, false, false, false, true, true, true]
        );
    }
}
