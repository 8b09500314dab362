//! Opening OpenCL devices.

use crate::Device;
use std::sync::{Mutex, PoisonError};
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
}

impl OpenClBuilder<'_> {
    /// Bytes of the device's memory that uhmm may use, rounded down to 2 MiB: one buffer, made when the device is opened. Default: a quarter of what it has.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.config.memory = bytes.max(1);
        self
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none of that name, or it cannot be had so; the message has the OpenCL name of the status, and what there is.
    pub fn open(self) -> Result<Device, Error> {
        Ok(Device { dev: self.core.device(self.config, uhmm_opencl::open)? })
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
