//! The device that does nothing: it accepts every launch, runs no kernel, and has no memory, so that no page ever moves to it.
//!
//! What it is for: to see what uhmm itself costs and checks, without a device behind it; to test programs and tests (one that passes on this device
//! does not look at results); and as the smallest complete driver to start from. A driver with something behind it has the same parts as
//! `drivers/soft`: memory, a page table, a copy engine, and something that runs kernels. Here each of them is the empty one.
//!
//! # Rules
//! * Its [`DeviceInfo::memory`] is 0: uhmm then checks a launch as for any device and hands it over, and makes nothing resident.
//! * So nothing of a page table or of copies is ever asked of it; if it were, the answer would be an error, never a success that has not happened.
//!
//! ```no_run
//! use uhmm_core::{CoreRef, DeviceConfig};
//!
//! # fn main() -> Result<(), uhmm_core::Error> {
//! let dev = CoreRef::get()?.device(DeviceConfig::new("null"), uhmm_null::open)?;
//! assert_eq!(dev.info().memory, 0);
//! # Ok(())
//! # }
//! ```

use core::time::Duration;
use uhmm_core::driver::{self, Capabilities, Committed, DeviceInfo, Dma, DmaError, Driver, Fence, Frame, KernelFault, Launch, MapRun};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::{DeviceConfig, Error};
use uhmm_os::Errno;

/// The device.
#[derive(Debug)]
pub struct Null {
    info: DeviceInfo,
}

/// Opens the device that does nothing. It can be open any number of times, under different names.
///
/// # Errors
/// [`Error::Device`] if address space for its description is refused, or it is asked for memory or threads, which it does not have.
pub fn open(config: &DeviceConfig, _: Mode, _others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    if config.memory > 0 || config.threads > 0 {
        return Err(config.refuse("it has neither memory nor threads: leave both at their defaults"));
    }
    let capabilities = Capabilities { replayable_faults: config.replayable_faults, ..Capabilities::default() };
    let info = DeviceInfo { name: config.name, memory: 0, threads: 0, mask: 0, capabilities };
    driver::boxed(c"uhmm null device", Null { info }).map_err(|e| config.refuse(format!("cannot reserve address space: {e}")))
}

#[allow(unsafe_code)]
// SAFETY: it never maps anything, so that there is nothing that `unmap` could leave reachable, and it calls no kernel.
unsafe impl Driver for Null {
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

    fn launch(&self, _launch: &Launch) -> Result<(), KernelFault> {
        Ok(())
    }

    fn reaches(&self, _va: usize) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_nothing_and_says_so_when_asked_for_something() {
        let device = open(&DeviceConfig::new("null"), Mode::Full, &[]).unwrap();
        assert_eq!((device.info().name, device.info().memory, device.info().threads), ("null", 0, 0));
        assert_eq!(device.populate(0), Err(Errno::NOMEM));
        let dma = [Dma { kind: uhmm_core::driver::DmaKind::Zero, host: 0, frame: 0, offset: 0, len: 1 }];
        assert!(device.wait(device.copy(&dma), &dma, Duration::ZERO).is_err());
        for config in [DeviceConfig { memory: 5, ..DeviceConfig::new("n") }, DeviceConfig { threads: 1, ..DeviceConfig::new("n") }] {
            assert!(open(&config, Mode::Full, &[]).unwrap_err().to_string().contains("defaults"));
        }
    }
}
