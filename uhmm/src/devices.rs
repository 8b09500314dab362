//! Which devices there are.

use crate::{KINDS, Uhmm};
use uhmm_core::driver::DeviceInfo;

/// A device that [`Uhmm::device`] opens, or has opened.
#[derive(Clone, Debug)]
pub struct Available {
    /// What it is called there.
    pub name: String,
    /// Of a device that is found and not made: its own name, its type, and what it implements, in words.
    pub hardware: Option<String>,
    /// What it is, if it is open.
    pub open: Option<DeviceInfo>,
}

impl Uhmm {
    /// The devices that are open in this process.
    pub fn open_devices(&self) -> Vec<DeviceInfo> {
        self.core.devices()
    }

    /// The devices that can be opened by name: those in software, every OpenCL device of this machine, by its number (a type or words of its own name are names for it, too: see
    /// [`device`](Self::device)), and what is open under names of its own.
    ///
    /// ```
    /// # fn main() -> Result<(), uhmm::Error> {
    /// let hmm = uhmm::Uhmm::new()?;
    /// for device in hmm.devices() {
    ///     println!("{} {}", device.name, device.hardware.unwrap_or_default());
    /// }
    /// # assert!(hmm.devices().iter().any(|device| device.name == "soft" && device.open.is_none()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn devices(&self) -> Vec<Available> {
        let open = self.open_devices();
        let made = KINDS.iter().filter(|kind| **kind != "opencl").map(|kind| (kind.to_string(), None));
        let found = crate::opencl_devices().into_iter();
        let found = found.map(|device| (device.id, Some(format!("{}, {}, {}", device.name, device.kind, device.version))));
        let mut all: Vec<_> = made
            .chain(found)
            .map(|(name, hardware)| Available { open: open.iter().find(|info| info.name == name).cloned(), name, hardware })
            .collect();
        let others: Vec<_> = open.iter().filter(|info| all.iter().all(|known| known.name != info.name)).cloned().collect();
        all.extend(others.into_iter().map(|info| Available { name: info.name.into(), hardware: None, open: Some(info) }));
        all
    }
}
