//! The table of open devices, and how a device leaves it.
//!
//! The monitor, signal handlers and fork handlers look devices up without a lock: what they do may fault, and a lock that a fault's server needs too
//! would wait for itself. So each entry counts its visitors. Who closes a device clears the entry first, then waits until the last visitor has left;
//! whoever comes later finds nothing. Visitors never wait for who closes.
//!
//! # Rules
//! * An entry is set and cleared under the lock over the core's beginning and end ([`crate::process`]).
//! * A device is closed when it has no user any more, when it is the closer's turn alone ([`crate::line`]), so that no launch runs anywhere, and its queues joined.
//! * Its pages go home before its entry is cleared. So whoever holds the lock of a block that the device has pages of, or `prepare`, may keep a
//!   reference to the device without being a visitor.
#![allow(unsafe_code)] // devices that stay until their last visitor has left

use crate::core::{Core, Device};
use crate::lease;
use crate::own::OwnBox;
use crate::process::MAX_DEVICES;
use crate::sync::*;
use uhmm_os::thread;

/// The open devices.
#[derive(Debug, Default)]
pub(crate) struct DeviceTable {
    entries: [Entry; MAX_DEVICES],
}

/// One place in the table.
#[derive(Debug, Default)]
struct Entry {
    /// The device's address; 0 if there is none.
    device: AtomicUsize,
    /// Threads that may be looking at it.
    visitors: AtomicUsize,
}

/// A visitor's stay. The device stays as long.
struct Visit<'a>(&'a Entry);

impl<'a> Visit<'a> {
    fn to(entry: &'a Entry) -> Option<(Self, &'a Device)> {
        // An empty entry is left alone, so that nobody who closes has to wait for those who only pass.
        if entry.device.load(Ordering::SeqCst) == 0 {
            return None;
        }
        entry.visitors.fetch_add(1, Ordering::SeqCst);
        let visit = Visit(entry);
        let at = entry.device.load(Ordering::SeqCst) as *const Device;
        // SAFETY: it is null or a whole device. `take` clears the entry before it looks at `visitors`, both in one order with the two accesses here: if
        // the device was seen, `take` sees the visitor, and the device stays until `visit` is dropped.
        unsafe { at.as_ref() }.map(|device| (visit, device))
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.0.visitors.fetch_sub(1, Ordering::SeqCst);
    }
}

impl DeviceTable {
    /// Device number `index`, for who keeps it from being closed: see the module's rules.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn get(&self, index: usize) -> &Device {
        let at = self.entries[index].device.load(Ordering::Acquire) as *const Device;
        // SAFETY: set to a whole device, which the caller keeps from being closed.
        unsafe { at.as_ref() }.unwrap_or_else(|| panic!("no device {index}"))
    }

    /// Calls `f` for every open device. None of them is closed meanwhile.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&Device)) {
        for entry in &self.entries {
            if let Some((_visit, device)) = Visit::to(entry) {
                f(device);
            }
        }
    }

    /// A number that no device has.
    pub(crate) fn free(&self) -> Option<usize> {
        self.entries.iter().position(|entry| entry.device.load(Ordering::Relaxed) == 0)
    }

    /// Makes a device known.
    pub(crate) fn set(&self, index: usize, device: OwnBox<Device>) {
        self.entries[index].device.store(device.leak() as usize, Ordering::SeqCst);
    }

    /// Makes a device unknown, once its last visitor has left.
    pub(crate) fn take(&self, index: usize) -> Option<OwnBox<Device>> {
        let entry = &self.entries[index];
        let at = entry.device.swap(0, Ordering::SeqCst);
        while entry.visitors.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        // SAFETY: leaked by `set`, and taken once, for the entry is cleared by the swap.
        (at != 0).then(|| unsafe { OwnBox::reclaim(at as *mut Device) })
    }
}

impl Core {
    /// On the keeper, while the one who asks is alone: closes a device whose queue was joined. Everything it has comes home; its threads, memory and addresses go.
    pub(crate) fn close_device(&self, index: usize) {
        let dev = self.device(index);
        lease::abandon(self, dev);
        self.prefetches.cancel(index, dev.driver.info().name);
        self.evict_device(dev);
        self.policies.forget_device(index as u32 + 1);
        drop(self.devices.take(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A visitor that came before the entry was cleared keeps whoever clears it waiting; one that comes later finds nothing.
    #[test]
    fn a_visitor_is_waited_for() {
        let table = DeviceTable::default();
        table.entries[3].visitors.store(1, Ordering::SeqCst);
        let taken = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(table.take(3).is_none());
                taken.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(core::time::Duration::from_millis(20));
            assert!(!taken.load(Ordering::SeqCst), "somebody still looks");
            drop(Visit(&table.entries[3]));
        });
        assert!(taken.load(Ordering::SeqCst));
        assert!(Visit::to(&table.entries[3]).is_none());
        assert_eq!(table.entries[3].visitors.load(Ordering::SeqCst), 0);
    }
}
