//! Devices that fail: what waits for them, how long, and what becomes of what they had.
//!
//! A copy that failed is asked for once more; then it is an error of who asked, who has the data still, or the page is lost (`home`). A device is *lost* when it says so, or
//! has not finished a batch in [`fence_limit`](crate::DeviceConfig::fence_limit). Nothing but `unmap` and `release` is asked of it from then on. Its private pages are poisoned, block by
//! block: at once by the call that finds it out, and before that by whoever touches one. What both had, and what a launch had parked, is the CPU's as before.

use crate::core::{Core, Device, EVERYTHING};
use crate::driver::{Dma, DmaError, Done, Fence, KernelFault};
use crate::error::Error;
use crate::home;
use crate::sync::*;

impl Device {
    /// Waits for a batch that was handed to the copy engine.
    ///
    /// # Errors
    /// The driver's, but for memory that is gone.
    pub(crate) fn wait(&self, fence: Fence, batch: &[Dma]) -> Result<Done, DmaError> {
        Done::of(self.driver.wait(fence, batch, self.fence_limit)).inspect_err(|e| {
            if *e == DmaError::Lost {
                self.lose();
            }
        })
    }

    /// Has the copy engine do a batch, and waits for it. What the device fails to do is asked for once more.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn transfer(&self, batch: &[Dma]) -> Result<(), DmaError> {
        let mut result = Err(DmaError::Lost);
        for _ in 0..2 {
            if self.is_lost() {
                return Err(DmaError::Lost);
            }
            result = self.wait(self.driver.copy(batch), batch).and_then(Done::all);
            if !matches!(result, Err(DmaError::Failed(_))) {
                break;
            }
        }
        result
    }

    /// Nothing can be had of the device any more.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.changed();
    }

    /// Whether the device is known to be lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// As [`is_lost`](Self::is_lost), after asking the driver.
    pub(crate) fn has_been_lost(&self) -> bool {
        if !self.is_lost() && self.driver.is_lost() {
            self.lose();
        }
        self.is_lost()
    }

    /// # Errors
    /// That the device is out of use.
    pub(crate) fn usable(&self) -> Result<(), Error> {
        if self.removed.load(Ordering::Relaxed) {
            return Err(Error::DeviceRemoved { device: self.driver.info().name });
        }
        Ok(())
    }

    fn lost_error(&self) -> Error {
        Error::DeviceLost {
            device: self.driver.info().name,
            said: self.driver.said(),
            pages: self.counters.pages_lost.load(Ordering::Relaxed),
        }
    }

    /// What a failed launch means for who asked.
    pub(crate) fn launch_failed(&self, fault: KernelFault) -> Error {
        match fault {
            KernelFault::Lost => {
                self.lose();
                self.lost_error()
            }
            KernelFault::Device { source } => self.failed(source),
            fault => Error::Kernel(fault),
        }
    }

    /// # Errors
    /// If more pages have been lost than there were.
    pub(crate) fn gave_back(&self, lost_before: u64) -> Result<(), Error> {
        match self.counters.pages_lost.load(Ordering::Relaxed) - lost_before {
            0 => Ok(()),
            pages => Err(Error::PagesLost { device: self.driver.info().name, pages }),
        }
    }

    /// What a failed copy means for who asked.
    pub(crate) fn copy_failed(&self, e: DmaError) -> Error {
        match e {
            DmaError::Gone { address } => Error::Gone { address },
            DmaError::Failed(source) => self.failed(source),
            DmaError::Lost => self.lost_error(),
        }
    }
}

impl Core {
    /// Sees to what a lost device leaves behind, on its queue, so that no launch runs on it.
    pub(crate) fn bury<R>(&self, dev: &Device) -> Result<R, Error> {
        self.dir.for_each(EVERYTHING, |_, part| {
            let _ = home::send_home(self, dev, part.start); // it has none
        });
        Err(dev.lost_error())
    }
}
