//! A device whose kernels may follow any pointer of the process (CL_DEVICE_SVM_FINE_GRAIN_SYSTEM): nothing has to move. Arguments are the process's pointers as they are, a bare pointer too, and
//! stored ones need no table. It holds no data, so that uhmm makes nothing resident for its launches and watches no memory.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.

use crate::api::{self, Device, Found};
use crate::program::Programs;
use core::time::Duration;
use uhmm_core::args::RawArg;
use uhmm_core::driver::{
    self, Capabilities, Committed, DeviceInfo, Dma, DmaError, Driver, Fence, Frame, KernelFault, Launch, MapRun, Native,
};
use uhmm_core::kernel::{Entry, Message};
use uhmm_core::own::OwnBox;
use uhmm_core::{DeviceConfig, Error};
use uhmm_os::Errno;

/// The device.
#[derive(Debug)]
pub struct Shared {
    info: DeviceInfo,
    // Programs belong to the context that `device` holds: they are dropped first.
    programs: Programs,
    device: Device,
}

/// Opens a device that was found to share the process's pointers.
///
/// # Errors
/// [`Error::Device`].
pub(crate) fn open(config: &DeviceConfig, found: &Found) -> Result<OwnBox<dyn Driver>, Error> {
    let device = api::as_runtime(|| Device::open(found)).map_err(|e| config.refuse(format!("cannot make a context and queues: {e}")))?;
    let capabilities = Capabilities { replayable_faults: true, ..Capabilities::default() };
    let info = DeviceInfo { name: config.name, memory: 0, threads: found.units, mask: 0, capabilities };
    let shared = Shared { info, programs: Programs::native(), device };
    driver::boxed(c"uhmm opencl device", shared).map_err(|e| config.refuse(format!("cannot reserve memory: {e}")))
}

#[allow(unsafe_code)]
// SAFETY: it never maps anything, so that there is nothing that `unmap` could leave reachable; kernels run while `launch` does.
unsafe impl Driver for Shared {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn populate(&self, _unit: usize) -> Result<(), Errno> {
        Err(Errno::NOMEM)
    }

    fn release(&self, _unit: usize) {}

    fn address(&self, _frame: Frame) -> usize {
        0
    }

    fn native(&self) -> Option<Native> {
        Some(self.device.native())
    }

    fn copy(&self, _batch: &[Dma]) -> Fence {
        Fence(0)
    }

    fn wait(&self, _fence: Fence, batch: &[Dma], _: Duration) -> Result<(), DmaError> {
        if batch.is_empty() { Ok(()) } else { Err(DmaError::Failed(Errno::OPNOTSUPP)) }
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        if batch.is_empty() { Ok(()) } else { Err(Errno::NOMEM) }
    }

    fn allow_writes(&self, _batch: &[MapRun]) {}

    fn unmap(&self, _batch: &[MapRun]) {}

    fn reaches(&self, _va: usize) -> bool {
        true
    }

    fn load(&self, entry: &Entry, args: &[RawArg]) -> Result<(), String> {
        // SAFETY: the kernel is alive while it is loaded (the contract of `Driver::load`).
        let form = unsafe { entry.opencl() }.ok_or(crate::NO_FORM)?;
        self.programs.load(&self.device, form)?.check(args)
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        // SAFETY: who launches waits for this, and so keeps the kernel alive.
        let form = unsafe { launch.entry.opencl() }.ok_or_else(|| KernelFault::Refused(Message::new(crate::NO_FORM)))?;
        let kernel = self.programs.load(&self.device, form).map_err(|why| KernelFault::Refused(Message::new(&why)))?;
        let ran = kernel.run_native(&self.device, &launch.bound, form.local);
        ran.map_err(|status| if status.is_loss() { KernelFault::Lost } else { KernelFault::Refused(Message::new(&status.to_string())) })
    }
}
